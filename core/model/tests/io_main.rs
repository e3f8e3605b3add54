//! Models in and out: configurations, checkpoints, tokenizers, templates.

mod io {
    pub mod chat;
    pub mod corrupt;
    pub mod load;
    pub mod support;
}
