//! LaTeX or plain mathematical text → tokens.

use crate::verifiers::ratio::Ratio;

/// Longest text that is read as one expression, in bytes.
pub(crate) const EXPRESSION_BYTES_MAX: usize = 4096;

/// One token, and whether white space stood before it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Token {
    pub(crate) kind: Kind,
    pub(crate) spaced: bool,
}

/// Kinds of token.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Kind {
    /// A number as written, thousands separators removed.
    Number(Numeral),
    /// A variable.
    Symbol(String),
    /// A LaTeX command or function name without its backslash.
    Command(String),
    /// Words: `\text{…}` or a plain word.
    Text(String),
    /// A character that stands for itself: `+ - * / ^ _ ! | ( ) [ ] { } = < > & %`.
    Char(char),
    /// `\{` and `\}`.
    SetOpen,
    /// See [`Kind::SetOpen`].
    SetClose,
    /// `,` `;` "and" "or".
    Comma,
    /// `\\` in matrices.
    Row,
}

/// Digits as written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Numeral {
    /// Digits with at most one point.
    pub(crate) digits: String,
    /// Exact value, if it fits.
    pub(crate) exact: Option<Ratio>,
}

impl Numeral {
    pub(crate) fn new(digits: &str) -> Self {
        Self { digits: digits.to_owned(), exact: Ratio::decimal(digits) }
    }

    /// Digits after the point; `None` for an integer.
    pub(crate) fn decimals(&self) -> Option<usize> {
        self.digits.find('.').map(|at| self.digits.len() - at - 1)
    }

    pub(crate) fn to_f64(&self) -> f64 {
        self.digits.parse().unwrap_or(f64::NAN)
    }
}

/// How letters and commas are read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reading {
    /// In formulas a run of letters is a product of variables; in prose a word.
    pub(crate) formula: bool,
    /// `1,234` is one number.
    pub(crate) thousands: bool,
}

const FUNCTIONS: [&str; 27] = [
    "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "asin", "acos", "atan", "sin", "cos", "tan", "cot",
    "sec", "csc", "ln", "log", "exp", "sqrt", "pi", "infinity", "infty", "inf", "oo", "min", "max", "gcd",
];
const SPACING: [&str; 22] = [
    "left",
    "right",
    "big",
    "Big",
    "bigg",
    "Bigg",
    "bigl",
    "bigr",
    "Bigl",
    "Bigr",
    "middle",
    "quad",
    "qquad",
    "displaystyle",
    "textstyle",
    "limits",
    "nolimits",
    "hfill",
    "hspace",
    "rm",
    "bf",
    "it",
];
const TEXT: [&str; 14] = [
    "text",
    "textbf",
    "textit",
    "textrm",
    "texttt",
    "textnormal",
    "mbox",
    "mathrm",
    "mathbf",
    "mathit",
    "operatorname",
    "mathsf",
    "hbox",
    "bm",
];
const PROSE_WORDS: [&str; 24] = [
    "no", "is", "so", "it", "of", "to", "in", "at", "an", "if", "do", "we", "he", "me", "my", "by", "as",
    "be", "up", "us", "go", "am", "on", "ok",
];

/// Splits `text` into tokens; `None` if it is too long or holds what no formula holds.
pub(crate) fn lex(text: &str, reading: Reading) -> Option<Vec<Token>> {
    if text.len() > EXPRESSION_BYTES_MAX {
        return None;
    }
    let text = simplify(text);
    let chars: Vec<char> = text.chars().collect();
    let mut lexer = Lexer { chars: &chars, at: 0, depth: 0, spaced: false, tokens: Vec::new(), reading };
    while lexer.at < chars.len() {
        lexer.step()?;
    }
    Some(lexer.tokens)
}

/// Unicode forms as their ASCII or LaTeX equivalents.
fn simplify(text: &str) -> String {
    let text = text.replace("{,}", ",").replace("\\,", " ").replace("\\!", "");
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\u{FF01}'..='\u{FF5E}' => out.push(char::from_u32(u32::from(c) - 0xFEE0).unwrap_or(c)),
            '−' | '–' | '﹣' => out.push('-'),
            '×' | '⋅' | '·' | '∙' | '∗' => out.push('*'),
            '÷' | '∕' => out.push('/'),
            '≤' | '⩽' => out.push_str(" \\le "),
            '≥' | '⩾' => out.push_str(" \\ge "),
            '≠' => out.push_str(" \\ne "),
            '≈' => out.push_str(" \\approx "),
            '±' => out.push_str(" \\pm "),
            '√' => out.push_str("\\sqrt "),
            'π' => out.push_str("\\pi "),
            '∞' => out.push_str("\\infty "),
            '∪' => out.push_str("\\cup "),
            '∩' => out.push_str("\\cap "),
            '∅' => out.push_str("\\emptyset "),
            '∈' => out.push_str("\\in "),
            'ℝ' => out.push_str("\\R "),
            'θ' => out.push_str("\\theta "),
            'α' => out.push_str("\\alpha "),
            'β' => out.push_str("\\beta "),
            'λ' => out.push_str("\\lambda "),
            '°' => out.push_str("\\degree "),
            '²' => out.push_str("^2"),
            '³' => out.push_str("^3"),
            '⁴' => out.push_str("^4"),
            '½' => out.push_str(" 1/2"),
            '¼' => out.push_str(" 1/4"),
            '¾' => out.push_str(" 3/4"),
            '⅓' => out.push_str(" 1/3"),
            '⅔' => out.push_str(" 2/3"),
            '\u{A0}' | '\u{2009}' | '\u{202F}' => out.push(' '),
            other => out.push(decimal_digit(other).unwrap_or(other)),
        }
    }
    out
}

/// Digits of the common scripts, as ASCII.
fn decimal_digit(c: char) -> Option<char> {
    const ZEROS: [u32; 7] = [0x0660, 0x06F0, 0x0966, 0x09E6, 0x0E50, 0x1D7CE, 0x1D7EC];
    let c = u32::from(c);
    ZEROS
        .iter()
        .find(|zero| (**zero..**zero + 10).contains(&c))
        .and_then(|zero| char::from_digit(c - zero, 10))
}

struct Lexer<'a> {
    chars: &'a [char],
    at: usize,
    /// Open round, square and set brackets: inside them a comma separates items.
    depth: usize,
    spaced: bool,
    tokens: Vec<Token>,
    reading: Reading,
}

impl Lexer<'_> {
    fn peek(&self, ahead: usize) -> Option<char> {
        self.chars.get(self.at + ahead).copied()
    }

    fn push(&mut self, kind: Kind) {
        self.tokens.push(Token { kind, spaced: self.spaced });
        self.spaced = false;
    }

    fn step(&mut self) -> Option<()> {
        let c = self.peek(0)?;
        match c {
            c if c.is_whitespace() || c == '~' || c == '$' => {
                self.at += 1;
                self.spaced = true;
            }
            '0'..='9' => self.number(),
            '.' if self.peek(1).is_some_and(|c| c.is_ascii_digit()) => self.number(),
            '\\' => self.command()?,
            'a'..='z' | 'A'..='Z' => self.letters(),
            ',' | ';' => self.single(Kind::Comma),
            '(' | '[' => {
                self.depth += 1;
                self.single(Kind::Char(c));
            }
            ')' | ']' => {
                self.depth = self.depth.saturating_sub(1);
                self.single(Kind::Char(c));
            }
            '*' if self.peek(1) == Some('*') => {
                self.at += 1;
                self.single(Kind::Char('^'));
            }
            '<' | '>' | '!' if self.peek(1) == Some('=') => {
                let name = match c {
                    '<' => "le",
                    '>' => "ge",
                    _ => "ne",
                };
                self.at += 1;
                self.single(Kind::Command(name.into()));
            }
            '+' | '-' | '*' | '/' | '^' | '_' | '!' | '|' | '{' | '}' | '=' | '<' | '>' | '&' | '%'
            | '\'' => {
                self.single(Kind::Char(c));
            }
            _ => return None,
        }
        Some(())
    }

    fn single(&mut self, kind: Kind) {
        self.at += 1;
        self.push(kind);
    }

    fn number(&mut self) {
        let mut digits = self.digits();
        if self.reading.thousands && (1..=3).contains(&digits.len()) {
            let commas = self.depth == 0 && self.group(',');
            let separator = if commas { ',' } else { ' ' };
            while self.group(separator) {
                self.at += 1;
                digits.push_str(&self.digits());
            }
        }
        if self.peek(0) == Some('.') && self.peek(1).is_some_and(|c| c.is_ascii_digit()) {
            self.at += 1;
            digits.push('.');
            digits.push_str(&self.digits());
        } else if self.peek(0) == Some('.') && !self.peek(1).is_some_and(|c| c.is_ascii_alphabetic()) {
            self.at += 1; // "5." is 5
        }
        let numeral = Numeral::new(&digits);
        self.push(Kind::Number(numeral));
        self.exponent();
    }

    /// `e3` or `E-4` right behind a number, as programs print it: becomes `* 10 ^ (…)`.
    fn exponent(&mut self) {
        let Some('e' | 'E') = self.peek(0) else { return };
        let sign = usize::from(matches!(self.peek(1), Some('-' | '+')));
        let digits = self.chars[self.at + 1 + sign..].iter().take_while(|c| c.is_ascii_digit()).count();
        let after = self.peek(1 + sign + digits);
        if digits == 0 || digits > 4 || after.is_some_and(|c| c.is_ascii_alphanumeric()) {
            return;
        }
        let negative = self.peek(1) == Some('-');
        self.at += 1 + sign;
        let power = self.digits();
        for kind in [Kind::Char('*'), Kind::Number(Numeral::new("10")), Kind::Char('^'), Kind::Char('{')] {
            self.push(kind);
        }
        if negative {
            self.push(Kind::Char('-'));
        }
        self.push(Kind::Number(Numeral::new(&power)));
        self.push(Kind::Char('}'));
    }

    fn digits(&mut self) -> String {
        let from = self.at;
        while self.peek(0).is_some_and(|c| c.is_ascii_digit()) {
            self.at += 1;
        }
        self.chars[from..self.at].iter().collect()
    }

    /// Whether `separator` and exactly three digits follow.
    fn group(&self, separator: char) -> bool {
        self.peek(0) == Some(separator)
            && (1..=3).all(|i| self.peek(i).is_some_and(|c| c.is_ascii_digit()))
            && !self.peek(4).is_some_and(|c| c.is_ascii_digit() || (separator == ' ' && c == '/'))
    }

    fn word(&mut self) -> String {
        let from = self.at;
        while self.peek(0).is_some_and(|c| c.is_ascii_alphabetic()) {
            self.at += 1;
        }
        self.chars[from..self.at].iter().collect()
    }

    fn letters(&mut self) {
        let from = self.at;
        let word = self.word();
        let lower = word.to_lowercase();
        if lower == "or" || lower == "and" {
            self.push(Kind::Comma);
        } else if lower == "percent" {
            self.push(Kind::Char('%'));
        } else if FUNCTIONS.contains(&word.as_str()) {
            self.push(Kind::Command(word));
        } else if word.len() == 1 {
            self.push(Kind::Symbol(word));
        } else if self.reading.formula && word.len() <= 3
            || word.len() == 2 && !PROSE_WORDS.contains(&lower.as_str())
        {
            // A known name at the front: "sinx", "pir"; else a product of variables.
            let known = FUNCTIONS.iter().find(|name| word.starts_with(**name));
            let len = known.map_or(1, |name| name.len());
            self.at = from + len;
            let head = word[..len].to_owned();
            self.push(if known.is_some() { Kind::Command(head) } else { Kind::Symbol(head) });
        } else if let Some(name) =
            FUNCTIONS.iter().find(|name| self.reading.formula && word.starts_with(**name))
        {
            self.at = from + name.len();
            self.push(Kind::Command((*name).to_owned()));
        } else {
            self.push(Kind::Text(word));
        }
    }

    fn command(&mut self) -> Option<()> {
        self.at += 1;
        let Some(c) = self.peek(0) else { return Some(()) };
        if !c.is_ascii_alphabetic() {
            self.at += 1;
            match c {
                '{' => {
                    self.depth += 1;
                    self.push(Kind::SetOpen);
                }
                '}' => {
                    self.depth = self.depth.saturating_sub(1);
                    self.push(Kind::SetClose);
                }
                '\\' => self.push(Kind::Row),
                '%' => self.push(Kind::Char('%')),
                '|' => self.push(Kind::Char('|')),
                '(' | ')' | '[' | ']' | ' ' | ':' | ';' | '>' | '$' | '&' | '#' | '_' => self.spaced = true,
                _ => return None,
            }
            return Some(());
        }
        let name = self.word();
        if SPACING.contains(&name.as_str()) {
            self.spaced = true;
        } else if TEXT.contains(&name.as_str()) {
            self.text_group()?;
        } else {
            self.push(named(&name)?);
        }
        Some(())
    }

    /// `\text{…}` with balanced braces, or the bare word behind it.
    fn text_group(&mut self) -> Option<()> {
        while self.peek(0).is_some_and(char::is_whitespace) {
            self.at += 1;
        }
        let inner: String = if self.peek(0) == Some('{') {
            let close = matching_brace(&self.chars[self.at..])?;
            let inner = self.chars[self.at + 1..self.at + close].iter().collect();
            self.at += close + 1;
            inner
        } else {
            let c = self.peek(0)?;
            self.at += 1;
            c.to_string()
        };
        let trimmed = inner.trim();
        let lower = trimmed.to_lowercase();
        if trimmed.is_empty() {
            self.spaced = true;
        } else if lower == "or" || lower == "and" || lower == "," {
            self.push(Kind::Comma);
        } else if FUNCTIONS.contains(&trimmed) {
            self.push(Kind::Command(trimmed.to_owned()));
        } else if trimmed.bytes().all(|b| b.is_ascii_digit() || b == b'.')
            && Ratio::decimal(trimmed).is_some()
        {
            self.push(Kind::Number(Numeral::new(trimmed)));
        } else if trimmed == "%" || lower == "percent" {
            self.push(Kind::Char('%'));
        } else {
            self.push(Kind::Text(trimmed.to_owned()));
        }
        Some(())
    }
}

/// What a command stands for, under one name for each meaning; `None` for what no answer holds.
fn named(name: &str) -> Option<Kind> {
    let command = |name: &str| Kind::Command(name.to_owned());
    Some(match name {
        "lt" => Kind::Char('<'),
        "gt" => Kind::Char('>'),
        "lbrace" => Kind::SetOpen,
        "rbrace" => Kind::SetClose,
        "lbrack" => Kind::Char('['),
        "rbrack" => Kind::Char(']'),
        "lvert" | "rvert" | "vert" | "mid" => Kind::Char('|'),
        "lor" | "vee" => Kind::Comma,
        "dfrac" | "tfrac" | "cfrac" => command("frac"),
        "leq" | "leqslant" => command("le"),
        "geq" | "geqslant" => command("ge"),
        "neq" => command("ne"),
        "varnothing" => command("emptyset"),
        "arg" | "det" => return None,
        other => command(other),
    })
}

/// Index of the brace that closes the one `chars` starts with.
pub(crate) fn matching_brace(chars: &[char]) -> Option<usize> {
    let mut depth = 0usize;
    let mut escaped = false;
    for (i, c) in chars.iter().enumerate() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '{' => depth += 1,
            '}' => {
                depth -= 1;
                if depth == 0 {
                    return Some(i);
                }
            }
            _ => {}
        }
    }
    None
}
