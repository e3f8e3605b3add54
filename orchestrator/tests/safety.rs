//! Filter, measures, alarms and the release test, from the command line.

mod support;

use std::path::Path;

use serde_json::Value;
use support::{freewheel, run_config, stderr, tiny_model, write};

fn json(args: &[&str]) -> Value {
    let output = freewheel(args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    serde_json::from_slice(&output.stdout).expect("JSON on standard output")
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A digit somewhere is within the reach of random weights.
const DIGIT: &str = "[[reward.component]]\nname = \"digit\"\nkind = \"verifier\"\nverifier = \"regex\"\npattern = \"[0-9]\"\n";

#[test]
fn filter_annotates_prompts_keeps_their_fields_and_the_file_can_be_trained_on() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model(dir.path());
    let config = run_config(dir.path(), &model, DIGIT);
    let (all, kept) = (dir.path().join("all.jsonl"), dir.path().join("kept.jsonl"));
    let (all, kept) = (all.to_str().unwrap(), kept.to_str().unwrap());
    let told = json(&["filter", &config, "--all", "--count", "12", "--samples", "4", "--out", all, "--json"]);
    assert_eq!((told["all"]["prompts"].as_u64(), told["all"]["kept"].as_u64()), (Some(12), Some(12)));
    let annotated = lines(Path::new(all));
    let shares: Vec<f64> = annotated.iter().map(|line| line["meta"]["avg@4"].as_f64().unwrap()).collect();
    assert!(shares.iter().all(|share| (share * 4.0).fract() == 0.0), "{shares:?}");
    let mean = shares.iter().sum::<f64>() / 12.0;
    assert!((told["all"]["avg"].as_f64().unwrap() - mean).abs() <= 1e-9);

    // From a file: other fields stay, the old column goes, prompts solved never or always go.
    let set = format!("prompts.file={all:?}");
    let text = std::fs::read_to_string(&config)
        .unwrap()
        .replace("generator = \"arithmetic\"\nlevels = [1]\ncount = 50\n", "");
    let config = write(dir.path(), "file.toml", &text);
    json(&["filter", &config, "--set", &set, "--samples", "8", "--out", kept, "--json"]);
    for line in lines(Path::new(kept)) {
        let share = line["meta"]["avg@8"].as_f64().unwrap();
        assert!(share > 0.0 && share < 1.0 && line["meta"].get("avg@4").is_none(), "{line}");
        assert!(
            line["messages"].is_array() && line["answer"].is_number() && line["tags"].is_array(),
            "{line}"
        );
    }
    let again = freewheel(&["filter", &config, "--set", &set, "--out", kept]);
    assert_eq!(again.status.code(), Some(78));
    assert!(stderr(&again).contains("--force overwrites it"), "{}", stderr(&again));
    let set = format!("prompts.file={kept:?}");
    let run =
        freewheel(&["run", &config, "--set", &set, "--set", "learner.steps=1", "--set", "run.name=kept"]);
    assert!(run.status.success(), "{}", stderr(&run));
}

#[test]
fn measures_come_with_intervals_and_the_digest_of_their_file() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model(dir.path());
    let data = write(
        dir.path(),
        "topics.jsonl",
        "{\"prompt\": \"for\", \"tags\": [\"debate\"], \"meta\": {\"pair\": 1}}\n\
         {\"prompt\": \"against\", \"tags\": [\"debate\"], \"meta\": {\"pair\": 1}}\n\
         {\"prompt\": \"a recipe\", \"tags\": [\"benign\"]}\n",
    );
    let judges = write(
        dir.path(),
        "judges.toml",
        &format!(
            "[model]\npath = {model:?}\n[prompts]\ngenerator = \"arithmetic\"\n{DIGIT}{}",
            DIGIT.replace("digit", "again")
        ),
    );
    let args =
        ["measure", "--model", &model, "--data", &data, "--max-new-tokens", "8", "--json", "--samples", "3"];
    let told = json(&[&args[..], &["--judges", &judges]].concat());
    assert_eq!((told["prompts"].as_u64(), told["pairs"].as_u64()), (Some(3), Some(1)));
    assert_eq!(told["digest"].as_str().map(str::len), Some(64));
    for name in [
        "refusal/all",
        "refusal/debate",
        "over_refusal",
        "unequal_refusal",
        "length_gap",
        "hedge_gap",
        "lean",
    ] {
        let measure = &told["measures"][name];
        let [low, mean, high] = ["low", "mean", "high"].map(|key| measure[key].as_f64().unwrap_or(f64::NAN));
        assert!(low <= mean && mean <= high, "{name}: {measure}");
    }
    // Both answers are in the text, in either order, so a judge that looks for a digit leans nowhere.
    assert_eq!(told["measures"]["lean"]["mean"], 0.0);
    assert_eq!(told, json(&[&args[..], &["--judges", &judges]].concat()), "the same seed, the same numbers");
    let lone = write(dir.path(), "lone.jsonl", "{\"prompt\": \"for\", \"meta\": {\"pair\": \"x\"}}\n");
    let output = freewheel(&["measure", "--model", &model, "--data", &lone]);
    assert_eq!(output.status.code(), Some(78));
    assert!(stderr(&output).contains("the pair \"x\" has 1 prompts, must have 2"), "{}", stderr(&output));
}

/// A run whose reward limits how often a digit is missing, which random weights cannot keep, and how often they refuse.
fn limited(dir: &Path, limit: f64) -> String {
    let model = tiny_model(dir);
    let more = format!(
        "{DIGIT}[[reward.component]]\nname = \"refusal\"\nkind = \"refusal\"\n[reward.combine]\nmode = \"lagrangian\"\n\
         [[reward.combine.lagrangian.costs]]\nname = \"mute\"\nexpr = \"digit == 0\"\nlimit = {limit}\n"
    );
    run_config(dir, &model, &more)
}

#[test]
fn nothing_is_released_whose_bound_is_above_its_limit() {
    let dir = tempfile::tempdir().unwrap();
    let sealed: String = (0..40).map(|i| format!("{{\"prompt\": \"sealed {i}\"}}\n")).collect();
    let sealed = write(dir.path(), "sealed.jsonl", &sealed);
    let out = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    for (limit, passes) in [(0.001, false), (1.0, true)] {
        let run = freewheel(&["run", &limited(dir.path(), limit), "--force"]);
        assert!(run.status.success(), "{}", stderr(&run));
        let folder = dir.path().join("runs/run");
        let run = folder.to_str().unwrap();
        let target = out(&format!("released-{passes}"));
        let output = freewheel(&["export", run, "--release", "--data", &sealed, "--out", &target, "--json"]);
        assert_eq!(output.status.code(), Some(i32::from(!passes)), "{}", stderr(&output));
        let told: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(told["test"]["passed"], passes);
        let bound = &told["test"]["bounds"][0];
        let (events, upper) = (bound["violations"].as_u64().unwrap(), bound["upper_bound"].as_f64().unwrap());
        assert!(bound["prompts"] == 40 && upper > events as f64 / 40.0 - 1e-9, "{bound}");
        assert_eq!(Path::new(&target).join("config.json").exists(), passes);
        assert_eq!(Path::new(&target).join("release.json").exists(), passes);
        let audit = std::fs::read_to_string(folder.join("audit.jsonl")).unwrap();
        assert!(audit.lines().last().unwrap().contains("\"kind\":\"export\""));
        assert!(freewheel(&["audit", "verify", run]).status.success());
        let plain = freewheel(&["export", run, "--out", &out(&format!("plain-{passes}"))]);
        assert!(plain.status.success(), "{}", stderr(&plain));
    }
    // What was trained on is no sealed set.
    let seen = dir.path().join("seen.jsonl");
    let config = limited(dir.path(), 1.0);
    json(&["filter", &config, "--all", "--samples", "2", "--out", seen.to_str().unwrap(), "--json"]);
    let set = format!("prompts.file={:?}", seen.to_str().unwrap());
    let text = std::fs::read_to_string(&config)
        .unwrap()
        .replace("generator = \"arithmetic\"\nlevels = [1]\ncount = 50\n", "");
    let config = write(dir.path(), "file.toml", &text);
    let run = freewheel(&["run", &config, "--set", &set, "--set", "eval.every=0"]);
    assert!(run.status.success(), "{}", stderr(&run));
    let run = dir.path().join("runs/file");
    let data = seen.to_str().unwrap();
    let output =
        freewheel(&["export", run.to_str().unwrap(), "--release", "--data", data, "--out", &out("x")]);
    assert_eq!(output.status.code(), Some(78));
    assert!(stderr(&output).contains("of its prompts were trained on"), "{}", stderr(&output));
}

#[test]
fn an_alarm_stops_a_run_that_can_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model(dir.path());
    let alarm =
        "[[alarms]]\nwatch = \"length\"\naction = \"stop\"\nthreshold = 1e-9\nwindow = 1\nsteps = 1\n";
    let config = run_config(dir.path(), &model, &format!("{DIGIT}{alarm}"));
    let output = freewheel(&["run", &config, "--set", "learner.steps=500"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("the alarm length stopped the run"), "{}", stderr(&output));
    let folder = dir.path().join("runs/run");
    let (raised, steps) = (lines(&folder.join("alarms.jsonl")), lines(&folder.join("metrics.jsonl")));
    assert_eq!(raised[0]["action"], "stop");
    assert!(
        steps.len() < 400 && steps.last().unwrap()["alarm/length"].as_f64() >= Some(0.0),
        "{} steps",
        steps.len()
    );
    // Whoever resumes accepts what there is; without the alarm the run ends well.
    let more = ["--resume", "--set", "alarms=[]", "--set"];
    let end = format!("learner.steps={}", steps.len() + 3);
    let output = freewheel(&[&["run", config.as_str()], &more[..], &[end.as_str()]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn a_hold_out_that_finds_more_than_the_optimised_guard_stops_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model(dir.path());
    // The guard that is optimised finds nothing, the one that is held out finds something in every answer.
    let guard = |name: &str, pattern: &str, more: &str| {
        format!(
            "[[reward.component]]\nname = \"{name}\"\nkind = \"guard\"\n{more}[[reward.component.category]]\nname = \"harm\"\npatterns = [\"{pattern}\"]\n"
        )
    };
    let both = |held: &str| {
        format!(
            "{DIGIT}{}{}[[alarms]]\nwatch = \"gap\"\ncomponent = \"outside\"\nagainst = \"guard\"\nthreshold = 0.1\nwindow = 1\nsteps = 3\n\
             action = \"stop\"\n",
            guard("guard", "nobody says this", ""),
            guard("outside", held, "holdout = true\nshare = 0.5\n")
        )
    };
    let config = run_config(dir.path(), &model, &both("(?s).*"));
    let output = freewheel(&["run", &config, "--set", "learner.steps=300"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("the alarm gap_outside_guard stopped the run"), "{}", stderr(&output));
    let folder = dir.path().join("runs/run");
    let raised = lines(&folder.join("alarms.jsonl"));
    assert_eq!(
        (raised.len(), &raised[0]["step"], &raised[0]["action"]),
        (1, &Value::from(3), &Value::from("stop"))
    );
    // Whoever looks at the run is told.
    let run = folder.to_str().unwrap();
    assert_eq!(json(&["status", run, "--json"])["alarms"][0]["alarm"], "gap_outside_guard");
    let shown = freewheel(&["status", run]);
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("alarm (step 3)") && shown.contains("action: stop"), "{shown}");
    assert!(std::fs::read_to_string(folder.join("report.html")).unwrap().contains("stopped the run"));
    // A hold-out that agrees stops nothing.
    let config = run_config(dir.path(), &model, &both("nobody says that"));
    let output = freewheel(&["run", &config, "--force", "--set", "learner.steps=6"]);
    assert!(output.status.success(), "{}", stderr(&output));
}
