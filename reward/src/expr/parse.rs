//! From text to a checked tree.

use super::{Node, Relation};

const CHARS_MAX: usize = 4096;
const DEPTH_MAX: usize = 64;

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Number(f64),
    Text(String),
    Name(String),
    Sign(&'static str),
}

/// Longer ones first, so that `<=` is not read as `<`.
const SIGNS: [&str; 18] =
    ["&&", "||", "<=", ">=", "==", "!=", "<", ">", "!", "(", ")", "[", "]", ",", "+", "-", "*", "/"];

/// What a part of an expression is.
enum Term {
    Number(Node),
    Truth(Node),
    Text(String),
    Component(usize),
    Tag,
}

/// The tree, and whether it is a condition.
pub(super) fn parse(text: &str, names: &[&str]) -> Result<(Node, bool), String> {
    if text.len() > CHARS_MAX {
        return Err(format!("more than {CHARS_MAX} characters"));
    }
    let mut parser = Parser { tokens: tokens(text)?, at: 0, names, depth: 0 };
    let term = parser.or()?;
    if let Some(token) = parser.tokens.get(parser.at) {
        return Err(format!("{} is not expected here", shown(token)));
    }
    match term {
        Term::Truth(node) => Ok((node, true)),
        term => Ok((number(term)?, false)),
    }
}

fn tokens(text: &str) -> Result<Vec<Token>, String> {
    let mut found = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let taken = if first.is_ascii_digit() || first == '.' {
            let len = rest.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(rest.len());
            let number = rest[..len].parse().map_err(|_| format!("{:?} is not a number", &rest[..len]))?;
            found.push(Token::Number(number));
            len
        } else if first.is_ascii_alphabetic() || first == '_' {
            let len = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(rest.len());
            found.push(Token::Name(rest[..len].to_owned()));
            len
        } else if first == '\'' || first == '"' {
            let len = rest[1..].find(first).ok_or("a text is never closed")?;
            found.push(Token::Text(rest[1..=len].to_owned()));
            len + 2
        } else {
            let sign = SIGNS.iter().find(|sign| rest.starts_with(**sign));
            let sign = sign.ok_or_else(|| format!("{first:?} is not understood"))?;
            found.push(Token::Sign(sign));
            sign.len()
        };
        rest = rest[taken..].trim_start();
    }
    Ok(found)
}

fn shown(token: &Token) -> String {
    match token {
        Token::Number(value) => value.to_string(),
        Token::Text(text) => format!("{text:?}"),
        Token::Name(name) => format!("{name:?}"),
        Token::Sign(sign) => format!("'{sign}'"),
    }
}

struct Parser<'a> {
    tokens: Vec<Token>,
    at: usize,
    names: &'a [&'a str],
    depth: usize,
}

impl Parser<'_> {
    fn sign(&mut self, among: &[&'static str]) -> Option<&'static str> {
        match self.tokens.get(self.at) {
            Some(Token::Sign(sign)) if among.contains(sign) => {
                self.at += 1;
                Some(sign)
            }
            _ => None,
        }
    }

    fn expect(&mut self, sign: &'static str) -> Result<(), String> {
        if self.sign(&[sign]).is_some() {
            return Ok(());
        }
        Err(match self.tokens.get(self.at) {
            None => format!("ends too early, '{sign}' is missing"),
            Some(token) => format!("{} where '{sign}' is expected", shown(token)),
        })
    }

    fn deeper<T>(&mut self, inner: impl FnOnce(&mut Self) -> Result<T, String>) -> Result<T, String> {
        if self.depth == DEPTH_MAX {
            return Err(format!("nested more than {DEPTH_MAX} deep"));
        }
        self.depth += 1;
        let result = inner(self);
        self.depth -= 1;
        result
    }

    fn or(&mut self) -> Result<Term, String> {
        let mut left = self.and()?;
        while self.sign(&["||"]).is_some() {
            let right = truth(self.and()?)?;
            left = Term::Truth(Node::Or(Box::new(truth(left)?), Box::new(right)));
        }
        Ok(left)
    }

    fn and(&mut self) -> Result<Term, String> {
        let mut left = self.not()?;
        while self.sign(&["&&"]).is_some() {
            let right = truth(self.not()?)?;
            left = Term::Truth(Node::And(Box::new(truth(left)?), Box::new(right)));
        }
        Ok(left)
    }

    fn not(&mut self) -> Result<Term, String> {
        if self.sign(&["!"]).is_some() {
            let inner = self.deeper(Self::not)?;
            return Ok(Term::Truth(Node::Not(Box::new(truth(inner)?))));
        }
        self.compare()
    }

    fn compare(&mut self) -> Result<Term, String> {
        let left = self.sum()?;
        if let Some(sign) = self.sign(&["<=", ">=", "==", "!=", "<", ">"]) {
            let right = self.sum()?;
            return compared(left, sign, right).map(Term::Truth);
        }
        if self.tokens.get(self.at) == Some(&Token::Name("in".into())) {
            self.at += 1;
            return member(left, self.texts()?, true).map(Term::Truth);
        }
        Ok(left)
    }

    fn texts(&mut self) -> Result<Vec<String>, String> {
        self.expect("[")?;
        let mut texts = Vec::new();
        while let Some(Token::Text(text)) = self.tokens.get(self.at) {
            texts.push(text.clone());
            self.at += 1;
            if self.sign(&[","]).is_none() {
                break;
            }
        }
        self.expect("]")?;
        if texts.is_empty() { Err("the list is empty".into()) } else { Ok(texts) }
    }

    fn sum(&mut self) -> Result<Term, String> {
        let mut left = self.product()?;
        while let Some(sign) = self.sign(&["+", "-"]) {
            left = arithmetic(left, sign, self.product()?)?;
        }
        Ok(left)
    }

    fn product(&mut self) -> Result<Term, String> {
        let mut left = self.unary()?;
        while let Some(sign) = self.sign(&["*", "/"]) {
            left = arithmetic(left, sign, self.unary()?)?;
        }
        Ok(left)
    }

    fn unary(&mut self) -> Result<Term, String> {
        if self.sign(&["-"]).is_some() {
            let inner = self.deeper(Self::unary)?;
            return Ok(Term::Number(Node::Negate(Box::new(number(inner)?))));
        }
        if self.sign(&["("]).is_some() {
            let inner = self.deeper(Self::or)?;
            self.expect(")")?;
            return Ok(inner);
        }
        let token = self.tokens.get(self.at).ok_or("ends too early")?.clone();
        self.at += 1;
        match token {
            Token::Number(value) => Ok(Term::Number(Node::Number(value))),
            Token::Text(text) => Ok(Term::Text(text)),
            Token::Name(name) => self.named(&name),
            Token::Sign(_) => Err(format!("{} is not expected here", shown(&token))),
        }
    }

    fn named(&self, name: &str) -> Result<Term, String> {
        if name == "tag" {
            return Ok(Term::Tag);
        }
        let found = self.names.iter().position(|known| *known == name).map(Term::Component);
        found.ok_or_else(|| format!("no component is called {name:?}; there are: {}", self.names.join(", ")))
    }
}

fn number(term: Term) -> Result<Node, String> {
    match term {
        Term::Number(node) => Ok(node),
        Term::Component(i) => Ok(Node::Value(i)),
        Term::Truth(_) => Err("a condition stands where a number is needed".into()),
        Term::Text(text) => Err(format!("the text {text:?} stands where a number is needed")),
        Term::Tag => Err("tag can only be compared: tag == 'x' or tag in ['x', 'y']".into()),
    }
}

fn truth(term: Term) -> Result<Node, String> {
    match term {
        Term::Truth(node) => Ok(node),
        _ => Err("a value stands where a condition is needed; compare it with something".into()),
    }
}

fn arithmetic(left: Term, sign: &str, right: Term) -> Result<Term, String> {
    let op = sign.chars().next().expect("a sign has a character");
    Ok(Term::Number(Node::Arithmetic(Box::new(number(left)?), op, Box::new(number(right)?))))
}

fn compared(left: Term, sign: &str, right: Term) -> Result<Node, String> {
    match (left, right) {
        (left @ (Term::Component(_) | Term::Tag), Term::Text(text))
        | (Term::Text(text), left @ (Term::Component(_) | Term::Tag)) => match sign {
            "==" => member(left, vec![text], true),
            "!=" => member(left, vec![text], false),
            _ => Err(format!("'{sign}' with a text; classes and tags have only == and !=")),
        },
        (left, right) => {
            let relation = match sign {
                "<" => Relation::Less,
                "<=" => Relation::LessEqual,
                ">" => Relation::Greater,
                ">=" => Relation::GreaterEqual,
                "==" => Relation::Equal,
                _ => Relation::NotEqual,
            };
            Ok(Node::Compare(Box::new(number(left)?), relation, Box::new(number(right)?)))
        }
    }
}

fn member(left: Term, texts: Vec<String>, wanted: bool) -> Result<Node, String> {
    match left {
        Term::Component(i) => Ok(Node::Class(i, texts, wanted)),
        Term::Tag => Ok(Node::Tag(texts, wanted)),
        _ => Err("only a component or tag can be one of some texts".into()),
    }
}
