// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A VFIO PCI device, bound to an iommufd: `vfio-ioctls` with what it lacks.
//!
//! The regions and their capabilities, the numbers of interrupts, INTx with its resample eventfd,
//! and the end of interrupts go through [`VfioDevice`]. Here are, with the structures of
//! `vfio-bindings`, the calls whose result it does not return: accesses, vectors, resets, and
//! whether there is a reset; and those that it makes without keeping the errno, which are repeated
//! here when it failed. `docs/upstream.md` lists them, with the tests that show the lack.
#![allow(unsafe_code)]

use std::error::Error;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{
    vfio_device_info, vfio_irq_info, vfio_irq_set, vfio_region_info, VFIO_BASE,
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_IRQ_INFO_NORESIZE,
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_TYPE,
};
use vfio_ioctls::{VfioDevice, VfioError, VfioIommufd, VfioRegionInfoCap};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ptr};
use vmm_sys_util::ioctl_io_nr;

use super::host_device::{HostDevice, Irq, IrqInfo, Region};
use super::mapping::Mapping;
use crate::pci::layout::CONFIG_SIZE;
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

/// A VFIO PCI device that is bound to an iommufd. The binding lasts as long as this.
///
/// Dropping it detaches its DMA without PASID, from whatever its user had attached. PASIDs stay
/// attached until whoever attached them detaches them, as the shutdown of a virtual IOMMU does;
/// until then it is the device that must be quiet: `VfioPci` takes bus mastering from it and
/// resets it before. If the kernel refuses, that is logged, and its descriptor stays open.
pub struct AssignedDevice {
    // Closed in this order: the user's file is the one that unbinds.
    device: Arc<VfioDevice>,
    file: Arc<File>,
    can_reset: bool,
}

impl AssignedDevice {
    /// The device behind `file`, which is bound to the iommufd of `iommufd`. It stays attached to
    /// what it is attached to; the IOAS of `iommufd` is not used.
    ///
    /// # Errors
    /// VFIO's error; `ENOTSUP` if it is not a PCI device; one that names a region that VFIO does
    /// not describe.
    pub fn new(file: Arc<File>, iommufd: Arc<VfioIommufd>) -> io::Result<Self> {
        let flags = flags(&file)?;
        if flags & VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(io::Error::from_raw_os_error(libc::ENOTSUP));
        }
        let device = VfioDevice::new_from_bound_fd(file.try_clone()?, iommufd, false);
        let device = Arc::new(device.map_err(io_error)?);
        let this = Self { device, file, can_reset: flags & VFIO_DEVICE_FLAGS_RESET != 0 };
        // A region that cannot be queried is skipped, and those behind it get its index.
        let index = VFIO_PCI_CONFIG_REGION_INDEX;
        let size = this.device.get_region_size(index);
        if !can_be_config_space(size, &this.device.get_region_caps(index)) {
            return Err(io::Error::other(undescribed(&this.file, size)));
        }
        Ok(this)
    }

    /// `VFIO_DEVICE_SET_IRQS` for the interrupts of `irq` from `start` on, one for each of
    /// `descriptors`.
    fn set_irqs(&self, irq: Irq, flags: u32, start: u32, descriptors: &[i32]) -> io::Result<()> {
        let argsz = size_of::<vfio_irq_set>() + size_of_val(descriptors);
        // All of it is 32-bit numbers; `data` follows the five fields.
        let fields = [argsz as u32, flags, irq as u32, start, descriptors.len() as u32];
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

/// `VFIO_DEVICE_GET_INFO`: the flags, which [`VfioDevice`] keeps to itself.
fn flags(file: &File) -> io::Result<u32> {
    let argsz = size_of::<vfio_device_info>() as u32;
    let mut info = vfio_device_info { argsz, ..vfio_device_info::default() };
    // SAFETY: the kernel writes no more than `argsz` bytes, which `info` has.
    check(unsafe { ioctl_with_mut_ref(file, VFIO_DEVICE_GET_INFO(), &mut info) })?;
    Ok(info.flags)
}

/// `VFIO_DEVICE_GET_IRQ_INFO`: `count` and `flags` of interrupt `index`.
fn irq_info(file: &File, index: u32) -> io::Result<(u32, u32)> {
    let argsz = size_of::<vfio_irq_info>() as u32;
    let mut info = vfio_irq_info { argsz, index, ..vfio_irq_info::default() };
    // SAFETY: the kernel writes no more than `argsz` bytes, which `info` has.
    check(unsafe { ioctl_with_mut_ref(file, VFIO_DEVICE_GET_IRQ_INFO(), &mut info) })?;
    Ok((info.count, info.flags))
}

/// Why what has the index of configuration space, with `size` bytes, is not that.
fn undescribed(file: &File, size: u64) -> String {
    let refusal = |index| {
        let argsz = size_of::<vfio_region_info>() as u32;
        let mut info = vfio_region_info { argsz, index, ..vfio_region_info::default() };
        // SAFETY: the kernel writes no more than `argsz` bytes, which `info` has.
        let answer = unsafe { ioctl_with_mut_ref(file, VFIO_DEVICE_GET_REGION_INFO(), &mut info) };
        check(answer)
            .err()
            .map(|error| format!("its VFIO driver does not describe region {index}: {error}"))
    };
    let problem = (0..=VFIO_PCI_CONFIG_REGION_INDEX).find_map(refusal).unwrap_or_else(|| {
        format!(
            "its configuration space (region {VFIO_PCI_CONFIG_REGION_INDEX}) has {size:#x} bytes"
        )
    });
    format!("{problem}; bind it to vfio-pci, or leave it out")
}

/// Whether a region of this size and with these capabilities can be configuration space. Of those
/// that follow it, VGA's is larger, and a driver's own ones have a capability with their type.
fn can_be_config_space(size: u64, capabilities: &[VfioRegionInfoCap]) -> bool {
    (1..=CONFIG_SIZE as u64).contains(&size) && capabilities.is_empty()
}

impl Drop for AssignedDevice {
    fn drop(&mut self) {
        // Dropping a `VfioDevice` does the same (vfio_device.rs:2259 of 0.10.0), and panics if it
        // fails. On Linux it does not, if it has just succeeded on the same file.
        if let Err(error) = self.device.detach_hwpt() {
            log::error!("an assigned device stays bound until this program ends: {error}");
            std::mem::forget(self.device.clone());
        }
    }
}

impl fmt::Debug for AssignedDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AssignedDevice").field("file", &self.file).finish_non_exhaustive()
    }
}

impl HostDevice for AssignedDevice {
    fn region(&self, index: u32) -> io::Result<Region> {
        let flags = self.device.get_region_flags(index);
        let (size, offset) =
            (self.device.get_region_size(index), self.device.get_region_offset(index));
        Ok(Region::new(index, flags, size, offset, &self.device.get_region_caps(index)))
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
        let (count, flags) = match self.device.get_irq_info(irq as u32) {
            Some(info) => (info.count, info.flags),
            None => irq_info(&self.file, irq as u32)?,
        };
        Ok(IrqInfo { count, fixed: flags & VFIO_IRQ_INFO_NORESIZE != 0 })
    }

    fn set_triggers(&self, irq: Irq, start: u32, events: &[Option<&EventFd>]) -> io::Result<()> {
        if let (Irq::Intx, 0, [Some(event)]) = (irq, start, events) {
            if self.device.enable_irq(irq as u32, vec![event]).is_ok() {
                return Ok(());
            }
        }
        let descriptor = |event: &Option<&EventFd>| event.map_or(-1, AsRawFd::as_raw_fd);
        let descriptors: Vec<i32> = events.iter().map(descriptor).collect();
        let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
        self.set_irqs(irq, flags, start, &descriptors)
    }

    fn set_intx_unmask(&self, event: &EventFd) -> io::Result<()> {
        let repeat = |_| {
            let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_UNMASK;
            self.set_irqs(Irq::Intx, flags, 0, &[event.as_raw_fd()])
        };
        self.device.set_irq_resample_fd(Irq::Intx as u32, vec![event]).or_else(repeat)
    }

    fn disable_irq(&self, irq: Irq) -> io::Result<()> {
        // Neither data nor count: all of that kind.
        let flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
        self.device.disable_irq(irq as u32).or_else(|_| self.set_irqs(irq, flags, 0, &[]))
    }

    fn can_reset(&self) -> bool {
        self.can_reset
    }

    fn reset(&self) -> io::Result<()> {
        // SAFETY: the call has no argument.
        check(unsafe { ioctl(&*self.file, VFIO_DEVICE_RESET()) }).map(drop)
    }
}

/// The errno in `error`, or else its text.
fn io_error(error: VfioError) -> io::Error {
    let errno = error.source().and_then(|source| source.downcast_ref::<errno::Error>());
    let errno = errno.map(|errno| io::Error::from_raw_os_error(errno.errno()));
    errno.unwrap_or_else(|| io::Error::other(error))
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
    use vfio_ioctls::VfioRegionInfoCapType;

    use super::*;

    #[test]
    fn a_file_that_is_no_device_is_none() {
        let file = tempfile::tempfile().unwrap();
        for error in [flags(&file).unwrap_err(), irq_info(&file, 0).unwrap_err()] {
            assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
        }
        let text = undescribed(&file, 0);
        assert!(text.starts_with("its VFIO driver does not describe region 0: Inappro"), "{text}");
        assert!(text.ends_with("; bind it to vfio-pci, or leave it out"), "{text}");
    }

    #[test]
    fn the_interrupt_set_has_the_kernels_layout() {
        // What `set_irqs` writes field by field.
        assert_eq!(size_of::<vfio_irq_set>(), 5 * size_of::<u32>());
        assert_eq!(std::mem::offset_of!(vfio_irq_set, data), 20);
    }

    #[test]
    fn a_region_in_the_place_of_another_is_noticed() {
        assert!(can_be_config_space(256, &[]) && can_be_config_space(4096, &[]));
        // None; VGA; the host bridge's configuration space, of a GPU.
        assert!(!can_be_config_space(0, &[]) && !can_be_config_space(0xc_0000, &[]));
        let own = VfioRegionInfoCapType { type_: 0x8000_8086, subtype: 2 };
        assert!(!can_be_config_space(4096, &[VfioRegionInfoCap::Type(own)]));
    }

    #[test]
    fn an_errno_is_kept_where_there_is_one() {
        let error = io_error(VfioError::VfioDeviceGetInfo(errno::Error::new(libc::EBUSY)));
        assert_eq!(error.raw_os_error(), Some(libc::EBUSY));
        assert_eq!(io_error(VfioError::VfioDeviceEnableIrq).raw_os_error(), None);
    }
}
