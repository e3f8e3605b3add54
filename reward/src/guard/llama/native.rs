//! A Llama Guard on this machine: one pass over the prompt, a few greedy tokens where harm is likely.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use freewheel_kernels::Threads;
use freewheel_kernels::attention::KV_BLOCK;
use freewheel_model::sampling::{SampleScratch, log_prob_of};
use freewheel_model::{
    BatchSeq, ForwardBatch, GenerationConfig, KvCache, ModelError, PolicyWeights, Purpose, Tokenizer, load,
};
use freewheel_types::{Digest, PolicyVersion, SamplingParams};

use super::Verdict;
use super::prompt::{Framing, Turn};
use crate::shared::{Shared, chain};

const BLANK: &str = "\n\n";
/// Fourteen categories with commas, and some.
const ANSWER_TOKENS: usize = 64;

static GUARDS: Shared<Loaded> = Shared::new();

/// Weights and what generation needs.
struct Loaded {
    weights: PolicyWeights,
    generation: GenerationConfig,
    digest: Digest,
}

/// The words of a verdict as ids, and what the conversation is framed with.
pub(super) struct NativePlan {
    dir: PathBuf,
    framing: Framing,
    words: Words,
}

/// Ids that verdicts are made of.
#[derive(Clone, Debug)]
struct Words {
    safe: u32,
    harmful: u32,
    blank: Vec<u32>,
    line_end: Vec<u32>,
}

impl NativePlan {
    /// Reads the tokenizer and its template.
    pub(super) fn new(dir: &str, llama4: bool) -> Result<Self, String> {
        let dir = PathBuf::from(dir);
        if !dir.is_dir() {
            return Err(format!("{} is no folder with a model", dir.display()));
        }
        let framing = Framing::new(Tokenizer::from_folder(&dir).map_err(|e| chain(&e))?, llama4)?;
        let words = Words::of(framing.tokenizer())?;
        Ok(Self { dir, framing, words })
    }
}

impl Words {
    fn of(tokenizer: &Tokenizer) -> Result<Self, String> {
        let ids = |text: &str| tokenizer.encode(text).map_err(|e| e.to_string());
        let one = |word: &str| match ids(word)?.as_slice() {
            [id] => Ok(*id),
            many => Err(format!(
                "{word:?} is {} tokens to its tokenizer and must be one: the score is the probability of the first",
                many.len()
            )),
        };
        Ok(Self { safe: one("safe")?, harmful: one("unsafe")?, blank: ids(BLANK)?, line_end: ids("\n")? })
    }
}

/// The guard, ready.
pub(super) struct Native {
    loaded: Arc<Loaded>,
    framing: Framing,
    words: Words,
    threads: Threads,
    version: String,
}

/// One sequence, token by token.
struct Sequence<'a> {
    weights: &'a PolicyWeights,
    threads: &'a Threads,
    cache: KvCache,
    pages: Vec<u32>,
    len: usize,
}

impl Sequence<'_> {
    /// Logits of the last `rows` of `tokens`, which come next.
    fn push(&mut self, tokens: &[u32], rows: usize) -> Vec<Vec<f32>> {
        let seqs = [BatchSeq { rows: tokens.len(), position: self.len, pages: &self.pages }];
        let logit_rows: Vec<usize> = (tokens.len() - rows..tokens.len()).collect();
        let batch = ForwardBatch { tokens, seqs: &seqs, logit_rows: &logit_rows, tiles: &[] };
        let logits = self.weights.forward(self.threads, &mut self.cache, &batch).logits;
        self.len += tokens.len();
        logits.chunks_exact(logits.len() / rows).map(<[f32]>::to_vec).collect()
    }
}

impl Native {
    pub(super) fn load(plan: NativePlan, threads: usize) -> Result<Self, String> {
        let NativePlan { dir, framing, words } = plan;
        let threads = Threads::new(threads);
        let loaded = GUARDS.load(&dir, |dir| load_guard(dir, &threads)).map_err(|e| chain(&e))?;
        let both = format!("{}{}", loaded.digest, framing.tokenizer().digest());
        let version = Digest::of(both.as_bytes()).to_string()[..16].to_owned();
        Ok(Self { loaded, framing, words, threads, version })
    }

    pub(super) fn version(&self) -> &str {
        &self.version
    }

    fn sequence(&self, ids: &[u32]) -> Result<Sequence<'_>, String> {
        let weights = &self.loaded.weights;
        let room = ids.len() + self.words.blank.len() + 1 + self.words.line_end.len() + ANSWER_TOKENS;
        let limit = weights.model().spec().max_positions;
        if room > limit {
            return Err(format!(
                "the conversation is {} tokens to the guard, with the answer more than its context of {limit}",
                ids.len()
            ));
        }
        let pages: Vec<u32> = (0..room.div_ceil(KV_BLOCK) as u32).collect();
        let cache = KvCache::new(weights, pages.len());
        Ok(Sequence { weights, threads: &self.threads, cache, pages, len: 0 })
    }

    /// Ids of the guard's prompt.
    pub(super) fn ids(&self, turns: &[Turn]) -> Result<Vec<u32>, String> {
        self.framing.ids(turns).map_err(|e| e.to_string())
    }

    /// Probabilities of the first word, with or without a blank line before it, and that of the blank line.
    fn first_words(&self, logits: &[Vec<f32>]) -> (Verdict, f64) {
        let (first, after) = (&logits[0], &logits[logits.len() - 1]);
        let blank = self.words.blank.iter().zip(logits).map(|(id, row)| probability(row, *id)).product();
        let words = |row: &[f32]| Verdict {
            safe: probability(row, self.words.safe),
            harmful: probability(row, self.words.harmful),
        };
        (words(first).after_blank(blank, words(after)), blank)
    }

    /// The prompt and a blank line in one pass: logits after the prompt and after each token of the blank line.
    fn prefill(&self, turns: &[Turn]) -> Result<(Sequence<'_>, usize, Vec<Vec<f32>>), String> {
        let mut ids = self.ids(turns)?;
        let prompt = ids.len();
        let mut sequence = self.sequence(&ids)?;
        ids.extend(&self.words.blank);
        let logits = sequence.push(&ids, 1 + self.words.blank.len());
        Ok((sequence, prompt, logits))
    }

    pub(super) fn verdict(&self, turns: &[Turn]) -> Result<Verdict, String> {
        let (_, _, logits) = self.prefill(turns)?;
        let verdict = self.first_words(&logits).0;
        if verdict.mass().is_nan() || verdict.mass() <= 0.0 {
            return Err("the guard gives neither word any probability".into());
        }
        Ok(verdict)
    }

    /// What the guard goes on to say once it has said "unsafe", greedily; which harm, however sure it is of it.
    pub(super) fn categories(&self, turns: &[Turn]) -> Result<String, String> {
        let (mut sequence, prompt, logits) = self.prefill(turns)?;
        let (first, blank) = (&logits[0], self.first_words(&logits).1);
        // The verdict where the guard would put it; what the blank line left in the cache is overwritten where it has no place.
        if blank <= probability(first, self.words.harmful) + probability(first, self.words.safe) {
            sequence.len = prompt;
        }
        let mut said: Vec<u32> = [&[self.words.harmful][..], &self.words.line_end].concat();
        let mut row = sequence.push(&said, 1).swap_remove(0);
        for _ in 0..ANSWER_TOKENS {
            let next = greedy(&row);
            if self.loaded.generation.eos_ids.contains(&next) {
                break;
            }
            said.push(next);
            if sequence.len == sequence.pages.len() * KV_BLOCK {
                break;
            }
            row = sequence.push(&[next], 1).swap_remove(0);
        }
        Ok(self.framing.tokenizer().decode(&said))
    }
}

fn load_guard(dir: &Path, threads: &Threads) -> Result<Loaded, ModelError> {
    let loaded = load(dir, None)?;
    let digest = loaded.params.digest();
    let version = PolicyVersion::default();
    let weights = PolicyWeights::pack(&loaded.model, &loaded.params, version, Purpose::Sampling, threads);
    Ok(Loaded { weights, generation: loaded.generation, digest })
}

fn probability(logits: &[f32], id: u32) -> f64 {
    let stats = log_prob_of(logits, &SamplingParams::default(), id, &mut SampleScratch::default());
    f64::from(stats.logprob).exp()
}

/// The likeliest token, of several the lowest.
fn greedy(logits: &[f32]) -> u32 {
    let best = logits
        .iter()
        .enumerate()
        .fold((0, f32::NEG_INFINITY), |best, (id, logit)| if *logit > best.1 { (id, *logit) } else { best });
    best.0 as u32
}

#[cfg(test)]
mod tests {
    use freewheel_model::{InitRequest, InitScale, SaveOptions, TokenizerChoice, init_model, save};
    use freewheel_types::WeightsDtype;

    use super::*;

    /// A tiny Llama 4 whose tokenizer knows the words of a verdict as one token each, or only bytes.
    fn guard(words: bool) -> tempfile::TempDir {
        let text = "safe\n\n\nunsafe\nsafe\n\n\nunsafe\nS1, S2".repeat(50);
        let tokenizer = match words {
            true => TokenizerChoice::Trained { text, vocab_size: 300 },
            false => TokenizerChoice::Bytes,
        };
        let set = |key: &str, n: u64| (key.to_owned(), n.into());
        let request = InitRequest {
            arch: "llama4_text".into(),
            overrides: vec![
                set("hidden_size", 32),
                set("num_hidden_layers", 2),
                set("num_attention_heads", 2),
                set("num_key_value_heads", 1),
                set("head_dim", 16),
                set("intermediate_size", 16),
                set("intermediate_size_mlp", 32),
                set("num_local_experts", 2),
                set("max_position_embeddings", 2048),
            ],
            seed: 7,
            scale: InitScale::FanIn,
            dtype: WeightsDtype::F32,
            tokenizer,
        };
        let dir = tempfile::tempdir().unwrap();
        let model = init_model(&request).unwrap();
        save(dir.path(), &model, &model.params, &SaveOptions::default()).unwrap();
        std::fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
        dir
    }

    fn turns(answer: &str) -> Vec<Turn> {
        vec![Turn { role: "user", text: "Hi".into() }, Turn { role: "assistant", text: answer.into() }]
    }

    /// The distribution after `ids`, computed as a whole sequence of its own.
    fn distribution(native: &Native, ids: &[u32]) -> Vec<f64> {
        let mut sequence = native.sequence(ids).unwrap();
        let row = sequence.push(ids, 1).swap_remove(0);
        let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f64> = row.iter().map(|x| f64::from(x - top).exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.into_iter().map(|w| w / sum).collect()
    }

    #[test]
    fn the_verdict_is_what_whole_sequences_say() {
        let dir = guard(true);
        let native = Native::load(NativePlan::new(dir.path().to_str().unwrap(), true).unwrap(), 1).unwrap();
        assert_eq!(native.words.blank.len(), 1, "the blank line is a token");
        let found = native.verdict(&turns("Hello!")).unwrap();
        let ids = native.ids(&turns("Hello!")).unwrap();
        let first = distribution(&native, &ids);
        let after = distribution(&native, &[&ids[..], &native.words.blank].concat());
        let blank = first[native.words.blank[0] as usize];
        let of = |word: u32| first[word as usize] + blank * after[word as usize];
        assert!((found.safe - of(native.words.safe)).abs() <= 1e-6, "{found:?}");
        assert!((found.harmful - of(native.words.harmful)).abs() <= 1e-6, "{found:?}");
        assert_eq!(native.verdict(&turns("Hello!")).unwrap(), found, "the same bits again");
        assert_ne!(native.verdict(&turns("Hullo!")).unwrap(), found);
    }

    #[test]
    fn categories_go_on_where_the_guard_puts_its_verdict() {
        let dir = guard(true);
        let native = Native::load(NativePlan::new(dir.path().to_str().unwrap(), true).unwrap(), 1).unwrap();
        let said = native.categories(&turns("Hello!")).unwrap();
        // The same by whole sequences, a token at a time.
        let (_, _, logits) = native.prefill(&turns("Hello!")).unwrap();
        let (_, blank) = native.first_words(&logits);
        let words = &native.words;
        let mut ids = native.ids(&turns("Hello!")).unwrap();
        let first = distribution(&native, &ids);
        if blank > first[words.safe as usize] + first[words.harmful as usize] {
            ids.extend(&words.blank);
        }
        let start = ids.len();
        ids.push(words.harmful);
        ids.extend(&words.line_end);
        for _ in 0..5 {
            let p = distribution(&native, &ids);
            let best = (0..p.len()).max_by(|a, b| p[*a].total_cmp(&p[*b]).then(b.cmp(a))).unwrap() as u32;
            if native.loaded.generation.eos_ids.contains(&best) {
                break;
            }
            ids.push(best);
        }
        let wanted = native.framing.tokenizer().decode(&ids[start..]);
        assert!(said.starts_with(wanted.trim_end_matches('\u{FFFD}')), "{said:?} {wanted:?}");
        assert!(said.starts_with("unsafe\n"));
    }

    #[test]
    fn a_word_of_several_tokens_and_a_conversation_too_long_are_refused() {
        let bytes = guard(false);
        let why = NativePlan::new(bytes.path().to_str().unwrap(), true).err().unwrap();
        assert!(why.contains("\"safe\" is 4 tokens"), "{why}");
        let dir = guard(true);
        let native = Native::load(NativePlan::new(dir.path().to_str().unwrap(), true).unwrap(), 1).unwrap();
        assert!(native.verdict(&turns(&"x ".repeat(3000))).unwrap_err().contains("context of 2048"));
    }
}
