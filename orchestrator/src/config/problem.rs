//! What is wrong with a config: one entry a mistake, all of them shown together.

use std::fmt;

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The program's own default.
    Default,
    /// A line of the config file.
    File {
        /// Path as the user gave it.
        path: String,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
    },
    /// An environment variable.
    Env(&'static str),
    /// `--set key=value`.
    Flag,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line, column } => write!(f, "{path}:{line}:{column}"),
            Self::Env(name) => write!(f, "environment {name}"),
            Self::Flag => f.write_str("--set"),
        }
    }
}

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where the value was written.
    pub origin: Origin,
    /// Dotted key, empty for a syntax error.
    pub key: String,
    /// What is wrong, with the value and the limit.
    pub message: String,
    /// What to write instead.
    pub hint: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.origin {
            // A default that is wrong only in combination: the key says more than "default".
            Origin::Default => {}
            origin => write!(f, "{origin}: ")?,
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.message)?;
        if let Some(hint) = &self.hint {
            write!(f, "\n  hint: {hint}")?;
        }
        Ok(())
    }
}

impl Problem {
    /// Whether a further complaint about `key` is only a consequence of this mistake: it is about the same key, or about
    /// the key that this one was meant to be.
    pub fn explains(&self, key: &str) -> bool {
        let meant = self.hint.as_ref().is_some_and(|hint| hint.contains(&format!("`{key}`")));
        meant
            || self.key == key
            || self.key.starts_with(&format!("{key}."))
            || self.key.starts_with(&format!("{key}["))
    }
}

/// Every mistake of one config.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// Which config, as the user named it.
    pub what: String,
    /// At least one.
    pub problems: Vec<Problem>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.problems.len();
        write!(f, "{} has {n} {}", self.what, if n == 1 { "problem" } else { "problems" })?;
        self.problems.iter().try_for_each(|problem| write!(f, "\n{problem}"))
    }
}

impl std::error::Error for ConfigError {}
