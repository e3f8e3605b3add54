//! Keys and values of rows computed so far, in pages of [`KV_BLOCK`] positions.
//!
//! ```text
//! page ids of a sequence ─┬─► layers that see every position: the page of that number
//!                         └─► local layers (chunk or window):  the slot that the page holds while it may still be seen
//! ```
//!
//! A page takes a slot when its first row is written and gives it back when it is forgotten. So the memory of local layers
//! goes by what their masks show, not by how long sequences are.

use freewheel_kernels::attention::{AttentionMask, AttentionSeq, KV_BLOCK, KvPagesMut, kv_words};
use freewheel_kernels::{Pages, Precision};

use super::{PolicyWeights, Transformer};
use crate::spec::{AttentionSpec, ModelSpec};

/// Keys and values of all layers.
#[derive(Debug)]
pub struct KvCache {
    pub(super) layers: Vec<LayerPages>,
    pages: usize,
    slots: Option<Slots>,
}

#[derive(Debug)]
pub(super) struct LayerPages {
    precision: Precision,
    /// Words of memory, of which bf16 takes half of one.
    k: Pages<f32>,
    v: Pages<f32>,
    k_page_words: usize,
    v_page_words: usize,
    local: bool,
}

/// Which page holds which slot of the local layers.
#[derive(Debug)]
struct Slots {
    mask: AttentionMask,
    of_page: Vec<Option<u32>>,
    free: Vec<u32>,
    total: usize,
}

impl KvCache {
    /// A cache of `pages` pages, all of them in every layer, for keys and values in the numbers that products
    /// with `weights` are computed in.
    pub fn new(weights: &PolicyWeights, pages: usize) -> Self {
        let layer =
            |(attention, _): &(AttentionSpec, _)| LayerPages::new(attention, weights.precision, pages, false);
        Self { layers: weights.model.spec().layers.iter().map(layer).collect(), pages, slots: None }
    }

    /// A cache of `pages` pages with room for `slots` of them in local layers, which grows where it does not suffice.
    /// Whoever uses it says which pages no row sees any more: [`Self::forget`].
    pub fn with_slots(weights: &PolicyWeights, pages: usize, slots: usize) -> Self {
        let (model, precision) = (&weights.model, weights.precision);
        let Some(mask) = Self::local_mask(model) else { return Self::new(weights, pages) };
        let layers = model.spec().layers.iter().map(|(attention, _)| {
            let local = attention.mask() == mask;
            LayerPages::new(attention, precision, if local { slots } else { pages }, local)
        });
        // Popped from the end: low numbers first.
        let free = (0..slots as u32).rev().collect();
        let of_page = vec![None; pages];
        Self { layers: layers.collect(), pages, slots: Some(Slots { mask, of_page, free, total: slots }) }
    }

    /// The mask of the model's local layers; `None` if it has none, or several kinds of them.
    pub fn local_mask(model: &Transformer) -> Option<AttentionMask> {
        let masks = model.spec().layers.iter().map(|(attention, _)| attention.mask());
        let mut local = masks.filter(|mask| *mask != AttentionMask::Causal);
        let first = local.next()?;
        local.all(|mask| mask == first).then_some(first)
    }

    /// Bytes of one page over all layers.
    pub fn page_bytes(model: &Transformer, precision: Precision) -> usize {
        page_bytes(model.spec(), precision, |_| true)
    }

    /// Bytes of one page over the local layers.
    pub fn slot_bytes(model: &Transformer, precision: Precision) -> usize {
        let mask = Self::local_mask(model);
        page_bytes(model.spec(), precision, |attention| Some(attention.mask()) == mask)
    }

    /// Pages held.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Slots of local layers: those in use, and all.
    pub fn slots(&self) -> (usize, usize) {
        self.slots.as_ref().map_or((0, 0), |slots| (slots.total - slots.free.len(), slots.total))
    }

    /// Bytes that keys and values take.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(|layer| (layer.k.len() + layer.v.len()) * size_of::<f32>()).sum()
    }

    /// Copies a page, so that two sequences may go on from it in different ways.
    pub fn copy_page(&mut self, from: u32, to: u32) {
        let held = self.slots.as_ref().and_then(|slots| slots.of_page[from as usize]);
        // What nobody sees any more in the original nobody sees in the copy.
        let local = held.map(|slot| (slot, self.slot(to)));
        for layer in &mut self.layers {
            let Some((from, to)) = (if layer.local { local } else { Some((from, to)) }) else { continue };
            for (pages, n) in [(&mut layer.k, layer.k_page_words), (&mut layer.v, layer.v_page_words)] {
                let (from, to) = (from as usize * n, to as usize * n);
                pages.copy_within(from..from + n, to);
            }
        }
    }

    /// Local layers lose what they hold of `pages`: no row to come sees it. A page may be written again.
    pub fn forget(&mut self, pages: &[u32]) {
        let Some(slots) = &mut self.slots else { return };
        for &page in pages {
            slots.free.extend(slots.of_page[page as usize].take());
        }
    }

    /// For local layers, the pages of each of `seqs` by slot: those that its rows see, the written ones with a new slot
    /// where they have none. `None` if local layers hold all pages.
    ///
    /// # Panics
    /// If a row sees a page that was forgotten.
    pub(super) fn local_pages(&mut self, seqs: &[AttentionSeq]) -> Option<Vec<Vec<u32>>> {
        let mask = self.slots.as_ref()?.mask;
        let mut local = Vec::with_capacity(seqs.len());
        for seq in seqs {
            let end = (seq.position + seq.rows).div_ceil(KV_BLOCK);
            let seen = mask.first_visible(seq.position) / KV_BLOCK;
            // The kernels read no page before the first that is seen.
            let mut pages = vec![u32::MAX; end];
            for (at, page) in pages.iter_mut().enumerate().skip(seen) {
                *page = if seq.position > at * KV_BLOCK {
                    let slots = self.slots.as_ref().expect("looked up above");
                    slots.of_page[seq.pages[at] as usize].expect("a page that rows still see was forgotten")
                } else {
                    self.slot(seq.pages[at])
                };
            }
            local.push(pages);
        }
        Some(local)
    }

    /// The slot of `page`, taken if it has none.
    fn slot(&mut self, page: u32) -> u32 {
        let slots = self.slots.as_mut().expect("asked for with slots only");
        if let Some(slot) = slots.of_page[page as usize] {
            return slot;
        }
        if slots.free.is_empty() {
            let more = (slots.total / 8).max(1);
            slots.free.extend((slots.total as u32..(slots.total + more) as u32).rev());
            slots.total += more;
            let total = slots.total;
            self.layers.iter_mut().filter(|layer| layer.local).for_each(|layer| layer.resize(total));
        }
        let slots = self.slots.as_mut().expect("as above");
        let slot = slots.free.pop().expect("made above");
        slots.of_page[page as usize] = Some(slot);
        slot
    }
}

impl LayerPages {
    fn new(attention: &AttentionSpec, precision: Precision, pages: usize, local: bool) -> Self {
        let words = |width: usize| kv_words(precision, width * KV_BLOCK);
        let (k_page_words, v_page_words) = (words(attention.key_width()), words(attention.value_width()));
        let (k, v) = (Pages::zeros(k_page_words * pages), Pages::zeros(v_page_words * pages));
        Self { precision, k, v, k_page_words, v_page_words, local }
    }

    fn resize(&mut self, pages: usize) {
        for (held, page_words) in [(&mut self.k, self.k_page_words), (&mut self.v, self.v_page_words)] {
            let mut grown = Pages::zeros(pages * page_words);
            grown[..held.len()].copy_from_slice(held);
            *held = grown;
        }
    }

    /// What the kernels write and read.
    pub fn kv(&mut self) -> KvPagesMut<'_> {
        KvPagesMut::of(self.precision, &mut self.k, &mut self.v)
    }

    /// Whether its pages are slots.
    pub fn is_local(&self) -> bool {
        self.local
    }
}

fn page_bytes(spec: &ModelSpec, precision: Precision, counts: impl Fn(&AttentionSpec) -> bool) -> usize {
    let layers = spec.layers.iter().filter(|(attention, _)| counts(attention));
    let values: usize = layers.map(|(a, _)| (a.key_width() + a.value_width()) * KV_BLOCK).sum();
    kv_words(precision, values) * size_of::<f32>()
}
