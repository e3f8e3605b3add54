//! `[reward.combine]` as written → the rules that will run.

use std::collections::BTreeSet;

use crate::ConfigProblem;
use crate::combine::{Cost, Rules, Safety, Tier};
use crate::combine_config::{CombineConfig, CombineMode};
use crate::config::{ComponentConfig, ComponentKind, RewardConfig};
use crate::expr::Expr;
use crate::when::When;

const TIER_MAX: u8 = 10;

/// Notes problems under `reward.combine.`.
struct Problems<'a>(&'a mut Vec<ConfigProblem>);

impl Problems<'_> {
    fn add(&mut self, key: impl std::fmt::Display, message: impl Into<String>) {
        self.0.push(ConfigProblem::new(format!("reward.combine.{key}"), message));
    }
}

/// The weight that was given to a component, if one was.
pub(super) fn weight(config: &RewardConfig, c: &ComponentConfig) -> Option<f32> {
    config.combine.weights.get(&c.name).copied().or(c.weight)
}

/// Checks and builds; what is wrong is left out of the result.
pub(super) fn rules(
    config: &RewardConfig,
    names: &BTreeSet<&str>,
    problems: &mut Vec<ConfigProblem>,
) -> Rules {
    let mut problems = Problems(problems);
    let combine = &config.combine;
    check_weights(config, names, &mut problems);
    check_gates(config, names, &mut problems);
    check_unused(combine, &mut problems);
    if combine.mode == CombineMode::Gate && !(config.clip[0]..=config.clip[1]).contains(&combine.floor) {
        let message = format!("must lie within reward.clip {:?}, is {}", config.clip, combine.floor);
        problems.add("floor", message);
    }
    let in_order: Vec<&str> = config.component.iter().map(|c| c.name.as_str()).collect();
    let [low, high] = config.clip;
    let rules = Rules {
        floor: combine.floor,
        // What passes its gates is never below what fails one: failing must not pay.
        clip: if combine.mode == CombineMode::Gate { [low.max(combine.floor), high] } else { config.clip },
        safety: safety(combine, &in_order, &mut problems),
        tiers: tiers(combine, &in_order, &mut problems),
        costs: costs(combine, &in_order, &mut problems),
    };
    for i in rules.classes() {
        let c = &config.component[i];
        if !c.has_classes() {
            let message = format!(
                "{:?} has no classes, only a value; compare it with a number (with classes: kind = \"refusal\", and guards that are models)",
                c.name
            );
            problems.add("tier", message);
        }
    }
    rules
}

fn check_weights(config: &RewardConfig, names: &BTreeSet<&str>, problems: &mut Problems<'_>) {
    for (name, weight) in &config.combine.weights {
        if !names.contains(name.as_str()) {
            problems.add("weights", format!("no component is called {name:?}; there are: {}", known(names)));
        }
        if !weight.is_finite() {
            problems.add("weights", format!("the weight of {name:?} must be finite, is {weight}"));
        }
        if config.component.iter().any(|c| c.name == *name && c.weight.is_some()) {
            problems.add("weights", format!("{name:?} has a weight here and in its component; give one"));
        }
        if config.combine.gates.contains(name) {
            let message = format!("{name:?} is a gate; a gate adds nothing to the sum, remove its weight");
            problems.add("weights", message);
        }
    }
}

fn known(names: &BTreeSet<&str>) -> String {
    names.iter().copied().collect::<Vec<_>>().join(", ")
}

fn check_gates(config: &RewardConfig, names: &BTreeSet<&str>, problems: &mut Problems<'_>) {
    let combine = &config.combine;
    for name in &combine.gates {
        match config.component.iter().find(|c| c.name == *name) {
            None => {
                problems.add("gates", format!("no component is called {name:?}; there are: {}", known(names)))
            }
            Some(c) if matches!(c.kind, ComponentKind::Rule | ComponentKind::Refusal) => {
                let message = format!("{name:?} is a rule; only verifiers, guards and models can be gates");
                problems.add("gates", message);
            }
            Some(_) => {}
        }
    }
    match (combine.mode == CombineMode::Gate, combine.gates.is_empty()) {
        (true, true) => {
            let message = "mode = \"gate\" needs at least one name, for example gates = [\"guard\"]";
            problems.add("gates", message);
        }
        (false, false) => problems.add("gates", "gates need mode = \"gate\""),
        _ => {}
    }
}

/// A key that the mode never reads is a mistake, not a detail.
fn check_unused(combine: &CombineConfig, problems: &mut Problems<'_>) {
    use CombineMode as M;
    let default = CombineConfig::default();
    let tiered = matches!(combine.mode, M::Lexicographic | M::Lagrangian);
    let limits = combine.mode == M::Lagrangian;
    let set = [
        ("tier", !combine.tier.is_empty(), tiered, "\"lexicographic\" or \"lagrangian\""),
        ("safety", combine.safety.is_some(), combine.mode == M::Piecewise, "\"piecewise\""),
        (
            "safety_tags",
            combine.safety_tags != default.safety_tags,
            combine.mode == M::Piecewise,
            "\"piecewise\"",
        ),
        ("lagrangian", combine.lagrangian != default.lagrangian, limits, "\"lagrangian\""),
    ];
    for (key, given, read, modes) in set {
        if given && !read {
            problems.add(key, format!("only read with mode = {modes}; remove it"));
        }
    }
}

fn safety(combine: &CombineConfig, names: &[&str], problems: &mut Problems<'_>) -> Option<Safety> {
    if combine.mode != CombineMode::Piecewise {
        return None;
    }
    if !(0.0..=1.0).contains(&combine.safety_floor) {
        problems.add("safety_floor", format!("must be 0 to 1, is {}", combine.safety_floor));
    }
    let Some(text) = &combine.safety else {
        problems
            .add("safety", "mode = \"piecewise\" needs the safety score, for example safety = \"1 - guard\"");
        return None;
    };
    let score = Expr::number(text, names).map_err(|message| problems.add("safety", message)).ok()?;
    Some(Safety { score, tags: combine.safety_tags.clone(), floor: combine.safety_floor })
}

fn tiers(combine: &CombineConfig, names: &[&str], problems: &mut Problems<'_>) -> Vec<Tier> {
    if combine.mode == CombineMode::Lexicographic && combine.tier.is_empty() {
        problems.add("tier", "mode = \"lexicographic\" needs at least one [[reward.combine.tier]]");
    }
    let mut tiers = Vec::new();
    for (i, tier) in combine.tier.iter().enumerate() {
        if tier.name.is_empty() || combine.tier[..i].iter().any(|other| other.name == tier.name) {
            problems.add(format_args!("tier[{i}].name"), format!("{:?} is empty or used twice", tier.name));
        }
        if !(1..=TIER_MAX).contains(&tier.tier) {
            problems
                .add(format_args!("tier[{i}].tier"), format!("must be 1 to {TIER_MAX}, is {}", tier.tier));
        }
        match Expr::condition(&tier.condition, names) {
            Ok(condition) => tiers.push(Tier { name: tier.name.clone(), tier: tier.tier, condition }),
            Err(message) => problems.add(format_args!("tier[{i}].if"), message),
        }
    }
    tiers
}

fn costs(combine: &CombineConfig, names: &[&str], problems: &mut Problems<'_>) -> Vec<Cost> {
    if combine.mode != CombineMode::Lagrangian {
        return Vec::new();
    }
    let l = &combine.lagrangian;
    let mut check = |good: bool, key: &str, limit: &str, value: f64| {
        if !good {
            problems.add(format_args!("lagrangian.{key}"), format!("must be {limit}, is {value}"));
        }
    };
    check(l.lr > 0.0 && l.lr <= 10.0, "lr", "above 0, up to 10", l.lr);
    check((1e-3..=1e3).contains(&l.max), "max", "0.001 to 1000", l.max);
    check(l.init >= 1e-3 && l.init <= l.max, "init", "0.001 to max", l.init);
    check((0.0..1.0).contains(&l.ema), "ema", "0 or more, below 1", l.ema);
    if l.costs.is_empty() {
        problems.add("lagrangian.costs", "mode = \"lagrangian\" needs at least one cost with a limit");
    }
    let mut costs = Vec::new();
    for (i, cost) in l.costs.iter().enumerate() {
        let key = |field: &str| format!("lagrangian.costs[{i}].{field}");
        if cost.name.is_empty() || l.costs[..i].iter().any(|other| other.name == cost.name) {
            problems.add(key("name"), format!("{:?} is empty or used twice", cost.name));
        }
        if !(cost.limit >= 0.0 && cost.limit.is_finite()) {
            problems.add(key("limit"), format!("must be 0 or more, is {}", cost.limit));
        }
        let on = When::parse(cost.on.as_deref()).map_err(|message| problems.add(key("on"), message));
        let expr = Expr::number(&cost.expr, names).map_err(|message| problems.add(key("expr"), message));
        if let (Ok(on), Ok(expr)) = (on, expr) {
            costs.push(Cost { name: cost.name.clone(), on, expr });
        }
    }
    costs
}
