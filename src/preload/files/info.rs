// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Structures of VFIO's ioctls that begin with their length, and what a device answers about
//! resets of its bus.

use std::mem::size_of;

use twostage::iommufd::Errno;
use twostage::spec::pci::Bdf;
use twostage_emulated::uapi::UserSpace;
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_HOT_RESET_FLAG_DEV_ID, VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED,
};

use crate::callers::process::Process;
use crate::files::file::Caller;
use crate::files::users::group_name;

/// Length of `struct vfio_pci_hot_reset_info` and `struct vfio_pci_hot_reset` without what follows.
const HOT_RESET_SIZE: usize = 3 * size_of::<u32>();

/// Fills `structure` from `address` on; returns the length in its first field.
///
/// # Errors
/// `EFAULT` it cannot be read; `EINVAL` it says that it is shorter.
pub fn copy_in(process: &Process, address: u64, structure: &mut [u8]) -> Result<usize, Errno> {
    process.read(address, structure).map_err(|_| Errno::EFAULT)?;
    let length = u32_at(structure, 0) as usize;
    (length >= structure.len()).then_some(length).ok_or(Errno::EINVAL)
}

/// The number at `offset`; 0 past the end.
pub fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let word = bytes.get(offset..).and_then(|rest| rest.first_chunk());
    word.map_or(0, |word| u32::from_ne_bytes(*word))
}

/// Writes `words` after the first field of the structure at `address`.
///
/// # Errors
/// `EFAULT`.
pub fn copy_out(process: &Process, address: u64, words: &[u32]) -> Result<i64, Errno> {
    let bytes: Vec<u8> = words.iter().copied().flat_map(u32::to_ne_bytes).collect();
    let address = address.wrapping_add(size_of::<u32>() as u64);
    process.write(address, &bytes).map_err(|_| Errno::EFAULT)?;
    Ok(0)
}

/// Where a device is.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// Its address.
    pub rid: Bdf,
    /// The number of its group.
    pub group: u32,
    /// There is a port above it, by which its bus can be reset, and nothing else on that bus.
    pub resettable: bool,
}

impl Place {
    /// `VFIO_DEVICE_GET_PCI_HOT_RESET_INFO`: the devices on the bus, of which there is only this
    /// one. `dev` is its object, if it was opened by its character device.
    ///
    /// # Errors
    /// As vfio-pci: `ENODEV` the bus cannot be reset; `ENOSPC` there is no room for the device.
    pub fn reset_info(
        self,
        process: &Process,
        address: u64,
        dev: Option<u32>,
    ) -> Result<i64, Errno> {
        let length = copy_in(process, address, &mut [0; HOT_RESET_SIZE])?;
        if !self.resettable {
            return Err(Errno::ENODEV);
        }
        // An ID, the segment, the bus, device and function.
        let [bus, function] = self.rid.raw().to_be_bytes();
        let place = u32::from_ne_bytes([0, 0, bus, function]);
        if length - HOT_RESET_SIZE < 2 * size_of::<u32>() {
            copy_out(process, address, &[0, 1])?;
            return Err(Errno::from_raw(libc::ENOSPC));
        }
        const BY_OBJECT: u32 =
            VFIO_PCI_HOT_RESET_FLAG_DEV_ID | VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED;
        let flags = dev.map_or(0, |_| BY_OBJECT);
        copy_out(process, address, &[flags, 1, dev.unwrap_or(self.group), place])
    }

    /// Whether `caller` may reset the bus by the `VFIO_DEVICE_PCI_HOT_RESET` at `address`: a device
    /// that was opened by its character device needs no groups, as it is bound; another one needs
    /// its group.
    ///
    /// # Errors
    /// As vfio-pci: `EINVAL` it may not.
    pub fn may_reset(self, caller: &dyn Caller, address: u64, opened: bool) -> Result<(), Errno> {
        let mut header = [0; HOT_RESET_SIZE];
        copy_in(caller.process(), address, &mut header)?;
        let (flags, count) = (u32_at(&header, 4), u32_at(&header, 8));
        if flags != 0 || (count != 0) == opened {
            return Err(Errno::EINVAL);
        }
        if !self.resettable {
            return Err(Errno::ENODEV);
        }
        // No more groups than there are devices.
        match count {
            0 => return Ok(()),
            1 => {}
            _ => return Err(Errno::EINVAL),
        }
        let mut fd = [0; size_of::<i32>()];
        let at = address.wrapping_add(HOT_RESET_SIZE as u64);
        caller.process().read(at, &mut fd).map_err(|_| Errno::EFAULT)?;
        let file = caller.file_at(i32::from_ne_bytes(fd))?;
        (file.name() == group_name(self.group)).then_some(()).ok_or(Errno::EINVAL)
    }
}
