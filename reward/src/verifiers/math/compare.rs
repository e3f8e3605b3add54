//! Whether two parsed answers mean the same.

use super::eval::{Complex, exact, has_variables, value};
use super::expr::{Expr, Relation};
use super::lexer::Numeral;
use super::sets::RealSet;

/// Relative difference of floating-point values of the same number.
const CLOSE: f64 = 1e-9;
/// Points at which formulas with variables are compared, and how many of them must have a value.
const POINTS: u64 = 10;
const POINTS_MIN: usize = 3;
/// A rounded decimal needs this many digits behind the point to stand for an exact value.
const ROUNDED_DECIMALS_MIN: usize = 5;
/// Longest list that is compared without order (matching is quadratic).
const ITEMS_MAX: usize = 64;

/// Whether `answer` says the same as `gold`. Not symmetric: an answer may be written out more than the gold.
pub(crate) fn same(gold: &Expr, answer: &Expr) -> bool {
    let (gold, answer) = (&spread(gold), &spread(answer));
    if let (Some(a), Some(b)) = (RealSet::of(gold), RealSet::of(answer)) {
        return tuple_like(gold, answer).unwrap_or_else(|| a.same(&b));
    }
    match (gold, answer) {
        (Expr::Text(a), Expr::Text(b)) => super::text::canonical(a) == super::text::canonical(b),
        (Expr::Relation(..), _) | (_, Expr::Relation(..)) => relations(gold, answer),
        (Expr::Set(a) | Expr::List(a), Expr::Set(b) | Expr::List(b)) => unordered(a, b),
        (Expr::Set(one) | Expr::List(one), other) if one.len() == 1 && scalar(other) => same(&one[0], other),
        (other, Expr::Set(one) | Expr::List(one)) if one.len() == 1 && scalar(other) => same(other, &one[0]),
        (Expr::Bracket(o1, a, c1), Expr::Bracket(o2, b, c2)) => {
            kind(*o1, *c1) == kind(*o2, *c2) && ordered(a, b)
        }
        (Expr::Bracket(_, a, _), Expr::List(b)) | (Expr::List(b), Expr::Bracket(_, a, _)) => ordered(a, b),
        (Expr::Matrix(a), Expr::Matrix(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| ordered(a, b))
        }
        (Expr::Matrix(rows), Expr::Bracket(_, items, _))
        | (Expr::Bracket(_, items, _), Expr::Matrix(rows)) => {
            vector(rows).is_some_and(|cells| ordered(&cells, items))
        }
        (Expr::Union(a), Expr::Union(b)) => unordered(a, b),
        (Expr::Reals, Expr::Reals) => true,
        _ => scalars(gold, answer),
    }
}

/// `±` becomes both values; assignments to one variable become their values: `x = 1, x = 2` is `1, 2`.
fn spread(expr: &Expr) -> Expr {
    match expr {
        Expr::List(items) | Expr::Set(items) => {
            let items = assigned(items).unwrap_or_else(|| items.clone());
            let items = items.iter().flat_map(|item| plus_minus(item).unwrap_or_else(|| vec![item.clone()]));
            let items = items.collect();
            if matches!(expr, Expr::Set(_)) { Expr::Set(items) } else { Expr::List(items) }
        }
        Expr::Relation(sides, relations) if relations.as_slice() == [Relation::Equal] => {
            match (sides.as_slice(), plus_minus(&sides[1])) {
                ([Expr::Symbol(_), _], Some(both)) => Expr::List(both),
                ([Expr::Symbol(_), values @ (Expr::List(_) | Expr::Set(_))], None) => spread(values),
                _ => expr.clone(),
            }
        }
        other => plus_minus(other).map_or_else(|| other.clone(), Expr::List),
    }
}

/// Both readings of an expression with `±`; `None` if it has none.
fn plus_minus(expr: &Expr) -> Option<Vec<Expr>> {
    let (upper, lower) = (signed(expr, true), signed(expr, false));
    (upper != lower).then(|| vec![upper, lower])
}

/// `expr` with every `±` read as its upper or its lower sign.
fn signed(expr: &Expr, upper: bool) -> Expr {
    let boxed = |e: &Expr| Box::new(signed(e, upper));
    match expr {
        Expr::PlusMinus(a, b, plus) => {
            let right = signed(b, upper);
            let right = if *plus == upper { right } else { Expr::Neg(Box::new(right)) };
            Expr::Sum(vec![signed(a, upper), right])
        }
        Expr::Neg(a) => Expr::Neg(boxed(a)),
        Expr::Sum(list) => Expr::Sum(list.iter().map(|e| signed(e, upper)).collect()),
        Expr::Product(list) => Expr::Product(list.iter().map(|e| signed(e, upper)).collect()),
        Expr::Quotient(a, b) => Expr::Quotient(boxed(a), boxed(b)),
        Expr::Power(a, b) => Expr::Power(boxed(a), boxed(b)),
        Expr::Call(function, a) => Expr::Call(*function, boxed(a)),
        other => other.clone(),
    }
}

/// The right-hand sides if every item assigns to the same variable, or items are `x = 1, 2`.
fn assigned(items: &[Expr]) -> Option<Vec<Expr>> {
    let mut name = None;
    let mut values = Vec::new();
    for (i, item) in items.iter().enumerate() {
        match item {
            Expr::Relation(sides, relations) if relations.as_slice() == [Relation::Equal] => {
                let Expr::Symbol(symbol) = &sides[0] else { return None };
                if name.get_or_insert(symbol) != &symbol {
                    return None;
                }
                values.push(sides[1].clone());
            }
            other if i > 0 && name.is_some() && scalar(other) => values.push(other.clone()),
            _ => return None,
        }
    }
    Some(values)
}

fn scalar(expr: &Expr) -> bool {
    !matches!(
        expr,
        Expr::Set(_)
            | Expr::List(_)
            | Expr::Bracket(..)
            | Expr::Matrix(_)
            | Expr::Union(_)
            | Expr::Reals
            | Expr::Without(..)
            | Expr::Relation(..)
    )
}

/// Two pairs in round brackets are compared item by item: `(2, 1)` is a point, not an empty interval.
fn tuple_like(gold: &Expr, answer: &Expr) -> Option<bool> {
    match (gold, answer) {
        (Expr::Bracket('(', a, ')'), Expr::Bracket('(', b, ')')) => Some(ordered(a, b)),
        _ => None,
    }
}

/// Round and square brackets differ only where they could be intervals.
fn kind(open: char, close: char) -> (bool, bool) {
    (open == '[', close == ']')
}

fn vector(rows: &[Vec<Expr>]) -> Option<Vec<Expr>> {
    if rows.len() == 1 || rows.iter().all(|row| row.len() == 1) {
        return Some(rows.concat());
    }
    None
}

fn ordered(a: &[Expr], b: &[Expr]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b))
}

/// Equal as sets: every item of one has its like in the other.
fn unordered(a: &[Expr], b: &[Expr]) -> bool {
    let within = a.len() <= ITEMS_MAX && b.len() <= ITEMS_MAX;
    within && a.iter().all(|x| b.iter().any(|y| same(x, y))) && b.iter().all(|y| a.iter().any(|x| same(x, y)))
}

/// At least one side is an equation or inequality.
fn relations(gold: &Expr, answer: &Expr) -> bool {
    match (gold, answer) {
        (Expr::Relation(g, gr), Expr::Relation(a, ar)) => {
            if let (Some((gold_name, gold)), Some((name, answer))) = (assignment(g, gr), assignment(a, ar))
                && gold_name == name
            {
                return same(gold, answer);
            }
            match (g.as_slice(), gr.as_slice(), a.as_slice(), ar.as_slice()) {
                ([gl, gr_], [g_rel], [al, ar_], [a_rel]) => {
                    proportional((gl, gr_), *g_rel, (al, ar_), *a_rel)
                }
                _ => gr == ar && ordered(g, a),
            }
        }
        (Expr::Relation(g, gr), answer) => assignment(g, gr).is_some_and(|(_, right)| same(right, answer)),
        (gold, Expr::Relation(a, ar)) => match assignment(a, ar) {
            Some((_, right)) => same(gold, right),
            // "2 + 3 = 5": believed if it is true.
            None => {
                ar.iter().all(|r| *r == Relation::Equal)
                    && a.last().is_some_and(|last| {
                        a.iter().all(|side| side == last || scalars(side, last)) && same(gold, last)
                    })
            }
        },
        _ => false,
    }
}

/// `x = e`, `e = x`, `f(x) = e`, `x = … = e`: the name and the last value.
fn assignment<'a>(sides: &'a [Expr], relations: &[Relation]) -> Option<(String, &'a Expr)> {
    if !relations.iter().all(|r| *r == Relation::Equal) {
        return None;
    }
    let label = |side: &Expr| match side {
        Expr::Symbol(name) => Some(name.clone()),
        // f(x) parses as a product of f and x.
        Expr::Product(factors) => match factors.as_slice() {
            [Expr::Symbol(f), Expr::Symbol(x)] if "fghPQ".contains(f.as_str()) && x != f => Some(f.clone()),
            _ => None,
        },
        _ => None,
    };
    match (label(&sides[0]), sides.last()?) {
        (Some(name), last) => Some((name, last)),
        (None, Expr::Symbol(name)) => Some((name.clone(), &sides[0])),
        _ => None,
    }
}

/// Equations and inequalities whose difference of sides is the other's times a constant (positive for `<`).
fn proportional(
    gold: (&Expr, &Expr),
    gold_rel: Relation,
    answer: (&Expr, &Expr),
    answer_rel: Relation,
) -> bool {
    let difference = |sides: (&Expr, &Expr), point| Some(value(sides.0, point)?.sub(value(sides.1, point)?));
    let mut ratio: Option<Complex> = None;
    let mut compared = 0;
    for point in 0..POINTS {
        let (Some(g), Some(a)) = (difference(gold, point), difference(answer, point)) else { continue };
        let Some(r) = a.div(g) else { continue };
        let first = *ratio.get_or_insert(r);
        if r.sub(first).abs() > 1e-7 * first.abs() || first.abs() == 0.0 {
            return false;
        }
        compared += 1;
    }
    let Some(ratio) = ratio.filter(|_| compared >= POINTS_MIN) else { return false };
    let expected = if ratio.re < 0.0 { gold_rel.flipped() } else { gold_rel };
    expected == answer_rel && ratio.im.abs() <= 1e-9 * ratio.re.abs()
}

/// Two expressions of numbers and variables.
fn scalars(gold: &Expr, answer: &Expr) -> bool {
    if !scalar(gold) || !scalar(answer) {
        return false;
    }
    if let (Some(a), Some(b)) = (infinite(gold), infinite(answer)) {
        return a == b;
    }
    match (percentage(gold), percentage(answer)) {
        (None, Some(bare)) => numbers(gold, answer) || numbers(gold, bare),
        (Some(bare), None) => numbers(gold, answer) || numbers(bare, answer),
        _ => numbers(gold, answer),
    }
}

fn infinite(expr: &Expr) -> Option<bool> {
    match expr {
        Expr::Infinity => Some(true),
        Expr::Neg(inner) if **inner == Expr::Infinity => Some(false),
        _ => None,
    }
}

/// What stands before the `%`.
fn percentage(expr: &Expr) -> Option<&Expr> {
    match expr {
        Expr::Percent(inner) => Some(inner),
        _ => None,
    }
}

fn numbers(gold: &Expr, answer: &Expr) -> bool {
    if let (Some(a), Some(b)) = (exact(gold), exact(answer)) {
        return a == b || rounded(gold, answer);
    }
    if let (Some((sign_a, a)), Some((sign_b, b))) = (literal(gold), literal(answer))
        && a.decimals().is_none()
        && b.decimals().is_none()
    {
        // Too large for exact arithmetic, so digit by digit.
        return sign_a == sign_b && a.digits.trim_start_matches('0') == b.digits.trim_start_matches('0');
    }
    if has_variables(gold) || has_variables(answer) {
        return functions(gold, answer);
    }
    match (value(gold, 0), value(answer, 0)) {
        (Some(a), Some(b)) => close(a, b) || rounded(gold, answer),
        _ => false,
    }
}

fn close(a: Complex, b: Complex) -> bool {
    let scale = a.abs().max(b.abs());
    a.sub(b).abs() <= CLOSE * scale || scale <= 1e-12
}

/// Equal at every sample point where both have a value.
fn functions(gold: &Expr, answer: &Expr) -> bool {
    let mut compared = 0;
    for point in 0..POINTS {
        match (value(gold, point), value(answer, point)) {
            (Some(a), Some(b)) => {
                if a.sub(b).abs() > 1e-8 * (1.0 + a.abs().max(b.abs())) {
                    return false;
                }
                compared += 1;
            }
            (None, None) => {}
            _ => return false,
        }
    }
    compared >= POINTS_MIN
}

/// One side is a decimal that is the other, rounded or cut at its last digit.
fn rounded(gold: &Expr, answer: &Expr) -> bool {
    let decimals = |e: &Expr| literal(e).and_then(|(_, numeral)| numeral.decimals());
    let (short, long, places) = match (decimals(gold), decimals(answer)) {
        (Some(a), Some(b)) if a == b => return false,
        (Some(a), Some(b)) => {
            if a < b {
                (gold, answer, a)
            } else {
                (answer, gold, b)
            }
        }
        (Some(a), None) => (gold, answer, a),
        (None, Some(b)) => (answer, gold, b),
        (None, None) => return false,
    };
    if places < ROUNDED_DECIMALS_MIN || literal(long).is_some_and(|(_, n)| n.decimals().is_none()) {
        return false;
    }
    let unit = 10_f64.powi(-i32::try_from(places).unwrap_or(300));
    match (value(short, 0), value(long, 0)) {
        (Some(a), Some(b)) => a.abs() >= unit * 1e4 && a.sub(b).abs() <= 0.999 * unit,
        _ => false,
    }
}

/// A plain number with its sign.
fn literal(expr: &Expr) -> Option<(bool, &Numeral)> {
    match expr {
        Expr::Number(numeral) => Some((true, numeral)),
        Expr::Neg(inner) => literal(inner).map(|(sign, numeral)| (!sign, numeral)),
        _ => None,
    }
}
