// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Notifications that reach the worker without an exit to user space, if there is a KVM.

use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use twostage::warn_limited;

/// Turns guest writes to an address into events.
pub trait Doorbells: Send + Sync {
    /// From now on a guest write to `address` only signals `event`. Returns whether that works; if
    /// not, writes are dispatched as usual.
    fn attach(&self, address: u64, event: &EventFd) -> bool;

    /// Ends that.
    fn detach(&self, address: u64, event: &EventFd);
}

/// Doorbells of a KVM: ioeventfd.
#[derive(Debug)]
pub struct KvmDoorbells(pub Arc<VmFd>);

impl Doorbells for KvmDoorbells {
    fn attach(&self, address: u64, event: &EventFd) -> bool {
        let result = self.0.register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch);
        if let Err(error) = &result {
            warn_limited!("notifications at {address:#x} go through user space: {error}");
        }
        result.is_ok()
    }

    fn detach(&self, address: u64, event: &EventFd) {
        if let Err(error) =
            self.0.unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
        {
            warn_limited!("notifications stay at {address:#x}: {error}");
        }
    }
}

/// No doorbells: every notification is an exit.
#[cfg(test)]
#[derive(Debug)]
pub struct NoDoorbells;

#[cfg(test)]
impl Doorbells for NoDoorbells {
    fn attach(&self, _: u64, _: &EventFd) -> bool {
        false
    }

    fn detach(&self, _: u64, _: &EventFd) {}
}
