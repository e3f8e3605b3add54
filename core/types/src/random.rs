//! Counter-based randomness: a draw depends on its key and counter, never on what was drawn before.

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
///
/// Keyed by the run seed; the counter is `(stream, index)`. For sampling, `stream` is the
/// rollout id and `index` the token index, so that a rollout drawn again, alone or in another
/// batch, gets the same numbers.
#[derive(Clone, Copy, Debug)]
pub struct CounterRng {
    seed: u64,
    stream: u64,
}

impl CounterRng {
    /// The stream `stream` of `seed`.
    pub fn new(seed: u64, stream: u64) -> Self {
        Self { seed, stream }
    }

    /// 128 random bits of draw `index`.
    pub fn block(&self, index: u64) -> [u32; 4] {
        let mut key = [self.seed as u32, (self.seed >> 32) as u32];
        let mut ctr = [index as u32, (index >> 32) as u32, self.stream as u32, (self.stream >> 32) as u32];
        for _ in 0..10 {
            let a = u64::from(ctr[0]) * 0xD251_1F53;
            let b = u64::from(ctr[2]) * 0xCD9E_8D57;
            ctr =
                [(b >> 32) as u32 ^ ctr[1] ^ key[0], b as u32, (a >> 32) as u32 ^ ctr[3] ^ key[1], a as u32];
            key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
        }
        ctr
    }

    /// 64 random bits of draw `index`.
    pub fn u64(&self, index: u64) -> u64 {
        let [a, b, ..] = self.block(index);
        u64::from(a) | u64::from(b) << 32
    }

    /// Uniform in `[0, 1)` with 53 bits, draw `index`.
    pub fn uniform(&self, index: u64) -> f64 {
        (self.u64(index) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform integer below `n` (multiply-shift; bias below 2^-32 for `n` of up to 2^32), draw `index`.
    ///
    /// # Panics
    /// If `n` is 0.
    pub fn below(&self, index: u64, n: u64) -> u64 {
        assert!(n > 0, "no integer is below 0");
        ((u128::from(self.u64(index)) * u128::from(n)) >> 64) as u64
    }

    /// Standard normal (Box and Muller 1958), draw `index`.
    pub fn normal(&self, index: u64) -> f64 {
        let [a, b, c, d] = self.block(index);
        let unit = |lo: u32, hi: u32| {
            ((u64::from(lo) | u64::from(hi) << 32) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
        };
        let radius = (-2.0 * (1.0 - unit(a, b)).ln()).sqrt();
        radius * (std::f64::consts::TAU * unit(c, d)).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_the_known_answers_of_random123() {
        // kat_vectors of the reference library: key and counter all zero, then all ones.
        assert_eq!(CounterRng::new(0, 0).block(0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            CounterRng::new(u64::MAX, u64::MAX).block(u64::MAX),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        let rng = CounterRng::new(7, 3);
        let n = 100_000;
        let mean = (0..n).map(|i| rng.uniform(i)).sum::<f64>() / n as f64;
        let (m1, m2) = (0..n).map(|i| rng.normal(i)).fold((0.0, 0.0), |(a, b), x| (a + x, b + x * x));
        assert!((mean - 0.5).abs() <= 0.005, "uniform mean {mean}");
        assert!((m1 / n as f64).abs() <= 0.02 && (m2 / n as f64 - 1.0).abs() <= 0.03);
    }
}
