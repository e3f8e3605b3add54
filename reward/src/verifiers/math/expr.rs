//! The syntax tree of an answer, and its parser.

use super::lexer::{Kind, Numeral, Reading, Token, lex};

/// Deepest nesting that is followed.
const DEPTH_MAX: usize = 96;

/// An answer as parsed.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Expr {
    Number(Numeral),
    Symbol(String),
    Pi,
    E,
    Infinity,
    Neg(Box<Expr>),
    Sum(Vec<Expr>),
    Product(Vec<Expr>),
    Quotient(Box<Expr>, Box<Expr>),
    Power(Box<Expr>, Box<Expr>),
    Call(Function, Box<Expr>),
    /// Choose: n over k.
    Binomial(Box<Expr>, Box<Expr>),
    /// `log` with a base: base, argument.
    LogBase(Box<Expr>, Box<Expr>),
    Factorial(Box<Expr>),
    Percent(Box<Expr>),
    Degrees(Box<Expr>),
    /// `a ± b`, or `∓`: the flag is true for plus in the first of both readings.
    PlusMinus(Box<Expr>, Box<Expr>, bool),
    /// Items between brackets as written: tuple, interval, vector.
    Bracket(char, Vec<Expr>, char),
    Set(Vec<Expr>),
    /// Items between commas, without brackets.
    List(Vec<Expr>),
    Union(Vec<Expr>),
    /// Set difference.
    Without(Box<Expr>, Box<Expr>),
    Reals,
    Matrix(Vec<Vec<Expr>>),
    /// `a < b <= c`: one more operand than operators.
    Relation(Vec<Expr>, Vec<Relation>),
    Text(String),
}

/// Functions of one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Function {
    Sqrt,
    Abs,
    Floor,
    Ceil,
    Exp,
    Ln,
    Log10,
    Sin,
    Cos,
    Tan,
    Cot,
    Sec,
    Csc,
    Asin,
    Acos,
    Atan,
    Sinh,
    Cosh,
    Tanh,
}

/// Relations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Relation {
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    In,
}

impl Relation {
    /// The relation read from right to left.
    pub(crate) fn flipped(self) -> Self {
        match self {
            Self::Less => Self::Greater,
            Self::LessEqual => Self::GreaterEqual,
            Self::Greater => Self::Less,
            Self::GreaterEqual => Self::LessEqual,
            same => same,
        }
    }
}

/// Parses all of `text`; `None` if it is not a mathematical answer.
pub(crate) fn parse(text: &str, reading: Reading) -> Option<Expr> {
    let tokens = lex(text, reading)?;
    let mut parser = Parser { tokens: &tokens, at: 0, depth: 0, bars: 0 };
    let expr = parser.list(&[])?;
    (parser.at == tokens.len()).then_some(expr)
}

struct Parser<'a> {
    tokens: &'a [Token],
    at: usize,
    depth: usize,
    /// Open `|`: a bar then closes.
    bars: usize,
}

impl Parser<'_> {
    fn kind(&self) -> Option<&Kind> {
        self.tokens.get(self.at).map(|token| &token.kind)
    }

    fn is_char(&self, c: char) -> bool {
        self.kind() == Some(&Kind::Char(c))
    }

    fn is_command(&self, name: &str) -> bool {
        matches!(self.kind(), Some(Kind::Command(command)) if command == name)
    }

    fn eat(&mut self, kind: &Kind) -> bool {
        let found = self.kind() == Some(kind);
        self.at += usize::from(found);
        found
    }

    fn eat_char(&mut self, c: char) -> bool {
        self.eat(&Kind::Char(c))
    }

    fn eat_command(&mut self, name: &str) -> bool {
        let found = self.is_command(name);
        self.at += usize::from(found);
        found
    }

    fn deeper<T>(&mut self, inner: impl FnOnce(&mut Self) -> Option<T>) -> Option<T> {
        if self.depth == DEPTH_MAX {
            return None;
        }
        self.depth += 1;
        let result = inner(self);
        self.depth -= 1;
        result
    }

    /// Comma-separated answers up to one of `ends` or the end.
    fn list(&mut self, ends: &[Kind]) -> Option<Expr> {
        let mut items = self.items(ends)?;
        if items.len() == 1 { items.pop() } else { Some(Expr::List(items)) }
    }

    fn items(&mut self, ends: &[Kind]) -> Option<Vec<Expr>> {
        let mut items = vec![self.relation()?];
        while self.eat(&Kind::Comma) {
            // "1, 2, and 3" has two separators in a row.
            self.eat(&Kind::Comma);
            items.push(self.relation()?);
        }
        let done = self.kind().is_none_or(|kind| ends.contains(kind));
        done.then_some(items)
    }

    fn relation(&mut self) -> Option<Expr> {
        let mut operands = vec![self.union()?];
        let mut relations = Vec::new();
        while let Some(relation) = self.eat_relation() {
            relations.push(relation);
            operands.push(self.union()?);
        }
        if relations.is_empty() { operands.pop() } else { Some(Expr::Relation(operands, relations)) }
    }

    fn eat_relation(&mut self) -> Option<Relation> {
        let relation = match self.kind()? {
            Kind::Char('=') => Relation::Equal,
            Kind::Char('<') => Relation::Less,
            Kind::Char('>') => Relation::Greater,
            Kind::Command(name) => match name.as_str() {
                "le" => Relation::LessEqual,
                "ge" => Relation::GreaterEqual,
                "ne" => Relation::NotEqual,
                "in" => Relation::In,
                "approx" | "equiv" | "sim" => Relation::Equal,
                _ => return None,
            },
            _ => return None,
        };
        self.at += 1;
        Some(relation)
    }

    fn union(&mut self) -> Option<Expr> {
        let mut left = self.sum()?;
        loop {
            if self.eat_command("cup") {
                let right = self.sum()?;
                left = match left {
                    Expr::Union(mut parts) => {
                        parts.push(right);
                        Expr::Union(parts)
                    }
                    other => Expr::Union(vec![other, right]),
                };
            } else if self.eat_command("setminus") || self.eat_command("backslash") {
                let right = self.sum()?;
                left = Expr::Without(Box::new(left), Box::new(right));
            } else {
                return Some(left);
            }
        }
    }

    fn sum(&mut self) -> Option<Expr> {
        let mut terms = Vec::new();
        let mut left: Option<Expr> = None;
        loop {
            let first = terms.is_empty() && left.is_none();
            if self.eat_char('+') {
                terms.push(self.product()?);
            } else if self.eat_char('-') {
                terms.push(Expr::Neg(Box::new(self.product()?)));
            } else if self.is_command("pm") || self.is_command("mp") {
                let plus = self.is_command("pm");
                self.at += 1;
                let right = self.product()?;
                let before = fold_sum(left.take(), std::mem::take(&mut terms));
                let zero = || Expr::Number(Numeral::new("0"));
                left = Some(Expr::PlusMinus(Box::new(before.unwrap_or_else(zero)), Box::new(right), plus));
            } else if first {
                terms.push(self.product()?);
            } else {
                return fold_sum(left, terms);
            }
        }
    }

    fn product(&mut self) -> Option<Expr> {
        self.deeper(|p| {
            let mut left = p.signed()?;
            loop {
                let explicit = p.eat_char('*')
                    || p.eat_command("times")
                    || p.eat_command("cdot")
                    || p.eat_command("ast");
                if explicit {
                    left = times(left, p.signed()?);
                } else if p.eat_char('/') || p.eat_command("div") {
                    left = Expr::Quotient(Box::new(left), Box::new(p.signed()?));
                } else if !matches!(left, Expr::Text(_)) && p.starts_factor() {
                    let fraction = p.is_command("frac");
                    let right = p.power()?;
                    left = if fraction && is_mixed(&left, &right) {
                        Expr::Sum(vec![left, right])
                    } else {
                        times(left, right)
                    };
                } else {
                    return Some(left);
                }
            }
        })
    }

    fn signed(&mut self) -> Option<Expr> {
        if self.eat_char('-') {
            return Some(Expr::Neg(Box::new(self.deeper(Self::signed)?)));
        }
        if self.eat_char('+') {
            return self.deeper(Self::signed);
        }
        self.mixed_or_power()
    }

    /// `2 1/3`: two and a third.
    fn mixed_or_power(&mut self) -> Option<Expr> {
        if let [
            Token { kind: Kind::Number(whole), .. },
            Token { kind: Kind::Number(num), spaced: true },
            Token { kind: Kind::Char('/'), .. },
            Token { kind: Kind::Number(den), .. },
            ..,
        ] = &self.tokens[self.at..]
            && [whole, num, den].iter().all(|n| n.decimals().is_none())
            && num.to_f64() < den.to_f64()
        {
            let fraction =
                Expr::Quotient(Box::new(Expr::Number(num.clone())), Box::new(Expr::Number(den.clone())));
            let value = Expr::Sum(vec![Expr::Number(whole.clone()), fraction]);
            self.at += 4;
            return Some(value);
        }
        self.power()
    }

    /// Whether the next token can be multiplied without a sign.
    fn starts_factor(&self) -> bool {
        match self.kind() {
            Some(Kind::Symbol(_) | Kind::Char('(' | '{')) => true,
            Some(Kind::Char('|')) => self.bars == 0,
            Some(Kind::Number(_)) => {
                matches!(self.tokens[self.at - 1].kind, Kind::Char(')' | '}')) && !self.tokens[self.at].spaced
            }
            Some(Kind::Command(name)) => {
                Function::named(name).is_some()
                    || ["frac", "sqrt", "pi", "binom", "lfloor", "lceil"].contains(&name.as_str())
                    || greek(name)
            }
            _ => false,
        }
    }

    fn power(&mut self) -> Option<Expr> {
        let base = self.postfix()?;
        if !self.eat_char('^') {
            return Some(base);
        }
        if let Some(degrees) = self.degree_mark() {
            return degrees.then(|| Expr::Degrees(Box::new(base)));
        }
        let exponent = self.deeper(Self::exponent)?;
        let power = Expr::Power(Box::new(base), Box::new(exponent));
        Some(self.marks(power))
    }

    /// `^\circ` or `^{\circ}` behind the caret.
    fn degree_mark(&mut self) -> Option<bool> {
        let braces = self.is_char('{')
            && matches!(&self.tokens.get(self.at + 1)?.kind, Kind::Command(n) if n == "circ");
        if braces {
            self.at += 2;
            return Some(self.eat_char('}'));
        }
        self.eat_command("circ").then_some(true)
    }

    /// One digit, one symbol, a group or a signed factor; `^` is right-associative.
    fn exponent(&mut self) -> Option<Expr> {
        if self.eat_char('-') {
            return Some(Expr::Neg(Box::new(self.deeper(Self::exponent)?)));
        }
        self.power()
    }

    fn postfix(&mut self) -> Option<Expr> {
        let base = self.primary()?;
        Some(self.marks(base))
    }

    /// `!`, `%` and `°` behind a value.
    fn marks(&mut self, mut value: Expr) -> Expr {
        loop {
            if self.eat_char('!') {
                value = Expr::Factorial(Box::new(value));
            } else if self.eat_char('%') {
                value = Expr::Percent(Box::new(value));
            } else if self.eat_command("degree") || self.eat_command("degrees") {
                value = Expr::Degrees(Box::new(value));
            } else {
                return value;
            }
        }
    }

    fn primary(&mut self) -> Option<Expr> {
        let kind = self.kind()?.clone();
        self.at += 1;
        match kind {
            Kind::Number(numeral) => Some(Expr::Number(numeral)),
            Kind::Symbol(name) => self.symbol(name),
            Kind::Text(text) => Some(Expr::Text(text)),
            Kind::Char('{') => {
                let inner = self.deeper(|p| p.list(&[Kind::Char('}')]))?;
                self.eat_char('}').then_some(inner)
            }
            Kind::Char(open @ ('(' | '[')) => self.bracket(open),
            Kind::Char('|') => {
                self.bars += 1;
                let inner = self.deeper(Self::sum);
                self.bars -= 1;
                let inner = inner?;
                self.eat_char('|').then(|| Expr::Call(Function::Abs, Box::new(inner)))
            }
            Kind::SetOpen => {
                if self.eat(&Kind::SetClose) {
                    return Some(Expr::Set(Vec::new()));
                }
                let items = self.deeper(|p| p.items(&[Kind::SetClose]))?;
                self.eat(&Kind::SetClose).then_some(Expr::Set(items))
            }
            Kind::Command(name) => self.command(&name),
            _ => None,
        }
    }

    fn symbol(&mut self, name: String) -> Option<Expr> {
        let mut name = name;
        if name == "e" {
            return Some(Expr::E);
        }
        if self.eat_char('_') {
            name.push('_');
            name.push_str(&self.subscript()?);
        }
        while self.eat_char('\'') {
            name.push('\'');
        }
        Some(Expr::Symbol(name))
    }

    fn subscript(&mut self) -> Option<String> {
        let group = self.eat_char('{');
        let mut text = String::new();
        loop {
            match self.kind()? {
                Kind::Char('}') if group => {
                    self.at += 1;
                    return Some(text);
                }
                Kind::Number(numeral) => text.push_str(&numeral.digits),
                Kind::Symbol(name) | Kind::Text(name) | Kind::Command(name) => text.push_str(name),
                Kind::Comma => text.push(','),
                Kind::Char(c @ ('+' | '-')) => text.push(*c),
                _ => return None,
            }
            self.at += 1;
            if !group {
                return Some(text);
            }
        }
    }

    fn bracket(&mut self, open: char) -> Option<Expr> {
        let ends = [Kind::Char(')'), Kind::Char(']')];
        if self.eat_char(')') {
            return Some(Expr::Bracket(open, Vec::new(), ')'));
        }
        let bars = std::mem::take(&mut self.bars);
        let items = self.deeper(|p| p.items(&ends));
        self.bars = bars;
        let mut items = items?;
        let close = if self.eat_char(')') {
            ')'
        } else if self.eat_char(']') {
            ']'
        } else {
            return None;
        };
        let grouping = items.len() == 1 && (open, close) == ('(', ')');
        if grouping { items.pop() } else { Some(Expr::Bracket(open, items, close)) }
    }

    fn group(&mut self) -> Option<Expr> {
        if self.eat_char('{') {
            let inner = self.deeper(|p| p.list(&[Kind::Char('}')]))?;
            return self.eat_char('}').then_some(inner);
        }
        self.deeper(Self::primary)
    }

    /// An argument of `\frac` or `\sqrt`: a group, or one digit or symbol (`\frac12`).
    fn argument(&mut self) -> Option<Expr> {
        if let Some(Kind::Number(numeral)) = self.kind().cloned()
            && numeral.digits.len() > 1
            && numeral.decimals().is_none()
        {
            // Take the first digit and leave the rest; the tokens are shared, so only this common shape is served.
            return None;
        }
        self.group()
    }

    fn command(&mut self, name: &str) -> Option<Expr> {
        match name {
            "pi" => Some(Expr::Pi),
            "infty" | "infinity" | "inf" | "oo" => Some(Expr::Infinity),
            "emptyset" => Some(Expr::Set(Vec::new())),
            "R" | "reals" | "Reals" => Some(Expr::Reals),
            "mathbb" => {
                let Expr::Symbol(symbol) = self.group()? else { return None };
                if symbol == "R" { Some(Expr::Reals) } else { Some(Expr::Text(format!("mathbb{symbol}"))) }
            }
            "mathcal" | "overline" | "vec" | "hat" | "bar" | "mathord" => self.group(),
            "boxed" | "fbox" => self.group(),
            "frac" => self.fraction(),
            "binom" => {
                let (n, k) = (self.group()?, self.group()?);
                Some(Expr::Binomial(Box::new(n), Box::new(k)))
            }
            "sqrt" => self.root(),
            "lfloor" | "lceil" => self.rounded(name),
            "langle" => {
                let items = self.deeper(|p| p.items(&[Kind::Command("rangle".into())]))?;
                self.eat_command("rangle").then_some(Expr::Bracket('(', items, ')'))
            }
            "begin" => self.matrix(),
            "log" => self.logarithm(),
            name if greek(name) => self.symbol(name.to_owned()),
            name => self.call(Function::named(name)?),
        }
    }

    fn fraction(&mut self) -> Option<Expr> {
        // `\frac12` and `\frac123` lex as one number: the first two digits are the arguments.
        if let Some(Kind::Number(numeral)) = self.kind().cloned()
            && numeral.decimals().is_none()
            && numeral.digits.len() >= 2
        {
            let (first, rest) = numeral.digits.split_at(1);
            if rest.len() == 1 {
                self.at += 1;
                let part = |digits: &str| Box::new(Expr::Number(Numeral::new(digits)));
                return Some(Expr::Quotient(part(first), part(rest)));
            }
            return None;
        }
        let (num, den) = (self.argument()?, self.argument()?);
        Some(Expr::Quotient(Box::new(num), Box::new(den)))
    }

    fn root(&mut self) -> Option<Expr> {
        let degree = if self.is_char('[') {
            self.at += 1;
            let degree = self.deeper(Self::sum)?;
            if !self.eat_char(']') {
                return None;
            }
            Some(degree)
        } else {
            None
        };
        let inner = match self.kind() {
            // `\sqrt 45` and "√45" mean the whole number, `\sqrt2x` only the 2.
            Some(Kind::Number(_)) => self.primary()?,
            _ => self.argument()?,
        };
        Some(match degree {
            None => Expr::Call(Function::Sqrt, Box::new(inner)),
            Some(degree) => {
                let one = Expr::Number(Numeral::new("1"));
                Expr::Power(Box::new(inner), Box::new(Expr::Quotient(Box::new(one), Box::new(degree))))
            }
        })
    }

    fn rounded(&mut self, name: &str) -> Option<Expr> {
        let (function, close) =
            if name == "lfloor" { (Function::Floor, "rfloor") } else { (Function::Ceil, "rceil") };
        let inner = self.deeper(Self::sum)?;
        self.eat_command(close).then(|| Expr::Call(function, Box::new(inner)))
    }

    fn logarithm(&mut self) -> Option<Expr> {
        if !self.eat_char('_') {
            return self.call(Function::Log10);
        }
        let base = match self.kind()?.clone() {
            // `\log_28`: one digit of base.
            Kind::Number(n) if n.digits.len() > 1 && n.decimals().is_none() && !self.is_char('{') => {
                let (base, argument) = n.digits.split_at(1);
                self.at += 1;
                let part = |digits: &str| Box::new(Expr::Number(Numeral::new(digits)));
                return Some(Expr::LogBase(part(base), part(argument)));
            }
            _ => self.group()?,
        };
        let argument = self.call_argument()?;
        Some(Expr::LogBase(Box::new(base), Box::new(argument)))
    }

    /// `\sin^2 x`, `\sin x`, `\sin(x)`, `\sin^{-1} x`.
    fn call(&mut self, function: Function) -> Option<Expr> {
        let exponent = if self.eat_char('^') { Some(self.deeper(Self::group_or_signed)?) } else { None };
        let argument = Box::new(self.call_argument()?);
        let minus_one = Expr::Neg(Box::new(Expr::Number(Numeral::new("1"))));
        match exponent {
            None => Some(Expr::Call(function, argument)),
            Some(exponent) if exponent == minus_one && function.inverse().is_some() => {
                Some(Expr::Call(function.inverse()?, argument))
            }
            Some(exponent) => Some(Expr::Power(Box::new(Expr::Call(function, argument)), Box::new(exponent))),
        }
    }

    fn group_or_signed(&mut self) -> Option<Expr> {
        if self.eat_char('-') { Some(Expr::Neg(Box::new(self.group()?))) } else { self.group() }
    }

    /// Brackets, or the factors up to the next sign: `\sin 2x + 1` is sin(2x) + 1, `\ln 2 \ln 3` stops at `\ln`.
    fn call_argument(&mut self) -> Option<Expr> {
        if self.is_char('(') || self.is_char('{') {
            return self.deeper(Self::primary);
        }
        self.deeper(|p| {
            let mut argument = p.power()?;
            loop {
                let symbol = matches!(p.kind(), Some(Kind::Symbol(_))) || p.is_command("pi");
                let is_greek = matches!(p.kind(), Some(Kind::Command(name)) if greek(name));
                if !symbol && !is_greek {
                    return Some(argument);
                }
                argument = times(argument, p.power()?);
            }
        })
    }

    fn matrix(&mut self) -> Option<Expr> {
        let name = self.environment_name()?;
        if !["pmatrix", "bmatrix", "matrix", "Bmatrix", "smallmatrix", "array"].contains(&name.as_str()) {
            return None;
        }
        if name == "array" && self.eat_char('{') {
            while !self.eat_char('}') {
                self.kind()?;
                self.at += 1;
            }
        }
        let mut rows = vec![Vec::new()];
        loop {
            if self.eat_command("end") {
                self.environment_name()?;
                if rows.len() > 1 && rows.last().is_some_and(Vec::is_empty) {
                    rows.pop();
                }
                return Some(Expr::Matrix(rows));
            }
            if self.eat(&Kind::Row) {
                rows.push(Vec::new());
            } else if !self.eat_char('&') {
                let cell = self.deeper(Self::sum)?;
                rows.last_mut()?.push(cell);
            }
        }
    }

    /// `{name}`; letters may have been lexed as symbols.
    fn environment_name(&mut self) -> Option<String> {
        if !self.eat_char('{') {
            return None;
        }
        let mut name = String::new();
        while !self.eat_char('}') {
            match self.kind()? {
                Kind::Symbol(part) | Kind::Text(part) | Kind::Command(part) => name.push_str(part),
                _ => return None,
            }
            self.at += 1;
        }
        Some(name)
    }
}

impl Function {
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "exp" => Self::Exp,
            "ln" => Self::Ln,
            "log" => Self::Log10,
            "sin" => Self::Sin,
            "cos" => Self::Cos,
            "tan" => Self::Tan,
            "cot" => Self::Cot,
            "sec" => Self::Sec,
            "csc" => Self::Csc,
            "arcsin" | "asin" => Self::Asin,
            "arccos" | "acos" => Self::Acos,
            "arctan" | "atan" => Self::Atan,
            "sinh" => Self::Sinh,
            "cosh" => Self::Cosh,
            "tanh" => Self::Tanh,
            _ => return None,
        })
    }

    fn inverse(self) -> Option<Self> {
        Some(match self {
            Self::Sin => Self::Asin,
            Self::Cos => Self::Acos,
            Self::Tan => Self::Atan,
            _ => return None,
        })
    }
}

fn greek(name: &str) -> bool {
    const NAMES: [&str; 30] = [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "varepsilon",
        "zeta",
        "eta",
        "theta",
        "vartheta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "rho",
        "sigma",
        "tau",
        "upsilon",
        "phi",
        "varphi",
        "chi",
        "psi",
        "omega",
        "Delta",
        "Gamma",
        "Omega",
        "ell",
        "hbar",
    ];
    NAMES.contains(&name)
}

fn fold_sum(left: Option<Expr>, terms: Vec<Expr>) -> Option<Expr> {
    let mut all: Vec<Expr> = left.into_iter().chain(terms).collect();
    if all.len() > 1 { Some(Expr::Sum(all)) } else { all.pop() }
}

fn times(left: Expr, right: Expr) -> Expr {
    match left {
        Expr::Product(mut factors) => {
            factors.push(right);
            Expr::Product(factors)
        }
        other => Expr::Product(vec![other, right]),
    }
}

/// `2\frac{1}{3}` is a mixed number: an integer before a proper fraction of integers.
fn is_mixed(left: &Expr, right: &Expr) -> bool {
    let integer = |e: &Expr| match e {
        Expr::Number(n) if n.decimals().is_none() => Some(n.to_f64()),
        _ => None,
    };
    match right {
        Expr::Quotient(num, den) => {
            integer(left).is_some() && matches!((integer(num), integer(den)), (Some(a), Some(b)) if a < b)
        }
        _ => false,
    }
}
