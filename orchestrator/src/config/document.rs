//! A config as it was written: values with the place each one came from, layer over layer.
//!
//! ```text
//! defaults ◄─ file ◄─ environment ◄─ --set        a later layer wins, key by key; arrays are replaced whole
//! ```

use serde_json::Value as Json;
use toml::de::{DeTable, DeValue};

use super::problem::{Origin, Problem};

/// A value and where it was written.
#[derive(Clone, Debug)]
pub struct Node {
    /// The value.
    pub value: Value,
    /// Its place.
    pub origin: Origin,
}

/// TOML's values, tables in the order they were written.
#[derive(Clone, Debug)]
pub enum Value {
    /// `true`, `false`.
    Bool(bool),
    /// Whole number.
    Integer(i128),
    /// Number with a point, exponent, `inf` or `nan`.
    Float(f64),
    /// Text.
    String(String),
    /// List.
    Array(Vec<Node>),
    /// Table.
    Table(Vec<(String, Node)>),
    /// A date or time: no key wants one.
    Date(String),
}

impl Value {
    /// What a person calls this kind of value.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Bool(_) => "a boolean",
            Self::Integer(_) => "an integer",
            Self::Float(_) => "a number",
            Self::String(_) => "a string",
            Self::Array(_) => "a list",
            Self::Table(_) => "a table",
            Self::Date(_) => "a date",
        }
    }
}

impl Node {
    /// An empty table.
    pub fn table() -> Self {
        Self { value: Value::Table(Vec::new()), origin: Origin::Default }
    }

    /// The child called `key`.
    pub fn get(&self, key: &str) -> Option<&Self> {
        match &self.value {
            Value::Table(entries) => entries.iter().find(|(name, _)| name == key).map(|(_, node)| node),
            _ => None,
        }
    }

    /// The node at a dotted path.
    pub fn at(&self, path: &str) -> Option<&Self> {
        path.split('.').try_fold(self, |node, key| node.get(key))
    }

    /// Lays `upper` over this node: tables merge key by key, everything else is replaced.
    pub fn overlay(&mut self, upper: Self) {
        match (&mut self.value, upper.value) {
            (Value::Table(below), Value::Table(above)) => {
                for (key, node) in above {
                    match below.iter_mut().find(|(name, _)| *name == key) {
                        Some((_, old)) => old.overlay(node),
                        None => below.push((key, node)),
                    }
                }
            }
            (_, value) => *self = Self { value, origin: upper.origin },
        }
    }

    /// Takes out the entry at a dotted path; of a path into a list, the whole list.
    pub fn remove(&mut self, path: &str) {
        let path = path.find('[').map_or(path, |at| &path[..at]);
        let (name, rest) = path.split_once('.').map_or((path, None), |(name, rest)| (name, Some(rest)));
        let Value::Table(entries) = &mut self.value else { return };
        match rest {
            None => entries.retain(|(key, _)| key != name),
            Some(rest) => {
                if let Some((_, child)) = entries.iter_mut().find(|(key, _)| key == name) {
                    child.remove(rest);
                }
            }
        }
    }

    /// A tree that holds only `value` at the dotted path `key`.
    pub fn nested(key: &str, value: Value, origin: &Origin) -> Self {
        let leaf = Self { value, origin: origin.clone() };
        key.rsplit('.').fold(leaf, |node, name| Self {
            value: Value::Table(vec![(name.to_owned(), node)]),
            origin: origin.clone(),
        })
    }

    /// Reads `text` (of file `path`).
    ///
    /// # Errors
    /// Every syntax error of the file.
    pub fn parse(path: &str, text: &str) -> Result<Self, Vec<Problem>> {
        let (table, errors) = DeTable::parse_recoverable(text);
        if !errors.is_empty() {
            let problem = |error: &toml::de::Error| Problem {
                origin: place(path, text, error.span().map_or(0, |span| span.start)),
                key: String::new(),
                message: format!("not TOML: {}", error.message()),
                hint: None,
            };
            return Err(errors.iter().map(problem).collect());
        }
        let at = |offset| place(path, text, offset);
        Ok(Self { value: from_table(table.get_ref(), &at), origin: at(0) })
    }

    /// Parses the right-hand side of `--set key=value`: TOML if it is TOML, else a string.
    pub fn parse_value(text: &str, origin: &Origin) -> Value {
        DeValue::parse(text).map_or_else(
            |_| Value::String(text.to_owned()),
            |value| from_value(value.get_ref(), &|_| origin.clone()),
        )
    }

    /// The tree without its places, for serde.
    pub fn to_json(&self) -> Json {
        match &self.value {
            Value::Bool(x) => Json::Bool(*x),
            Value::Integer(x) => i64::try_from(*x).map_or_else(
                |_| u64::try_from(*x).map_or_else(|_| Json::String(x.to_string()), Json::from),
                Json::from,
            ),
            Value::Float(x) => serde_json::Number::from_f64(*x).map_or(Json::Null, Json::Number),
            Value::String(x) | Value::Date(x) => Json::String(x.clone()),
            Value::Array(items) => Json::Array(items.iter().map(Self::to_json).collect()),
            Value::Table(entries) => {
                Json::Object(entries.iter().map(|(key, node)| (key.clone(), node.to_json())).collect())
            }
        }
    }

    /// A tree of defaults from what serde makes of a value; `null` (an unset option) is left out.
    pub fn from_json(json: &Json) -> Option<Self> {
        let value = match json {
            Json::Null => return None,
            Json::Bool(x) => Value::Bool(*x),
            Json::Number(n) => match (n.as_i64(), n.as_u64(), n.as_f64()) {
                (Some(x), ..) => Value::Integer(x.into()),
                (_, Some(x), _) => Value::Integer(x.into()),
                (.., x) => Value::Float(x.unwrap_or(f64::NAN)),
            },
            Json::String(x) => Value::String(x.clone()),
            Json::Array(items) => Value::Array(items.iter().filter_map(Self::from_json).collect()),
            Json::Object(entries) => Value::Table(
                entries.iter().filter_map(|(key, x)| Some((key.clone(), Self::from_json(x)?))).collect(),
            ),
        };
        Some(Self { value, origin: Origin::Default })
    }
}

/// Line and column of a byte offset.
fn place(path: &str, text: &str, offset: usize) -> Origin {
    let offset = offset.min(text.len());
    let before = text.get(..offset).unwrap_or_default();
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    Origin::File {
        path: path.to_owned(),
        line: before.matches('\n').count() + 1,
        column: before[line_start..].chars().count() + 1,
    }
}

fn from_table(table: &DeTable<'_>, at: &dyn Fn(usize) -> Origin) -> Value {
    // The parser sorts keys; a person wants the order of the file.
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    Value::Table(
        entries
            .into_iter()
            .map(|(key, value)| {
                let node = Node { value: from_value(value.get_ref(), at), origin: at(key.span().start) };
                (key.get_ref().to_string(), node)
            })
            .collect(),
    )
}

fn from_value(value: &DeValue<'_>, at: &dyn Fn(usize) -> Origin) -> Value {
    match value {
        DeValue::String(x) => Value::String(x.to_string()),
        DeValue::Integer(x) => {
            let digits = x.as_str().replace('_', "");
            i128::from_str_radix(&digits, x.radix())
                .map_or_else(|_| Value::Float(digits.parse().unwrap_or(f64::INFINITY)), Value::Integer)
        }
        DeValue::Float(x) => Value::Float(x.as_str().replace('_', "").parse().unwrap_or(f64::NAN)),
        DeValue::Boolean(x) => Value::Bool(*x),
        DeValue::Datetime(x) => Value::Date(x.to_string()),
        DeValue::Array(items) => Value::Array(
            items
                .iter()
                .map(|item| Node { value: from_value(item.get_ref(), at), origin: at(item.span().start) })
                .collect(),
        ),
        DeValue::Table(table) => from_table(table, at),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_knows_its_line_and_column() {
        let node = Node::parse("x.toml", "# head\n[a]\n  b = 1\n\"ä\" = {c = [1, 2]}\n").unwrap();
        let place = |key| node.at(key).unwrap().origin.to_string();
        assert_eq!(place("a.b"), "x.toml:3:3");
        assert_eq!(place("a.ä.c"), "x.toml:4:8");
    }

    #[test]
    fn syntax_errors_name_the_line() {
        let problems = Node::parse("x.toml", "[a]\nb = \nc = 1\n").unwrap_err();
        assert!(problems[0].to_string().starts_with("x.toml:2:"), "{}", problems[0]);
    }

    #[test]
    fn a_later_layer_wins_and_arrays_are_replaced_whole() {
        let mut node = Node::parse("x", "[a]\nb = 1\nlist = [1, 2]\n").unwrap();
        node.overlay(Node::nested("a.list", Node::parse_value("[3]", &Origin::Flag), &Origin::Flag));
        node.overlay(Node::nested("a.c.d", Node::parse_value("some text", &Origin::Flag), &Origin::Flag));
        assert_eq!(node.to_json(), serde_json::json!({"a": {"b": 1, "list": [3], "c": {"d": "some text"}}}));
        assert_eq!(node.at("a.b").unwrap().origin.to_string(), "x:2:1");
        assert_eq!(node.at("a.list").unwrap().origin, Origin::Flag);
    }
}
