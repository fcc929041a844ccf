// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Invalidations that the host does.

use super::{Smmu, SmmuInvalidateError};
use crate::spec::smmuv3::command::Command;

impl Smmu {
    /// Gives a batch to the host; nothing for an empty one.
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
                // What the host blocked for this is given anew at the next occasion.
                self.streams.unapply_all();
            }
            // Nobody acknowledges an invalidation that failed, whatever became of its streams.
            let _ = self.host_failed(&error.error);
        })
    }
}
