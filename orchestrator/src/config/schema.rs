//! Holds a document against a JSON schema and says everything that does not fit.
//!
//! serde stops at the first mistake and knows no place; this walk names them all, each with its place, the nearest real
//! key, and the value's limits. The schema is the one schemars derives from the section structs, so there is nothing to
//! keep in step. What is not expressible in it is checked afterwards (`checks`).

use serde_json::{Map, Value as Json};

use super::aliases;
use super::document::{Node, Value};
use super::problem::Problem;

/// All mistakes of `node` against `schema`; `root` is the whole schema (for references).
pub fn check(root: &Json, schema: &Json, node: &Node, key: &str, problems: &mut Vec<Problem>) {
    let walk = Walk { root, keys: all_keys(root) };
    walk.node(schema, node, key, problems);
}

/// Follows `$ref`; a schema that is only a wrapper around one other is unwrapped.
pub fn resolve<'s>(root: &'s Json, schema: &'s Json) -> &'s Json {
    let mut schema = schema;
    while let Some(name) = schema.get("$ref").and_then(Json::as_str) {
        match name.strip_prefix("#/$defs/").and_then(|name| root.get("$defs")?.get(name)) {
            Some(target) => schema = target,
            None => break,
        }
    }
    schema
}

/// Every dotted key the schema knows.
pub fn all_keys(root: &Json) -> Vec<String> {
    fn visit(root: &Json, schema: &Json, at: &str, keys: &mut Vec<String>) {
        let Some(properties) = resolve(root, schema).get("properties").and_then(Json::as_object) else {
            return;
        };
        for (name, child) in properties {
            let key = join(at, name);
            visit(root, child, &key, keys);
            keys.push(key);
        }
    }
    let mut keys = Vec::new();
    visit(root, root, "", &mut keys);
    keys
}

/// `at.name`, or `name` at the top.
pub fn join(at: &str, name: &str) -> String {
    if at.is_empty() { name.to_owned() } else { format!("{at}.{name}") }
}

struct Walk<'s> {
    root: &'s Json,
    keys: Vec<String>,
}

impl Walk<'_> {
    fn node(&self, schema: &Json, node: &Node, key: &str, problems: &mut Vec<Problem>) {
        let schema = resolve(self.root, schema);
        for union in ["oneOf", "anyOf"] {
            if let Some(options) = schema.get(union).and_then(Json::as_array) {
                return self.union(options, node, key, problems);
            }
        }
        if let Some(all) = schema.get("allOf").and_then(Json::as_array) {
            return all.iter().for_each(|part| self.node(part, node, key, problems));
        }
        if let Some(wrong) = self.wrong_type(schema, node) {
            return problems.push(problem(node, key, wrong, None));
        }
        if let Some(wrong) = out_of_range(schema, node) {
            return problems.push(problem(node, key, wrong, None));
        }
        match &node.value {
            Value::Table(entries) => self.table(schema, entries, key, problems),
            Value::Array(items) => {
                if let Some(item_schema) = schema.get("items") {
                    for (i, item) in items.iter().enumerate() {
                        self.node(item_schema, item, &format!("{key}[{i}]"), problems);
                    }
                }
            }
            _ => {}
        }
    }

    fn table(&self, schema: &Json, entries: &[(String, Node)], key: &str, problems: &mut Vec<Problem>) {
        let empty = Map::new();
        let properties = schema.get("properties").and_then(Json::as_object).unwrap_or(&empty);
        for (name, child) in entries {
            let child_key = join(key, name);
            match (properties.get(name), schema.get("additionalProperties")) {
                (Some(child_schema), _) => self.node(child_schema, child, &child_key, problems),
                (None, Some(Json::Bool(false)) | None) => {
                    problems.push(problem(
                        child,
                        &child_key,
                        "there is no such key".into(),
                        self.suggest(&child_key, name, properties),
                    ));
                }
                (None, Some(Json::Bool(true))) => {}
                (None, Some(extra)) => self.node(extra, child, &child_key, problems),
            }
        }
        let required = schema.get("required").and_then(Json::as_array).into_iter().flatten();
        for name in required.filter_map(Json::as_str) {
            if !entries.iter().any(|(entry, _)| entry == name) {
                let place = entries.first().map_or_else(Node::table, |(_, node)| node.clone());
                problems.push(problem(&place, &join(key, name), "is required here and missing".into(), None));
            }
        }
    }

    /// The value must fit one of several schemas: strings of an enum, tagged tables, an optional value.
    fn union(&self, options: &[Json], node: &Node, key: &str, problems: &mut Vec<Problem>) {
        let mut best: Option<Vec<Problem>> = None;
        for option in options {
            let mut found = Vec::new();
            self.node(option, node, key, &mut found);
            if found.is_empty() {
                return;
            }
            let tagged = self.tag_matches(resolve(self.root, option), node);
            if tagged || best.as_ref().is_none_or(|best| found.len() < best.len()) {
                best = Some(found);
            }
            if tagged {
                break;
            }
        }
        let names: Vec<&str> =
            options.iter().flat_map(|option| strings_of(resolve(self.root, option))).collect();
        match &node.value {
            Value::String(text) if !names.is_empty() => problems.push(not_one_of(node, key, text, &names)),
            Value::Table(_) => problems.extend(best.unwrap_or_default()),
            _ => {
                let wants: Vec<String> = options
                    .iter()
                    .map(|option| wanted(resolve(self.root, option)))
                    .filter(|want| want != "nothing")
                    .collect();
                let mut wants_once = wants.clone();
                wants_once.dedup();
                // One real option (an optional value): its own complaint is the clearest.
                match (wants_once.len(), best) {
                    (1, Some(best)) => problems.extend(best),
                    _ => problems.push(problem(
                        node,
                        key,
                        format!("is {}, expected {}", show(node), wants_once.join(" or ")),
                        None,
                    )),
                }
            }
        }
    }

    fn tag_matches(&self, option: &Json, node: &Node) -> bool {
        let Some(properties) = option.get("properties").and_then(Json::as_object) else { return false };
        properties.iter().any(|(name, schema)| {
            let tag = schema.get("const").and_then(Json::as_str);
            tag.is_some()
                && node
                    .get(name)
                    .is_some_and(|x| matches!(&x.value, Value::String(text) if Some(text.as_str()) == tag))
        })
    }

    fn wrong_type(&self, schema: &Json, node: &Node) -> Option<String> {
        if let Some(names) = schema.get("enum").and_then(Json::as_array) {
            let names: Vec<&str> = names.iter().filter_map(Json::as_str).collect();
            return match &node.value {
                Value::String(text) if names.contains(&text.as_str()) => None,
                _ => Some(format!("is {}, expected one of {}", show(node), quoted(&names))),
            };
        }
        if let Some(tag) = schema.get("const").and_then(Json::as_str) {
            let fits = matches!(&node.value, Value::String(text) if text == tag);
            return (!fits).then(|| format!("is {}, expected \"{tag}\"", show(node)));
        }
        let types: Vec<&str> = match schema.get("type") {
            Some(Json::String(name)) => vec![name],
            Some(Json::Array(names)) => names.iter().filter_map(Json::as_str).collect(),
            _ => return None,
        };
        let fits = |name: &&str| {
            matches!(
                (*name, &node.value),
                ("boolean", Value::Bool(_))
                    | ("integer" | "number", Value::Integer(_))
                    | ("number", Value::Float(_))
                    | ("string", Value::String(_))
                    | ("array", Value::Array(_))
                    | ("object", Value::Table(_))
            )
        };
        (!types.iter().any(fits)).then(|| format!("is {}, expected {}", show(node), wanted(schema)))
    }

    /// The cure for an unknown key: a known alias, the nearest key beside it, or the same name in another section.
    fn suggest(&self, key: &str, name: &str, siblings: &Map<String, Json>) -> Option<String> {
        if let Some(ours) = aliases::lookup(name).filter(|ours| self.keys.iter().any(|k| k == ours)) {
            return Some(format!("`{name}` is called `{ours}` here"));
        }
        if let Some(home) = self.keys.iter().find(|k| k.rsplit('.').next() == Some(name)) {
            return Some(format!("`{name}` belongs to another section: `{home}`"));
        }
        let near = |candidate: &str, word: &str| strsim::jaro_winkler(candidate, word);
        let beside = siblings.keys().map(|k| (near(k, name), join(parent(key), k)));
        let anywhere =
            self.keys.iter().map(|k| (near(k.rsplit('.').next().unwrap_or(k), name) - 0.05, k.clone()));
        let best = beside.chain(anywhere).max_by(|a, b| a.0.total_cmp(&b.0))?;
        if best.0 >= 0.75 {
            return Some(format!("did you mean `{}`?", best.1));
        }
        let known: Vec<&str> = siblings.keys().map(String::as_str).collect();
        Some(format!("keys of this table: {}", known.join(", ")))
    }
}

fn parent(key: &str) -> &str {
    key.rfind('.').map_or("", |at| &key[..at])
}

fn problem(node: &Node, key: &str, message: String, hint: Option<String>) -> Problem {
    Problem { origin: node.origin.clone(), key: key.to_owned(), message, hint }
}

fn not_one_of(node: &Node, key: &str, text: &str, names: &[&str]) -> Problem {
    let nearest =
        names.iter().max_by(|a, b| strsim::jaro_winkler(a, text).total_cmp(&strsim::jaro_winkler(b, text)));
    let hint = nearest
        .filter(|name| strsim::jaro_winkler(name, text) >= 0.75)
        .map(|name| format!("did you mean \"{name}\"?"));
    problem(node, key, format!("is \"{text}\", expected one of {}", quoted(names)), hint)
}

fn quoted(names: &[&str]) -> String {
    names.iter().map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", ")
}

/// The strings a schema allows, if it is an enumeration.
pub fn strings_of(schema: &Json) -> Vec<&str> {
    match (schema.get("const"), schema.get("enum")) {
        (Some(Json::String(name)), _) => vec![name],
        (_, Some(Json::Array(names))) => names.iter().filter_map(Json::as_str).collect(),
        _ => Vec::new(),
    }
}

fn out_of_range(schema: &Json, node: &Node) -> Option<String> {
    let x = match &node.value {
        Value::Integer(x) => *x as f64,
        Value::Float(x) => *x,
        _ => return None,
    };
    if x.is_nan() || x.is_infinite() {
        return Some(format!("is {x}, expected a finite number"));
    }
    let bound = |name: &str| schema.get(name).and_then(Json::as_f64);
    let (low, high) = (bound("minimum"), bound("maximum").or_else(|| format_maximum(schema)));
    let (above, below) = (bound("exclusiveMinimum"), bound("exclusiveMaximum"));
    let wrong = low.is_some_and(|low| x < low)
        || high.is_some_and(|high| x > high)
        || above.is_some_and(|above| x <= above)
        || below.is_some_and(|below| x >= below);
    if !wrong {
        return None;
    }
    let limits: Vec<String> = [
        low.map(|x| format!("at least {x}")),
        above.map(|x| format!("above {x}")),
        // A limit of the number type says nothing unless it is the one that was broken.
        high.filter(|high| *high < 1e9 || x > *high).map(|x| format!("at most {x}")),
        below.map(|x| format!("below {x}")),
    ]
    .into_iter()
    .flatten()
    .collect();
    Some(format!("is {x}, must be {}", limits.join(" and ")))
}

/// Integer formats carry no `maximum` above 16 bits.
fn format_maximum(schema: &Json) -> Option<f64> {
    match schema.get("format")?.as_str()? {
        "uint32" => Some(u32::MAX.into()),
        "int32" => Some(i32::MAX.into()),
        "uint" | "uint64" => Some(u64::MAX as f64),
        "int" | "int64" => Some(i64::MAX as f64),
        _ => None,
    }
}

/// What a schema asks for, in words.
pub fn wanted(schema: &Json) -> String {
    let names = strings_of(schema);
    if !names.is_empty() {
        return quoted(&names);
    }
    let one = |name: &str| match name {
        "boolean" => "true or false",
        "integer" if schema.get("format").and_then(Json::as_str).is_some_and(|f| f.starts_with("uint")) => {
            "an integer of 0 or more"
        }
        "integer" => "an integer",
        "number" => "a number",
        "string" => "a string",
        "array" => "a list",
        "object" => "a table",
        _ => "nothing",
    };
    match schema.get("type") {
        Some(Json::String(name)) => one(name).to_owned(),
        Some(Json::Array(names)) => {
            let words: Vec<&str> =
                names.iter().filter_map(Json::as_str).map(one).filter(|word| *word != "nothing").collect();
            words.join(" or ")
        }
        _ => "something else".to_owned(),
    }
}

/// A value as a person wrote it, cut short.
fn show(node: &Node) -> String {
    let text = match &node.value {
        Value::Bool(x) => x.to_string(),
        Value::Integer(x) => x.to_string(),
        Value::Float(x) => x.to_string(),
        Value::String(x) => format!("{:?}", x.chars().take(60).collect::<String>()),
        other => return other.kind().to_owned(),
    };
    match &node.value {
        Value::String(_) => format!("the string {text}"),
        _ => text,
    }
}
