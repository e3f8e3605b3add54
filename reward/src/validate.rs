//! `[reward]` as written → the components that will run. Reports every problem at once.

use std::collections::BTreeSet;

use crate::ConfigProblem;
use crate::combine::{Bounds, Gate, PartRole};
use crate::config::{
    CombineMode, ComponentConfig, ComponentKind, GuardCategory, GuardRole, ModelInput, ModelOutput,
    OverlongInput, RewardConfig, RuleKind, VerifierKind,
};
use crate::guard::PolicyGuard;
use crate::model::{ModelJudge, Plan};
use crate::rule::Overlong;
use crate::stack::{Component, Slot};
use crate::verifiers::{self, Verifiers};
use crate::when::When;

const LATER: [CombineMode; 3] = [CombineMode::Piecewise, CombineMode::Lexicographic, CombineMode::Lagrangian];

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
) -> Result<(Vec<Slot>, Bounds), Vec<ConfigProblem>> {
    let mut problems = Vec::new();
    check_section(config, &mut problems);
    let mut names = BTreeSet::new();
    let mut slots = Vec::new();
    for (i, component) in config.component.iter().enumerate() {
        let key = format!("reward.component[{i}]");
        check_name(component, &key, &mut names, &mut problems);
        check_unused_keys(component, &key, &mut problems);
        if let Some(slot) = build_slot(config, component, &key, weights, &mut problems) {
            slots.push(slot);
        }
    }
    check_combine(config, &names, &mut problems);
    if problems.is_empty() {
        Ok((slots, Bounds { floor: config.combine.floor, clip: config.clip }))
    } else {
        Err(problems)
    }
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

fn check_combine(config: &RewardConfig, names: &BTreeSet<&str>, problems: &mut Vec<ConfigProblem>) {
    let combine = &config.combine;
    let mut problem = |key: &str, message: String| {
        problems.push(ConfigProblem::new(format!("reward.combine.{key}"), message))
    };
    let known = || names.iter().copied().collect::<Vec<_>>().join(", ");
    if LATER.contains(&combine.mode) {
        problem("mode", "this mode is not in this version; use \"weighted\" or \"gate\"".into());
    }
    for (name, weight) in &combine.weights {
        if !names.contains(name.as_str()) {
            problem("weights", format!("no component is called {name:?}; there are: {}", known()));
        }
        if !weight.is_finite() {
            problem("weights", format!("the weight of {name:?} must be finite, is {weight}"));
        }
        if config.component.iter().any(|c| c.name == *name && c.weight.is_some()) {
            problem("weights", format!("{name:?} has a weight here and in its component; give one"));
        }
        if combine.gates.contains(name) {
            problem(
                "weights",
                format!("{name:?} is a gate; a gate adds nothing to the sum, remove its weight"),
            );
        }
    }
    for name in &combine.gates {
        match config.component.iter().find(|c| c.name == *name) {
            None => problem("gates", format!("no component is called {name:?}; there are: {}", known())),
            Some(c) if c.kind == ComponentKind::Rule => {
                problem(
                    "gates",
                    format!("{name:?} is a rule; only verifiers, guards and models can be gates"),
                );
            }
            Some(_) => {}
        }
    }
    match (combine.mode, combine.gates.is_empty()) {
        (CombineMode::Gate, true) => {
            problem(
                "gates",
                "mode = \"gate\" needs at least one name, for example gates = [\"guard\"]".into(),
            );
        }
        (CombineMode::Weighted, false) => problem("gates", "gates need mode = \"gate\"".into()),
        _ => {}
    }
    if !(config.clip[0]..=config.clip[1]).contains(&combine.floor) {
        problem("floor", format!("must lie within reward.clip {:?}, is {}", config.clip, combine.floor));
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

/// A key that the chosen kind never reads is a mistake, not a detail.
fn check_unused_keys(c: &ComponentConfig, key: &str, problems: &mut Vec<ConfigProblem>) {
    use {ComponentKind as K, VerifierKind as V};
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
        ("contains", !c.contains.is_empty(), verifier(&[V::Format]), "verifier = \"format\""),
        ("excludes", !c.excludes.is_empty(), verifier(&[V::Format]), "verifier = \"format\""),
        ("length_min", c.length_min != 0, verifier(&[V::Format]), "verifier = \"format\""),
        ("length_max", c.length_max.is_some(), verifier(&[V::Format]), "verifier = \"format\""),
        ("role", c.role != GuardRole::Response, c.kind == K::Guard, "kind = \"guard\""),
        ("category", !c.category.is_empty(), c.kind == K::Guard, "kind = \"guard\""),
        (
            "threshold",
            c.threshold.is_some(),
            c.kind != K::Rule,
            "kind = \"guard\", \"verifier\" or \"model\"",
        ),
        (
            "max_tokens",
            c.max_tokens.is_some(),
            matches!(c.kind, K::Rule | K::Model),
            "kind = \"rule\" or \"model\"",
        ),
        ("buffer_tokens", c.buffer_tokens.is_some(), c.kind == K::Rule, "kind = \"rule\""),
        ("model", c.model.is_some(), c.kind == K::Model, "kind = \"model\""),
        ("input", c.input != ModelInput::Auto, c.kind == K::Model, "kind = \"model\""),
        ("label", c.label.is_some(), c.kind == K::Model, "kind = \"model\""),
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
    if c.kind == ComponentKind::Guard
        && config.combine.weights.get(&c.name).or(c.weight.as_ref()).is_some_and(|w| *w < 0.0)
    {
        let message =
            "a guard's value is the probability of harm and is subtracted; its weight must not be negative";
        problems.push(ConfigProblem::new(format!("{key}.weight"), message));
    }
    // A model's value may be a logit, which has no bounds.
    let fine = |t: f32| if c.kind == ComponentKind::Model { t.is_finite() } else { (0.0..=1.0).contains(&t) };
    if let Some(threshold) = c.threshold.filter(|t| !fine(*t)) {
        let range = if c.kind == ComponentKind::Model { "be finite" } else { "be 0 to 1" };
        problems
            .push(ConfigProblem::new(format!("{key}.threshold"), format!("must {range}, is {threshold:?}")));
    }
    let component = match c.kind {
        ComponentKind::Model => build_model(config, c, key, weights, problems),
        _ => build_component(c, key, problems),
    };
    Some(Slot { name: c.name.clone(), when: when?, role: part_role(config, c), component: component? })
}

fn part_role(config: &RewardConfig, c: &ComponentConfig) -> PartRole {
    let weight = config.combine.weights.get(&c.name).copied().or(c.weight).unwrap_or(1.0);
    let threshold = c.threshold.unwrap_or(0.5);
    let is_gate = config.combine.gates.contains(&c.name);
    let guard = c.kind == ComponentKind::Guard;
    PartRole {
        factor: if guard { -weight } else { weight },
        decides: c.kind == ComponentKind::Verifier && c.verifier != VerifierKind::Format,
        gate: is_gate.then_some(if guard { Gate::Above(threshold) } else { Gate::Below(threshold) }),
    }
}

fn build_model(
    config: &RewardConfig,
    c: &ComponentConfig,
    key: &str,
    weights: Weights,
    problems: &mut Vec<ConfigProblem>,
) -> Option<Box<dyn Component>> {
    let plan = Plan::new(c)
        .map_err(|found| {
            let named = |(field, message)| ConfigProblem::new(format!("{key}.{field}"), message);
            problems.extend(found.into_iter().map(named));
        })
        .ok()?;
    // `workers` out of range has been noted; no more threads than that are started for it.
    if weights == Weights::Leave || !problems.is_empty() {
        return None;
    }
    match ModelJudge::new(plan, config.workers) {
        Ok(judge) => Some(Box::new(judge)),
        Err(message) => {
            problems.push(ConfigProblem::new(format!("{key}.model"), message));
            None
        }
    }
}

fn build_component(
    c: &ComponentConfig,
    key: &str,
    problems: &mut Vec<ConfigProblem>,
) -> Option<Box<dyn Component>> {
    match c.kind {
        ComponentKind::Verifier => {
            let built = Verifiers::new(c);
            match built {
                Ok(verifier) => Some(Box::new(verifier)),
                Err(found) => {
                    problems.extend(
                        found
                            .into_iter()
                            .map(|(field, message)| ConfigProblem::new(format!("{key}.{field}"), message)),
                    );
                    None
                }
            }
        }
        ComponentKind::Model => unreachable!("build_slot builds models"),
        ComponentKind::Guard => build_guard(&c.category, c.role, key, problems),
        ComponentKind::Rule => {
            let RuleKind::Overlong = c.rule;
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
