//! Rotary frequencies, from either spelling.

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
    // 5.x keeps everything in `rope_parameters`; 4.x has `rope_theta` at the top and the rest in `rope_scaling`.
    let parameters = match fields.object("rope_parameters")? {
        Some(parameters) => Some(parameters),
        None => fields.object("rope_scaling")?,
    };
    let mut theta = fields.number_or("rope_theta", default_theta)?;
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
    Ok(RopeSpec { inv_freq: inverse_frequencies(theta, head_dim, &scaling), attention_factor: 1.0, style })
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
        other => {
            Err(fields
                .unsupported(format!("rope scaling `{other}`"), "supported are default, linear and llama3"))
        }
    }
}

/// `1 / theta^(2i/dim)` for every pair, scaled. Rounded to f32 where the reference rounds.
pub(crate) fn inverse_frequencies(theta: f64, dim: usize, scaling: &RopeScaling) -> Vec<f32> {
    (0..dim / 2)
        .map(|i| {
            let exponent = (2 * i) as f32 / dim as f32;
            let frequency = 1.0 / theta.powf(f64::from(exponent)) as f32;
            scale(frequency, scaling)
        })
        .collect()
}

fn scale(frequency: f32, scaling: &RopeScaling) -> f32 {
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
    }
}
