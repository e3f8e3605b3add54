//! Activations over width as SVG: two panels, without and with MetaP, both axes by powers.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::Row;

const COLOURS: [&str; 6] = ["#555555", "#1b6ca8", "#2a9d5c", "#d08a1d", "#b3364c", "#6b4fa0"];
const LEFT: f64 = 50.0;
const TOP: f64 = 60.0;
const WIDTH: f64 = 290.0;
const HEIGHT: f64 = 260.0;
/// From the left of a panel to that of the next: room for the names of lines.
const PANEL: f64 = WIDTH + 110.0;

/// The plot: dashed at the start, whole after the updates.
pub(super) fn svg(rows: &[Row]) -> String {
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {:.0} {:.0}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"18\" font-weight=\"bold\">root mean square of activations by width: at the start (dashed), \
         after the updates (of logits: the change)</text>\n",
        LEFT + 2.0 * PANEL,
        TOP + HEIGHT + 34.0
    );
    let axes = Axes::around(rows);
    for (panel, title) in ["plain", "MetaP"].into_iter().enumerate() {
        let left = LEFT + PANEL * panel as f64;
        let rows: Vec<&Row> = rows.iter().filter(|row| row.metap == (panel == 1)).collect();
        axes.grid(&mut out, left, title);
        axes.lines(&mut out, left, &rows);
    }
    out + "</svg>\n"
}

/// Powers that the axes reach over: of two along, of ten upwards.
struct Axes {
    widths: BTreeSet<usize>,
    low: i32,
    high: i32,
}

impl Axes {
    fn around(rows: &[Row]) -> Self {
        let logs = rows.iter().flat_map(|row| [row.first, row.last]).filter(|x| *x > 0.0).map(f64::log10);
        let (low, high) = logs.fold((0.0f64, 0.0f64), |(low, high), x| (low.min(x), high.max(x)));
        let low = low.floor() as i32;
        Self {
            widths: rows.iter().map(|row| row.width).collect(),
            low,
            high: (high.ceil() as i32).max(low + 1),
        }
    }

    fn x(&self, left: f64, width: usize) -> f64 {
        let log = |width: Option<&usize>| width.map_or(0.0, |w| (*w as f64).log2());
        let (first, last) = (log(self.widths.first()), log(self.widths.last()));
        left + WIDTH * (log(Some(&width)) - first) / (last - first).max(1e-9)
    }

    fn y(&self, rms: f64) -> f64 {
        let share = (rms.log10() - f64::from(self.low)) / f64::from(self.high - self.low);
        TOP + HEIGHT * (1.0 - share.clamp(0.0, 1.0))
    }

    fn grid(&self, out: &mut String, left: f64, title: &str) {
        let _ = writeln!(out, "<text x=\"{left:.1}\" y=\"{:.1}\">{title}</text>", TOP - 16.0);
        for power in self.low..=self.high {
            let (rms, y) = (10f64.powi(power), self.y(10f64.powi(power)));
            let _ = writeln!(
                out,
                "<line x1=\"{left:.1}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#555\">{rms}</text>",
                left + WIDTH,
                left - 6.0,
                y + 4.0
            );
        }
        for &width in &self.widths {
            let _ = writeln!(
                out,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#555\">{width}</text>",
                self.x(left, width),
                TOP + HEIGHT + 18.0
            );
        }
    }

    fn lines(&self, out: &mut String, left: f64, rows: &[&Row]) {
        let mut names: Vec<&str> = Vec::new();
        rows.iter().for_each(|row| {
            if !names.contains(&row.activation.as_str()) {
                names.push(&row.activation);
            }
        });
        let mut ends = Vec::new();
        for (index, name) in names.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let of: Vec<&&Row> = rows.iter().filter(|row| row.activation == *name).collect();
            let points = |value: fn(&Row) -> f64| -> String {
                of.iter()
                    .map(|row| format!("{:.1},{:.1} ", self.x(left, row.width), self.y(value(row))))
                    .collect()
            };
            let _ = writeln!(
                out,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-dasharray=\"4 3\"/>\
                 <polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
                points(|row| row.first).trim_end(),
                points(|row| row.last).trim_end()
            );
            ends.extend(of.last().map(|row| (self.y(row.last), colour, *name)));
        }
        ends.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut above = f64::NEG_INFINITY;
        for (y, colour, name) in ends {
            above = y.max(above + 13.0);
            let _ = writeln!(
                out,
                "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\">{name}</text>",
                left + WIDTH + 8.0,
                above + 4.0
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_times_as_large_is_a_power_higher() {
        let row = |metap, width, last| Row { metap, width, activation: "logits".into(), first: 1.0, last };
        let text =
            svg(&[row(false, 64, 1.0), row(false, 128, 10.0), row(true, 64, 1.0), row(true, 128, 1.0)]);
        assert!(
            text.contains("points=\"50.0,320.0 340.0,60.0\""),
            "without it, from the floor to the top: {text}"
        );
        assert!(text.contains("points=\"450.0,320.0 740.0,320.0\""), "with it, level: {text}");
    }
}
