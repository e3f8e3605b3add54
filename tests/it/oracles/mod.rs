//! Every model of the golden folder, by its index, against what the reference implementation computed (float32) from the
//! very same checkpoint bytes.
//!
//! ```text
//! golden    the folder: its index, and the numbers of one model
//! writers   causal language models: logits, log-probs, routing, gradients, greedy continuations
//! scorers   classifiers and encoders: scores, hidden states, losses, gradients
//! sampling  the distribution that tokens are drawn from
//! table     all of them once, and the table of errors in docs/architectures.md
//! ```
//!
//! Reads `tests/fixtures/` or the folder named by `FREEWHEEL_ORACLES`.

mod golden;
mod sampling;
mod scorers;
mod table;
mod writers;
