//! A small model with Llama 4's attention over 64 Ki tokens: equal to the direct computation in double precision, and
//! with no more keys and values in its chunked layer than a chunk and a call need.

use freewheel_kernels::Threads;
use freewheel_kernels::attention::{AttentionMask, KV_BLOCK};
use freewheel_model::{
    Activation, AttentionSpec, BatchSeq, ExpertNames, FfnSpec, ForwardBatch, KvCache, ModelSpec, MoeSpec,
    OutputHead, ParamData, Params, PolicyWeights, Purpose, QkNorm, RopeSpec, RopeStyle, RouterKind,
    TemperatureTuning, TensorKind, TensorNames, Transformer,
};
use freewheel_types::{CounterRng, PolicyVersion};

const LENGTH: usize = 65_536 + 100;
const CHUNK: usize = 40;
const ROWS_PER_CALL: usize = 1000;
const D: usize = 16;
const HEAD: usize = 8;
const FFN: usize = 24;
const EXPERTS: usize = 4;
const VOCAB: usize = 32;
const EPS: f32 = 1e-5;
const TUNING: TemperatureTuning = TemperatureTuning { attn_scale: 0.1, floor_scale: 8192.0 };

fn attention(rotary: bool) -> AttentionSpec {
    let inv_freq = (0..HEAD / 2).map(|i| 500_000f32.powf(-2.0 * i as f32 / HEAD as f32)).collect();
    AttentionSpec {
        heads: 1,
        kv_heads: 1,
        head_dim: HEAD,
        scale: (HEAD as f32).powf(-0.5),
        rope: rotary.then_some(RopeSpec { inv_freq, attention_factor: 1.0, style: RopeStyle::Interleaved }),
        qk_norm: if rotary { QkNorm::WeightlessAfterRope } else { QkNorm::None },
        chunk: rotary.then_some(CHUNK),
        window: None,
        sinks: false,
        temperature: (!rotary).then_some(TUNING),
        qkv_bias: false,
        out_bias: false,
        latent: None,
    }
}

/// A chunked rotary layer with a dense feed-forward, then one without positions and with experts.
fn spec() -> ModelSpec {
    let activation = Activation::Silu;
    let moe = MoeSpec {
        experts: EXPERTS,
        top_k: 1,
        width: FFN,
        router: RouterKind::SigmoidOnInput,
        shared_width: Some(FFN),
        activation,
        bias: false,
    };
    ModelSpec {
        names: TensorNames { experts: ExpertNames::Fused, ..TensorNames::LLAMA },
        vocab_size: VOCAB,
        hidden: D,
        layers: vec![
            (attention(true), FfnSpec::Dense { width: FFN, activation }),
            (attention(false), FfnSpec::Moe(moe)),
        ],
        norm_eps: EPS,
        norm_offset: 0.0,
        sandwich_norms: false,
        embedding_scale: 1.0,
        tied_embeddings: false,
        head: OutputHead::LanguageModel,
        max_positions: 1 << 17,
        architecture: "Test".into(),
        vision: None,
    }
}

fn params(model: &Transformer) -> Params {
    let layout = model.layout().clone();
    let rng = CounterRng::new(5, 0);
    let mut values: Vec<f32> = (0..layout.total as u64).map(|i| rng.normal(i) as f32 * 0.3).collect();
    for tensor in layout.tensors.iter().filter(|tensor| tensor.kind == TensorKind::Norm) {
        values[tensor.range()].iter_mut().for_each(|x| *x += 1.0);
    }
    Params { layout, data: ParamData::F32(values) }
}

/// The model by its formulas, one row at a time, in double precision.
struct Direct<'a> {
    params: &'a Params,
}

type Row = Vec<f64>;

impl Direct<'_> {
    fn tensor(&self, name: &str) -> Vec<f64> {
        let tensor = self.params.layout.get(name).unwrap_or_else(|| panic!("no tensor {name}"));
        self.params.range_f32(tensor.range()).into_iter().map(f64::from).collect()
    }

    fn layer(&self, layer: usize, name: &str) -> Vec<f64> {
        self.tensor(&format!("model.layers.{layer}.{name}"))
    }

    /// Logits of the rows `wanted`.
    fn logits(&self, tokens: &[u32], wanted: &[usize]) -> Vec<Row> {
        let embedding = self.tensor("model.embed_tokens.weight");
        let x: Vec<Row> = tokens.iter().map(|&t| embedding[t as usize * D..][..D].to_vec()).collect();
        let x = self.chunked_layer(&x);
        let (keys, values) = self.keys_and_values(1, &x);
        let (norm, head) = (self.tensor("model.norm.weight"), self.tensor("lm_head.weight"));
        let logits = |&row: &usize| {
            let mut q = matvec(&self.layer(1, "self_attn.q_proj.weight"), &self.normed(1, &x[row]));
            let steps = ((row as f64 + 1.0) / f64::from(TUNING.floor_scale)).floor();
            let factor = steps.ln_1p() * f64::from(TUNING.attn_scale) + 1.0;
            q.iter_mut().for_each(|x| *x *= factor);
            let seen = attend(&q, &keys[..=row], &values[..=row]);
            let mut x = x[row].clone();
            add(&mut x, &matvec(&self.layer(1, "self_attn.o_proj.weight"), &seen));
            let out = self.experts(&rms_norm(&x, Some(&self.layer(1, "post_attention_layernorm.weight"))));
            add(&mut x, &out);
            matvec(&head, &rms_norm(&x, Some(&norm)))
        };
        wanted.iter().map(logits).collect()
    }

    fn normed(&self, layer: usize, x: &[f64]) -> Row {
        rms_norm(x, Some(&self.layer(layer, "input_layernorm.weight")))
    }

    fn keys_and_values(&self, layer: usize, x: &[Row]) -> (Vec<Row>, Vec<Row>) {
        let norm = self.layer(layer, "input_layernorm.weight");
        let (k, v) =
            (self.layer(layer, "self_attn.k_proj.weight"), self.layer(layer, "self_attn.v_proj.weight"));
        x.iter()
            .map(|x| {
                let normed = rms_norm(x, Some(&norm));
                (matvec(&k, &normed), matvec(&v, &normed))
            })
            .unzip()
    }

    /// All rows after layer 0.
    fn chunked_layer(&self, x: &[Row]) -> Vec<Row> {
        let norm = self.layer(0, "input_layernorm.weight");
        let [q, o] = ["q", "o"].map(|name| self.layer(0, &format!("self_attn.{name}_proj.weight")));
        let post = self.layer(0, "post_attention_layernorm.weight");
        let mlp = ["gate", "up", "down"].map(|name| self.layer(0, &format!("mlp.{name}_proj.weight")));
        let (mut keys, values) = self.keys_and_values(0, x);
        for (position, key) in keys.iter_mut().enumerate() {
            *key = rms_norm(&rotated(key, position), None);
        }
        let row = |(position, x): (usize, &Row)| {
            let query = rms_norm(&rotated(&matvec(&q, &rms_norm(x, Some(&norm))), position), None);
            let first = position / CHUNK * CHUNK;
            let mut x = x.clone();
            add(&mut x, &matvec(&o, &attend(&query, &keys[first..=position], &values[first..=position])));
            let normed = rms_norm(&x, Some(&post));
            add(&mut x, &gated(&matvec(&mlp[0], &normed), &matvec(&mlp[1], &normed), &mlp[2]));
            x
        };
        x.iter().enumerate().map(row).collect()
    }

    /// The best expert, its input times the sigmoid of its logit, and the shared one.
    fn experts(&self, x: &[f64]) -> Row {
        let logits = matvec(&self.layer(1, "mlp.gate.weight"), x);
        let best = (0..EXPERTS).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).expect("experts");
        let gate = 1.0 / (1.0 + (-logits[best]).exp());
        let input: Row = x.iter().map(|x| x * gate).collect();
        let expert = |name: &str, rows: usize, columns: usize| {
            let all = self.layer(1, &format!("mlp.experts.{name}"));
            transposed(&all[best * rows * columns..][..rows * columns], columns)
        };
        let gate_up = matvec(&expert("gate_up_proj", D, 2 * FFN), &input);
        let mut out = gated(&gate_up[..FFN], &gate_up[FFN..], &expert("down_proj", FFN, D));
        let shared = ["gate", "up", "down"]
            .map(|name| self.layer(1, &format!("mlp.shared_expert.{name}_proj.weight")));
        add(&mut out, &gated(&matvec(&shared[0], x), &matvec(&shared[1], x), &shared[2]));
        out
    }
}

/// `[out, in]` times a row.
fn matvec(weight: &[f64], x: &[f64]) -> Row {
    weight.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

fn transposed(values: &[f64], columns: usize) -> Vec<f64> {
    (0..columns).flat_map(|c| values.iter().skip(c).step_by(columns).copied()).collect()
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn rms_norm(x: &[f64], gain: Option<&[f64]>) -> Row {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let factor = 1.0 / (mean + f64::from(EPS)).sqrt();
    x.iter().enumerate().map(|(i, x)| x * factor * gain.map_or(1.0, |gain| gain[i])).collect()
}

fn gated(gate: &[f64], up: &[f64], down: &[f64]) -> Row {
    let hidden: Row = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
    matvec(down, &hidden)
}

/// The angle is a product in single precision, as everywhere.
fn rotated(x: &[f64], position: usize) -> Row {
    let inv_freq = attention(true).rope.expect("rotary").inv_freq;
    x.chunks_exact(2)
        .zip(inv_freq)
        .flat_map(|(pair, inv_freq)| {
            let (sin, cos) = f64::from(position as f32 * inv_freq).sin_cos();
            [pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos]
        })
        .collect()
}

fn attend(q: &[f64], keys: &[Row], values: &[Row]) -> Row {
    let scale = (HEAD as f64).powf(-0.5);
    let scores: Row = keys.iter().map(|k| q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() * scale).collect();
    let max = scores.iter().copied().fold(f64::MIN, f64::max);
    let weights: Row = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    (0..HEAD).map(|i| weights.iter().zip(values).map(|(w, v)| w * v[i]).sum::<f64>() / sum).collect()
}

#[test]
fn sixty_four_thousand_tokens_equal_the_direct_computation_and_keep_one_chunk() {
    let model = Transformer::new(spec());
    let params = params(&model);
    let threads = Threads::new(2);
    let weights = PolicyWeights::pack(&model, &params, PolicyVersion::default(), Purpose::Sampling, &threads);
    let rng = CounterRng::new(6, 0);
    let tokens: Vec<u32> = (0..LENGTH as u64).map(|i| rng.below(i, VOCAB as u64) as u32).collect();
    let wanted = [0, CHUNK - 1, CHUNK, 8191, 8192, 20_000, 40_959, 65_535, 65_536, LENGTH - 1];

    let pages: Vec<u32> = (0..LENGTH.div_ceil(KV_BLOCK) as u32).collect();
    assert_eq!(KvCache::local_mask(&model), Some(AttentionMask::Chunked(CHUNK)));
    let most = CHUNK.div_ceil(KV_BLOCK) + 1 + ROWS_PER_CALL.div_ceil(KV_BLOCK) + 1;
    let mut kv = KvCache::with_slots(&weights, pages.len(), most);
    let (mut found, mut forgotten) = (Vec::new(), 0);
    for position in (0..LENGTH).step_by(ROWS_PER_CALL) {
        let rows = ROWS_PER_CALL.min(LENGTH - position);
        let logit_rows: Vec<usize> = wanted
            .iter()
            .filter(|row| (position..position + rows).contains(row))
            .map(|row| row - position)
            .collect();
        let tokens = &tokens[position..position + rows];
        let seqs = [BatchSeq { rows, position, pages: &pages }];
        let batch = ForwardBatch { tokens, seqs: &seqs, logit_rows: &logit_rows, tiles: &[] };
        found.extend_from_slice(&weights.forward(&threads, &mut kv, &batch).logits);
        let (used, total) = kv.slots();
        assert!(used <= most && total == most, "{used} slots of {total} at {position}");
        let past = AttentionMask::Chunked(CHUNK).first_visible(position + rows) / KV_BLOCK;
        kv.forget(&pages[forgotten..past]);
        forgotten = past;
    }
    assert!(kv.slots().0 <= CHUNK.div_ceil(KV_BLOCK) + 1, "one chunk is left");
    assert!(most < pages.len() / 50, "the bound says something");

    let direct = Direct { params: &params }.logits(&tokens, &wanted);
    for ((row, direct), found) in wanted.iter().zip(&direct).zip(found.chunks_exact(VOCAB)) {
        let error = direct.iter().zip(found).map(|(a, b)| (a - f64::from(*b)).abs()).fold(0.0, f64::max);
        assert!(error <= 2e-4, "row {row}: logits differ by {error}");
        assert!(direct.iter().any(|x| x.abs() > 0.1), "row {row} says something");
    }
}
