// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `/dev/iommu`, and `/dev/vfio/vfio`, which is the same with VFIO's ioctls.
#![forbid(unsafe_code)]

use std::sync::Arc;

use twostage::emulated::EmulatedHost;
use twostage::iommufd::Errno;

use crate::file::{Argument, Call, Excess, File};
use crate::process::Process;

/// Ioctls from this number on are iommufd's own (`IOMMUFD_CMD_BASE`); those below are VFIO's.
const FIRST_OWN: u32 = 0x80;

/// An open iommufd. It lives on while devices are bound to it.
#[derive(Debug)]
pub struct Iommufd {
    name: &'static str,
    host: Arc<EmulatedHost>,
}

impl Iommufd {
    /// `host`, opened as `name`.
    pub fn new(name: &'static str, host: Arc<EmulatedHost>) -> Self {
        Self { name, host }
    }
}

impl File for Iommufd {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn call(&self, process: &Process, call: Call) -> Result<i64, Errno> {
        let Call::Ioctl { request, argument } = call else { return Err(Errno::EINVAL) };
        let excess = match request & 0xff {
            number if number >= FIRST_OWN => Excess::Zero,
            _ => Excess::Ignored,
        };
        let mut argument = Argument::copy_in(process, argument, excess)?;
        let result = self.host.ioctl(request, &mut argument.bytes, process);
        // Some answers come with an error.
        argument.copy_out(process)?;
        result.map(|()| 0)
    }

    fn as_iommufd(&self) -> Option<&Arc<EmulatedHost>> {
        Some(&self.host)
    }
}
