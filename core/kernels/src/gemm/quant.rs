//! Weights of 8 or 4 bits: products read a half or a quarter of the bytes and give the bits of a bf16 product.
//!
//! ```text
//!   W [n,k] ──groups along k──► codes, a scale a group ──► panels in memory
//!                                    │                        │ unfolded into a cache, a few panels at a time
//!                                    └─ round: code · scale   ▼
//!                                        in full ───────► the same lines ──► the kernel of the full precision
//! ```
//!
//! **Definition.** A group is `group` neighbours along k of one row of W; A its largest magnitude. With L = 127 (8 bits)
//! or 7 (4 bits), the scale is A / L, rounded up to 1 significant bit (8 bits) or 5 (4 bits); a code is the weight over the
//! scale, rounded to the nearest even whole number in −L ..= L; the weight becomes code · scale. Codes have 7 (3)
//! significant bits, so the product is a bf16 exactly and nothing is rounded twice. 8 bits in groups of 32 are MXINT8 of the
//! OCP Microscaling specification 1.0 (section 5), but for its code −128. A group below 2^−100 becomes zero, one with a
//! weight that is not finite becomes NaN.
//!
//! A product with a quantised matrix is by definition the product with the weights so rounded
//! ([`Quantisation::round`]), which is what training computes with: the same bits on both sides. Products of a few rows need
//! no unfolding (`few`).

use super::pack::{Element, Line, Precision};
use super::{PackedMatrix, few};
use crate::Threads;
use crate::simd::{LANES, Lanes, simd};
use crate::threads::SharedMut;
use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Bits of a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CodeBits {
    /// −127 ..= 127
    Eight,
    /// −7 ..= 7
    Four,
}

/// How weights are quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Quantisation {
    bits: CodeBits,
    group: u16,
}

/// Values of k that share a line of codes, whatever the group: the codes of one tile.
pub(super) const TILE_K: usize = 32;
/// Lines of a tile in full precision.
const TILE_LINES: usize = 16;
/// bf16 scales in a line: two groups of sixteen columns.
const SCALES_PER_LINE: usize = 32;
/// Groups whose values are all below this become zero, so that no scale or product is subnormal.
const LEAST: f32 = f32::from_bits((127 - 100) << 23);

type Column = [f32; LANES];

impl Quantisation {
    /// Codes of `bits` bits, a scale for every `group` neighbours along k.
    ///
    /// # Panics
    /// If `group` is no positive multiple of 32, or above 32,768.
    pub fn new(bits: CodeBits, group: usize) -> Self {
        assert!(group > 0 && group.is_multiple_of(TILE_K), "groups are multiples of {TILE_K}, not {group}");
        Self { bits, group: u16::try_from(group).expect("a group has at most 32768 weights") }
    }

    /// Bits of a code.
    pub fn bits(self) -> CodeBits {
        self.bits
    }

    /// Weights that share a scale.
    pub fn group(self) -> usize {
        usize::from(self.group)
    }

    /// Bytes of a weight with its share of a scale.
    pub fn weight_bytes(self) -> f64 {
        let code = match self.bits {
            CodeBits::Eight => 1.0,
            CodeBits::Four => 0.5,
        };
        code + 2.0 / f64::from(self.group)
    }

    /// Largest code.
    fn limit(self) -> f32 {
        match self.bits {
            CodeBits::Eight => 127.0,
            CodeBits::Four => 7.0,
        }
    }

    /// Bits of a f32's fraction that a scale does not use.
    fn scale_mask(self) -> u32 {
        match self.bits {
            CodeBits::Eight => (1 << 23) - 1,
            CodeBits::Four => (1 << 19) - 1,
        }
    }

    /// Lines of codes of one tile.
    fn code_lines(self) -> usize {
        match self.bits {
            CodeBits::Eight => TILE_LINES / 2,
            CodeBits::Four => TILE_LINES / 4,
        }
    }

    /// Lines of scales of a panel over k.
    fn scale_lines(self, k: usize) -> usize {
        (k.div_ceil(self.group()) * LANES).div_ceil(SCALES_PER_LINE)
    }

    /// Lines of a panel over k: its scales, then its codes tile by tile.
    pub(super) fn lines_per_panel(self, k: usize) -> usize {
        self.scale_lines(k) + k.div_ceil(TILE_K) * self.code_lines()
    }

    /// Writes what `w [n,k]` becomes when quantised to `out`, in the same order. If `transposed`, `w` is `[k,n]`.
    ///
    /// # Panics
    /// When `w` is not n·k long.
    pub fn round<E: Weight>(
        self,
        threads: &Threads,
        w: &[E],
        (n, k): (usize, usize),
        transposed: bool,
        out: &mut Vec<f32>,
    ) {
        assert_eq!(w.len(), n * k, "quantising: w is [n,k] = [{n},{k}]");
        out.resize(n * k, 0.0);
        let source = Source { w, n, k, transposed };
        let base = SharedMut::new(out);
        threads.for_each_chunk(n.div_ceil(LANES), (1 << 16) / (LANES * k.max(1)) + 1, &|panels| {
            let mut values = vec![[0.0; LANES]; self.group()];
            for panel in panels {
                for start in (0..k).step_by(self.group()) {
                    let values = &mut values[..self.group().min(k - start)];
                    source.gather(panel, start, values);
                    let scale = self.encode(values);
                    decode_group(values, &scale);
                    source.scatter(panel, start, values, &base);
                }
            }
        });
    }

    /// Replaces the values of a group by its codes; returns its scales.
    fn encode(self, values: &mut [Column]) -> Column {
        let mut scale = [0.0; LANES];
        encode_group(values, self.limit(), self.scale_mask(), &mut scale);
        scale
    }
}

/// A number that weights may be stored in.
pub trait Weight: Copy + Sync {
    /// Its value.
    fn value(self) -> f32;
}

impl Weight for f32 {
    #[inline(always)]
    fn value(self) -> f32 {
        self
    }
}

impl Weight for half::bf16 {
    #[inline(always)]
    fn value(self) -> f32 {
        self.to_f32()
    }
}

/// Where weights come from: `[n,k]`, or `[k,n]` if transposed.
struct Source<'a, E> {
    w: &'a [E],
    n: usize,
    k: usize,
    transposed: bool,
}

impl<E: Weight> Source<'_, E> {
    /// Sixteen rows of W from those of `panel` on, at `start` and after along k; rows past n are zero.
    fn gather(&self, panel: usize, start: usize, values: &mut [Column]) {
        let (n, k, first) = (self.n, self.k, panel * LANES);
        let width = LANES.min(n - first);
        if width < LANES {
            values.fill([0.0; LANES]);
        }
        if self.transposed {
            for (i, column) in values.iter_mut().enumerate() {
                let row = &self.w[(start + i) * n + first..][..width];
                column.iter_mut().zip(row).for_each(|(value, w)| *value = w.value());
            }
        } else {
            for c in 0..width {
                let row = &self.w[(first + c) * k + start..][..values.len()];
                values.iter_mut().zip(row).for_each(|(column, w)| column[c] = w.value());
            }
        }
    }

    /// The way back: writes `values` where [`gather`](Self::gather) reads them, in a matrix of the same order.
    fn scatter(&self, panel: usize, start: usize, values: &[Column], out: &SharedMut<f32>) {
        let (n, k, first) = (self.n, self.k, panel * LANES);
        let width = LANES.min(n - first);
        if self.transposed {
            for (i, column) in values.iter().enumerate() {
                // SAFETY: the rows of a panel belong to one thread; the matrix outlives the call.
                let row = unsafe { out.slice((start + i) * n + first, width) };
                row.copy_from_slice(&column[..width]);
            }
        } else {
            for c in 0..width {
                // SAFETY: as above.
                let row = unsafe { out.slice((first + c) * k + start, values.len()) };
                row.iter_mut().zip(values).for_each(|(out, column)| *out = column[c]);
            }
        }
    }
}

simd! {
    /// Replaces `values`, a group of sixteen rows, by their codes and gives their scales.
    fn encode_group<S>(values: &mut [Column], limit: f32, mask: u32, scale: &mut Column) {
        let zero = S::splat(0.0);
        let (mut size, mut odd) = (zero, zero);
        for column in values.iter() {
            let value = S::load(column);
            size = value.max(zero.sub(value)).max(size);
            // Zero while everything is finite, else NaN.
            odd = value.fma(zero, odd);
        }
        let (size, odd) = (size.to_array(), odd.to_array());
        for c in 0..LANES {
            let up = f32::from_bits(((size[c] / limit).to_bits() + mask) & !mask);
            let up = if size[c] < LEAST { 0.0 } else { up };
            scale[c] = if odd[c] == 0.0 { up } else { f32::NAN };
        }
        // Adding and taking away 1.5·2^23 rounds what is below 2^22 to the nearest even whole number.
        let whole = S::splat(12_582_912.0);
        let (least, most, scale) = (S::splat(-limit), S::splat(limit), S::load(scale));
        for column in values.iter_mut() {
            let code = S::load(column).div(scale).min(most).max(least).add(whole).sub(whole);
            zero.select_lt(scale, code, zero).store(column);
        }
    }
}

simd! {
    /// Replaces the codes of sixteen rows by the weights they stand for; exact.
    fn decode_group<S>(values: &mut [Column], scale: &Column) {
        let scale = S::load(scale);
        for column in values {
            // A code of −0 is 0, as it is once stored.
            S::load(column).add(S::splat(0.0)).mul(scale).store(column);
        }
    }
}

impl PackedMatrix {
    /// A quantised matrix of zeros, to be filled by one of the `repack_from` methods. Products with it have `precision`.
    pub fn quantised(quantisation: Quantisation, precision: Precision, n: usize, k: usize) -> Self {
        let mut packed = Self::empty(precision);
        packed.quantisation = Some(quantisation);
        packed.lasting(n, k)
    }

    /// How it is quantised, if it is.
    pub fn quantisation(&self) -> Option<Quantisation> {
        self.quantisation
    }

    /// Fills a quantised matrix from `w`, `[n,k]` or, if `transposed`, `[k,n]`.
    pub(super) fn fill_codes<E: Element>(
        &mut self,
        threads: &Threads,
        quantisation: Quantisation,
        w: &[E],
        transposed: bool,
    ) {
        let (n, k, lines) = (self.n, self.k, self.lines_per_panel());
        assert_eq!(w.len(), n * k, "packing: w is [n,k] = [{n},{k}]");
        let source = Source { w, n, k, transposed };
        let plain = AtomicBool::new(true);
        threads.for_each_row_chunk(&mut self.lines, lines.max(1), 4096 / lines.max(1) + 1, |first, block| {
            let mut values = vec![[0.0; LANES]; quantisation.group()];
            for (i, panel) in block.chunks_exact_mut(lines).enumerate() {
                let (scales, codes) = panel.split_at_mut(quantisation.scale_lines(k));
                let scales: &mut [[u16; LANES]] = bytemuck::cast_slice_mut(scales);
                let mut tiles = codes.chunks_exact_mut(quantisation.code_lines());
                for (group, start) in (0..k).step_by(quantisation.group()).enumerate() {
                    let len = quantisation.group().min(k - start);
                    source.gather(first + i, start, &mut values[..len]);
                    let scale = quantisation.encode(&mut values[..len]);
                    plain.fetch_and(few::plain(&scale), Relaxed);
                    scales[group] = scale.map(|scale| (scale.to_bits() >> 16) as u16);
                    // What is past k in its last tile is zero.
                    let padded = len.next_multiple_of(TILE_K);
                    values[len..padded].fill([0.0; LANES]);
                    for columns in values[..padded].as_chunks::<TILE_K>().0 {
                        write_codes(
                            quantisation.bits,
                            columns,
                            tiles.next().expect("a tile for every 32 of k"),
                        );
                    }
                }
            }
        });
        self.plain = plain.into_inner();
    }

    /// The scales of each group of a panel's sixteen rows, and its codes tile by tile. None and the weights where there are
    /// no codes.
    pub(super) fn scales_and_lines(&self, panel: usize) -> (&[[u16; LANES]], &[Line]) {
        let scales = self.quantisation.map_or(0, |quantisation| quantisation.scale_lines(self.k));
        let (scales, lines) = self.panel(panel).split_at(scales);
        (bytemuck::cast_slice(scales), lines)
    }

    /// Becomes the panels `panels` of the quantised matrix `of`, in full precision.
    pub(super) fn unfold(&mut self, of: &PackedMatrix, panels: Range<usize>) {
        let quantisation = of.quantisation.expect("only a quantised matrix is unfolded");
        let columns = (panels.end * LANES).min(of.n) - panels.start * LANES;
        self.reshape(of.precision(), columns, of.k);
        // Not looked at.
        self.plain = false;
        let lines = self.lines_per_panel();
        for (panel, out) in panels.zip(self.lines.chunks_exact_mut(lines.max(1))) {
            let (scales, codes) = of.scales_and_lines(panel);
            let tiles_per_group = quantisation.group() / TILE_K;
            match (quantisation.bits, of.precision()) {
                (CodeBits::Eight, Precision::Bf16) => unfold_8_bf16(scales, codes, tiles_per_group, out),
                (CodeBits::Four, Precision::Bf16) => unfold_4_bf16(scales, codes, tiles_per_group, out),
                (CodeBits::Eight, Precision::F32) => unfold_8_f32(scales, codes, tiles_per_group, out),
                (CodeBits::Four, Precision::F32) => unfold_4_f32(scales, codes, tiles_per_group, out),
            }
        }
    }
}

/// Panels of a quantised matrix that are unfolded at once: what the widest kernel takes.
const AT_ONCE: usize = 4;

thread_local!(static UNFOLDED: RefCell<Option<PackedMatrix>> = const { RefCell::new(None) });

/// Calls `f` with a matrix in full precision, panels of it, and the panel of `w` that its panel 0 is, so that together the
/// calls see the panels `panels` of `w` once.
pub(super) fn in_full(
    w: &PackedMatrix,
    panels: Range<usize>,
    f: &mut dyn FnMut(&PackedMatrix, Range<usize>, usize),
) {
    if w.quantisation.is_none() {
        return f(w, panels, 0);
    }
    // Taken, not borrowed: what runs on this thread meanwhile may be a product too.
    let mut full = UNFOLDED.take().unwrap_or_else(|| PackedMatrix::empty(w.precision()));
    for first in panels.clone().step_by(AT_ONCE) {
        let end = panels.end.min(first + AT_ONCE);
        full.unfold(w, first..end);
        f(&full, 0..end - first, first);
    }
    UNFOLDED.set(Some(full));
}

/// Writes a tile of codes. Eight bits: for each pair of k, sixteen bytes of the even k, sixteen of the odd. Four bits: for
/// each pair, sixteen bytes, the even k in the low half.
fn write_codes(bits: CodeBits, columns: &[Column; TILE_K], lines: &mut [Line]) {
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(lines);
    let pairs = columns.as_chunks::<2>().0.iter();
    match bits {
        CodeBits::Eight => {
            for (pair, bytes) in pairs.zip(bytes.chunks_exact_mut(2 * LANES)) {
                for (byte, &code) in bytes.iter_mut().zip(pair.as_flattened()) {
                    *byte = code as i8 as u8;
                }
            }
        }
        CodeBits::Four => {
            for ([even, odd], bytes) in pairs.zip(bytes.chunks_exact_mut(LANES)) {
                for c in 0..LANES {
                    bytes[c] = (even[c] as i8 as u8 & 15) | (odd[c] as i8 as u8) << 4;
                }
            }
        }
    }
}

/// Defines a function that writes a panel in full precision: `$codes` bytes hold a pair of k, of which `$pair` makes the
/// even and odd lanes; `$put` writes their products to the pair's `$lines` lines.
macro_rules! unfold {
    ($name:ident, $codes:expr, $pair:ident, $lines:expr, $put:ident) => {
        simd! {
            fn $name<S>(
                scales: &[[u16; LANES]],
                tiles: &[Line],
                tiles_per_group: usize,
                out: &mut [Line],
            ) {
                let code_lines = TILE_LINES * $codes / size_of::<Line>();
                let tiles = tiles.chunks_exact(code_lines);
                for (i, (codes, out)) in tiles.zip(out.chunks_mut($lines * TILE_LINES)).enumerate() {
                    let scale = S::from_bf16(&scales[i / tiles_per_group]);
                    let codes = bytemuck::cast_slice::<Line, [u8; $codes]>(codes);
                    for (codes, out) in codes.iter().zip(out.chunks_mut($lines)) {
                        let (even, odd) = $pair::<S>(codes);
                        $put(even.mul(scale), odd.mul(scale), out);
                    }
                }
            }
        }
    };
}

#[inline(always)]
fn codes_8<S: Lanes>(codes: &[u8; 2 * LANES]) -> (S, S) {
    let [even, odd] = bytemuck::cast_ref::<_, [[u8; LANES]; 2]>(codes);
    (S::from_i8(even), S::from_i8(odd))
}

#[inline(always)]
fn codes_4<S: Lanes>(codes: &[u8; LANES]) -> (S, S) {
    S::from_i4(codes)
}

/// The products are bf16 exactly: nothing but zeros is cut off.
#[inline(always)]
fn put_bf16<S: Lanes>(even: S, odd: S, out: &mut [Line]) {
    S::store_bf16_pairs(even, odd, &mut out[0].0);
}

#[inline(always)]
fn put_f32<S: Lanes>(even: S, odd: S, out: &mut [Line]) {
    for (line, product) in out.iter_mut().zip([even, odd]) {
        product.store(bytemuck::cast_mut(&mut line.0));
    }
}

unfold!(unfold_8_bf16, 2 * LANES, codes_8, 1, put_bf16);
unfold!(unfold_4_bf16, LANES, codes_4, 1, put_bf16);
unfold!(unfold_8_f32, 2 * LANES, codes_8, 2, put_f32);
unfold!(unfold_4_f32, LANES, codes_4, 2, put_f32);
