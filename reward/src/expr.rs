//! Conditions and costs written as expressions over component values: `guard > 0.5 && tag in ['benign']`.
//!
//! ```text
//! or := and ('||' and)*            sum     := product (('+'|'-') product)*
//! and := not ('&&' not)*           product := unary (('*'|'/') unary)*
//! not := '!' not | compare         unary   := '-' unary | number | 'text' | NAME | '(' or ')'
//! compare := sum ((< <= > >= == !=) sum | 'in' '[' 'text', … ']')?
//! ```
//!
//! `NAME` is a component: its raw value beside a number, its class beside a text. `tag` is the prompt's tags: `tag == 'x'` and
//! `tag in ['x', 'y']` hold if one of them is meant. Kinds are checked when the expression is read. A component that does
//! not apply to a prompt makes every comparison with it false; one that failed makes the whole expression unscored.

mod parse;

use crate::expr::parse::parse;

/// What an expression may refer to, while it runs.
pub(crate) trait Scope {
    /// Value and class of component `index`; `None` where it does not apply, the reason where it failed.
    fn component(&self, index: usize) -> Option<Result<(f32, Option<&str>), String>>;
    /// The prompt's tags.
    fn tags(&self) -> &[String];
}

/// A checked expression.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Expr {
    root: Node,
    truth: bool,
}

#[derive(Clone, Debug, PartialEq)]
enum Node {
    Number(f64),
    Value(usize),
    Negate(Box<Node>),
    Arithmetic(Box<Node>, char, Box<Node>),
    Compare(Box<Node>, Relation, Box<Node>),
    /// The class of a component is one of these, or is not.
    Class(usize, Vec<String>, bool),
    /// A tag of the prompt is one of these, or none is.
    Tag(Vec<String>, bool),
    Not(Box<Node>),
    And(Box<Node>, Box<Node>),
    Or(Box<Node>, Box<Node>),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Relation {
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    Equal,
    NotEqual,
}

/// A value on the way up: numbers may be missing, truths never are.
enum Found {
    Number(Option<f64>),
    Truth(bool),
}

impl Expr {
    /// Reads a condition; `names` are the components in order.
    pub(crate) fn condition(text: &str, names: &[&str]) -> Result<Self, String> {
        let expr = Self::read(text, names)?;
        if expr.truth {
            Ok(expr)
        } else {
            Err(format!("{text:?} is a number where a condition is needed; compare it with something"))
        }
    }

    /// Reads a number; a condition counts 1 where it holds, else 0.
    pub(crate) fn number(text: &str, names: &[&str]) -> Result<Self, String> {
        Self::read(text, names)
    }

    fn read(text: &str, names: &[&str]) -> Result<Self, String> {
        let (root, truth) = parse(text, names).map_err(|why| format!("{text:?}: {why}"))?;
        Ok(Self { root, truth })
    }

    /// The components it reads, each once.
    pub(crate) fn components(&self) -> Vec<usize> {
        let mut found = Vec::new();
        self.root.visit(&mut |node| {
            if let Node::Value(i) | Node::Class(i, ..) = node
                && !found.contains(i)
            {
                found.push(*i);
            }
        });
        found
    }

    /// The components whose class it asks for.
    pub(crate) fn classes(&self) -> Vec<usize> {
        let mut found = Vec::new();
        self.root.visit(&mut |node| {
            if let Node::Class(i, ..) = node {
                found.push(*i);
            }
        });
        found
    }

    /// Whether the condition holds.
    pub(crate) fn holds(&self, scope: &dyn Scope) -> Result<bool, String> {
        Ok(self.value(scope)?.is_some_and(|value| value != 0.0))
    }

    /// The number; `None` if a component in it does not apply.
    pub(crate) fn value(&self, scope: &dyn Scope) -> Result<Option<f64>, String> {
        let value = match self.root.run(scope)? {
            Found::Number(value) => value,
            Found::Truth(_) if !self.applies(scope) => None,
            Found::Truth(holds) => Some(f64::from(u8::from(holds))),
        };
        match value {
            Some(value) if !value.is_finite() => Err(format!("the expression gave {value}")),
            value => Ok(value),
        }
    }

    /// A truth over components none of which applies says nothing.
    fn applies(&self, scope: &dyn Scope) -> bool {
        let used = self.components();
        used.is_empty() || used.iter().any(|i| scope.component(*i).is_some())
    }
}

impl Node {
    fn visit(&self, see: &mut dyn FnMut(&Node)) {
        see(self);
        match self {
            Self::Negate(a) | Self::Not(a) => a.visit(see),
            Self::Arithmetic(a, _, b) | Self::Compare(a, _, b) | Self::And(a, b) | Self::Or(a, b) => {
                a.visit(see);
                b.visit(see);
            }
            Self::Number(_) | Self::Value(_) | Self::Class(..) | Self::Tag(..) => {}
        }
    }

    fn run(&self, scope: &dyn Scope) -> Result<Found, String> {
        Ok(match self {
            Self::Number(value) => Found::Number(Some(*value)),
            Self::Value(i) => {
                Found::Number(scope.component(*i).transpose()?.map(|(value, _)| f64::from(value)))
            }
            Self::Negate(a) => Found::Number(a.number(scope)?.map(|a| -a)),
            Self::Arithmetic(a, op, b) => {
                let (Some(a), Some(b)) = (a.number(scope)?, b.number(scope)?) else {
                    return Ok(Found::Number(None));
                };
                Found::Number(Some(match op {
                    '+' => a + b,
                    '-' => a - b,
                    '*' => a * b,
                    _ => a / b,
                }))
            }
            Self::Compare(a, relation, b) => {
                let (a, b) = (a.number(scope)?, b.number(scope)?);
                Found::Truth(a.zip(b).is_some_and(|(a, b)| relation.holds(a, b)))
            }
            Self::Class(i, classes, wanted) => Found::Truth(match scope.component(*i).transpose()? {
                None => false,
                Some((_, None)) => return Err("the component gave no class".into()),
                Some((_, Some(class))) => classes.iter().any(|c| c == class) == *wanted,
            }),
            Self::Tag(tags, wanted) => {
                Found::Truth(tags.iter().any(|tag| scope.tags().contains(tag)) == *wanted)
            }
            Self::Not(a) => Found::Truth(!a.truth(scope)?),
            Self::And(a, b) => Found::Truth(a.truth(scope)? && b.truth(scope)?),
            Self::Or(a, b) => Found::Truth(a.truth(scope)? || b.truth(scope)?),
        })
    }

    fn number(&self, scope: &dyn Scope) -> Result<Option<f64>, String> {
        match self.run(scope)? {
            Found::Number(value) => Ok(value),
            Found::Truth(holds) => Ok(Some(f64::from(u8::from(holds)))),
        }
    }

    fn truth(&self, scope: &dyn Scope) -> Result<bool, String> {
        match self.run(scope)? {
            Found::Truth(holds) => Ok(holds),
            Found::Number(value) => Ok(value.is_some_and(|value| value != 0.0)),
        }
    }
}

impl Relation {
    fn holds(self, a: f64, b: f64) -> bool {
        match self {
            Self::Less => a < b,
            Self::LessEqual => a <= b,
            Self::Greater => a > b,
            Self::GreaterEqual => a >= b,
            Self::Equal => a == b,
            Self::NotEqual => a != b,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Value and class, or the reason; nothing where it does not apply.
    type Judged<'a> = Option<Result<(f32, Option<&'a str>), &'a str>>;

    struct At<'a>(&'a [Judged<'a>], &'a [String]);

    impl Scope for At<'_> {
        fn component(&self, index: usize) -> Option<Result<(f32, Option<&str>), String>> {
            self.0[index].map(|result| result.map_err(str::to_owned))
        }

        fn tags(&self) -> &[String] {
            self.1
        }
    }

    const NAMES: [&str; 4] = ["guard", "refusal", "absent", "broken"];

    fn value(text: &str) -> Result<Option<f64>, String> {
        let tags = ["benign".to_owned(), "math".to_owned()];
        let scope =
            At(&[Some(Ok((0.25, None))), Some(Ok((1.0, Some("refuse")))), None, Some(Err("away"))], &tags);
        Expr::number(text, &NAMES)?.value(&scope)
    }

    #[test]
    fn precedence_comparison_and_classes() {
        for (text, expected) in [
            ("1 + 2 * 3 - 4 / 2", 5.0),
            ("-(1 + guard) * 2", -2.5),
            ("guard > 0.2 && guard <= 0.25", 1.0),
            ("guard > 0.2 && !(guard <= 0.25) || 0 == 1", 0.0),
            ("refusal == 'refuse' && tag in ['benign', 'borderline']", 1.0),
            ("refusal != 'refuse'", 0.0),
            ("refusal in [\"partial\", 'refuse']", 1.0),
            ("tag == 'chat' || tag != 'chat'", 1.0),
            ("1 - guard", 0.75),
        ] {
            assert_eq!(value(text), Ok(Some(expected)), "{text}");
        }
    }

    #[test]
    fn what_does_not_apply_is_neither_true_nor_zero_and_what_failed_is_said() {
        assert_eq!(value("absent"), Ok(None));
        assert_eq!(value("absent + 1"), Ok(None));
        assert_eq!(value("absent > 0"), Ok(None));
        assert_eq!(value("absent > 0 || guard > 0"), Ok(Some(1.0)));
        assert_eq!(value("absent == 'x'"), Ok(None));
        assert_eq!(value("broken > 0"), Err("away".into()));
        assert_eq!(value("guard < 0 && broken > 0"), Ok(Some(0.0)), "what is not needed cannot fail");
        assert!(value("guard / 0").unwrap_err().contains("inf"));
        assert!(value("guard == 'unsafe'").unwrap_err().contains("no class"));
    }

    #[test]
    fn mistakes_are_found_when_it_is_read() {
        for (text, part) in [
            ("gard > 0.5", "no component is called \"gard\"; there are: guard, refusal, absent, broken"),
            ("guard >", "ends too early"),
            ("guard > 0.5)", "')'"),
            ("guard > 'x'", "only == and !="),
            ("tag > 3", "tag"),
            ("guard + 'x'", "text"),
            ("'x' == 'y'", "text"),
            ("guard == 'x", "never closed"),
            ("guard ~ 3", "'~'"),
            ("(guard > 1) + 1", "number"),
            ("!guard", "condition"),
            ("guard && 1 > 0", "condition"),
            ("guard in []", "empty"),
            ("1 < guard < 2", "'<'"),
        ] {
            let error = Expr::number(text, &NAMES).expect_err(text);
            assert!(error.contains(part), "{text}: {error}");
        }
        assert!(Expr::condition("guard", &NAMES).unwrap_err().contains("condition"));
        let deep = "(".repeat(100_000);
        assert!(Expr::number(&deep, &NAMES).unwrap_err().contains("characters"));
        let deep = format!("{}1{}", "(".repeat(400), ")".repeat(400));
        assert!(Expr::number(&deep, &NAMES).unwrap_err().contains("deep"));
    }
}
