//! MetaP's coordinate check: activations stay as large at every width, at the start and while training.

use freewheel_kernels::Threads;
use freewheel_learner::coordinates::CoordinateCheck;
use freewheel_model::MetaP;

const BASE: MetaP = MetaP { width: 64, layers: 2 };
const STEPS: usize = 5;

fn check(width: usize, metap: bool) -> CoordinateCheck {
    CoordinateCheck { width, metap, updates: STEPS, learning_rate: 4e-3 }
}

/// Largest over smallest among widths, of each activation.
fn spread(of: &[Vec<f64>]) -> Vec<f64> {
    let columns = 0..of[0].len();
    let column = |i: usize| of.iter().map(move |row| row[i]);
    columns.map(|i| column(i).fold(0.0, f64::max) / column(i).fold(f64::INFINITY, f64::min)).collect()
}

#[test]
fn activations_are_as_large_at_every_width() {
    let widths = [64, 128, 256, 512];
    let run = |metap: bool| -> (Vec<f64>, Vec<f64>) {
        let all = widths.map(|width| check(width, metap).run(&Threads::new(2)).expect("a small model"));
        let (first, last): (Vec<_>, Vec<_>) = all.into_iter().map(|found| (found.first, found.last)).unzip();
        (spread(&first), spread(&last))
    };
    let ((first, last), (_, plain)) = (run(true), run(false));
    let logits = first.len() - 1;
    assert!(first[..logits].iter().all(|ratio| *ratio <= 1.15), "at the start {first:?}");
    assert!(last[..logits].iter().all(|ratio| *ratio <= 1.15), "after {STEPS} updates {last:?}");
    // How far logits move falls a little: the random part of the head, which they move along too, shrinks with the width.
    assert!(last[logits] <= 2.5, "after {STEPS} updates {last:?}");
    assert!(plain[1] >= 3.0 && plain[2] >= 2.5, "without MetaP activations grow with the width: {plain:?}");
}

#[test]
fn at_the_base_it_is_the_usual_start_and_rates_are_one() {
    let (usual, metap) = (check(64, false).model().unwrap(), check(64, true).model().unwrap());
    assert_eq!(usual.params, metap.params);
    let growth = BASE.growth(&metap.params.layout).unwrap();
    assert!(metap.params.layout.tensors.iter().all(|tensor| growth.rate(tensor) == 1.0));
    let growth = MetaP { width: 16, layers: 1 }.growth(&metap.params.layout).unwrap();
    let rate =
        |end: &str| growth.rate(metap.params.layout.tensors.iter().find(|t| t.name.ends_with(end)).unwrap());
    for (end, want) in [
        ("embed_tokens.weight", 1.0),
        ("input_layernorm.weight", 1.0),
        ("q_proj.weight", 0.25),
        ("o_proj.weight", 0.125),
        ("mlp.gate.weight", 0.25),
        ("lm_head.weight", 0.25),
    ] {
        assert_eq!(rate(end), want, "{end}");
    }
}
