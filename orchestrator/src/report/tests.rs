use serde_json::json;

use super::*;

const HOSTILE: &str = "</p></pre><script>alert(1)</script><img src=x onerror=alert(1)>\"'&";

fn run_folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, lines: &[serde_json::Value]| {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        fs::write(dir.path().join(name), text).unwrap();
    };
    let step = |i: i32| {
        json!({
            "step": i, "time/wall_s": f64::from(i) * 1.5, "reward/mean": 0.3 + 0.001 * f64::from(i), "train/entropy": 0.5,
            "staleness/mean": 1.0, "staleness/max": 2, "mismatch/kl": 1e-4, "mismatch/same_version_abs_max": 0.0,
            "mismatch/same_version_tokens": 100, "reward/format/mean": 1.0, "rollout/tokens_per_s": 1500.0,
            "accounting/issued": 8 * i + 20, "accounting/trained": 8 * i, "accounting/dropped_zero_signal": 5,
            "accounting/dropped_stale": 0, "accounting/queued": 3, "accounting/in_flight": 12,
        })
    };
    write("metrics.jsonl", &(1..=200).map(step).collect::<Vec<_>>());
    let eval = |step: i32, accuracy: f64| {
        json!({"step": step, "eval/held_out/accuracy": accuracy, "eval/held_out/accuracy_low": accuracy - 0.03,
               "eval/held_out/accuracy_high": accuracy + 0.03, "eval/held_out/tag/easy/accuracy": 0.99})
    };
    write("eval.jsonl", &[eval(0, 0.41), eval(100, 0.7), eval(200, 0.93)]);
    fs::create_dir(dir.path().join("rollouts")).unwrap();
    let sample = |step: i32, reward: Option<f64>| {
        json!({"step": step, "id": "0-1", "question": format!("what is {HOSTILE}?"), "answer": 4, "text": HOSTILE, "tokens": 7,
               "finish_reason": "length", "reward": reward, "correct": reward.map(|r| r > 0.5), "gated_by": null,
               "unscored": reward.is_none().then_some(HOSTILE),
               "components": {HOSTILE: {"value": reward, "detail": HOSTILE, "latency_ms": 0.1}}})
    };
    write("rollouts/rollouts-00000001.jsonl", &[sample(1, Some(0.0)), sample(1, None)]);
    write("rollouts/rollouts-00000200.jsonl", &[sample(200, Some(1.0))]);
    fs::write(dir.path().join("config.toml"), format!("[run]\nname = '''{HOSTILE}'''\n")).unwrap();
    dir
}

#[test]
fn the_page_tells_the_run() {
    let dir = run_folder();
    let path = write(dir.path()).unwrap();
    let html = fs::read_to_string(&path).unwrap();
    for said in [
        "200 learner steps in 5 min 00 s",
        "from <b>0.41</b> to <b>0.93</b>",
        "Held-out accuracy",
        "Entropy",
        "Staleness",
        "Reward components",
        "to the bit on 20,000 tokens",
        "Every rollout is accounted for.",
        "Dropped: zero signal",
        "<span class=\"reward good\">1</span>",
        "<span class=\"reward poor\">0</span>",
        "unscored",
        "truncated",
    ] {
        assert!(html.contains(said), "the page does not say {said:?}");
    }
    assert!(!html.contains("Router entropy"), "a chart without data");
    assert!(!html.contains("NaN"));
    let places: Vec<_> = ["At the start", "At the end"].map(|title| html.find(title).unwrap()).into();
    assert!(places.is_sorted());
    assert!(!dir.path().join("report.html.tmp").exists());
}

#[test]
fn alarms_are_listed_and_marked_in_the_charts() {
    let dir = run_folder();
    let calm = fs::read_to_string(write(dir.path()).unwrap()).unwrap();
    assert!(!calm.contains("<h2>Alarms</h2>") && !calm.contains("class=\"mark\""));
    let raised = json!({"step": 120, "alarm": "gap_held_guard", "action": "stop", "what": format!("from 0 to 0.3 {HOSTILE}")});
    fs::write(dir.path().join("alarms.jsonl"), format!("{raised}\n")).unwrap();
    let html = fs::read_to_string(write(dir.path()).unwrap()).unwrap();
    for said in ["<h2>Alarms</h2>", "gap_held_guard", "stopped the run", "from 0 to 0.3 &lt;/p&gt;"] {
        assert!(html.contains(said), "the page does not say {said:?}");
    }
    // In the charts of the reward and of its components.
    assert_eq!(html.matches("class=\"mark\"").count(), 2);
    assert!(!html.contains("<script"));
}

#[test]
fn hostile_text_stays_text_and_nothing_is_loaded() {
    let dir = run_folder();
    let html = fs::read_to_string(write(dir.path()).unwrap()).unwrap();
    assert!(html.contains("&lt;script&gt;alert(1)"), "the text is shown");
    for forbidden in
        ["<script", "<img", "<iframe", "<link", "http://", "https://", "url(", "@import", " src=\"", " href="]
    {
        assert!(!html.contains(forbidden), "{forbidden} in the page");
    }
    assert!(html.contains("default-src 'none'"));
}

#[test]
fn a_lost_rollout_is_said_in_red() {
    let dir = run_folder();
    let line =
        json!({"step": 1, "accounting/issued": 100, "accounting/trained": 40, "accounting/queued": 10});
    fs::write(dir.path().join("metrics.jsonl"), format!("{line}\n{{\"step\": 2, \"rew")).unwrap();
    let html = fs::read_to_string(write(dir.path()).unwrap()).unwrap();
    assert!(html.contains("The parts add up to 50, 100 were issued: 50 unaccounted for."));
    assert!(html.contains("1 unreadable lines were left out"));
}

#[test]
fn an_empty_run_has_a_page_and_no_run_has_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let html = fs::read_to_string(write(dir.path()).unwrap()).unwrap();
    assert!(html.contains("No learner step has been recorded yet"));
    let error = write(&dir.path().join("nowhere")).unwrap_err().to_string();
    assert!(error.contains("is not a run's folder"), "{error}");
}
