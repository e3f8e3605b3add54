//! What each kind of server is asked, and where in its answer the score lies. Sources: vLLM's and Text Embeddings Inference's API pages;
//! verl's reward_loop.py for vLLM and SGLang; OpenRLHF's serve_rm.py.

use serde_json::{Value, json};

use super::Backend;
use crate::stack::Completion;

use super::texts::{conversation, prompt_text};

/// Path and body.
pub(super) fn request(
    backend: Backend,
    model: &str,
    format: Option<&str>,
    completion: &Completion<'_>,
) -> (&'static str, Value) {
    let text = || match format {
        Some(format) => filled(format, &prompt_text(completion.prompt), completion.text),
        None => format!("{}{}", prompt_text(completion.prompt), completion.text),
    };
    match backend {
        // Without a format the server applies its model's chat template.
        Backend::VllmClassify if format.is_none() => {
            let body = json!({"model": model, "messages": conversation(completion), "use_activation": false});
            ("/classify", body)
        }
        Backend::VllmClassify => {
            ("/classify", json!({"model": model, "input": text(), "use_activation": false}))
        }
        Backend::Sglang => ("/v1/embeddings", json!({"model": model, "input": text()})),
        Backend::Openrlhf => {
            let label =
                completion.prompt.answer.as_deref().and_then(|a| serde_json::from_str::<Value>(a).ok());
            let prompts = [prompt_text(completion.prompt)];
            ("/get_reward", json!({"query": [text()], "prompts": prompts, "labels": [label]}))
        }
        Backend::Tei => ("/predict", json!({"inputs": text(), "raw_scores": true})),
        Backend::Judge => unreachable!("judges have their own requests"),
    }
}

/// The score in an answer; `label` picks one of several.
pub(super) fn score(backend: Backend, answer: &Value, label: Option<&str>) -> Result<f32, String> {
    let number = match backend {
        Backend::VllmClassify => last(answer.pointer("/data/0/probs")),
        Backend::Sglang => last(answer.pointer("/data/0/embedding")),
        Backend::Openrlhf => {
            let first = |key: &str| answer.pointer(key).and_then(Value::as_f64);
            first("/rewards/0").or_else(|| first("/rewards/0/0")).or_else(|| first("/scores/0"))
        }
        Backend::Tei => labelled(answer, label),
        Backend::Judge => None,
    };
    let number = number.ok_or_else(|| format!("no score in the answer of a {} server", backend.name()))?;
    finite(number)
}

/// As f32, if it is a number.
pub(super) fn finite(number: f64) -> Result<f32, String> {
    let value = number as f32;
    if value.is_finite() { Ok(value) } else { Err(format!("the score {number} is not a finite number")) }
}

/// The last number of a list.
pub(super) fn last(list: Option<&Value>) -> Option<f64> {
    list?.as_array()?.last()?.as_f64()
}

/// TEI answers one input with a list of labels, several with a list of lists.
fn labelled(answer: &Value, label: Option<&str>) -> Option<f64> {
    let list = answer.as_array()?;
    let list = match list.first()? {
        Value::Array(inner) => inner,
        _ => list,
    };
    let found = match label {
        Some(label) => list.iter().find(|entry| entry["label"] == label)?,
        None if list.len() == 1 => list.first()?,
        None => return None,
    };
    found["score"].as_f64()
}

/// `{prompt}` and `{response}` filled in, in one pass: what is filled in is not looked at again.
pub(super) fn filled(format: &str, prompt: &str, response: &str) -> String {
    let mut out = String::with_capacity(format.len() + prompt.len() + response.len());
    let mut rest = format;
    while let Some(at) = rest.find('{') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(after) = rest.strip_prefix("{prompt}") {
            out.push_str(prompt);
            rest = after;
        } else if let Some(after) = rest.strip_prefix("{response}") {
            out.push_str(response);
            rest = after;
        } else {
            out.push('{');
            rest = &rest[1..];
        }
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_where_each_server_puts_them() {
        let of = |backend, answer: &str, label| score(backend, &serde_json::from_str(answer).unwrap(), label);
        assert_eq!(of(Backend::VllmClassify, r#"{"data": [{"probs": [0.1, -2.5]}]}"#, None), Ok(-2.5));
        assert_eq!(of(Backend::Sglang, r#"{"data": [{"embedding": [3]}]}"#, None), Ok(3.0));
        assert_eq!(of(Backend::Openrlhf, r#"{"rewards": [0.5], "extra_logs": {}}"#, None), Ok(0.5));
        assert_eq!(
            of(Backend::Tei, r#"[[{"label": "a", "score": 1}, {"label": "b", "score": 2}]]"#, Some("b")),
            Ok(2.0)
        );
        assert_eq!(of(Backend::Tei, r#"[{"label": "a", "score": 1}]"#, None), Ok(1.0));
        for garbage in [
            "{}",
            "[]",
            "7",
            r#"{"data": []}"#,
            r#"{"data": [{"probs": ["1"]}]}"#,
            r#"{"data": [{"probs": []}]}"#,
        ] {
            assert!(of(Backend::VllmClassify, garbage, None).is_err(), "{garbage}");
        }
        assert!(
            of(Backend::VllmClassify, r#"{"data": [{"probs": [1e300]}]}"#, None)
                .unwrap_err()
                .contains("finite")
        );
        let two = r#"[{"label": "a", "score": 1}, {"label": "b", "score": 2}]"#;
        assert!(of(Backend::Tei, two, None).is_err(), "which label?");
    }

    #[test]
    fn a_response_cannot_fill_in_the_prompt_again() {
        assert_eq!(filled("<{prompt}|{response}|{x}{", "p", "{prompt}"), "<p|{prompt}|{x}{");
    }
}
