//! Models in and out: configurations, checkpoints, tokenizers, templates.

mod io {
    pub mod chat;
    pub mod corrupt;
    pub mod gguf;
    pub mod gguf_file;
    pub mod hostile;
    pub mod load;
    pub mod make;
    pub mod mxfp4;
    pub mod save;
    pub mod support;
}
