//! Least squares on the log-ratio: OAPL and mirror descent.

use crate::objective::{BatchStats, Clip, PolicyLoss, Sequence, Term, Token};

/// (β·log(π(y)/μ(y)) − A)²: the optimum of KL-regularised RL by least squares. With A = R − V, V the soft value of the prompt,
/// this is A*-PO (arXiv 2505.20686; OAPL with a lagged policy as anchor); with A = R − mean of the group, Kimi k1.5's online
/// mirror descent (2501.12599, eq. 3).
pub(in crate::objective) struct Regression {
    pub beta: f64,
}

impl PolicyLoss for Regression {
    fn terms(&self, sequence: &Sequence, _stats: &BatchStats) -> Vec<Term> {
        let error = self.beta * sequence.log_ratio_sum() - sequence.advantage();
        // Each of the T equal terms moves with every token: T · d(error²).
        let gradient = sequence.len_f64() * 2.0 * self.beta * error;
        let term = |t: &Token| Term {
            loss: error * error,
            gradient: if t.slope == 0.0 { 0.0 } else { gradient },
            clip: Clip::Inside,
        };
        sequence.tokens.iter().map(term).collect()
    }
}
