//! Which metrics become which charts.

use super::chart::{Chart, Series};
use super::data::RunData;

/// A heading with its charts.
pub(super) struct Section {
    pub title: &'static str,
    pub charts: Vec<String>,
}

/// All sections that have something to show.
pub(super) fn sections(data: &RunData) -> Vec<Section> {
    let all = [
        ("Outcome", outcome(data)),
        ("Learning", learning(data)),
        ("Rollouts and prompts", rollouts(data)),
        ("Machine", machine(data)),
    ];
    let section = |(title, charts): (&'static str, Vec<Chart>)| Section {
        title,
        charts: charts.iter().map(Chart::card).filter(|card| !card.is_empty()).collect(),
    };
    all.into_iter().map(section).filter(|section| !section.charts.is_empty()).collect()
}

fn outcome(data: &RunData) -> Vec<Chart> {
    let held_out = data.held_out().into_iter();
    let set = |set: super::data::HeldOut| Series {
        label: set.name,
        points: set.points,
        band: set.band,
        exact: true,
    };
    let named = |prefix: &str, suffix: &str| -> Vec<Series> {
        let series =
            |(key, label): (String, String)| Series { points: data.series(&key), label, ..Series::default() };
        data.matching(prefix, suffix).into_iter().map(series).collect()
    };
    let marks: Vec<f64> = data.alarms.iter().map(|raised| raised.step as f64).collect();
    vec![
        Chart {
            title: "Held-out accuracy",
            note: "prompts that were never trained on",
            series: held_out.map(set).collect(),
            bounds: Some((0.0, 1.0)),
            wide: true,
            ..Chart::default()
        },
        Chart {
            title: "Reward",
            note: "mean over the step's rollouts",
            marks: marks.clone(),
            ..lines(data, &[("reward/mean", "")])
        },
        Chart {
            title: "Training accuracy",
            note: "share of right answers",
            bounds: Some((0.0, 1.0)),
            ..lines(data, &[("reward/accuracy", "")])
        },
        Chart {
            title: "Reward components",
            note: "mean of each",
            series: named("reward/", "/mean"),
            marks: marks.clone(),
            ..Chart::default()
        },
        Chart {
            title: "Alarms",
            note: "how near: 1 is too much",
            series: named("alarm/", ""),
            from_zero: true,
            marks,
            ..Chart::default()
        },
    ]
}

fn learning(data: &RunData) -> Vec<Chart> {
    vec![
        Chart {
            title: "Entropy",
            note: "nats per token",
            from_zero: true,
            ..lines(data, &[("train/entropy", "")])
        },
        Chart {
            title: "Loss",
            note: "its gradient matters, its value little",
            ..lines(data, &[("train/loss", "")])
        },
        Chart {
            title: "Gradient norm",
            note: "before clipping",
            from_zero: true,
            ..lines(data, &[("train/grad_norm", "")])
        },
        Chart { title: "Learning rate", from_zero: true, ..lines(data, &[("train/lr", "")]) },
        Chart {
            title: "Clipped tokens",
            note: "share",
            from_zero: true,
            ..lines(data, &[("train/clip_fraction", "")])
        },
        Chart {
            title: "Effective sample size",
            note: "share of the batch",
            bounds: Some((0.0, 1.0)),
            ..lines(data, &[("train/ess", "")])
        },
        Chart {
            title: "Distance from the reference",
            note: "KL, nats per token",
            from_zero: true,
            ..lines(data, &[("train/kl_ref", "")])
        },
        Chart {
            title: "Sampler and learner apart",
            note: "mismatch KL; staleness makes it, not arithmetic",
            from_zero: true,
            ..lines(data, &[("mismatch/kl", "")])
        },
        Chart {
            title: "Largest log-prob gap",
            note: "nats, any token of the step",
            from_zero: true,
            ..lines(
                data,
                &[("mismatch/logprob_abs_max", "all"), ("mismatch/same_version_abs_max", "same version")],
            )
        },
        Chart {
            title: "Preferences kept",
            note: "share of pairs the right way round",
            bounds: Some((0.0, 1.0)),
            ..lines(data, &[("preference/accuracy", "")])
        },
        Chart {
            title: "Preference rewards",
            note: "β times the log-ratio to the reference",
            ..lines(
                data,
                &[("preference/chosen_reward", "chosen"), ("preference/rejected_reward", "rejected")],
            )
        },
        Chart {
            title: "Weight of soft targets",
            note: "share of the teacher in the loss",
            bounds: Some((0.0, 1.0)),
            ..lines(data, &[("distill/weight", "")])
        },
        Chart {
            title: "Soft and hard loss",
            note: "nats per token",
            from_zero: true,
            ..lines(
                data,
                &[
                    ("distill/soft_loss", "soft"),
                    ("distill/hard_loss", "hard"),
                    ("distill/teacher_loss", "teacher"),
                ],
            )
        },
        Chart {
            title: "Expert load",
            note: "largest over mean, minus 1",
            from_zero: true,
            ..lines(data, &[("moe/max_violation", "")])
        },
        Chart {
            title: "Router entropy",
            note: "nats",
            from_zero: true,
            ..lines(data, &[("moe/router_entropy", "")])
        },
    ]
}

fn rollouts(data: &RunData) -> Vec<Chart> {
    vec![
        Chart {
            title: "Completion length",
            note: "tokens, mean",
            from_zero: true,
            ..lines(data, &[("rollout/length_mean", "")])
        },
        Chart {
            title: "Truncated",
            note: "share of rollouts",
            from_zero: true,
            ..lines(data, &[("rollout/truncated", "")])
        },
        Chart {
            title: "Staleness",
            note: "updates between sampling and training",
            from_zero: true,
            ..lines(data, &[("staleness/max", "max"), ("staleness/mean", "mean")])
        },
        Chart {
            title: "Zero-signal groups",
            note: "all rewards alike, dropped",
            from_zero: true,
            ..lines(data, &[("prompts/zero_signal", "")])
        },
        Chart {
            title: "Prompts",
            note: "in play, and retired",
            from_zero: true,
            ..lines(data, &[("prompts/active", "active"), ("prompts/retired", "retired")])
        },
        Chart {
            title: "Difficulty",
            note: "mean pass rate believed of the prompts",
            bounds: Some((0.0, 1.0)),
            ..lines(data, &[("prompts/difficulty_mean", "")])
        },
    ]
}

fn machine(data: &RunData) -> Vec<Chart> {
    vec![
        Chart {
            title: "Throughput",
            note: "tokens per second",
            from_zero: true,
            ..lines(data, &[("rollout/tokens_per_s", "sampling"), ("train/tokens_per_s", "training")])
        },
        Chart { title: "Step time", note: "seconds", from_zero: true, ..lines(data, &[("time/step_s", "")]) },
        Chart {
            title: "Idle",
            note: "share of time",
            from_zero: true,
            ..lines(data, &[("bubble/learner", "learner"), ("bubble/actor", "actor")])
        },
        Chart {
            title: "Work saved",
            note: "prompt rows found in the cache; guessed tokens that were right",
            bounds: Some((0.0, 1.0)),
            ..lines(data, &[("rollout/prefix_share", "prompts"), ("rollout/draft_accepted", "guesses")])
        },
        Chart {
            title: "Preemptions",
            note: "samples computed again for want of memory",
            from_zero: true,
            ..lines(data, &[("rollout/preemptions", "")])
        },
        Chart {
            title: "Weights published",
            note: "bytes per version",
            from_zero: true,
            ..lines(data, &[("weights/bytes", "")])
        },
        Chart {
            title: "Weights changed",
            note: "share per version",
            from_zero: true,
            ..lines(data, &[("weights/density", "")])
        },
        Chart {
            title: "Weight swap",
            note: "pause of the actor, seconds",
            from_zero: true,
            ..lines(data, &[("weights/apply_pause_s", "")])
        },
        Chart {
            title: "Queue",
            note: "rollouts waiting",
            from_zero: true,
            ..lines(data, &[("queue/depth", "")])
        },
    ]
}

fn lines(data: &RunData, keys: &[(&str, &str)]) -> Chart {
    let line = |(key, label): &(&str, &str)| Series {
        label: (*label).to_owned(),
        points: data.series(key),
        ..Series::default()
    };
    Chart {
        series: keys.iter().map(line).filter(|series| !series.points.is_empty()).collect(),
        ..Chart::default()
    }
}
