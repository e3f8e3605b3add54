//! The rules on values of our own choosing, among them a million random ones.

use freewheel_types::CounterRng;

use super::*;

const NAMES: [&str; 3] = ["help", "guard", "refusal"];

fn role(factor: f32) -> PartRole {
    PartRole { factor, norm: None, decides: false, gate: None }
}

fn parts(help: f32, guard: f32, class: &'static str) -> Vec<Part<'static>> {
    let part = |name, factor, value, label| Part {
        name,
        part: role(factor),
        value: Some(Ok(value)),
        label,
        log_length: 2.0,
    };
    vec![
        part("help", 1.0, help, None),
        part("guard", 0.0, guard, None),
        part("refusal", 0.0, f32::from(u8::from(class == "refuse")), Some(class)),
    ]
}

fn rules() -> Rules {
    Rules { floor: -1.0, clip: [-3.0, 3.0], safety: None, tiers: vec![], costs: vec![] }
}

fn tiered() -> Rules {
    let tier = |name: &str, tier, condition| Tier {
        name: name.into(),
        tier,
        condition: Expr::condition(condition, &NAMES).unwrap(),
    };
    let tiers = vec![
        tier("hard", 2, "guard > 0.9"),
        tier("unsafe", 1, "guard > 0.5"),
        tier("overrefuse", 1, "refusal == 'refuse' && tag == 'benign'"),
    ];
    Rules { tiers, ..rules() }
}

fn piecewise_rules() -> Rules {
    let score = Expr::number("1 - guard", &NAMES).unwrap();
    Rules { safety: Some(Safety { score, tags: vec!["safety".into()], floor: 0.15 }), ..rules() }
}

fn reward(combined: &Combined) -> f32 {
    match combined.verdict {
        Verdict::Scored { reward, .. } => reward,
        ref other => panic!("{other:?}"),
    }
}

#[test]
fn a_lower_tier_always_wins_over_a_million_random_pairs() {
    let (rules, benign) = (tiered(), ["benign".to_owned()]);
    let mut tiers = [0_u32; 3];
    let mut last: Option<(u8, f32)> = None;
    for i in 0..1_000_000 {
        let rng = CounterRng::new(7, i);
        let class = ["comply", "partial", "refuse"][rng.below(2, 3) as usize];
        // Helpfulness far beyond any clip, so that it would win if anything let it.
        let values = parts((rng.normal(0) * 100.0) as f32, rng.uniform(1) as f32, class);
        let combined = combine(&values, &benign, &rules);
        let tier = combined.tier.as_ref().map_or(0, |hit| hit.tier);
        let now = (tier, reward(&combined));
        if let Some(before) = last.filter(|before| before.0 != tier) {
            let (better, worse) = if before.0 < tier { (before, now) } else { (now, before) };
            assert!(better.1 - worse.1 >= 0.5, "{better:?} against {worse:?}");
        }
        tiers[usize::from(tier)] += 1;
        last = Some(now);
    }
    assert!(tiers.iter().all(|n| *n > 50_000), "{tiers:?}");
}

#[test]
fn more_harm_never_pays_under_any_rule() {
    let gate = PartRole { gate: Some(Gate::Above(0.5)), ..role(0.0) };
    for i in 0..20_000 {
        let rng = CounterRng::new(8, i);
        let help = (rng.normal(0) * 2.0) as f32;
        let (a, b) = (rng.uniform(1) as f32, rng.uniform(2) as f32);
        let tags = if i % 3 == 0 { vec!["safety".to_owned()] } else { vec![] };
        for (name, rules, guard) in [
            ("weighted", rules(), role(-0.7)),
            ("gate", Rules { clip: [-1.0, 3.0], ..rules() }, gate),
            ("piecewise", piecewise_rules(), role(0.0)),
            ("lexicographic", tiered(), role(0.0)),
        ] {
            let at = |harm: f32| {
                let mut parts = parts(help, harm, "comply");
                parts[1].part = guard;
                reward(&combine(&parts, &tags, &rules))
            };
            assert!(at(a.max(b)) <= at(a.min(b)), "{name}: help {help}, harm {a} and {b}, tags {tags:?}");
        }
    }
}

#[test]
fn piecewise_is_llama_2s_rule_with_the_smaller_score_below_the_floor() {
    let (rules, none, safety) = (piecewise_rules(), [], ["safety".to_owned()]);
    let at = |help, harm, tags: &[String]| reward(&combine(&parts(help, harm, "comply"), tags, &rules));
    assert_eq!(at(0.7, 0.2, &none), 0.7);
    assert_eq!(at(0.7, 0.25, &safety), 0.75);
    assert_eq!(at(0.7, 0.9, &none), 1.0 - 0.9_f32);
    assert_eq!(at(-2.0, 0.9, &none), -2.0);
}

#[test]
fn costs_are_recorded_where_they_apply_and_never_touch_the_reward() {
    let on = |tag: &str| When::parse(Some(&format!("tag:{tag}"))).unwrap();
    let cost = |name: &str, expr, tag| Cost {
        name: name.into(),
        on: on(tag),
        expr: Expr::number(expr, &NAMES).unwrap(),
    };
    let costs = vec![cost("unsafe", "guard", "harmful"), cost("overref", "refusal == 'refuse'", "benign")];
    let rules = Rules { costs, ..rules() };
    let of = |class, tag: &str| combine(&parts(0.5, 0.25, class), &[tag.to_owned()], &rules);
    let values = |c: &Combined| c.costs.iter().map(|cost| cost.value).collect::<Vec<_>>();
    assert_eq!(values(&of("refuse", "benign")), [None, Some(1.0)]);
    assert_eq!(values(&of("comply", "benign")), [None, Some(0.0)]);
    assert_eq!(values(&of("comply", "harmful")), [Some(0.25), None]);
    assert_eq!(reward(&of("refuse", "benign")), reward(&of("comply", "harmful")));
}

#[test]
fn whatever_is_missing_or_not_finite_is_unscored_with_the_reason() {
    let mut rules = tiered();
    rules.costs =
        vec![Cost { name: "c".into(), on: When::Always, expr: Expr::number("0 - help", &NAMES).unwrap() }];
    let unscored = |parts: &[Part<'_>], rules: &Rules| match combine(parts, &[], rules).verdict {
        Verdict::Unscored { reason } => reason,
        scored => panic!("{scored:?}"),
    };
    for at in 0..3 {
        let mut broken = parts(0.0, 0.0, "comply");
        broken[at].value = Some(Err("away"));
        let tags = ["benign".to_owned()];
        match combine(&broken, &tags, &rules).verdict {
            Verdict::Unscored { reason } => {
                assert!(reason.contains(&format!("{}: away", NAMES[at])), "{reason}")
            }
            scored => panic!("{scored:?}"),
        }
    }
    assert!(unscored(&parts(1.0, 0.0, "comply"), &rules).contains("cost c: -1 is negative"));
    assert!(unscored(&parts(f32::NAN, 0.0, "comply"), &rules).contains("not a number"));
}

#[test]
fn normalised_values_stay_within_three_deviations() {
    let mut parts = parts(10.0, 0.0, "comply");
    parts[0].part = PartRole { norm: Some(Norm { length: 0.0, mean: 4.0, std: 3.0 }), ..role(0.5) };
    assert_eq!(reward(&combine(&parts, &[], &rules())), 1.0);
    parts[0].value = Some(Ok(1e6));
    assert_eq!(reward(&combine(&parts, &[], &rules())), 1.5);
}

#[test]
fn what_a_score_owes_to_length_is_taken_off() {
    // A reward model that gives 3 for every unit of log length: with a slope of 3 only the rest counts.
    let of = |log_length: f64, more: f32| {
        let mut parts = parts(3.0 * log_length as f32 + more, 0.0, "comply");
        parts[0].part = PartRole { norm: Some(Norm { length: 3.0, mean: 1.0, std: 2.0 }), ..role(1.0) };
        parts[0].log_length = log_length;
        reward(&combine(&parts, &[], &rules()))
    };
    assert_eq!([of(2.0, 2.0), of(5.0, 2.0), of(5.0, 3.0)], [0.5, 0.5, 1.0]);
}
