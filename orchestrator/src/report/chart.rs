//! Line charts as inline SVG: few grid lines, direct labels, no legend.

use std::fmt::Write as _;

use super::text::{escape, number};

/// One line of a chart.
#[derive(Debug, Default)]
pub(super) struct Series {
    /// Name, shown at the line's end when there are several.
    pub label: String,
    /// x, y; x ascending, all finite.
    pub points: Vec<(f64, f64)>,
    /// x, lower, upper.
    pub band: Vec<(f64, f64, f64)>,
    /// Few exact points: dots, no smoothing.
    pub exact: bool,
}

/// A chart of one question.
#[derive(Debug, Default)]
pub(super) struct Chart {
    pub title: &'static str,
    /// What one sees, in a few words.
    pub note: &'static str,
    pub series: Vec<Series>,
    /// The y axis contains 0.
    pub from_zero: bool,
    /// The y axis is exactly this.
    pub bounds: Option<(f64, f64)>,
    /// Takes the room of two.
    pub wide: bool,
    /// Steps with an upright line: alarms.
    pub marks: Vec<f64>,
}

const HEIGHT: f64 = 190.0;
const LEFT: f64 = 46.0;
const RIGHT: f64 = 80.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 24.0;
/// More points than this are averaged in buckets.
const POINTS_MAX: usize = 400;

impl Chart {
    /// The chart as a card; empty if there is nothing to show.
    pub(super) fn card(&self) -> String {
        if self.series.iter().all(|series| series.points.is_empty()) {
            return String::new();
        }
        let class = if self.wide { "card chart wide" } else { "card chart" };
        format!(
            "<figure class=\"{class}\"><figcaption><b>{}</b> {}</figcaption>{}</figure>",
            self.title,
            self.note,
            self.svg()
        )
    }

    fn svg(&self) -> String {
        let width = if self.wide { 900.0 } else { 440.0 };
        let frame = self.frame(width);
        let mut svg = format!(
            "<svg viewBox=\"0 0 {width} {HEIGHT}\" role=\"img\" aria-label=\"{}\">",
            escape(&format!("{}: {}", self.title, self.summary()))
        );
        frame.grid(&mut svg);
        frame.marks(&mut svg, &self.marks);
        for (index, series) in self.series.iter().enumerate() {
            frame.line(&mut svg, index % 4 + 1, series);
        }
        self.labels(&frame, &mut svg);
        svg += "</svg>";
        svg
    }

    /// First and last values, for those who cannot see the lines.
    fn summary(&self) -> String {
        let ends = |series: &Series| {
            let (first, last) = (series.points.first()?, series.points.last()?);
            Some(format!("{} from {} to {}", series.label, number(first.1), number(last.1)).trim().to_owned())
        };
        self.series.iter().filter_map(ends).collect::<Vec<_>>().join("; ")
    }

    fn frame(&self, width: f64) -> Frame {
        let xs = || self.series.iter().flat_map(|series| series.points.iter().map(|point| point.0));
        let ys = || {
            let of = |series: &Series| {
                let band: Vec<f64> = series.band.iter().flat_map(|b| [b.1, b.2]).collect();
                shown(series).iter().map(|point| point.1).chain(band).collect::<Vec<_>>()
            };
            self.series.iter().flat_map(of)
        };
        let (x_min, x_max) = extent(xs());
        let (mut y_min, mut y_max) = self.bounds.unwrap_or_else(|| extent(ys()));
        if self.from_zero && self.bounds.is_none() {
            (y_min, y_max) = (y_min.min(0.0), y_max.max(0.0));
        }
        if y_max - y_min <= f64::EPSILON * y_max.abs() {
            let margin = if y_max == 0.0 { 1.0 } else { y_max.abs() * 0.1 };
            // A constant 0 sits on the floor, anything else in the middle.
            (y_min, y_max) = if y_max == 0.0 { (0.0, margin) } else { (y_min - margin, y_max + margin) };
        }
        Frame { width, x_min, x_max: if x_max > x_min { x_max } else { x_min + 1.0 }, y_min, y_max }
    }

    /// The last value of each line, kept apart from its neighbours.
    fn labels(&self, frame: &Frame, svg: &mut String) {
        let mut ends = Vec::new();
        for (index, series) in self.series.iter().enumerate() {
            let points = if series.exact { series.points.clone() } else { smooth(&shown(series)) };
            if let Some(&last) = points.last() {
                ends.push((frame.y(last.1), index % 4 + 1, last, &series.label));
            }
        }
        ends.sort_by(|a, b| a.0.total_cmp(&b.0));
        let several = ends.len() > 1;
        let room = if several { 24.0 } else { 13.0 };
        for i in 1..ends.len() {
            ends[i].0 = ends[i].0.max(ends[i - 1].0 + room);
        }
        // What was pushed below the frame pushes back.
        let mut floor = HEIGHT - BOTTOM - if several { 8.0 } else { 0.0 };
        for end in ends.iter_mut().rev() {
            end.0 = end.0.min(floor);
            floor = end.0 - room;
        }
        for (y, colour, (x, value), label) in ends {
            let x = frame.x(x) + 7.0;
            let _ = write!(
                svg,
                "<text class=\"end c{colour}\" x=\"{x:.1}\" y=\"{:.1}\">{}",
                y + 4.0,
                number(value)
            );
            if several {
                let _ = write!(
                    svg,
                    "<tspan class=\"name\" x=\"{x:.1}\" dy=\"11\">{}</tspan>",
                    escape(&short(label))
                );
            }
            svg.push_str("</text>");
        }
    }
}

/// Data to pixels.
struct Frame {
    width: f64,
    x_min: f64,
    x_max: f64,
    y_min: f64,
    y_max: f64,
}

impl Frame {
    fn x(&self, x: f64) -> f64 {
        LEFT + (x - self.x_min) / (self.x_max - self.x_min) * (self.width - LEFT - RIGHT)
    }

    fn y(&self, y: f64) -> f64 {
        let share = ((y - self.y_min) / (self.y_max - self.y_min)).clamp(0.0, 1.0);
        HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
    }

    fn grid(&self, svg: &mut String) {
        for tick in ticks(self.y_min, self.y_max, 5) {
            let y = self.y(tick);
            let _ = write!(
                svg,
                "<path class=\"rule\" d=\"M{LEFT} {y:.1}H{:.1}\"/><text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                self.width - RIGHT,
                LEFT - 6.0,
                y + 3.5,
                number(tick)
            );
        }
        let steps = if self.width > 600.0 { 8 } else { 4 };
        for tick in ticks(self.x_min, self.x_max, steps).into_iter().filter(|x| x.fract() == 0.0) {
            let _ = write!(
                svg,
                "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                self.x(tick),
                HEIGHT - 7.0,
                number(tick)
            );
        }
        let _ = write!(
            svg,
            "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">step</text>",
            LEFT - 6.0,
            HEIGHT - 7.0
        );
    }

    fn marks(&self, svg: &mut String, steps: &[f64]) {
        for step in steps.iter().filter(|step| (self.x_min..=self.x_max).contains(*step)) {
            let bottom = HEIGHT - BOTTOM;
            let _ = write!(svg, "<path class=\"mark\" d=\"M{:.1} {TOP}V{bottom}\"/>", self.x(*step));
        }
    }

    fn line(&self, svg: &mut String, colour: usize, series: &Series) {
        if !series.band.is_empty() {
            let upper = series.band.iter().map(|b| (b.0, b.2));
            let outline: Vec<(f64, f64)> =
                upper.chain(series.band.iter().rev().map(|b| (b.0, b.1))).collect();
            let _ = write!(svg, "<path class=\"band c{colour}\" d=\"{}Z\"/>", self.path(&outline));
        }
        if series.exact {
            let _ = write!(svg, "<path class=\"line c{colour}\" d=\"{}\"/>", self.path(&series.points));
            for (x, y) in &series.points {
                let (cx, cy) = (self.x(*x), self.y(*y));
                let title = format!("step {}: {}", number(*x), number(*y));
                let _ = write!(
                    svg,
                    "<circle class=\"c{colour}\" cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"2.6\"><title>{title}</title></circle>"
                );
            }
            return;
        }
        let points = shown(series);
        let smoothed = smooth(&points);
        if smoothed.len() > 2 && smoothed != points {
            let _ = write!(svg, "<path class=\"raw c{colour}\" d=\"{}\"/>", self.path(&points));
        }
        let _ = write!(svg, "<path class=\"line c{colour}\" d=\"{}\"/>", self.path(&smoothed));
        if let [(x, y)] = points.as_slice() {
            let _ = write!(
                svg,
                "<circle class=\"c{colour}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.6\"/>",
                self.x(*x),
                self.y(*y)
            );
        }
    }

    fn path(&self, points: &[(f64, f64)]) -> String {
        let mut path = String::new();
        for (i, (x, y)) in points.iter().enumerate() {
            let _ = write!(path, "{}{:.1} {:.1}", if i == 0 { 'M' } else { 'L' }, self.x(*x), self.y(*y));
        }
        path
    }
}

/// At most [`POINTS_MAX`] points: means of buckets.
fn shown(series: &Series) -> Vec<(f64, f64)> {
    let size = series.points.len().div_ceil(POINTS_MAX).max(1);
    let mean = |part: &[(f64, f64)]| {
        let n = part.len() as f64;
        (part.iter().map(|p| p.0).sum::<f64>() / n, part.iter().map(|p| p.1).sum::<f64>() / n)
    };
    series.points.chunks(size).map(mean).collect()
}

/// Local straight-line fit over about a twentieth of the points: a running mean that is not dragged about at the ends.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let reach = points.len() / 40;
    let at = |i: usize| {
        let part = &points[i.saturating_sub(reach)..(i + reach + 1).min(points.len())];
        (points[i].0, fitted(part, points[i].0))
    };
    (0..points.len()).map(at).collect()
}

/// The least-squares line through `part`, at `x`.
fn fitted(part: &[(f64, f64)], x: f64) -> f64 {
    let n = part.len() as f64;
    let mean_x = part.iter().map(|p| p.0).sum::<f64>() / n;
    let mean_y = part.iter().map(|p| p.1).sum::<f64>() / n;
    let spread: f64 = part.iter().map(|p| (p.0 - mean_x).powi(2)).sum();
    let slope = part.iter().map(|p| (p.0 - mean_x) * (p.1 - mean_y)).sum::<f64>() / spread;
    if slope.is_finite() { mean_y + slope * (x - mean_x) } else { mean_y }
}

fn extent(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values
        .fold(None, |range, x| {
            Some(range.map_or((x, x), |(low, high): (f64, f64)| (low.min(x), high.max(x))))
        })
        .unwrap_or((0.0, 1.0))
}

/// Round values inside the range, about `wanted` of them.
fn ticks(low: f64, high: f64, wanted: u32) -> Vec<f64> {
    let rough = (high - low) / f64::from(wanted);
    if !(rough > 0.0 && rough.is_finite()) {
        return vec![low];
    }
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|m| m * power)
        .find(|step| *step >= rough * 0.999)
        .unwrap_or(10.0 * power);
    let (first, last) = ((low / step - 1e-9).ceil() as i64, (high / step + 1e-9).floor() as i64);
    // 3 · 0.1 is not 0.3: round to the step's digits.
    let digits = (-step.log10().floor()).max(0.0) as i32 + 1;
    let round = |x: f64| (x * 10f64.powi(digits)).round() / 10f64.powi(digits);
    (first..=last).map(|i| if digits < 15 { round(i as f64 * step) } else { i as f64 * step }).collect()
}

fn short(label: &str) -> String {
    match label.char_indices().nth(11) {
        Some((at, _)) if label.chars().count() > 12 => format!("{}…", &label[..at]),
        _ => label.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(0.0, 1.0, 4), [0.0, 0.5, 1.0]);
        assert_eq!(ticks(0.31, 0.52, 4), [0.4, 0.5]);
        assert_eq!(ticks(0.0, 300.0, 4), [0.0, 100.0, 200.0, 300.0]);
        assert_eq!(ticks(5.0, 5.0, 4), [5.0]);
    }

    #[test]
    fn smoothing_keeps_a_straight_line_to_its_ends() {
        let line: Vec<(f64, f64)> = (0..200).map(|i| (f64::from(i), 2.0 * f64::from(i))).collect();
        assert!(smooth(&line).iter().zip(&line).all(|(a, b)| (a.1 - b.1).abs() <= 1e-9));
    }

    #[test]
    fn labels_do_not_overlap_and_stay_inside() {
        let series = |label: &str, y: f64| Series {
            label: label.into(),
            points: vec![(0.0, 0.0), (1.0, y)],
            ..Series::default()
        };
        let chart = Chart {
            title: "t",
            series: vec![series("a", 1.0), series("b", 0.99), series("c", 0.0)],
            ..Chart::default()
        };
        let svg = chart.svg();
        let mut ys: Vec<f64> = svg
            .split("class=\"end")
            .skip(1)
            .map(|part| {
                let at = part.split(" y=\"").nth(1).unwrap();
                at[..at.find('"').unwrap()].parse().unwrap()
            })
            .collect();
        ys.sort_by(f64::total_cmp);
        assert_eq!(ys.len(), 3);
        assert!(ys.windows(2).all(|pair| pair[1] - pair[0] >= 23.9), "{ys:?}");
        assert!(ys.iter().all(|y| (TOP..=HEIGHT).contains(y)), "{ys:?}");
    }

    #[test]
    fn odd_data_gives_numbers_and_not_nan() {
        for points in [vec![(3.0, 0.0)], vec![(1.0, 5.0), (2.0, 5.0)], vec![(0.0, -1e300), (1.0, 1e300)]] {
            let svg = Chart {
                title: "t",
                series: vec![Series { points, ..Series::default() }],
                ..Chart::default()
            }
            .svg();
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
        assert_eq!(Chart::default().card(), "");
    }
}
