// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Counters of a unit.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use twostage::sync::Mutex;

twostage::counters! {
    /// Counters of a unit of any architecture.
    pub(crate) struct Totals;
    /// A thread's share of [`Totals`].
    #[repr(align(128))]
    running pub(crate) struct LocalCounters of Counter {
        /// Requests that the IOTLB served.
        iotlb_hits,
        /// Requests that missed the IOTLB.
        iotlb_misses,
        /// IOTLB entries evicted.
        iotlb_evictions,
        /// Requests that a device TLB served.
        device_tlb_hits,
        /// Requests that missed their device's TLB.
        device_tlb_misses,
        /// Requests whose configuration (VT-d: PASID-table entry; SMMU: context descriptor) was
        /// cached.
        config_hits,
        /// Requests whose configuration was not.
        config_misses,
        /// Cached configurations evicted.
        config_evictions,
        /// Walks of user-owned tables, finished or not.
        walks,
        /// Walks that started below the top table.
        paging_structure_hits,
        /// Walks that started at the top table.
        paging_structure_misses,
        /// Paging-structure entries evicted.
        paging_structure_evictions,
        /// Stage-2 translations that were cached.
        stage2_hits,
        /// Stage-2 translations that were not.
        stage2_misses,
        /// Cached stage-2 translations evicted.
        stage2_evictions,
        /// Requests that used a translation which the guest's tables no longer had.
        stale_uses,
        /// Requests that were blocked.
        faults,
        /// Invalidations, including those implied by changes of attachments and of stage 2.
        invalidations,
        /// Entries that invalidations dropped.
        invalidated_entries,
    }
}

/// A number with one writer at a time and any number of readers: cheaper than
/// [`twostage::counters::Counter`].
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    #[inline]
    pub fn count(&self) {
        self.add(1);
    }

    /// Adds `number`.
    #[inline]
    pub fn add(&self, number: u64) {
        // Not a read-modify-write: nobody else writes.
        self.0.store(self.get().wrapping_add(number), Ordering::Relaxed);
    }

    /// The number.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counters of a unit: a share per thread, and the sum of the shares of threads that are gone.
#[derive(Debug, Default)]
pub(crate) struct Counters(Mutex<Shares>);

#[derive(Debug, Default)]
struct Shares {
    living: Vec<Arc<LocalCounters>>,
    gone: Totals,
}

impl Shares {
    /// Adds up the shares that are no longer in use.
    fn collect(&mut self) {
        let Self { living, gone } = self;
        living.retain_mut(|share| match Arc::get_mut(share) {
            Some(share) => {
                *gone += share.snapshot();
                false
            }
            None => true,
        });
    }
}

impl Counters {
    /// A share for one more thread.
    pub fn share(&self) -> Arc<LocalCounters> {
        let share = Arc::new(LocalCounters::default());
        let mut shares = self.0.lock();
        shares.collect();
        shares.living.push(Arc::clone(&share));
        share
    }

    /// The sum of all.
    pub fn read(&self) -> Totals {
        let mut shares = self.0.lock();
        shares.collect();
        let mut sum = shares.gone;
        for share in &shares.living {
            sum += share.snapshot();
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_that_are_gone_still_count() {
        let counters = Counters::default();
        let (one, two) = (counters.share(), counters.share());
        one.walks.count();
        two.walks.add(2);
        assert_eq!(counters.read().walks, 3);
        drop(one);
        assert_eq!(counters.read().walks, 3);
        two.faults.count();
        drop(two);
        let all = counters.read();
        assert_eq!((all.walks, all.faults), (3, 1));
    }
}
