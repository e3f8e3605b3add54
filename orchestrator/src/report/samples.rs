//! A handful of rollouts from both ends of the run, side by side.

use std::fmt::Write as _;

use serde_json::{Map, Value};

use super::data::RunData;
use super::text::{escape, number, whole};

/// Longer texts are cut, with a note.
const TEXT_MAX: usize = 2400;

pub(super) fn section(data: &RunData) -> String {
    if data.first_samples.is_empty() {
        return String::new();
    }
    let column = |title: &str, samples: &[Map<String, Value>]| match samples {
        [] => String::new(),
        samples => format!("<div><h3>{title}</h3>{}</div>", samples.iter().map(card).collect::<String>()),
    };
    format!(
        "<section><h2>Rollouts, first and last</h2><div class=\"pair\">{}{}</div></section>",
        column("At the start", &data.first_samples),
        column("At the end", &data.last_samples)
    )
}

fn card(sample: &Map<String, Value>) -> String {
    let string = |key: &str| sample.get(key).and_then(Value::as_str);
    let mut html = String::from("<article class=\"card rollout\"><header>");
    html += &verdict(sample);
    let mut facts = Vec::new();
    facts.extend(sample.get("step").and_then(Value::as_f64).map(|step| format!("step {}", whole(step))));
    facts.extend(sample.get("tokens").and_then(Value::as_f64).map(|n| format!("{} tokens", whole(n))));
    facts
        .extend(string("finish_reason").filter(|reason| *reason == "length").map(|_| "truncated".to_owned()));
    facts.extend(string("id").map(|id| format!("<code>{}</code>", escape(id))));
    let _ = write!(html, "<small>{}</small></header>", facts.join(" · "));
    let question = string("question").map_or_else(|| plain(sample.get("prompt")), str::to_owned);
    let _ = write!(html, "<p class=\"q\">{}</p>", cut(&question));
    let _ = write!(html, "<p class=\"a\">{}</p>", cut(string("text").unwrap_or_default()));
    if let Some(answer) = sample.get("answer").filter(|answer| !answer.is_null()) {
        let _ = write!(html, "<p class=\"gold\">expected {}</p>", cut(&plain(Some(answer))));
    }
    html += &components(sample);
    html + "</article>"
}

/// The reward; unscored is said, never shown as 0.
fn verdict(sample: &Map<String, Value>) -> String {
    let class = match sample.get("correct").and_then(Value::as_bool) {
        Some(true) => "good",
        Some(false) => "poor",
        None => "plain",
    };
    match sample.get("reward").and_then(Value::as_f64) {
        Some(reward) => format!("<span class=\"reward {class}\">{}</span>", number(reward)),
        None => format!("<span class=\"reward none\">unscored{}</span>", note(sample.get("unscored"))),
    }
}

fn components(sample: &Map<String, Value>) -> String {
    let mut chips = String::new();
    if let Some(gate) = sample.get("gated_by").and_then(Value::as_str) {
        let _ = write!(chips, "<li class=\"gate\">gate {}</li>", escape(gate));
    }
    for (name, part) in sample.get("components").and_then(Value::as_object).into_iter().flatten() {
        let value = part.get("value").and_then(Value::as_f64).map_or_else(|| "–".to_owned(), number);
        let _ = write!(chips, "<li>{} <b>{value}</b>{}</li>", escape(name), note(part.get("detail")));
    }
    if chips.is_empty() { chips } else { format!("<ul class=\"chips\">{chips}</ul>") }
}

fn note(detail: Option<&Value>) -> String {
    detail
        .and_then(Value::as_str)
        .filter(|text| !text.is_empty())
        .map_or_else(String::new, |text| format!(" <i>{}</i>", cut(text)))
}

/// A JSON value as text: strings bare, the rest as JSON.
fn plain(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

/// Escaped, and not endless.
fn cut(text: &str) -> String {
    match text.char_indices().nth(TEXT_MAX) {
        Some((at, _)) => {
            format!("{} … ({} characters more)", escape(&text[..at]), text[at..].chars().count())
        }
        None => escape(text),
    }
}
