// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What nesting of every architecture stands on: the host, the guest's memory, and what is to be
//! destroyed.

use std::sync::Arc;

use super::error::{Context, NestingError, Result};
use super::guest_ioas::GuestIoas;
use crate::iommufd::{Errno, Extensions, HostIommu, HwptAlloc, HwptData, HwptFlags, ObjectId};
use crate::spec::pci::Bdf;
use crate::warn_limited;

/// So many objects may wait for a destroy that failed to succeed; beyond, no HWPT is made, so that
/// a guest cannot pile up host objects that never go.
const MAX_DOOMED: usize = 16;

/// The host as one virtual IOMMU uses it.
#[derive(Debug)]
pub(super) struct Objects {
    host: Arc<dyn HostIommu>,
    calls: u64,
    /// Destroyed by the last who shares it.
    ioas: Option<Arc<GuestIoas>>,
    doomed: Vec<ObjectId>,
}

impl Objects {
    /// On the guest's memory `ioas`.
    pub fn new(ioas: Arc<GuestIoas>) -> Self {
        Self { host: ioas.host().clone(), calls: 0, ioas: Some(ioas), doomed: Vec::new() }
    }

    /// The host, for one call, which is counted.
    pub fn host(&mut self) -> &dyn HostIommu {
        self.calls += 1;
        &*self.host
    }

    /// How many calls there were, of any verb.
    pub fn calls(&self) -> u64 {
        self.calls
    }

    /// What the host can do beyond the uAPI.
    pub fn extensions(&self) -> Extensions {
        self.host.extensions()
    }

    /// The IOAS, until it is given up.
    pub fn ioas(&self) -> Result<Arc<GuestIoas>> {
        self.ioas.clone().ok_or(NestingError::ShutDown)
    }

    /// Makes a nesting parent that `dev`, the guest's `rid`, can use: a stage 2 of guest memory.
    pub fn alloc_parent(&mut self, rid: Bdf, dev: ObjectId, pasid: bool) -> Result<ObjectId> {
        let args = HwptAlloc {
            flags: HwptFlags::new().with_nest_parent(true).with_pasid(pasid),
            dev,
            pt: self.ioas()?.id(),
            data: HwptData::None,
            fault: None,
        };
        self.alloc_hwpt(&args, || format!("making a nesting parent for {rid}"))
    }

    /// Makes a HWPT.
    pub fn alloc_hwpt(&mut self, args: &HwptAlloc, what: impl Fn() -> String) -> Result<ObjectId> {
        if self.doomed.len() >= MAX_DOOMED {
            self.sweep().context(&what)?;
        }
        self.host().hwpt_alloc(args).context(what)
    }

    /// Detaches `dev`, or its `pasid`. Nothing else blocks it for certain, so it is tried once more
    /// if it fails. A device that is not there any more (`ENOENT`) is attached to nothing.
    pub fn detach(&mut self, dev: ObjectId, pasid: Option<u32>) -> crate::iommufd::Result<()> {
        let mut result = self.host().device_detach(dev, pasid);
        if result.is_err() {
            result = self.host().device_detach(dev, pasid);
        }
        match result {
            Err(error) if error.errno != Errno::ENOENT => Err(error),
            _ => Ok(()),
        }
    }

    /// Destroys an object that nothing uses; if the host fails to, later.
    pub fn destroy(&mut self, id: ObjectId) {
        self.doomed.push(id);
        if let Err(error) = self.sweep() {
            warn_limited!("left for later: {error}");
        }
    }

    /// Gives up the IOAS, and destroys what is left. To be called when nothing stands on it any
    /// more; may be called again, to try again.
    pub fn end(&mut self) -> Result<()> {
        self.doomed.extend(self.ioas.take().and_then(GuestIoas::give_up));
        self.sweep().or_else(|_| self.sweep()).context(|| "destroying the last host objects".into())
    }

    /// Destroys what is to be destroyed, in the order it came: users before what they use.
    fn sweep(&mut self) -> crate::iommufd::Result<()> {
        let mut result = Ok(());
        for id in std::mem::take(&mut self.doomed) {
            match self.host().destroy(id) {
                Err(error) if error.errno != Errno::ENOENT => {
                    self.doomed.push(id);
                    result = Err(error);
                }
                _ => {}
            }
        }
        result
    }
}
