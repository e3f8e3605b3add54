//! Moving values between layouts: pixels to patches, patches to shuffled tokens.

use crate::spec::VisionSpec;

/// Patches of a tile, row by row: `[P − 1, channels · patch · patch]` from `[channels, side, side]`.
pub(super) fn unfold(spec: &VisionSpec, pixels: &[f32], out: &mut [f32]) {
    let VisionSpec { image_size: side, patch_size: patch, channels, .. } = *spec;
    let grid = spec.grid();
    let mut lines = out.chunks_exact_mut(patch);
    for (row, column) in (0..grid * grid).map(|i| (i / grid, i % grid)) {
        for (channel, y) in (0..channels * patch).map(|i| (i / patch, i % patch)) {
            let from = (channel * side + row * patch + y) * side + column * patch;
            let line = lines.next().expect("out holds every patch");
            line.copy_from_slice(&pixels[from..from + patch]);
        }
    }
}

/// Where each shuffled token's parts come from: for token t and part p of it, the patch at `t · r² + p`.
///
/// A token joins the r × r patches of a square, row by row.
pub(super) fn shuffled_patches(spec: &VisionSpec) -> impl Iterator<Item = usize> {
    let (grid, r) = (spec.grid(), spec.shuffle);
    let tokens = grid / r;
    (0..tokens * tokens).flat_map(move |token| {
        let (row, column) = (token / tokens * r, token % tokens * r);
        (0..r * r).map(move |part| (row + part / r) * grid + column + part % r)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(image_size: usize, patch_size: usize, shuffle: usize) -> VisionSpec {
        VisionSpec {
            image_size,
            patch_size,
            channels: 2,
            hidden: 4,
            layers: 1,
            heads: 1,
            width: 4,
            norm_eps: 1e-5,
            inv_freq: vec![1.0],
            shuffle,
            adapter_width: 4,
            output: 4,
        }
    }

    #[test]
    fn patches_are_read_row_by_row_channel_by_channel() {
        let spec = spec(4, 2, 1);
        let pixels: Vec<f32> = (0..32).map(|i| i as f32).collect();
        let mut out = vec![0.0; 32];
        unfold(&spec, &pixels, &mut out);
        assert_eq!(out[..8], [0., 1., 4., 5., 16., 17., 20., 21.]);
        assert_eq!(out[24..], [10., 11., 14., 15., 26., 27., 30., 31.]);
    }

    #[test]
    fn a_token_joins_a_square_of_patches() {
        let of: Vec<usize> = shuffled_patches(&spec(8, 2, 2)).collect();
        assert_eq!(of, [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]);
    }
}
