//! The soft loss of one token, in f64.

/// What a teacher says about one position: its likeliest tokens' log-probs, nats.
#[derive(Clone, Copy, Debug)]
pub struct SoftToken<'a> {
    /// Of the k likeliest, falling.
    pub logprobs: &'a [f32],
}

/// Least probability of all tokens that were not kept, student's side.
const LEAST_REST: f64 = 1e-6;

/// KL(teacher ‖ student) over the kept tokens and the rest as one class, with its derivatives by the student's log-probs of the kept
/// tokens, which are written to `slopes`.
///
/// With teacher p, student q and rests p' and q': Σ p (log p − log q) + p' (log p' − log q'), and by log q: −p + p' · q / q'.
///
/// # Panics
/// When the lengths differ.
pub fn soft_loss(teacher: SoftToken<'_>, student: &[f32], slopes: &mut [f64]) -> f64 {
    let kept = teacher.logprobs;
    assert!(kept.len() == student.len() && kept.len() == slopes.len(), "soft_loss: lengths");
    let sum = |logprobs: &[f32]| logprobs.iter().map(|&x| f64::from(x).exp()).sum::<f64>();
    let rest = (1.0 - sum(kept)).max(0.0);
    let student_rest = 1.0 - sum(student);
    let floor = student_rest.max(LEAST_REST);
    let mut loss = if rest > 0.0 { rest * (rest.ln() - floor.ln()) } else { 0.0 };
    // Where the student's rest is as good as nothing its logarithm stands still.
    let pull = if student_rest > LEAST_REST { rest / floor } else { 0.0 };
    for ((&teacher, &student), slope) in kept.iter().zip(student).zip(slopes) {
        let (log_p, log_q) = (f64::from(teacher), f64::from(student));
        loss += log_p.exp() * (log_p - log_q);
        *slope = -log_p.exp() + pull * log_q.exp();
    }
    loss
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logs(p: &[f64]) -> Vec<f32> {
        p.iter().map(|p| p.ln() as f32).collect()
    }

    #[test]
    fn a_student_like_its_teacher_loses_nothing_and_any_other_something() {
        let teacher = logs(&[0.5, 0.2, 0.1]);
        let mut slopes = [0.0; 3];
        let loss = soft_loss(SoftToken { logprobs: &teacher }, &teacher, &mut slopes);
        assert!(loss.abs() <= 1e-7, "{loss}");
        for student in [[0.4, 0.2, 0.1], [0.2, 0.5, 0.25], [0.01, 0.01, 0.01]] {
            let loss = soft_loss(SoftToken { logprobs: &teacher }, &logs(&student), &mut slopes);
            assert!(loss > 0.0, "{student:?}: {loss}");
        }
    }

    #[test]
    fn derivatives_are_those_of_the_loss() {
        for (teacher, student) in [([0.5, 0.2, 0.1], [0.3, 0.3, 0.05]), ([0.9, 0.05, 0.05], [0.1, 0.2, 0.3])]
        {
            let teacher = logs(&teacher);
            let student = logs(&student);
            let of = |student: &[f32]| soft_loss(SoftToken { logprobs: &teacher }, student, &mut [0.0; 3]);
            let mut slopes = [0.0; 3];
            soft_loss(SoftToken { logprobs: &teacher }, &student, &mut slopes);
            for i in 0..3 {
                let at = |by: f32| {
                    let mut moved = student.clone();
                    moved[i] += by;
                    (of(&moved), f64::from(moved[i]))
                };
                let ((up, high), (down, low)) = (at(1e-2), at(-1e-2));
                let want = (up - down) / (high - low);
                assert!((slopes[i] - want).abs() <= 1e-3, "{i}: {}, not {want}", slopes[i]);
            }
        }
    }
}
