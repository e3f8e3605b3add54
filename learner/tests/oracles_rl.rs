//! Losses and advantages against golden values of TRL and of published formulas, in f64.

mod oracle;

use freewheel_learner::advantage::{
    Advantage, AdvantageConfig, CreditRules, CreditSample, Gae, Sample, advantages, combine_normalised,
    credit, discounted_returns, gae, overlong_penalty, whiten,
};
use freewheel_learner::objective::{
    BatchStats, BatchTotals, Correction, KlEstimator, Loss, LossAggregation, Objective, ObjectiveConfig,
    RatioAnchor, SequenceInput, reward_penalty, value_loss,
};
use oracle::{Oracle, max_diff};
use serde_json::Value;

const LOSS_TOLERANCE: f64 = 1e-9;
const GRADIENT_TOLERANCE: f64 = 1e-8;

/// The draw: B sequences of T positions in groups of G.
struct Draw {
    oracle: Oracle,
    t: usize,
    group: usize,
    mask: Vec<f64>,
}

/// What a case computes: loss and d loss / d log-prob `[B, T]`.
struct Outcome {
    loss: f64,
    gradient: Vec<f64>,
}

impl Draw {
    fn open() -> Self {
        let oracle = Oracle::open("rl");
        let size = |key: &str| oracle.cases["shapes"][key].as_u64().unwrap() as usize;
        let (t, group) = (size("T"), size("generations_per_prompt"));
        let mask = oracle.values("mask");
        Self { oracle, t, group, mask }
    }

    fn rows(&self, name: &str) -> Vec<Vec<f64>> {
        self.oracle.values(name).chunks(self.t).map(<[f64]>::to_vec).collect()
    }

    fn masks(&self, tool: bool) -> Vec<Vec<bool>> {
        let tools = self.oracle.values("tool_mask");
        let kept = |(m, k): (&f64, &f64)| *m != 0.0 && !(tool && *k == 0.0);
        let flat: Vec<bool> = self.mask.iter().zip(&tools).map(kept).collect();
        flat.chunks(self.t).map(<[bool]>::to_vec).collect()
    }

    /// Sequences with the proximal log-probs `old` (the policy's own if absent) and one advantage a token.
    fn sequences(&self, old: Option<&str>, advantages: &[Vec<f64>], tool: bool) -> Vec<SequenceInput> {
        let fields = ["logp", "logp_mu", "logp_ref", "entropy"].map(|name| self.rows(name));
        let old = old.map(|name| self.rows(name));
        let masks = self.masks(tool);
        let sequence = |b: usize| SequenceInput {
            id: b as u64,
            policy_logprobs: fields[0][b].clone(),
            behaviour_logprobs: fields[1][b].clone(),
            proximal_logprobs: old.as_ref().map(|rows| rows[b].clone()),
            ref_logprobs: Some(fields[2][b].clone()),
            entropies: Some(fields[3][b].clone()),
            advantages: advantages[b].clone(),
            loss_mask: masks[b].clone(),
            group_tokens: 0,
        };
        (0..masks.len()).map(sequence).collect()
    }

    fn broadcast(&self, name: &str) -> Vec<Vec<f64>> {
        self.oracle.values(name).into_iter().map(|a| vec![a; self.t]).collect()
    }

    fn tokens(&self, tool: bool) -> u64 {
        self.masks(tool).iter().flatten().filter(|m| **m).count() as u64
    }

    fn totals(&self, tokens: u64) -> BatchTotals {
        let sequences = (self.mask.len() / self.t) as u64;
        BatchTotals { tokens, sequences, prompts: sequences / self.group as u64, length_max: 20 }
    }

    fn evaluate(
        &self,
        config: &ObjectiveConfig,
        sequences: &[SequenceInput],
        totals: &BatchTotals,
    ) -> Outcome {
        let loss = Loss::new(config).unwrap();
        let stats = if loss.needs_batch_pass() { loss.batch_stats(sequences) } else { BatchStats::default() };
        let mut outcome = Outcome { loss: 0.0, gradient: Vec::new() };
        for sequence in sequences {
            let part = loss.sequence(sequence, totals, &stats);
            outcome.loss += part.loss;
            outcome.gradient.extend(part.d_logprobs_f64);
            if let Some(d_entropies) = part.d_entropies {
                let expected = -config.entropy_coef / totals.tokens as f64;
                let wanted = sequence.loss_mask.iter().map(|&m| if m { expected } else { 0.0 });
                let off = d_entropies
                    .iter()
                    .zip(wanted)
                    .map(|(a, b)| (f64::from(*a) - b).abs())
                    .fold(0.0, f64::max);
                assert!(off <= 1e-9, "entropy gradient off by {off}");
            }
        }
        outcome
    }

    /// Weighted sum over the reward functions that scored; `None` where none did.
    fn scores(&self, rewards: &str) -> Vec<Option<f64>> {
        let weights = self.oracle.values("reward_weights");
        let score = |row: &[f64]| {
            let scored = row.iter().zip(&weights).filter(|(r, _)| !r.is_nan()).map(|(r, w)| r * w);
            scored.reduce(|a, b| a + b)
        };
        self.oracle.values(rewards).chunks(weights.len()).map(score).collect()
    }
}

fn text<'a>(config: &'a Value, key: &str) -> Option<&'a str> {
    config[key].as_str()
}

fn number(config: &Value, key: &str) -> Option<f64> {
    config[key].as_f64()
}

/// TRL's GRPO family.
fn grpo_family(draw: &Draw, config: &Value) -> Outcome {
    let loss_type = text(config, "loss_type").unwrap_or("dapo");
    let by_sequence = text(config, "importance_sampling_level") == Some("sequence");
    let low = number(config, "epsilon").unwrap_or(0.2);
    let high = number(config, "epsilon_high").unwrap_or(low);
    let delta = number(config, "delta");
    let objective = match loss_type {
        "grpo" if by_sequence => Objective::Gspo,
        "grpo" if delta.is_some() => Objective::TwoSided,
        "grpo" => Objective::Grpo,
        "bnpo" | "dapo" => Objective::Dapo,
        "dr_grpo" => Objective::DrGrpo,
        "cispo" => Objective::Cispo,
        "luspo" => Objective::Luspo,
        "sapo" => Objective::Sapo,
        "vespo" => Objective::Vespo,
        other => panic!("loss type {other}"),
    };
    let is_mode = text(config, "is_mode");
    let mut settings = ObjectiveConfig {
        objective,
        ratio: Some(RatioAnchor::Proximal),
        is_cap: if objective == Objective::Cispo { Some(high) } else { delta },
        kl_coef: number(config, "beta").unwrap_or(0.0),
        kl_importance_weighted: config["use_bias_correction_kl"].as_bool(),
        entropy_coef: number(config, "entropy_coef").unwrap_or(0.0),
        top_entropy: number(config, "top_entropy_quantile"),
        opsm_delta: number(config, "off_policy_mask_threshold"),
        correction: is_mode.map(|mode| match mode {
            "token_truncate" => Correction::Tis,
            "token_mask" => Correction::Mis,
            "sequence_truncate" => Correction::SeqTis,
            "sequence_mask" => Correction::SeqMis,
            other => panic!("is_mode {other}"),
        }),
        correction_low: is_mode.map(|_| number(config, "clip_min").unwrap_or(0.0)),
        correction_high: number(config, "clip_max"),
        ..Default::default()
    };
    if objective != Objective::Cispo {
        (settings.clip_low, settings.clip_high) = (Some(low), Some(high));
    }
    let tool = config["tool_mask"].as_bool().unwrap_or(false);
    let advantages = draw.broadcast(text(config, "advantages").unwrap_or("advantages_group"));
    let sequences = draw.sequences(text(config, "old"), &advantages, tool);
    let accumulation = number(config, "gradient_accumulation_steps").unwrap_or(1.0);
    let by_items = matches!(loss_type, "dapo" | "cispo" | "vespo");
    let tokens = if by_items {
        let items = number(config, "num_items_in_batch").unwrap_or(draw.tokens(false) as f64);
        (items * accumulation / number(config, "steps_per_generation").unwrap_or(1.0)) as u64
    } else {
        draw.tokens(tool)
    };
    let mut outcome = draw.evaluate(&settings, &sequences, &draw.totals(tokens));
    if !by_items {
        outcome.loss /= accumulation;
        outcome.gradient.iter_mut().for_each(|g| *g /= accumulation);
    }
    outcome
}

fn clip(draw: &Draw, config: &Value, old: &str, advantages: &[Vec<f64>]) -> Outcome {
    let low = number(config, "epsilon").unwrap();
    let settings = ObjectiveConfig {
        objective: Objective::Ppo,
        ratio: Some(RatioAnchor::Proximal),
        clip_low: Some(low),
        clip_high: Some(number(config, "epsilon_high").unwrap_or(low)),
        ..Default::default()
    };
    draw.evaluate(&settings, &draw.sequences(Some(old), advantages, false), &draw.totals(draw.tokens(false)))
}

fn decoupled_ppo(draw: &Draw, config: &Value) -> Outcome {
    let cap = number(config, "behaviour_cap");
    let masks = text(config, "cap_mode") == Some("mask");
    let settings = ObjectiveConfig {
        objective: Objective::DecoupledPpo,
        correction: masks.then_some(Correction::Mis),
        correction_low: masks.then_some(0.0),
        correction_high: cap,
        ..Default::default()
    };
    let sequences = draw.sequences(Some("logp_old"), &draw.broadcast("advantages_group"), false);
    // The golden values take masked tokens out of the denominator; ours keeps them unless told otherwise.
    let dropped = |s: &SequenceInput| {
        let rho = |t: usize| (s.proximal_logprobs.as_ref().unwrap()[t] - s.behaviour_logprobs[t]).exp();
        (0..s.loss_mask.len()).filter(|&t| s.loss_mask[t] && masks && rho(t) > cap.unwrap()).count() as u64
    };
    let tokens = draw.tokens(false) - sequences.iter().map(dropped).sum::<u64>();
    draw.evaluate(&settings, &sequences, &draw.totals(tokens))
}

fn rloo_loss(draw: &Draw, config: &Value) -> Outcome {
    let low = number(config, "epsilon");
    let settings = ObjectiveConfig {
        objective: Objective::Rloo,
        ratio: Some(RatioAnchor::Proximal),
        clip_low: low,
        clip_high: low,
        ..Default::default()
    };
    let advantages = draw.broadcast(text(config, "advantages").unwrap());
    draw.evaluate(
        &settings,
        &draw.sequences(text(config, "old"), &advantages, false),
        &draw.totals(draw.tokens(false)),
    )
}

/// Token rewards: −coef·estimate of the divergence, the score on the last token.
fn token_rewards(draw: &Draw, coef: f64, estimator: KlEstimator, scores: &[f64]) -> Vec<Vec<f64>> {
    let (old, reference, masks) = (draw.rows("logp_old"), draw.rows("logp_ref"), draw.masks(false));
    let row = |b: usize| {
        let mask = &masks[b];
        let penalty = |t: usize| -coef * estimator.evaluate(old[b][t], reference[b][t]).0;
        let mut rewards: Vec<f64> = (0..mask.len()).map(|t| if mask[t] { penalty(t) } else { 0.0 }).collect();
        rewards[mask.iter().rposition(|&m| m).unwrap()] += scores[b];
        rewards
    };
    (0..masks.len()).map(row).collect()
}

fn expect(draw: &Draw, name: &str, got: &[Vec<f64>]) {
    let diff = max_diff(&got.concat(), &draw.oracle.values(name));
    assert!(diff <= GRADIENT_TOLERANCE, "{name}: off by {diff}");
}

/// The critic's loss and its gradient, a token mean.
fn critic(draw: &Draw, case: &Value, returns: &[Vec<f64>]) {
    let clip = number(&case["config"], "value_clip");
    let (values, old, masks) = (draw.rows("values"), draw.rows("old_values"), draw.masks(false));
    let tokens = draw.tokens(false) as f64;
    let coef = number(&case["config"], "vf_coef").unwrap();
    let (mut loss, mut gradient) = (0.0, Vec::new());
    for b in 0..masks.len() {
        for t in 0..draw.t {
            let (part, slope) = value_loss(values[b][t], old[b][t], returns[b][t], clip);
            let counts = f64::from(u8::from(masks[b][t])) / tokens;
            loss += counts * part;
            gradient.push(coef * counts * slope);
        }
    }
    let off = (loss - number(case, "value_loss").unwrap()).abs();
    assert!(off <= LOSS_TOLERANCE, "{}: value loss off by {off}", case["name"]);
    let diff = max_diff(&gradient, &draw.oracle.values(text(case, "grad_values").unwrap()));
    assert!(diff <= GRADIENT_TOLERANCE, "{}: gradient of the values off by {diff}", case["name"]);
}

/// The policy part; the critic's is asserted on the way.
fn ppo_gae(draw: &Draw, case: &Value) -> Outcome {
    let (config, prefix) = (&case["config"], text(case, "outputs_prefix").unwrap());
    let estimator =
        if text(config, "kl_estimator") == Some("k3") { KlEstimator::K3 } else { KlEstimator::K1 };
    let scores: Vec<f64> = draw.scores("rewards").into_iter().map(Option::unwrap).collect();
    let rewards = token_rewards(draw, number(config, "kl_coef").unwrap(), estimator, &scores);
    expect(draw, &format!("{prefix}token_rewards"), &rewards);
    let settings = Gae { gamma: number(config, "gamma").unwrap(), lambda: number(config, "lam").unwrap() };
    let (values, masks) = (draw.rows("old_values"), draw.masks(false));
    let outputs: Vec<_> =
        (0..masks.len()).map(|b| gae(settings, &rewards[b], &values[b], &masks[b])).collect();
    let mut advantages: Vec<Vec<f64>> = outputs.iter().map(|out| out.advantages.clone()).collect();
    let returns: Vec<Vec<f64>> = outputs.into_iter().map(|out| out.returns).collect();
    expect(draw, &format!("{prefix}advantages"), &advantages);
    expect(draw, &format!("{prefix}returns"), &returns);
    critic(draw, case, &returns);
    credited(&draw.masks(false), settings, config, &scores, &rewards, &values, &returns);
    if config["whiten_advantages"].as_bool().unwrap() {
        whiten(&mut advantages, &masks, true);
    }
    clip(draw, config, "logp_old", &advantages)
}

/// The learner's own way to the same returns: penalties beside the rewards, live tokens only.
fn credited(
    masks: &[Vec<bool>],
    gae: Gae,
    config: &Value,
    scores: &[f64],
    rewards: &[Vec<f64>],
    values: &[Vec<f64>],
    returns: &[Vec<f64>],
) {
    let sample = |b: usize| {
        let last = masks[b].iter().rposition(|&m| m).unwrap();
        let own = |t: usize| if t == last { scores[b] } else { 0.0 };
        CreditSample {
            reward: scores[b],
            tokens: masks[b].len() as u64,
            greedy: None,
            components: vec![],
            live: masks[b].clone(),
            penalties: Some((0..masks[b].len()).map(|t| own(t) - rewards[b][t]).collect()),
            values: Some(values[b].clone()),
        }
    };
    let rules = CreditRules {
        advantage: AdvantageConfig { kind: Advantage::Gae, ..Default::default() },
        gae,
        whiten: config["whiten_advantages"].as_bool().unwrap(),
        component_weights: vec![],
    };
    let group: Vec<CreditSample> = (0..masks.len()).map(sample).collect();
    let credits = credit(&rules, &[group]).remove(0);
    let got: Vec<f64> = credits.into_iter().flat_map(|credit| credit.returns.unwrap()).collect();
    assert!(max_diff(&got, &returns.concat()) <= LOSS_TOLERANCE, "returns by way of credit");
}

fn reinforce_pp(draw: &Draw, case: &Value) -> Outcome {
    let (config, prefix) = (&case["config"], text(case, "outputs_prefix").unwrap());
    let mut scores: Vec<f64> = draw.scores("rewards").into_iter().map(Option::unwrap).collect();
    let baseline = config["baseline"].as_bool().unwrap();
    if baseline {
        let groups = samples(&scores.iter().map(|s| Some(*s)).collect::<Vec<_>>(), draw.group);
        scores = flat(&advantages(&AdvantageConfig::default(), &groups));
    }
    let kl_coef = number(config, "kl_coef").unwrap();
    let rewards = token_rewards(draw, kl_coef, KlEstimator::K1, &scores);
    expect(draw, &format!("{prefix}token_rewards"), &rewards);
    let (gamma, masks) = (number(config, "gamma").unwrap(), draw.masks(false));
    let mut credit: Vec<Vec<f64>> =
        rewards.iter().zip(&masks).map(|(r, m)| discounted_returns(gamma, r, m)).collect();
    whiten(&mut credit, &masks, false);
    expect(draw, &format!("{prefix}advantages"), &credit);
    if kl_coef == 0.0 {
        // Without KL in the reward the per-sample form of the config must say the same.
        let tokens = |mask: &Vec<bool>| mask.iter().filter(|m| **m).count() as u64;
        let sample = |(reward, mask): (&f64, &Vec<bool>)| Sample {
            reward: Some(*reward),
            tokens: tokens(mask),
            greedy: None,
        };
        let all: Vec<Sample> = scores.iter().zip(&masks).map(sample).collect();
        let settings = AdvantageConfig { kind: Advantage::ReinforcePp, ..Default::default() };
        let scalar = flat(&advantages(&settings, &[all]));
        let diff = max_diff(&scalar, &credit.iter().map(|row| row[0]).collect::<Vec<_>>());
        assert!(diff <= LOSS_TOLERANCE, "per-sample form off by {diff}");
    }
    clip(draw, config, "logp_old", &credit)
}

fn kl(draw: &Draw, case: &Value) -> Outcome {
    let estimator: KlEstimator = serde_json::from_value(case["config"]["estimator"].clone()).unwrap();
    let (policy, reference) = (draw.oracle.values("logp"), draw.oracle.values("logp_ref"));
    let pairs = policy.iter().zip(&reference).zip(&draw.mask);
    let (mut values, mut gradient) = (Vec::new(), Vec::new());
    for ((p, r), mask) in pairs {
        let (value, slope) = estimator.evaluate(*p, *r);
        values.push(value * mask);
        gradient.push(slope * mask / draw.tokens(false) as f64);
    }
    let golden: Vec<f64> = draw.oracle.values(text(case, "per_token").unwrap());
    let masked: Vec<f64> = golden.iter().zip(&draw.mask).map(|(x, m)| x * m).collect();
    assert!(max_diff(&values, &masked) <= LOSS_TOLERANCE, "{}", case["name"]);
    Outcome { loss: values.iter().sum::<f64>() / draw.tokens(false) as f64, gradient }
}

#[test]
fn losses_and_their_gradients() {
    let draw = Draw::open();
    let mut problems = Vec::new();
    let (mut held, mut skipped) = (0, Vec::new());
    for case in draw.oracle.cases["loss_cases"].as_array().unwrap() {
        let (name, config) = (text(case, "name").unwrap(), &case["config"]);
        let outcome = match text(case, "family").unwrap() {
            "grpo" => grpo_family(&draw, config),
            "async_grpo" => clip(&draw, config, "logp_mu", &draw.broadcast("advantages_group")),
            "decoupled_ppo" => decoupled_ppo(&draw, config),
            "rloo" => rloo_loss(&draw, config),
            "ppo_gae" => ppo_gae(&draw, case),
            "reinforce++" => reinforce_pp(&draw, case),
            "kl" => kl(&draw, case),
            _ => {
                skipped.push(name);
                continue;
            }
        };
        let expected = number(case, "policy_loss").or(number(case, "loss")).unwrap();
        let loss = (outcome.loss - expected).abs();
        let gradient = max_diff(&outcome.gradient, &draw.oracle.values(text(case, "grad").unwrap()));
        held += 1;
        if !(loss <= LOSS_TOLERANCE && gradient <= GRADIENT_TOLERANCE) {
            problems.push(format!("{name}: loss off by {loss:e}, gradient by {gradient:e}"));
        }
    }
    println!("{held} loss cases held; skipped: {skipped:?} (needs logits)");
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    assert!(held >= 40, "only {held} cases found");
}

fn samples(scores: &[Option<f64>], group: usize) -> Vec<Vec<Sample>> {
    let sample = |&reward: &Option<f64>| Sample { reward, tokens: 1, greedy: None };
    scores.chunks(group).map(|group| group.iter().map(sample).collect()).collect()
}

/// Advantages in one row, 0 where unscored, as TRL has it.
fn flat(groups: &[Vec<Option<f64>>]) -> Vec<f64> {
    groups.iter().flatten().map(|a| a.unwrap_or(0.0)).collect()
}

fn grpo_advantages(draw: &Draw, config: &Value) -> Vec<f64> {
    let rewards = text(config, "rewards").unwrap_or("rewards");
    if text(config, "aggregation") == Some("normalize_then_sum") {
        let weights = draw.oracle.values("reward_weights");
        let rows = draw.oracle.values(rewards);
        let row = |row: &[f64]| row.iter().map(|x| (!x.is_nan()).then_some(*x)).collect::<Vec<_>>();
        let rows: Vec<Vec<Option<f64>>> = rows.chunks(weights.len()).map(row).collect();
        let groups: Vec<Vec<Vec<Option<f64>>>> = rows.chunks(draw.group).map(<[_]>::to_vec).collect();
        return flat(&combine_normalised(&groups, &weights, 1e-4));
    }
    let kind = match text(config, "scale_rewards").unwrap() {
        "group" => Advantage::Grpo,
        "batch" => Advantage::BatchStd,
        "none" => Advantage::DrGrpo,
        other => panic!("scale_rewards {other}"),
    };
    let settings = AdvantageConfig { kind, std_eps: 1e-4, ..Default::default() };
    flat(&advantages(&settings, &samples(&draw.scores(rewards), draw.group)))
}

fn rloo_advantages(draw: &Draw, config: &Value) -> Vec<f64> {
    let mut scores = draw.scores(text(config, "rewards").unwrap_or("rewards"));
    if let Some(range) = config["reward_clip_range"].as_array() {
        let bound = |i: usize| range[i].as_f64().unwrap();
        scores.iter_mut().flatten().for_each(|s| *s = s.clamp(bound(0), bound(1)));
    }
    let beta = number(config, "beta").unwrap();
    let (old, reference, masks) = (draw.rows("logp_old"), draw.rows("logp_ref"), draw.masks(false));
    for (b, score) in scores.iter_mut().enumerate() {
        *score = score.map(|s| s + reward_penalty(beta, &old[b], &reference[b], &masks[b]));
    }
    let settings = AdvantageConfig { kind: Advantage::Rloo, ..Default::default() };
    let values = advantages(&settings, &samples(&scores, draw.group));
    if config["normalize_advantages"].as_bool() != Some(true) {
        return flat(&values);
    }
    // TRL divides by (std + 1e-4) over the batch: the same as one reward function z-scored over one group.
    let row = flat(&values);
    let n = row.len() as f64;
    let mean = row.iter().sum::<f64>() / n;
    let std = (row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt();
    row.iter().map(|x| (x - mean) / (std + 1e-4)).collect()
}

#[test]
fn advantages_of_groups_and_batches() {
    let draw = Draw::open();
    for case in draw.oracle.cases["advantage_cases"].as_array().unwrap() {
        let config = &case["config"];
        let got = match text(config, "kind").unwrap() {
            "grpo" => grpo_advantages(&draw, config),
            "rloo" => rloo_advantages(&draw, config),
            other => panic!("kind {other}"),
        };
        let diff = max_diff(&got, &draw.oracle.values(text(case, "output").unwrap()));
        assert!(diff <= LOSS_TOLERANCE, "{}: off by {diff}", case["name"]);
    }
}

#[test]
fn the_soft_overlong_punishment_is_trls() {
    let file = std::fs::read(oracle::root().join("rl/reward_shaping.json")).unwrap();
    let shaping: Value = serde_json::from_slice(&file).unwrap();
    let cases = shaping["cases"].as_array().unwrap().iter();
    let cases: Vec<&Value> = cases.filter(|case| case["function"] == "soft_overlong_punishment").collect();
    assert!(cases.len() >= 2);
    for case in cases {
        let size = |key: &str| case[key].as_u64().unwrap();
        let pairs = case["lengths"].as_array().unwrap().iter().zip(case["rewards"].as_array().unwrap());
        for (length, reward) in pairs {
            let got = overlong_penalty(
                length.as_u64().unwrap(),
                size("max_completion_len"),
                size("soft_punish_cache"),
            );
            assert!((got - reward.as_f64().unwrap()).abs() <= LOSS_TOLERANCE, "{case}: {length}: {got}");
        }
    }
}

#[test]
fn the_token_mean_is_over_the_batch_and_not_over_the_micro_batch() {
    let draw = Draw::open();
    let sequences = draw.sequences(Some("logp_old"), &draw.broadcast("advantages_group"), false);
    let totals = draw.totals(draw.tokens(false));
    for aggregation in
        [LossAggregation::TokenMean, LossAggregation::SeqMeanTokenMean, LossAggregation::FixedLength]
    {
        let config = ObjectiveConfig {
            objective: Objective::Dapo,
            loss_aggregation: Some(aggregation),
            ..Default::default()
        };
        let whole = draw.evaluate(&config, &sequences, &totals);
        let parts: Vec<Outcome> =
            sequences.chunks(5).map(|part| draw.evaluate(&config, part, &totals)).collect();
        let gradient: Vec<f64> = parts.iter().flat_map(|part| part.gradient.clone()).collect();
        assert_eq!(gradient, whole.gradient, "{aggregation:?}");
        assert!((parts.iter().map(|part| part.loss).sum::<f64>() - whole.loss).abs() <= 1e-14);
    }
}
