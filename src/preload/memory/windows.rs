// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The program's mappings of its iommufds: these objects are in use until they are unmapped.

use std::sync::atomic::{AtomicUsize, Ordering};
use twostage::sync::Mutex;

use twostage_emulated::MappedPages;

const PAGE_SIZE: u64 = 4096;

/// The mappings of one process.
#[derive(Debug, Default)]
pub struct Windows {
    /// Their number: most programs have none.
    count: AtomicUsize,
    list: Mutex<Vec<Window>>,
}

#[derive(Debug)]
struct Window {
    /// The remaining address ranges: each first, and one past each last.
    addresses: Vec<(u64, u64)>,
    /// Dropped when none is left.
    _pages: MappedPages,
}

impl Windows {
    /// `pages` were mapped at `address`, with `length` bytes.
    pub fn add(&self, address: u64, length: u64, pages: MappedPages) {
        let addresses = vec![(address, address.saturating_add(length))];
        let window = Window { addresses, _pages: pages };
        let mut list = self.list.lock();
        list.push(window);
        self.count.store(list.len(), Ordering::Release);
    }

    /// `length` bytes at `address` were unmapped or replaced.
    pub fn remove(&self, address: u64, length: u64) {
        if self.count.load(Ordering::Acquire) == 0 {
            return;
        }
        // In whole pages, as munmap does it.
        let gone =
            (address, address.saturating_add(length).div_ceil(PAGE_SIZE).saturating_mul(PAGE_SIZE));
        let mut list = self.list.lock();
        for window in list.iter_mut() {
            window.addresses =
                window.addresses.drain(..).flat_map(|range| without(range, gone)).collect();
        }
        let (left, unmapped) =
            list.drain(..).partition(|window: &Window| !window.addresses.is_empty());
        *list = left;
        self.count.store(list.len(), Ordering::Release);
        drop(list);
        // Objects may be destroyed with them.
        drop::<Vec<_>>(unmapped);
    }
}

/// `range` without `gone`: at most two pieces.
fn without(range: (u64, u64), gone: (u64, u64)) -> impl Iterator<Item = (u64, u64)> {
    let before = (range.0, range.1.min(gone.0));
    let after = (range.0.max(gone.1), range.1);
    [before, after].into_iter().filter(|(start, end)| start < end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_that_are_left() {
        let left = |start, end| without((10, 20), (start, end)).collect::<Vec<_>>();
        assert_eq!(left(0, 10), [(10, 20)]);
        assert_eq!(left(20, 30), [(10, 20)]);
        assert_eq!(left(12, 14), [(10, 12), (14, 20)]);
        assert_eq!(left(5, 15), [(15, 20)]);
        assert_eq!(left(15, 25), [(10, 15)]);
        assert!(left(10, 20).is_empty());
    }
}
