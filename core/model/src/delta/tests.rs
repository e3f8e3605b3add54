use std::sync::Arc;

use freewheel_types::{CounterRng, Digest, PolicyVersion};
use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::params::{ParamData, ParamLayout, Params, TensorKind, TensorSpec};

/// Weights as in a trained model, masters in f32, and masters after `updates` Adam-like updates of size about `lr`.
fn trained(n: usize, lr: f32, updates: u64) -> (Vec<u16>, Vec<u16>) {
    let rng = CounterRng::new(3, 9);
    let round = |x: f32| bf16::from_f32(x).to_bits();
    let master = |i: u64| {
        // Rows of different scale, as in a real arena.
        let scale = [0.02, 0.03, 0.05, 0.1][(i / 65_536 % 4) as usize];
        (scale * rng.normal(2 * i)) as f32
    };
    let moved = |i: u64| master(i) + lr * updates as f32 * (0.6 * rng.normal(2 * i + 1)) as f32;
    ((0..n as u64).map(|i| round(master(i))).collect(), (0..n as u64).map(|i| round(moved(i))).collect())
}

#[test]
fn an_update_at_rl_rates_travels_a_hundred_times_smaller() {
    let n = 3 << 19;
    let (base, new) = trained(n, 1e-6, 1);
    let density = density(&base, &new);
    let bytes = encode_bf16(&base, &new);
    let ratio = (2 * n) as f64 / bytes.len() as f64;
    // The cost of positions without knowledge of the exponent, plus one bit for the direction.
    let blind = density * (1.0 - density.log2()) - (1.0 - density) * (1.0 - density).log2();
    println!(
        "density {density:.5}: {ratio:.0} times smaller than dense; {:.0} is the limit without classes",
        16.0 / blind
    );
    assert!((0.005..=0.015).contains(&density), "density {density} is not that of an update at 1e-6");
    assert!(ratio >= 120.0, "{ratio}");
    assert!(ratio >= 16.0 / blind, "classes of exponents must pay: {ratio}");
    let mut applied = base;
    apply_bf16(&mut applied, &bytes).unwrap();
    assert!(applied == new);
}

#[test]
fn changed_ranges_hold_every_change() {
    let base = vec![0x3F80u16; 3 << 20];
    let mut new = base.clone();
    let places = [5, 6, 100_000, (1 << 20) - 1, 1 << 20, (2 << 20) + 7];
    places.iter().for_each(|&at| new[at] += 1);
    let mut applied = base.clone();
    let ranges = apply_bf16(&mut applied, &encode_bf16(&base, &new)).unwrap();
    assert!(applied == new);
    assert!(places.iter().all(|at| ranges.iter().any(|range| range.contains(at))));
    assert_eq!(ranges.len(), 4, "{ranges:?}");
    assert!(ranges.is_sorted_by(|a, b| a.end <= b.start));
}

#[test]
fn nothing_changed_costs_a_header() {
    let base = vec![0x3F80u16; 1 << 20];
    let bytes = encode_bf16(&base, &base);
    assert!(bytes.len() <= 64, "{}", bytes.len());
    assert!(apply_bf16(&mut base.clone(), &bytes).unwrap().is_empty());
}

fn near<T: Copy + std::fmt::Debug + 'static>(
    element: impl Strategy<Value = T>,
    step: fn(T, u8) -> T,
) -> impl Strategy<Value = (Vec<T>, Vec<T>)> {
    prop::collection::vec((element, prop_oneof![20 => Just(0u8), 3 => 1u8..4, 1 => any::<u8>()]), 0..600)
        .prop_map(move |pairs| {
            let new = pairs.iter().map(|&(x, by)| step(x, by)).collect();
            (pairs.into_iter().map(|(x, _)| x).collect(), new)
        })
}

proptest! {
    #[test]
    fn bf16_comes_back((base, new) in near(any::<u16>(), |x, by| if by > 9 { x ^ u16::from(by) << 8 } else { x.wrapping_add(u16::from(by)) })) {
        let mut applied = base.clone();
        apply_bf16(&mut applied, &encode_bf16(&base, &new)).unwrap();
        prop_assert_eq!(applied, new);
    }

    #[test]
    fn f32_comes_back((base, new) in near(any::<u32>(), |x, by| if by > 9 { x ^ u32::from(by) << 24 } else { x.wrapping_add(u32::from(by)) })) {
        let mut applied = base.clone();
        apply_f32(&mut applied, &encode_f32(&base, &new)).unwrap();
        prop_assert_eq!(applied, new);
    }

    #[test]
    fn unrelated_weights_come_back(pairs in prop::collection::vec(any::<(u32, u32)>(), 0..300)) {
        let (base, new): (Vec<u32>, Vec<u32>) = pairs.into_iter().unzip();
        let mut applied = base.clone();
        apply_f32(&mut applied, &encode_f32(&base, &new)).unwrap();
        prop_assert_eq!(applied, new);
    }

    /// Bytes that a hostile sender sealed properly: anything may come out, but no panic and no runaway.
    #[test]
    fn sealed_rubbish_does_no_harm(at in 0usize..4000, with in any::<u8>(), cut in 0usize..40, dense in any::<bool>()) {
        let (base, new) = trained(5000, if dense { 1e-3 } else { 1e-5 }, 1);
        let mut bytes = encode_bf16(&base, &new);
        bytes.truncate(bytes.len() - TRAILER - cut);
        // The header is checked by itself; the blocks are what is to be hit.
        let at = HEADER + at % (bytes.len() - HEADER);
        bytes[at] = with;
        let digest = blake3::hash(&bytes);
        bytes.extend(&digest.as_bytes()[..TRAILER]);
        let mut applied = base.clone();
        if apply_bf16(&mut applied, &bytes).is_ok() && cut == 0 {
            prop_assert_eq!(applied.len(), new.len());
        }
    }

    #[test]
    fn one_flipped_bit_is_found_before_anything_is_written(at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let (base, new) = trained(3000, 1e-4, 1);
        let mut bytes = encode_bf16(&base, &new);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let mut applied = base.clone();
        prop_assert!(matches!(apply_bf16(&mut applied, &bytes), Err(DeltaError::Damaged(_))));
        prop_assert_eq!(applied, base);
    }
}

#[test]
fn a_delta_for_other_weights_is_refused_by_name() {
    let bytes = encode_bf16(&[1, 2, 3], &[1, 2, 4]);
    let error = apply_bf16(&mut [0; 4], &bytes).unwrap_err().to_string();
    assert!(error.contains("number of elements is 3, these weights have 4"), "{error}");
    let error = apply_f32(&mut [0; 3], &bytes).unwrap_err().to_string();
    assert!(error.contains("bytes per element is 2"), "{error}");
}

fn arena(values: &[f32], bf16_weights: bool) -> Params {
    let tensor = |name: &str, shape: &[usize], offset| TensorSpec {
        name: name.to_owned(),
        shape: shape.to_vec(),
        offset,
        kind: TensorKind::Mlp,
    };
    let tensors = vec![tensor("a", &[2, 2], 0), tensor("b", &[values.len() - 4], 4)];
    let layout = Arc::new(ParamLayout { tensors, total: values.len() });
    let data = match bf16_weights {
        true => ParamData::Bf16(values.iter().map(|&x| bf16::from_f32(x)).collect()),
        false => ParamData::F32(values.to_vec()),
    };
    Params { layout, data }
}

#[test]
fn frames_carry_a_version_to_the_next() {
    let (v0, v1) = (PolicyVersion::new(1, 0), PolicyVersion::new(1, 1));
    let tokenizer = Digest::of(b"tokenizer");
    for bf16_weights in [true, false] {
        let old = arena(&[0.5, -0.25, 0.0, 3.0, 1.0, 2.0], bf16_weights);
        let new = arena(&[0.5, -0.26, 0.0, 3.0, 1.0, 2.5], bf16_weights);
        let key = key_frame(&old, v0, tokenizer);
        let mut shadow = arena(&[9.0; 6], bf16_weights);
        assert_eq!(apply_frame(&mut shadow, None, &key).unwrap(), vec![0..6; 1]);
        assert_eq!(shadow, old);
        let delta = delta_frame(&old, v0, &new, v1, tokenizer);
        assert!((delta.manifest.density - 1.0 / 3.0).abs() <= 1e-12);
        apply_frame(&mut shadow, Some(v0), &delta).unwrap();
        assert_eq!(shadow, new);
        let again = apply_frame(&mut shadow, Some(v1), &delta).unwrap_err().to_string();
        assert!(again.contains("base version"), "{again}");
        let mut other_base = arena(&[0.5, -0.25, 0.0, 3.5, 1.0, 2.0], bf16_weights);
        let wrong = apply_frame(&mut other_base, Some(v0), &delta).unwrap_err();
        assert!(matches!(wrong, DeltaError::Damaged(_)), "{wrong}");
    }
}

#[test]
fn a_frame_is_checked_before_the_shadow_is_touched() {
    let (old, v0) = (arena(&[0.5; 6], true), PolicyVersion::new(1, 0));
    let key = key_frame(&old, v0, Digest::of(b"t"));
    let before = arena(&[1.5; 6], true);
    let refused = |change: &dyn Fn(&mut freewheel_types::WeightsPayload), says: &str| {
        let (mut payload, mut shadow) = (key.clone(), before.clone());
        change(&mut payload);
        let error = apply_frame(&mut shadow, None, &payload).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
        assert_eq!(shadow, before);
    };
    refused(&|p| p.chunks[0][3] ^= 1, "chunk 0 does not match its digest");
    refused(&|p| p.chunks.push(vec![]), "2 chunks, the manifest names 1");
    refused(&|p| p.chunks[0].truncate(9), "chunk 0 does not match its digest");
    refused(&|p| p.manifest.tensors[1].name = "c".into(), "c [2]");
    refused(&|p| p.manifest.dtype = freewheel_types::WeightsDtype::F32, "element type is F32");
    let mut payload = key.clone();
    payload.manifest.arena_digest = Digest::of(b"other");
    assert!(
        apply_frame(&mut before.clone(), None, &payload)
            .unwrap_err()
            .to_string()
            .contains("the manifest says")
    );
}

#[test]
fn a_body_that_unfolds_to_more_than_its_block_is_refused() {
    // 64 MiB of zeros in a few thousand bytes, for a block of a thousand.
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 19).unwrap();
    assert!(bomb.len() < 1 << 14, "{} bytes", bomb.len());
    let mut block = vec![7_u16; 512];
    assert_eq!((apply_dense(&mut block, &bomb), &block[..2]), (None, &[7, 7][..]));
    let exact = zstd::bulk::compress(&vec![0; 1024], 19).unwrap();
    assert_eq!(apply_dense(&mut block, &exact), Some(()));
}
