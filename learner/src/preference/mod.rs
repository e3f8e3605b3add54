//! Learning from preferences: DPO and its relatives on log-probs, Bradley–Terry on scores.
//!
//! ```text
//! chosen, rejected ─► Σ log-probs, now and of the reference ─► margin ─► loss ─► policy          (dpo)
//! chosen, rejected ─► score at the last token               ─► margin ─► loss ─► reward model    (reward_model)
//! ```
//!
//! The reference is the policy as it starts: its log-probs are computed once, before the first update, and no second model is held.

pub mod dpo;
pub mod loss;
pub mod reward_model;
