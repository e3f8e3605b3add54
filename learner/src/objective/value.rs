//! The critic's loss: squared error against the return, clipped around the value before the batch.

/// (loss, d loss / d value) of one token (PPO, arXiv 1707.06347, as in verl): ½·max((v − R)², (clip(v, v_old ± c) − R)²). `None`: not clipped.
pub fn value_loss(value: f64, before: f64, target: f64, clip: Option<f64>) -> (f64, f64) {
    let free = value - target;
    let Some(clip) = clip else { return (0.5 * free * free, free) };
    // Not `clamp`, which panics where a bound is NaN: a broken critic is refused by the NaN in its loss.
    let bounded = value.max(before - clip).min(before + clip);
    let held = bounded - target;
    match held * held > free * free {
        true => (0.5 * held * held, if bounded == value { held } else { 0.0 }),
        false => (0.5 * free * free, free),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_that_overshot_towards_its_target_stops() {
        // From 0 to 0.5 with a clip of 0.2, target 1: the clipped error 0.8 is the larger one and has no gradient.
        assert_eq!(value_loss(0.5, 0.0, 1.0, Some(0.2)), (0.5 * 0.8 * 0.8, 0.0));
        assert_eq!(value_loss(0.5, 0.0, 1.0, None), (0.125, -0.5));
        // Away from its target it goes on being pulled back.
        assert_eq!(value_loss(-0.5, 0.0, 1.0, Some(0.2)), (0.5 * 1.5 * 1.5, -1.5));
    }

    #[test]
    fn a_broken_critic_shows_in_its_loss() {
        assert!(value_loss(f64::NAN, 0.0, 1.0, Some(0.2)).0.is_nan());
        assert!(value_loss(0.0, f64::NAN, f64::NAN, Some(0.2)).0.is_nan());
    }

    #[test]
    fn the_gradient_is_that_of_finite_differences() {
        for value in [-0.7, -0.15, 0.05, 0.15, 0.9] {
            for target in [-1.0, 0.1, 1.0] {
                let at = |h: f64| value_loss(value + h, 0.0, target, Some(0.2)).0;
                let (numeric, exact) =
                    ((at(1e-6) - at(-1e-6)) / 2e-6, value_loss(value, 0.0, target, Some(0.2)).1);
                assert!((numeric - exact).abs() <= 1e-8, "{value} {target}: {numeric} vs {exact}");
            }
        }
    }
}
