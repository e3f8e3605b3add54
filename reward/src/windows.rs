//! Long texts in overlapping parts, so that nothing is hidden by what stands before or after it.

use std::ops::Range;

/// Parts of at most `room` tokens that cover `tokens` of them; neighbours share at least `overlap`, the first begins with the text and the last ends with it.
///
/// # Panics
/// If `overlap` is not below `room`.
pub(crate) fn windows(tokens: usize, room: usize, overlap: usize) -> Vec<Range<usize>> {
    assert!(overlap < room, "an overlap of {overlap} leaves no way forward in windows of {room}");
    let step = room - overlap;
    let mut parts = Vec::new();
    let mut from = 0;
    while from + room < tokens {
        parts.push(from..from + room);
        from += step;
    }
    parts.push(tokens.saturating_sub(room)..tokens);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_longer_than_the_overlap_lies_whole_in_one() {
        for (tokens, room, overlap) in
            [(1, 510, 128), (510, 510, 128), (511, 510, 128), (6000, 510, 128), (7, 3, 1), (9, 1, 0)]
        {
            let parts = windows(tokens, room, overlap);
            assert!(parts.iter().all(|part| part.len() <= room && part.end <= tokens && !part.is_empty()));
            assert_eq!((parts[0].start, parts[parts.len() - 1].end), (0, tokens), "head and tail");
            let run = overlap.max(1).min(tokens);
            for from in 0..=tokens - run {
                let held = parts.iter().any(|part| part.start <= from && from + run <= part.end);
                assert!(held, "{from}..{} of {tokens} in windows of {room}: {parts:?}", from + run);
            }
        }
    }
}
