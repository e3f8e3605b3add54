//! The roofline (Williams, Waterman, Patterson, CACM 52(4), 2009) as SVG: operations a second over operations a byte, both
//! logarithmic; under the slope of memory and the ceilings of the kernels' large product and of the arithmetic units.

use std::fmt::Write as _;

use serde_json::Value;

use super::Machine;

const LEFT: f64 = 70.0;
const TOP: f64 = 30.0;
const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 300.0;
const RIGHT: f64 = 30.0;
const BOTTOM: f64 = 44.0;

/// One row of the bench.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Point {
    /// Sequences at once.
    pub batch: u64,
    /// Operations a byte.
    pub intensity: f64,
    /// Operations a second.
    pub flops_per_s: f64,
}

impl Point {
    /// The point of a row of `bench decode`.
    pub(super) fn of(row: &Value) -> Self {
        let number = |key: &str| row[key].as_f64().unwrap_or(f64::NAN);
        Self {
            batch: row["batch"].as_u64().unwrap_or_default(),
            intensity: number("flops_per_step") / number("bytes_per_step"),
            flops_per_s: number("flops_per_s"),
        }
    }
}

/// The plot.
pub(super) fn svg(machine: &Machine, points: &[Point]) -> String {
    let axes = Axes::around(machine, points);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {:.0} {:.0}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"18\" font-weight=\"bold\">GFLOP/s over FLOP a byte, decoding</text>\n",
        LEFT + WIDTH + RIGHT,
        TOP + HEIGHT + BOTTOM
    );
    axes.grid(&mut out);
    axes.roofs(&mut out, machine);
    for point in points {
        let (x, y) = (axes.x(point.intensity), axes.y(point.flops_per_s));
        let roof = (point.intensity * machine.read_bytes_per_s).min(machine.gemm_flops_per_s);
        let _ = writeln!(
            out,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{y:.1}\" y2=\"{:.1}\" stroke=\"#b3364c\" stroke-dasharray=\"2 2\"/>\
             <circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"#b3364c\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\">B = {}: {:.0} %</text>",
            axes.y(roof),
            x + 8.0,
            y + 12.0,
            point.batch,
            100.0 * point.flops_per_s / roof
        );
    }
    out + "</svg>\n"
}

/// Powers of ten that the axes reach over.
struct Axes {
    x: (i32, i32),
    y: (i32, i32),
}

impl Axes {
    /// Axes that hold all points and where memory's slope meets the ceiling.
    fn around(machine: &Machine, points: &[Point]) -> Self {
        let reach = |values: &mut dyn Iterator<Item = f64>| {
            let logs: Vec<f64> =
                values.filter(|v| v.is_finite() && *v > 0.0).map(|v| v.log10().clamp(-30.0, 30.0)).collect();
            let low = logs.iter().copied().fold(f64::INFINITY, f64::min).floor() as i32;
            let high = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max).ceil() as i32;
            if logs.is_empty() { (0, 1) } else { (low, high.max(low + 1)) }
        };
        let ridge = machine.peak_flops_per_s / machine.read_bytes_per_s;
        let limits = [machine.gemm_flops_per_s, machine.peak_flops_per_s];
        Self {
            x: reach(&mut points.iter().map(|p| p.intensity).chain([ridge])),
            y: reach(&mut points.iter().map(|p| p.flops_per_s).chain(limits)),
        }
    }

    fn x(&self, value: f64) -> f64 {
        LEFT + WIDTH * share(self.x, value)
    }

    fn y(&self, value: f64) -> f64 {
        TOP + HEIGHT * (1.0 - share(self.y, value))
    }

    fn grid(&self, out: &mut String) {
        for power in self.x.0..=self.x.1 {
            let x = self.x(10f64.powi(power));
            let _ = writeln!(
                out,
                "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{:.1}\" stroke=\"#ddd\"/>\
                 <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#555\">{}</text>",
                TOP + HEIGHT,
                TOP + HEIGHT + 16.0,
                10f64.powi(power)
            );
        }
        for power in self.y.0..=self.y.1 {
            let y = self.y(10f64.powi(power));
            let _ = writeln!(
                out,
                "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#555\">{}</text>",
                LEFT + WIDTH,
                LEFT - 6.0,
                y + 4.0,
                10f64.powi(power - 9)
            );
        }
    }

    /// The slope of memory up to the highest ceiling, and the ceilings from where it meets them.
    fn roofs(&self, out: &mut String, machine: &Machine) {
        let (read, right) = (machine.read_bytes_per_s, 10f64.powi(self.x.1));
        let foot = 10f64.powi(self.x.0).max(10f64.powi(self.y.0) / read);
        let top = machine.peak_flops_per_s.max(machine.gemm_flops_per_s);
        self.line(out, (foot, foot * read), (top / read, top), "#1b6ca8");
        let label = format!("{:.1} GB/s", read / 1e9);
        let at = (foot * (top / read)).sqrt();
        self.label(out, (at, at * read), -60.0, &label);
        let ceilings = [
            (machine.gemm_flops_per_s, "product of 512×1024×1024"),
            (machine.peak_flops_per_s, "registers only"),
        ];
        for (flops, what) in ceilings {
            self.line(out, (flops / read, flops), (right, flops), "#2a9d5c");
            self.label(out, (flops / read, flops), -170.0, &format!("{what}: {:.0}", flops / 1e9));
        }
    }

    fn line(&self, out: &mut String, from: (f64, f64), to: (f64, f64), colour: &str) {
        let _ = writeln!(
            out,
            "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            self.x(from.0),
            self.y(from.1),
            self.x(to.0),
            self.y(to.1)
        );
    }

    fn label(&self, out: &mut String, at: (f64, f64), dx: f64, text: &str) {
        let (x, y) = (self.x(at.0) + dx, self.y(at.1) - 5.0);
        let _ =
            writeln!(out, "<text x=\"{:.1}\" y=\"{y:.1}\" fill=\"#555\">{text}</text>", x.max(LEFT + 4.0));
    }
}

/// Where `value` lies between two powers of ten; the nearer end where it lies outside.
fn share((low, high): (i32, i32), value: f64) -> f64 {
    ((value.log10() - f64::from(low)) / f64::from(high - low)).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use freewheel_kernels::Precision;

    use super::*;

    #[test]
    fn a_point_on_the_roof_is_drawn_on_it() {
        let machine = Machine {
            threads: 2,
            precision: Precision::Bf16,
            read_bytes: 1 << 28,
            read_bytes_per_s: 1e10,
            memory_bytes_per_s: 1e10,
            gemm_flops_per_s: 1e12,
            peak_flops_per_s: 1e13,
        };
        let on = Point { batch: 1, intensity: 1.0, flops_per_s: 1e10 };
        let below = Point { batch: 8, intensity: 10.0, flops_per_s: 5e10 };
        let text = svg(&machine, &[on, below]);
        // x from 1 to 1000 FLOP a byte, y from 10 to 10,000 GFLOP/s: three powers of ten each.
        assert!(text.contains("<circle cx=\"70.0\" cy=\"330.0\""), "{text}");
        assert!(text.contains("B = 1: 100 %") && text.contains("B = 8: 50 %"), "{text}");
        assert!(text.contains("x1=\"70.0\" y1=\"330.0\" x2=\"630.0\" y2=\"30.0\""), "memory's slope: {text}");
        let odd = Point { batch: 1, intensity: f64::NAN, flops_per_s: 0.0 };
        assert!(svg(&machine, &[odd]).ends_with("</svg>\n"), "nothing to draw is no error");
    }
}
