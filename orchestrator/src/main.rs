//! The one binary: see the library.

fn main() -> std::process::ExitCode {
    freewheel::cli::main()
}
