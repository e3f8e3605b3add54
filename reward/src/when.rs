//! `when`: which prompts a component applies to.

/// A filter on tags.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// Every prompt.
    Always,
    /// Prompts that have one of these tags.
    AnyTag(Vec<String>),
}

impl When {
    /// Parses `tag:a` or `tag:a|b`.
    pub(crate) fn parse(text: Option<&str>) -> Result<Self, String> {
        let Some(text) = text else { return Ok(Self::Always) };
        let Some(list) = text.strip_prefix("tag:") else {
            return Err(format!("{text:?} is not understood; write \"tag:NAME\" or \"tag:NAME|NAME\""));
        };
        let tags: Vec<String> = list.split('|').map(|tag| tag.trim().to_owned()).collect();
        if tags.iter().any(String::is_empty) {
            return Err(format!("{text:?} has an empty tag; write \"tag:NAME\" or \"tag:NAME|NAME\""));
        }
        Ok(Self::AnyTag(tags))
    }

    /// Whether a prompt with these tags is meant.
    pub(crate) fn applies(&self, tags: &[String]) -> bool {
        match self {
            Self::Always => true,
            Self::AnyTag(wanted) => wanted.iter().any(|tag| tags.contains(tag)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_matched_whole() {
        let when = When::parse(Some("tag:math|code")).unwrap();
        assert!(when.applies(&["x".into(), "code".into()]));
        assert!(!when.applies(&["mathematics".into()]));
        assert!(When::parse(None).unwrap().applies(&[]));
        for bad in ["math", "tag:", "tag:a||b"] {
            assert!(When::parse(Some(bad)).unwrap_err().contains("tag:NAME"), "{bad}");
        }
    }
}
