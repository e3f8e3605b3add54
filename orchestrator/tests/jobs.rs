//! The other jobs, from the command line: preferences, reward models, distillation, adapters, recipes.

mod support;

use std::path::Path;

use serde_json::Value;
use support::{freewheel, run_config, stderr, tiny_model, write};

const SIZES: [&str; 6] = [
    "hidden_size=32",
    "num_hidden_layers=2",
    "num_attention_heads=2",
    "head_dim=16",
    "intermediate_size=32",
    "max_position_embeddings=128",
];

fn model(dir: &Path, name: &str, seed: &str) -> String {
    let out = dir.join(name).to_str().unwrap().to_owned();
    let mut args = vec!["init-model", "qwen3", "--out", &out, "--seed", seed];
    SIZES.iter().for_each(|size| args.extend(["--set", size]));
    succeeds(&args);
    out
}

fn succeeds(args: &[&str]) -> String {
    let output = freewheel(args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn pairs(dir: &Path) -> String {
    let line =
        |i: usize| format!("{{\"prompt\": \"{i}+1=\", \"chosen\": \"#{}\", \"rejected\": \"no\"}}\n", i + 1);
    write(dir, "pairs.jsonl", &(0..8).map(line).collect::<String>())
}

fn column(folder: &Path, key: &str) -> Vec<f64> {
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.map(|line| line[key].as_f64().unwrap_or_else(|| panic!("no {key} in {line}"))).collect()
}

#[test]
fn preferences_are_learnt_with_adapters_that_merge_to_the_same_weights() {
    let dir = tempfile::tempdir().unwrap();
    let (base, data) = (model(dir.path(), "base", "1"), pairs(dir.path()));
    let out = dir.path().join("dpo");
    let config = write(
        dir.path(),
        "dpo.toml",
        &format!(
            "[model]\npath = {base:?}\n[data]\nfile = {data:?}\n[dpo]\nsteps = 30\nbatch_size = 8\n\
             learning_rate = 1e-2\nlora_rank = 4\nthreads = 1\n[output]\ndir = {out:?}\n"
        ),
    );
    succeeds(&["dpo", &config]);
    let (losses, accuracies) = (column(&out, "train/loss"), column(&out, "preference/accuracy"));
    assert!((losses[0] - 2f64.ln()).abs() <= 1e-4 && losses[29] <= 0.5 * losses[0], "{losses:?}");
    assert_eq!(accuracies[29], 1.0);
    let merged = dir.path().join("merged");
    let adapter = out.join("adapter");
    let (adapter, merged) = (adapter.to_str().unwrap(), merged.to_str().unwrap());
    succeeds(&["convert", "--model", &base, "--adapter", adapter, "--out", merged]);
    let weights = |folder: &str| std::fs::read(Path::new(folder).join("model.safetensors")).unwrap();
    assert_eq!(weights(merged), weights(out.to_str().unwrap()));
    let again = freewheel(&["dpo", &config]);
    assert!(stderr(&again).contains("already holds a model"), "{}", stderr(&again));
    let bad =
        freewheel(&["dpo", &config, "--set", "dpo.beta=0", "--set", "dpo.lora_targets=[\"q\"]", "--force"]);
    assert_eq!(bad.status.code(), Some(78));
    for what in ["dpo.beta", "lora_targets[0]"] {
        assert!(stderr(&bad).contains(what), "{}", stderr(&bad));
    }
}

#[test]
fn a_reward_model_is_trained_and_judged() {
    let dir = tempfile::tempdir().unwrap();
    let (base, data) = (model(dir.path(), "base", "2"), pairs(dir.path()));
    let out = dir.path().join("judge");
    let config = write(
        dir.path(),
        "rm.toml",
        &format!(
            "[model]\npath = {base:?}\n[data]\nfile = {data:?}\n[heldout]\nfile = {data:?}\n[reward_model]\nsteps = 20\n\
             batch_size = 8\nlearning_rate = 3e-3\nthreads = 1\n[output]\ndir = {out:?}\n"
        ),
    );
    let said = succeeds(&["reward-model", &config]);
    assert!(said.contains("after:  accuracy 1.000 over 8 pairs"), "{said}");
    let verdict = succeeds(&["reward-model", "--model", out.to_str().unwrap(), "--data", &data, "--json"]);
    let verdict: Value = serde_json::from_str(&verdict).unwrap();
    assert_eq!((verdict["accuracy"].as_f64(), verdict["pairs"].as_u64()), (Some(1.0), Some(8)));
}

#[test]
fn a_student_is_distilled_from_stored_targets_and_beside_a_teacher_that_learns() {
    let dir = tempfile::tempdir().unwrap();
    let (student, teacher) = (model(dir.path(), "student", "3"), model(dir.path(), "teacher", "4"));
    let (out, store) = (dir.path().join("out"), dir.path().join("soft.safetensors"));
    let config = write(
        dir.path(),
        "distill.toml",
        &format!(
            "[model]\npath = {student:?}\n[teacher]\npath = {teacher:?}\n[data]\ngenerator = \"arithmetic\"\nlevels = [1]\n\
             count = 40\n[distill]\nsteps = 6\nbatch_size = 4\nlearning_rate = 3e-3\ntop_k = 8\nthreads = 1\n[output]\ndir = {out:?}\n"
        ),
    );
    let stored = format!("teacher.store={store:?}");
    let first = succeeds(&["distill", &config, "--set", &stored]);
    assert!(store.exists());
    let second = succeeds(&["distill", &config, "--set", &stored, "--force"]);
    let online = succeeds(&["distill", &config, "--force"]);
    let weights = |said: &str| said.lines().find(|line| line.starts_with("weights")).unwrap().to_owned();
    assert_eq!(weights(&first), weights(&second), "what is stored is what was said");
    assert_eq!(weights(&first), weights(&online), "stored or asked on the way is the same");
    let shares = column(&out, "distill/weight");
    assert!((shares[0] - 0.9).abs() <= 1e-6 && shares[5] < 0.3, "{shares:?}");
    let own = [
        "distill",
        &config,
        "--force",
        "--set",
        "distill.on_policy=true",
        "--set",
        "distill.max_new_tokens=8",
    ];
    succeeds(&own);
    assert!(column(&out, "distill/reverse_kl").iter().all(|gap| gap.is_finite()));
    succeeds(&["distill", &config, "--force"]);
    let report = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(report.contains("Weight of soft targets") && report.contains("Soft and hard loss"));
    let learnt = dir.path().join("learnt");
    let output = format!("teacher.output={learnt:?}");
    succeeds(&["distill", &config, "--force", "--set", "teacher.train=true", "--set", &output]);
    assert!(learnt.join("model.safetensors").exists());
    let taught = column(&out, "distill/teacher_loss");
    assert!(taught.last() < taught.first(), "the teacher learns too: {taught:?}");
}

#[test]
fn a_recipe_makes_its_stages_one_from_the_other_and_goes_on_where_it_stopped() {
    let dir = tempfile::tempdir().unwrap();
    pairs(dir.path());
    let recipe = write(
        dir.path(),
        "recipe.toml",
        "# sft, then rl, then dpo\n[[stage]]\njob = \"sft\"\n[stage.init]\narch = \"qwen3\"\n[stage.init.set]\n\
         hidden_size = 32\nnum_hidden_layers = 2\nnum_attention_heads = 2\nhead_dim = 16\nintermediate_size = 32\n\
         max_position_embeddings = 128\n[stage.data]\ngenerator = \"arithmetic\"\nlevels = [1]\ncount = 200\n\
         [stage.sft]\nsteps = 20\nbatch_size = 8\nlearning_rate = 3e-3\nthreads = 1\n\n\
         [[stage]]\njob = \"run\"\n[stage.prompts]\ngenerator = \"arithmetic\"\nlevels = [1]\ncount = 50\ngroup_size = 4\n\
         [stage.actor]\nmax_new_tokens = 12\n[stage.learner]\nsteps = 2\ngroups_per_step = 2\nlearning_rate = 1e-3\n\
         checkpoint_every = 2\n[stage.eval]\nevery = 0\n\n\
         [[stage]]\njob = \"dpo\"\n[stage.data]\nfile = \"pairs.jsonl\"\n[stage.dpo]\nsteps = 3\nbatch_size = 4\nthreads = 1\n",
    );
    let folder = dir.path().join("out");
    let own = format!("recipe.dir={}", folder.display());
    // A mistake in the last stage is found before the first begins.
    let bad = freewheel(&["run", &recipe, "--set", &own, "--set", "stage3.dpo.stepz=1"]);
    assert_eq!(bad.status.code(), Some(78));
    assert!(stderr(&bad).contains("dpo.stepz") && !folder.exists(), "{}", stderr(&bad));
    let said = succeeds(&["run", &recipe, "--set", &own]);
    assert!(said.contains("3-dpo"), "{said}");
    for stage in ["1-sft", "2-run", "3-dpo"] {
        assert!(folder.join(stage).join("DONE").exists(), "{stage}");
    }
    assert_eq!(column(&folder.join("2-run"), "step").last(), Some(&2.0));
    assert!((column(&folder.join("3-dpo"), "train/loss")[0] - 2f64.ln()).abs() <= 1e-3);
    let again = freewheel(&["run", &recipe, "--set", &own]);
    assert!(stderr(&again).contains("is there already"), "{}", stderr(&again));
    std::fs::remove_file(folder.join("3-dpo/DONE")).unwrap();
    let resumed = freewheel(&["run", &recipe, "--set", &own, "--resume"]);
    assert!(
        resumed.status.success() && stderr(&resumed).contains("stage 2 (run): done before"),
        "{}",
        stderr(&resumed)
    );
}

#[test]
fn checking_a_config_plans_its_memory() {
    let dir = tempfile::tempdir().unwrap();
    let config = run_config(dir.path(), &tiny_model(dir.path()), "");
    let total = |flags: &[&str]| {
        let mut args = vec!["config", "check", &config];
        flags.iter().for_each(|flag| args.extend(["--set", flag]));
        let said = succeeds(&args);
        let plan = said.lines().find(|line| line.starts_with("memory:")).unwrap_or_else(|| panic!("{said}"));
        plan.split("activations ").nth(1).unwrap().split(',').next().unwrap().to_owned()
    };
    assert_ne!(total(&[]), total(&["learner.recompute_layers=true", "learner.micro_batch_tokens=64"]));
    let nowhere = succeeds(&["config", "check", &config, "--set", "model.path=nowhere"]);
    assert!(nowhere.contains("not planned"), "{nowhere}");
}
