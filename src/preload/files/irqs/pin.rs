// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The pin (INTx) as vfio-pci has it: masked when it is sent, until the program unmasks it, by a
//! call or by an eventfd of its own.

use std::sync::Arc;

use rustix::event::PollFlags;
use twostage::iommufd::Errno;

use super::{numbered, signal, Set, DATA_EVENTFD, DATA_NONE, MASK, TRIGGER, UNMASK};
use crate::callers::process::Process;
use crate::sys;
use crate::table::Internal;

/// The pin, enabled.
#[derive(Debug, Default)]
pub struct Pin {
    event: Option<Internal>,
    masked: bool,
    /// Unmasks it when it is written.
    pub unmask: Option<Arc<Internal>>,
}

impl Pin {
    /// The pin with the eventfd that `set` names, or none.
    ///
    /// # Errors
    /// It is no eventfd; `EINVAL` something else than one eventfd is to be set.
    pub fn enabled(process: &Process, set: &Set) -> Result<Self, Errno> {
        if (set.action, set.data, set.count) != (TRIGGER, DATA_EVENTFD, 1) {
            return Err(Errno::EINVAL);
        }
        Ok(Self { event: numbered(process, set.descriptor())?, ..Self::default() })
    }

    /// Masks, unmasks or signals it, or changes its eventfds. The device asserts it if `level`.
    ///
    /// # Errors
    /// As vfio-pci.
    pub fn set(&mut self, process: &Process, set: &Set, level: bool) -> Result<(), Errno> {
        if set.count != 1 {
            return Err(Errno::EINVAL);
        }
        match (set.action, set.data) {
            (TRIGGER, DATA_EVENTFD) => self.event = numbered(process, set.descriptor())?,
            (UNMASK, DATA_EVENTFD) => {
                let unmask = numbered(process, set.descriptor())?;
                // The old one is to be taken away first.
                if unmask.is_some() && self.unmask.is_some() {
                    return Err(Errno::EBUSY);
                }
                self.unmask = unmask.map(Arc::new);
            }
            (MASK, DATA_EVENTFD) => return Err(Errno::ENOTTY),
            (MASK, _) => self.masked |= set.meant().next().is_some(),
            (UNMASK, _) => self.masked &= set.meant().next().is_none(),
            (_, DATA_NONE) => signal(self.event.as_ref()),
            _ => set.meant().for_each(|_| signal(self.event.as_ref())),
        }
        self.assert(level);
        Ok(())
    }

    /// Sends the interrupt if the device asserts it, and masks it.
    pub fn assert(&mut self, level: bool) {
        if level && !self.masked {
            self.masked = true;
            signal(self.event.as_ref());
        }
    }

    /// Unmasks it if its eventfd says so.
    pub fn woken(&mut self, level: bool) {
        // The program may have made it one that blocks.
        let is_written = |event: &&Arc<Internal>| sys::events(event.raw()).contains(PollFlags::IN);
        let unmask = self.unmask.as_ref().filter(is_written);
        if unmask.is_some_and(|event| sys::read_number(event.raw()).is_ok()) {
            self.masked = false;
            self.assert(level);
        }
    }
}
