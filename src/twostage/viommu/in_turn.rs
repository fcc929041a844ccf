// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A lock that is had in turn.

use crate::sync::Mutex;
use std::sync::MutexGuard;

/// The registers of a virtual IOMMU. Who works through a queue and lets them go between two slices
/// has them again after those who wait.
#[derive(Debug, Default)]
pub(super) struct InTurn<T> {
    /// Taken for a moment before `value`: whoever waits for that holds it, so that one who comes
    /// back waits here.
    turn: Mutex<()>,
    value: Mutex<T>,
}

impl<T> InTurn<T> {
    /// The value, after those who wait for it.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        let _turn = self.turn.lock();
        self.value.lock()
    }
}
