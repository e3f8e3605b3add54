//! Escaping, and numbers as people read them.

use std::fmt::Write as _;

/// Text for element content and quoted attributes. Control characters that HTML forbids become visible.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            // Bidirectional overrides could make a page read other than it is.
            c if c.is_control() || matches!(c, '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}') => {
                let _ = write!(out, "\\u{{{:x}}}", c as u32);
            }
            c => out.push(c),
        }
    }
    out
}

/// About three significant digits: 0.913, 12.4, 1.2e-5, 48.1k.
pub(super) fn number(x: f64) -> String {
    match x.abs() {
        0.0 => "0".to_owned(),
        a if a < 1e-3 => format!("{x:.1e}").replace(".0e", "e"),
        a if a < 0.9995 => trimmed(format!("{x:.3}")),
        a if a < 9.995 => trimmed(format!("{x:.2}")),
        a if a < 999.5 => trimmed(format!("{x:.1}")),
        _ => count(x),
    }
}

/// Counts: 7, 1,204, 48.1k, 3.20M.
pub(super) fn count(x: f64) -> String {
    match x.abs() {
        a if a < 99_999.5 && (x.fract() == 0.0 || a >= 1000.0) => whole(x),
        a if a < 1000.0 => trimmed(format!("{x:.1}")),
        a if a < 1e6 => format!("{:.0}k", x / 1e3),
        a if a < 1e9 => format!("{:.2}M", x / 1e6),
        _ => format!("{:.2}G", x / 1e9),
    }
}

/// A whole number in full, thousands apart.
pub(super) fn whole(x: f64) -> String {
    let digits = format!("{:.0}", x.abs());
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    if x <= -0.5 { format!("−{out}") } else { out }
}

/// Seconds as 12.3 s, 4 min 05 s, 2 h 07 min.
pub(super) fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    match seconds {
        s if s < 59.95 => format!("{} s", trimmed(format!("{s:.1}"))),
        s if s < 3599.5 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

fn trimmed(text: String) -> String {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        let cases = [
            (0.0, "0"),
            (0.9133, "0.913"),
            (0.5, "0.5"),
            (2.3449, "2.34"),
            (12.0, "12"),
            (123.456, "123.5"),
            (1.234e-5, "1.2e-5"),
            (3e-4, "3e-4"),
        ];
        cases.iter().for_each(|(x, text)| assert_eq!(&number(*x), text));
        let counts =
            [(7.0, "7"), (1204.0, "1,204"), (1204.6, "1,205"), (481_234.0, "481k"), (3_200_000.0, "3.20M")];
        counts.iter().for_each(|(x, text)| assert_eq!(&count(*x), text));
        assert_eq!(whole(-1234567.0), "−1,234,567");
        assert_eq!(
            [duration(12.34), duration(245.0), duration(7620.0)],
            ["12.3 s", "4 min 05 s", "2 h 07 min"]
        );
    }

    #[test]
    fn no_character_of_a_completion_is_markup() {
        let text = escape("<script>'&\"\u{0}\u{202E}</script>");
        assert_eq!(text, "&lt;script&gt;&#39;&amp;&quot;\\u{0}\\u{202e}&lt;/script&gt;");
    }
}
