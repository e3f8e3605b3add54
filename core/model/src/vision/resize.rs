//! Bilinear resizing with antialiasing on bytes, in the arithmetic of the reference library.
//!
//! Columns first, then rows, each pass rounding to bytes; weights are 16-bit fixed point of the highest precision
//! that holds them, as Pillow does it and torch after it.

use super::Rgb8;

const CHANNELS: usize = 3;

/// The pixels that one output pixel is made of, with fixed-point weights.
struct Span {
    first: usize,
    weights: Vec<i32>,
}

/// Spans of every output pixel along one side, and the weights' fractional bits.
struct Taps {
    spans: Vec<Span>,
    bits: u32,
}

/// `image` drawn at `height` × `width`.
///
/// # Panics
/// If a side is zero.
pub(super) fn resize(image: &Rgb8, height: usize, width: usize) -> Rgb8 {
    assert!(image.height > 0 && image.width > 0 && height > 0 && width > 0, "an image without pixels");
    let across = if width == image.width { image.clone() } else { columns(image, width) };
    if height == image.height { across } else { rows(&across, height) }
}

fn columns(image: &Rgb8, width: usize) -> Rgb8 {
    let taps = taps(image.width, width);
    let mut data = Vec::with_capacity(image.height * width * CHANNELS);
    for line in image.data.chunks_exact(image.width * CHANNELS) {
        for span in &taps.spans {
            for channel in 0..CHANNELS {
                data.push(taps.weigh(span, |pixel| line[pixel * CHANNELS + channel]));
            }
        }
    }
    Rgb8 { height: image.height, width, data }
}

fn rows(image: &Rgb8, height: usize) -> Rgb8 {
    let taps = taps(image.height, height);
    let line = image.width * CHANNELS;
    let mut data = Vec::with_capacity(height * line);
    for span in &taps.spans {
        data.extend((0..line).map(|at| taps.weigh(span, |row| image.data[row * line + at])));
    }
    Rgb8 { height, width: image.width, data }
}

impl Taps {
    fn weigh(&self, span: &Span, pixel: impl Fn(usize) -> u8) -> u8 {
        let half = 1i32 << (self.bits - 1);
        let sum = span
            .weights
            .iter()
            .enumerate()
            .fold(half, |sum, (i, weight)| sum + weight * i32::from(pixel(span.first + i)));
        (sum >> self.bits).clamp(0, 255) as u8
    }
}

/// A triangle as wide as the reduction: two input pixels where the image grows.
fn taps(from: usize, to: usize) -> Taps {
    let scale = from as f64 / to as f64;
    let (support, inverse) = if scale >= 1.0 { (scale, 1.0 / scale) } else { (1.0, 1.0) };
    let real: Vec<(usize, Vec<f64>)> = (0..to)
        .map(|i| {
            let centre = scale * (i as f64 + 0.5);
            let first = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5) as usize).min(from);
            let triangle = |pixel: usize| (1.0 - ((pixel as f64 - centre + 0.5) * inverse).abs()).max(0.0);
            let weights: Vec<f64> = (first..end).map(triangle).collect();
            let total: f64 = weights.iter().sum();
            (first, weights.into_iter().map(|w| w / total).collect())
        })
        .collect();
    let largest = real.iter().flat_map(|(_, weights)| weights).copied().fold(0.0, f64::max);
    let mut bits = 0;
    while bits < 22 && (0.5 + largest * f64::from(1u32 << (bits + 1))) as i32 <= i32::from(i16::MAX) {
        bits += 1;
    }
    let fixed = |weight: f64| (0.5 + weight * f64::from(1u32 << bits)) as i32;
    let spans = real
        .into_iter()
        .map(|(first, weights)| Span { first, weights: weights.into_iter().map(fixed).collect() })
        .collect();
    Taps { spans, bits }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grey(height: usize, width: usize, value: impl Fn(usize, usize) -> u8) -> Rgb8 {
        let data = (0..height * width).flat_map(|i| [value(i / width, i % width); CHANNELS]).collect();
        Rgb8 { height, width, data }
    }

    #[test]
    fn an_even_image_stays_even() {
        for (height, width) in [(1, 1), (7, 90), (64, 3), (200, 200)] {
            let resized = resize(&grey(33, 31, |_, _| 201), height, width);
            assert_eq!(resized, grey(height, width, |_, _| 201));
        }
    }

    #[test]
    fn halving_averages_and_doubling_mixes_neighbours() {
        let stripes = grey(1, 4, |_, x| if x < 2 { 0 } else { 240 });
        // Triangles of 2 pixels: 1/8, 3/8, 3/8, 1/8; at the border the missing one's part is shared out.
        let halved: Vec<u8> = resize(&stripes, 1, 2).data.into_iter().step_by(3).collect();
        assert_eq!(halved, [34, 206]);
        let doubled: Vec<u8> =
            resize(&grey(1, 2, |_, x| 100 * x as u8), 1, 4).data.into_iter().step_by(3).collect();
        assert_eq!(doubled, [0, 25, 75, 100]);
    }
}
