//! JSON Lines in: every bad line named as `file:line: reason`.

use std::fmt;
use std::io::Read as _;
use std::path::Path;

use anyhow::Context as _;
use serde::de::DeserializeOwned;

use crate::cli::fail::Explain as _;

/// Lines longer than this are refused.
const LINE_BYTES_MAX: usize = 64 << 20;
/// Bad lines named before the rest is only counted.
const NAMED_MAX: usize = 10;

/// The bad lines of one file.
#[derive(Debug)]
pub struct BadLines {
    named: Vec<String>,
    total: usize,
}

impl fmt::Display for BadLines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.named.join("\n"))?;
        match self.total - self.named.len() {
            0 => Ok(()),
            more => write!(f, "\nand {more} more bad lines"),
        }
    }
}

impl std::error::Error for BadLines {}

/// Reads `path` (`-` is standard input) as JSON Lines of `T`; `check` says what is wrong with a line that parses. Blank
/// lines are skipped. Each value comes with its line number.
///
/// # Errors
/// The bad lines, together, as bad input.
pub fn read<T: DeserializeOwned>(
    path: &Path,
    check: impl Fn(&T) -> Result<(), String>,
) -> anyhow::Result<Vec<(usize, T)>> {
    let bytes = slurp(path).input()?;
    let name = if path == Path::new("-") { "standard input".to_owned() } else { path.display().to_string() };
    let mut values = Vec::new();
    let mut bad = BadLines { named: Vec::new(), total: 0 };
    for (index, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
        match parse(line, &check) {
            Ok(None) => {}
            Ok(Some(value)) => values.push((index + 1, value)),
            Err(reason) => {
                bad.total += 1;
                if bad.named.len() < NAMED_MAX {
                    bad.named.push(format!("{name}:{}: {reason}", index + 1));
                }
            }
        }
    }
    if bad.total > 0 {
        return Err(bad).input();
    }
    if values.is_empty() {
        return Err(anyhow::anyhow!("{name}: has no lines")).input();
    }
    Ok(values)
}

fn slurp(path: &Path) -> anyhow::Result<Vec<u8>> {
    if path == Path::new("-") {
        let mut bytes = Vec::new();
        std::io::stdin().read_to_end(&mut bytes).context("standard input cannot be read")?;
        return Ok(bytes);
    }
    std::fs::read(path).with_context(|| format!("{} cannot be read", path.display()))
}

fn parse<T: DeserializeOwned>(
    line: &[u8],
    check: impl Fn(&T) -> Result<(), String>,
) -> Result<Option<T>, String> {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    if line.iter().all(u8::is_ascii_whitespace) {
        return Ok(None);
    }
    if line.len() > LINE_BYTES_MAX {
        return Err(format!("is {} bytes long, the limit is {LINE_BYTES_MAX}", line.len()));
    }
    let text =
        std::str::from_utf8(line).map_err(|error| format!("not UTF-8 at byte {}", error.valid_up_to()))?;
    let value: T = serde_json::from_str(text).map_err(|error| {
        // The position inside a line is its column; serde's own line number would mislead.
        let message = error.to_string();
        let message = message.split(" at line ").next().unwrap_or_default();
        format!("{message} (column {})", error.column())
    })?;
    check(&value)?;
    Ok(Some(value))
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    struct Line {
        n: u32,
    }

    #[test]
    fn every_bad_line_is_named_with_its_number() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.jsonl");
        std::fs::write(&path, b"{\"n\":1}\n\n{\"n\":\"x\"}\n{\"n\":9}\n\xff\n").unwrap();
        let check =
            |line: &Line| if line.n < 5 { Ok(()) } else { Err(format!("n is {}, must be below 5", line.n)) };
        let error = read(&path, check).unwrap_err();
        let text = error.to_string();
        for part in ["x.jsonl:3: invalid type", "x.jsonl:4: n is 9", "x.jsonl:5: not UTF-8"] {
            assert!(text.contains(part), "{part} missing in {text}");
        }
        assert_eq!(crate::cli::fail::exit_code(&error), 78);
    }

    #[test]
    fn good_lines_keep_their_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.jsonl");
        std::fs::write(&path, "\n{\"n\":1}\r\n\n{\"n\":2}").unwrap();
        let lines: Vec<(usize, u32)> =
            read(&path, |_: &Line| Ok(())).unwrap().into_iter().map(|(at, line)| (at, line.n)).collect();
        assert_eq!(lines, [(2, 1), (4, 2)]);
    }
}
