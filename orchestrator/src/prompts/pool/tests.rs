//! The pool against synthetic policies of known skill.

use freewheel_types::{CounterRng, PromptBody};
use proptest::prelude::*;

use super::super::params::{CurriculumConfig, Selection};
use super::*;

fn prompts(n: usize) -> Vec<Prompt> {
    (0..n)
        .map(|i| Prompt {
            id: PromptId::of(&i.to_le_bytes()),
            name: None,
            body: PromptBody::Text(format!("{i}")),
            answer: None,
            tags: vec![format!("level-{}", i % 4)],
            verifier: None,
            meta: None,
        })
        .collect()
}

fn params(max_staleness: u32, groups_per_step: u32) -> PoolParams {
    PoolParams {
        group_size: 8,
        baselines: 0,
        groups_per_step,
        max_staleness,
        seed: 5,
        steps: 100,
        curriculum: CurriculumConfig::default(),
    }
}

fn outcome(task: &Task, right: u32, version: u64, fate: GroupFate) -> GroupOutcome {
    GroupOutcome {
        task: task.id,
        prompt: task.prompt.id,
        version: PolicyVersion::new(1, version),
        sampled_by: PolicyVersion::new(1, version),
        scored: task.group_size,
        correct: right,
        reward_mean: Some(right as f32 / task.group_size as f32),
        graded: vec![],
        fate,
        dropped: vec![],
        given_up: None,
    }
}

/// Issues all that the budget allows.
fn fill(pool: &mut PromptPool) -> Vec<Task> {
    std::iter::from_fn(|| pool.next_task().unwrap()).collect()
}

#[test]
fn synchronous_mode_waits_for_the_update_that_consumed_the_batch_before() {
    let mut pool = PromptPool::new(prompts(100), params(0, 4)).unwrap();
    let first = fill(&mut pool);
    assert_eq!(
        first.iter().map(|t| (t.id.0, t.min_version.step)).collect::<Vec<_>>(),
        [(0, 0), (1, 0), (2, 0), (3, 0)]
    );
    for (seen, task) in first.iter().enumerate() {
        pool.apply(&outcome(task, 4, 0, GroupFate::Trained { step: 1 }));
        // Even while the outcomes of the update are arriving, the next batch asks for its weights, not for newer ones.
        let next = fill(&mut pool);
        assert_eq!(next.len(), 1, "after {seen}");
        assert_eq!(next[0].min_version, PolicyVersion::new(1, 1));
    }
}

#[test]
fn a_dropped_group_is_replaced_by_one_and_an_outcome_counts_once() {
    let mut pool = PromptPool::new(prompts(100), params(1, 4)).unwrap();
    let tasks = fill(&mut pool);
    assert_eq!(tasks.len(), 8);
    let dropped = outcome(&tasks[3], 8, 0, GroupFate::Dropped(DropReason::ZeroSignal));
    assert_eq!(pool.apply(&dropped), Applied::Ended);
    let state = pool.state();
    assert_eq!(pool.apply(&dropped), Applied::Ignored);
    assert_eq!(pool.state(), state);
    let refill = fill(&mut pool);
    assert_eq!(refill.iter().map(|t| t.id.0).collect::<Vec<_>>(), [8]);
    assert!((pool.metrics().zero_signal - 1.0).abs() <= 1e-12);
}

#[test]
fn a_prompt_that_cannot_be_scored_or_crashes_actors_is_set_aside() {
    let mut pool = PromptPool::new(prompts(2), params(0, 1)).unwrap();
    let first = fill(&mut pool).remove(0);
    pool.apply(&outcome(&first, 0, 0, GroupFate::Dropped(DropReason::Invalid)));
    assert_eq!(pool.metrics().quarantined, 1);
    let mut reasons = 0;
    let error = loop {
        match pool.next_task() {
            Ok(Some(task)) => {
                assert_ne!(task.prompt.id, first.prompt.id);
                let mut unscored = outcome(&task, 0, 0, GroupFate::Dropped(DropReason::Unscored));
                unscored.scored = 0;
                pool.apply(&unscored);
                reasons += 1;
            }
            Ok(None) => panic!("the budget has room"),
            Err(error) => break error,
        }
    };
    assert_eq!(reasons, UNSCORED_MAX);
    assert!(error.to_string().contains("all 2 prompts are quarantined"), "{error}");
}

#[test]
fn a_prompt_that_an_actor_gave_up_is_set_aside_with_the_actors_reason() {
    let mut pool = PromptPool::new(prompts(1), params(0, 1)).unwrap();
    let task = pool.next_task().unwrap().unwrap();
    let given_up = Some("the prompt is 900 tokens, the model's context is 64".to_owned());
    let gone = outcome(&task, 0, 0, GroupFate::Dropped(DropReason::Invalid));
    assert_eq!(pool.apply(&GroupOutcome { given_up, ..gone }), Applied::Ended);
    let error = pool.next_task().unwrap_err().to_string();
    assert!(error.contains("the model's context is 64"), "{error}");
}

/// Runs a policy that solves prompt `i` with probability `skill(i)`; gives the share of mixed groups over the last half.
fn informative_share(selection: Selection, skill: impl Fn(usize) -> f64) -> (f64, PoolMetrics) {
    let all = prompts(400);
    let index: BTreeMap<PromptId, usize> = all.iter().enumerate().map(|(i, p)| (p.id, i)).collect();
    let curriculum = CurriculumConfig { selection, ..Default::default() };
    let mut pool = PromptPool::new(all, PoolParams { curriculum, ..params(1, 16) }).unwrap();
    let (mut mixed, mut counted, mut step) = (0, 0, 0);
    let mut batch = 0;
    for n in 0..4000 {
        while let Some(_task) = pool.next_task().unwrap() {}
        let task = pool.task(pool.outstanding()[0]).unwrap();
        let p = skill(index[&task.prompt.id]);
        let rng = CounterRng::new(99, task.id.0);
        let right = (0..task.group_size).filter(|k| rng.uniform(u64::from(*k)) < p).count() as u32;
        let informative = right > 0 && right < task.group_size;
        let fate = if informative {
            batch += 1;
            GroupFate::Trained { step: step + 1 }
        } else {
            GroupFate::Dropped(DropReason::ZeroSignal)
        };
        pool.apply(&outcome(&task, right, step, fate));
        if batch == 16 {
            (batch, step) = (0, step + 1);
        }
        if n >= 2000 {
            counted += 1;
            mixed += u32::from(informative);
        }
    }
    (f64::from(mixed) / f64::from(counted), pool.metrics())
}

#[test]
fn most_groups_are_informative_where_most_prompts_are_not() {
    // A third always solved, a third never, the rest in between.
    let skill = |i: usize| match i % 3 {
        0 => 0.995,
        1 => 0.005,
        _ => 0.1 + 0.8 * (i as f64 / 400.0),
    };
    let (uniform, _) = informative_share(Selection::Uniform, skill);
    let (chosen, metrics) = informative_share(Selection::Informative, skill);
    println!("informative groups: uniform {uniform:.3}, chosen {chosen:.3}; {metrics:?}");
    assert!(uniform <= 0.40, "uniform {uniform}");
    // 15 of 100 tasks explore or check; of the best prompts (0.1 to 0.9) about 85 of 100 groups are mixed.
    assert!(chosen >= 0.65 && chosen >= 2.0 * uniform, "chosen {chosen}, uniform {uniform}");
}

/// What a pool of 400 prompts does with a policy of known skills, over groups 3000 to 6000.
struct Trial {
    /// Share of rollouts in groups whose answers were all alike.
    zero_signal: f64,
    /// Mean distance of the believed skill from the true one, over groups of prompts with 64 samples or more.
    posterior_error: f64,
    /// Distance of the predicted share of mixed groups from the share seen, over ten bins of predictions.
    calibration_error: f64,
}

fn trial(selection: Selection, skill: impl Fn(usize) -> f64) -> Trial {
    let all: Vec<Prompt> = prompts(400).into_iter().map(|p| Prompt { tags: vec![], ..p }).collect();
    let index: BTreeMap<PromptId, usize> = all.iter().enumerate().map(|(i, p)| (p.id, i)).collect();
    let curriculum = CurriculumConfig { selection, ..Default::default() };
    let mut pool = PromptPool::new(all, PoolParams { curriculum, ..params(1, 16) }).unwrap();
    let (mut rollouts, mut wasted, mut errors, mut bins) = (0, 0, Vec::new(), [(0.0, 0.0, 0.0); 10]);
    let (mut step, mut batch) = (0, 0);
    for n in 0..6000 {
        while let Some(_task) = pool.next_task().unwrap() {}
        let task = pool.task(pool.outstanding()[0]).unwrap();
        let i = index[&task.prompt.id];
        let rng = CounterRng::new(99, task.id.0);
        let right = (0..task.group_size).filter(|k| rng.uniform(u64::from(*k)) < skill(i)).count() as u32;
        let mixed = right > 0 && right < task.group_size;
        let before = pool.states[i].posterior;
        let fate = if mixed {
            GroupFate::Trained { step: step + 1 }
        } else {
            GroupFate::Dropped(DropReason::ZeroSignal)
        };
        pool.apply(&outcome(&task, right, step, fate));
        batch += u32::from(mixed);
        if batch == 16 {
            (batch, step) = (0, step + 1);
        }
        if n < 3000 {
            continue;
        }
        rollouts += task.group_size;
        wasted += if mixed { 0 } else { task.group_size };
        let predicted = informative_probability(before.alpha, before.beta, task.group_size);
        let bin = &mut bins[((predicted * 10.0) as usize).min(9)];
        *bin = (bin.0 + predicted, bin.1 + f64::from(u8::from(mixed)), bin.2 + 1.0);
        let after = &pool.states[i].posterior;
        if after.samples >= 64 {
            errors.push((after.mean() - skill(i)).abs());
        }
    }
    let counted: f64 = bins.iter().map(|bin| bin.2).sum();
    Trial {
        zero_signal: f64::from(wasted) / f64::from(rollouts),
        posterior_error: errors.iter().sum::<f64>() / errors.len().max(1) as f64,
        calibration_error: bins.iter().map(|bin| (bin.0 - bin.1).abs()).sum::<f64>() / counted,
    }
}

#[test]
fn one_prompt_in_ten_is_enough_to_waste_little() {
    // Nine in ten are solved always or never, the tenth between 0.2 and 0.8.
    let skill = |i: usize| match i % 10 {
        3 => 0.2 + 0.6 * (i as f64 / 400.0),
        other => f64::from(u8::from(other % 2 == 0)),
    };
    let uniform = trial(Selection::Uniform, skill);
    let chosen = trial(Selection::Informative, skill);
    println!(
        "zero-signal rollouts: uniform {:.3}, chosen {:.3}; posterior error {:.3}, calibration error {:.3}",
        uniform.zero_signal, chosen.zero_signal, chosen.posterior_error, chosen.calibration_error
    );
    assert!(uniform.zero_signal >= 0.85, "{}", uniform.zero_signal);
    assert!(chosen.zero_signal <= 0.08, "{}", chosen.zero_signal);
    assert!(chosen.posterior_error <= 0.05, "{}", chosen.posterior_error);
    assert!(chosen.calibration_error <= 0.03, "{}", chosen.calibration_error);
}

#[test]
fn tags_tell_about_prompts_never_seen() {
    // Level 0 is always solved, level 3 never.
    let skill = |i: usize| [1.0, 0.6, 0.4, 0.0][i % 4];
    let (chosen, _) = informative_share(Selection::Informative, skill);
    assert!(chosen >= 0.80, "chosen {chosen}");
}

/// Lets a learner take groups in issue order, as many updates as `steps`; `skill(i)` is how often prompt `i` is solved. After each update `each` sees the pool.
fn learn(
    pool: &mut PromptPool,
    steps: std::ops::Range<u64>,
    skill: impl Fn(usize) -> f64,
    mut each: impl FnMut(&PromptPool, u64),
) {
    for step in steps {
        let mut batch = 0;
        while batch < pool.params.groups_per_step {
            fill(pool);
            let task = pool.task(pool.outstanding()[0]).unwrap();
            let rng = CounterRng::new(99, task.id.0);
            let p = skill(pool.index[&task.prompt.id]);
            let right = (0..task.group_size).filter(|k| rng.uniform(u64::from(*k)) < p).count() as u32;
            let mixed = right > 0 && right < task.group_size;
            let fate = if mixed {
                GroupFate::Trained { step: step + 1 }
            } else {
                GroupFate::Dropped(DropReason::ZeroSignal)
            };
            pool.apply(&outcome(&task, right, step, fate));
            batch += u32::from(mixed);
        }
        each(pool, step + 1);
    }
}

#[test]
fn retired_prompts_come_back_within_fifty_steps_of_a_regression() {
    // Level 0 is solved and level 3 is not until update 150; then the policy forgets the one (wholly, or half) and learns the other.
    for forgotten in [0.0, 0.5] {
        let curriculum = CurriculumConfig { tag_prior: 0.0, ..Default::default() };
        let mut pool = PromptPool::new(prompts(160), PoolParams { curriculum, ..params(1, 8) }).unwrap();
        learn(&mut pool, 0..150, |i| [1.0, 0.5, 0.5, 0.0][i % 4], |_, _| ());
        let retired: Vec<usize> = (0..160).filter(|i| pool.retired(*i)).collect();
        let of = |level: usize| retired.iter().filter(|i| **i % 4 == level).count();
        assert!(of(0) >= 20 && of(3) >= 20, "{} and {} retired", of(0), of(3));
        let mut back = BTreeMap::new();
        learn(
            &mut pool,
            150..200,
            |i| [forgotten, 0.5, 0.5, 0.5][i % 4],
            |pool, step| {
                for i in retired.iter().filter(|i| !pool.retired(**i)) {
                    back.entry(*i).or_insert(step - 150);
                }
            },
        );
        let slowest =
            |level: usize| back.iter().filter(|(i, _)| **i % 4 == level).map(|(_, steps)| *steps).max();
        println!(
            "forgotten to {forgotten}: {} of {} back, the last of level 0 after {:?} steps, of level 3 after {:?}",
            back.len(),
            retired.len(),
            slowest(0),
            slowest(3)
        );
        assert_eq!(back.len(), retired.len());
        let again = PromptPool::restore(prompts(160), pool.params.clone(), pool.state()).unwrap();
        assert_eq!(again.state(), pool.state());
    }
}

#[test]
fn one_wrong_answer_brings_no_class_back_and_costs_few_canaries() {
    let mut pool = PromptPool::new(prompts(200), params(1, 8)).unwrap();
    let skill = |i: usize| [0.98, 0.5, 0.5, 0.5][i % 4];
    learn(&mut pool, 0..100, skill, |_, _| ());
    let (retired, issued) = (pool.metrics().retired, pool.next_task);
    let mut fewest = retired;
    let mut canaries = BTreeSet::new();
    learn(&mut pool, 100..400, skill, |pool, _| {
        fewest = fewest.min(pool.metrics().retired);
        let out = pool
            .outstanding
            .iter()
            .filter(|(_, task)| task.chosen.as_ref().is_some_and(|c| c.share == Share::Canary));
        canaries.extend(out.map(|(id, _)| *id));
    });
    let share = canaries.len() as f64 / (pool.next_task - issued) as f64;
    println!("{retired} retired, never fewer than {fewest}; canaries {share:.3} of the tasks");
    assert!(retired >= 20 && fewest >= retired - 5, "{fewest} of {retired}");
    assert!(share <= 0.08, "{share}");
}

/// Ends a task with these rewards, of which nobody says which are right.
fn graded(task: &Task, rewards: Vec<f32>, step: u64) -> GroupOutcome {
    let fate = if rewards.iter().any(|r| *r != rewards[0]) {
        GroupFate::Trained { step }
    } else {
        GroupFate::Dropped(DropReason::ZeroSignal)
    };
    // What is above 0 counts as right for whoever does not look at the rewards.
    let correct = rewards.iter().filter(|r| **r > 0.0).count() as u32;
    GroupOutcome { graded: rewards, ..outcome(task, correct, step - 1, fate) }
}

#[test]
fn rewards_that_are_not_yes_or_no_count_by_how_far_they_lie_apart() {
    // All rewards are above 0. Of every four prompts one is far above the others and differs, two differ little and much around their mean, one is always alike.
    let mut pool = PromptPool::new(
        prompts(40).into_iter().map(|p| Prompt { tags: vec!["essay".into()], ..p }).collect(),
        params(0, 1),
    )
    .unwrap();
    let mut asked = [0; 4];
    for n in 0..1200 {
        let task = fill(&mut pool).remove(0);
        let kind = pool.index[&task.prompt.id] % 4;
        let rng = CounterRng::new(7, task.id.0);
        let (mean, wide) = [(3.0, 0.5), (1.0, 0.05), (1.0, 0.5), (0.8, 0.0)][kind];
        let rewards = (0..task.group_size).map(|k| (mean + wide * rng.normal(u64::from(k))) as f32).collect();
        pool.apply(&graded(&task, rewards, n + 1));
        asked[kind] += usize::from(n >= 400);
    }
    let retired = |kind: usize| (0..40).filter(|i| i % 4 == kind && pool.retired(*i)).count();
    assert_eq!([retired(0), retired(1), retired(2), retired(3)], [0, 0, 0, 10], "by the deviation alone");
    assert!(asked[0].min(asked[2]) >= 2 * asked[1] && asked[3] <= 60, "{asked:?}");
    let solved = |i: usize| pool.why(pool.prompts[i].id).unwrap().solved;
    assert!(
        solved(0) >= 0.8 && solved(1) <= 0.3,
        "skill is by what the tag gets: {} and {}",
        solved(0),
        solved(1)
    );

    // A prompt whose answers were alike differs again: canaries notice.
    let id = pool.prompts[3].id;
    for n in 1200..2400 {
        let task = fill(&mut pool).remove(0);
        let rng = CounterRng::new(7, task.id.0);
        let rewards = (0..task.group_size).map(|k| 1.0 + 0.5 * rng.normal(u64::from(k)) as f32).collect();
        pool.apply(&graded(&task, rewards, n + 1));
    }
    assert!(!pool.why(id).unwrap().retired);
}

#[test]
fn a_saved_state_goes_on_with_the_same_choices() {
    let mut pool = PromptPool::new(prompts(50), params(2, 4)).unwrap();
    for n in 0..60 {
        for task in fill(&mut pool).iter().take(4) {
            pool.apply(&outcome(task, (n % 9) as u32, n, GroupFate::Trained { step: n + 1 }));
        }
    }
    let saved = serde_json::to_string(&pool.state()).unwrap();
    let state: PoolState = serde_json::from_str(&saved).unwrap();
    let mut again = PromptPool::restore(prompts(50), params(2, 4), state).unwrap();
    for _ in 0..20 {
        let first = pool.outstanding()[0];
        let task = pool.task(first).unwrap();
        assert_eq!(again.task(first), Some(task.clone()));
        let end = outcome(&task, 3, 61, GroupFate::Trained { step: 62 });
        assert_eq!((pool.apply(&end), again.apply(&end)), (Applied::Ended, Applied::Ended));
        assert_eq!(fill(&mut pool), fill(&mut again));
    }
    let other = PromptPool::restore(prompts(3), params(2, 4), pool.state()).unwrap_err();
    assert!(matches!(other, PoolError::UnknownPrompt(_)), "{other}");
}

#[test]
fn parameters_out_of_range_are_named() {
    let mut bad = params(0, 1);
    bad.curriculum.decay = 0.0;
    assert!(PromptPool::new(prompts(1), bad).unwrap_err().to_string().contains("decay"));
    assert_eq!(PromptPool::new(vec![], params(0, 1)).unwrap_err(), PoolError::NoPrompts);
    let twice = [prompts(1), prompts(1)].concat();
    assert!(matches!(PromptPool::new(twice, params(0, 1)), Err(PoolError::Duplicate(_))));
}

fn curriculum(selection: Selection) -> CurriculumConfig {
    CurriculumConfig { selection, ..Default::default() }
}

#[test]
fn a_pool_that_teaches_nothing_any_more_ends_the_run() {
    let curriculum = CurriculumConfig { refill_stop: 5, ..Default::default() };
    let of = |curriculum| PromptPool::new(prompts(40), PoolParams { curriculum, ..params(0, 4) }).unwrap();
    let solved = |pool: &mut PromptPool| {
        for task in fill(pool) {
            pool.apply(&outcome(&task, task.group_size, 0, GroupFate::Dropped(DropReason::ZeroSignal)));
        }
    };
    let mut pool = of(curriculum);
    (0..4).for_each(|_| solved(&mut pool));
    // One that is trained on begins the count anew.
    let task = fill(&mut pool).remove(0);
    pool.apply(&outcome(&task, 1, 0, GroupFate::Trained { step: 1 }));
    for id in pool.outstanding() {
        let task = pool.task(id).unwrap();
        pool.apply(&outcome(&task, 0, 0, GroupFate::Dropped(DropReason::ZeroSignal)));
    }
    (0..4).for_each(|_| solved(&mut pool));
    let one = fill(&mut pool).remove(0);
    pool.apply(&outcome(&one, 0, 0, GroupFate::Dropped(DropReason::ZeroSignal)));
    let error = pool.next_task().unwrap_err();
    assert_eq!(error, PoolError::Starved { groups: 20, why: "zero_signal" });
    let mut patient = of(CurriculumConfig { refill_stop: 0, ..Default::default() });
    (0..100).for_each(|_| solved(&mut patient));
    assert!(patient.next_task().is_ok());
}

/// Issues and ends `n` tasks one by one; `right` says how many of a task's samples are.
fn ended(pool: &mut PromptPool, n: u64, right: impl Fn(&Task) -> u32) -> Vec<(Task, Chosen)> {
    let one = |n: u64| {
        let task = fill(pool).remove(0);
        let chosen = pool.chosen(task.id).cloned().expect("every task has a reason");
        let count = right(&task);
        let fate = if count == 0 || count == task.group_size {
            GroupFate::Dropped(DropReason::ZeroSignal)
        } else {
            GroupFate::Trained { step: n + 1 }
        };
        pool.apply(&outcome(&task, count, n, fate));
        (task, chosen)
    };
    (0..n).map(one).collect()
}

#[test]
fn a_band_wastes_little_and_asks_for_what_lies_in_it() {
    let skill = |i: usize| match i % 10 {
        3 => 0.2 + 0.6 * (i as f64 / 400.0),
        other => f64::from(u8::from(other % 2 == 0)),
    };
    let banded = trial(Selection::Band, skill);
    println!(
        "band: zero-signal rollouts {:.3}, posterior error {:.3}",
        banded.zero_signal, banded.posterior_error
    );
    assert!(banded.zero_signal <= 0.12, "{}", banded.zero_signal);
    // Half of the prompts are easy, half hard, and all are mixed: the band prefers the easy ones at the start.
    let params = PoolParams { curriculum: curriculum(Selection::Band), steps: 1_000_000, ..params(0, 1) };
    let mut pool = PromptPool::new(prompts(40), params).unwrap();
    let right = |task: &Task| {
        if task.prompt.tags[0] == "level-0" || task.prompt.tags[0] == "level-1" { 6 } else { 1 }
    };
    let asked = ended(&mut pool, 1000, right);
    let easy = asked[200..].iter().filter(|(task, _)| right(task) == 6).count();
    assert!(easy >= 560, "{easy} of 800: 80 % of the tasks choose, of the others half are easy");
    let by_band = asked.iter().filter(|(_, chosen)| chosen.band.is_some()).count();
    assert!((800..=900).contains(&by_band), "{by_band}: 85 % where nothing is retired and nothing comes in");
}

#[test]
fn the_band_gets_harder_with_progress_and_only_while_the_policy_keeps_up() {
    let params = PoolParams { curriculum: curriculum(Selection::Band), ..params(0, 1) };
    let mut pool = PromptPool::new(prompts(40), params.clone()).unwrap();
    ended(&mut pool, 100, |_| 6);
    assert!((pool.target() - 0.35).abs() <= 1e-9, "{}", pool.target());
    let mut pool = PromptPool::new(prompts(40), params).unwrap();
    ended(&mut pool, 50, |_| 2);
    assert_eq!(pool.target(), 0.7, "a quarter right is below the lower half of the band");
    ended(&mut pool, 200, |_| 6);
    assert!(pool.target() <= 0.69 && pool.target() >= 0.34, "{}", pool.target());
}

#[test]
fn quotas_hold_in_every_batch() {
    let quotas = BTreeMap::from([("level-0".to_owned(), 0.5), ("level-1".to_owned(), 0.25)]);
    let curriculum = CurriculumConfig { quotas, ..curriculum(Selection::Uniform) };
    let mut pool = PromptPool::new(prompts(40), PoolParams { curriculum, ..params(0, 1) }).unwrap();
    let asked = ended(&mut pool, 320, |_| 4);
    for batch in asked.chunks(32) {
        let of = |tag: &str| batch.iter().filter(|(_, chosen)| chosen.tag.as_deref() == Some(tag)).count();
        assert!((14..=18).contains(&of("level-0")) && (6..=10).contains(&of("level-1")), "{batch:?}");
        assert!(
            batch
                .iter()
                .all(|(task, chosen)| chosen.tag.as_ref().is_none_or(|tag| task.prompt.tags.contains(tag)))
        );
    }
}

#[test]
fn file_order_is_kept_and_pools_open_one_after_the_other() {
    let all = prompts(8);
    let in_order = |curriculum| PoolParams { curriculum, ..params(0, 1) };
    let mut pool = PromptPool::new(all.clone(), in_order(curriculum(Selection::File))).unwrap();
    let asked: Vec<PromptId> =
        ended(&mut pool, 12, |_| 4).into_iter().map(|(task, _)| task.prompt.id).collect();
    assert_eq!(asked, (0..12).map(|i| all[i % 8].id).collect::<Vec<_>>());

    let pools = ["level-0", "level-1"].map(str::to_owned).to_vec();
    let curriculum = CurriculumConfig { pools, ..curriculum(Selection::Pools) };
    let mut pool = PromptPool::new(prompts(40), in_order(curriculum)).unwrap();
    let tags = |asked: Vec<(Task, Chosen)>| {
        asked.into_iter().map(|(t, _)| t.prompt.tags[0].clone()).collect::<BTreeSet<_>>()
    };
    let only = |tag: &str| BTreeSet::from([tag.to_owned()]);
    assert_eq!(tags(ended(&mut pool, 20, |_| 4)), only("level-0"), "half right is not solved");
    while pool.open_pool() == Some("level-0") {
        ended(&mut pool, 1, |_| 7);
    }
    assert_eq!(tags(ended(&mut pool, 5, |_| 4)), only("level-1"));
    while pool.open_pool().is_some() {
        ended(&mut pool, 1, |_| 7);
    }
    assert_eq!(tags(ended(&mut pool, 80, |_| 7)).len(), 4, "all are solved: everything is asked");
}

#[test]
fn what_was_measured_before_the_run_is_where_beliefs_start() {
    let measured = |share: f64| Some(format!("{{\"avg@4\":0.5,\"avg@64\":{share},\"x\":1}}"));
    let all: Vec<Prompt> = prompts(2)
        .into_iter()
        .zip([1.0, 0.25])
        .map(|(p, share)| Prompt { meta: measured(share), ..p })
        .collect();
    let pool = PromptPool::new(all.clone(), params(0, 1)).unwrap();
    let solved = |i: usize| pool.why(all[i].id).unwrap().solved;
    assert!(
        (solved(0) - 0.9).abs() <= 1e-9 && (solved(1) - 0.3).abs() <= 1e-9,
        "{} {}",
        solved(0),
        solved(1)
    );
    assert_eq!(pool.metrics().retired, 0, "a measurement of other weights retires nothing");
}

#[test]
fn contrast_that_is_not_between_right_and_wrong_retires_nothing() {
    let mut pool = PromptPool::new(prompts(1), params(0, 1)).unwrap();
    for n in 0..20 {
        let task = fill(&mut pool).remove(0);
        pool.apply(&outcome(&task, 0, n, GroupFate::Trained { step: n + 1 }));
    }
    assert_eq!(
        (pool.metrics().retired, pool.metrics().active),
        (0, 1),
        "rewards differed, though none counts as right"
    );
}

#[test]
fn a_share_of_tasks_is_kept_for_what_a_red_team_brings() {
    let mut all = prompts(40);
    all[7].tags.push("adversarial".into());
    let mut pool = PromptPool::new(all, params(0, 1)).unwrap();
    let asked = ended(&mut pool, 1000, |_| 4);
    let intake = asked.iter().filter(|(_, chosen)| chosen.share == Share::Intake).count();
    assert!((30..=70).contains(&intake), "{intake}");
    assert!(
        asked
            .iter()
            .all(|(t, c)| c.share != Share::Intake || t.prompt.tags.contains(&"adversarial".to_owned()))
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A learner that takes groups in issue order, drops some, and publishes every update: the budget holds, ids are
    /// gapless, nothing is lost, no consumed group is staler than allowed, and the log gives the same pool.
    #[test]
    fn the_budget_bounds_staleness_and_nothing_is_lost(
        max_staleness in 0_u32..4,
        per_step in 1_u32..6,
        actions in prop::collection::vec((0_u8..4, 0_u32..9), 1..200),
    ) {
        let params = params(max_staleness, per_step);
        let mut pool = PromptPool::new(prompts(30), params.clone()).unwrap();
        let (mut log, mut issued, mut ended) = (Vec::new(), Vec::new(), BTreeSet::new());
        let (mut step, mut batch): (u64, Vec<Task>) = (0, Vec::new());
        let mut unreported: Vec<GroupOutcome> = Vec::new();
        for (action, right) in actions {
            while let Some(task) = pool.next_task().unwrap() {
                prop_assert_eq!(task.id.0, issued.len() as u64);
                log.push(PoolRecord::Issued {
                    task: task.id, prompt: task.prompt.id, group_size: task.group_size, min_version: task.min_version,
                    chosen: pool.chosen(task.id).cloned(),
                });
                issued.push(task);
            }
            prop_assert!(pool.outstanding().len() <= params.budget());
            let held: BTreeSet<TaskId> = batch.iter().map(|t| t.id).chain(unreported.iter().map(|o| o.task)).collect();
            let next = pool.outstanding().into_iter().find(|id| !held.contains(id)).and_then(|id| pool.task(id));
            match (action, next) {
                // The learner drops the next group.
                (0, Some(task)) => unreported.push(outcome(&task, 8, step, GroupFate::Dropped(DropReason::ZeroSignal))),
                // It takes the next group; drawn by weights no newer than the newest, no older than asked for.
                (1 | 2, Some(task)) => {
                    prop_assert!(task.min_version.step <= step, "{:?} is not published at {}", task.min_version, step);
                    prop_assert!(step - task.min_version.step <= u64::from(max_staleness),
                        "task {} from {:?} is consumed at {}", task.id, task.min_version, step);
                    batch.push(task);
                    if batch.len() == per_step as usize {
                        step += 1;
                        unreported.extend(batch.drain(..).map(|task| {
                            let mut o = outcome(&task, right.min(7), step - 1, GroupFate::Trained { step });
                            o.correct = o.correct.min(task.group_size);
                            o
                        }));
                    }
                }
                // Outcomes arrive one at a time.
                _ => {
                    if !unreported.is_empty() {
                        let o = unreported.remove(0);
                        prop_assert_eq!(pool.apply(&o), Applied::Ended);
                        ended.insert(o.task);
                        log.push(PoolRecord::Ended(o));
                    }
                }
            }
        }
        let outstanding: BTreeSet<TaskId> = pool.outstanding().into_iter().collect();
        prop_assert!(outstanding.is_disjoint(&ended));
        prop_assert_eq!(outstanding.len() + ended.len(), issued.len());
        let mut rebuilt = PromptPool::new(prompts(30), params).unwrap();
        for record in &log {
            rebuilt.replay(record).unwrap();
        }
        prop_assert_eq!(rebuilt.state(), pool.state());
    }
}
