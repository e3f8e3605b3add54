//! Computed pages of earlier sequences, found again by the tokens they hold: a radix tree, one page an edge.
//!
//! ```text
//! root ─[16 ids]─► page 7 ─[16 ids]─► page 3        system prompt, first turn
//!                       └──[16 ids]─► page 9        another conversation
//! ```
//!
//! A page depends on its tokens and those before it alone, so a sequence that begins with the same tokens takes the pages as
//! they are and computes the rest: the same bits, less work. The tree holds its pages like any other sequence does, and
//! gives up those that nobody else holds, the longest unused first, when pages are wanted. It knows one policy version: a
//! swap empties it, whatever running samples do. A prefix in constant use would otherwise stay as the first weights
//! computed it, and every rollout behind it would count as old as those.
//! Models with chunked or sliding layers do without: there a page is not kept whole.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::pages::{Page, PagePool, PageTable};

/// The pages of earlier sequences.
#[derive(Debug, Default)]
pub(crate) struct PrefixCache {
    nodes: BTreeMap<u64, Node>,
    /// First pages of sequences.
    roots: Children,
    /// Nodes without children by when they were last used: what may go.
    leaves: BTreeSet<(u64, u64)>,
    next_id: u64,
    clock: u64,
}

/// Nodes that follow one, by the tokens of their page.
type Children = BTreeMap<Arc<[u32]>, u64>;

#[derive(Debug)]
struct Node {
    tokens: Arc<[u32]>,
    page: Page,
    /// Expert ids of its positions `[page_tokens, layers, top_k]`.
    experts: Box<[u16]>,
    parent: Option<u64>,
    children: Children,
    used: u64,
}

/// What a sequence need not compute.
#[derive(Debug, Default)]
pub(crate) struct Prefix {
    /// Its first pages.
    pub(crate) pages: PageTable,
    /// Expert ids of their positions.
    pub(crate) experts: Vec<u16>,
}

impl PrefixCache {
    /// The longest run of whole pages that `tokens` begins with.
    pub(crate) fn find(&mut self, tokens: &[u32], page_tokens: usize) -> Prefix {
        let mut prefix = Prefix::default();
        let mut at = None;
        for block in tokens.chunks_exact(page_tokens) {
            let Some(&next) = self.children(at).get(block) else { break };
            self.touch(next);
            let node = &self.nodes[&next];
            prefix.pages.push(node.page.clone());
            prefix.experts.extend_from_slice(&node.experts);
            at = Some(next);
        }
        prefix
    }

    /// Takes in the whole pages of a computed sequence. `experts` are those of all its positions.
    pub(crate) fn insert(&mut self, tokens: &[u32], page_tokens: usize, pages: &PageTable, experts: &[u16]) {
        let per_page = experts.len() / tokens.len().max(1) * page_tokens;
        let mut at = None;
        for (i, (block, page)) in tokens.chunks_exact(page_tokens).zip(pages.pages()).enumerate() {
            let id = match self.children(at).get(block) {
                Some(&known) => known,
                None => self.add(at, block, page.clone(), &experts[i * per_page..(i + 1) * per_page]),
            };
            self.touch(id);
            at = Some(id);
        }
    }

    /// Gives up pages that nobody else holds until the pool has `pages` free; whether it has.
    pub(crate) fn make_room(&mut self, pool: &PagePool, pages: usize) -> bool {
        while pool.free() < pages {
            // What a running sequence holds too would free nothing.
            let idle = |&&(_, id): &&(u64, u64)| self.nodes[&id].page.holders() == 1;
            let Some(&(_, id)) = self.leaves.iter().find(idle) else { return false };
            self.remove(id);
        }
        true
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        let (next_id, clock) = (self.next_id, self.clock);
        *self = Self { next_id, clock, ..Self::default() };
    }

    /// Pages that only the cache holds.
    pub(crate) fn idle(&self) -> usize {
        self.nodes.values().filter(|node| node.page.holders() == 1).count()
    }

    fn children(&mut self, at: Option<u64>) -> &mut Children {
        match at {
            Some(id) => &mut self.nodes.get_mut(&id).expect("ids in use have nodes").children,
            None => &mut self.roots,
        }
    }

    fn add(&mut self, parent: Option<u64>, block: &[u32], page: Page, experts: &[u16]) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let tokens: Arc<[u32]> = block.into();
        self.children(parent).insert(tokens.clone(), id);
        if let Some(parent) = parent {
            self.leaves.remove(&(self.nodes[&parent].used, parent));
        }
        let (experts, children, used) = (experts.into(), Children::new(), self.clock);
        let node = Node { tokens, page, experts, parent, children, used };
        self.leaves.insert((node.used, id));
        self.nodes.insert(id, node);
        id
    }

    /// Removes a node without children.
    fn remove(&mut self, id: u64) {
        let node = self.nodes.remove(&id).expect("leaves have nodes");
        self.leaves.remove(&(node.used, id));
        let siblings = self.children(node.parent);
        siblings.remove(&node.tokens);
        let childless = siblings.is_empty();
        if let Some(parent) = node.parent.filter(|_| childless) {
            self.leaves.insert((self.nodes[&parent].used, parent));
        }
    }

    fn touch(&mut self, id: u64) {
        self.clock += 1;
        let node = self.nodes.get_mut(&id).expect("ids in use have nodes");
        if self.leaves.remove(&(node.used, id)) {
            self.leaves.insert((self.clock, id));
        }
        node.used = self.clock;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages of two tokens; the experts of a position are its token, twice.
    fn store(cache: &mut PrefixCache, pool: &PagePool, tokens: &[u32]) -> Vec<u32> {
        let mut prefix = cache.find(tokens, 2);
        prefix.pages.grow(pool, tokens.len().div_ceil(2));
        let experts: Vec<u16> = tokens.iter().flat_map(|&id| [id as u16; 2]).collect();
        cache.insert(tokens, 2, &prefix.pages, &experts);
        prefix.pages.indices().to_vec()
    }

    fn found(cache: &mut PrefixCache, tokens: &[u32]) -> (Vec<u32>, Vec<u16>) {
        let prefix = cache.find(tokens, 2);
        (prefix.pages.indices().to_vec(), prefix.experts)
    }

    #[test]
    fn whole_pages_of_the_longest_common_beginning_are_found() {
        let (pool, mut cache) = (PagePool::new(10), PrefixCache::default());
        let first = store(&mut cache, &pool, &[1, 2, 3, 4, 5]);
        let second = store(&mut cache, &pool, &[1, 2, 3, 9]);
        assert_eq!(first[0], second[0], "the common page is shared");
        assert_eq!(pool.free(), 7, "the half page went back");
        assert_eq!(
            found(&mut cache, &[1, 2, 3, 4, 5, 6]),
            (first[..2].to_vec(), vec![1, 1, 2, 2, 3, 3, 4, 4])
        );
        assert_eq!(found(&mut cache, &[1, 2, 3, 9]).0, second);
        assert_eq!(found(&mut cache, &[2, 1, 3, 9]), (vec![], vec![]));
        assert_eq!(found(&mut cache, &[1]), (vec![], vec![]));
        cache.clear();
        assert_eq!((pool.free(), found(&mut cache, &[1, 2]).0.len()), (10, 0));
    }

    #[test]
    fn the_longest_unused_goes_first_and_nothing_that_is_held() {
        let (pool, mut cache) = (PagePool::new(6), PrefixCache::default());
        store(&mut cache, &pool, &[1, 1, 2, 2]);
        store(&mut cache, &pool, &[3, 3, 4, 4]);
        let held = cache.find(&[1, 1], 2);
        store(&mut cache, &pool, &[5, 5]);
        assert_eq!((pool.free(), cache.idle()), (1, 4));
        assert!(cache.make_room(&pool, 2));
        assert_eq!(found(&mut cache, &[1, 1, 2, 2]).0.len(), 1, "its end was the oldest leaf");
        assert_eq!(found(&mut cache, &[3, 3, 4, 4]).0.len(), 2);
        assert!(!cache.make_room(&pool, 6), "one page is held by a sequence");
        assert_eq!((pool.free(), cache.idle()), (5, 0));
        drop(held);
        assert!(cache.make_room(&pool, 6));
    }
}
