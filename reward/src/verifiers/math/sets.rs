//! Subsets of the real line: intervals, unions, inequalities in one variable, finite sets.

use super::eval::value;
use super::expr::{Expr, Relation};

/// Ends closer than this, relative to their size, are the same point.
const CLOSE: f64 = 1e-9;

/// An end of an interval: where, and whether the point belongs to it.
#[derive(Clone, Copy, Debug)]
struct Piece {
    low: f64,
    low_closed: bool,
    high: f64,
    high_closed: bool,
}

/// A union of disjoint intervals, sorted; single points are closed intervals of length 0.
#[derive(Clone, Debug)]
pub(crate) struct RealSet(Vec<Piece>);

impl RealSet {
    /// Reads intervals, unions, the reals and inequalities; `None` for anything else.
    pub(crate) fn of(expr: &Expr) -> Option<Self> {
        Some(Self(pieces(expr, false)?).normal())
    }

    /// Whether both hold the same numbers.
    pub(crate) fn same(&self, other: &Self) -> bool {
        self.0.len() == other.0.len()
            && self.0.iter().zip(&other.0).all(|(a, b)| {
                close(a.low, b.low)
                    && close(a.high, b.high)
                    && a.low_closed == b.low_closed
                    && a.high_closed == b.high_closed
            })
    }

    fn normal(mut self) -> Self {
        self.0.retain(|p| p.low < p.high || (close(p.low, p.high) && p.low_closed && p.high_closed));
        self.0.sort_by(|a, b| a.low.total_cmp(&b.low).then(b.low_closed.cmp(&a.low_closed)));
        let mut merged: Vec<Piece> = Vec::new();
        for piece in self.0 {
            match merged.last_mut() {
                Some(last)
                    if piece.low < last.high && !close(piece.low, last.high)
                        || close(piece.low, last.high) && (piece.low_closed || last.high_closed) =>
                {
                    if close(piece.high, last.high) {
                        last.high_closed |= piece.high_closed;
                    } else if piece.high > last.high {
                        (last.high, last.high_closed) = (piece.high, piece.high_closed);
                    }
                }
                _ => merged.push(piece),
            }
        }
        Self(merged)
    }
}

fn close(a: f64, b: f64) -> bool {
    a == b || (a - b).abs() <= CLOSE * a.abs().max(b.abs()).max(1e-3)
}

fn pieces(expr: &Expr, within_union: bool) -> Option<Vec<Piece>> {
    let all = Piece { low: f64::NEG_INFINITY, low_closed: false, high: f64::INFINITY, high_closed: false };
    match expr {
        Expr::Reals => Some(vec![all]),
        Expr::Bracket(open, ends, close) => {
            let [low, high] = ends.as_slice() else { return None };
            let (low, high) = (end(low)?, end(high)?);
            let piece = Piece {
                low,
                low_closed: *open == '[' && low.is_finite(),
                high,
                high_closed: *close == ']' && high.is_finite(),
            };
            (low <= high).then(|| vec![piece])
        }
        Expr::Union(parts) => {
            let parts: Option<Vec<_>> = parts.iter().map(|part| pieces(part, true)).collect();
            Some(parts?.concat())
        }
        // "x < 1 or x > 2"
        Expr::List(parts) if parts.iter().all(|p| matches!(p, Expr::Relation(..))) => {
            let parts: Option<Vec<_>> = parts.iter().map(inequality).collect();
            Some(parts?.concat())
        }
        Expr::Set(points) if within_union => points.iter().map(|p| Some(point(end(p)?))).collect(),
        Expr::Without(set, removed) => {
            let Expr::Set(points) = &**removed else { return None };
            let mut left = pieces(set, true)?;
            for p in points {
                left = cut(left, end(p)?);
            }
            Some(left)
        }
        Expr::Relation(..) => inequality(expr),
        _ => None,
    }
}

fn point(at: f64) -> Piece {
    Piece { low: at, low_closed: true, high: at, high_closed: true }
}

fn cut(pieces: Vec<Piece>, at: f64) -> Vec<Piece> {
    let split = |p: Piece| {
        if at < p.low || at > p.high {
            return vec![p];
        }
        vec![Piece { high: at, high_closed: false, ..p }, Piece { low: at, low_closed: false, ..p }]
    };
    pieces.into_iter().flat_map(split).collect()
}

/// `x > 2`, `0 <= x < 1`, `x \in S`, `x \ne 0`.
fn inequality(expr: &Expr) -> Option<Vec<Piece>> {
    let Expr::Relation(operands, relations) = expr else { return None };
    let all = Piece { low: f64::NEG_INFINITY, low_closed: false, high: f64::INFINITY, high_closed: false };
    match (operands.as_slice(), relations.as_slice()) {
        ([Expr::Symbol(_), set], [Relation::In]) => pieces(set, true),
        ([Expr::Symbol(_), bound], [Relation::NotEqual]) => Some(cut(vec![all], end(bound)?)),
        ([Expr::Symbol(_), bound], [relation]) => Some(vec![half_line(*relation, end(bound)?)?]),
        ([bound, Expr::Symbol(_)], [relation]) => Some(vec![half_line(relation.flipped(), end(bound)?)?]),
        ([low, Expr::Symbol(_), high], [first, second]) => {
            let (a, b) = (half_line(first.flipped(), end(low)?)?, half_line(*second, end(high)?)?);
            let (low, high) = if a.low.is_finite() { (a, b) } else { (b, a) };
            (low.low.is_finite() && high.high.is_finite() && low.low <= high.high).then(|| {
                vec![Piece {
                    low: low.low,
                    low_closed: low.low_closed,
                    high: high.high,
                    high_closed: high.high_closed,
                }]
            })
        }
        _ => None,
    }
}

fn half_line(relation: Relation, bound: f64) -> Option<Piece> {
    let below =
        |closed| Piece { low: f64::NEG_INFINITY, low_closed: false, high: bound, high_closed: closed };
    let above = |closed| Piece { low: bound, low_closed: closed, high: f64::INFINITY, high_closed: false };
    match relation {
        Relation::Less => Some(below(false)),
        Relation::LessEqual => Some(below(true)),
        Relation::Greater => Some(above(false)),
        Relation::GreaterEqual => Some(above(true)),
        _ => None,
    }
}

/// A real number or ±∞; no variables.
fn end(expr: &Expr) -> Option<f64> {
    match expr {
        Expr::Infinity => Some(f64::INFINITY),
        Expr::Neg(inner) if **inner == Expr::Infinity => Some(f64::NEG_INFINITY),
        Expr::Sum(terms) => match terms.as_slice() {
            [one] => end(one),
            _ => constant(expr),
        },
        other => constant(other),
    }
}

fn constant(expr: &Expr) -> Option<f64> {
    if super::eval::has_variables(expr) {
        return None;
    }
    value(expr, 0).filter(|z| z.im == 0.0).map(|z| z.re)
}
