//! Matrix products at the shapes that matter: large, decode, and the tiny model's. One thread; idle machine wanted.
//!
//! `cargo bench -p freewheel-kernels --bench gemm -- --quick`

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use freewheel_kernels::gemm::{PackedMatrix, Precision, matmul, weight_grad};
use freewheel_kernels::{Threads, measure};
use std::time::Duration;

/// (m, n, k)
const SHAPES: [(usize, usize, usize); 8] = [
    (1024, 1024, 1024),
    (512, 4096, 1024),
    (8, 4096, 1024),
    (1, 4096, 1024),
    (256, 384, 128),
    (16, 384, 128),
    (1, 128, 128),
    (1, 512, 128),
];

fn ramp(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i % 251) as f32 / 251.0 - 0.5).collect()
}

fn products(c: &mut Criterion) {
    eprintln!("{:?}", measure::cpu_features());
    let threads = Threads::single();
    for precision in [Precision::Bf16, Precision::F32] {
        let mut group = c.benchmark_group(format!("matmul/{precision:?}"));
        for (m, n, k) in SHAPES {
            let (x, w) = (ramp(m * k), PackedMatrix::from_f32(precision, &ramp(n * k), n, k));
            let mut out = vec![0.0; m * n];
            group.throughput(Throughput::Elements(2 * (m * n * k) as u64));
            group.bench_function(BenchmarkId::from_parameter(format!("{m}x{n}x{k}")), |b| {
                b.iter(|| matmul(&threads, &x, m, &w, &mut out));
            });
        }
    }
}

fn gradients(c: &mut Criterion) {
    let threads = Threads::single();
    for precision in [Precision::Bf16, Precision::F32] {
        let mut group = c.benchmark_group(format!("weight_grad/{precision:?}"));
        for (t, n, k) in [(1024, 1024, 1024), (256, 384, 128), (32, 384, 128)] {
            let (dy, x, mut dw) = (ramp(t * n), ramp(t * k), vec![0.0; n * k]);
            group.throughput(Throughput::Elements(2 * (t * n * k) as u64));
            group.bench_function(BenchmarkId::from_parameter(format!("t{t} {n}x{k}")), |b| {
                b.iter(|| weight_grad(&threads, precision, &dy, &x, t, n, k, &mut dw));
            });
        }
    }
}

fn packing(c: &mut Criterion) {
    let threads = Threads::single();
    let (n, k) = (1024, 1024);
    let w = ramp(n * k);
    let mut group = c.benchmark_group("pack");
    group.throughput(Throughput::Elements((n * k) as u64));
    for precision in [Precision::Bf16, Precision::F32] {
        let mut packed = PackedMatrix::zeros(precision, n, k);
        group.bench_function(format!("{precision:?}/rows"), |b| {
            b.iter(|| packed.repack_from_f32(&threads, &w))
        });
        group.bench_function(format!("{precision:?}/transposed"), |b| {
            b.iter(|| packed.repack_from_f32_transposed(&threads, &w));
        });
    }
}

criterion_group! {
    name = gemm;
    config = Criterion::default().warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(400));
    targets = products, gradients, packing
}
criterion_main!(gemm);
