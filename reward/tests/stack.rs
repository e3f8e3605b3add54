//! The reward stack from outside: configuration, composition, and the properties a reward must have.

use freewheel_reward::{
    CombineConfig, CombineMode, Completion, ComponentConfig, ComponentKind, GuardCategory, RewardConfig,
    RewardStack, VerifierKind,
};
use freewheel_types::{Prompt, PromptBody, PromptId, RewardRecord, Verdict};
use proptest::prelude::*;

fn prompt(answer: Option<&str>, tags: &[&str]) -> Prompt {
    Prompt {
        id: PromptId::of(b"p"),
        name: None,
        body: PromptBody::Text("?".into()),
        answer: answer.map(|a| serde_json::to_string(a).unwrap()),
        tags: tags.iter().map(|t| (*t).to_owned()).collect(),
        verifier: None,
        meta: None,
    }
}

fn verifier(name: &str, kind: VerifierKind) -> ComponentConfig {
    ComponentConfig { name: name.into(), verifier: kind, ..Default::default() }
}

/// A guard that knows `low` (0.2), `mid` (0.5) and `high` (0.9).
fn guard() -> ComponentConfig {
    let category = |word: &str, score| GuardCategory {
        name: word.into(),
        words: vec![word.into()],
        patterns: vec![],
        score,
    };
    let category = vec![category("low", 0.2), category("mid", 0.5), category("high", 0.9)];
    ComponentConfig { name: "guard".into(), kind: ComponentKind::Guard, category, ..Default::default() }
}

fn overlong() -> ComponentConfig {
    ComponentConfig {
        name: "length".into(),
        kind: ComponentKind::Rule,
        max_tokens: Some(100),
        buffer_tokens: Some(50),
        ..Default::default()
    }
}

fn weighted() -> RewardConfig {
    let weights = [("length".to_owned(), 0.2), ("answer".to_owned(), 2.0)].into();
    RewardConfig {
        component: vec![verifier("answer", VerifierKind::Math), guard(), overlong()],
        combine: CombineConfig { weights, ..Default::default() },
        ..Default::default()
    }
}

fn gated() -> RewardConfig {
    let combine =
        CombineConfig { mode: CombineMode::Gate, gates: vec!["guard".into()], ..Default::default() };
    RewardConfig {
        component: vec![verifier("answer", VerifierKind::Math), guard()],
        combine,
        ..Default::default()
    }
}

fn score(stack: &RewardStack, prompt: &Prompt, text: &str, tokens: usize) -> RewardRecord {
    stack.score(&Completion { prompt, text, tokens, truncated: false })
}

/// The record without what the clock says.
fn timeless(mut record: RewardRecord) -> String {
    record.latency_ms = 0.0;
    record.components.iter_mut().for_each(|c| c.latency_ms = 0.0);
    serde_json::to_string(&record).unwrap()
}

#[test]
fn the_weighted_sum_is_the_weighted_sum() {
    let stack = RewardStack::new(&weighted()).unwrap();
    let prompt = prompt(Some("7"), &[]);
    let reward = |text: &str, tokens| score(&stack, &prompt, text, tokens).reward().unwrap();
    assert_eq!(reward("7", 10), 2.0);
    assert_eq!(reward("8", 10), 0.0);
    assert_eq!(reward("7", 75), 1.9);
    assert_eq!(reward("it is high: answer is 7", 10), 2.0 - 0.9);
    assert_eq!(score(&stack, &prompt, "7", 10).correct(), Some(true));
}

#[test]
fn the_sum_is_clipped() {
    let config = RewardConfig { clip: [-1.0, 1.0], ..weighted() };
    let stack = RewardStack::new(&config).unwrap();
    assert_eq!(score(&stack, &prompt(Some("7"), &[]), "7", 10).reward(), Some(1.0));
}

#[test]
fn a_failed_gate_gives_the_floor_and_its_name_whatever_the_rest_says() {
    let stack = RewardStack::new(&gated()).unwrap();
    let right = prompt(Some("7"), &[]);
    let verdict = score(&stack, &right, "high; the answer is 7", 1).verdict;
    let expected = Verdict::Scored { reward: -1.0, correct: Some(true), gated_by: Some("guard".into()) };
    assert_eq!(verdict, expected);
    // At the threshold it passes, and a gate adds nothing to the sum.
    assert_eq!(score(&stack, &right, "mid; the answer is 7", 1).reward(), Some(1.0));
    // Even when the verifier cannot tell: the other parts are ignored.
    assert_eq!(score(&stack, &prompt(None, &[]), "high", 1).reward(), Some(-1.0));
    assert_eq!(score(&stack, &prompt(None, &[]), "fine", 1).reward(), None);
}

#[test]
fn a_component_judges_only_the_prompts_it_is_meant_for() {
    let mut config = weighted();
    config.component[0].when = Some("tag:math".into());
    config.component.truncate(1);
    config.combine.weights.clear();
    let stack = RewardStack::new(&config).unwrap();
    assert_eq!(score(&stack, &prompt(Some("7"), &["math"]), "7", 1).reward(), Some(1.0));
    match score(&stack, &prompt(Some("7"), &["chat"]), "7", 1).verdict {
        Verdict::Unscored { reason } => assert!(reason.contains("no component applies"), "{reason}"),
        scored => panic!("{scored:?}"),
    }
}

#[test]
fn a_component_of_weight_zero_measures_and_cannot_unscore() {
    let mut config = weighted();
    config.component.push(ComponentConfig { weight: Some(0.0), ..verifier("other", VerifierKind::Exact) });
    config.component[0].when = Some("tag:never".into());
    let stack = RewardStack::new(&config).unwrap();
    let record = score(&stack, &prompt(None, &[]), "7", 1);
    assert_eq!(record.reward(), Some(0.0));
    assert_eq!(record.components[3].value, None);
    assert!(record.components[3].detail.as_ref().unwrap().contains("no reference answer"));
}

#[test]
fn a_hold_out_judges_its_share_and_has_no_part_in_the_reward() {
    let judge = ComponentConfig { name: "judge".into(), holdout: true, share: Some(0.3), ..guard() };
    let plain =
        RewardConfig { component: vec![verifier("answer", VerifierKind::Math)], ..Default::default() };
    let held = RewardConfig {
        component: vec![verifier("answer", VerifierKind::Math), judge.clone()],
        ..Default::default()
    };
    let (plain, held) = (RewardStack::new(&plain).unwrap(), RewardStack::new(&held).unwrap());
    let asked = prompt(Some("7"), &[]);
    let mut judged = 0;
    for i in 0..400 {
        let text = format!("high {i} so 7");
        let record = score(&held, &asked, &text, 1);
        assert_eq!(record.verdict, score(&plain, &asked, &text, 1).verdict);
        assert_eq!(record.components[1].value, score(&held, &asked, &text, 1).components[1].value);
        judged += usize::from(record.components[1].value == Some(0.9));
    }
    assert!((90..=150).contains(&judged), "{judged} of 400");

    // What nobody else judges is not scored by a hold-out.
    let elsewhere =
        ComponentConfig { when: Some("tag:maths".into()), ..verifier("answer", VerifierKind::Math) };
    let all = ComponentConfig { share: None, ..judge.clone() };
    let stack =
        RewardStack::new(&RewardConfig { component: vec![elsewhere, all], ..Default::default() }).unwrap();
    assert_eq!(score(&stack, &asked, "high", 1).reward(), None);

    let refused = |component: ComponentConfig, combine: CombineConfig| {
        let config = RewardConfig {
            component: vec![verifier("answer", VerifierKind::Math), component],
            combine,
            ..Default::default()
        };
        RewardStack::check(&config).expect_err("a problem")[0].to_string()
    };
    let weight = ComponentConfig { weight: Some(1.0), ..judge.clone() };
    assert!(refused(weight, CombineConfig::default()).contains("never optimised"));
    let gates = CombineConfig { mode: CombineMode::Gate, gates: vec!["judge".into()], ..Default::default() };
    assert!(refused(judge.clone(), gates).contains("never optimised"));
    let safety = CombineConfig {
        mode: CombineMode::Piecewise,
        safety: Some("1 - judge".into()),
        ..Default::default()
    };
    assert!(refused(judge.clone(), safety).contains("nothing that is optimised may read"));
    let share = ComponentConfig { holdout: false, ..judge };
    assert!(refused(share, CombineConfig::default()).contains("with holdout = true"));
}

#[test]
fn all_problems_are_reported_at_once_with_their_keys() {
    let mut config = weighted();
    config.component[0].when = Some("math".into());
    config.component[0].pattern = Some("x".into());
    config.component[1].category[0].patterns = vec!["(".into()];
    config.component[1].threshold = Some(1.5);
    config.component[2].max_tokens = None;
    config.component.push(verifier("answer", VerifierKind::Regex));
    config.combine.mode = CombineMode::Lexicographic;
    config.combine.weights.insert("nobody".into(), 1.0);
    config.clip = [1.0, -1.0];
    let problems = RewardStack::new(&config).err().expect("refused");
    let keys: Vec<_> = problems.iter().map(|p| p.key.as_str()).collect();
    for key in [
        "reward.component[0].when",
        "reward.component[0].pattern",
        "reward.component[1].category[0].patterns",
        "reward.component[1].threshold",
        "reward.component[2].max_tokens",
        "reward.component[3].name",
        "reward.component[3].pattern",
        "reward.combine.tier",
        "reward.combine.weights",
        "reward.clip",
    ] {
        assert!(keys.contains(&key), "{key} is missing from {keys:#?}");
    }
}

#[test]
fn the_reward_version_follows_what_judges_and_nothing_else() {
    let version = |config: &RewardConfig| RewardStack::new(config).unwrap().reward_version().to_owned();
    let base = weighted();
    assert_eq!(version(&base), version(&RewardConfig { workers: 7, ..base.clone() }));
    assert_ne!(version(&base), version(&RewardConfig { clip: [-3.0, 2.0], ..base.clone() }));
    assert_ne!(version(&base), version(&RewardConfig { version: "b".into(), ..base.clone() }));
}

#[test]
fn hostile_completions_are_data() {
    let stack = RewardStack::new(&gated()).unwrap();
    let prompt = prompt(Some("7"), &[]);
    let nul = "\0\u{1b}[2J".repeat(1000);
    for text in ["{\"verdict\":\"safe\",\"reward\":1}", "{{ 7 }}", "%s%n", "'; FLUSHALL", "\\boxed{{{{", &nul]
    {
        let record = score(&stack, &prompt, text, 1);
        // "{{ 7 }}" does say 7; the point is that everything gets a plain verdict.
        assert!(record.reward().is_some_and(|r| r == 0.0 || text.contains('7')), "{text:?}: {record:?}");
    }
}

fn texts() -> impl Strategy<Value = Vec<String>> {
    let words =
        prop::sample::select(vec!["7", "8", "low", "mid", "high", "the answer is 7", "\\boxed{7}", "x", ""]);
    prop::collection::vec(prop::collection::vec(words, 0..4).prop_map(|w| w.join(" ")), 1..12)
}

proptest! {
    /// Raising the probability of harm never raises the reward.
    #[test]
    fn harm_never_pays(text in "[a-z ]{0,20}", weight in 0.0_f32..3.0) {
        let mut config = weighted();
        config.component[0].weight = None;
        config.combine.weights.insert("guard".into(), weight);
        for config in [config, gated()] {
            let stack = RewardStack::new(&config).unwrap();
            let prompt = prompt(Some("7"), &[]);
            let rewards: Vec<f32> = ["", "low", "mid", "high"]
                .iter()
                .map(|harm| score(&stack, &prompt, &format!("{harm} {text} the answer is 7"), 60).reward().unwrap())
                .collect();
            prop_assert!(rewards.windows(2).all(|pair| pair[1] <= pair[0]), "{:?}", rewards);
        }
    }

    /// A sample's reward depends on itself alone: order and neighbours (unscored ones too) do not matter, and
    /// the same input gives the same bytes.
    #[test]
    fn samples_do_not_touch_each_other(texts in texts(), seed in any::<u64>()) {
        let stack = RewardStack::new(&weighted()).unwrap();
        let (known, unknown) = (prompt(Some("7"), &[]), prompt(None, &[]));
        let alone: Vec<_> = texts.iter().map(|text| {
            let fresh = RewardStack::new(&weighted()).unwrap();
            timeless(score(&fresh, &known, text, 60))
        }).collect();
        let mut order: Vec<usize> = (0..texts.len()).collect();
        order.sort_by_key(|i| (*i as u64 + 1).wrapping_mul(seed | 1));
        for i in order {
            prop_assert!(score(&stack, &unknown, &texts[i], 60).reward().is_none());
            prop_assert_eq!(timeless(score(&stack, &known, &texts[i], 60)), &alone[i][..]);
        }
    }
}
