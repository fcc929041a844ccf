// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory of a device that other devices may access until its driver revokes it.

use std::fmt::Debug;
use std::sync::{Arc, MutexGuard, Weak};
use twostage::sync::Mutex;

use crate::host::refusal::{refuse, Outcome};
use twostage::iommufd::{Errno, UserMemory};

/// Memory of a device (a dma-buf), such as a BAR, which `IOMMU_IOAS_MAP_FILE` maps like a file. It
/// is neither pinned nor accounted, and not available to access objects.
///
/// Its driver may revoke it, for example when the device is reset. Existing mappings then lead
/// nowhere for good: restored memory must be mapped again.
#[derive(Debug)]
pub struct DmaBuf {
    memory: UserMemory,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    revoked: bool,
    importers: Vec<Weak<dyn Importer>>,
}

/// A user of device memory.
pub(crate) trait Importer: Debug + Send + Sync {
    /// `buf` was revoked: when this returns, no DMA accesses it.
    fn revoked(&self, buf: &DmaBuf);
}

impl DmaBuf {
    /// `memory`, which can be mapped.
    pub fn new(memory: UserMemory) -> Arc<Self> {
        Arc::new(Self { memory, state: Mutex::default() })
    }

    /// The memory.
    pub fn memory(&self) -> &UserMemory {
        &self.memory
    }

    /// Revokes the memory: when this returns, no DMA accesses it through existing mappings, and it
    /// cannot be mapped (`ENODEV`). Not to be called from a [`UserSpace`](crate::uapi::UserSpace).
    pub fn revoke(&self) {
        let mut state = self.lock();
        state.revoked = true;
        let importers = state.importers.clone();
        // They read the state, with their own locks held.
        drop(state);
        importers.iter().filter_map(Weak::upgrade).for_each(|importer| importer.revoked(self));
    }

    /// Allows mapping the memory again.
    pub fn restore(&self) {
        self.lock().revoked = false;
    }

    /// `importer` is about to map the memory, and must be notified when it is revoked.
    pub(crate) fn import(&self, importer: Weak<dyn Importer>) {
        let mut state = self.lock();
        state.importers.retain(|known| known.strong_count() > 0 && !known.ptr_eq(&importer));
        state.importers.push(importer);
    }

    /// Whether the memory can be mapped now.
    ///
    /// # Errors
    /// `ENODEV` it is revoked.
    pub(crate) fn check(&self) -> Outcome<()> {
        if self.lock().revoked {
            return refuse(Errno::ENODEV, "the memory of the device was revoked");
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}
