//! Errors of loading, saving and describing models.

use std::path::PathBuf;

/// A model, tokenizer or checkpoint that cannot be used, and why.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A file is missing or unreadable.
    #[error("{}: {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What was wanted of it.
        what: String,
        /// The cause.
        #[source]
        source: Option<std::io::Error>,
    },
    /// A file is there but its content is wrong.
    #[error("{}: {what}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong, with key, value, limit and offset where known.
        what: String,
    },
    /// The model asks for something this build does not do.
    #[error("{}: {what} is not supported{hint}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it asks for.
        what: String,
        /// What to do instead, or empty; starts with "; ".
        hint: String,
    },
    /// An image of a prompt cannot be used.
    #[error("image {path}: {what}")]
    Image {
        /// Its path as the prompt names it.
        path: String,
        /// What is wrong with it.
        what: String,
    },
    /// Text could not be turned into tokens.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The chat template refused or failed.
    #[error("chat template: {0}")]
    Template(String),
}
