// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Invalidations executed by the host.

use super::{Smmu, SmmuInvalidateError};
use crate::spec::smmuv3::command::Command;

impl Smmu {
    /// Gives a batch to the host, unless it is empty.
    ///
    /// # Errors
    /// The host refused something; it is counted and logged.
    pub(super) fn invalidate_host(&self, batch: &[Command]) -> Result<(), SmmuInvalidateError> {
        if batch.is_empty() {
            return Ok(());
        }
        self.counters.batches.count();
        self.counters.invalidations.add(batch.len() as u64);
        self.host.invalidate(batch).inspect_err(|error| {
            if !error.flushed {
                // What the host blocked because of it is given again at the next occasion.
                self.streams.unapply_all();
            }
            // A failed invalidation is never acknowledged, whatever happened to its streams.
            let _ = self.host_failed(&error.error);
        })
    }
}
