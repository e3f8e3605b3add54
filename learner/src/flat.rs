//! Sections written flat that several structs share: each takes its own keys, and the first refuses what is left.
//!
//! serde has `flatten` for this, but not together with `deny_unknown_fields`.

use schemars::Schema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// A struct as the table it is written as.
pub(crate) fn table(part: &impl Serialize) -> Map<String, Value> {
    match serde_json::to_value(part).expect("settings are plain data") {
        Value::Object(map) => map,
        other => unreachable!("a struct serialises as a table, not {other}"),
    }
}

/// Takes the keys of `T` out of `all` and reads them; those missing are as in `defaults`.
pub(crate) fn part<T: Serialize + DeserializeOwned>(
    all: &mut Map<String, Value>,
    defaults: &T,
) -> serde_json::Result<T> {
    let mut known = table(defaults);
    for (key, value) in std::mem::take(all) {
        match known.get_mut(&key) {
            Some(known) => *known = value,
            None => drop(all.insert(key, value)),
        }
    }
    serde_json::from_value(Value::Object(known))
}

/// What is left for the part that refuses unknown keys.
pub(crate) fn rest<T: Serialize + DeserializeOwned>(
    all: Map<String, Value>,
    defaults: &T,
) -> serde_json::Result<T> {
    let mut known = table(defaults);
    known.extend(all);
    serde_json::from_value(Value::Object(known))
}

/// Adds the keys of `part` to those of `schema`.
pub(crate) fn merge(schema: &mut Schema, mut part: Schema) {
    let extra = part.get_mut("properties").and_then(Value::as_object_mut).map(std::mem::take);
    if let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) {
        properties.extend(extra.unwrap_or_default());
    }
}

/// Writes and reads a struct of section structs as one flat table. The first part is the one that refuses unknown keys.
macro_rules! flat_section {
    ($name:ident { $first:ident: $first_type:ty, $($part:ident: $type:ty),+ $(,)? }) => {
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                let mut all = $crate::flat::table(&self.$first);
                $(all.extend($crate::flat::table(&self.$part));)+
                serde::Serialize::serialize(&all, serializer)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let mut all = <serde_json::Map<String, serde_json::Value>>::deserialize(deserializer)?;
                let defaults = Self::default();
                $(let $part = $crate::flat::part(&mut all, &defaults.$part).map_err(serde::de::Error::custom)?;)+
                // Whatever is left is the first part's, or unknown: then this says so.
                let $first = $crate::flat::rest(all, &defaults.$first).map_err(serde::de::Error::custom)?;
                Ok(Self { $first, $($part),+ })
            }
        }

        impl schemars::JsonSchema for $name {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
                let mut schema = <$first_type>::json_schema(generator);
                $($crate::flat::merge(&mut schema, <$type>::json_schema(generator));)+
                schema
            }
        }

        impl std::ops::Deref for $name {
            type Target = $first_type;

            fn deref(&self) -> &$first_type {
                &self.$first
            }
        }

        impl std::ops::DerefMut for $name {
            fn deref_mut(&mut self) -> &mut $first_type {
                &mut self.$first
            }
        }
    };
}
pub(crate) use flat_section;
