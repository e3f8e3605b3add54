//! Whole-system tests.

mod oracles;

mod crate_graph;
