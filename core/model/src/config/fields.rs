//! Typed access to the keys of one JSON object, with errors that name file, key and value.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::ModelError;
use crate::spec::Activation;

/// No size of a real model comes near this; products of four of them still fit 128 bits, of three 64.
const MAX_SIZE: u64 = 1 << 24;

const MAX_LAYERS: usize = 4096;

/// An object of `config.json` being read.
pub(super) struct Fields<'a> {
    path: &'a Path,
    /// The object itself.
    pub(super) map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(path: &'a Path, map: &'a Map<String, Value>) -> Self {
        Self { path, map }
    }

    pub(super) fn invalid(&self, what: impl Into<String>) -> ModelError {
        ModelError::Invalid { path: self.path.to_owned(), what: what.into() }
    }

    pub(super) fn unsupported(&self, what: impl Into<String>, hint: &str) -> ModelError {
        let hint = if hint.is_empty() { String::new() } else { format!("; {hint}") };
        ModelError::Unsupported { path: self.path.to_owned(), what: what.into(), hint }
    }

    /// The value of `key`; JSON null counts as absent.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn object(&self, key: &str) -> Result<Option<Fields<'a>>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields { path: self.path, map })),
            Some(other) => Err(self.invalid(format!("{key} = {other}: expected an object"))),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.invalid(format!("{key} = {other}: expected a string"))),
        }
    }

    /// A size of at least 1.
    pub(super) fn size_opt(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().filter(|n| (1..=MAX_SIZE).contains(n)) {
            Some(n) => Ok(Some(n as usize)),
            None => {
                Err(self.invalid(format!("{key} = {value}: expected a whole number from 1 to {MAX_SIZE}")))
            }
        }
    }

    pub(super) fn size(&self, key: &str) -> Result<usize, ModelError> {
        self.size_opt(key)?.ok_or_else(|| self.invalid(format!("{key} is missing")))
    }

    pub(super) fn size_or(&self, key: &str, default: usize) -> Result<usize, ModelError> {
        Ok(self.size_opt(key)?.unwrap_or(default))
    }

    /// The first of `keys` that is there (the two spellings of one thing).
    pub(super) fn size_any(&self, keys: &[&str], default: usize) -> Result<usize, ModelError> {
        for key in keys {
            if let Some(n) = self.size_opt(key)? {
                return Ok(n);
            }
        }
        Ok(default)
    }

    /// `num_hidden_layers`, bounded so that a hostile file cannot make us build millions of layers.
    pub(super) fn layers(&self) -> Result<usize, ModelError> {
        match self.size("num_hidden_layers")? {
            layers if layers <= MAX_LAYERS => Ok(layers),
            layers => {
                Err(self.invalid(format!("num_hidden_layers = {layers}: expected at most {MAX_LAYERS}")))
            }
        }
    }

    /// A positive, finite number.
    pub(super) fn number_opt(&self, key: &str) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64().filter(|x| x.is_finite() && *x > 0.0) {
            Some(x) => Ok(Some(x)),
            None => Err(self.invalid(format!("{key} = {value}: expected a positive number"))),
        }
    }

    pub(super) fn number_or(&self, key: &str, default: f64) -> Result<f64, ModelError> {
        Ok(self.number_opt(key)?.unwrap_or(default))
    }

    /// A flag; published configurations also write numbers here (`attn_temperature_tuning: 4`).
    pub(super) fn flag_or(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(Value::Number(n)) => Ok(n.as_f64() != Some(0.0)),
            Some(other) => Err(self.invalid(format!("{key} = {other}: expected true or false"))),
        }
    }

    /// A list of whole numbers.
    pub(super) fn list(&self, key: &str) -> Result<Option<Vec<usize>>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let items = value.as_array().and_then(|items| {
            items
                .iter()
                .map(|item| item.as_u64().or(item.as_bool().map(u64::from)).map(|n| n as usize))
                .collect()
        });
        match items {
            Some(items) => Ok(Some(items)),
            None => Err(self.invalid(format!("{key} = {value}: expected a list of whole numbers"))),
        }
    }

    /// `layer_types`, if given: as many names as there are layers.
    pub(super) fn layer_types(&self, layers: usize) -> Result<Option<Vec<&'a str>>, ModelError> {
        let Some(value) = self.get("layer_types") else { return Ok(None) };
        let names: Option<Vec<&str>> =
            value.as_array().and_then(|items| items.iter().map(Value::as_str).collect());
        match names {
            Some(names) if names.len() == layers => Ok(Some(names)),
            _ => Err(self.invalid(format!("layer_types: expected one name for each of the {layers} layers"))),
        }
    }

    /// Which layers attend in a sliding window: as `layer_types` says, else by `default`.
    pub(super) fn sliding_layers(
        &self,
        layers: usize,
        default: impl Fn(usize) -> bool,
    ) -> Result<Vec<bool>, ModelError> {
        let Some(names) = self.layer_types(layers)? else { return Ok((0..layers).map(default).collect()) };
        names
            .into_iter()
            .map(|name| match name {
                "sliding_attention" => Ok(true),
                "full_attention" => Ok(false),
                other => Err(self.unsupported(format!("layer_types entry `{other}`"), "")),
            })
            .collect()
    }

    pub(super) fn activation(&self) -> Result<Activation, ModelError> {
        self.activation_of("hidden_act", "silu")
    }

    pub(super) fn activation_of(&self, key: &str, default: &str) -> Result<Activation, ModelError> {
        match self.text(key)?.unwrap_or(default) {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
            other => {
                Err(self.unsupported(format!("{key} `{other}`"), "supported are silu and gelu_pytorch_tanh"))
            }
        }
    }

    /// Refuses a feature that is switched on.
    pub(super) fn refuse_flag(&self, key: &str) -> Result<(), ModelError> {
        if self.flag_or(key, false)? { Err(self.unsupported(format!("{key} = true"), "")) } else { Ok(()) }
    }
}
