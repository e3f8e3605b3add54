//! Lossless deltas between two versions of the weights, and the frames they travel in.
//!
//! At RL learning rates a bf16 weight seldom moves, and then by one step to a neighbouring value. How seldom depends on its
//! exponent: the smaller the weight, the finer its grid. So positions are coded as gaps *within a class of equal exponent* of the
//! base (which both sides know), with one adaptive model a class:
//!
//! ```text
//! payload  = "FWDELTA1" │ element bytes u8 │ elements u64 │ blocks │ first 16 bytes of BLAKE3 of all that
//! block    = kind u8 │ length u32 │ body             1 Mi elements each, little-endian
//!   same     no body
//!   sparse   range coded: for each class present: number of changes, then (gap, direction, steps − 1) for each
//!   dense    zstd: byte planes of the zig-zag steps
//! ```
//!
//! A step is a difference of bit patterns in the order of the floats (−0 < +0; NaNs too: bits are bits). Decoding trusts no length;
//! a damaged payload is an error. Nothing is written before the payload's digest holds, but a payload that is *sound and wrong* (made for another
//! base) may leave a half-changed arena: apply to a shadow copy, and drop it on error.

mod coder;
mod frame;
mod sparse;

use std::ops::Range;

pub use frame::{CHUNK_BYTES, apply_frame, delta_frame, key_frame};

/// Elements of a block.
const BLOCK: usize = 1 << 20;
const MAGIC: [u8; 8] = *b"FWDELTA1";
const HEADER: usize = MAGIC.len() + 1 + 8;
const TRAILER: usize = 16;
const BLOCK_HEADER: usize = 5;
/// Changed ranges closer than this are reported as one.
const COARSE: usize = 4096;
/// Above this share of changed elements, planes and zstd are faster and about as small.
const DENSE_FROM: f64 = 0.25;

/// A delta or frame that cannot be applied, and why.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeltaError {
    /// The bytes are not a delta, or were damaged.
    #[error("weights delta is damaged: {0}")]
    Damaged(String),
    /// It was made for other weights.
    #[error("weights delta does not fit: {what} is {got}, these weights have {expected}")]
    Mismatch {
        /// What differs.
        what: String,
        /// What the delta says.
        got: String,
        /// What the weights have.
        expected: String,
    },
}

/// Element types: their bits and their order.
trait Word: bytemuck::Pod + Eq {
    const BYTES: usize;
    /// Exponent: weights that share it share a grid.
    fn class(self) -> usize;
    fn is_negative(self) -> bool;
    /// Steps from `self` up to `other` in float order, zig-zag; 0 only for equal bits.
    fn zigzag_to(self, other: Self) -> u32;
    /// The inverse of [`Word::zigzag_to`].
    fn zigzag_by(self, steps: u32) -> Self;
}

macro_rules! word {
    ($unsigned:ty, $signed:ty, $mantissa:literal) => {
        impl Word for $unsigned {
            const BYTES: usize = size_of::<$unsigned>();

            fn class(self) -> usize {
                (self >> $mantissa & 0xFF) as usize
            }

            fn is_negative(self) -> bool {
                self >> (<$unsigned>::BITS - 1) == 1
            }

            fn zigzag_to(self, other: Self) -> u32 {
                let order =
                    |x: $unsigned| if x.is_negative() { !x } else { x | 1 << (<$unsigned>::BITS - 1) };
                let steps = order(other).wrapping_sub(order(self)) as $signed;
                u32::from((steps << 1 ^ steps >> (<$signed>::BITS - 1)) as $unsigned)
            }

            fn zigzag_by(self, steps: u32) -> Self {
                let steps = steps as $unsigned;
                let step = (steps >> 1) ^ (steps & 1).wrapping_neg();
                let order = if self.is_negative() { !self } else { self | 1 << (<$unsigned>::BITS - 1) };
                let order = order.wrapping_add(step);
                if order.is_negative() { order & !(1 << (<$unsigned>::BITS - 1)) } else { !order }
            }
        }
    };
}

word!(u16, i16, 7);
word!(u32, i32, 23);

/// Delta from `base` to `new`, bf16 bit patterns.
///
/// # Panics
/// If the lengths differ.
pub fn encode_bf16(base: &[u16], new: &[u16]) -> Vec<u8> {
    encode(base, new)
}

/// Delta from `base` to `new`, f32 bit patterns.
///
/// # Panics
/// If the lengths differ.
pub fn encode_f32(base: &[u32], new: &[u32]) -> Vec<u8> {
    encode(base, new)
}

/// Turns `base` into what the delta was made for. Returns what changed, coarsely: ascending ranges that hold every change.
///
/// # Errors
/// If the payload is damaged or of another size or type. `base` is then as it was, or half changed: drop it.
pub fn apply_bf16(base: &mut [u16], bytes: &[u8]) -> Result<Vec<Range<usize>>, DeltaError> {
    apply(base, bytes)
}

/// As [`apply_bf16`], for f32 bit patterns.
///
/// # Errors
/// As [`apply_bf16`].
pub fn apply_f32(base: &mut [u32], bytes: &[u8]) -> Result<Vec<Range<usize>>, DeltaError> {
    apply(base, bytes)
}

/// Share of elements that differ; 0 for empty slices.
///
/// # Panics
/// If the lengths differ.
pub fn density<T: Eq>(base: &[T], new: &[T]) -> f64 {
    assert_eq!(base.len(), new.len(), "two versions of one arena");
    let changed = base.iter().zip(new).filter(|(a, b)| a != b).count();
    changed as f64 / base.len().max(1) as f64
}

fn encode<W: Word>(base: &[W], new: &[W]) -> Vec<u8> {
    assert_eq!(base.len(), new.len(), "two versions of one arena");
    let mut bytes = Vec::with_capacity(HEADER + TRAILER + base.len() / 64);
    bytes.extend(MAGIC);
    bytes.push(W::BYTES as u8);
    bytes.extend((base.len() as u64).to_le_bytes());
    let mut models = sparse::Models::new();
    for (base, new) in base.chunks(BLOCK).zip(new.chunks(BLOCK)) {
        let (kind, body) = match density(base, new) {
            0.0 => (Kind::Same, Vec::new()),
            share if share < DENSE_FROM => (Kind::Sparse, models.encode(base, new)),
            _ => (Kind::Dense, encode_dense(base, new)),
        };
        bytes.push(kind as u8);
        bytes.extend((body.len() as u32).to_le_bytes());
        bytes.extend(body);
    }
    let digest = blake3::hash(&bytes);
    bytes.extend(&digest.as_bytes()[..TRAILER]);
    bytes
}

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Same = 0,
    Sparse = 1,
    Dense = 2,
}

fn apply<W: Word>(base: &mut [W], bytes: &[u8]) -> Result<Vec<Range<usize>>, DeltaError> {
    let mut rest = open::<W>(base.len(), bytes)?;
    let mut changed = Changed::default();
    let mut models = sparse::Models::new();
    for (index, block) in base.chunks_mut(BLOCK).enumerate() {
        let damaged = |what: &str| DeltaError::Damaged(format!("block {index}: {what}"));
        let Some((header, after)) = rest.split_first_chunk::<BLOCK_HEADER>() else {
            return Err(damaged("header is cut off"));
        };
        let len = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
        if len > after.len() {
            return Err(damaged("body is cut off"));
        }
        let (body, after) = after.split_at(len);
        rest = after;
        let first = index * BLOCK;
        match header[0] {
            0 if body.is_empty() => {}
            1 => models
                .apply(block, body, &mut |at| changed.add(first + at))
                .ok_or_else(|| damaged("sparse body"))?,
            2 => {
                apply_dense(block, body).ok_or_else(|| damaged("dense body"))?;
                changed.add_range(first..first + block.len());
            }
            kind => return Err(damaged(&format!("kind {kind} with {len} bytes"))),
        }
    }
    if !rest.is_empty() {
        return Err(DeltaError::Damaged(format!("{} bytes too many", rest.len())));
    }
    Ok(changed.ranges)
}

/// Checks digest, type and size; gives the blocks.
fn open<W: Word>(elements: usize, bytes: &[u8]) -> Result<&[u8], DeltaError> {
    let damaged = |what: &str| DeltaError::Damaged(what.to_owned());
    if bytes.len() < HEADER + TRAILER {
        return Err(DeltaError::Damaged(format!("{} bytes are too few", bytes.len())));
    }
    let (sealed, trailer) = bytes.split_at(bytes.len() - TRAILER);
    if blake3::hash(sealed).as_bytes()[..TRAILER] != *trailer {
        return Err(damaged("digest does not match"));
    }
    let (header, blocks) = sealed.split_at(HEADER);
    if header[..8] != MAGIC {
        return Err(damaged("wrong magic number"));
    }
    let mismatch = |what: &str, got: String, expected: String| DeltaError::Mismatch {
        what: what.to_owned(),
        got,
        expected,
    };
    if usize::from(header[8]) != W::BYTES {
        return Err(mismatch("bytes per element", header[8].to_string(), W::BYTES.to_string()));
    }
    let got = u64::from_le_bytes(header[9..].try_into().expect("eight bytes"));
    if got != elements as u64 {
        return Err(mismatch("number of elements", got.to_string(), elements.to_string()));
    }
    Ok(blocks)
}

/// Byte planes of the zig-zag steps, lowest byte first, then zstd.
fn encode_dense<W: Word>(base: &[W], new: &[W]) -> Vec<u8> {
    let mut planes = vec![0u8; base.len() * W::BYTES];
    for (i, (a, b)) in base.iter().zip(new).enumerate() {
        let steps = a.zigzag_to(*b).to_le_bytes();
        for (plane, byte) in steps[..W::BYTES].iter().enumerate() {
            planes[plane * base.len() + i] = *byte;
        }
    }
    zstd::bulk::compress(&planes, 1).expect("compression into memory does not fail")
}

fn apply_dense<W: Word>(block: &mut [W], body: &[u8]) -> Option<()> {
    let n = block.len();
    // The capacity is the hard stop: a body that wants more is an error of zstd.
    let planes =
        zstd::bulk::decompress(body, n * W::BYTES).ok().filter(|planes| planes.len() == n * W::BYTES)?;
    for (i, word) in block.iter_mut().enumerate() {
        let mut steps = [0u8; 4];
        for (plane, byte) in steps[..W::BYTES].iter_mut().enumerate() {
            *byte = planes[plane * n + i];
        }
        *word = word.zigzag_by(u32::from_le_bytes(steps));
    }
    Some(())
}

/// Collects changed positions, ascending, into coarse ranges.
#[derive(Default)]
struct Changed {
    ranges: Vec<Range<usize>>,
}

impl Changed {
    fn add(&mut self, at: usize) {
        self.add_range(at..at + 1);
    }

    fn add_range(&mut self, range: Range<usize>) {
        match self.ranges.last_mut() {
            Some(last) if range.start < last.end + COARSE => last.end = range.end,
            _ => self.ranges.push(range),
        }
    }
}

#[cfg(test)]
mod tests;
