//! The oracle's cases, and what they leave out.

use std::path::PathBuf;

use serde_json::Value;

use super::*;

fn cases() -> Vec<Value> {
    let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures");
    let root = std::env::var_os("FREEWHEEL_ORACLES").map_or_else(|| PathBuf::from(fixtures), PathBuf::from);
    let path = root.join("verifier/cases.json");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file: Value = serde_json::from_str(&text).unwrap();
    file["cases"].as_array().expect("a list of cases").clone()
}

/// A string, or `["repeat", text, count, tail]`.
fn text_of(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let count = usize::try_from(parts[2].as_u64().unwrap()).unwrap();
            let tail = parts.get(3).and_then(Value::as_str).unwrap_or("");
            parts[1].as_str().unwrap().repeat(count) + tail
        }
        other => panic!("not a string: {other}"),
    }
}

#[test]
fn agrees_with_the_oracle() {
    let cases = cases();
    let (mut wrong, mut unlike_sensible, mut agree) = (Vec::new(), Vec::new(), 0);
    for case in &cases {
        let (gold, answer) = (text_of(&case["gold"]), text_of(&case["answer"]));
        let ours = verify(&gold, &answer).unwrap_or(false);
        let verdict = case["verdict"].as_bool().unwrap();
        let sensible = case["sensible"].as_bool().unwrap();
        let line = format!("#{} gold {:?} answer {:?}: {ours}", case["id"], excerpt(&gold), excerpt(&answer));
        agree += usize::from(ours == verdict);
        if ours != sensible {
            unlike_sensible.push(line.clone());
        }
        if ours != verdict && ours != sensible {
            wrong.push(line);
        }
    }
    println!(
        "{} cases: {agree} as math-verify says, {} neither so nor as a careful person says, {} unlike what a careful person says",
        cases.len(),
        wrong.len(),
        unlike_sensible.len()
    );
    println!("{}", unlike_sensible.join("\n"));
    assert!(cases.len() >= 100, "only {} cases", cases.len());
    assert!(wrong.len() * 100 <= cases.len(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[track_caller]
fn right(gold: &str, answer: &str) {
    assert_eq!(
        verify(gold, answer),
        Ok(true),
        "gold {gold:?}, answer {answer:?}, read as {:?}",
        extract::answer(answer)
    );
}

#[track_caller]
fn wrong(gold: &str, answer: &str) {
    assert_eq!(
        verify(gold, answer),
        Ok(false),
        "gold {gold:?}, answer {answer:?}, read as {:?}",
        extract::answer(answer)
    );
}

#[test]
fn only_the_last_answer_counts() {
    right("5", r"\boxed{4}, no, \boxed{5}");
    wrong("4", r"\boxed{4}, no, \boxed{5}");
    right("18", "so 3*6=18\n#### 18");
    right("8", "<think>The answer is 7.</think>The answer is 8.");
    right("12", "First 3+4=7, then 7+5 = 12.");
    wrong("7", "First 3+4=7, then 7+5 = 12.");
    right("20", "They pay 4 times 5 dollars, so 20 dollars.");
    right("3", "We get\n\\[ x = 3 \\]");
    right("-2", "The result is: **-2**");
    wrong("5", "5 or 6");
    wrong("5", "{5,6}");
}

#[test]
fn large_numbers_are_compared_exactly() {
    wrong("12345678901234567890", "12345678901234567891");
    right("12345678901234567890", "12,345,678,901,234,567,890");
    let digits = "7".repeat(60);
    right(&digits, &digits);
    wrong(&digits, &format!("{}8", &digits[..59]));
}

#[test]
fn decimals_stand_for_what_they_round() {
    right(r"\frac{2}{3}", "0.666667");
    wrong(r"\frac{2}{3}", "0.67");
    wrong("3.14", r"\pi");
    wrong("0.333333", "0.333334");
    wrong("0", "0.0000001");
}

#[test]
fn forms_the_oracle_leaves_out() {
    right(r"\frac{1}{2}", r"\(\frac{1}{2}\)");
    right("(B)", "B");
    right("B", "The answer is (B).");
    right("B", "B) 42");
    wrong("B", "C) 42");
    right(r"\{1, 2\}", r"x = 1 \text{ or } x = 2");
    right(r"(-\infty, 0) \cup (0, \infty)", r"x \neq 0");
    right(r"(-\infty, 0) \cup (0, \infty)", r"\mathbb{R} \setminus \{0\}");
    right(r"[1, 3]", r"[1,2] \cup [2,3]");
    right(r"1 \pm \sqrt{2}", r"1-\sqrt{2}, 1+\sqrt{2}");
    wrong(r"1 \pm \sqrt{2}", r"1+\sqrt{2}");
    right(r"\begin{pmatrix}1\\2\end{pmatrix}", r"\langle 1, 2 \rangle");
    right("100 cm", "1 m");
    wrong("100 cm", "1 km");
    right("2x > 4", "x > 2");
    wrong("2x > 4", "x < 2");
    right(r"\log_2 8", "3");
    right(r"\binom{5}{2}", "10");
    right(r"\frac{2}{3}", "2(1/3)");
    right("5!", "120");
    right(r"\sin 30^\circ", r"\frac{1}{2}");
    right(r"|x-1|", r"|1-x|");
    right("x^2y", r"y \cdot x^{2}");
    wrong("x^2y", "x y^2");
    right("even", "The answer is even.");
    wrong("even", "The answer is odd.");
    wrong("7", "x + 7");
    wrong("7x", "7");
}

#[test]
fn a_reference_without_value_is_unscored() {
    for gold in ["", "  ", "nan", r"\frac{1}{0}", r"\boxed{5"] {
        assert!(verify(gold, "5").is_err(), "{gold:?}");
    }
}

#[test]
fn hostile_text_is_quick_and_wrong() {
    let start = std::time::Instant::now();
    for answer in [
        "(".repeat(100_000),
        "\\frac{".repeat(20_000),
        "{".repeat(100_000),
        "-".repeat(100_000) + "5",
        "$".repeat(99_999),
        "9^".repeat(1000) + "9",
        "a ".repeat(60_000),
        "answer is ".repeat(10_000),
        "1,".repeat(2000) + "1",
        "|".repeat(3000),
        "\\boxed".repeat(10_000),
        "x!".repeat(1000),
    ] {
        assert_eq!(verify("7", &answer), Ok(false), "{}", excerpt(&answer));
    }
    assert!(start.elapsed().as_secs() < 10, "took {:?}", start.elapsed());
}

proptest::proptest! {
    #[test]
    fn any_text_gets_a_verdict(gold in ".{0,40}", answer in r"[-0-9a-z\\{}()\[\]$^_+*/=<>,.!|% ]{0,60}") {
        let _ = verify(&gold, &answer);
        let _ = verify(&answer, &gold);
    }

    #[test]
    fn a_number_equals_itself_however_it_is_written(n in -1_000_000_000_i64..1_000_000_000) {
        let gold = n.to_string();
        for answer in [format!("{n}.0"), format!("\\boxed{{{n}}}"), format!("The answer is {n}."), format!("${n}$"), format!("{n} apples")] {
            proptest::prop_assert_eq!(verify(&gold, &answer), Ok(true), "{}", answer);
            proptest::prop_assert_eq!(verify(&(n + 1).to_string(), &answer), Ok(false), "{}", answer);
        }
    }
}
