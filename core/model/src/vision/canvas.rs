//! Which grid of tiles an image goes on, and how large it is drawn there.

/// Rows and columns.
pub(super) type Size = (usize, usize);

/// Every grid of at most `max_tiles` tiles, `(rows, columns)`, in the order the reference library lists them: larger
/// counts first, grids of one aspect ratio together.
fn grids(max_tiles: usize) -> Vec<Size> {
    let mut by_ratio: Vec<Vec<Size>> = Vec::new();
    for count in (1..=max_tiles).rev() {
        for rows in (1..=count).filter(|rows| count % rows == 0) {
            let grid = (rows, count / rows);
            let same = |other: &Vec<Size>| other[0].0 * grid.1 == grid.0 * other[0].1;
            match by_ratio.iter_mut().find(|known| same(known)) {
                Some(known) => known.push(grid),
                None => by_ratio.push(vec![grid]),
            }
        }
    }
    by_ratio.concat()
}

/// The grid of tiles of side `tile` that suits an image best: the least enlargement that is possible, else the least
/// reduction; of equals the smallest area. `largest` asks for the largest enlargement instead.
pub(super) fn best_grid(image: Size, tile: usize, max_tiles: usize, largest: bool) -> Size {
    // The scale that fits both sides, in f32 as the reference library computes it.
    let scale = |(rows, columns): Size| {
        let down = (rows * tile) as f32 / image.0 as f32;
        let across = (columns * tile) as f32 / image.1 as f32;
        if across > down { down } else { across }
    };
    let grids = grids(max_tiles);
    let scales: Vec<f32> = grids.iter().map(|grid| scale(*grid)).collect();
    let enlarging = scales.iter().copied().filter(|scale| *scale >= 1.0);
    let chosen = if largest { enlarging.reduce(f32::max) } else { enlarging.reduce(f32::min) };
    let chosen =
        chosen.or_else(|| scales.iter().copied().reduce(f32::max)).expect("a grid of one tile at least");
    grids
        .iter()
        .zip(&scales)
        .filter(|(_, scale)| **scale == chosen)
        .map(|(grid, _)| *grid)
        .min_by_key(|(rows, columns)| rows * columns)
        .expect("the chosen scale is that of a grid")
}

/// Size of `image` when it is drawn as large as fits `target`, its proportions kept.
pub(super) fn fitted(image: Size, target: Size) -> Size {
    let (down, across) = (target.0 as f64 / image.0 as f64, target.1 as f64 / image.1 as f64);
    let (height, width) = if across < down {
        (((image.0 as f64 * across).floor() as usize).min(target.0), target.1)
    } else {
        (target.0, ((image.1 as f64 * down).floor() as usize).min(target.1))
    };
    (height.max(1), width.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grids_are_all_factorings() {
        assert_eq!(grids(1), [(1, 1)]);
        let four = grids(4);
        assert_eq!(four, [(1, 4), (2, 2), (1, 1), (4, 1), (1, 3), (3, 1), (1, 2), (2, 1)]);
    }

    #[test]
    fn an_image_gets_the_grid_of_its_shape() {
        for (image, grid) in [
            ((32, 32), (1, 1)),
            ((5, 5), (1, 1)),
            ((64, 32), (2, 1)),
            ((33, 31), (2, 1)),
            ((90, 70), (2, 2)),
            ((20, 50), (1, 2)),
            ((1000, 10), (4, 1)),
        ] {
            assert_eq!(best_grid(image, 32, 4, false), grid, "{image:?}");
        }
        assert_eq!(best_grid((5, 5), 32, 4, true), (2, 2));
    }

    #[test]
    fn proportions_are_kept() {
        assert_eq!(fitted((90, 70), (64, 64)), (64, 49));
        assert_eq!(fitted((20, 50), (32, 64)), (25, 64));
        assert_eq!(fitted((1000, 1), (32, 32)), (32, 1));
    }
}
