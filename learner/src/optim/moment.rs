//! The moments of one tensor between updates: f32, bfloat16, or 8-bit floats in blocks.
//!
//! Narrow types are rounded at random with probabilities that make the mean exact: with β near 1 a moment moves by less than half a
//! step of its type, and rounding to nearest would hold it where it is. The randomness is a counter's: value i of an update gets
//! the same bits on every machine, on every number of threads, and after a resume.
//!
//! **8-bit**: a block of 256 values shares its largest size as f32 (Dettmers et al., arXiv 2110.02861); value/largest is a float
//! with 3 bits of mantissa, and sign and 4 bits of exponent, or no sign and 5 bits of exponent for second moments. A second moment above
//! zero never becomes zero, so that no step is divided by epsilon alone. (The paper's codes are a table; these need none.)

use freewheel_types::CounterRng;
use half::bf16;

use super::config::StateType;

/// Values that share a scale.
pub(super) const BLOCK: usize = 256;

/// One moment of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Moment {
    /// The optimiser has none for this tensor.
    None,
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    EightBit {
        codes: Vec<u8>,
        scales: Vec<f32>,
        form: Minifloat,
    },
}

/// An 8-bit float below or at 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Minifloat {
    /// Sign, 4 bits of exponent, 3 of mantissa.
    Signed,
    /// 5 bits of exponent, 3 of mantissa; never negative, and not zero unless the value is.
    Positive,
}

/// A part of a moment, borrowed for an update.
#[derive(Debug)]
pub(super) enum MomentMut<'a> {
    None,
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
    EightBit { codes: &'a mut [u8], scales: &'a mut [f32], form: Minifloat },
}

/// Values of a moment, or of its scales, as a checkpoint holds them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum StateValues<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// Codes of 8-bit floats.
    U8(&'a [u8]),
}

/// The same to write to.
#[derive(Debug, PartialEq)]
pub enum StateValuesMut<'a> {
    /// 32-bit floats.
    F32(&'a mut [f32]),
    /// bfloat16.
    Bf16(&'a mut [bf16]),
    /// Codes of 8-bit floats.
    U8(&'a mut [u8]),
}

impl StateValues<'_> {
    /// How many.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
            Self::U8(values) => values.len(),
        }
    }

    /// Name of the element type in safetensors.
    pub fn dtype(&self) -> &'static str {
        match self {
            Self::F32(_) => "F32",
            Self::Bf16(_) => "BF16",
            Self::U8(_) => "U8",
        }
    }

    /// The values' bytes.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Self::F32(values) => bytemuck::cast_slice(values),
            Self::Bf16(values) => bytemuck::cast_slice(values),
            Self::U8(values) => values,
        }
    }
}

impl StateValuesMut<'_> {
    fn shared(&self) -> StateValues<'_> {
        match self {
            Self::F32(values) => StateValues::F32(values),
            Self::Bf16(values) => StateValues::Bf16(values),
            Self::U8(values) => StateValues::U8(values),
        }
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.shared().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Name of the element type in safetensors.
    pub fn dtype(&self) -> &'static str {
        self.shared().dtype()
    }

    /// Bytes of one value.
    pub fn width(&self) -> usize {
        match self {
            Self::F32(_) => 4,
            Self::Bf16(_) => 2,
            Self::U8(_) => 1,
        }
    }

    /// The values' bytes.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::F32(values) => bytemuck::cast_slice_mut(values),
            Self::Bf16(values) => bytemuck::cast_slice_mut(values),
            Self::U8(values) => values,
        }
    }
}

impl Moment {
    /// A moment of `len` zeros.
    pub(super) fn zeros(kind: StateType, form: Minifloat, len: usize) -> Self {
        match kind {
            StateType::F32 => Self::F32(vec![0.0; len]),
            StateType::Bf16 => Self::Bf16(vec![bf16::ZERO; len]),
            StateType::EightBit => {
                let (codes, scales) = (vec![0; len], vec![0.0; len.div_ceil(BLOCK)]);
                Self::EightBit { codes, scales, form }
            }
        }
    }

    /// All of it, to be split.
    pub(super) fn borrow(&mut self) -> MomentMut<'_> {
        match self {
            Self::None => MomentMut::None,
            Self::F32(values) => MomentMut::F32(values),
            Self::Bf16(values) => MomentMut::Bf16(values),
            Self::EightBit { codes, scales, form } => MomentMut::EightBit { codes, scales, form: *form },
        }
    }

    /// What a checkpoint keeps: values, and scales where there are some.
    pub(super) fn parts(&self) -> (Option<StateValues<'_>>, Option<StateValues<'_>>) {
        match self {
            Self::None => (None, None),
            Self::F32(values) => (Some(StateValues::F32(values)), None),
            Self::Bf16(values) => (Some(StateValues::Bf16(values)), None),
            Self::EightBit { codes, scales, .. } => {
                (Some(StateValues::U8(codes)), Some(StateValues::F32(scales)))
            }
        }
    }

    /// The same to write to.
    pub(super) fn parts_mut(&mut self) -> (Option<StateValuesMut<'_>>, Option<StateValuesMut<'_>>) {
        match self {
            Self::None => (None, None),
            Self::F32(values) => (Some(StateValuesMut::F32(values)), None),
            Self::Bf16(values) => (Some(StateValuesMut::Bf16(values)), None),
            Self::EightBit { codes, scales, .. } => {
                (Some(StateValuesMut::U8(codes)), Some(StateValuesMut::F32(scales)))
            }
        }
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        let (values, scales) = self.parts();
        [values, scales].into_iter().flatten().map(|part| part.as_bytes().len()).sum()
    }
}

impl<'a> MomentMut<'a> {
    /// Takes the first `len` values off; `len` is whole blocks, or all there is.
    pub(super) fn split_off(&mut self, len: usize) -> MomentMut<'a> {
        match self {
            Self::None => MomentMut::None,
            Self::F32(values) => MomentMut::F32(values.split_off_mut(..len).expect("as long as the tensor")),
            Self::Bf16(values) => {
                MomentMut::Bf16(values.split_off_mut(..len).expect("as long as the tensor"))
            }
            Self::EightBit { codes, scales, form } => MomentMut::EightBit {
                codes: codes.split_off_mut(..len).expect("as long as the tensor"),
                scales: scales.split_off_mut(..len.div_ceil(BLOCK)).expect("one scale a block"),
                form: *form,
            },
        }
    }

    /// The values as f32: in place, or widened into `scratch`; [`MomentMut::close`] takes those back.
    pub(super) fn open<'s>(&'s mut self, scratch: &'s mut Vec<f32>) -> &'s mut [f32] {
        scratch.clear();
        match self {
            Self::None => {}
            Self::F32(values) => return values,
            Self::Bf16(values) => scratch.extend(values.iter().map(|x| x.to_f32())),
            Self::EightBit { codes, scales, form } => {
                for (codes, &scale) in codes.chunks(BLOCK).zip(scales.iter()) {
                    scratch.extend(codes.iter().map(|&code| form.decode(code) * scale));
                }
            }
        }
        scratch
    }

    /// Narrows what [`MomentMut::open`] widened. `random` is keyed by update, tensor and moment; the first value is number `first`
    /// of the tensor, a multiple of 8.
    pub(super) fn close(&mut self, scratch: &[f32], random: &CounterRng, first: u64) {
        match self {
            Self::None | Self::F32(_) => {}
            Self::Bf16(values) => each_with_bits(values, scratch, random, first, |x, bits| {
                bf16::from_bits(((x.to_bits().wrapping_add(bits)) >> 16) as u16)
            }),
            Self::EightBit { codes, scales, form } => {
                let blocks = codes.chunks_mut(BLOCK).zip(scratch.chunks(BLOCK)).zip(scales.iter_mut());
                for (block, ((codes, values), scale)) in (0u64..).zip(blocks) {
                    *scale = values.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
                    let inverse = if *scale > 0.0 { 1.0 / *scale } else { 0.0 };
                    let at = first + block * BLOCK as u64;
                    each_with_bits(codes, values, random, at, |x, bits| form.encode(x * inverse, bits));
                }
            }
        }
    }
}

/// `out[i] = f(values[i], 16 random bits)`.
fn each_with_bits<T>(
    out: &mut [T],
    values: &[f32],
    random: &CounterRng,
    first: u64,
    f: impl Fn(f32, u32) -> T,
) {
    for (eight, (out, values)) in (first / 8..).zip(out.chunks_mut(8).zip(values.chunks(8))) {
        let words = random.block(eight);
        for (i, (out, &x)) in out.iter_mut().zip(values).enumerate() {
            *out = f(x, words[i / 2] >> (16 * (i % 2)) & 0xffff);
        }
    }
}

/// Bits of mantissa kept, and of those dropped from an f32.
const MANTISSA: u32 = 3;
const DROPPED: u32 = 23 - MANTISSA;

impl Minifloat {
    /// Exponent field of 1.0; field 0 holds the subnormals.
    fn top(self) -> u32 {
        match self {
            Self::Signed => 15,
            Self::Positive => 31,
        }
    }

    /// The code of `x` in −1 ..= 1, rounded away from zero if the 16 `bits` say so.
    fn encode(self, x: f32, bits: u32) -> u8 {
        let size = x.abs().min(1.0);
        let smallest_normal = f32::from_bits((127 + 1 - self.top()) << 23);
        let code = if size >= smallest_normal {
            let kept = (size.to_bits() + (bits << (DROPPED - 16))) >> DROPPED;
            kept - ((127 - self.top()) << MANTISSA)
        } else {
            let steps = size / smallest_normal * (1 << MANTISSA) as f32;
            (steps + bits as f32 / 65_536.0) as u32
        };
        match self {
            Self::Signed => code as u8 | if x < 0.0 { 0x80 } else { 0 },
            Self::Positive => code.max(u32::from(size > 0.0)) as u8,
        }
    }

    /// The value of a code.
    fn decode(self, code: u8) -> f32 {
        let (size, sign) = match self {
            Self::Signed => (u32::from(code & 0x7f), if code & 0x80 == 0 { 1.0 } else { -1.0 }),
            Self::Positive => (u32::from(code), 1.0),
        };
        let smallest_normal = f32::from_bits((127 + 1 - self.top()) << 23);
        if size >> MANTISSA == 0 {
            return sign * size as f32 * smallest_normal / (1 << MANTISSA) as f32;
        }
        sign * f32::from_bits((size + ((127 - self.top()) << MANTISSA)) << DROPPED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_comes_back_whatever_the_random_bits() {
        for form in [Minifloat::Signed, Minifloat::Positive] {
            let highest = (form.top() << MANTISSA) as u8;
            for code in 0..=highest {
                for bits in [0, 1, 0x7fff, 0xffff] {
                    assert_eq!(form.encode(form.decode(code), bits), code, "{form:?} {code} with {bits}");
                }
            }
            assert_eq!((form.decode(0), form.decode(highest)), (0.0, 1.0));
        }
        assert_eq!(Minifloat::Signed.decode(Minifloat::Signed.encode(-0.5, 0)), -0.5);
    }

    #[test]
    fn the_mean_of_what_is_kept_is_the_value() {
        for kind in [StateType::Bf16, StateType::EightBit] {
            for form in [Minifloat::Signed, Minifloat::Positive] {
                let values: Vec<f32> =
                    (0..300).map(|i| 0.37f32.powi(i % 20) * (1.0 + i as f32 / 300.0)).collect();
                let mut sums = vec![0.0f64; values.len()];
                let draws = 2000;
                for draw in 0..draws {
                    let mut moment = Moment::zeros(kind, form, values.len());
                    let mut scratch = Vec::new();
                    moment.borrow().open(&mut scratch);
                    moment.borrow().close(&values, &CounterRng::new(draw, 0), 0);
                    let kept = moment.borrow().open(&mut scratch).to_vec();
                    sums.iter_mut().zip(kept).for_each(|(sum, x)| *sum += f64::from(x));
                }
                for (i, (sum, &x)) in sums.iter().zip(&values).enumerate() {
                    let mean = sum / draws as f64;
                    // Half a step of the coarsest type here, over the root of the draws, five times; below the smallest
                    // code a positive form is biased upwards on purpose.
                    let step = f64::from(x.max(2f32.powi(-14))) / 8.0;
                    let tolerance = 5.0 * 0.5 * step / (draws as f64).sqrt() + 2f64.powi(-17);
                    assert!(
                        (mean - f64::from(x)).abs() <= tolerance,
                        "{kind:?} {form:?} {i}: {mean}, not {x}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_second_moment_above_zero_stays_above_zero() {
        let mut moment = Moment::zeros(StateType::EightBit, Minifloat::Positive, 3);
        moment.borrow().close(&[1.0, 1e-30, 0.0], &CounterRng::new(1, 2), 0);
        let mut scratch = Vec::new();
        let kept = moment.borrow().open(&mut scratch).to_vec();
        assert!(kept[0] == 1.0 && kept[1] > 0.0 && kept[2] == 0.0, "{kept:?}");
    }

    #[test]
    fn a_part_is_narrowed_as_the_whole_is() {
        let values: Vec<f32> = (0..700).map(|i| (i as f32 * 0.7).sin()).collect();
        for kind in [StateType::Bf16, StateType::EightBit] {
            let random = CounterRng::new(3, 4);
            let mut whole = Moment::zeros(kind, Minifloat::Signed, 700);
            whole.borrow().close(&values, &random, 0);
            let mut parts = Moment::zeros(kind, Minifloat::Signed, 700);
            let mut rest = parts.borrow();
            rest.split_off(512).close(&values[..512], &random, 0);
            rest.close(&values[512..], &random, 512);
            assert_eq!(parts, whole);
        }
    }
}
