//! `freewheel distill`: a student learns from a teacher's probabilities beside what is written.

use std::path::{Path, PathBuf};

use clap::Args;
use freewheel_actor::{EngineConfig, InFlight, Request, SampleSpec, StopSpec};
use freewheel_kernels::Threads;
use freewheel_learner::distill::{DistillConfig, run_distill, run_on_policy};
use freewheel_learner::sft::TokenisedExample;
use freewheel_model::{LoadedModel, Params, SaveOptions};
use freewheel_types::{SamplingParams, TaskId};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ConfigArgs;
use super::jobs::{OutputSection, Work, size};
use super::sft::{DataSection, check_data, examples_of};
use crate::config::{Checks, Dtype, Loaded, ModelSection, Node, Problem};

/// Distil a teacher into a student: soft targets, stored or computed on the way; codistillation.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  freewheel distill my-distill.toml\n  \
    freewheel distill my-distill.toml --set distill.weighting=confidence --set output.dir=models/try")]
pub struct DistillArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Overwrite the output folder.
    #[arg(long)]
    force: bool,
}

/// The config of a distillation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DistillJob {
    /// The student to start from.
    pub model: ModelSection,
    /// Who is learnt from.
    pub teacher: TeacherSection,
    /// Demonstrations.
    pub data: DataSection,
    /// Training.
    pub distill: DistillConfig,
    /// Where the student goes.
    pub output: OutputSection,
}

/// The `[teacher]` section.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TeacherSection {
    /// The teacher: a model with the student's tokenizer. Required.
    pub path: String,
    /// Element type of its weights. Default "auto".
    pub dtype: Dtype,
    /// A file for what it says about the data: written once, read from then on. Default: it is asked at every step.
    pub store: Option<String>,
    /// Whether it learns the data by itself in the same run (codistillation). Default false.
    pub train: bool,
    /// Folder of the teacher that has learnt. Required with `train`.
    pub output: Option<String>,
}

fn checks(job: &DistillJob, document: &Node, _path: &Path) -> Vec<Problem> {
    let mut checks = Checks::new(document);
    for (key, path) in [("model.path", &job.model.path), ("teacher.path", &job.teacher.path)] {
        checks.require(!path.is_empty(), key, "is not set", None);
    }
    let (store, train, output) =
        (job.teacher.store.is_some(), job.teacher.train, job.teacher.output.is_some());
    checks.require(!(store && train), "teacher.store", "is of no use to a teacher that learns", None);
    let on_policy = job.distill.keys.on_policy;
    checks.require(
        !(on_policy && (store || train)),
        "distill.on_policy",
        "needs a teacher at work that stays as it is",
        None,
    );
    checks.require(train == output, "teacher.output", "and teacher.train = true go together", None);
    check_data(&job.data, &mut checks);
    job.output.check(&mut checks);
    job.distill.problems().iter().for_each(|problem| checks.told(problem));
    checks.finish()
}

impl DistillArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        super::super::logging::to_terminal();
        let loaded: Loaded<DistillJob> =
            crate::config::load_as(&self.config.config, &self.config.overrides, &[], checks)?;
        let job = &loaded.config;
        let output = job.output.folder(self.force)?;
        let examples = examples_of(&job.data, &loaded.path)?;
        let open = |path: &str, dtype: Dtype| {
            crate::policy::open(&crate::config::resolve(path, &loaded.path), dtype.requested())
        };
        let mut student = open(&job.model.path, job.model.dtype)?;
        let mut teacher = open(&job.teacher.path, job.teacher.dtype)?;
        let (demonstrations, pupil, master) = (examples.len(), size(&student), size(&teacher));
        let what = format!("{demonstrations} demonstrations, student {pupil}, teacher {master}");
        let work = Work::begin(output, &what, &job.distill.fit);
        let store = job.teacher.store.as_ref().map(PathBuf::from);
        let summary = if job.distill.keys.on_policy {
            let mut writer = Writer::new(&student, job);
            let mut draw = |params: &Params, step: u64, prompts: &[&TokenisedExample]| {
                writer.write(params, step, prompts).map_err(|error| format!("{error:#}"))
            };
            run_on_policy(&job.distill, &mut student, &teacher, examples, &mut draw, &work.view)?
        } else {
            let (store, train) = (store.as_deref(), job.teacher.train);
            run_distill(&job.distill, &mut student, &mut teacher, store, train, examples, &work.view)?
        };
        if let Some(folder) = &job.teacher.output {
            freewheel_model::save(Path::new(folder), &teacher, &teacher.params, &SaveOptions::default())?;
        }
        work.end(&summary, &student, &job.model.path)
    }
}

/// The student as it writes: the actor's engine, with the weights of the step.
struct Writer {
    model: LoadedModel,
    threads: Threads,
    seed: u64,
    max_new_tokens: usize,
    stop: StopSpec,
}

impl Writer {
    fn new(student: &LoadedModel, job: &DistillJob) -> Self {
        let stop =
            StopSpec { ids: student.generation.eos_ids.clone().into(), strings: Vec::<String>::new().into() };
        Self {
            model: student.clone(),
            threads: crate::policy::threads(job.distill.threads),
            seed: job.distill.seed,
            max_new_tokens: job.distill.keys.max_new_tokens,
            stop,
        }
    }

    fn write(
        &mut self,
        params: &Params,
        step: u64,
        prompts: &[&TokenisedExample],
    ) -> anyhow::Result<Vec<Vec<u32>>> {
        self.model.params.clone_from(params);
        let config = EngineConfig {
            max_live: prompts.len(),
            kv_bytes: 1 << 30,
            prefill_tokens: 512,
            in_flight: InFlight::Keep,
            ..EngineConfig::default()
        };
        let mut engine = crate::policy::engine(&self.model, &self.threads, config)?;
        let requests = prompts.iter().enumerate().map(|(i, prompt)| Request {
            id: i as u64,
            prompt_ids: prompt.prompt_ids.clone(),
            tiles: prompt.tiles.clone(),
            samples: vec![SampleSpec { rollout: TaskId(step << 20 | i as u64).rollout(0) }],
            seed: self.seed,
            sampling: SamplingParams::default(),
            max_new_tokens: self.max_new_tokens,
            stop: self.stop.clone(),
        });
        let mut drawn = vec![Vec::new(); prompts.len()];
        for done in engine.run_to_end(requests.collect())? {
            drawn[done.request as usize] = done.output_ids;
        }
        Ok(drawn)
    }
}
