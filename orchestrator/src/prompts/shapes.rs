//! The built-in task for models that read images: count the squares or the circles in a tiny picture.
//!
//! A picture has 4 × 4 cells with at most one shape each. Level `k` draws 0 to `k` squares and as many circles at most.
//! Which side of the split a picture is on follows from which cells hold what, and from nothing else: train and held-out
//! sets are disjoint whatever the seeds. Colours, sizes and offsets are drawn beside.

use freewheel_types::{
    ContentPart, CounterRng, ImagePart, Message, MessageContent, Prompt, PromptBody, PromptId,
};

use super::generator::{LEVEL_MAX, Split};

/// Cells along a side.
const CELLS: usize = 4;
/// Pixels along a side of a cell.
const CELL: usize = 8;
/// Pixels along a side of the picture.
const SIDE: usize = CELLS * CELL;
/// One picture in this many is held out.
const HELD_OUT_EVERY: u64 = 10;
/// Key of the hash that splits train from held-out; changing it changes every split.
const SPLIT_KEY: u64 = 0x7368_6170_6573;
/// Streams of the draws that make a picture.
const LAYOUT_STREAM: u64 = 0x6c61_796f_7574;
const LOOK_STREAM: u64 = 0x6c6f_6f6b;

/// What a cell may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Shape {
    /// A filled square.
    Square,
    /// A ring.
    Circle,
}

impl Shape {
    fn plural(self) -> &'static str {
        match self {
            Self::Square => "squares",
            Self::Circle => "circles",
        }
    }
}

/// A picture with its question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShapesItem {
    /// What each cell holds, row by row.
    pub cells: [Option<Shape>; CELLS * CELLS],
    /// What is to be counted.
    pub asked: Shape,
    /// Most shapes of a kind, 1 to [`LEVEL_MAX`].
    pub level: u32,
    /// Key of colours, sizes and offsets.
    look: u64,
}

/// Draws pictures of some levels in turn.
#[derive(Clone, Debug)]
pub struct ShapesGenerator {
    seed: u64,
    levels: Vec<u32>,
    split: Split,
}

impl ShapesGenerator {
    /// Pictures of `levels` (in turn) from one side of the split; `seed` decides which.
    ///
    /// # Panics
    /// If `levels` is empty or one is not 1 to [`LEVEL_MAX`]: the configuration is checked before.
    pub fn new(seed: u64, levels: &[u32], split: Split) -> Self {
        let fine = !levels.is_empty() && levels.iter().all(|level| (1..=LEVEL_MAX).contains(level));
        assert!(fine, "levels {levels:?} must be 1 to {LEVEL_MAX}, at least one");
        Self { seed, levels: levels.to_vec(), split }
    }

    /// Question number `index`; far apart numbers may show the same layout.
    pub fn question(&self, index: u64) -> ShapesItem {
        let level = self.levels[(index % self.levels.len() as u64) as usize];
        let rng = CounterRng::new(self.seed ^ LAYOUT_STREAM, index);
        let look = CounterRng::new(self.seed ^ LOOK_STREAM, index).u64(0);
        (0..)
            .map(|attempt| draw(&rng, attempt, level, look))
            .find(|item| item.split() == self.split)
            .expect("one layout in ten is held out, nine are not")
    }

    /// The first `n` different layouts as prompts with the tags `shapes` and `level-k` and the verifier "number". Fewer,
    /// with a warning, if the levels have not that many.
    pub fn prompts(&self, n: usize) -> Vec<Prompt> {
        let mut seen = std::collections::BTreeSet::new();
        let fresh =
            (0..20 * n as u64).map(|index| self.question(index)).filter(|item| seen.insert(item.id()));
        let prompts: Vec<Prompt> = fresh.take(n).map(|item| item.prompt()).collect();
        if prompts.len() < n {
            let (have, levels) = (prompts.len(), &self.levels);
            tracing::warn!(
                wanted = n,
                have,
                ?levels,
                "the levels have fewer different pictures than asked for"
            );
        }
        prompts
    }
}

/// Attempt number `attempt` at a picture.
fn draw(rng: &CounterRng, attempt: u64, level: u32, look: u64) -> ShapesItem {
    let draw = |k: u64, n: u64| rng.below(attempt * 32 + k, n);
    let asked = if draw(0, 2) == 0 { Shape::Square } else { Shape::Circle };
    let mut free: Vec<usize> = (0..CELLS * CELLS).collect();
    let mut cells = [None; CELLS * CELLS];
    let mut next = 3;
    for (k, shape) in [(1, Shape::Square), (2, Shape::Circle)] {
        for _ in 0..draw(k, u64::from(level) + 1) {
            cells[free.swap_remove(draw(next, free.len() as u64) as usize)] = Some(shape);
            next += 1;
        }
    }
    ShapesItem { cells, asked, level, look }
}

impl ShapesItem {
    /// A picture with `shapes` in its first cells.
    ///
    /// # Panics
    /// If there are more shapes than cells.
    pub fn new(shapes: &[Shape], asked: Shape) -> Self {
        assert!(shapes.len() <= CELLS * CELLS, "{} shapes for {} cells", shapes.len(), CELLS * CELLS);
        let cells = std::array::from_fn(|cell| shapes.get(cell).copied());
        Self { cells, asked, level: LEVEL_MAX, look: 0 }
    }

    /// How many there are of what is asked for.
    pub fn answer(&self) -> usize {
        self.cells.iter().filter(|cell| **cell == Some(self.asked)).count()
    }

    /// The cells as a number to base 3.
    fn layout(&self) -> u64 {
        self.cells.iter().fold(0, |code, cell| code * 3 + cell.map_or(0, |shape| shape as u64 + 1))
    }

    fn split(&self) -> Split {
        match CounterRng::new(SPLIT_KEY, self.layout()).below(0, HELD_OUT_EVERY) {
            0 => Split::HeldOut,
            _ => Split::Train,
        }
    }

    fn id(&self) -> PromptId {
        PromptId::of(format!("shapes:{}:{}", self.layout(), self.asked.plural()).as_bytes())
    }

    /// The picture and its question as a user message, with its answer, the tags `shapes` and `level-k`, and the verifier
    /// "number".
    pub fn prompt(&self) -> Prompt {
        let image = ImagePart::new(format!("shapes-{}.png", self.layout()), self.png());
        let question = format!("How many {}?", self.asked.plural());
        let content = MessageContent::Parts(vec![ContentPart::Image(image), ContentPart::Text(question)]);
        Prompt {
            id: self.id(),
            name: None,
            body: PromptBody::Messages(vec![Message { role: "user".into(), content }]),
            answer: Some(self.answer().to_string()),
            tags: vec!["shapes".into(), format!("level-{}", self.level)],
            verifier: Some("number".into()),
            meta: None,
        }
    }

    /// The right completion: `#3`.
    pub fn demonstration(&self) -> String {
        format!("#{}", self.answer())
    }

    /// The picture as a PNG file's content.
    pub fn png(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut encoder = png::Encoder::new(&mut out, SIDE as u32, SIDE as u32);
        encoder.set_color(png::ColorType::Rgb);
        let written = encoder.write_header().and_then(|mut writer| writer.write_image_data(&self.pixels()));
        written.expect("a vector takes every byte");
        out
    }

    /// `[SIDE, SIDE, 3]`: bright shapes on a dark ground.
    fn pixels(&self) -> Vec<u8> {
        let rng = CounterRng::new(self.look, self.layout());
        let colour = |k: u64, low: u64| [0, 1, 2].map(|c| (low + rng.below(k * 3 + c, 80)) as u8);
        let mut pixels = colour(0, 0).repeat(SIDE * SIDE);
        for (cell, shape) in self.cells.iter().enumerate() {
            let Some(shape) = shape else { continue };
            let draw = |k: u64, n: usize| rng.below(1000 + 4 * cell as u64 + k, n as u64) as usize;
            let size = 6 + draw(0, 2);
            let (top, left) = (draw(1, CELL - size + 1), draw(2, CELL - size + 1));
            let ink = colour(cell as u64 + 1, 170);
            for (y, x) in (0..size * size).map(|i| (i / size, i % size)) {
                // Twice the distance from the middle, so that it is whole.
                let from_middle = |at: usize| (2 * at as i64 + 1 - size as i64).pow(2);
                let ring = (size as i64 - 4).pow(2)..=(size as i64).pow(2);
                if *shape == Shape::Square || ring.contains(&(from_middle(y) + from_middle(x))) {
                    let (row, column) = (cell / CELLS * CELL + top + y, cell % CELLS * CELL + left + x);
                    pixels[(row * SIDE + column) * 3..][..3].copy_from_slice(&ink);
                }
            }
        }
        pixels
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn layouts(seed: u64, split: Split) -> BTreeSet<u64> {
        let generator = ShapesGenerator::new(seed, &[3, 4], split);
        (0..3000).map(|index| generator.question(index).layout()).collect()
    }

    #[test]
    fn the_two_sides_are_disjoint_whatever_the_seeds() {
        let (train, held_out) = (layouts(1, Split::Train), layouts(2, Split::HeldOut));
        assert!(train.is_disjoint(&held_out) && train.len() > 1000 && held_out.len() > 200);
    }

    #[test]
    fn levels_bound_what_is_drawn_and_the_answer_counts_it() {
        let generator = ShapesGenerator::new(3, &[1, 4], Split::Train);
        let mut answers = BTreeSet::new();
        for index in 0..500 {
            let item = generator.question(index);
            let level = [1, 4][(index % 2) as usize];
            let of = |shape| item.cells.iter().filter(|cell| **cell == Some(shape)).count();
            assert!(of(Shape::Square) <= level && of(Shape::Circle) <= level, "{item:?}");
            assert_eq!(item.answer(), of(item.asked));
            answers.insert(item.answer());
        }
        assert_eq!(answers, (0..=4).collect());
    }

    #[test]
    fn prompts_repeat_for_a_seed_and_never_within_one() {
        let prompts = |seed| ShapesGenerator::new(seed, &[2, 3], Split::Train).prompts(400);
        let first = prompts(1);
        assert_eq!(first, prompts(1));
        assert_ne!(first[..20], prompts(2)[..20]);
        assert_eq!(first.iter().map(|prompt| prompt.id).collect::<BTreeSet<_>>().len(), 400);
        assert_eq!(first[0].tags, ["shapes", "level-2"]);
        assert_eq!(first[0].images().len(), 1);
    }

    #[test]
    fn pictures_show_the_shapes() {
        let item = ShapesItem::new(&[Shape::Square, Shape::Circle], Shape::Square);
        let pixels = item.pixels();
        let bright = |cell: usize| {
            let at =
                |i: usize| ((cell / CELLS * CELL + i / CELL) * SIDE + cell % CELLS * CELL + i % CELL) * 3;
            (0..CELL * CELL).filter(|&i| pixels[at(i)] >= 170).count()
        };
        assert!([36, 49].contains(&bright(0)), "a square of 6 or 7 pixels has {}", bright(0));
        assert!([28, 32].contains(&bright(1)), "a ring of 6 or 7 pixels has {}", bright(1));
        assert!((2..16).all(|cell| bright(cell) == 0));
        assert_eq!(item.demonstration(), "#1");
    }
}
