//! `[reward]` as written → the components that will run. Reports every problem at once.

mod combine;

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use crate::ConfigProblem;
use crate::combine::{Gate, Norm, PartRole, Rules};
use crate::config::{
    ComponentConfig, ComponentKind, GuardCategory, GuardFamily, GuardRole, ModelInput, ModelOutput,
    OverlongInput, RewardConfig, RuleKind, VerifierKind,
};
use crate::finish::{Calibration, Finish};
use crate::guard::PolicyGuard;
use crate::guard::embedding::{self, EmbeddingGuard};
use crate::guard::llama::{self, LlamaGuard};
use crate::guard::prompt_guard::{self, PromptGuard};
use crate::model::{ModelJudge, Plan};
use crate::rbr::RuleBased;
use crate::refusal::Refusal;
use crate::remote::Remote;
use crate::rule::{Overlong, Repetition};
use crate::sandbox::{Sandbox, SandboxConfig};
use crate::stack::{Component, Slot};
use crate::verifiers::{self, Verifiers};
use crate::when::When;

/// Whether models are loaded, or only checked by their configuration and tokenizer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Weights {
    Load,
    Leave,
}

/// Builds every component; models are left out where their weights are.
pub(crate) fn build(
    config: &RewardConfig,
    weights: Weights,
) -> Result<(Vec<Slot>, Rules), Vec<ConfigProblem>> {
    let mut problems = Vec::new();
    check_section(config, &mut problems);
    let mut names = BTreeSet::new();
    let mut slots = Vec::new();
    for (i, component) in config.component.iter().enumerate() {
        let key = format!("reward.component[{i}]");
        check_name(component, &key, &mut names, &mut problems);
        check_unused_keys(component, &key, &mut problems);
        check_holdout(config, component, &key, &mut problems);
        if let Some(slot) = build_slot(config, component, &key, weights, &mut problems) {
            slots.push(slot);
        }
    }
    let rules = combine::rules(config, &names, &mut problems);
    for i in rules.read().into_iter().filter(|i| config.component[*i].holdout) {
        let message =
            format!("{:?} is a hold-out, which nothing that is optimised may read", config.component[i].name);
        problems.push(ConfigProblem::new(format!("reward.component[{i}].holdout"), message));
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    // What an expression reads is no part of the sum unless it is given a weight.
    for i in rules.read() {
        if combine::weight(config, &config.component[i]).is_none()
            && let Some(slot) = slots.get_mut(i)
        {
            slot.role.factor = 0.0;
        }
    }
    Ok((slots, rules))
}

fn check_section(config: &RewardConfig, problems: &mut Vec<ConfigProblem>) {
    let mut problem =
        |key: &str, message: String| problems.push(ConfigProblem::new(format!("reward.{key}"), message));
    if config.component.is_empty() {
        problem("component", "nothing judges; add a [[reward.component]]".into());
    }
    if !(1..=600_000).contains(&config.deadline_ms) {
        problem("deadline_ms", format!("must be 1 to 600000 milliseconds, is {}", config.deadline_ms));
    }
    if !(1..=256).contains(&config.workers) {
        problem("workers", format!("must be 1 to 256 threads, is {}", config.workers));
    }
    let [low, high] = config.clip;
    if !(low.is_finite() && high.is_finite() && low < high) {
        problem("clip", format!("must be [low, high], finite, low below high; is [{low}, {high}]"));
    }
}

fn check_name<'a>(
    component: &'a ComponentConfig,
    key: &str,
    names: &mut BTreeSet<&'a str>,
    problems: &mut Vec<ConfigProblem>,
) {
    let name = &component.name;
    let fine = !name.is_empty()
        && name.len() <= 63
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    if !fine {
        let message =
            format!("{name:?} is not allowed: 1 to 63 letters, digits, '_' or '-' (it names metrics)");
        problems.push(ConfigProblem::new(format!("{key}.name"), message));
    } else if !names.insert(name) {
        problems.push(ConfigProblem::new(format!("{key}.name"), format!("{name:?} is used twice")));
    }
}

/// A hold-out has no part in the reward.
fn check_holdout(config: &RewardConfig, c: &ComponentConfig, key: &str, problems: &mut Vec<ConfigProblem>) {
    let mut problem = |field: &str, message: String| {
        problems.push(ConfigProblem::new(format!("{key}.{field}"), message));
    };
    if let Some(share) = c.share
        && !(c.holdout && share > 0.0 && share <= 1.0)
    {
        problem("share", format!("must be above 0, up to 1, with holdout = true; is {share}"));
    }
    if c.holdout && (combine::weight(config, c).is_some() || config.combine.gates.contains(&c.name)) {
        problem("holdout", format!("{:?} has a weight or is a gate; a hold-out is never optimised", c.name));
    }
}

/// A key that the chosen kind never reads is a mistake, not a detail.
fn check_unused_keys(c: &ComponentConfig, key: &str, problems: &mut Vec<ConfigProblem>) {
    use {ComponentKind as K, GuardFamily as F, VerifierKind as V};
    let guard = |families: &[F]| c.kind == K::Guard && families.contains(&c.family);
    let verifier = |kinds: &[V]| c.kind == K::Verifier && kinds.contains(&c.verifier);
    let set = [
        ("verifier", c.verifier != V::Auto, c.kind == K::Verifier, "kind = \"verifier\""),
        (
            "ignore_case",
            c.ignore_case,
            verifier(&[V::Exact, V::Auto, V::Regex]),
            "verifier = \"exact\" or \"regex\"",
        ),
        (
            "ignore_space",
            c.ignore_space.is_some(),
            verifier(&[V::Exact, V::Auto, V::Regex]),
            "verifier = \"exact\" or \"regex\"",
        ),
        ("tolerance", c.tolerance != 0.0, verifier(&[V::Number, V::Auto]), "verifier = \"number\""),
        (
            "pattern",
            c.pattern.is_some(),
            verifier(&[V::Regex, V::Format]),
            "verifier = \"regex\" or \"format\"",
        ),
        (
            "partial",
            c.partial,
            verifier(&[V::Code, V::Instructions, V::Auto]),
            "verifier = \"code\" or \"instructions\"",
        ),
        ("schema", c.schema.is_some(), verifier(&[V::Schema]), "verifier = \"schema\""),
        (
            "ngram",
            c.ngram.is_some(),
            c.kind == K::Rule && c.rule == RuleKind::Repetition,
            "rule = \"repetition\"",
        ),
        (
            "remote",
            c.remote.is_some(),
            matches!(c.kind, K::Remote | K::Rbr) || guard(&[F::LlamaGuard3, F::LlamaGuard4]),
            "kind = \"remote\" or \"rbr\", or a Llama Guard",
        ),
        ("contains", !c.contains.is_empty(), verifier(&[V::Format]), "verifier = \"format\""),
        ("excludes", !c.excludes.is_empty(), verifier(&[V::Format]), "verifier = \"format\""),
        ("length_min", c.length_min != 0, verifier(&[V::Format]), "verifier = \"format\""),
        ("length_max", c.length_max.is_some(), verifier(&[V::Format]), "verifier = \"format\""),
        ("role", c.role != GuardRole::Response, c.kind == K::Guard, "kind = \"guard\""),
        ("family", c.family != F::Words, c.kind == K::Guard, "kind = \"guard\""),
        ("category", !c.category.is_empty(), guard(&[F::Words]), "kind = \"guard\", family = \"words\""),
        ("head", c.head.is_some(), guard(&[F::Embedding]), "kind = \"guard\", family = \"embedding\""),
        (
            "categories",
            !c.categories.is_empty(),
            guard(&[F::Embedding, F::LlamaGuard3, F::LlamaGuard4]),
            "a guard that is a model",
        ),
        (
            "threshold",
            c.threshold.is_some(),
            matches!(c.kind, K::Guard | K::Verifier | K::Model | K::Remote | K::Rbr),
            "kind = \"guard\", \"verifier\", \"model\", \"remote\" or \"rbr\"",
        ),
        (
            "max_tokens",
            c.max_tokens.is_some(),
            c.kind == K::Model
                || guard(&[F::PromptGuard])
                || (c.kind == K::Rule && c.rule == RuleKind::Overlong),
            "rule = \"overlong\", kind = \"model\" or family = \"prompt_guard\"",
        ),
        (
            "buffer_tokens",
            c.buffer_tokens.is_some(),
            c.kind == K::Rule && c.rule == RuleKind::Overlong,
            "rule = \"overlong\"",
        ),
        ("rules", c.rules.is_some(), c.kind == K::Rbr, "kind = \"rbr\""),
        (
            "calibrate",
            c.calibrate.is_some(),
            matches!(c.kind, K::Guard | K::Model | K::Remote),
            "kind = \"guard\", \"model\" or \"remote\"",
        ),
        (
            "margin",
            c.margin != 0.0,
            c.kind == K::Guard || c.calibrate.is_some(),
            "kind = \"guard\" or with calibrate",
        ),
        (
            "model",
            c.model.is_some(),
            c.kind == K::Model || (c.kind == K::Guard && c.family != F::Words),
            "kind = \"model\" or a guard that is a model",
        ),
        ("input", c.input != ModelInput::Auto, c.kind == K::Model, "kind = \"model\""),
        (
            "label",
            c.label.is_some(),
            matches!(c.kind, K::Model | K::Remote) || guard(&[F::PromptGuard]),
            "kind = \"model\" or \"remote\", or family = \"prompt_guard\"",
        ),
        ("output", c.output != ModelOutput::Auto, c.kind == K::Model, "kind = \"model\""),
        ("overlong", c.overlong != OverlongInput::Unscored, c.kind == K::Model, "kind = \"model\""),
        ("batch", c.batch.is_some(), c.kind == K::Model, "kind = \"model\""),
    ];
    for (name, given, read, needs) in set {
        if given && !read {
            problems.push(ConfigProblem::new(
                format!("{key}.{name}"),
                format!("only read with {needs}; remove it"),
            ));
        }
    }
}

fn build_slot(
    config: &RewardConfig,
    c: &ComponentConfig,
    key: &str,
    weights: Weights,
    problems: &mut Vec<ConfigProblem>,
) -> Option<Slot> {
    let when = When::parse(c.when.as_deref())
        .map_err(|message| problems.push(ConfigProblem::new(format!("{key}.when"), message)))
        .ok();
    if c.weight.is_some_and(|w| !w.is_finite()) {
        problems
            .push(ConfigProblem::new(format!("{key}.weight"), format!("must be finite, is {:?}", c.weight)));
    }
    if c.norm_mean.is_some_and(|mean| !mean.is_finite()) {
        problems.push(ConfigProblem::new(format!("{key}.norm_mean"), "must be finite"));
    }
    if c.norm_length.is_some_and(|slope| !slope.is_finite()) {
        problems.push(ConfigProblem::new(format!("{key}.norm_length"), "must be finite"));
    }
    if c.norm_std.is_some_and(|std| !(std > 0.0 && std.is_finite())) {
        problems.push(ConfigProblem::new(format!("{key}.norm_std"), "must be finite and above 0"));
    }
    if c.kind == ComponentKind::Guard
        && config.combine.weights.get(&c.name).or(c.weight.as_ref()).is_some_and(|w| *w < 0.0)
    {
        let message =
            "a guard's value is the probability of harm and is subtracted; its weight must not be negative";
        problems.push(ConfigProblem::new(format!("{key}.weight"), message));
    }
    // A model's value may be a logit, which has no bounds.
    let unbounded = matches!(c.kind, ComponentKind::Model | ComponentKind::Remote | ComponentKind::Rbr);
    let fine = |t: f32| if unbounded { t.is_finite() } else { (0.0..=1.0).contains(&t) };
    if let Some(threshold) = c.threshold.filter(|t| !fine(*t)) {
        let range = if unbounded { "be finite" } else { "be 0 to 1" };
        problems
            .push(ConfigProblem::new(format!("{key}.threshold"), format!("must {range}, is {threshold:?}")));
    }
    let component = match c.kind {
        ComponentKind::Model => build_model(config, c, key, weights, problems),
        _ => build_component(config, c, key, weights, problems),
    };
    let finish = build_finish(c, key, problems);
    let (component, finish) = (component?, finish?);
    if let Some(message) = finish.mismatch(component.version()) {
        problems.push(ConfigProblem::new(format!("{key}.calibrate"), message));
    }
    let holdout = c.holdout.then_some(c.share.unwrap_or(1.0));
    Some(Slot { name: c.name.clone(), when: when?, holdout, role: part_role(config, c), finish, component })
}

fn build_finish(c: &ComponentConfig, key: &str, problems: &mut Vec<ConfigProblem>) -> Option<Finish> {
    if !(0.0..=20.0).contains(&c.margin) {
        let message = format!("must be 0 to 20, is {}", c.margin);
        problems.push(ConfigProblem::new(format!("{key}.margin"), message));
    }
    let calibration = c.calibrate.as_deref().map(|path| Calibration::read(Path::new(path))).transpose();
    match calibration {
        Ok(calibration) => Some(Finish::new(calibration, c.margin, c.threshold.unwrap_or(0.5))),
        Err(message) => {
            problems.push(ConfigProblem::new(format!("{key}.calibrate"), message));
            None
        }
    }
}

fn part_role(config: &RewardConfig, c: &ComponentConfig) -> PartRole {
    let weight = if c.holdout { 0.0 } else { combine::weight(config, c).unwrap_or(1.0) };
    let threshold = c.threshold.unwrap_or(0.5);
    let is_gate = config.combine.gates.contains(&c.name);
    let guard = c.kind == ComponentKind::Guard;
    PartRole {
        factor: if guard { -weight } else { weight },
        norm: (c.norm_mean.is_some() || c.norm_std.is_some() || c.norm_length.is_some()).then_some(Norm {
            length: c.norm_length.unwrap_or(0.0),
            mean: c.norm_mean.unwrap_or(0.0),
            std: c.norm_std.unwrap_or(1.0),
        }),
        decides: c.kind == ComponentKind::Verifier && c.verifier != VerifierKind::Format && !c.holdout,
        gate: is_gate.then_some(if guard { Gate::Above(threshold) } else { Gate::Below(threshold) }),
    }
}

/// Notes problems of fields below `key`.
fn named(found: Vec<(&str, String)>, key: &str, problems: &mut Vec<ConfigProblem>) {
    let named = |(field, message)| ConfigProblem::new(format!("{key}.{field}"), message);
    problems.extend(found.into_iter().map(named));
}

/// What `build` loads, unless weights are to be left or something is wrong already: `workers` out of range has been noted, and no more threads than that
/// are started for it.
fn load<C: Component + 'static>(
    weights: Weights,
    problems: &mut Vec<ConfigProblem>,
    build: impl FnOnce(&mut Vec<ConfigProblem>) -> Option<C>,
) -> Option<Box<dyn Component>> {
    if weights == Weights::Leave || !problems.is_empty() {
        return None;
    }
    Some(Box::new(build(problems)?))
}

fn build_model(
    config: &RewardConfig,
    c: &ComponentConfig,
    key: &str,
    weights: Weights,
    problems: &mut Vec<ConfigProblem>,
) -> Option<Box<dyn Component>> {
    let plan = Plan::new(c).map_err(|found| named(found, key, problems)).ok()?;
    load(weights, problems, |problems| {
        let judge = ModelJudge::new(plan, config.workers);
        judge.map_err(|message| named(vec![("model", message)], key, problems)).ok()
    })
}

fn build_component(
    config: &RewardConfig,
    c: &ComponentConfig,
    key: &str,
    weights: Weights,
    problems: &mut Vec<ConfigProblem>,
) -> Option<Box<dyn Component>> {
    match c.kind {
        ComponentKind::Verifier => {
            let sandbox = (c.verifier == VerifierKind::Code)
                .then(|| build_sandbox(&config.sandbox, weights, problems))
                .transpose()
                .ok()?;
            match Verifiers::new(c, sandbox.as_ref()) {
                Ok(verifier) => Some(Box::new(verifier)),
                Err(found) => {
                    named(found, key, problems);
                    None
                }
            }
        }
        ComponentKind::Model => unreachable!("build_slot builds models"),
        ComponentKind::Guard => match c.family {
            GuardFamily::Words => build_guard(&c.category, c.role, key, problems),
            GuardFamily::Embedding => {
                let plan = embedding::Plan::new(c).map_err(|found| named(found, key, problems)).ok()?;
                load(weights, problems, |problems| {
                    let guard = EmbeddingGuard::new(plan, config.workers);
                    guard.map_err(|problem| named(vec![problem], key, problems)).ok()
                })
            }
            GuardFamily::PromptGuard => {
                let plan = prompt_guard::Plan::new(c).map_err(|found| named(found, key, problems)).ok()?;
                load(weights, problems, |problems| {
                    let guard = PromptGuard::new(plan, config.workers);
                    guard.map_err(|message| named(vec![("model", message)], key, problems)).ok()
                })
            }
            GuardFamily::LlamaGuard3 | GuardFamily::LlamaGuard4 => {
                let deadline = Duration::from_millis(config.deadline_ms);
                let plan = llama::Plan::new(c, deadline).map_err(|found| named(found, key, problems)).ok()?;
                load(weights, problems, |problems| {
                    let guard = LlamaGuard::new(plan, config.workers);
                    guard.map_err(|message| named(vec![("model", message)], key, problems)).ok()
                })
            }
        },
        ComponentKind::Refusal => Some(Box::new(Refusal::new())),
        ComponentKind::Rbr => {
            let deadline = Duration::from_millis(config.deadline_ms);
            let rules = RuleBased::new(c, deadline).map_err(|found| named(found, key, problems)).ok()?;
            Some(Box::new(rules))
        }
        ComponentKind::Remote => {
            let deadline = Duration::from_millis(config.deadline_ms);
            match Remote::new(c, deadline) {
                Ok(remote) => Some(Box::new(remote)),
                Err(found) => {
                    named(found, key, problems);
                    None
                }
            }
        }
        ComponentKind::Rule if c.rule == RuleKind::Repetition => {
            let ngram = c.ngram.unwrap_or(4);
            if !(1..=64).contains(&ngram) {
                problems
                    .push(ConfigProblem::new(format!("{key}.ngram"), format!("must be 1 to 64, is {ngram}")));
                return None;
            }
            Some(Box::new(Repetition { ngram }))
        }
        ComponentKind::Rule => {
            let Some(max_tokens) = c.max_tokens.filter(|n| *n > 0) else {
                let message =
                    "the overlong rule needs the length that costs the full penalty, at least 1 token";
                problems.push(ConfigProblem::new(format!("{key}.max_tokens"), message));
                return None;
            };
            let buffer_tokens = c.buffer_tokens.unwrap_or((max_tokens / 5).max(1));
            if !(1..=max_tokens).contains(&buffer_tokens) {
                let message = format!("must be 1 to max_tokens ({max_tokens}), is {buffer_tokens}");
                problems.push(ConfigProblem::new(format!("{key}.buffer_tokens"), message));
                return None;
            }
            Some(Box::new(Overlong { max_tokens, buffer_tokens }))
        }
    }
}

/// The sandbox, tried out unless nothing is to be loaded.
fn build_sandbox(
    config: &SandboxConfig,
    weights: Weights,
    problems: &mut Vec<ConfigProblem>,
) -> Result<Sandbox, ()> {
    let found = config.problems();
    let unusable = !found.is_empty();
    problems.extend(
        found.into_iter().map(|(key, message)| ConfigProblem::new(format!("reward.sandbox.{key}"), message)),
    );
    let tried = Sandbox::new(config.clone()).and_then(|sandbox| {
        if weights == Weights::Load && !unusable {
            sandbox.probe()?;
        }
        Ok(sandbox)
    });
    tried.map_err(|error| {
        let message = format!("code cannot be run safely on this machine: {error}");
        problems.push(ConfigProblem::new("reward.sandbox", message));
    })
}

fn build_guard(
    categories: &[GuardCategory],
    role: GuardRole,
    key: &str,
    problems: &mut Vec<ConfigProblem>,
) -> Option<Box<dyn Component>> {
    let before = problems.len();
    if categories.is_empty() {
        let message = "a guard needs at least one [[reward.component.category]] with words or patterns";
        problems.push(ConfigProblem::new(format!("{key}.category"), message));
    }
    for (i, category) in categories.iter().enumerate() {
        let mut problem = |field: &str, message: String| {
            problems.push(ConfigProblem::new(format!("{key}.category[{i}].{field}"), message));
        };
        if category.name.is_empty() {
            problem("name", "is missing".into());
        }
        if category.words.is_empty() && category.patterns.is_empty() {
            problem("words", "give words or patterns to look for".into());
        }
        if !(0.0..=1.0).contains(&category.score) {
            problem("score", format!("must be 0 to 1, is {}", category.score));
        }
        if let Some(word) = category.words.iter().find(|word| crate::guard::normalise(word).trim().is_empty())
        {
            problem("words", format!("{word:?} has no letters left after normalisation"));
        }
        for pattern in &category.patterns {
            if let Err(message) = verifiers::compile(pattern) {
                problem("patterns", message);
            }
        }
    }
    if problems.len() > before {
        return None;
    }
    match PolicyGuard::new(categories, role) {
        Ok(guard) => Some(Box::new(guard)),
        Err(message) => {
            problems.push(ConfigProblem::new(format!("{key}.category"), message));
            None
        }
    }
}
