//! `report.html`: one self-contained page over a run's folder.
//!
//! ```text
//! metrics.jsonl  eval.jsonl  alarms.jsonl  rollouts/*.jsonl  config.toml ─► data ─► page (tiles, alarms, charts, accounting, samples, config) ─► report.html
//! ```
//!
//! Inline SVG and CSS, no script, nothing from the network; light and dark. Prompts and completions are hostile text: everything
//! from the run is escaped where it enters the page, and the page's content policy forbids scripts besides. Reads only; a run
//! that is still going, or that was killed in the middle of a line, gives a report of what there is.

mod chart;
mod data;
mod panels;
mod samples;
mod text;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::alarms::AlarmAction;
use data::RunData;
use text::{count, duration, escape, number};

const STYLE: &str = include_str!("style.css");

/// Writes `report.html` into the run folder `run_dir` and gives its path.
///
/// # Errors
/// If `run_dir` is no folder, a file in it cannot be read, or the report cannot be written.
pub fn write(run_dir: &Path) -> anyhow::Result<PathBuf> {
    let data = RunData::read(run_dir)?;
    let path = run_dir.join("report.html");
    let partial = run_dir.join("report.html.tmp");
    fs::write(&partial, page(&data)).with_context(|| format!("cannot write {}", partial.display()))?;
    fs::rename(&partial, &path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

fn page(data: &RunData) -> String {
    let name = escape(&data.name);
    let mut html = String::with_capacity(1 << 16);
    let _ = write!(
        html,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>{name} · Freewheel</title><style>{STYLE}</style></head><body><main>\
         <header><p class=\"brand\">Freewheel run report</p><h1>{name}</h1><p class=\"lede\">{}</p></header>",
        lede(data)
    );
    html += &tiles(data);
    html += &alarms(data);
    for section in panels::sections(data) {
        let _ = write!(
            html,
            "<section><h2>{}</h2><div class=\"grid\">{}</div></section>",
            section.title,
            section.charts.concat()
        );
    }
    html += &accounting(data);
    html += &samples::section(data);
    html += &config(data);
    html += &footer(data);
    html += "</main></body></html>\n";
    html
}

/// The run in one sentence.
fn lede(data: &RunData) -> String {
    let Some(steps) = data.last("step") else {
        return "No learner step has been recorded yet: there is nothing to plot.".to_owned();
    };
    let mut sentence = format!("{} learner steps", count(steps));
    if let Some(wall) = data.last("time/wall_s") {
        let _ = write!(sentence, " in {}", duration(wall));
    }
    if let Some((name, first, last)) = data.held_out().first().and_then(|eval| eval.ends()) {
        let _ = write!(
            sentence,
            "; accuracy on held-out prompts ({}) went from <b>{}</b> to <b>{}</b>",
            escape(name),
            number(first),
            number(last)
        );
    }
    sentence + "."
}

fn tiles(data: &RunData) -> String {
    let mut tiles = String::new();
    let mut tile = |label: &str, value: String, note: String| {
        let _ =
            write!(tiles, "<div class=\"tile\"><dt>{label}</dt><dd>{value}<small>{note}</small></dd></div>");
    };
    if let Some((_, first, last)) = data.held_out().first().and_then(|eval| eval.ends()) {
        tile("Held-out accuracy", number(last), format!("from {}", number(first)));
    }
    if let Some((first, last)) = data.ends("reward/mean") {
        tile("Reward", number(last), format!("from {}", number(first)));
    }
    if let Some(trained) = data.last("accounting/trained") {
        tile(
            "Rollouts trained on",
            count(trained),
            data.last("accounting/issued").map_or(String::new(), |n| format!("of {} asked for", count(n))),
        );
    }
    if let Some((_, last)) = data.ends("rollout/tokens_per_s") {
        tile("Sampling", format!("{}/s", count(last)), "tokens, last steps".to_owned());
    }
    if let Some(most) = data.max("staleness/max") {
        tile("Staleness", count(most), "updates at most".to_owned());
    }
    if let Some(gap) = data.max("mismatch/same_version_abs_max") {
        let tokens = data
            .sum("mismatch/same_version_tokens")
            .map_or(String::new(), |n| format!(" on {} tokens", count(n)));
        let note = format!("{}{tokens}", if gap == 0.0 { "to the bit" } else { "must be 0" });
        tile("Same-version gap", number(gap), note);
    }
    if tiles.is_empty() { tiles } else { format!("<dl class=\"tiles\">{tiles}</dl>") }
}

/// The alarms that were raised, with what was done.
fn alarms(data: &RunData) -> String {
    let rows = data.alarms.iter().fold(String::new(), |mut rows, raised| {
        let action = match raised.action {
            AlarmAction::Log => "told",
            AlarmAction::Pause => "paused the run",
            AlarmAction::Stop => "stopped the run",
        };
        let _ = write!(
            rows,
            "<tr><td class=\"n\">{}</td><th scope=\"row\">{}</th><td>{}</td><td class=\"poor\">{action}</td></tr>",
            raised.step,
            escape(&raised.alarm),
            escape(&raised.what)
        );
        rows
    });
    if rows.is_empty() {
        return String::new();
    }
    format!(
        "<section><h2>Alarms</h2><div class=\"card\"><table class=\"ledger\"><thead><tr><th scope=\"col\" class=\"n\">step</th>\
         <th scope=\"col\">alarm</th><th scope=\"col\">what</th><th scope=\"col\"></th></tr></thead><tbody>{rows}</tbody></table></div></section>"
    )
}

/// Where every rollout is, and whether the sum is right.
fn accounting(data: &RunData) -> String {
    let Some(issued) = data.last("accounting/issued") else { return String::new() };
    let part = |key: &str| data.last(&format!("accounting/{key}")).unwrap_or(0.0);
    let dropped = data.last_with_prefix("accounting/dropped_");
    let mut rows: Vec<(String, f64, &str)> = vec![("Trained on".to_owned(), part("trained"), "trained")];
    rows.extend(
        dropped
            .iter()
            .map(|(reason, n)| (format!("Dropped: {}", escape(&reason.replace('_', " "))), *n, "dropped")),
    );
    rows.push(("Queued".to_owned(), part("queued"), "queued"));
    rows.push(("In flight".to_owned(), part("in_flight"), "flight"));
    let sum: f64 = rows.iter().map(|row| row.1).sum();
    let cells = rows.iter().filter(|row| row.1 != 0.0 || row.2 != "dropped").fold(
        String::new(),
        |mut cells, (name, n, class)| {
            let share = if issued > 0.0 { 100.0 * n / issued } else { 0.0 };
            let _ = write!(
                cells,
                "<tr><th scope=\"row\">{name}</th><td class=\"n\">{}</td><td class=\"n\">{share:.1} %</td>\
             <td class=\"bar\"><i class=\"{class}\" style=\"width:{:.2}%\"></i></td></tr>",
                text::whole(*n),
                share.clamp(0.0, 100.0)
            );
            cells
        },
    );
    let verdict = match sum == issued {
        true => "<p class=\"ok\">Every rollout is accounted for.</p>".to_owned(),
        false => format!(
            "<p class=\"bad\">The parts add up to {}, {} were issued: {} unaccounted for.</p>",
            text::whole(sum),
            text::whole(issued),
            text::whole(issued - sum)
        ),
    };
    format!(
        "<section><h2>Where every rollout went</h2><div class=\"card\"><table class=\"ledger\"><tbody>{cells}</tbody>\
         <tfoot><tr><th scope=\"row\">Issued</th><td class=\"n\">{}</td><td class=\"n\">100 %</td><td class=\"bar\"></td></tr></tfoot></table>{verdict}</div></section>",
        text::whole(issued)
    )
}

fn config(data: &RunData) -> String {
    match &data.config {
        Some(config) => format!(
            "<section><h2>Configuration</h2><details><summary>config.toml, as resolved</summary><pre>{}</pre></details></section>",
            escape(config)
        ),
        None => String::new(),
    }
}

fn footer(data: &RunData) -> String {
    let skipped = match data.skipped_lines {
        0 => String::new(),
        n => format!(" {n} unreadable lines were left out (a run killed while writing leaves one)."),
    };
    format!(
        "<footer>Lines show every step faintly and a local fit boldly; bands are 95 % intervals. Made by Freewheel {}.{skipped}</footer>",
        env!("CARGO_PKG_VERSION")
    )
}

#[cfg(test)]
mod tests;
