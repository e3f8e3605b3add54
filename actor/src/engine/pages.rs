//! KV pages: who holds which. A page goes back to the pool when its last holder drops it, so nothing that is cancelled,
//! preempted or forgotten can leak one.
//!
//! In layers that see a chunk or window only, a page is wanted no longer than somebody may still see it. Holders say so
//! ([`PageTable::pass`]); when the last one has passed a page, or dropped it, it is among [`PagePool::take_passed`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// All pages of one engine.
#[derive(Debug)]
pub(crate) struct PagePool {
    lists: Arc<Mutex<Lists>>,
    total: usize,
}

#[derive(Debug)]
struct Lists {
    free: Vec<u32>,
    /// Wanted by nobody in local layers, since the last look.
    passed: Vec<u32>,
}

/// One page; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Page(Arc<Held>);

#[derive(Debug)]
struct Held {
    index: u32,
    lists: Arc<Mutex<Lists>>,
    /// The want that its holders share, while there is one.
    wanted: Mutex<Weak<Want>>,
}

/// Somebody may still see the page in local layers.
#[derive(Debug)]
struct Want {
    index: u32,
    lists: Arc<Mutex<Lists>>,
}

/// Pages of one sequence in position order, with their numbers side by side as kernels want them.
#[derive(Clone, Debug, Default)]
pub(crate) struct PageTable {
    pages: Vec<Page>,
    indices: Vec<u32>,
    /// What this sequence may still see of each page in local layers.
    wants: Vec<Option<Arc<Want>>>,
    /// Pages from the start that it does not want.
    passed: usize,
}

fn lock(lists: &Mutex<Lists>) -> MutexGuard<'_, Lists> {
    lists.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PagePool {
    pub(crate) fn new(total: usize) -> Self {
        // Popped from the end: low numbers first.
        let free = (0..total as u32).rev().collect();
        Self { lists: Arc::new(Mutex::new(Lists { free, passed: Vec::new() })), total }
    }

    pub(crate) fn total(&self) -> usize {
        self.total
    }

    pub(crate) fn free(&self) -> usize {
        lock(&self.lists).free.len()
    }

    pub(crate) fn take(&self) -> Option<Page> {
        let index = lock(&self.lists).free.pop()?;
        let wanted = Mutex::new(Weak::new());
        Some(Page(Arc::new(Held { index, lists: self.lists.clone(), wanted })))
    }

    /// Pages that nobody wants in local layers any more, each once since it was last wanted.
    pub(crate) fn take_passed(&self) -> Vec<u32> {
        std::mem::take(&mut lock(&self.lists).passed)
    }
}

impl Page {
    fn want(&self) -> Arc<Want> {
        let mut wanted = self.0.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(want) = wanted.upgrade() {
            return want;
        }
        let want = Arc::new(Want { index: self.0.index, lists: self.0.lists.clone() });
        lock(&self.0.lists).passed.retain(|passed| *passed != self.0.index);
        *wanted = Arc::downgrade(&want);
        want
    }
}

impl Page {
    /// How many hold it.
    pub(crate) fn holders(&self) -> usize {
        Arc::strong_count(&self.0)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        lock(&self.lists).free.push(self.index);
    }
}

impl Drop for Want {
    fn drop(&mut self) {
        lock(&self.lists).passed.push(self.index);
    }
}

impl PageTable {
    pub(crate) fn push(&mut self, page: Page) {
        self.indices.push(page.0.index);
        self.wants.push(Some(page.want()));
        self.pages.push(page);
    }

    /// Extends the table to `pages` pages; the caller made sure that the pool has them.
    pub(crate) fn grow(&mut self, pool: &PagePool, pages: usize) {
        while self.pages.len() < pages {
            let page = pool.take().expect("free pages are counted before a table grows");
            self.push(page);
        }
    }

    pub(crate) fn truncate(&mut self, pages: usize) {
        self.pages.truncate(pages);
        self.indices.truncate(pages);
        self.wants.truncate(pages);
        self.passed = self.passed.min(self.pages.len());
    }

    pub(crate) fn clear(&mut self) {
        self.truncate(0);
    }

    pub(crate) fn len(&self) -> usize {
        self.pages.len()
    }

    pub(crate) fn pages(&self) -> &[Page] {
        &self.pages
    }

    /// The first `pages` pages, shared.
    pub(crate) fn share(&self, pages: usize) -> Self {
        Self {
            pages: self.pages[..pages].to_vec(),
            indices: self.indices[..pages].to_vec(),
            wants: self.wants[..pages].to_vec(),
            passed: self.passed.min(pages),
        }
    }

    pub(crate) fn indices(&self) -> &[u32] {
        &self.indices
    }

    /// Pages before `first` are not seen any more in local layers; `None` where there are none.
    pub(crate) fn pass(&mut self, first: Option<usize>) {
        let first = first.unwrap_or(0).min(self.pages.len());
        for at in self.passed..first {
            self.wants[at] = None;
        }
        self.passed = self.passed.max(first);
    }

    /// Pages from `first` on are to be written and seen again.
    pub(crate) fn want_from(&mut self, first: usize) {
        for at in first..self.passed {
            self.wants[at] = Some(self.pages[at].want());
        }
        self.passed = self.passed.min(first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_page_returns_with_its_last_holder() {
        let pool = PagePool::new(3);
        let mut prompt = PageTable::default();
        prompt.grow(&pool, 2);
        let sample = prompt.share(2);
        assert_eq!((prompt.indices(), pool.free()), (&[0, 1][..], 1));
        drop(prompt);
        assert_eq!(pool.free(), 1, "the sample still holds both pages");
        drop(sample);
        assert_eq!(pool.free(), 3);
    }

    #[test]
    fn a_page_is_passed_with_the_last_who_may_see_it() {
        let pool = PagePool::new(4);
        let mut prompt = PageTable::default();
        prompt.grow(&pool, 3);
        prompt.pass(None);
        prompt.pass(Some(1));
        assert_eq!(pool.take_passed(), [0]);
        let mut sample = prompt.share(3);
        sample.pass(Some(3));
        prompt.pass(Some(2));
        assert_eq!(pool.take_passed(), [1], "the prompt still sees page 2");
        // What is to be computed again is wanted again, also where nobody has looked yet.
        prompt.pass(Some(3));
        prompt.want_from(0);
        assert!(pool.take_passed().is_empty());
        sample.want_from(2);
        drop(prompt);
        assert_eq!(pool.take_passed(), [0, 1]);
        drop(sample);
        assert_eq!((pool.take_passed(), pool.free()), (vec![2], 4));
        let mut next = PageTable::default();
        next.grow(&pool, 1);
        drop(next.share(1));
        assert!(pool.take_passed().is_empty());
    }
}
