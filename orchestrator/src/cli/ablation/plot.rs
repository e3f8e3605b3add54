//! Final accuracy by objective and staleness, as SVG: a row an objective, a mark a staleness, a line from the lowest to the
//! highest seed.

use std::fmt::Write as _;

use super::{Cell, grouped, mean};

const LEFT: f64 = 170.0;
const WIDTH: f64 = 560.0;
const TOP: f64 = 40.0;
/// Height of one mark; a row has one for each staleness.
const MARK: f64 = 9.0;
const COLOURS: [&str; 6] = ["#1b6ca8", "#2a9d5c", "#d08a1d", "#b3364c", "#6b4fa0", "#555555"];

/// The plot.
pub(super) fn svg(cells: &[Cell]) -> String {
    let rows = grouped(cells);
    let mut bounds: Vec<u64> = cells.iter().map(|cell| cell.max_staleness).collect();
    bounds.sort_unstable();
    bounds.dedup();
    let row = MARK * bounds.len() as f64 + 8.0;
    let height = TOP + row * rows.len() as f64 + 30.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {:.0} {height:.0}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        LEFT + WIDTH + 30.0
    );
    legend(&mut out, &bounds);
    for tenth in 0..=10 {
        let x = at(f64::from(tenth) / 10.0);
        let _ = writeln!(
            out,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#555\">{:.1}</text>",
            height - 26.0,
            height - 10.0,
            f64::from(tenth) / 10.0
        );
    }
    for (index, (objective, by_staleness)) in rows.iter().enumerate() {
        let top = TOP + row * index as f64;
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{objective}</text>",
            LEFT - 10.0,
            top + row / 2.0
        );
        for (mark, staleness) in bounds.iter().enumerate() {
            let Some(cells) = by_staleness.get(staleness) else { continue };
            let values: Vec<f64> = cells.iter().filter_map(|cell| cell.accuracy).collect();
            one(&mut out, top + MARK * (mark as f64 + 0.5), COLOURS[mark % COLOURS.len()], &values);
        }
    }
    out + "</svg>\n"
}

fn at(accuracy: f64) -> f64 {
    LEFT + WIDTH * accuracy
}

fn legend(out: &mut String, bounds: &[u64]) {
    let _ = writeln!(out, "<text x=\"10\" y=\"20\" font-weight=\"bold\">held-out accuracy at the end</text>");
    for (mark, staleness) in bounds.iter().enumerate() {
        let (x, colour) = (LEFT + 60.0 + 110.0 * mark as f64, COLOURS[mark % COLOURS.len()]);
        let _ = writeln!(
            out,
            "<circle cx=\"{x:.1}\" cy=\"16\" r=\"4\" fill=\"{colour}\"/><text x=\"{:.1}\" y=\"20\">staleness ≤ {staleness}</text>",
            x + 8.0
        );
    }
}

/// One mark; a cross at 0 where every seed failed.
fn one(out: &mut String, y: f64, colour: &str, values: &[f64]) {
    if values.is_empty() {
        let _ = writeln!(out, "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\">×</text>", at(0.0), y + 4.0);
        return;
    }
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let _ = writeln!(
        out,
        "<line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"{colour}\" stroke-width=\"2\"/>\
         <circle cx=\"{:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{colour}\"/>",
        at(low),
        at(high),
        at(mean(values))
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_stands_where_its_mean_is() {
        let cell = |seed, accuracy| Cell {
            objective: "aipo".into(),
            max_staleness: 4,
            seed,
            accuracy,
            steps_to_goal: None,
            wall_s: 1.0,
            staleness: None,
            error: None,
        };
        let text = svg(&[cell(1, Some(0.5)), cell(2, Some(1.0))]);
        assert!(text.contains("<circle cx=\"590.0\""), "170 + 560 · 0.75: {text}");
        assert!(text.contains("x1=\"450.0\" x2=\"730.0\""), "from lowest to highest: {text}");
        assert!(svg(&[cell(1, None)]).contains('×'), "a run that failed is not left out");
    }
}
