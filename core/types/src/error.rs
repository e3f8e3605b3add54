//! The one error of this crate.

/// A value that came from outside and is not what it claims to be.
///
/// Every variant means the same to a caller: this one item is bad, drop it and
/// count it; the stream it came from is fine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TypesError {
    /// A name that may become part of a path or a key has a forbidden form.
    #[error("{kind} {value:?} is not allowed: {rule}")]
    BadName {
        /// What the name is for, for example "run name".
        kind: &'static str,
        /// The offending value.
        value: String,
        /// The rule it breaks.
        rule: &'static str,
    },
    /// A number is outside its range.
    #[error("{field} is {value}, outside {limit}")]
    OutOfRange {
        /// Field that holds the number.
        field: &'static str,
        /// The value, printed.
        value: String,
        /// The range, printed.
        limit: String,
    },
    /// Two fields that must agree do not.
    #[error("{what}: expected {expected}, got {got}")]
    Mismatch {
        /// What is being compared.
        what: &'static str,
        /// Expected value.
        expected: String,
        /// Value found.
        got: String,
    },
    /// The bytes are not an envelope of this program, or were damaged.
    #[error("bad envelope: {0}")]
    Envelope(String),
    /// The metadata part of an envelope does not parse.
    #[error("bad envelope metadata")]
    Meta(#[from] postcard::Error),
}
