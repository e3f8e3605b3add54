//! Units behind a value: taken off, and compared where both sides give one.

use std::sync::LazyLock;

use regex::Regex;

use super::expr::Expr;
use super::lexer::Numeral;

/// A unit as written, and what it is if it is a known one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unit {
    text: String,
    known: Option<(&'static str, &'static str)>,
}

/// Spellings, dimension, size in the smallest unit of that system.
const UNITS: [(&[&str], &str, &str); 33] = [
    (&["m", "meter", "meters", "metre", "metres"], "length", "1"),
    (&["cm", "centimeter", "centimeters", "centimetres"], "length", "0.01"),
    (&["mm", "millimeter", "millimeters"], "length", "0.001"),
    (&["km", "kilometer", "kilometers", "kilometres"], "length", "1000"),
    (&["in", "inch", "inches"], "length_us", "1"),
    (&["ft", "foot", "feet"], "length_us", "12"),
    (&["yd", "yard", "yards"], "length_us", "36"),
    (&["mi", "mile", "miles"], "length_us", "63360"),
    (&["s", "sec", "second", "seconds"], "time", "1"),
    (&["min", "mins", "minute", "minutes"], "time", "60"),
    (&["h", "hr", "hrs", "hour", "hours"], "time", "3600"),
    (&["day", "days"], "time", "86400"),
    (&["week", "weeks"], "time", "604800"),
    (&["month", "months"], "months", "1"),
    (&["yr", "year", "years"], "months", "12"),
    (&["g", "gram", "grams"], "mass", "1"),
    (&["kg", "kilogram", "kilograms"], "mass", "1000"),
    (&["mg", "milligram", "milligrams"], "mass", "0.001"),
    (&["oz", "ounce", "ounces"], "mass_us", "1"),
    (&["lb", "lbs", "pound", "pounds"], "mass_us", "16"),
    (&["cent", "cents"], "money", "1"),
    (&["dollar", "dollars", "usd"], "money", "100"),
    (&["l", "liter", "liters", "litre", "litres"], "volume", "1000"),
    (&["ml", "milliliter", "milliliters"], "volume", "1"),
    (&["km/h", "kmh", "kph", "km per hour", "kilometers per hour"], "speed", "1"),
    (&["m/s", "mps", "meters per second"], "speed_ms", "1"),
    (&["mph", "miles per hour", "mi/h"], "speed_us", "1"),
    (&["deg", "degree", "degrees"], "angle", "1"),
    (&["rad", "radian", "radians"], "angle_rad", "1"),
    (&["n", "newton", "newtons"], "force", "1"),
    (&["j", "joule", "joules"], "energy", "1"),
    (&["w", "watt", "watts"], "power", "1"),
    (&["v", "volt", "volts"], "voltage", "1"),
];

static WRAPPED: LazyLock<Regex> = LazyLock::new(|| {
    let word = r"\\(?:text|textrm|textbf|textit|mathrm|mbox|hbox|operatorname)\s*\{([^{}]*)\}";
    let power = r"(?:\s*\^\s*\{?\s*-?\d\s*\}?)?";
    let gap = r"(?:\\[,;: ]|~|\s|/)*";
    Regex::new(&format!(r"^(.*[\d)\]}}!a-z]){gap}{word}({power}(?:{gap}{word}{power})*)\s*\.?$"))
        .expect("a fixed pattern")
});
static PLAIN: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"^(.*[\d)}!])(\s*)([A-Za-z]+(?:(?: |/| / )[A-Za-z]+){0,3})((?:\^\{?\d\}?)?)\s*\.?$")
        .expect("a fixed pattern")
});

/// Splits `text` into what stands before its unit, and the unit.
pub(crate) fn split(text: &str) -> Option<(&str, Unit)> {
    let text = text.trim();
    if let Some(groups) = WRAPPED.captures(text) {
        let name = format!("{}{}", &groups[2], groups.get(3).map_or("", |m| m.as_str()));
        return Some((groups.get(1)?.as_str(), Unit::new(&name)));
    }
    let groups = PLAIN.captures(text)?;
    let name = &groups[3];
    let unit = Unit::new(&format!("{name}{}", &groups[4]));
    let spaced = !groups[2].is_empty();
    let words: Vec<_> = name.split([' ', '/']).filter(|w| !w.is_empty()).collect();
    let linking = |w: &&str| {
        [
            "or", "and", "is", "not", "maybe", "to", "but", "if", "then", "when", "pi", "sqrt", "sin", "cos",
            "tan", "ln", "log",
        ]
        .contains(&w.to_lowercase().as_str())
    };
    if words.iter().any(linking) {
        return None;
    }
    let plausible = if name.len() == 1 {
        spaced && unit.known.is_some()
    } else {
        unit.known.is_some() || name.len() >= 4
    };
    plausible.then(|| (groups.get(1).map_or("", |m| m.as_str()), unit))
}

impl Unit {
    fn new(text: &str) -> Self {
        let spaces = text.replace(['\\', '{', '}', '~', ',', '$'], " ");
        let name = spaces.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
        let known = UNITS
            .iter()
            .find(|(names, ..)| names.contains(&name.as_str()))
            .map(|(_, dim, size)| (*dim, *size));
        Self { text: name, known }
    }

    /// Whether 1 of `self` can be said in `other`; if the sizes differ both have to be [scaled](Self::scaled).
    pub(crate) fn agrees(&self, other: &Self) -> bool {
        match (self.known, other.known) {
            (Some((a, _)), Some((b, _))) => a == b,
            // "5 apples" and "5": what is unknown is taken to be a name for the things counted.
            _ => self.text == other.text || self.known.is_none() || other.known.is_none(),
        }
    }

    /// `value` in the base unit of the dimension.
    pub(crate) fn scaled(&self, value: &Expr) -> Expr {
        match self.known {
            Some((_, size)) if size != "1" => {
                Expr::Product(vec![value.clone(), Expr::Number(Numeral::new(size))])
            }
            _ => value.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_come_off_and_variables_stay() {
        let before = |text| split(text).map(|(value, _)| value.trim().to_owned());
        assert_eq!(before("5 cm").as_deref(), Some("5"));
        assert_eq!(before("5cm").as_deref(), Some("5"));
        assert_eq!(before(r"5\text{ cm}^2").as_deref(), Some("5"));
        assert_eq!(before("12 km/h").as_deref(), Some("12"));
        assert_eq!(before("18 eggs per day").as_deref(), Some("18"));
        for formula in ["5x", "5 x", "2 pi", "3ab", "x + 1", "5 or 6", "5m"] {
            assert_eq!(before(formula), None, "{formula}");
        }
    }
}
