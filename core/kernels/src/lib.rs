//! Compute kernels: slices in, slices out.
//!
//! Every operation is *defined* by a scalar reference that fixes the order of every f32 operation; the vector
//! versions (AVX2, AVX-512, AMX, NEON) give the same bits. A row's bits never depend on the rows beside it, on the number
//! of rows, or on the number of threads, so sampling and training may batch as they please and still agree.
//!
//! ```text
//!   isa      what this processor can do, found once
//!   simd     sixteen f32 lanes: one trait, an implementation per instruction set
//!   math     exp, ln, sigmoid, sin/cos on those lanes, from fused multiply-adds only
//!   gemm     x·Wᵀ with a packed weight (f32: one FMA chain; bf16: the AMX tile order)
//!   norm layer_norm rope attention activation pointwise softmax router optim convert     one file an operation, forward and backward
//!   threads  a team that parts of an operation are shared out to      pages   memory for large matrices
//!   measure  what the machine reaches: bytes/s, flop/s
//!   gpu      which GPUs there are (feature `cuda`; nothing runs on them yet)
//! ```
//!
//! Conventions: T packed tokens, D model width, H heads, F expert hidden width, E experts, K experts per token, V
//! vocabulary; matrices are row-major. Lengths are checked at the door with `assert!`: a wrong length is a bug of the
//! caller. The crate knows no model, allocates nothing beyond thread-local scratch, and logs nothing.
#![allow(unsafe_code, reason = "the one crate of the workspace that may: each block says why it holds")]

pub mod activation;
#[cfg(target_arch = "x86_64")]
mod amx;
pub mod attention;
pub mod convert;
#[cfg(target_arch = "x86_64")]
mod dots;
pub mod gemm;
pub mod gpu;
mod isa;
pub mod layer_norm;
mod math;
pub mod measure;
pub mod norm;
pub mod optim;
mod pages;
pub mod pointwise;
pub mod rope;
pub mod router;
mod simd;
pub mod softmax;
#[cfg(test)]
mod testing;
pub mod threads;

pub use gemm::{CodeBits, PackedMatrix, Precision, Quantisation};
pub use pages::Pages;
pub use threads::Threads;
