//! The image processor of a model: tiles of an image, and the tokens of a prompt that stand for them.

use std::path::Path;
use std::sync::Arc;

use freewheel_types::ImagePart;
use half::bf16;
use serde_json::{Map, Value};

use super::canvas::{Size, best_grid, fitted};
use super::decode::decode;
use super::resize::resize;
use super::{Rgb8, Tile};
use crate::error::ModelError;
use crate::spec::VisionSpec;
use crate::transformer::TileRows;

/// Most tiles of one image that a configuration may ask for.
const MAX_TILES: u64 = 256;

/// A tile in a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageTile {
    /// Position of its first token; its tokens follow one another.
    pub position: usize,
    /// How many tokens it takes.
    pub tokens: usize,
    /// What it shows. Prompts and rollouts of a group share it.
    pub tile: Arc<Tile>,
}

impl ImageTile {
    /// Whether `other` is the same tile at the same place.
    pub fn shows_the_same(&self, other: &Self) -> bool {
        let key = |tile: &Self| (tile.position, tile.tokens, tile.tile.digest());
        key(self) == key(other)
    }

    /// The part of the tile that is among the `count` positions from `from` on; its first row counts from there.
    pub fn rows_in(&self, from: usize, count: usize) -> Option<TileRows<'_>> {
        let first = self.position.max(from);
        let end = (self.position + self.tokens).min(from + count);
        (first < end).then(|| TileRows {
            tile: &self.tile,
            row: first - from,
            tokens: first - self.position..end - self.position,
        })
    }
}

/// A prompt as a model reads it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EncodedPrompt {
    /// Token ids, placeholders of images expanded.
    pub ids: Vec<u32>,
    /// Tiles of its images, in order.
    pub tiles: Vec<ImageTile>,
}

/// How one model cuts up images, from `preprocessor_config.json`.
#[derive(Clone, Debug)]
pub struct ImageProcessor {
    /// Side of a tile, pixels.
    side: usize,
    max_tiles: usize,
    enlarge_fully: bool,
    /// Normalised value of every byte, by channel.
    values: [[f32; 256]; 3],
    /// Tokens of a tile.
    tokens: usize,
    ids: ImageIds,
}

/// Ids of the tokens that frame an image.
#[derive(Clone, Copy, Debug)]
struct ImageIds {
    /// Placeholder in a prompt, and the mark of the whole image after its pieces.
    image: u32,
    start: u32,
    end: u32,
    patch: u32,
    /// Between tiles of a row.
    across: u32,
    /// After each row of tiles.
    down: u32,
}

/// Size of an encoded image, `(height, width)`, by its head.
///
/// # Errors
/// What is wrong with it, in words.
pub fn image_size(bytes: &[u8]) -> Result<Size, String> {
    super::decode::size(bytes)
}

/// Whether `bytes` are an image that prompts may hold.
///
/// # Errors
/// What is wrong with it, in words.
pub fn check_image(bytes: &[u8]) -> Result<(), String> {
    decode(bytes).map(drop)
}

impl ImageProcessor {
    /// The processor that `config` (the content of the file `path`) describes, for a model with encoder `vision`.
    /// `id_of` finds a token's id by its text.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] or [`ModelError::Invalid`] with the key that is at fault.
    pub(crate) fn new(
        path: &Path,
        config: &Map<String, Value>,
        vision: &VisionSpec,
        id_of: &dyn Fn(&str) -> Option<u32>,
    ) -> Result<Self, ModelError> {
        let invalid = |what: String| ModelError::Invalid { path: path.to_owned(), what };
        let unsupported =
            |what: String| ModelError::Unsupported { path: path.to_owned(), what, hint: String::new() };
        for key in ["do_resize", "do_rescale", "do_normalize"] {
            if config.get(key).is_some_and(|flag| *flag == Value::Bool(false)) {
                return Err(unsupported(format!("{key} = false")));
            }
        }
        if let Some(other) = config.get("resample").filter(|way| way.as_u64() != Some(2)) {
            return Err(unsupported(format!("resample = {other} (2, bilinear, is)")));
        }
        let side = vision.image_size;
        for key in ["height", "width"] {
            let size = config.get("size").and_then(|size| size.get(key));
            if let Some(size) = size.filter(|size| size.as_u64() != Some(side as u64)) {
                return Err(invalid(format!("size.{key} = {size}, but the model's image_size is {side}")));
            }
        }
        let max_tiles = match config.get("max_patches") {
            None => 16,
            Some(given) => match given.as_u64().filter(|n| (1..=MAX_TILES).contains(n)) {
                Some(n) => n as usize,
                None => return Err(invalid(format!("max_patches = {given}: expected 1 to {MAX_TILES}"))),
            },
        };
        let token = |text: &str| {
            id_of(text).ok_or_else(|| invalid(format!("the tokenizer has no {text}, which images need")))
        };
        Ok(Self {
            side,
            max_tiles,
            enlarge_fully: config.get("resize_to_max_canvas").and_then(Value::as_bool).unwrap_or(false),
            values: byte_values(config).map_err(invalid)?,
            tokens: vision.tokens(),
            ids: ImageIds {
                image: token("<|image|>")?,
                start: token("<|image_start|>")?,
                end: token("<|image_end|>")?,
                patch: token("<|patch|>")?,
                across: token("<|tile_x_separator|>")?,
                down: token("<|tile_y_separator|>")?,
            },
        })
    }

    /// Tiles of `image`, row by row, and behind them the whole image if there are several; and the grid they make.
    pub fn tiles(&self, image: &Rgb8) -> (Vec<Tile>, Size) {
        let size = (image.height, image.width);
        let grid = best_grid(size, self.side, self.max_tiles, self.enlarge_fully);
        let canvas = (grid.0 * self.side, grid.1 * self.side);
        // Small images are not blown up beyond one tile.
        let largest = if self.enlarge_fully {
            canvas
        } else {
            (size.0.max(self.side).min(canvas.0), size.1.max(self.side).min(canvas.1))
        };
        let (height, width) = fitted(size, largest);
        let drawn = resize(image, height, width);
        let mut tiles: Vec<Tile> = (0..grid.0 * grid.1)
            .map(|i| self.cut(&drawn, (i / grid.1 * self.side, i % grid.1 * self.side)))
            .collect();
        if tiles.len() > 1 {
            tiles.push(self.cut(&resize(image, self.side, self.side), (0, 0)));
        }
        (tiles, grid)
    }

    /// The tile whose first pixel is at `from`; beyond the image it is black.
    fn cut(&self, image: &Rgb8, from: Size) -> Tile {
        let mut pixels = Vec::with_capacity(3 * self.side * self.side);
        for (channel, values) in self.values.iter().enumerate() {
            for y in from.0..from.0 + self.side {
                pixels.extend((from.1..from.1 + self.side).map(|x| {
                    let inside = y < image.height && x < image.width;
                    let byte = if inside { image.data[(y * image.width + x) * 3 + channel] } else { 0 };
                    values[usize::from(byte)]
                }));
            }
        }
        Tile::new(pixels)
    }

    /// The ids that an image on `grid` becomes.
    pub fn expansion(&self, grid: Size) -> Vec<u32> {
        let patches = std::iter::repeat_n(self.ids.patch, self.tokens);
        let mut ids = vec![self.ids.start];
        if grid.0 * grid.1 > 1 {
            for _ in 0..grid.0 {
                for column in 0..grid.1 {
                    ids.extend(patches.clone());
                    ids.extend((column + 1 < grid.1).then_some(self.ids.across));
                }
                ids.push(self.ids.down);
            }
        }
        ids.push(self.ids.image);
        ids.extend(patches);
        ids.push(self.ids.end);
        ids
    }

    /// Expands the placeholders in `ids`, one for each of `images`, in order.
    pub(crate) fn encode(&self, ids: &[u32], images: &[&ImagePart]) -> Result<EncodedPrompt, ModelError> {
        let placeholders = ids.iter().filter(|id| **id == self.ids.image).count();
        if placeholders != images.len() {
            return Err(ModelError::Template(format!(
                "the chat template wrote {placeholders} places for {} images",
                images.len()
            )));
        }
        let cut = self.cut_all(images)?;
        let mut grids = cut.iter().map(|(_, grid)| *grid);
        let mut expanded = Vec::with_capacity(ids.len());
        for &id in ids {
            match (id == self.ids.image).then(|| grids.next()).flatten() {
                Some(grid) => expanded.extend(self.expansion(grid)),
                None => expanded.push(id),
            }
        }
        let tiles = self.place(cut, &expanded)?;
        Ok(EncodedPrompt { ids: expanded, tiles })
    }

    /// The tiles of `images` at their places in `ids`, which hold the expanded placeholders.
    pub(crate) fn tiles_in(&self, ids: &[u32], images: &[&ImagePart]) -> Result<Vec<ImageTile>, ModelError> {
        self.place(self.cut_all(images)?, ids)
    }

    fn cut_all(&self, images: &[&ImagePart]) -> Result<Vec<(Vec<Tile>, Size)>, ModelError> {
        let cut = |image: &&ImagePart| {
            let pixels = decode(image.bytes())
                .map_err(|what| ModelError::Image { path: image.path().to_owned(), what })?;
            Ok(self.tiles(&pixels))
        };
        images.iter().map(cut).collect()
    }

    /// Every run of patch tokens is a tile. No text holds one: special tokens come from the template alone.
    fn place(&self, cut: Vec<(Vec<Tile>, Size)>, ids: &[u32]) -> Result<Vec<ImageTile>, ModelError> {
        let mut starts = Vec::new();
        let mut at = 0;
        for run in ids.chunk_by(|a, b| (*a == self.ids.patch) == (*b == self.ids.patch)) {
            if run[0] == self.ids.patch {
                starts.push((at, run.len()));
            }
            at += run.len();
        }
        let tiles: Vec<Tile> = cut.into_iter().flat_map(|(tiles, _)| tiles).collect();
        if starts.len() != tiles.len() || starts.iter().any(|(_, len)| *len != self.tokens) {
            return Err(ModelError::Tokenizer(format!(
                "the prompt has places for {} tiles of an image, its images have {}",
                starts.len(),
                tiles.len()
            )));
        }
        let placed = starts.into_iter().zip(tiles);
        let tile = |((position, tokens), tile)| ImageTile { position, tokens, tile: Arc::new(tile) };
        Ok(placed.map(tile).collect())
    }
}

/// Rescaled and normalised bytes. Each operation rounds to bfloat16, as the reference implementation's does.
fn byte_values(config: &Map<String, Value>) -> Result<[[f32; 256]; 3], String> {
    let round = |x: f32| bf16::from_f32(x).to_f32();
    let factor = number(config, "rescale_factor", 1.0 / 255.0)?;
    let mean = channels(config, "image_mean")?;
    let deviation = channels(config, "image_std")?;
    if let Some(zero) = deviation.iter().find(|x| round(**x) == 0.0) {
        return Err(format!("image_std = {zero}: expected positive numbers"));
    }
    Ok(std::array::from_fn(|channel| {
        std::array::from_fn(|byte| {
            let scaled = round(byte as f32 * factor);
            round(round(scaled - round(mean[channel])) / round(deviation[channel]))
        })
    }))
}

fn number(config: &Map<String, Value>, key: &str, default: f64) -> Result<f32, String> {
    let Some(value) = config.get(key).filter(|value| !value.is_null()) else { return Ok(default as f32) };
    value
        .as_f64()
        .filter(|x| x.is_finite())
        .map(|x| x as f32)
        .ok_or_else(|| format!("{key} = {value}: expected a number"))
}

fn channels(config: &Map<String, Value>, key: &str) -> Result<[f32; 3], String> {
    let Some(value) = config.get(key).filter(|value| !value.is_null()) else { return Ok([0.5; 3]) };
    let numbers: Option<Vec<f32>> =
        value.as_array().and_then(|list| list.iter().map(|x| x.as_f64().map(|x| x as f32)).collect());
    numbers
        .and_then(|list| <[f32; 3]>::try_from(list).ok())
        .filter(|list| list.iter().all(|x| x.is_finite()))
        .ok_or_else(|| format!("{key} = {value}: expected three numbers"))
}
