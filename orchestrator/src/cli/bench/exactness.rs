//! `freewheel bench exactness`: what it costs that a token has the same bits whatever shares its batch.
//!
//! Each operation of a decode step that a rule of exactness bears on is timed beside other kernels
//! (`freewheel_kernels::measure::price`), in turn. Some break a rule; some break none, but have another order than ours. The
//! price is the time of the quickest kernel that breaks none (ours, or another) over that of the quickest of all; what the
//! quickest that breaks none gains over ours is room, not price. What is not in the sum (embedding, rotation, activation,
//! drawing) has no rule, so the price of a whole step is a little lower.

use clap::Args;
use freewheel_kernels::attention::AttentionShape;
use freewheel_kernels::measure::price::{Op, Price, Setting};
use freewheel_model::{AttentionSpec, FfnSpec, LoadedModel, ModelSpec, ProductShape, QkNorm, RouterKind};
use serde_json::{Map, Value, json};

use super::{Machine, Sampling, number};
use crate::cli::fail::Explain as _;
use crate::cli::model::ModelArgs;
use crate::cli::table::table;

#[derive(Debug, Args)]
pub struct ExactnessArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Sequences that decode at once; several numbers, separated by commas.
    #[arg(long, value_delimiter = ',', default_values_t = [1usize, 8, 32])]
    rows: Vec<usize>,
    /// Keys that each of them sees.
    #[arg(long, default_value_t = 256)]
    context: usize,
    #[command(flatten)]
    sampling: Sampling,
}

impl ExactnessArgs {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let loaded = self.model.open()?;
        let longest = loaded.model.spec().max_positions;
        let rows_fit = !self.rows.is_empty() && self.rows.iter().all(|rows| (1..=1024).contains(rows));
        if !rows_fit || !(1..=longest).contains(&self.context) {
            let given =
                anyhow::anyhow!("--rows {:?} or --context {} is out of range", self.rows, self.context);
            return Err(given).input_hint(format!("--rows 1 to 1024, --context 1 to {longest}"));
        }
        let threads = self.model.threads();
        let machine = Machine::measure(&loaded, &threads);
        let parts = step(&loaded, self.context);
        let mut lines = Vec::new();
        for &rows in &self.rows {
            let setting = Setting {
                threads: &threads,
                rows,
                held_bytes: machine.read_bytes,
                rounds: self.sampling.rounds as usize,
            };
            let prices: Vec<Price> = parts.iter().map(|part| part.op.price(&setting)).collect();
            lines.extend(report(rows, &parts, &prices));
        }
        machine.print("exactness", &loaded, &lines, self.sampling.json, text)
    }
}

/// An operation of a decode step.
#[derive(Clone, Debug, PartialEq)]
struct Part {
    what: String,
    op: Op,
    /// How often it is done in a step.
    count: usize,
}

/// The operations of a decode step that rules bear on.
fn step(loaded: &LoadedModel, context: usize) -> Vec<Part> {
    let spec = loaded.model.spec();
    let precision = super::precision(loaded);
    let products = loaded.model.products(loaded.params.dtype());
    let mut parts: Vec<Part> = products.iter().map(product).collect();
    let mut add = |what: String, op: Op| match parts.iter_mut().find(|part| part.op == op) {
        Some(known) => known.count += 1,
        None => parts.push(Part { what, op, count: 1 }),
    };
    for (attention, ffn) in &spec.layers {
        for (width, per_row) in norms(spec, attention) {
            add(format!("norm of {width}"), Op::Norm { width, per_row });
        }
        let first = attention.mask().first_visible(context - 1);
        let shape = AttentionShape {
            heads: attention.heads,
            kv_heads: attention.kv_heads,
            head_dim: attention.head_dim,
            value_dim: attention.value_dim(),
            scale: attention.scale,
            mask: attention.mask(),
        };
        add(
            format!("attention, {} keys", context - first),
            Op::Attention { shape, precision, context: context - first },
        );
        if let FfnSpec::Moe(moe) = ffn
            && matches!(moe.router, RouterKind::Softmax { .. })
        {
            let op = Op::Choice { experts: moe.experts, top_k: moe.top_k };
            add(format!("choice of {} in {}", moe.top_k, moe.experts), op);
        }
    }
    add(format!("norm of {}", spec.hidden), Op::Norm { width: spec.hidden, per_row: 1 });
    add(format!("log-prob in {}", spec.head_width()), Op::LogProb { vocabulary: spec.head_width() });
    parts
}

fn product(shape: &ProductShape) -> Part {
    let &ProductShape { n, k, count, precision, quantisation, .. } = shape;
    let what = format!("{} {n}×{k}", shape.what);
    match shape.routed {
        Some((top_k, experts)) => {
            let add = shape.what == "expert_down";
            let op = Op::Experts { n, k, precision, quantisation, experts, top_k, add };
            Part { what: if add { what + ", added" } else { what }, op, count: count / experts }
        }
        None => {
            let bf16_would_do = shape.what == "router";
            Part { what, op: Op::Product { n, k, precision, quantisation, bf16_would_do }, count }
        }
    }
}

/// Width and number a row of a layer's norms.
fn norms(spec: &ModelSpec, attention: &AttentionSpec) -> Vec<(usize, usize)> {
    let mut norms = vec![(spec.hidden, 1); if spec.sandwich_norms { 4 } else { 2 }];
    let AttentionSpec { heads, kv_heads, head_dim, .. } = *attention;
    match attention.qk_norm {
        QkNorm::None => {}
        QkNorm::PerHead | QkNorm::WeightlessAfterRope => {
            norms.extend([(head_dim, heads), (head_dim, kv_heads)])
        }
        QkNorm::WholeProjection => norms.extend([(heads * head_dim, 1), (kv_heads * head_dim, 1)]),
    }
    if let Some(latent) = &attention.latent {
        norms.extend(latent.q_rank.into_iter().chain([latent.kv_rank]).map(|width| (width, 1)));
    }
    norms
}

/// A row for each part, and one for the step.
fn report(rows: usize, parts: &[Part], prices: &[Price]) -> Vec<Value> {
    let percent = |more: f64, less: f64| 100.0 * (more - less) / less;
    let sum = |of: fn(&Price) -> f64| -> f64 {
        parts.iter().zip(prices).map(|(part, price)| part.count as f64 * of(price)).sum()
    };
    let ours = sum(|price| price.seconds);
    let (exact, free) = (sum(|price| price.quickest(true).1), sum(|price| price.quickest(false).1));
    let mut lines: Vec<Value> = parts
        .iter()
        .zip(prices)
        .map(|(part, price)| {
            let ((by_exact, exact), (by, quickest)) = (price.quickest(true), price.quickest(false));
            let others: Map<String, Value> = price
                .others
                .iter()
                .map(|other| {
                    (other.name.to_owned(), json!({"us": 1e6 * other.seconds, "exact": other.exact}))
                })
                .collect();
            json!({
                "what": part.what, "rows": rows, "count": part.count, "rounds": price.rounds,
                "us": 1e6 * price.seconds, "others": others,
                "exact_us": 1e6 * exact, "exact_by": by_exact, "free_us": 1e6 * quickest, "free_by": by,
                "price_percent": percent(exact, quickest), "room_percent": percent(price.seconds, exact),
                "price_percent_of_step": 100.0 * part.count as f64 * (exact - quickest) / free,
            })
        })
        .collect();
    lines.push(json!({
        "what": "step", "rows": rows, "us": 1e6 * ours, "exact_us": 1e6 * exact, "free_us": 1e6 * free,
        "price_percent": percent(exact, free), "room_percent": percent(ours, exact),
        "price_percent_of_step": percent(exact, free),
    }));
    lines
}

fn text(lines: &[Value]) -> String {
    let by = |line: &Value| match (line["free_by"].as_str(), line["others"].as_object()) {
        (Some(name), Some(others)) if others[name]["exact"] == true => format!("{name} (exact too)"),
        (Some(name), _) => name.to_owned(),
        (None, Some(others)) if others.is_empty() => "none tried".to_owned(),
        (None, Some(_)) => "ours".to_owned(),
        (None, None) => String::new(),
    };
    let cells: Vec<Vec<String>> = lines
        .iter()
        .map(|line| {
            vec![
                number(line, "rows", 1.0, 0),
                line["what"].as_str().unwrap_or("-").to_owned(),
                number(line, "count", 1.0, 0),
                number(line, "us", 1.0, 2),
                number(line, "exact_us", 1.0, 2),
                number(line, "free_us", 1.0, 2),
                by(line),
                number(line, "price_percent", 1.0, 1),
                number(line, "price_percent_of_step", 1.0, 2),
                number(line, "room_percent", 1.0, 1),
            ]
        })
        .collect();
    let header = [
        "rows",
        "operation",
        "times",
        "us",
        "us exact",
        "us free",
        "quickest",
        "price %",
        "% of a step",
        "room %",
    ];
    table(&header, &cells)
}

#[cfg(test)]
mod tests {
    use freewheel_kernels::measure::price::Other;

    use super::*;

    #[test]
    fn a_step_holds_every_operation_with_a_rule() {
        let assets = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/sprout");
        let loaded = crate::policy::open(&assets, None).unwrap();
        let spec = loaded.model.spec();
        let parts = step(&loaded, 20);
        let count = |of: &dyn Fn(&Op) -> bool| -> usize {
            parts.iter().filter(|part| of(&part.op)).map(|part| part.count).sum()
        };
        assert_eq!(count(&|op| matches!(op, Op::Attention { .. })), spec.layers.len());
        assert_eq!(count(&|op| matches!(op, Op::Experts { .. })), 2 * spec.moe_layers());
        assert_eq!(count(&|op| matches!(op, Op::Experts { add: true, .. })), spec.moe_layers());
        assert_eq!(count(&|op| matches!(op, Op::LogProb { .. })), 1);
        let hidden = |op: &Op| matches!(op, Op::Norm { per_row: 1, width } if *width == spec.hidden);
        assert_eq!(count(&hidden), 2 * spec.layers.len() + 1);
        let routers = |op: &Op| matches!(op, Op::Product { bf16_would_do: true, .. });
        assert_eq!(count(&routers), spec.moe_layers());
    }

    #[test]
    fn the_price_of_a_step_weighs_operations_by_their_number() {
        let part = |count, width| Part { what: "norm".into(), op: Op::Norm { width, per_row: 1 }, count };
        let other = |name, seconds, exact| Other { name, seconds, exact };
        let prices = [
            Price { seconds: 4e-6, others: vec![other("a", 2e-6, false), other("b", 3e-6, true)], rounds: 5 },
            Price { seconds: 10e-6, others: vec![other("c", 11e-6, false)], rounds: 5 },
        ];
        let lines = report(8, &[part(5, 1), part(1, 2)], &prices);
        let of = |line: usize, key: &str| lines[line][key].as_f64().unwrap();
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} is not {b}");
        assert_eq!((lines[0]["free_by"].as_str(), lines[1]["free_by"].as_str()), (Some("a"), None));
        assert_eq!(lines[0]["exact_by"].as_str(), Some("b"));
        near(of(0, "price_percent"), 50.0);
        near(of(0, "room_percent"), 100.0 / 3.0);
        near(of(1, "price_percent"), 0.0);
        // Ours 5·4 + 10, exact 5·3 + 10 = 25, free 5·2 + 10 = 20.
        near(of(2, "us"), 30.0);
        near(of(2, "price_percent"), 25.0);
        near(of(2, "room_percent"), 20.0);
        near(of(0, "price_percent_of_step"), 25.0);
        let text = text(&lines);
        assert!(text.contains("ours") && text.lines().last().unwrap().contains("step"), "{text}");
    }
}
