//! From errors to what a person reads and what a script sees.
//!
//! | code | means |
//! |---|---|
//! | 0 | done |
//! | 1 | the work failed |
//! | 2 | wrong usage (clap) |
//! | 78 | bad config or input file, before any work |
//! | 130 | interrupted |

use std::fmt;
use std::process::ExitCode;

use crate::config::ConfigError;

/// An error with its exit code and, if we know one, a cure.
#[derive(Debug)]
pub struct Failure {
    code: u8,
    hint: Option<String>,
    error: anyhow::Error,
}

impl Failure {
    /// Exit code of bad configs and inputs (`EX_CONFIG` of sysexits.h).
    pub const INPUT: u8 = 78;
    /// Exit code after an interrupt.
    pub const INTERRUPTED: u8 = 130;

    /// The error of a command that was interrupted.
    pub fn interrupted(what: impl Into<String>) -> anyhow::Error {
        Self { code: Self::INTERRUPTED, hint: None, error: anyhow::anyhow!(what.into()) }.into()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.error)
    }
}

impl std::error::Error for Failure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

/// Marks errors with an exit code or a cure.
pub trait Explain<T> {
    /// A bad config or input, found before any work: exit code 78.
    fn input(self) -> anyhow::Result<T>;
    /// The same with a cure.
    fn input_hint(self, hint: impl Into<String>) -> anyhow::Result<T>;
    /// A failure of the work (exit code 1) with a cure.
    fn hint(self, hint: impl Into<String>) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> Explain<T> for Result<T, E> {
    fn input(self) -> anyhow::Result<T> {
        self.map_err(|error| mark(error.into(), Failure::INPUT, None))
    }

    fn input_hint(self, hint: impl Into<String>) -> anyhow::Result<T> {
        self.map_err(|error| mark(error.into(), Failure::INPUT, Some(hint.into())))
    }

    fn hint(self, hint: impl Into<String>) -> anyhow::Result<T> {
        self.map_err(|error| mark(error.into(), 1, Some(hint.into())))
    }
}

/// Wraps `error`; what was marked before keeps its code and its hint.
fn mark(error: anyhow::Error, code: u8, hint: Option<String>) -> anyhow::Error {
    match error.downcast::<Failure>() {
        Ok(mut marked) => {
            marked.hint = marked.hint.or(hint);
            marked.into()
        }
        Err(error) => Failure { code, hint, error }.into(),
    }
}

/// The exit code of an error.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    let marked = error.chain().find_map(|cause| cause.downcast_ref::<Failure>()).map(|failure| failure.code);
    let config = error.chain().any(|cause| cause.is::<ConfigError>()).then_some(Failure::INPUT);
    marked.or(config).unwrap_or(1)
}

/// The error as a person reads it: the chain, then the cure.
pub fn render(error: &anyhow::Error) -> String {
    let mut text = format!("error: {error}");
    let mut last = error.to_string();
    for cause in error.chain().skip(1) {
        let line = cause.to_string();
        // Transparent wrappers repeat what they wrap.
        if line != last && !last.ends_with(&line) {
            text.push_str("\n  caused by: ");
            text.push_str(&line);
        }
        last = line;
    }
    if let Some(hint) = error.chain().find_map(|cause| cause.downcast_ref::<Failure>()?.hint.as_ref()) {
        text.push_str("\nhint: ");
        text.push_str(hint);
    }
    text
}

/// Prints the outcome of a command and turns it into the process's exit code.
pub fn finish(result: anyhow::Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    // A reader that went away (`| head`) is no failure of ours.
    let broken_pipe = error.chain().any(|cause| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
    });
    if broken_pipe {
        return ExitCode::SUCCESS;
    }
    eprintln!("{}", render(&error));
    ExitCode::from(exit_code(&error))
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn the_code_and_the_hint_survive_context_around_them() {
        let missing: std::io::Result<()> = Err(std::io::Error::other("gone"));
        let error = missing.input_hint("look elsewhere").context("while opening x").unwrap_err();
        assert_eq!(exit_code(&error), 78);
        assert_eq!(render(&error), "error: while opening x\n  caused by: gone\nhint: look elsewhere");
    }

    #[test]
    fn the_first_mark_wins() {
        let error = anyhow::anyhow!("x");
        let error = Err::<(), _>(error).input().hint("try").unwrap_err();
        assert_eq!((exit_code(&error), render(&error)), (78, "error: x\nhint: try".into()));
        assert_eq!(exit_code(&anyhow::anyhow!("plain")), 1);
        assert_eq!(exit_code(&Failure::interrupted("stopped")), 130);
    }
}
