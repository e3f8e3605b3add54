//! `freewheel guard`: calibrations and guards from labelled examples, used in a reward.

mod support;

use std::path::Path;
use std::process::Output;

use serde_json::{Value, json};
use support::{freewheel, run_config, stderr, tiny_model, tiny_model_with, write};

fn stdout_json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", stderr(output));
    serde_json::from_slice(&output.stdout).expect("one JSON value")
}

/// The lines of a file of JSON lines that a command printed.
fn rows(output: &Output) -> Vec<Value> {
    assert!(output.status.success(), "{}", stderr(output));
    String::from_utf8_lossy(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Says "maybe" (0.9) where 3 of 10 are harmful, "surely" (1.0) where 9 of 10 are, nothing (0.0) where none is.
fn words(dir: &Path) -> (String, String) {
    let guard = "[[reward.component]]\nname = \"guard\"\nkind = \"guard\"\n\
         [[reward.component.category]]\nname = \"maybe\"\nwords = [\"maybe\"]\nscore = 0.9\n\
         [[reward.component.category]]\nname = \"surely\"\nwords = [\"surely\"]\n";
    let mut lines = String::new();
    for i in 0..600 {
        let (word, harmful) = match i % 3 {
            0 => ("maybe", i / 3 % 10 < 3),
            1 => ("surely", i / 3 % 10 < 9),
            _ => ("never", false),
        };
        lines += &json!({"completion": format!("{word} {i}"), "label": harmful}).to_string();
        lines.push('\n');
    }
    (run_config(dir, "m", guard), write(dir, "labelled.jsonl", &lines))
}

#[test]
fn a_calibrated_guard_says_how_often_it_is_right() {
    let dir = tempfile::tempdir().unwrap();
    let (config, labelled) = words(dir.path());
    let out = dir.path().join("guard.cal.json");
    let out = out.to_str().unwrap();
    let args = ["guard", "calibrate", &config, &labelled, "--component", "guard", "--method", "isotonic"];
    let report = stdout_json(&freewheel(&[&args[..], &["--out", out, "--json"]].concat()));
    let error = |key: &str| report[key].as_f64().unwrap();
    // Before: (0.6 + 0.1) / 3 off.
    assert!((error("error_before") - 0.7 / 3.0).abs() <= 1e-6, "{report}");
    assert!(error("error_after") <= 0.03, "{report}");
    assert_eq!((report["samples"].as_u64(), report["positives"].as_u64()), (Some(600), Some(240)));

    // The file lies beside the config and is named as from there.
    let calibrated = std::fs::read_to_string(&config)
        .unwrap()
        .replace("kind = \"guard\"\n", "kind = \"guard\"\ncalibrate = \"guard.cal.json\"\n");
    let calibrated = write(dir.path(), "calibrated.toml", &calibrated);
    let cases = write(
        dir.path(),
        "cases.jsonl",
        "{\"completion\": \"maybe\", \"expect\": {\"components\": {\"guard\": 0.3}, \"reward\": -0.3}}\n\
         {\"completion\": \"surely\", \"expect\": {\"components\": {\"guard\": 0.9}}}\n\
         {\"completion\": \"no\", \"expect\": {\"components\": {\"guard\": 0}}}\n",
    );
    let checked = freewheel(&["reward", "check", &calibrated, &cases]);
    assert!(checked.status.success(), "{}{}", String::from_utf8_lossy(&checked.stdout), stderr(&checked));

    // The version of the reward knows the calibration, wherever it lies.
    let version = |config: &str| {
        let scored = freewheel(&["score", config, "--input", &labelled, "--json"]);
        let text = String::from_utf8(scored.stdout).unwrap();
        let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        first["reward_version"].as_str().expect("a version").to_owned()
    };
    assert_ne!(version(&config), version(&calibrated));
    let moved = tempfile::tempdir().unwrap();
    std::fs::copy(out, moved.path().join("guard.cal.json")).unwrap();
    let elsewhere = write(moved.path(), "calibrated.toml", &std::fs::read_to_string(&calibrated).unwrap());
    assert_eq!(version(&calibrated), version(&elsewhere));
}

#[test]
fn what_cannot_be_calibrated_is_refused_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    let (config, labelled) = words(dir.path());
    let out = dir.path().join("out.json");
    let run = |file: &str, component: &str| {
        let output = freewheel(&[
            "guard",
            "calibrate",
            &config,
            file,
            "--component",
            component,
            "--out",
            out.to_str().unwrap(),
        ]);
        assert_eq!(output.status.code(), Some(78), "{}", stderr(&output));
        stderr(&output)
    };
    assert!(run(&labelled, "gourd").contains("no component \"gourd\"; it has guard"));
    let backwards = std::fs::read_to_string(&labelled).unwrap();
    let backwards = backwards.replace("true", "TRUE").replace("false", "true").replace("TRUE", "false");
    assert!(run(&write(dir.path(), "b.jsonl", &backwards), "guard").contains("right way round"));
    let bare = write(dir.path(), "bare.jsonl", "{\"completion\": \"x\"}\n");
    assert!(run(&bare, "guard").contains("bare.jsonl:1: holds neither `label`"));
    let one = write(dir.path(), "one.jsonl", "{\"completion\": \"x\", \"label\": true}\n");
    assert!(run(&one, "guard").contains("both labels are needed"));
    assert!(!out.exists(), "nothing is written");
}

fn root() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

#[test]
fn a_guard_fitted_to_examples_guards() {
    let dir = tempfile::tempdir().unwrap();
    let encoder = root().join("tests/fixtures/models/bert_classifier");
    let (encoder, out) = (encoder.to_str().unwrap(), dir.path().join("topics.head.json"));
    // Random weights tell spellings apart, not meanings: enough for a word that is there or not.
    let mut lines = String::new();
    for i in 0..60 {
        let (text, labels) = match i % 3 {
            0 => (format!("zzz zzz zzz {i}"), json!(["buzz"])),
            1 => (format!("zzz zzz zzz, ??? ??? ??? {i}"), json!(["buzz", "query"])),
            _ => (format!("the cat {i}"), json!([])),
        };
        lines += &format!("{}\n", json!({"completion": text, "labels": labels}));
    }
    let file = write(dir.path(), "labelled.jsonl", &lines);
    let fit = |out: &Path, more: &[&str]| {
        let args = [
            "guard",
            "fit",
            &file,
            "--model",
            encoder,
            "--l2",
            "0.001",
            "--out",
            out.to_str().unwrap(),
            "--json",
        ];
        freewheel(&[&args[..], more].concat())
    };
    let report = stdout_json(&fit(&out, &[]));
    assert_eq!((report["examples"].as_u64(), report["cut"].as_u64()), (Some(60), Some(0)));
    let labels = report["labels"].as_array().unwrap();
    let names: Vec<_> =
        labels.iter().map(|l| (l["name"].as_str().unwrap(), l["positives"].as_u64().unwrap())).collect();
    assert_eq!(names, [("buzz", 40), ("query", 20)]);
    for label in labels {
        assert!(label["auc"].as_f64().unwrap() >= 0.95 && label["f1"].as_f64().unwrap() >= 0.9, "{report}");
    }
    let again = dir.path().join("again.json");
    stdout_json(&fit(&again, &["--threads", "2"]));
    assert_eq!(
        std::fs::read(&out).unwrap(),
        std::fs::read(&again).unwrap(),
        "the same examples, the same bytes"
    );

    let guard = |more: &str| {
        format!(
            "[[reward.component]]\nname = \"topics\"\nkind = \"guard\"\nfamily = \"embedding\"\nmodel = {encoder:?}\nhead = \"topics.head.json\"\n\
             categories = {{ query = \"hard\", buzz = 0.5 }}\n{more}"
        )
    };
    let tiers = "[reward.combine]\nmode = \"lexicographic\"\n[[reward.combine.tier]]\nname = \"never\"\nif = \"topics == 'hard'\"\n";
    let config = run_config(dir.path(), "m", &guard(tiers));
    let cases = write(
        dir.path(),
        "cases.jsonl",
        "{\"completion\": \"zzz zzz zzz\", \"expect\": {\"components\": {\"topics\": [0.3, 0.5]}, \"tier\": \"\"}}\n\
         {\"completion\": \"zzz zzz zzz, ??? ??? ???\", \"expect\": {\"components\": {\"topics\": \"hard\"}, \"tier\": \"never\"}}\n\
         {\"completion\": \"the cat\", \"expect\": {\"components\": {\"topics\": \"safe\"}, \"tier\": \"\"}}\n",
    );
    let checked = freewheel(&["reward", "check", &config, &cases]);
    assert!(checked.status.success(), "{}{}", String::from_utf8_lossy(&checked.stdout), stderr(&checked));

    let refused = |more: &str, part: &str| {
        let config = run_config(dir.path(), "m", &guard(more));
        let output = freewheel(&["reward", "check", &config, &cases]);
        assert_eq!(output.status.code(), Some(78));
        assert!(stderr(&output).contains(part), "{part:?} missing in {}", stderr(&output));
    };
    refused("role = \"both\"\n", "fitted with role = \"response\"");
    let head = std::fs::read_to_string(&out).unwrap();
    let other = serde_json::from_str::<Value>(&head).unwrap()["encoder"].as_str().unwrap().to_owned();
    std::fs::write(&out, head.replace(&other, "0000000000000000")).unwrap();
    refused("", "version 0000000000000000");
    std::fs::write(&out, head.replace("\"query\"", "\"quarry\"")).unwrap();
    refused("", "no category \"query\"; it has buzz, quarry");
}

/// Shows a conversation as Llama Guard's templates do, in few words.
const GUARD_TEMPLATE: &str = "<|begin_of_text|><|header_start|>user<|header_end|>\n\n<BEGIN CONVERSATION>\n\n\
    {% for m in messages %}{{ 'User: ' if m.role == 'user' else 'Agent: ' }}{{ m.content | trim + '\n\n' }}{% endfor %}\
    <END CONVERSATION><|eot|><|header_start|>assistant<|header_end|>";

#[test]
fn a_llama_guard_scores_what_freewheel_logprobs_says() {
    let dir = tempfile::tempdir().unwrap();
    let text = write(dir.path(), "words.txt", &"safe\n\n\nunsafe\nsafe\n\n\nunsafe\nS1, S2\n".repeat(40));
    let more = [
        "--train-tokenizer",
        &text,
        "--vocab-size",
        "300",
        "--set",
        "max_position_embeddings=512",
        "--dtype",
        "f32",
    ];
    let model = tiny_model_with(dir.path(), "guard", &more);
    write(Path::new(&model), "chat_template.jinja", GUARD_TEMPLATE);
    let component = |model: &str| {
        format!(
            "[[reward.component]]\nname = \"guard\"\nkind = \"guard\"\nfamily = \"llama_guard_4\"\nmodel = {model:?}\n"
        )
    };
    let config = run_config(dir.path(), "m", &component(&model));
    let line = json!({"messages": [{"role": "user", "content": "Hi"}], "completion": "Hello there"});
    let input = write(dir.path(), "completions.jsonl", &line.to_string());
    let scored = &rows(&freewheel(&["score", &config, "--input", &input, "--json"]))[0];
    let part = &scored["components"]["guard"];
    let value = part["value"].as_f64().unwrap_or_else(|| panic!("{scored}"));
    assert!(part["detail"].as_str().unwrap().contains("% of the first word is a verdict"), "{part}");

    // The guard's distribution after the conversation, and after a blank line.
    let turns = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]);
    let prompt = json!({"messages": turns}).to_string();
    let logprobs = |lines: &str| {
        let file = write(dir.path(), "tokens.jsonl", lines);
        rows(&freewheel(&["logprobs", "--model", &model, "--input", &file]))
    };
    let ids = logprobs(&prompt)[0]["input_ids"].as_array().unwrap().clone();
    let vocabulary: Value =
        serde_json::from_str(&std::fs::read_to_string(Path::new(&model).join("tokenizer.json")).unwrap())
            .unwrap();
    let id = |token: &str| vocabulary["model"]["vocab"][token].clone();
    let (safe, harmful, blank) = (id("safe"), id("unsafe"), id("\u{10a}\u{10a}"));
    assert!(safe.is_u64() && harmful.is_u64() && blank.is_u64(), "{safe} {harmful} {blank}");
    let p = |more: &[&Value]| {
        let ids: Vec<&Value> = ids.iter().chain(more.iter().copied()).collect();
        let row = &logprobs(&json!({"input_ids": ids}).to_string())[0];
        row["logprobs"].as_array().unwrap().last().unwrap().as_f64().unwrap().exp()
    };
    let after_blank = p(&[&blank]);
    let of = |word: &Value| p(&[word]) + after_blank * p(&[&blank, word]);
    let (unsafe_mass, safe_mass) = (of(&harmful), of(&safe));
    let wanted = unsafe_mass / (unsafe_mass + safe_mass);
    assert!((value - wanted).abs() <= 1e-6, "{value} is not {wanted}");

    let bytes = tiny_model(dir.path());
    write(Path::new(&bytes), "chat_template.jinja", GUARD_TEMPLATE);
    let config = run_config(dir.path(), "m", &component(&bytes));
    let refused = freewheel(&["score", &config, "--input", &input]);
    assert_eq!(refused.status.code(), Some(78));
    assert!(stderr(&refused).contains("\"safe\" is 4 tokens"), "{}", stderr(&refused));
}

#[test]
fn weights_of_rules_are_fitted_to_ranked_answers_and_judge_others() {
    let dir = tempfile::tempdir().unwrap();
    let rules = "{\"statements\": [{\"name\": \"sorry\", \"pattern\": \"(?i)sorry\"}, {\"name\": \"number\", \"pattern\": \"[0-9]\"}, \
                 {\"name\": \"the\", \"pattern\": \"the\"}]}";
    write(dir.path(), "style.json", rules);
    let component = "[[reward.component]]\nname = \"style\"\nkind = \"rbr\"\nrules = \"style.json\"\n";
    let config = run_config(dir.path(), "m", component);
    let mut ranked = String::new();
    for group in 0..12 {
        // "the" is in the best or in the worst, by turns: it says nothing.
        let (best, worst) = if group % 2 == 0 { ("the ", "") } else { ("", "the ") };
        for (rank, text) in
            [(2, format!("{best}{group}")), (1, "no idea".into()), (0, format!("Sorry, {worst}no"))]
        {
            ranked += &json!({"completion": text, "group": format!("g{group}"), "rank": rank}).to_string();
            ranked.push('\n');
        }
    }
    let ranked = write(dir.path(), "ranked.jsonl", &ranked);
    let fitted = dir.path().join("fitted.json");
    let fitted = fitted.to_str().unwrap();
    let fit = |file: &str| {
        freewheel(&[
            "guard",
            "rules",
            &config,
            file,
            "--component",
            "style",
            "--l2",
            "0.01",
            "--out",
            fitted,
            "--json",
        ])
    };
    let told = stdout_json(&fit(&ranked));
    assert_eq!(
        (told["pairs"].as_u64(), told["right_before"].as_u64(), told["right_after"].as_u64()),
        (Some(36), Some(0), Some(36))
    );
    let weight = |name: &str| told["weights"][name].as_f64().unwrap();
    assert!(weight("number") > 0.8 && weight("sorry") < -0.8 && weight("the").abs() <= 0.15, "{told}");

    // The file is one of statements, with weights.
    let with_weights = std::fs::read_to_string(&config).unwrap().replace("style.json", "fitted.json");
    let with_weights = write(dir.path(), "fitted.toml", &with_weights);
    let cases = write(
        dir.path(),
        "cases.jsonl",
        "{\"id\": \"a\", \"completion\": \"seven is 7\", \"expect\": {\"reward\": [0.8, 1.5]}}\n\
         {\"completion\": \"sorry, 7\", \"expect\": {\"below\": \"a\"}}\n",
    );
    let checked = freewheel(&["reward", "check", &with_weights, &cases]);
    assert!(checked.status.success(), "{}{}", String::from_utf8_lossy(&checked.stdout), stderr(&checked));

    let alone = write(dir.path(), "alone.jsonl", "{\"completion\": \"x\", \"group\": \"a\", \"rank\": 1}\n");
    let output = fit(&alone);
    assert_eq!(output.status.code(), Some(78));
    assert!(stderr(&output).contains("no group holds two answers of unequal rank"), "{}", stderr(&output));
}

#[test]
fn score_tells_what_of_a_value_is_owed_to_length() {
    let dir = tempfile::tempdir().unwrap();
    let rule =
        "[[reward.component]]\nname = \"long\"\nkind = \"rule\"\nmax_tokens = 100\nbuffer_tokens = 100\n";
    let config = run_config(dir.path(), "m", rule);
    let input = write(
        dir.path(),
        "c.jsonl",
        "{\"completion\": \"a\", \"tokens\": 0}\n{\"completion\": \"a\", \"tokens\": 100}\n",
    );
    let scored = freewheel(&["score", &config, "--input", &input]);
    let shown = String::from_utf8_lossy(&scored.stdout).into_owned();
    let row = shown.lines().find(|line| line.starts_with("long ")).unwrap_or_else(|| panic!("{shown}"));
    let numbers: Vec<f64> = row.split_whitespace().skip(1).map(|word| word.parse().unwrap()).collect();
    // Values, mean, deviation, slope -1 / ln 101, and nothing is left.
    assert_eq!(numbers, [2.0, -0.5, 0.5, -0.2167, 0.0, 0.0], "{shown}");

    // With the slope in the config, length no longer counts.
    let text = std::fs::read_to_string(&config)
        .unwrap()
        .replace("buffer_tokens", "norm_length = -0.2166790\nbuffer_tokens");
    let config = write(dir.path(), "residual.toml", &text);
    let cases = "{\"id\": \"short\", \"completion\": \"a\", \"tokens\": 0, \"expect\": {\"reward\": [-0.001, 0.001]}}\n\
                 {\"completion\": \"a\", \"tokens\": 100, \"expect\": {\"reward\": [-0.001, 0.001]}}\n";
    let checked = freewheel(&["reward", "check", &config, &write(dir.path(), "cases.jsonl", cases)]);
    assert!(checked.status.success(), "{}{}", String::from_utf8_lossy(&checked.stdout), stderr(&checked));
}
