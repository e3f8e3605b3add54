//! Rotary frequencies, from either spelling.
//!
//! Frequencies follow from the configuration alone, never from the sequence at hand: a token's bits must not change when
//! its sequence grows. Hence `dynamic` (NTK) means plain frequencies: its base grows only for sequences longer than
//! `max_position_embeddings`, and none longer is run. And `longrope` is refused: it has two tables and picks one by the
//! length of the sequence.

use super::fields::Fields;
use crate::error::ModelError;
use crate::spec::{RopeScaling, RopeSpec, RopeStyle};

/// The rotary embedding of a model with heads of `head_dim`.
pub(super) fn rope(
    fields: &Fields<'_>,
    head_dim: usize,
    default_theta: f64,
    style: RopeStyle,
) -> Result<RopeSpec, ModelError> {
    let parameters = parameters(fields)?;
    let theta = fields.number_or("rope_theta", default_theta)?;
    read(fields, parameters, theta, head_dim, style)
}

/// 5.x keeps everything in `rope_parameters`; 4.x has `rope_theta` at the top and the rest in `rope_scaling`.
fn parameters<'a>(fields: &Fields<'a>) -> Result<Option<Fields<'a>>, ModelError> {
    match fields.object("rope_parameters")? {
        Some(parameters) => Ok(Some(parameters)),
        None => fields.object("rope_scaling"),
    }
}

/// What DeepSeek multiplies scores with beside `1/sqrt(head_dim)`: the square of `mscale_all_dim`'s growth.
pub(super) fn score_factor(fields: &Fields<'_>) -> Result<f64, ModelError> {
    let Some(parameters) = parameters(fields)? else { return Ok(1.0) };
    let factor = match read_scaling(fields, &parameters)? {
        RopeScaling::None => return Ok(1.0),
        RopeScaling::Linear { factor }
        | RopeScaling::Llama3 { factor, .. }
        | RopeScaling::Yarn { factor, .. } => f64::from(factor),
    };
    Ok(mscale(&parameters, "mscale_all_dim")?.map_or(1.0, |mscale| growth(factor, mscale).powi(2)))
}

/// A strength of YaRN's growth; 0 counts as absent.
fn mscale(parameters: &Fields<'_>, key: &str) -> Result<Option<f64>, ModelError> {
    let zero = parameters.get(key).is_some_and(|value| value.as_f64() == Some(0.0));
    if zero { Ok(None) } else { parameters.number_opt(key) }
}

/// YaRN's suggestion for sharpening attention over a context so many times as long (its 3.4).
fn growth(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// The rotary embedding of layers of one kind, where 5.x keeps one a kind (`rope_parameters.sliding_attention`).
pub(super) fn rope_of_kind(
    fields: &Fields<'_>,
    kind: &str,
    head_dim: usize,
    default_theta: f64,
    style: RopeStyle,
) -> Result<Option<RopeSpec>, ModelError> {
    let Some(kinds) = fields.object("rope_parameters")? else { return Ok(None) };
    let Some(parameters) = kinds.object(kind)? else { return Ok(None) };
    read(fields, Some(parameters), default_theta, head_dim, style).map(Some)
}

/// A rotary embedding without scaling.
pub(super) fn plain_rope(theta: f64, head_dim: usize, style: RopeStyle) -> RopeSpec {
    let inv_freq = inverse_frequencies(theta, head_dim, &RopeScaling::None);
    RopeSpec { inv_freq, attention_factor: 1.0, style }
}

/// Widest head: the frequencies of each of thousands of layers are held. Released models have 512 at most.
const MAX_HEAD_DIM: usize = 1 << 13;

fn read(
    fields: &Fields<'_>,
    parameters: Option<Fields<'_>>,
    mut theta: f64,
    head_dim: usize,
    style: RopeStyle,
) -> Result<RopeSpec, ModelError> {
    if head_dim > MAX_HEAD_DIM {
        return Err(fields.invalid(format!("head_dim = {head_dim}: the limit is {MAX_HEAD_DIM}")));
    }
    let mut partial = fields.number_or("partial_rotary_factor", 1.0)?;
    let mut scaling = RopeScaling::None;
    if let Some(parameters) = parameters {
        theta = parameters.number_or("rope_theta", theta)?;
        partial = parameters.number_or("partial_rotary_factor", partial)?;
        scaling = read_scaling(fields, &parameters)?;
    }
    if partial != 1.0 {
        return Err(fields.unsupported(format!("partial_rotary_factor = {partial}"), "only 1 is"));
    }
    let attention_factor = match scaling {
        RopeScaling::Yarn { .. } if theta <= 1.0 => {
            return Err(fields.invalid(format!("rope_theta = {theta}: yarn needs more than 1")));
        }
        RopeScaling::Yarn { attention_factor, .. } => attention_factor,
        _ => 1.0,
    };
    Ok(RopeSpec { inv_freq: inverse_frequencies(theta, head_dim, &scaling), attention_factor, style })
}

fn read_scaling(fields: &Fields<'_>, parameters: &Fields<'_>) -> Result<RopeScaling, ModelError> {
    let kind = match parameters.text("rope_type")? {
        Some(kind) => Some(kind),
        None => parameters.text("type")?,
    };
    let required = |key: &str| {
        parameters.number_opt(key)?.ok_or_else(|| fields.invalid(format!("rope scaling: {key} is missing")))
    };
    match kind.unwrap_or("default") {
        "default" | "none" => Ok(RopeScaling::None),
        "dynamic" => required("factor").map(|_| RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: required("factor")? as f32 }),
        "llama3" => {
            let (low, high) = (required("low_freq_factor")?, required("high_freq_factor")?);
            if high <= low {
                return Err(
                    fields.invalid(format!("rope scaling: high_freq_factor = {high} is not above {low}"))
                );
            }
            Ok(RopeScaling::Llama3 {
                factor: required("factor")? as f32,
                low_freq_factor: low as f32,
                high_freq_factor: high as f32,
                original_max_positions: parameters.size("original_max_position_embeddings")?,
            })
        }
        "yarn" => read_yarn(fields, parameters),
        other => Err(fields.unsupported(
            format!("rope scaling `{other}`"),
            "supported are default, linear, dynamic, llama3 and yarn",
        )),
    }
}

fn read_yarn(fields: &Fields<'_>, parameters: &Fields<'_>) -> Result<RopeScaling, ModelError> {
    let max_positions = fields.size_opt("max_position_embeddings")?;
    let key = "original_max_position_embeddings";
    // Where the top of the file has it too, that one counts.
    let given = fields.size_opt(key)?.or(parameters.size_opt(key)?);
    let original = match (given, max_positions) {
        (Some(original), _) | (None, Some(original)) => original,
        (None, None) => {
            return Err(fields.invalid("rope scaling: original_max_position_embeddings is missing"));
        }
    };
    let factor = match (parameters.number_opt("factor")?, max_positions) {
        (Some(factor), _) => factor,
        (None, Some(max_positions)) => max_positions as f64 / original as f64,
        (None, None) => return Err(fields.invalid("rope scaling: factor is missing")),
    };
    let attention_factor = match (
        parameters.number_opt("attention_factor")?,
        mscale(parameters, "mscale")?,
        mscale(parameters, "mscale_all_dim")?,
    ) {
        (Some(given), _, _) => given,
        (None, Some(mscale), Some(all)) => growth(factor, mscale) / growth(factor, all),
        _ => growth(factor, 1.0),
    };
    Ok(RopeScaling::Yarn {
        factor: factor as f32,
        original_max_positions: original,
        beta_fast: parameters.number_or("beta_fast", 32.0)?,
        beta_slow: parameters.number_or("beta_slow", 1.0)?,
        truncate: parameters.flag_or("truncate", true)?,
        attention_factor: attention_factor as f32,
    })
}

/// `1 / theta^(2i/dim)` for every pair, scaled. Rounded to f32 where the reference rounds.
pub(crate) fn inverse_frequencies(theta: f64, dim: usize, scaling: &RopeScaling) -> Vec<f32> {
    (0..dim / 2).map(|pair| scaled_frequency(theta, dim, pair, scaling)).collect()
}

fn scaled_frequency(theta: f64, dim: usize, pair: usize, scaling: &RopeScaling) -> f32 {
    let exponent = (2 * pair) as f32 / dim as f32;
    let power = theta.powf(f64::from(exponent)) as f32;
    let frequency = 1.0 / power;
    match *scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
            let original = original_max_positions as f32;
            let wavelength = 2.0 * std::f32::consts::PI / frequency;
            if wavelength > original / low_freq_factor {
                frequency / factor
            } else if wavelength < original / high_freq_factor {
                frequency
            } else {
                let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
        RopeScaling::Yarn { factor, original_max_positions, beta_fast, beta_slow, truncate, .. } => {
            let turns = (beta_fast, beta_slow);
            let (low, high) = yarn_ramp(theta, dim, original_max_positions as f64, turns, truncate);
            let kept = 1.0 - ((pair as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            (1.0 / (factor * power)) * (1.0 - kept) + frequency * kept
        }
    }
}

/// The pairs between which YaRN's ramp falls: those that turn `fast` and `slow` times in the original context.
fn yarn_ramp(theta: f64, dim: usize, original: f64, (fast, slow): (f64, f64), truncate: bool) -> (f64, f64) {
    let pair =
        |turns: f64| dim as f64 * (original / (turns * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln());
    let (low, high) = (pair(fast), pair(slow));
    let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
    let (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
    if low == high { (low, high + 0.001) } else { (low, high) }
}
