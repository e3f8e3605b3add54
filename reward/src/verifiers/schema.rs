//! Is the completion JSON of the wanted form? JSON Schema (draft 2020-12), the part that judges form without other documents.
//!
//! A keyword it does not know is refused when the schema is read: one that is ignored would pass what it should not.

use regex::Regex;
use serde_json::{Map, Value};

use super::{Verifier, VerifierInput, after_thinking, compile, judged, tail};
use crate::stack::{Judgement, Unscored};

const DEPTH_MAX: usize = 64;
/// Keywords that say nothing about form.
const REMARKS: [&str; 9] =
    ["$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "examples"];

/// Compares with a fixed schema, or with the one that is the reference answer.
#[derive(Clone, Debug)]
pub struct JsonSchema {
    /// The schema of all prompts.
    pub schema: Option<Schema>,
}

/// A checked schema.
#[derive(Clone, Debug)]
pub struct Schema {
    root: Value,
}

impl Schema {
    /// Checks every keyword.
    ///
    /// # Errors
    /// The first one that is unknown or has a wrong value, with its place.
    pub fn new(root: Value) -> Result<Self, String> {
        check(&root, &root, "", 0)?;
        Ok(Self { root })
    }

    /// What is wrong with a value first, if anything.
    pub fn violated(&self, value: &Value) -> Option<String> {
        violated(&self.root, &self.root, value, "", 0)
    }
}

impl Verifier for JsonSchema {
    fn score(&self, input: &VerifierInput<'_>) -> Result<Judgement, Unscored> {
        let own;
        let schema = match &self.schema {
            Some(schema) => schema,
            None => {
                let answer =
                    input.answer.ok_or_else(|| Unscored("the prompt has no schema as its answer".into()))?;
                own = Schema::new(answer.clone()).map_err(|why| Unscored(format!("the schema: {why}")))?;
                &own
            }
        };
        let text = unfenced(after_thinking(tail(input.text)));
        let violated = match serde_json::from_str::<Value>(text) {
            Ok(value) => schema.violated(&value),
            Err(error) => Some(format!("is not JSON: {error}")),
        };
        Ok(judged(violated.is_none(), violated))
    }
}

/// The inside of a fence around the whole text.
fn unfenced(text: &str) -> &str {
    let text = text.trim();
    let inside = text.strip_prefix("```").and_then(|rest| rest.strip_suffix("```"));
    inside.and_then(|inside| inside.split_once('\n')).map_or(text, |(_, body)| body)
}

fn check(root: &Value, schema: &Value, at: &str, depth: usize) -> Result<(), String> {
    if depth > DEPTH_MAX {
        return Err(format!("{at}: nested more than {DEPTH_MAX} deep"));
    }
    let object = match schema {
        Value::Bool(_) => return Ok(()),
        Value::Object(object) => object,
        _ => return Err(format!("{at}: a schema is an object or a truth value")),
    };
    for (key, value) in object {
        let at = format!("{at}/{key}");
        let wrong = |what: &str| Err(format!("{at}: must be {what}"));
        let sub = |value: &Value, at: &str| check(root, value, at, depth + 1);
        match key.as_str() {
            "type" => {
                let known = |t: &Value| t.as_str().is_some_and(|t| TYPES.contains(&t));
                match value {
                    Value::Array(list) if !list.is_empty() && list.iter().all(known) => {}
                    one if known(one) => {}
                    _ => return wrong("a type, or some"),
                }
            }
            "enum" if value.is_array() => {}
            "required" if value.as_array().is_some_and(|list| list.iter().all(Value::is_string)) => {}
            "const" => {}
            "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum" if value.is_number() => {}
            "multipleOf" if value.as_f64().is_some_and(|x| x > 0.0) => {}
            "minLength" | "maxLength" | "minItems" | "maxItems" | "minProperties" | "maxProperties"
                if value.is_u64() => {}
            "uniqueItems" if value.is_boolean() => {}
            "pattern" => {
                pattern(value).map_err(|why| format!("{at}: {why}"))?;
            }
            "properties" | "patternProperties" | "$defs" | "definitions" => {
                let Value::Object(entries) = value else { return wrong("an object") };
                for (name, inner) in entries {
                    if key == "patternProperties" {
                        compile(name).map_err(|why| format!("{at}: {why}"))?;
                    }
                    sub(inner, &format!("{at}/{name}"))?;
                }
            }
            "items"
            | "additionalProperties"
            | "not"
            | "contains"
            | "propertyNames"
            | "if"
            | "then"
            | "else" => {
                sub(value, &at)?;
            }
            "prefixItems" | "allOf" | "anyOf" | "oneOf" => {
                let Value::Array(list) = value else { return wrong("a list") };
                for (i, inner) in list.iter().enumerate() {
                    sub(inner, &format!("{at}/{i}"))?;
                }
            }
            "$ref" => {
                let target = value
                    .as_str()
                    .and_then(|path| path.strip_prefix('#'))
                    .and_then(|path| root.pointer(path));
                if target.is_none() {
                    return wrong("a place in this schema, such as \"#/$defs/x\"");
                }
            }
            key if REMARKS.contains(&key) => {}
            _ => return Err(format!("{at}: is not understood, or has a wrong value")),
        }
    }
    Ok(())
}

const TYPES: [&str; 7] = ["null", "boolean", "object", "array", "number", "string", "integer"];

fn pattern(value: &Value) -> Result<Regex, String> {
    compile(value.as_str().ok_or("must be a text")?)
}

fn is_type(value: &Value, name: &str) -> bool {
    match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "object" => value.is_object(),
        "array" => value.is_array(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        _ => value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|x| x.fract() == 0.0),
    }
}

/// Numbers by value, everything else as it is.
fn same(a: &Value, b: &Value) -> bool {
    a == b || (a.is_number() && b.is_number() && a.as_f64() == b.as_f64())
}

fn violated(root: &Value, schema: &Value, value: &Value, at: &str, depth: usize) -> Option<String> {
    let place = if at.is_empty() { "the value" } else { at };
    let keywords = match schema {
        Value::Object(keywords) => keywords,
        Value::Bool(true) => return None,
        _ => return Some(format!("{place} is not allowed")),
    };
    if depth > DEPTH_MAX {
        return Some(format!("{place} is nested too deep"));
    }
    keywords.iter().find_map(|(key, want)| {
        let sub = |schema: &Value, value: &Value, at: &str| violated(root, schema, value, at, depth + 1);
        let fail = |what: String| Some(format!("{place} {what}"));
        match key.as_str() {
            "type" => {
                let fits = match want {
                    Value::Array(list) => list.iter().filter_map(Value::as_str).any(|t| is_type(value, t)),
                    one => one.as_str().is_some_and(|t| is_type(value, t)),
                };
                if fits { None } else { fail(format!("is not of type {want}")) }
            }
            "const" if !same(value, want) => fail(format!("is not {want}")),
            "enum" if !want.as_array()?.iter().any(|option| same(value, option)) => {
                fail(format!("is none of {want}"))
            }
            "allOf" => want.as_array()?.iter().find_map(|schema| sub(schema, value, at)),
            "anyOf" if want.as_array()?.iter().all(|schema| sub(schema, value, at).is_some()) => {
                fail("fits none of anyOf".into())
            }
            "oneOf" => {
                match want.as_array()?.iter().filter(|schema| sub(schema, value, at).is_none()).count() {
                    1 => None,
                    n => fail(format!("fits {n} of oneOf")),
                }
            }
            "not" if sub(want, value, at).is_none() => fail("fits what it must not".into()),
            "if" => {
                let branch = if sub(want, value, at).is_none() { "then" } else { "else" };
                keywords.get(branch).and_then(|schema| sub(schema, value, at))
            }
            "$ref" => {
                let target = want.as_str()?.strip_prefix('#').and_then(|path| root.pointer(path))?;
                sub(target, value, at)
            }
            _ => match value {
                Value::Number(_) => number(key, want, value.as_f64()?).and_then(fail),
                Value::String(text) => string(key, want, text).and_then(fail),
                Value::Array(items) => list(keywords, key, want, items, at, &sub)
                    .or_else(|| items_size(key, want, items).and_then(fail)),
                Value::Object(members) => object(keywords, key, want, members, at, &sub),
                _ => None,
            },
        }
    })
}

fn number(key: &str, want: &Value, x: f64) -> Option<String> {
    let limit = want.as_f64()?;
    let fine = match key {
        "minimum" => x >= limit,
        "maximum" => x <= limit,
        "exclusiveMinimum" => x > limit,
        "exclusiveMaximum" => x < limit,
        "multipleOf" => {
            let times = x / limit;
            (times - times.round()).abs() <= 1e-9 * times.abs().max(1.0)
        }
        _ => true,
    };
    (!fine).then(|| format!("is {x}, against {key} {limit}"))
}

fn string(key: &str, want: &Value, text: &str) -> Option<String> {
    let length = text.chars().count() as u64;
    match key {
        "minLength" if length < want.as_u64()? => Some(format!("is {length} characters, fewer than {want}")),
        "maxLength" if length > want.as_u64()? => Some(format!("is {length} characters, more than {want}")),
        "pattern" if !pattern(want).ok()?.is_match(text) => Some(format!("does not match {want}")),
        _ => None,
    }
}

fn items_size(key: &str, want: &Value, items: &[Value]) -> Option<String> {
    let n = items.len() as u64;
    match key {
        "minItems" if n < want.as_u64()? => Some(format!("has {n} items, fewer than {want}")),
        "maxItems" if n > want.as_u64()? => Some(format!("has {n} items, more than {want}")),
        "uniqueItems" if want == &Value::Bool(true) => {
            let twice = items.iter().enumerate().any(|(i, a)| items[..i].iter().any(|b| same(a, b)));
            twice.then(|| "holds an item twice".into())
        }
        _ => None,
    }
}

type Sub<'a> = dyn Fn(&Value, &Value, &str) -> Option<String> + 'a;

fn list(
    keywords: &Map<String, Value>,
    key: &str,
    want: &Value,
    items: &[Value],
    at: &str,
    sub: &Sub<'_>,
) -> Option<String> {
    let prefix = keywords.get("prefixItems").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let each = |(i, item): (usize, &Value), schema: &Value| sub(schema, item, &format!("{at}/{i}"));
    match key {
        "prefixItems" => items.iter().enumerate().zip(prefix).find_map(|(item, schema)| each(item, schema)),
        "items" => items.iter().enumerate().skip(prefix.len()).find_map(|item| each(item, want)),
        "contains" if !items.iter().any(|item| sub(want, item, at).is_none()) => {
            Some(format!("{at} contains nothing that fits"))
        }
        _ => None,
    }
}

fn object(
    keywords: &Map<String, Value>,
    key: &str,
    want: &Value,
    members: &Map<String, Value>,
    at: &str,
    sub: &Sub<'_>,
) -> Option<String> {
    let n = members.len() as u64;
    let patterns = || keywords.get("patternProperties").and_then(Value::as_object).into_iter().flatten();
    let matching = |name: &str| {
        patterns()
            .filter(|(text, _)| compile(text).is_ok_and(|p| p.is_match(name)))
            .map(|(_, s)| s)
            .collect::<Vec<_>>()
    };
    let inside = |name: &str| format!("{at}/{name}");
    match key {
        "required" => {
            let missing = want
                .as_array()?
                .iter()
                .filter_map(Value::as_str)
                .find(|name| !members.contains_key(*name))?;
            Some(format!("{} is missing", inside(missing)))
        }
        "properties" => {
            want.as_object()?.iter().find_map(|(name, schema)| sub(schema, members.get(name)?, &inside(name)))
        }
        "patternProperties" => members.iter().find_map(|(name, value)| {
            matching(name).into_iter().find_map(|schema| sub(schema, value, &inside(name)))
        }),
        "additionalProperties" => {
            let known = keywords.get("properties").and_then(Value::as_object);
            members
                .iter()
                .filter(|(name, _)| {
                    !known.is_some_and(|k| k.contains_key(*name)) && matching(name).is_empty()
                })
                .find_map(|(name, value)| sub(want, value, &inside(name)))
        }
        "propertyNames" => {
            members.keys().find_map(|name| sub(want, &Value::String(name.clone()), &inside(name)))
        }
        "minProperties" if n < want.as_u64()? => Some(format!("{at} has {n} members, fewer than {want}")),
        "maxProperties" if n > want.as_u64()? => Some(format!("{at} has {n} members, more than {want}")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::verifiers::tests::verdict;

    #[test]
    fn every_keyword_passes_and_fails() {
        for (schema, good, bad) in [
            (json!({"type": "integer"}), json!(3.0), json!(3.5)),
            (json!({"type": ["null", "string"]}), json!(null), json!(1)),
            (json!({"enum": [1, "a"]}), json!(1.0), json!("b")),
            (json!({"const": {"a": [1]}}), json!({"a": [1]}), json!({"a": [2]})),
            (json!({"minimum": 1, "exclusiveMaximum": 2}), json!(1), json!(2)),
            (json!({"multipleOf": 0.1}), json!(0.3), json!(0.35)),
            (json!({"minLength": 2, "maxLength": 3}), json!("äö"), json!("a")),
            (json!({"pattern": "^a+$"}), json!("aa"), json!("ab")),
            (json!({"items": {"type": "string"}, "minItems": 1}), json!(["a"]), json!([])),
            (json!({"prefixItems": [{"type": "number"}], "items": false}), json!([1]), json!([1, 2])),
            (json!({"uniqueItems": true}), json!([1, "1"]), json!([1, 1.0])),
            (json!({"contains": {"const": 7}}), json!([1, 7]), json!([1])),
            (
                json!({"required": ["a"], "properties": {"a": {"type": "string"}}}),
                json!({"a": "x"}),
                json!({"a": 1}),
            ),
            (json!({"required": ["a"]}), json!({"a": null}), json!({})),
            (
                json!({"properties": {"a": true}, "additionalProperties": false}),
                json!({"a": 1}),
                json!({"b": 1}),
            ),
            (
                json!({"patternProperties": {"^x": {"type": "number"}}, "additionalProperties": false}),
                json!({"xa": 1}),
                json!({"xa": "1"}),
            ),
            (json!({"propertyNames": {"maxLength": 1}}), json!({"a": 1}), json!({"ab": 1})),
            (json!({"minProperties": 1}), json!({"a": 1}), json!({})),
            (json!({"allOf": [{"type": "number"}, {"minimum": 2}]}), json!(2), json!(1)),
            (json!({"anyOf": [{"type": "null"}, {"minimum": 2}]}), json!(null), json!(1)),
            (json!({"oneOf": [{"minimum": 1}, {"minimum": 3}]}), json!(2), json!(4)),
            (json!({"not": {"type": "null"}}), json!(1), json!(null)),
            (
                json!({"if": {"type": "number"}, "then": {"minimum": 0}, "else": {"type": "null"}}),
                json!(null),
                json!(-1),
            ),
            (
                json!({"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"}),
                json!([[], [[]]]),
                json!([[], [1]]),
            ),
        ] {
            let checked = Schema::new(schema.clone()).unwrap_or_else(|e| panic!("{schema}: {e}"));
            assert_eq!(checked.violated(&good), None, "{schema} {good}");
            assert!(checked.violated(&bad).is_some(), "{schema} {bad}");
        }
    }

    #[test]
    fn completions_are_read_with_and_without_a_fence() {
        let verifier = JsonSchema { schema: None };
        let schema = json!({"type": "object", "required": ["a"]});
        assert_eq!(verdict(&verifier, &schema, "{\"a\": 1}"), Some(1.0));
        assert_eq!(verdict(&verifier, &schema, "<think>{}</think>\n```json\n{\"a\": 1}\n```"), Some(1.0));
        assert_eq!(verdict(&verifier, &schema, "Here: {\"a\": 1}"), Some(0.0));
        assert_eq!(verdict(&verifier, &schema, "{}"), Some(0.0));
    }

    #[test]
    fn what_is_not_understood_is_refused_not_ignored() {
        for schema in [
            json!({"tipe": "string"}),
            json!({"type": "text"}),
            json!({"format": "email"}),
            json!({"pattern": "(?=x)"}),
            json!({"$ref": "http://x/y"}),
            json!({"$ref": "#/$defs/none"}),
            json!({"items": [1]}),
            json!({"required": "a"}),
            json!(7),
        ] {
            assert!(Schema::new(schema.clone()).is_err(), "{schema}");
            assert_eq!(verdict(&JsonSchema { schema: None }, &schema, "{}"), None, "{schema}");
        }
        let mut endless = json!({"$ref": "#"});
        endless["title"] = json!("itself");
        let schema = Schema::new(endless).unwrap();
        assert!(schema.violated(&json!(1)).unwrap().contains("too deep"));
    }
}
