//! Answers that are words.

/// Lower case, without LaTeX wrappers, brackets around the whole, quotes, end marks and doubled spaces.
pub(crate) fn canonical(text: &str) -> String {
    let mut out = text.replace(['$', '*', '"', '`', '“', '”'], " ");
    for wrapper in ["\\text", "\\textbf", "\\mathrm", "\\textit", "\\mathbf", "\\boxed", "\\left", "\\right"]
    {
        out = out.replace(&format!("{wrapper}{{"), "{").replace(&format!("{wrapper} "), " ");
    }
    let out = out.replace(['{', '}', '\\'], " ");
    let mut words = out.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
    loop {
        let trimmed = words.trim().trim_end_matches(['.', ',', ';', ':', '!', '?']).trim();
        let inner = trimmed
            .strip_prefix('(')
            .and_then(|t| t.strip_suffix(')'))
            .filter(|t| !t.contains(['(', ')', ',']));
        let next = inner.unwrap_or(trimmed).to_owned();
        if next == words {
            return words;
        }
        words = next;
    }
}

/// The letter of a multiple-choice answer: `B`, `(B)`, `B.`, `B) 12`, `\text{B}`.
pub(crate) fn choice(text: &str) -> Option<char> {
    let text = canonical(text);
    let mut chars = text.chars();
    let letter = chars.next().filter(|c| ('a'..='j').contains(c))?;
    let rest = chars.as_str();
    (rest.is_empty() || rest.starts_with([')', '.', ':'])).then_some(letter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrappers_do_not_matter_and_words_do() {
        assert_eq!(canonical(r"$\text{Monday}$."), "monday");
        assert_eq!(canonical("**Yes**!"), "yes");
        assert_eq!(canonical("(B)"), "b");
        assert_ne!(canonical("(1, 2)"), canonical("1, 2"));
        assert_eq!((choice("B) 12"), choice(r"\text{(C)}"), choice("Bob")), (Some('b'), Some('c'), None));
    }
}
