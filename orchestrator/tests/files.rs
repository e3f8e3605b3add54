//! What is committed and must stay true: configs, generated pages, the help texts.

use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

#[test]
fn every_config_fits_its_schema() {
    let mut seen = 0;
    for entry in std::fs::read_dir(root().join("configs")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        seen += 1;
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        if name.ends_with("-sft") {
            freewheel::cli::sft::check_file(&path).unwrap_or_else(|error| panic!("{error:#}"));
        } else if name.ends_with("-stages") {
            freewheel::cli::recipe::check_file(&path).unwrap_or_else(|error| panic!("{error:#}"));
        } else {
            freewheel::config::load(&path, &[]).unwrap_or_else(|error| panic!("{error}"));
        }
    }
    assert!(seen >= 3, "only {seen} configs");
}

#[test]
fn the_config_reference_is_fresh() {
    let committed = std::fs::read_to_string(root().join("docs/config-reference.md")).unwrap_or_default();
    let wanted = freewheel::config::reference::markdown();
    assert!(committed == wanted, "docs/config-reference.md is stale: `cargo xtask reference` writes it");
}

#[test]
fn every_alias_names_a_real_key() {
    let wrong = freewheel::config::unknown_alias_targets();
    assert!(wrong.is_empty(), "aliases for keys that do not exist: {wrong:?}");
}

#[test]
fn every_command_has_help_with_an_example() {
    fn visit(command: &clap::Command, path: &str, bare: &mut Vec<String>) {
        let name = format!("{path} {}", command.get_name());
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        if !help.contains("Example") {
            bare.push(name.clone());
        }
        command
            .get_subcommands()
            .filter(|sub| sub.get_name() != "help")
            .for_each(|sub| visit(sub, &name, bare));
    }
    let mut bare = Vec::new();
    visit(&freewheel::cli::command(), "", &mut bare);
    assert!(bare.is_empty(), "no example in the help of {bare:?}");
}

#[test]
fn help_is_as_committed() {
    let mut command = freewheel::cli::command();
    insta::assert_snapshot!("freewheel", command.render_help().to_string());
    let mut run = command.find_subcommand("run").unwrap().clone();
    insta::assert_snapshot!("run", run.render_long_help().to_string());
}
