//! Arrows point down, siblings never touch: the crate graph as it is, held against the table it must keep.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, MetadataCommand};

/// What each crate may depend on, of ours.
const ALLOWED: [(&str, &[&str]); 10] = [
    ("freewheel-types", &[]),
    ("freewheel-kernels", &[]),
    ("freewheel-queue", &["freewheel-types"]),
    ("freewheel-model", &["freewheel-types", "freewheel-kernels"]),
    ("freewheel-actor", &["freewheel-types", "freewheel-kernels", "freewheel-model", "freewheel-queue"]),
    ("freewheel-reward", &["freewheel-types", "freewheel-kernels", "freewheel-model", "freewheel-queue"]),
    ("freewheel-learner", &["freewheel-types", "freewheel-kernels", "freewheel-model", "freewheel-queue"]),
    (
        "freewheel",
        &[
            "freewheel-types",
            "freewheel-kernels",
            "freewheel-model",
            "freewheel-queue",
            "freewheel-actor",
            "freewheel-reward",
            "freewheel-learner",
        ],
    ),
    ("freewheel-tests", &[]),
    ("xtask", &["freewheel"]),
];

#[test]
fn crates_depend_only_downwards() {
    let metadata =
        MetadataCommand::new().no_deps().other_options(vec!["--offline".to_owned()]).exec().unwrap();
    let ours: BTreeSet<&str> = metadata.packages.iter().map(|package| package.name.as_str()).collect();
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.into_iter().collect();
    assert_eq!(ours, allowed.keys().copied().collect(), "crates of the workspace and crates of the table");
    let mut wrong = Vec::new();
    for package in &metadata.packages {
        for dependency in package.dependencies.iter().filter(|d| d.kind == DependencyKind::Normal) {
            let (from, to) = (package.name.as_str(), dependency.name.as_str());
            if ours.contains(to) && !allowed[from].contains(&to) {
                wrong.push(format!("{from} -> {to}"));
            }
        }
    }
    assert!(wrong.is_empty(), "edges that may not be: {wrong:?}");
}
