//! Gates, correctness and the weighted sum.

use super::Part;

/// Name of the first gate that fails.
pub(super) fn failed_gate<'a>(parts: &[Part<'a>]) -> Result<Option<&'a str>, String> {
    let mut failed = None;
    for part in parts {
        let Some(gate) = part.part.gate else { continue };
        match part.value {
            None => {}
            Some(Err(why)) => return Err(format!("{}: {why}", part.name)),
            Some(Ok(value)) if gate.fails(value) => {
                failed.get_or_insert(part.name);
            }
            Some(Ok(_)) => {}
        }
    }
    Ok(failed)
}

/// The sum over parts that apply, each normalised and times its factor.
pub(super) fn weighted(parts: &[Part<'_>]) -> Result<f32, String> {
    // f64 and config order: the sum has the same bits wherever it is made.
    let mut sum = 0.0_f64;
    for part in parts.iter().filter(|part| part.part.gate.is_none() && part.part.factor != 0.0) {
        match part.value {
            None => {}
            Some(Err(why)) => return Err(format!("{}: {why}", part.name)),
            Some(Ok(value)) => {
                let value = part.part.norm.map_or(f64::from(value), |norm| norm.of(value, part.log_length));
                sum += f64::from(part.part.factor) * value;
            }
        }
    }
    Ok(sum as f32)
}

/// Right only if every answer verifier that applies says so; `None` when none applies or one could not tell.
pub(super) fn correctness(parts: &[Part<'_>]) -> Option<bool> {
    let mut deciding = parts.iter().filter(|part| part.part.decides && part.value.is_some()).peekable();
    deciding.peek()?;
    deciding.try_fold(true, |right, part| match part.value {
        Some(Ok(value)) => Some(right && value >= 0.5),
        _ => None,
    })
}
