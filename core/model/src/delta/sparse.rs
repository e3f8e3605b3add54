//! The sparse block: changes by class of exponent, adaptively coded. Models carry over from block to block.

use super::Word;
use super::coder::{Bit, Decoder, Encoder, Gamma};

const CLASSES: usize = 256;

/// What is known of each class so far.
pub(super) struct Models {
    classes: Vec<ClassModel>,
}

#[derive(Clone)]
struct ClassModel {
    changes: Gamma,
    gap: Gamma,
    steps: Gamma,
    grows: Bit,
}

/// One change: unchanged elements of its class before it, and its step.
#[derive(Clone, Copy)]
struct Change {
    gap: u32,
    zigzag: u32,
    negative: bool,
}

impl Models {
    pub(super) fn new() -> Self {
        let class = ClassModel { changes: Gamma::NEW, gap: Gamma::NEW, steps: Gamma::NEW, grows: Bit::NEW };
        Self { classes: vec![class; CLASSES] }
    }

    pub(super) fn encode<W: Word>(&mut self, base: &[W], new: &[W]) -> Vec<u8> {
        let mut changes: Vec<Vec<Change>> = vec![Vec::new(); CLASSES];
        let mut gaps = [0u32; CLASSES];
        let mut present = [false; CLASSES];
        for (old, new) in base.iter().zip(new) {
            let class = old.class();
            present[class] = true;
            if old == new {
                gaps[class] += 1;
            } else {
                let zigzag = old.zigzag_to(*new);
                changes[class].push(Change { gap: gaps[class], zigzag, negative: old.is_negative() });
                gaps[class] = 0;
            }
        }
        let mut coder = Encoder::new();
        for class in (0..CLASSES).filter(|&class| present[class]) {
            let model = &mut self.classes[class];
            model.changes.encode(&mut coder, changes[class].len() as u32);
            for change in &changes[class] {
                model.gap.encode(&mut coder, change.gap);
                coder.bit(&mut model.grows, (change.zigzag & 1 == 0) != change.negative);
                // Up: 2, 4, …; down: 1, 3, …: both start at 0 after this.
                model.steps.encode(&mut coder, (change.zigzag - 1) / 2);
            }
        }
        coder.finish()
    }

    /// Applies a body; `changed` hears of every position, ascending. `None` if no encoder wrote it for this base.
    pub(super) fn apply<W: Word>(
        &mut self,
        block: &mut [W],
        body: &[u8],
        changed: &mut dyn FnMut(usize),
    ) -> Option<()> {
        let mut counts = [0u32; CLASSES];
        block.iter().for_each(|word| counts[word.class()] += 1);
        let mut coder = Decoder::new(body);
        let mut changes: Vec<Vec<Decoded>> = vec![Vec::new(); CLASSES];
        for class in (0..CLASSES).filter(|&class| counts[class] > 0) {
            changes[class] = self.classes[class].decode(&mut coder, counts[class])?;
        }
        if !coder.is_exact() {
            return None;
        }
        let mut next = [0usize; CLASSES];
        let mut waits = [u32::MAX; CLASSES];
        for class in 0..CLASSES {
            waits[class] = changes[class].first().map_or(u32::MAX, |change| change.gap);
        }
        for (at, word) in block.iter_mut().enumerate() {
            let class = word.class();
            if waits[class] > 0 {
                waits[class] -= 1;
                continue;
            }
            let change = changes[class][next[class]];
            next[class] += 1;
            waits[class] = changes[class].get(next[class]).map_or(u32::MAX, |change| change.gap);
            let up = change.grows != word.is_negative();
            // The largest step down has no counterpart up; nothing wraps below 0 here.
            let zigzag = change.steps.checked_mul(2)?.checked_add(if up { 2 } else { 1 })?;
            *word = word.zigzag_by(zigzag);
            changed(at);
        }
        Some(())
    }
}

#[derive(Clone, Copy)]
struct Decoded {
    gap: u32,
    grows: bool,
    steps: u32,
}

impl ClassModel {
    /// The changes of a class with `count` elements: never more than fit.
    fn decode(&mut self, coder: &mut Decoder<'_>, count: u32) -> Option<Vec<Decoded>> {
        let changes = self.changes.decode(coder).filter(|&n| n <= count)?;
        let mut left = count;
        let one = |_| {
            let gap = self.gap.decode(coder)?;
            left = left.checked_sub(gap.checked_add(1)?)?;
            let grows = coder.bit(&mut self.grows);
            Some(Decoded { gap, grows, steps: self.steps.decode(coder)? })
        };
        (0..changes).map(one).collect()
    }
}
