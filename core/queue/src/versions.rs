//! Which published versions lead where, and which nobody needs any more. Pure; both stores use it.

use freewheel_types::PolicyVersion;

/// One published version. Lists of them are in publishing order, hence strictly increasing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Published {
    /// The version.
    pub version: PolicyVersion,
    /// What a delta is against; `None` for a key frame.
    pub base: Option<PolicyVersion>,
}

/// The versions to apply, in order, to get from `have` to the newest: walks back from the newest until it meets
/// `have` or a key frame. `None` if a link is missing.
pub(crate) fn chain(list: &[Published], have: Option<PolicyVersion>) -> Option<Vec<PolicyVersion>> {
    let newest = list.last()?.version;
    if have.is_some_and(|have| have >= newest) {
        return Some(Vec::new());
    }
    let mut path = Vec::new();
    let mut want = newest;
    loop {
        let link = list.iter().rev().find(|published| published.version == want)?;
        path.push(link.version);
        match link.base {
            Some(base) if Some(base) != have => want = base,
            _ => break,
        }
    }
    path.reverse();
    Some(path)
}

/// The versions to delete: all but the newest key frame with the deltas after it, the newest `keep`, and those in use.
pub(crate) fn collect(list: &[Published], keep: usize, in_use: &[PolicyVersion]) -> Vec<PolicyVersion> {
    let newest_key = list.iter().rposition(|published| published.base.is_none()).unwrap_or(0);
    let first_kept = newest_key.min(list.len().saturating_sub(keep));
    list[..first_kept].iter().map(|published| published.version).filter(|v| !in_use.contains(v)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v(step: u64) -> PolicyVersion {
        PolicyVersion::new(1, step)
    }

    fn list(links: &[(u64, Option<u64>)]) -> Vec<Published> {
        links.iter().map(|(version, base)| Published { version: v(*version), base: base.map(v) }).collect()
    }

    #[test]
    fn the_shortest_way_is_found() {
        let list = list(&[(0, None), (1, Some(0)), (3, Some(1)), (4, None), (6, Some(4)), (7, Some(6))]);
        assert_eq!(chain(&list, Some(v(4))), Some(vec![v(6), v(7)]), "deltas from what one has");
        assert_eq!(chain(&list, Some(v(3))), Some(vec![v(4), v(6), v(7)]), "through the key frame");
        assert_eq!(chain(&list, None), Some(vec![v(4), v(6), v(7)]));
        assert_eq!(chain(&list, Some(v(7))), Some(vec![]));
        assert_eq!(chain(&list[4..], None), None, "a missing key frame is no way");
        assert_eq!(chain(&[], None), None);
    }

    #[test]
    fn what_leads_to_the_newest_is_kept() {
        let list = list(&[(0, None), (1, Some(0)), (2, Some(1)), (3, None), (4, Some(3)), (5, Some(4))]);
        assert_eq!(collect(&list, 2, &[]), [v(0), v(1), v(2)]);
        assert_eq!(collect(&list, 5, &[]), [v(0)]);
        assert_eq!(collect(&list, 1, &[v(1)]), [v(0), v(2)]);
        assert_eq!(collect(&list[..3], 1, &[]), [], "the only key frame carries its deltas");
    }
}
