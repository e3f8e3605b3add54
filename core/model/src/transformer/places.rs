//! Where the rows of a training batch lie: positions, and the key-value pages that trunks and branches share.

use freewheel_kernels::attention::{AttentionSeq, KV_BLOCK};

use super::tape::TrainSeq;

/// Rows and pages of a training batch.
#[derive(Debug)]
pub(super) struct Places {
    /// Position of every row `[T]`.
    pub positions: Vec<u32>,
    /// Pages in use.
    pub page_count: usize,
    seqs: Vec<Place>,
}

#[derive(Debug)]
struct Place {
    first_row: usize,
    rows: usize,
    position: usize,
    pages: Vec<u32>,
    /// Row of the trunk that lies at the start of the branch's first page, where that page is partly the trunk's.
    copied_from: Option<usize>,
}

impl Places {
    /// Places `seqs` one after the other. A branch reads the whole pages of the trunk rows it takes and gets a copy of a
    /// partial one.
    ///
    /// # Panics
    /// If the rows do not add up to `rows`, or a branch takes more rows than its trunk has.
    pub fn new(seqs: &[TrainSeq], rows: usize) -> Self {
        let mut places = Self { positions: Vec::with_capacity(rows), page_count: 0, seqs: Vec::new() };
        let mut trunk = None;
        for (index, seq) in seqs.iter().enumerate() {
            let first_row = places.positions.len();
            let place = match (seq.position, trunk) {
                (0, _) => {
                    trunk = Some(index);
                    Place { first_row, rows: seq.rows, position: 0, pages: Vec::new(), copied_from: None }
                }
                (position, Some(trunk)) => {
                    let trunk: &Place = &places.seqs[trunk];
                    assert!(
                        position <= trunk.rows,
                        "a branch at {position} of a trunk of {} rows",
                        trunk.rows
                    );
                    let whole = position / KV_BLOCK;
                    let copied_from = (position % KV_BLOCK > 0).then_some(trunk.first_row + whole * KV_BLOCK);
                    let pages = trunk.pages[..whole].to_vec();
                    Place { first_row, rows: seq.rows, position, pages, copied_from }
                }
                (_, None) => panic!("the first sequence of a batch starts at position 0"),
            };
            places.push(place);
        }
        assert_eq!(places.positions.len(), rows, "the sequences' rows must add up to the tokens");
        places
    }

    fn push(&mut self, mut place: Place) {
        let past = place.position + place.rows;
        while place.pages.len() < past.div_ceil(KV_BLOCK) {
            place.pages.push(self.page_count as u32);
            self.page_count += 1;
        }
        self.positions.extend(place.position as u32..past as u32);
        self.seqs.push(place);
    }

    /// The sequences as attention wants them, and the trunk rows that branches hold a copy of.
    pub fn seqs(&self) -> (Vec<AttentionSeq<'_>>, Vec<AttentionSeq<'_>>) {
        (self.seqs.iter().map(Place::seq).collect(), self.seqs.iter().filter_map(Place::copy).collect())
    }
}

impl Place {
    fn seq(&self) -> AttentionSeq<'_> {
        AttentionSeq {
            first_row: self.first_row,
            rows: self.rows,
            position: self.position,
            pages: &self.pages,
        }
    }

    fn copy(&self) -> Option<AttentionSeq<'_>> {
        let rows = self.position % KV_BLOCK;
        let (first_row, position) = (self.copied_from?, self.position - rows);
        Some(AttentionSeq { first_row, rows, position, pages: &self.pages })
    }
}
