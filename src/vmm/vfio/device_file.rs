// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ioctls of an open VFIO device, as in `linux/vfio.h` for PCI functions.
//!
//! The structures are those of `vfio-bindings`. The calls are made here instead of through
//! `vfio-ioctls`, whose device owns its container or IOAS, trusts every chain of capabilities, and
//! loses the kernel's errno, without which the user cannot be told what to do.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{
    vfio_device_info, vfio_irq_info, vfio_irq_set, vfio_region_info, VFIO_BASE,
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_IRQ_INFO_NORESIZE,
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE, VFIO_TYPE,
};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr};
use vmm_sys_util::ioctl_io_nr;

use super::host_device::{HostDevice, Irq, IrqInfo, Region};
use super::mapping::Mapping;
use request::*;

/// The ioctl numbers. The macro's items have no documentation.
#[allow(missing_docs)]
mod request {
    use super::{ioctl_io_nr, VFIO_BASE, VFIO_TYPE};

    ioctl_io_nr!(VFIO_DEVICE_GET_INFO, VFIO_TYPE as u32, VFIO_BASE + 7);
    ioctl_io_nr!(VFIO_DEVICE_GET_REGION_INFO, VFIO_TYPE as u32, VFIO_BASE + 8);
    ioctl_io_nr!(VFIO_DEVICE_GET_IRQ_INFO, VFIO_TYPE as u32, VFIO_BASE + 9);
    ioctl_io_nr!(VFIO_DEVICE_SET_IRQS, VFIO_TYPE as u32, VFIO_BASE + 10);
    ioctl_io_nr!(VFIO_DEVICE_RESET, VFIO_TYPE as u32, VFIO_BASE + 11);
}

/// More than the kernel's information about any region, in bytes.
const LONGEST_INFO: u32 = 64 << 10;

/// An open VFIO PCI device, bound to an iommufd. The binding lasts as long as this.
#[derive(Debug)]
pub struct DeviceFile {
    file: Arc<File>,
    can_reset: bool,
}

impl DeviceFile {
    /// The device behind `file`.
    ///
    /// # Errors
    /// VFIO's error; `ENOTSUP` if it is not a PCI device.
    pub fn new(file: Arc<File>) -> io::Result<Self> {
        let argsz = size_of::<vfio_device_info>() as u32;
        let mut info = vfio_device_info { argsz, ..vfio_device_info::default() };
        // SAFETY: the kernel writes no more than `argsz` bytes, which `info` has.
        check(unsafe { ioctl_with_mut_ref(&*file, VFIO_DEVICE_GET_INFO(), &mut info) })?;
        if info.flags & VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(io::Error::from_raw_os_error(libc::ENOTSUP));
        }
        Ok(Self { file, can_reset: info.flags & VFIO_DEVICE_FLAGS_RESET != 0 })
    }

    /// `VFIO_DEVICE_SET_IRQS` for `count` interrupts of `irq` from `start` on.
    fn set_irqs(
        &self,
        irq: Irq,
        action_and_data: u32,
        start: u32,
        count: u32,
        descriptors: &[i32],
    ) -> io::Result<()> {
        let argsz = size_of::<vfio_irq_set>() + size_of_val(descriptors);
        // All of it is 32-bit numbers; `data` follows the five fields.
        let fields = [argsz as u32, action_and_data, irq as u32, start, count];
        let descriptors = descriptors.iter().map(|descriptor| *descriptor as u32);
        let set: Vec<u32> = fields.into_iter().chain(descriptors).collect();
        // SAFETY: `set` is `argsz` bytes, aligned as a `vfio_irq_set` is, and only read.
        let left =
            check(unsafe { ioctl_with_ptr(&*self.file, VFIO_DEVICE_SET_IRQS(), set.as_ptr()) })?;
        // The kernel returns the number of available vectors when it is too small.
        if left > 0 {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        Ok(())
    }
}

impl HostDevice for DeviceFile {
    fn region(&self, index: u32) -> io::Result<Region> {
        let argsz = size_of::<vfio_region_info>() as u32;
        let mut info = vfio_region_info { argsz, index, ..vfio_region_info::default() };
        // SAFETY: the kernel writes no more than `argsz` bytes, which `info` has.
        check(unsafe {
            ioctl_with_mut_ref(&*self.file, VFIO_DEVICE_GET_REGION_INFO(), &mut info)
        })?;
        if info.argsz <= argsz || info.argsz > LONGEST_INFO {
            return Ok(Region::new(&info, &[]));
        }
        // There are capabilities. Eight-byte words have the alignment of the structure.
        let mut words = vec![0u64; (info.argsz as usize).div_ceil(size_of::<u64>())];
        let asked = vfio_region_info { argsz: info.argsz, index, ..vfio_region_info::default() };
        let head = words.as_mut_ptr().cast::<vfio_region_info>();
        // SAFETY: `words` has at least `argsz` bytes, which is more than a `vfio_region_info`, and
        // is aligned as one; the kernel writes no more than that. Any bits are a
        // `vfio_region_info`.
        let info = unsafe {
            head.write(asked);
            check(ioctl_with_mut_ptr(&*self.file, VFIO_DEVICE_GET_REGION_INFO(), head))?;
            head.read()
        };
        let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_ne_bytes).collect();
        Ok(Region::new(&info, &bytes))
    }

    fn read(&self, region: &Region, offset: u64, data: &mut [u8]) -> io::Result<()> {
        inside(region, offset, data.len())?;
        self.file.read_exact_at(data, region.offset + offset)
    }

    fn write(&self, region: &Region, offset: u64, data: &[u8]) -> io::Result<()> {
        inside(region, offset, data.len())?;
        self.file.write_all_at(data, region.offset + offset)
    }

    fn map(&self, region: &Region, offset: u64, length: u64) -> io::Result<Mapping> {
        Mapping::new(&self.file, region.offset + offset, length)
    }

    fn irq(&self, irq: Irq) -> io::Result<IrqInfo> {
        let argsz = size_of::<vfio_irq_info>() as u32;
        let mut info = vfio_irq_info { argsz, index: irq as u32, ..vfio_irq_info::default() };
        // SAFETY: the kernel writes no more than `argsz` bytes, which `info` has.
        check(unsafe { ioctl_with_mut_ref(&*self.file, VFIO_DEVICE_GET_IRQ_INFO(), &mut info) })?;
        Ok(IrqInfo { count: info.count, fixed: info.flags & VFIO_IRQ_INFO_NORESIZE != 0 })
    }

    fn set_triggers(&self, irq: Irq, start: u32, events: &[Option<&EventFd>]) -> io::Result<()> {
        let descriptor = |event: &Option<&EventFd>| event.map_or(-1, AsRawFd::as_raw_fd);
        let descriptors: Vec<i32> = events.iter().map(descriptor).collect();
        let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
        self.set_irqs(irq, flags, start, descriptors.len() as u32, &descriptors)
    }

    fn set_intx_unmask(&self, event: &EventFd) -> io::Result<()> {
        let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_UNMASK;
        self.set_irqs(Irq::Intx, flags, 0, 1, &[event.as_raw_fd()])
    }

    fn disable_irq(&self, irq: Irq) -> io::Result<()> {
        // Neither data nor count: all of that kind.
        self.set_irqs(irq, VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER, 0, 0, &[])
    }

    fn can_reset(&self) -> bool {
        self.can_reset
    }

    fn reset(&self) -> io::Result<()> {
        // SAFETY: the call has no argument.
        check(unsafe { ioctl(&*self.file, VFIO_DEVICE_RESET()) }).map(drop)
    }
}

/// The result of an ioctl, or its errno.
fn check(returned: i32) -> io::Result<i32> {
    if returned < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(returned)
}

fn inside(region: &Region, offset: u64, length: usize) -> io::Result<()> {
    match region.contains(offset, length) {
        true => Ok(()),
        false => Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_device_is_none() {
        let error = DeviceFile::new(Arc::new(tempfile::tempfile().unwrap())).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
    }

    #[test]
    fn the_interrupt_set_has_the_kernels_layout() {
        // What `set_irqs` writes field by field.
        assert_eq!(size_of::<vfio_irq_set>(), 5 * size_of::<u32>());
        assert_eq!(std::mem::offset_of!(vfio_irq_set, data), 20);
    }
}
