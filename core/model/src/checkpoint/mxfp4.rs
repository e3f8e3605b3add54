//! MXFP4 experts, as gpt-oss is released: blocks of 32 four-bit floats (e2m1) with a power of two (e8m0) each, decoded
//! on loading (OCP Microscaling Formats 1.0, 5.2 and 5.3). Every value but the most extreme is exact in bfloat16.
//!
//! A tensor `NAME [E, in, out]` is stored as `NAME_blocks [E, out, in/32, 16]` and `NAME_scales [E, out, in/32]`, both
//! bytes; the low half of a byte comes first.

use crate::params::TensorSpec;

/// Values under one scale.
const BLOCK: usize = 32;

/// What the lower three bits of a code mean; the fourth is the sign.
const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// Names of the two tensors that hold `name`.
pub(super) fn names(name: &str) -> [String; 2] {
    [format!("{name}_blocks"), format!("{name}_scales")]
}

/// Shapes of the two tensors that hold `tensor`; `None` where it cannot be stored this way.
pub(super) fn shapes(tensor: &TensorSpec) -> Option<[Vec<usize>; 2]> {
    let &[experts, inputs, outputs] = tensor.shape.as_slice() else { return None };
    let blocks = inputs / BLOCK;
    inputs
        .is_multiple_of(BLOCK)
        .then(|| [vec![experts, outputs, blocks, BLOCK / 2], vec![experts, outputs, blocks]])
}

/// A packed tensor. Lengths are those of [`shapes`].
pub(super) struct Mxfp4<'a> {
    pub(super) blocks: &'a [u8],
    pub(super) scales: &'a [u8],
    pub(super) inputs: usize,
    pub(super) outputs: usize,
}

impl Mxfp4<'_> {
    /// Elements.
    pub(super) fn len(&self) -> usize {
        2 * self.blocks.len()
    }

    /// Hands over every element with its place in `[E, in, out]`. The elements of a block lie far apart there, so blocks
    /// of neighbouring outputs follow each other.
    pub(super) fn for_each(&self, mut put: impl FnMut(usize, f32)) {
        let (inputs, outputs, groups) = (self.inputs, self.outputs, self.inputs / BLOCK);
        let experts = self.len() / (inputs * outputs);
        for (expert, group) in (0..experts).flat_map(|e| (0..groups).map(move |g| (e, g))) {
            for output in 0..outputs {
                let block = (expert * outputs + output) * groups + group;
                let scale = power_of_two(self.scales[block]);
                let first = (expert * inputs + group * BLOCK) * outputs + output;
                let bytes = &self.blocks[block * BLOCK / 2..][..BLOCK / 2];
                for (pair, byte) in bytes.iter().enumerate() {
                    put(first + 2 * pair * outputs, float4(byte & 15) * scale);
                    put(first + (2 * pair + 1) * outputs, float4(byte >> 4) * scale);
                }
            }
        }
    }
}

fn float4(code: u8) -> f32 {
    let magnitude = MAGNITUDES[usize::from(code & 7)];
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// 2^(code − 127); the last code stands for no number.
fn power_of_two(code: u8) -> f32 {
    match code {
        0 => f32::MIN_POSITIVE / 2.0,
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::TensorKind;

    #[test]
    fn codes_are_those_of_the_standard() {
        let all: Vec<f32> = (0..16).map(float4).collect();
        assert_eq!(all[..8], [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]);
        assert_eq!(all[8..], [-0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]);
        for code in 0..=254u8 {
            assert_eq!(f64::from(power_of_two(code)), 2f64.powi(i32::from(code) - 127), "{code}");
        }
        assert!(power_of_two(255).is_nan());
    }

    #[test]
    fn every_element_finds_its_place() {
        let (experts, inputs, outputs) = (2, 64, 3);
        let shape = vec![experts, inputs, outputs];
        let tensor = TensorSpec { name: "x".into(), shape, offset: 0, kind: TensorKind::Expert };
        let [block_shape, scale_shape] = shapes(&tensor).expect("whole blocks");
        assert_eq!((block_shape, scale_shape), (vec![2, 3, 2, 16], vec![2, 3, 2]));
        let blocks: Vec<u8> = (0..tensor.len() as u32 / 2).map(|i| (i * 37 % 251) as u8).collect();
        let scales: Vec<u8> = (0..12).map(|i| 120 + i).collect();
        let mut found = vec![f32::NAN; tensor.len()];
        let packed = Mxfp4 { blocks: &blocks, scales: &scales, inputs, outputs };
        assert_eq!(packed.len(), tensor.len());
        packed.for_each(|at, value| {
            assert!(found[at].is_nan(), "{at} twice");
            found[at] = value;
        });
        for expert in 0..experts {
            for input in 0..inputs {
                for output in 0..outputs {
                    // Stored as [E, out, in], two a byte.
                    let stored = (expert * outputs + output) * inputs + input;
                    let code = blocks[stored / 2] >> (4 * (stored % 2)) & 15;
                    let want = float4(code) * 2f32.powi(i32::from(scales[stored / 32]) - 127);
                    assert_eq!(found[(expert * inputs + input) * outputs + output], want);
                }
            }
        }
        let odd = TensorSpec { shape: vec![2, 48, 3], ..tensor };
        assert!(shapes(&odd).is_none());
    }
}
