// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! MSI of a VFIO device, as `VFIO_DEVICE_SET_IRQS` sets it up: one vector, which writes an eventfd.
#![forbid(unsafe_code)]

use std::mem::size_of;

use twostage::iommufd::Errno;

use crate::internal::Internal;
use crate::process::Process;
use crate::sys;

/// `VFIO_PCI_MSI_IRQ_INDEX`.
pub const MSI_INDEX: u32 = 1;
/// `VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE`.
pub const MSI_FLAGS: u32 = 1 | 1 << 3;

/// `VFIO_IRQ_SET_ACTION_TRIGGER`, with `VFIO_IRQ_SET_DATA_NONE` or `VFIO_IRQ_SET_DATA_EVENTFD`.
const TRIGGER_NONE: u32 = 1 << 5 | 1 << 0;
const TRIGGER_EVENTFD: u32 = 1 << 5 | 1 << 2;

/// `struct vfio_irq_set` without its data: argsz, flags, index, start, count.
type Head = [u32; 5];
const HEAD_SIZE: usize = size_of::<Head>();

/// The vector of one device.
#[derive(Debug, Default)]
pub struct Msi {
    /// It is on; the eventfd, if it has one.
    on: Option<Option<Internal>>,
}

impl Msi {
    /// `VFIO_DEVICE_SET_IRQS` with the structure at `address` of `process`.
    ///
    /// # Errors
    /// As vfio-pci for a device that has MSI alone; `EOPNOTSUPP` an eventfd of a process that calls are
    /// forwarded for.
    pub fn set(&mut self, process: &Process, address: u64) -> Result<i64, Errno> {
        let mut bytes = [0; HEAD_SIZE + size_of::<i32>()];
        let length = process.read_some(address, &mut bytes);
        if length < HEAD_SIZE {
            return Err(Errno::EFAULT);
        }
        let mut words = bytes.chunks_exact(4).map(|word| {
            // Chunks of four bytes.
            word.first_chunk().map_or(0, |word| u32::from_ne_bytes(*word))
        });
        let head: Head = std::array::from_fn(|_| words.next().unwrap_or(0));
        let descriptor = words.next().unwrap_or(0) as i32;
        match head {
            [20..=u32::MAX, TRIGGER_NONE, MSI_INDEX, 0, 0] if self.on.is_some() => self.on = None,
            [24..=u32::MAX, TRIGGER_EVENTFD, MSI_INDEX, 0, 1] if length == bytes.len() => {
                self.on = Some(match descriptor {
                    0.. => Some(own(process, descriptor)?),
                    _ => None,
                });
            }
            _ => return Err(Errno::EINVAL),
        }
        Ok(0)
    }

    /// Sends the message.
    pub fn send(&self) {
        if let Some(Some(event)) = &self.on {
            // Full, it says that something came; and nobody else can fail to write.
            let _ = sys::write_number(event.raw(), 1);
        }
    }
}

/// The file of `descriptor` of `process`, also when that closes it.
fn own(process: &Process, descriptor: i32) -> Result<Internal, Errno> {
    if !process.is_own() {
        return Err(Errno::EOPNOTSUPP);
    }
    sys::duplicate(descriptor).map(Internal::new)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    fn set(msi: &mut Msi, words: &[u32]) -> Result<i64, Errno> {
        msi.set(&Process::own(), words.as_ptr() as u64)
    }

    #[test]
    fn a_vector_writes_its_eventfd_while_it_is_on() {
        // A file grows by eight bytes for each message.
        let file = tempfile::tempfile().unwrap();
        let sent = || file.metadata().unwrap().len() / 8;
        let descriptor = file.as_raw_fd() as u32;
        let mut msi = Msi::default();
        let off = [20, TRIGGER_NONE, MSI_INDEX, 0, 0, 0];
        assert_eq!(set(&mut msi, &off), Err(Errno::EINVAL), "it is off already");
        assert_eq!(set(&mut msi, &[24, TRIGGER_EVENTFD, MSI_INDEX, 0, 1, u32::MAX]), Ok(0));
        msi.send();
        assert_eq!(sent(), 0, "on, without an eventfd");
        assert_eq!(set(&mut msi, &[24, TRIGGER_EVENTFD, MSI_INDEX, 0, 1, descriptor]), Ok(0));
        msi.send();
        msi.send();
        assert_eq!(sent(), 2);
        assert_eq!(set(&mut msi, &off), Ok(0));
        msi.send();
        assert_eq!(sent(), 2);
    }

    #[test]
    fn what_a_device_with_one_vector_does_not_have() {
        let mut msi = Msi::default();
        for words in [
            // No room for the eventfd; a second vector; MSI-X; a mask; no such descriptor.
            [20, TRIGGER_EVENTFD, MSI_INDEX, 0, 1, 0],
            [24, TRIGGER_EVENTFD, MSI_INDEX, 1, 1, 0],
            [24, TRIGGER_EVENTFD, 2, 0, 1, 0],
            [24, 1 << 3 | 1 << 2, MSI_INDEX, 0, 1, 0],
        ] {
            assert_eq!(set(&mut msi, &words), Err(Errno::EINVAL), "{words:x?}");
        }
        assert!(set(&mut msi, &[24, TRIGGER_EVENTFD, MSI_INDEX, 0, 1, 1 << 20]).is_err());
        assert_eq!(msi.set(&Process::own(), 0), Err(Errno::EFAULT));
    }
}
