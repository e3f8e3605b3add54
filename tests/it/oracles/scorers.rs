//! Models that score a text: classification heads on decoders, and encoders.

use freewheel_kernels::Threads;
use freewheel_model::encoder::{EncoderBatch, EncoderWeights};
use freewheel_model::{
    CLASSIFIERS, PolicyWeights, Purpose, TrainBatch, TrainSeq, load_classifier, load_encoder, score_row,
};
use freewheel_types::PolicyVersion;

use super::golden::{LOSS_TOLERANCE, Measured, Oracle, TOLERANCE, max_diff};

/// Scores, loss and gradients of the golden batch: checked, and measured.
pub fn measure(oracle: &Oracle) -> Measured {
    if CLASSIFIERS.iter().any(|row| row.name == oracle.architecture()) {
        reward_model(oracle)
    } else {
        encoder(oracle)
    }
}

fn check(oracle: &Oracle, scores: &[f32], loss: f64) -> f32 {
    let error = max_diff(scores, &oracle.f32("scores"));
    assert!(f64::from(error) <= LOSS_TOLERANCE, "{}: scores differ by {error}", oracle.name());
    let golden = oracle.golden["loss_value"].as_f64().expect("a loss");
    assert!((loss - golden).abs() <= LOSS_TOLERANCE, "{}: loss {loss}, golden {golden}", oracle.name());
    error
}

/// A decoder with one score, by the loss of Bradley and Terry: the first half of the rows was chosen over the second.
fn reward_model(oracle: &Oracle) -> Measured {
    let threads = Threads::new(2);
    let loaded = load_classifier(&oracle.dir, None).unwrap_or_else(|e| panic!("{}: {e}", oracle.name()));
    let version = PolicyVersion::default();
    let weights = PolicyWeights::pack(&loaded.model, &loaded.params, version, Purpose::Training, &threads);
    let rows = oracle.sequences();
    let seqs: Vec<TrainSeq> = rows.iter().map(|ids| TrainSeq::whole(ids.len())).collect();
    let mut first = 0;
    let mut score_rows = Vec::new();
    for ids in &rows {
        score_rows.push(first + score_row(ids, loaded.generation.pad_id));
        first += ids.len();
    }
    let batch = TrainBatch { tokens: &rows.concat(), seqs: &seqs, replay: None, tiles: &[] };
    let tape = weights.forward_train(&threads, &batch);
    let scores = tape.logits(&threads, &weights, &score_rows);

    // −mean(ln sigmoid(chosen − rejected)).
    let pairs = rows.len() / 2;
    let mut d_scores = vec![0.0f32; scores.len()];
    let mut loss = 0.0;
    for i in 0..pairs {
        let margin = f64::from(scores[i]) - f64::from(scores[pairs + i]);
        loss += (-margin).exp().ln_1p() / pairs as f64;
        let d = -1.0 / (1.0 + margin.exp()) / pairs as f64;
        (d_scores[i], d_scores[pairs + i]) = (d as f32, -d as f32);
    }
    let logits = check(oracle, &scores, loss);
    let mut grads = vec![0.0; loaded.model.layout().total];
    tape.backward_logits(&threads, &weights, &score_rows, &d_scores, &mut grads);
    let gradients = oracle.check_gradients(loaded.model.layout(), &grads);
    Measured { logits, logprobs: None, gradients }
}

/// An encoder with a classification head, by the mean cross-entropy of its labels.
fn encoder(oracle: &Oracle) -> Measured {
    let (name, threads) = (oracle.name(), Threads::new(2));
    let loaded = load_encoder(&oracle.dir, None).unwrap_or_else(|error| panic!("{name}: {error}"));
    let weights = EncoderWeights::pack(&loaded.encoder, &loaded.params, Purpose::Training, &threads);
    let rows = oracle.sequences();
    let lengths: Vec<usize> = rows.iter().map(Vec::len).collect();
    let types = (loaded.encoder.spec().token_types > 0).then(|| oracle.rows_of("token_type_ids").concat());
    let batch = EncoderBatch { tokens: &rows.concat(), token_types: types.as_deref(), lengths: &lengths };
    let tape = weights.forward_train(&threads, &batch);
    for layer in 0..=loaded.encoder.spec().layers {
        let error = max_diff(tape.hidden(layer), &oracle.f32(&format!("hidden.{layer}")));
        assert!(error <= TOLERANCE, "{name}: hidden.{layer} differs by {error}");
    }
    let scores = tape.scores(&threads, &weights);
    let labels = oracle.i64("labels");
    let count = scores.len() / labels.len();
    let probs: Vec<f32> = scores.chunks(count).flat_map(softmax).collect();
    let error = max_diff(&probs, &oracle.f32("probs"));
    assert!(f64::from(error) <= LOSS_TOLERANCE, "{name}: probabilities differ by {error}");
    let mut d_scores = probs.clone();
    let mut loss = 0.0;
    for (i, &label) in labels.iter().enumerate() {
        loss -= f64::from(probs[i * count + label as usize]).ln() / labels.len() as f64;
        d_scores[i * count + label as usize] -= 1.0;
    }
    d_scores.iter_mut().for_each(|d| *d /= labels.len() as f32);
    let logits = check(oracle, &scores, loss);
    let mut grads = vec![0.0; loaded.encoder.layout().total];
    tape.backward(&threads, &weights, &d_scores, &mut grads);
    let gradients = oracle.check_gradients(loaded.encoder.layout(), &grads);
    Measured { logits, logprobs: None, gradients }
}

fn softmax(scores: &[f32]) -> Vec<f32> {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = scores.iter().map(|s| (s - largest).exp()).sum();
    scores.iter().map(|s| (s - largest).exp() / sum).collect()
}
