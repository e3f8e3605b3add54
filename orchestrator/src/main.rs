//! The one binary: see the library.

fn main() -> std::process::ExitCode {
    // Before anything else: the sandbox's helper must be a process without threads.
    if let Some(code) = freewheel_reward::sandbox::helper_main() {
        return code;
    }
    freewheel::cli::main()
}
