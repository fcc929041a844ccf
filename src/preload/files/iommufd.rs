// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `/dev/iommu`, and `/dev/vfio/vfio`, which is the same with VFIO's ioctls.

use std::sync::Arc;

use twostage::iommufd::Errno;
use twostage_emulated::{EmulatedHost, MappedPages, MmapRequest};

use crate::files::file::{Answer, Argument, Call, Caller, Excess, File};

/// The first ioctl number of iommufd (`IOMMUFD_CMD_BASE`); those below are VFIO's.
const FIRST_OWN: u32 = 0x80;

/// An open iommufd. It stays alive while devices are bound to it.
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

    fn call(&self, caller: &dyn Caller, call: Call) -> Result<Answer, Errno> {
        let process = caller.process();
        let Call::Ioctl { request, argument } = call else { return Err(Errno::EINVAL) };
        if request & 0xff < FIRST_OWN {
            let result = self.host.vfio_ioctl(request, argument, caller)?;
            return Ok(i64::from(result).into());
        }
        let mut argument = Argument::copy_in(process, argument, Excess::Zero)?;
        let result = self.host.ioctl(request, &mut argument.bytes, caller);
        // Some errors also write results back.
        argument.copy_out(process)?;
        result.map(|value| i64::from(value).into())
    }

    fn map(&self, request: MmapRequest) -> Result<MappedPages, Errno> {
        self.host.mmap(request)
    }

    fn as_iommufd(&self) -> Option<&Arc<EmulatedHost>> {
        Some(&self.host)
    }
}
