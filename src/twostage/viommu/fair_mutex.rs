// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A fair mutex: a thread that locks it again queues behind those that wait.

use crate::sync::Mutex;
use std::sync::MutexGuard;

/// The registers of a virtual IOMMU. A thread that works through a queue unlocks them between two
/// slices, and gets them back after the threads that wait.
#[derive(Debug, Default)]
pub(super) struct FairMutex<T> {
    /// Held for a moment before `value` by the next thread to get it, so that a thread that locks
    /// again waits here.
    next: Mutex<()>,
    value: Mutex<T>,
}

impl<T> FairMutex<T> {
    /// Locks the value, after those that wait for it.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        let _next = self.next.lock();
        self.value.lock()
    }
}
