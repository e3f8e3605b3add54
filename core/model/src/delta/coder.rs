//! Adaptive binary range coder (after Subbotin 1999, as in LZMA) and the number model on top of it.
//!
//! Probabilities adapt at 1/n for the first decisions of a context and at 1/128 later: few symbols teach a context, many
//! settle it. All integer arithmetic: same bytes on every machine.

const TOP: u32 = 1 << 24;
const SLOWEST: u16 = 126;

/// Probability that the next bit of a context is 0, in 65536ths, and how often it was asked.
#[derive(Clone, Copy)]
pub(super) struct Bit {
    zero: u16,
    seen: u16,
}

impl Bit {
    pub(super) const NEW: Self = Self { zero: 1 << 15, seen: 0 };

    /// In 4096ths, never certain.
    fn share(self, range: u32) -> u32 {
        (range >> 12) * u32::from((self.zero >> 4).clamp(1, 4095))
    }

    fn learn(&mut self, bit: bool) {
        let target: i32 = if bit { 0 } else { 0xFFFF };
        let step = (target - i32::from(self.zero)) * 2 / (2 * i32::from(self.seen) + 3);
        self.zero = (i32::from(self.zero) + step) as u16;
        self.seen = (self.seen + 1).min(SLOWEST);
    }
}

/// Writes bits.
pub(super) struct Encoder {
    low: u64,
    range: u32,
    cache: u8,
    pending: usize,
    bytes: Vec<u8>,
}

impl Encoder {
    pub(super) fn new() -> Self {
        Self { low: 0, range: u32::MAX, cache: 0, pending: 0, bytes: Vec::new() }
    }

    pub(super) fn bit(&mut self, context: &mut Bit, bit: bool) {
        let share = context.share(self.range);
        if bit {
            self.low += u64::from(share);
            self.range -= share;
        } else {
            self.range = share;
        }
        context.learn(bit);
        self.normalise();
    }

    fn even_bit(&mut self, bit: bool) {
        self.range >>= 1;
        if bit {
            self.low += u64::from(self.range);
        }
        self.normalise();
    }

    fn normalise(&mut self) {
        while self.range < TOP {
            self.range <<= 8;
            self.shift();
        }
    }

    /// Moves the top byte out, holding back bytes that a carry may still change.
    fn shift(&mut self) {
        if self.low < 0xFF00_0000 || self.low > 0xFFFF_FFFF {
            let carry = (self.low >> 32) as u8;
            self.bytes.push(self.cache.wrapping_add(carry));
            self.bytes.extend(std::iter::repeat_n(0xFFu8.wrapping_add(carry), self.pending));
            self.pending = 0;
            self.cache = (self.low >> 24) as u8;
        } else {
            self.pending += 1;
        }
        self.low = (self.low & 0x00FF_FFFF) << 8;
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        (0..5).for_each(|_| self.shift());
        // The first byte is the cache's initial value.
        self.bytes.remove(0);
        self.bytes
    }
}

/// Reads bits. Past the end it reads zeros and remembers.
pub(super) struct Decoder<'a> {
    code: u32,
    range: u32,
    bytes: &'a [u8],
    overrun: bool,
}

impl<'a> Decoder<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        let mut decoder = Self { code: 0, range: u32::MAX, bytes, overrun: false };
        (0..4).for_each(|_| decoder.pull());
        decoder
    }

    fn pull(&mut self) {
        let next = match self.bytes.split_first() {
            Some((&first, rest)) => {
                self.bytes = rest;
                first
            }
            None => {
                self.overrun = true;
                0
            }
        };
        self.code = self.code << 8 | u32::from(next);
    }

    pub(super) fn bit(&mut self, context: &mut Bit) -> bool {
        let share = context.share(self.range);
        let bit = self.code >= share;
        if bit {
            self.code -= share;
            self.range -= share;
        } else {
            self.range = share;
        }
        context.learn(bit);
        self.normalise();
        bit
    }

    fn even_bit(&mut self) -> bool {
        self.range >>= 1;
        let bit = self.code >= self.range;
        if bit {
            self.code -= self.range;
        }
        self.normalise();
        bit
    }

    fn normalise(&mut self) {
        while self.range < TOP {
            self.range <<= 8;
            self.pull();
        }
    }

    /// Whether exactly the bytes given were used.
    pub(super) fn is_exact(&self) -> bool {
        !self.overrun && self.bytes.is_empty()
    }
}

/// Adaptive Elias gamma code: the bit length of v + 1 as a modelled symbol, its next three bits modelled, the rest even.
#[derive(Clone)]
pub(super) struct Gamma {
    length: [Bit; 64],
    head: [[Bit; 8]; 33],
}

impl Gamma {
    pub(super) const NEW: Self = Self { length: [Bit::NEW; 64], head: [[Bit::NEW; 8]; 33] };

    pub(super) fn encode(&mut self, coder: &mut Encoder, value: u32) {
        let value = u64::from(value) + 1;
        let below = 63 - value.leading_zeros();
        let mut node = 1;
        for at in (0..6).rev() {
            let bit = below >> at & 1 == 1;
            coder.bit(&mut self.length[node], bit);
            node = node * 2 + usize::from(bit);
        }
        let head = &mut self.head[below as usize];
        let mut node = 1;
        for at in (0..below).rev() {
            let bit = value >> at & 1 == 1;
            if node < 8 {
                coder.bit(&mut head[node], bit);
                node = node * 2 + usize::from(bit);
            } else {
                coder.even_bit(bit);
            }
        }
    }

    /// `None` if no encoder wrote this.
    pub(super) fn decode(&mut self, coder: &mut Decoder<'_>) -> Option<u32> {
        let mut node = 1;
        for _ in 0..6 {
            node = node * 2 + usize::from(coder.bit(&mut self.length[node]));
        }
        let below = node - 64;
        let head = self.head.get_mut(below)?;
        let mut value = 1u64;
        let mut node = 1;
        for _ in 0..below {
            let bit = if node < 8 {
                let bit = coder.bit(&mut head[node]);
                node = node * 2 + usize::from(bit);
                bit
            } else {
                coder.even_bit()
            };
            value = value * 2 + u64::from(bit);
        }
        u32::try_from(value - 1).ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn numbers_come_back_and_no_byte_is_left(values in prop::collection::vec(
            prop_oneof![0u32..4, 0u32..1000, any::<u32>(), Just(u32::MAX)], 0..400)) {
            let mut model = Gamma::NEW;
            let mut coder = Encoder::new();
            values.iter().for_each(|&v| model.encode(&mut coder, v));
            let bytes = coder.finish();
            let mut model = Gamma::NEW;
            let mut coder = Decoder::new(&bytes);
            for &v in &values {
                prop_assert_eq!(model.decode(&mut coder), Some(v));
            }
            prop_assert!(coder.is_exact());
        }
    }

    #[test]
    fn a_skewed_bit_costs_what_it_tells() {
        let mut coder = Encoder::new();
        let mut context = Bit::NEW;
        let n = 100_000;
        (0..n).for_each(|i| coder.bit(&mut context, i % 50 == 0));
        let entropy = -(0.02f64.log2() * 0.02 + 0.98f64.log2() * 0.98) * f64::from(n) / 8.0;
        let bytes = coder.finish().len() as f64;
        assert!(bytes <= 1.05 * entropy, "{bytes} bytes, entropy {entropy}");
    }
}
