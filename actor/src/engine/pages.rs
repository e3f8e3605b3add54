//! KV pages: who holds which. A page goes back to the pool when its last holder drops it, so nothing that is cancelled,
//! preempted or forgotten can leak one.

use std::sync::{Arc, Mutex, PoisonError};

/// All pages of one engine.
#[derive(Debug)]
pub(crate) struct PagePool {
    free: Arc<Mutex<Vec<u32>>>,
    total: usize,
}

/// One page; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Page(Arc<Held>);

#[derive(Debug)]
struct Held {
    index: u32,
    free: Arc<Mutex<Vec<u32>>>,
}

/// Pages of one sequence in position order, with their numbers side by side as kernels want them.
#[derive(Clone, Debug, Default)]
pub(crate) struct PageTable {
    pages: Vec<Page>,
    indices: Vec<u32>,
}

impl PagePool {
    pub(crate) fn new(total: usize) -> Self {
        // Popped from the end: low numbers first.
        let free = (0..total as u32).rev().collect();
        Self { free: Arc::new(Mutex::new(free)), total }
    }

    pub(crate) fn total(&self) -> usize {
        self.total
    }

    pub(crate) fn free(&self) -> usize {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub(crate) fn take(&self) -> Option<Page> {
        let index = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
        Some(Page(Arc::new(Held { index, free: self.free.clone() })))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(self.index);
    }
}

impl PageTable {
    pub(crate) fn push(&mut self, page: Page) {
        self.indices.push(page.0.index);
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
    }

    pub(crate) fn clear(&mut self) {
        self.truncate(0);
    }

    pub(crate) fn len(&self) -> usize {
        self.pages.len()
    }

    /// The first `pages` pages, shared.
    pub(crate) fn share(&self, pages: usize) -> Self {
        Self { pages: self.pages[..pages].to_vec(), indices: self.indices[..pages].to_vec() }
    }

    pub(crate) fn indices(&self) -> &[u32] {
        &self.indices
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
}
