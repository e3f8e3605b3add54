//! The built-in task: chains of additions and subtractions, `17+25-9=?`.
//!
//! Every intermediate result lies in 0 to 59, so from any value there are exactly 59 next steps (one to every
//! other value) and level `k` has 59^(k+1) questions. A fixed keyed permutation of that range gives each
//! question a number; numbers divisible by 10 are held out. So train and held-out sets are disjoint by
//! construction, whatever the seeds, and both can be drawn from at random without repetition.

use freewheel_types::{CounterRng, Message, Prompt, PromptBody, PromptId};

/// Most operations in a question.
pub const LEVEL_MAX: u32 = 6;
/// Values and operands stay below this.
const RANGE: u64 = 59;
/// One question in this many is held out.
const HELD_OUT_EVERY: u64 = 10;
/// Key of the permutation that splits train from held-out; changing it changes every split.
const SPLIT_KEY: u64 = 0x0066_7265_6577_686c;
/// Stream of the draw that decides how a demonstration is written.
const WORKED_STREAM: u64 = 0x776f_726b;

/// Which questions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Nine in ten.
    Train,
    /// One in ten; never trained on.
    HeldOut,
}

/// One step of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Value before.
    pub a: i64,
    /// `+` or `-`.
    pub op: char,
    /// Operand, 1 to 59.
    pub b: i64,
    /// Value after, 0 to 59.
    pub result: i64,
}

/// A question with its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArithmeticItem {
    /// `17+25-9=?`
    pub question: String,
    /// 33
    pub answer: i64,
    /// Operations, 1 to [`LEVEL_MAX`].
    pub level: u32,
    /// The way there.
    pub steps: Vec<Step>,
}

/// Draws questions of some levels in turn, in a random order without repetition.
#[derive(Clone, Debug)]
pub struct ArithmeticGenerator {
    seed: u64,
    levels: Vec<u32>,
    split: Split,
}

impl ArithmeticGenerator {
    /// Questions of `levels` (in turn) from one side of the split; `seed` gives their order.
    ///
    /// # Panics
    /// If `levels` is empty or one is not 1 to [`LEVEL_MAX`]: the configuration is checked before.
    pub fn new(seed: u64, levels: &[u32], split: Split) -> Self {
        let fine = !levels.is_empty() && levels.iter().all(|level| (1..=LEVEL_MAX).contains(level));
        assert!(fine, "levels {levels:?} must be 1 to {LEVEL_MAX}, at least one");
        Self { seed, levels: levels.to_vec(), split }
    }

    /// How many different questions a level has on this side of the split.
    pub fn distinct(&self, level: u32) -> u64 {
        let held_out = chains(level).div_ceil(HELD_OUT_EVERY);
        match self.split {
            Split::Train => chains(level) - held_out,
            Split::HeldOut => held_out,
        }
    }

    /// Question number `index`. A level that has fewer [distinct](Self::distinct) questions starts again in the
    /// same order.
    pub fn question(&self, index: u64) -> ArithmeticItem {
        let count = self.levels.len() as u64;
        let level = self.levels[(index % count) as usize];
        let distinct = self.distinct(level);
        // The n-th question of this side in the order of the seed, then its number, then the chain.
        let n = permute((index / count) % distinct, distinct, self.seed ^ (u64::from(level) << 56));
        let number = match self.split {
            Split::HeldOut => n * HELD_OUT_EVERY,
            Split::Train => n / (HELD_OUT_EVERY - 1) * HELD_OUT_EVERY + 1 + n % (HELD_OUT_EVERY - 1),
        };
        chain(permute(number, chains(level), SPLIT_KEY), level)
    }

    /// The first `n` questions as prompts with the tags `arithmetic` and `level-k` and the verifier "number". Fewer,
    /// with a warning, if a level has not that many different questions: none is ever given twice.
    pub fn prompts(&self, n: usize) -> Vec<Prompt> {
        let count = self.levels.len() as u64;
        let fresh = |index: &u64| index / count < self.distinct(self.levels[(index % count) as usize]);
        let prompts: Vec<Prompt> = (0..n as u64).filter(fresh).map(|i| self.question(i).prompt()).collect();
        // A level listed twice draws the same questions twice.
        let mut seen = std::collections::BTreeSet::new();
        let prompts: Vec<Prompt> = prompts.into_iter().filter(|prompt| seen.insert(prompt.id)).collect();
        if prompts.len() < n {
            tracing::warn!(
                wanted = n,
                have = prompts.len(),
                levels = ?self.levels,
                "a level has fewer different questions than asked for; each is used once"
            );
        }
        prompts
    }
}

impl ArithmeticItem {
    /// The question as a user message, with its answer, the tags `arithmetic` and `level-k`, and the verifier "number".
    pub fn prompt(&self) -> Prompt {
        Prompt {
            id: PromptId::of(format!("arithmetic:{}", self.question).as_bytes()),
            name: None,
            body: PromptBody::Messages(vec![Message::text("user", self.question.clone())]),
            answer: Some(self.answer.to_string()),
            tags: vec!["arithmetic".into(), format!("level-{}", self.level)],
            verifier: Some("number".into()),
            meta: None,
        }
    }
}

/// A demonstration for supervised fine-tuning: the answer alone (`#33`), or with the steps that lead there
/// (`17+25=42;42-9=33;#33`).
pub fn demonstration(item: &ArithmeticItem, worked: bool) -> String {
    let mut text = String::new();
    if worked {
        for Step { a, op, b, result } in &item.steps {
            text.push_str(&format!("{a}{op}{b}={result};"));
        }
    }
    text.push_str(&format!("#{}", item.answer));
    text
}

/// Whether demonstration number `index` is a worked one, with probability `fraction` (usually 0.2).
pub fn is_worked(seed: u64, index: u64, fraction: f64) -> bool {
    CounterRng::new(seed, WORKED_STREAM).uniform(index) < fraction
}

/// Questions of a level.
fn chains(level: u32) -> u64 {
    RANGE.pow(level + 1)
}

/// The chain of a rank below [`chains`]: its digits to base 59 are the first value and then, step by step, which
/// of the 59 other values comes next.
fn chain(rank: u64, level: u32) -> ArithmeticItem {
    let mut rest = rank;
    let mut digit = || {
        let digit = rest % RANGE;
        rest /= RANGE;
        digit as i64
    };
    let first = digit() + 1;
    let (mut question, mut value) = (first.to_string(), first);
    let mut steps = Vec::with_capacity(level as usize);
    for _ in 0..level {
        let other = digit();
        let result = if other < value { other } else { other + 1 };
        let (op, b) = if result > value { ('+', result - value) } else { ('-', value - result) };
        steps.push(Step { a: value, op, b, result });
        question.push_str(&format!("{op}{b}"));
        value = result;
    }
    question.push_str("=?");
    ArithmeticItem { question, answer: value, level, steps }
}

/// A keyed permutation of `0..n`: a six-round Feistel network over the next even number of bits, walked until it
/// lands inside (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
fn permute(x: u64, n: u64, key: u64) -> u64 {
    assert!(x < n, "{x} is outside 0..{n}");
    let half = (64 - (n - 1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1_u64 << half) - 1;
    let mut x = x;
    loop {
        let (mut left, mut right) = (x >> half, x & mask);
        for round in 0..6 {
            (left, right) = (right, left ^ (CounterRng::new(key, round).u64(right) & mask));
        }
        x = left << half | right;
        if x < n {
            return x;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn all(seed: u64, split: Split) -> Vec<ArithmeticItem> {
        let generator = ArithmeticGenerator::new(seed, &[1], split);
        (0..generator.distinct(1)).map(|i| generator.question(i)).collect()
    }

    #[test]
    fn the_two_sides_are_disjoint_and_whole_whatever_the_seeds() {
        let text =
            |items: Vec<ArithmeticItem>| items.into_iter().map(|item| item.question).collect::<BTreeSet<_>>();
        let (train, held_out) = (text(all(1, Split::Train)), text(all(2, Split::HeldOut)));
        assert_eq!(train.len() as u64 + held_out.len() as u64, RANGE * RANGE);
        assert!(train.is_disjoint(&held_out));
        assert_eq!(held_out.len() as u64, (RANGE * RANGE).div_ceil(HELD_OUT_EVERY));
    }

    #[test]
    fn questions_are_what_they_say() {
        let generator = ArithmeticGenerator::new(7, &[1, 3, 6], Split::Train);
        for index in 0..3000 {
            let item = generator.question(index);
            let shown: String = item.question.trim_end_matches("=?").into();
            // An independent reading of the text, left to right.
            let mut value = 0_i64;
            let mut rest = format!("+{shown}");
            while !rest.is_empty() {
                let sign = rest.remove(0);
                let end = rest.find(['+', '-']).unwrap_or(rest.len());
                let operand: i64 = rest[..end].parse().unwrap();
                assert!((1..=59).contains(&operand), "{shown}");
                value += if sign == '+' { operand } else { -operand };
                assert!((0..=59).contains(&value), "{shown}");
                rest = rest[end..].into();
            }
            assert_eq!(value, item.answer, "{shown}");
            assert_eq!(item.steps.len() as u32, item.level);
            assert_eq!(item.level, [1, 3, 6][(index % 3) as usize]);
        }
    }

    #[test]
    fn nothing_repeats_and_the_seed_decides_the_order() {
        let prompts = |seed| ArithmeticGenerator::new(seed, &[1, 2], Split::Train).prompts(4000);
        let (a, b) = (prompts(1), prompts(2));
        assert_eq!(a.len(), 4000);
        assert_eq!(a.iter().map(|p| p.id).collect::<BTreeSet<_>>().len(), 4000);
        assert_eq!(a, prompts(1));
        assert_ne!(a[..50], b[..50]);
        assert_eq!(a[0].tags, ["arithmetic", "level-1"]);
    }

    #[test]
    fn a_level_that_runs_out_gives_fewer_prompts_and_no_duplicate() {
        let generator = ArithmeticGenerator::new(1, &[1], Split::HeldOut);
        assert_eq!(generator.distinct(1), 349);
        assert_eq!(generator.prompts(2000).len(), 349);
        assert_eq!(generator.question(0), generator.question(349));
        assert_eq!(ArithmeticGenerator::new(1, &[1, 1], Split::HeldOut).prompts(100).len(), 50);
    }

    #[test]
    fn demonstrations_show_the_answer_or_the_way() {
        let item = ArithmeticItem {
            question: "17+25-9=?".into(),
            answer: 33,
            level: 2,
            steps: vec![
                Step { a: 17, op: '+', b: 25, result: 42 },
                Step { a: 42, op: '-', b: 9, result: 33 },
            ],
        };
        assert_eq!(demonstration(&item, false), "#33");
        assert_eq!(demonstration(&item, true), "17+25=42;42-9=33;#33");
        let worked = (0..10_000).filter(|i| is_worked(3, *i, 0.2)).count();
        assert!((1850..=2150).contains(&worked), "{worked}");
    }
}
