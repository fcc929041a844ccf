// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One open iommufd: what all files that lead to it share.
#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::dma_buf::{DmaBuf, Importer};
use super::machine::Machine;
use super::objects::Objects;

/// One open iommufd. It is closed with the last file that leads to it: itself, a device that is
/// bound to it, a queue, or pages that are mapped.
#[derive(Debug)]
pub(crate) struct Context {
    machine: Arc<Machine>,
    objects: Mutex<Objects>,
}

impl Context {
    /// An iommufd without objects on `machine`.
    pub fn new(machine: Arc<Machine>) -> Arc<Self> {
        let objects = Mutex::new(Objects::new(machine.clone()));
        Arc::new(Self { machine, objects })
    }

    /// What it was opened on.
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    /// The objects, locked.
    pub fn objects(&self) -> MutexGuard<'_, Objects> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        self.objects.get_mut().unwrap_or_else(PoisonError::into_inner).close();
    }
}

impl Importer for Context {
    fn revoked(&self, buf: &DmaBuf) {
        // Fails for no IOAS that there is.
        let _ = self.objects().lose_dma_buf(buf);
    }
}
