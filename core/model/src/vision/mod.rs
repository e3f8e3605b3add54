//! Images in prompts: encoded bytes to tiles of pixels, and the tokens that stand for them.
//!
//! ```text
//! PNG ─decode─► RGB ─canvas of 1..n tiles that fits best─► resize, pad ─► tiles (+ the whole image as one more)
//! <|image|> ─────────────────────────────────────────────────► <|image_start|> <|patch|> × n … <|image_end|>
//! ```
//!
//! As Llama4ImageProcessor and Llama4Processor of the reference library do it, to the bit of the pixels. Actor and
//! learner run the same code on the same bytes. Encoding tiles is the transformer's business.

mod canvas;
mod decode;
mod processor;
mod resize;

pub use processor::{EncodedPrompt, ImageProcessor, ImageTile, check_image, image_size};

use freewheel_types::Digest;

/// A square piece of an image, normalised.
#[derive(Clone, Debug, PartialEq)]
pub struct Tile {
    pixels: Vec<f32>,
    digest: Digest,
}

impl Tile {
    /// A tile of `pixels`, `[channels, side, side]`.
    pub fn new(pixels: Vec<f32>) -> Self {
        let digest = Digest::of(bytemuck::cast_slice(&pixels));
        Self { pixels, digest }
    }

    /// Its values, `[channels, side, side]`.
    pub fn pixels(&self) -> &[f32] {
        &self.pixels
    }

    /// Identity: tiles with the same digest show the same.
    pub fn digest(&self) -> Digest {
        self.digest
    }
}

/// Pixels of an image as they were decoded, 8 bits a channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rgb8 {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// `[height, width, 3]`
    pub data: Vec<u8>,
}
