// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The common base of nesting for all architectures: the host, the guest's memory, and objects to
//! be destroyed.

use std::sync::Arc;

use super::error::{Context, NestingError, Result};
use super::guest_ioas::GuestIoas;
use crate::iommufd::{Errno, Extensions, HostIommu, HwptAlloc, HwptData, HwptFlags, ObjectId};
use crate::spec::pci::Bdf;
use crate::warn_limited;

/// At most this many objects may be waiting to be destroyed after a failure; beyond that no HWPT is
/// created, so that a guest cannot accumulate host objects.
const MAX_DOOMED: usize = 16;

/// The host, as one virtual IOMMU uses it.
#[derive(Debug)]
pub(super) struct Objects {
    host: Arc<dyn HostIommu>,
    calls: u64,
    /// Destroyed by the last owner.
    ioas: Option<Arc<GuestIoas>>,
    doomed: Vec<ObjectId>,
}

impl Objects {
    /// With the guest's memory `ioas`.
    pub fn new(ioas: Arc<GuestIoas>) -> Self {
        Self { host: ioas.host().clone(), calls: 0, ioas: Some(ioas), doomed: Vec::new() }
    }

    /// The host, for one call, which is counted.
    pub fn host(&mut self) -> &dyn HostIommu {
        self.calls += 1;
        &*self.host
    }

    /// The number of calls, of any verb.
    pub fn calls(&self) -> u64 {
        self.calls
    }

    /// The host's abilities beyond the uAPI.
    pub fn extensions(&self) -> Extensions {
        self.host.extensions()
    }

    /// The IOAS, until it is given up.
    pub fn ioas(&self) -> Result<Arc<GuestIoas>> {
        self.ioas.clone().ok_or(NestingError::ShutDown)
    }

    /// Allocates a nesting parent, a stage 2 of guest memory, that `dev`, the guest's `rid`, can
    /// use.
    pub fn alloc_parent(&mut self, rid: Bdf, dev: ObjectId, pasid: bool) -> Result<ObjectId> {
        let args = HwptAlloc {
            flags: HwptFlags::new().with_nest_parent(true).with_pasid(pasid),
            dev,
            pt: self.ioas()?.id(),
            data: HwptData::None,
            fault: None,
        };
        self.alloc_hwpt(&args, || format!("allocating a nesting parent for {rid}"))
    }

    /// Allocates a HWPT.
    pub fn alloc_hwpt(&mut self, args: &HwptAlloc, what: impl Fn() -> String) -> Result<ObjectId> {
        if self.doomed.len() >= MAX_DOOMED {
            self.sweep().context(&what)?;
        }
        self.host().hwpt_alloc(args).context(what)
    }

    /// Detaches `dev`, or its `pasid`. Only a detach is certain to block it, so a failed one is
    /// retried once. A device that no longer exists (`ENOENT`) is attached to nothing.
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

    /// Destroys an unused object; if the host fails, it is retried later.
    pub fn destroy(&mut self, id: ObjectId) {
        self.doomed.push(id);
        if let Err(error) = self.sweep() {
            warn_limited!("will be retried: {error}");
        }
    }

    /// Gives up the IOAS, and destroys what is left. To be called when nothing uses it any more;
    /// may be called again to retry.
    pub fn end(&mut self) -> Result<()> {
        self.doomed.extend(self.ioas.take().and_then(GuestIoas::give_up));
        self.sweep().or_else(|_| self.sweep()).context(|| "destroying the last host objects".into())
    }

    /// Destroys the waiting objects in order: users before what they use.
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
