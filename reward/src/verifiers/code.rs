//! Does the program work? Runs it in the sandbox on the prompt's test cases.
//!
//! The reference answer says how: `{"stdin": [{"input": "1 2", "output": "3"}]}`, `{"function": "add", "cases": [{"args": [1, 2], "expected": 3}]}`, or
//! `{"asserts": "assert add(1, 2) == 3"}`. In the first two forms the expected values never enter the sandbox, so a program cannot look them up; in the
//! third it can, if it goes looking, so it is for sets that come as asserts. Leaving early never passes: the harness must say at the end that it got
//! there, with a word it read before the program ran. A program that fails, hangs or floods is wrong; a sandbox that fails is unscored.

use freewheel_types::Digest;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Verifier, VerifierInput, after_thinking, excerpt, judged, tail};
use crate::sandbox::{Finished, Job, Outcome, Sandbox};
use crate::stack::{Judgement, Unscored};

const CASES_MAX: usize = 256;

/// Runs programs against test cases.
#[derive(Clone, Debug)]
pub struct Code {
    /// Where they run.
    pub sandbox: Sandbox,
    /// The share of cases that pass is the value, instead of 1 for all and 0 for fewer.
    pub partial: bool,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum Tests {
    Stdin { stdin: Vec<InOut> },
    Function { function: String, cases: Vec<Call> },
    Asserts { asserts: String },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct InOut {
    input: String,
    output: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Call {
    #[serde(default)]
    args: Vec<Value>,
    expected: Value,
}

/// What a run of all cases came to.
struct Passed {
    right: usize,
    all: usize,
    why: Option<String>,
}

/// Reads arguments, calls, prints the result behind a word that only the harness knows.
const CALL_HARNESS: &str = r#"
import sys as _sys, json as _json
_word, _name, _args = _json.loads(_sys.stdin.read())
_out, _dump, _exit = _sys.stdout.write, _json.dumps, _sys.exit
_sys.stdin = None
_scope = {"__name__": "solution"}
exec(compile(open("solution.py").read(), "solution.py", "exec"), _scope)
_result = _scope[_name](*_args)
_out("\n" + _word + _dump(_result) + "\n")
"#;

const ASSERT_HARNESS: &str = r#"
import sys as _sys, json as _json
_word, _tests = _json.loads(_sys.stdin.read())
_out = _sys.stdout.write
_sys.stdin = None
_scope = {"__name__": "solution"}
exec(compile(open("solution.py").read(), "solution.py", "exec"), _scope)
exec(compile(_tests, "tests.py", "exec"), _scope)
_out("\n" + _word + "\n")
"#;

impl Code {
    fn run(&self, tests: &Tests, code: &str) -> Result<Passed, Unscored> {
        // The same for the same program and tests, and not to be guessed without knowing the tests.
        let word =
            || format!("done-{}-", &Digest::of(format!("{tests:?}\n{code}").as_bytes()).to_string()[..24]);
        match tests {
            Tests::Stdin { stdin } => {
                let inputs: Vec<String> = stdin.iter().map(|case| case.input.clone()).collect();
                let fine = |i: usize, run: &Finished| same_output(&run.stdout, &stdin[i].output);
                self.compare(code, None, inputs, fine)
            }
            Tests::Function { function, cases } => {
                let word = word();
                let inputs: Vec<String> =
                    cases.iter().map(|case| json!([word, function, case.args]).to_string()).collect();
                let fine = |i: usize, run: &Finished| {
                    returned(&run.stdout, &word).is_some_and(|value| same_value(&value, &cases[i].expected))
                };
                self.compare(code, Some(CALL_HARNESS), inputs, fine)
            }
            Tests::Asserts { asserts } => {
                let word = word();
                let input = json!([word, asserts]).to_string();
                let fine = |_: usize, run: &Finished| run.stdout.lines().any(|line| line == word);
                self.compare(code, Some(ASSERT_HARNESS), vec![input], fine)
            }
        }
    }

    /// Runs every input, going on after those that fail, and counts the right ones.
    fn compare(
        &self,
        code: &str,
        harness: Option<&str>,
        inputs: Vec<String>,
        fine: impl Fn(usize, &Finished) -> bool,
    ) -> Result<Passed, Unscored> {
        let mut command = self.sandbox.config().command.clone();
        command.push(harness.map_or("solution.py", |_| "harness.py").into());
        let mut files = vec![("solution.py".to_owned(), code.to_owned())];
        files.extend(harness.map(|text| ("harness.py".to_owned(), text.to_owned())));
        let mut passed = Passed { right: 0, all: inputs.len(), why: None };
        let mut from = 0;
        while from < inputs.len() {
            let job = Job { command: command.clone(), files: files.clone(), inputs: inputs[from..].to_vec() };
            let runs = self.sandbox.run(&job).map_err(|e| Unscored(e.to_string()))?;
            if runs.is_empty() {
                return Err(Unscored("the sandbox gave no result".into()));
            }
            for run in &runs {
                let right = run.outcome == Outcome::Exit(0) && fine(from, run);
                passed.right += usize::from(right);
                if !right {
                    passed.why.get_or_insert_with(|| format!("case {}: {}", from + 1, told(run)));
                }
                from += 1;
            }
            if passed.why.is_some() && !self.partial {
                break;
            }
        }
        Ok(passed)
    }
}

impl Verifier for Code {
    fn score(&self, input: &VerifierInput<'_>) -> Result<Judgement, Unscored> {
        let answer = input.answer.ok_or_else(|| Unscored("the prompt has no test cases".into()))?;
        let tests: Tests = serde_json::from_value(answer.clone()).map_err(|_| {
            Unscored(
                "the reference answer holds no test cases: give {\"stdin\": [{\"input\", \"output\"}]}, {\"function\", \"cases\": \
                 [{\"args\", \"expected\"}]} or {\"asserts\"}"
                    .into(),
            )
        })?;
        let cases = match &tests {
            Tests::Stdin { stdin } => stdin.len(),
            Tests::Function { cases, .. } => cases.len(),
            Tests::Asserts { asserts } => usize::from(!asserts.trim().is_empty()),
        };
        if !(1..=CASES_MAX).contains(&cases) {
            return Err(Unscored(format!("there must be 1 to {CASES_MAX} test cases, there are {cases}")));
        }
        let Some(code) = program(after_thinking(tail(input.text))) else {
            return Ok(judged(false, Some("no program".into())));
        };
        let passed = self.run(&tests, code)?;
        let all = passed.right == passed.all;
        let share = passed.right as f32 / passed.all as f32;
        let detail = passed.why.map(|why| excerpt(&why));
        let value = if self.partial { share } else { f32::from(u8::from(all)) };
        Ok(Judgement { value, detail, label: None, odds: None })
    }
}

/// The last fenced block, or the whole text if there is none.
fn program(text: &str) -> Option<&str> {
    let mut found = None;
    let mut rest = text;
    while let Some(at) = rest.find("```") {
        let after = &rest[at + 3..];
        let Some(line) = after.find('\n') else { break };
        let body = &after[line + 1..];
        let Some(end) = body.find("```") else { break };
        found = Some(&body[..end]);
        rest = &body[end + 3..];
    }
    found.or(Some(text)).filter(|code| !code.trim().is_empty())
}

/// Equal line by line, white space at line ends and empty lines at the end aside.
fn same_output(is: &str, expected: &str) -> bool {
    let lines =
        |text: &str| text.trim_end().lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>();
    lines(is) == lines(expected)
}

fn returned(stdout: &str, word: &str) -> Option<Value> {
    let line = stdout.lines().rev().find_map(|line| line.strip_prefix(word))?;
    serde_json::from_str(line).ok()
}

/// Equal as JSON; numbers by value, floats within one part in a billion.
fn same_value(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(x), Value::Number(y)) if x.is_f64() || y.is_f64() => {
            let (x, y) = (x.as_f64().unwrap_or(f64::NAN), y.as_f64().unwrap_or(f64::NAN));
            (x - y).abs() <= 1e-9 * x.abs().max(y.abs()).max(1.0)
        }
        (Value::Array(x), Value::Array(y)) => {
            x.len() == y.len() && x.iter().zip(y).all(|(x, y)| same_value(x, y))
        }
        (Value::Object(x), Value::Object(y)) => {
            x.len() == y.len() && x.iter().all(|(key, x)| y.get(key).is_some_and(|y| same_value(x, y)))
        }
        (a, b) => a == b,
    }
}

fn told(run: &Finished) -> String {
    match run.outcome {
        Outcome::Exit(0) => "wrong output".into(),
        Outcome::Exit(code) => {
            let last = run.stderr.trim_end().lines().next_back().unwrap_or("");
            format!("exit code {code} {last}")
        }
        Outcome::Cpu => "out of processor time".into(),
        Outcome::Wall => "out of time".into(),
        Outcome::Memory => "out of memory".into(),
        Outcome::Output => "too much output".into(),
        Outcome::Signal(signal) => format!("killed by signal {signal}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_fenced_block_is_the_program() {
        assert_eq!(program("a\n```python\nx = 1\n```\nthen\n```\ny = 2\n```\nend"), Some("y = 2\n"));
        assert_eq!(program("print(1)"), Some("print(1)"));
        assert_eq!(program("```python\n\n```"), None);
        assert_eq!(program(" "), None);
        assert_eq!(program("```python\nprint(1)"), Some("```python\nprint(1)"));
    }

    #[test]
    fn values_are_compared_as_json() {
        for (a, b, same) in [
            ("1", "1.0", true),
            ("0.3", "0.30000000000000004", true),
            ("0.3", "0.31", false),
            ("[1, {\"a\": null}]", "[1.0, {\"a\": null}]", true),
            ("\"1\"", "1", false),
            ("true", "1", false),
        ] {
            let value = |text: &str| serde_json::from_str::<Value>(text).unwrap();
            assert_eq!(same_value(&value(a), &value(b)), same, "{a} {b}");
        }
        assert!(same_output("1 \n2\n\n", "1\n2") && !same_output("1 2", "12"));
    }
}
