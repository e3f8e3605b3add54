//! Everything a run needs before it begins; whatever is wrong with the inputs is found here (exit code 78).

use std::path::Path;
use std::sync::Arc;

use freewheel_actor::StopSpec;
use freewheel_model::{LoadedModel, Tokenizer};
use freewheel_reward::RewardStack;
use freewheel_types::{Prompt, SamplingParams};

use crate::cli::fail::Explain as _;
use crate::config::{GeneratorKind, Loaded};
use crate::evaluation::EvalSet;
use crate::prompts::{Generator, Split};

/// Prompts encoded to find the longest: those with the longest text.
const ENCODED: usize = 32;

/// The prompts a run trains on.
///
/// # Errors
/// Every bad line of the prompt file.
pub fn training_prompts(loaded: &Loaded) -> anyhow::Result<Vec<Prompt>> {
    let section = &loaded.config.prompts;
    match (&section.file, section.generator) {
        (Some(file), _) => read(&loaded.resolve(file)),
        (None, Some(kind)) => Ok(generator(loaded, kind, Split::Train).prompts(section.count)),
        (None, None) => Err(anyhow::anyhow!("there are no prompts")).input(),
    }
}

/// The prompts a run is judged on, if it has any.
///
/// # Errors
/// Every bad line of the prompt file.
pub fn held_out_prompts(loaded: &Loaded) -> anyhow::Result<Vec<Prompt>> {
    let count = loaded.config.eval.count;
    let mut prompts = match (&loaded.config.eval.file, loaded.config.prompts.generator) {
        (Some(file), _) => read(&loaded.resolve(file))?,
        (None, Some(kind)) => generator(loaded, kind, Split::HeldOut).prompts(count),
        (None, None) => Vec::new(),
    };
    prompts.truncate(count);
    Ok(prompts)
}

fn generator(loaded: &Loaded, kind: GeneratorKind, split: Split) -> Generator {
    let section = &loaded.config.prompts;
    let seed = section.seed.map_or(loaded.config.run.seed, u64::from);
    Generator::new(kind, seed, &section.levels, split)
}

fn read(path: &Path) -> anyhow::Result<Vec<Prompt>> {
    Ok(crate::prompts::load(path, true).input()?.prompts)
}

/// Opens the model of a run.
///
/// # Errors
/// Whatever is wrong with its files.
pub fn model(loaded: &Loaded) -> anyhow::Result<LoadedModel> {
    let section = &loaded.config.model;
    let model = crate::policy::open(&loaded.resolve(&section.path), section.dtype.requested())?;
    Ok(section.quantised(model))
}

/// Tokens of the longest of `prompts`.
///
/// # Errors
/// If the template refuses a prompt.
pub fn longest_prompt(tokenizer: &Tokenizer, prompts: &[Prompt]) -> anyhow::Result<usize> {
    let mut by_length: Vec<&Prompt> = prompts.iter().collect();
    by_length.sort_by_key(|prompt| std::cmp::Reverse(prompt.question().len()));
    let mut by_images: Vec<&Prompt> = prompts.iter().filter(|prompt| !prompt.images().is_empty()).collect();
    by_images.sort_by_key(|prompt| std::cmp::Reverse(image_pixels(prompt)));
    let mut longest = 0;
    for prompt in by_length.into_iter().take(ENCODED).chain(by_images.into_iter().take(ENCODED)) {
        let ids = tokenizer.encode_prompt(&prompt.body).map_err(|error| {
            anyhow::Error::from(error)
                .context(format!("prompt {:?} cannot be encoded", shorten(prompt.question())))
        });
        longest = longest.max(ids.input()?.ids.len());
    }
    Ok(longest)
}

/// Holds prompts and completions against the model's context.
///
/// # Errors
/// If the longest prompt with `max_new_tokens` does not fit, or the template refuses a prompt.
pub fn check_lengths(loaded: &Loaded, model: &LoadedModel, prompts: &[Prompt]) -> anyhow::Result<()> {
    let longest = longest_prompt(&model.tokenizer, prompts)?;
    let (context, wanted) = (model.model.spec().max_positions, loaded.config.actor.max_new_tokens);
    if longest + wanted <= context {
        return Ok(());
    }
    let error = anyhow::anyhow!(
        "actor.max_new_tokens is {wanted}; the longest prompt has {longest} tokens and the model's context is {context}"
    );
    Err(error).input_hint(match context.saturating_sub(longest) {
        0 => format!("leave out prompts of {context} tokens and more"),
        room => format!("at most {room} fit"),
    })
}

/// Pixels of a prompt's images: what has more of them takes no fewer tokens, but for its shape.
fn image_pixels(prompt: &Prompt) -> usize {
    let pixels = |image: &&freewheel_types::ImagePart| {
        freewheel_model::vision::image_size(image.bytes()).map_or(0, |(height, width)| height * width)
    };
    prompt.images().iter().map(pixels).sum()
}

fn shorten(text: &str) -> String {
    text.chars().take(60).collect()
}

/// The run's held-out evaluation; `None` without held-out prompts.
///
/// # Errors
/// If a prompt cannot be encoded.
pub fn eval_set(
    loaded: &Loaded,
    model: &LoadedModel,
    prompts: Vec<Prompt>,
) -> anyhow::Result<Option<EvalSet>> {
    if prompts.is_empty() {
        return Ok(None);
    }
    let (config, eval) = (&loaded.config, &loaded.config.eval);
    let encode = |prompt: Prompt| -> anyhow::Result<_> {
        let ids = model.tokenizer.encode_prompt(&prompt.body).input()?;
        Ok((prompt, ids))
    };
    Ok(Some(EvalSet {
        name: eval.name.clone(),
        prompts: prompts.into_iter().map(encode).collect::<anyhow::Result<_>>()?,
        samples: eval.samples,
        sampling: SamplingParams { temperature: eval.temperature, ..config.actor.sampling() },
        seed: eval.seed.into(),
        max_new_tokens: config.actor.max_new_tokens,
        stop: stop_spec(loaded, model),
    }))
}

/// What ends a completion: the model's end-of-sequence ids and what `[actor]` adds.
pub fn stop_spec(loaded: &Loaded, model: &LoadedModel) -> StopSpec {
    let actor = &loaded.config.actor;
    let ids: Vec<u32> = model.generation.eos_ids.iter().chain(&actor.stop_token_ids).copied().collect();
    StopSpec { ids: ids.into(), strings: actor.stop.clone().into() }
}

/// The reward stack of a run.
///
/// # Errors
/// If the section is not usable (checked when the config was loaded).
pub fn reward_stack(loaded: &Loaded) -> anyhow::Result<Arc<RewardStack>> {
    let stack =
        RewardStack::new(&loaded.config.reward).map_err(freewheel_reward::RewardError::Config).input()?;
    Ok(Arc::new(stack))
}
