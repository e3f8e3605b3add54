//! Every model of the golden folder, by its index, against what the reference implementation computed (float32) from the
//! very same checkpoint bytes.
//!
//! ```text
//! golden    the folder: its index, and the numbers of one model
//! writers   causal language models: logits, log-probs, routing, gradients, greedy continuations
//! scorers   classifiers and encoders: scores, hidden states, losses, gradients
//! table     all of them once, and the table of errors in docs/architectures.md
//! ```
//!
//! Reads `tests/fixtures/models/` or `$FREEWHEEL_ORACLES/models/`.

mod golden;
mod scorers;
mod table;
mod writers;
