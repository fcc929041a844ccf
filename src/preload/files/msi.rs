// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! MSI of a VFIO device, set up by `VFIO_DEVICE_SET_IRQS`: one vector, which writes an eventfd.

use std::mem::size_of;

use twostage::iommufd::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_NORESIZE, VFIO_IRQ_SET_ACTION_TRIGGER as TRIGGER,
    VFIO_IRQ_SET_ACTION_TYPE_MASK as ACTION, VFIO_IRQ_SET_DATA_BOOL as DATA_BOOL,
    VFIO_IRQ_SET_DATA_EVENTFD as DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE as DATA_NONE,
    VFIO_IRQ_SET_DATA_TYPE_MASK as DATA,
};
pub use vfio_bindings::bindings::vfio::{
    VFIO_PCI_MSI_IRQ_INDEX as MSI_INDEX, VFIO_PCI_NUM_IRQS as IRQS,
};

use crate::callers::process::Process;
use crate::sys;
use crate::table::Internal;

/// The capabilities of the vector.
pub const MSI_FLAGS: u32 = VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE;

/// `struct vfio_irq_set` without its data: argsz, flags, index, start, count.
type Head = [u32; 5];
const HEAD_SIZE: usize = size_of::<Head>();

/// The vector of one device.
#[derive(Debug, Default)]
pub struct Msi {
    /// Enabled; with the eventfd, if it has one.
    on: Option<Option<Internal>>,
}

impl Msi {
    /// `VFIO_DEVICE_SET_IRQS` with the structure at `address` of `process`.
    ///
    /// # Errors
    /// As vfio-pci for a device with MSI only; `EOPNOTSUPP` an eventfd of another process.
    pub fn set(&mut self, process: &Process, address: u64) -> Result<i64, Errno> {
        let mut bytes = [0; HEAD_SIZE];
        if process.read_some(address, &mut bytes) < HEAD_SIZE {
            return Err(Errno::EFAULT);
        }
        let mut words = bytes.chunks_exact(size_of::<u32>()).map(|word| {
            // Chunks of four bytes.
            word.first_chunk().map_or(0, |word| u32::from_ne_bytes(*word))
        });
        let head: Head = std::array::from_fn(|_| words.next().unwrap_or(0));
        let data = data_size(head)?;
        // No more than for one vector.
        let mut bytes = [0; size_of::<i32>()];
        let bytes = bytes.get_mut(..data).unwrap_or_default();
        if process.read_some(address.wrapping_add(HEAD_SIZE as u64), bytes) < data {
            return Err(Errno::EFAULT);
        }
        let [_, flags, _, _, count] = head;
        if flags & ACTION != TRIGGER {
            return Err(Errno::ENOTTY);
        }
        match (flags & DATA, bytes) {
            (DATA_EVENTFD, fd) => self.set_eventfd(process, fd)?,
            _ if self.on.is_none() => return Err(Errno::EINVAL),
            (DATA_NONE, _) if count == 0 => self.on = None,
            (DATA_NONE, _) => self.send(),
            (_, [level]) if *level != 0 => self.send(),
            _ => {}
        }
        Ok(0)
    }

    /// Sets the eventfd of the vector to number `fd`, or to none if that is negative, and enables
    /// MSI; without data only enables MSI.
    fn set_eventfd(&mut self, process: &Process, fd: &[u8]) -> Result<(), Errno> {
        let was_on = self.on.is_some();
        let Some(fd) = fd.first_chunk().map(|fd| i32::from_ne_bytes(*fd)) else {
            self.on.get_or_insert(None);
            return Ok(());
        };
        // The old one is removed even if the new one is invalid.
        self.on = was_on.then_some(None);
        let eventfd = if fd < 0 { None } else { Some(own(process, fd)?) };
        self.on = Some(eventfd);
        Ok(())
    }

    /// Sends the message.
    pub fn send(&self) {
        if let Some(Some(event)) = &self.on {
            // If it is full, it is already signalled; writing does not fail otherwise.
            let _ = sys::write_number(event.raw(), 1);
        }
    }
}

/// Number of data bytes after `head`.
///
/// # Errors
/// `EINVAL` not supported by any device, or of a vector that this one does not have.
fn data_size(head: Head) -> Result<usize, Errno> {
    let [argsz, flags, index, start, count] = head;
    let vectors = if index == MSI_INDEX { 1 } else { 0 };
    let last = start.checked_add(count).filter(|end| *end < u32::MAX);
    let exists = start < vectors && last.is_some_and(|end| end <= vectors);
    if index >= IRQS || flags & !(DATA | ACTION) != 0 || !exists {
        return Err(Errno::EINVAL);
    }
    let size = match flags & DATA {
        DATA_NONE => 0,
        DATA_BOOL => size_of::<u8>(),
        DATA_EVENTFD => size_of::<i32>(),
        _ => return Err(Errno::EINVAL),
    };
    // At most one vector.
    let data = size * count as usize;
    let room = (argsz as usize).checked_sub(HEAD_SIZE).ok_or(Errno::EINVAL)?;
    if room < data {
        return Err(Errno::EINVAL);
    }
    Ok(data)
}

/// The eventfd `descriptor` of `process`, independent of whether that closes it.
fn own(process: &Process, descriptor: i32) -> Result<Internal, Errno> {
    if !process.is_own() {
        return Err(Errno::EOPNOTSUPP);
    }
    let event = Internal::new(sys::duplicate(descriptor)?);
    if !sys::is_eventfd(event.raw()) {
        return Err(Errno::EINVAL);
    }
    Ok(event)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRIGGER_NONE: u32 = TRIGGER | DATA_NONE;
    const TRIGGER_BOOL: u32 = TRIGGER | DATA_BOOL;
    const TRIGGER_EVENTFD: u32 = TRIGGER | DATA_EVENTFD;

    fn set(msi: &mut Msi, words: &[u32]) -> Result<i64, Errno> {
        msi.set(&Process::own(), words.as_ptr() as u64)
    }

    /// An eventfd; and how often it was signalled since the last call.
    fn eventfd() -> (Internal, u32) {
        let event = Internal::new(sys::eventfd().unwrap());
        let number = event.raw() as u32;
        (event, number)
    }

    fn signalled(event: &Internal) -> u64 {
        sys::read_number(event.raw()).unwrap_or(0)
    }

    #[test]
    fn a_vector_writes_its_eventfd_while_it_is_on() {
        let (event, fd) = eventfd();
        let mut msi = Msi::default();
        let off = [20, TRIGGER_NONE, MSI_INDEX, 0, 0];
        assert_eq!(set(&mut msi, &off), Err(Errno::EINVAL), "it is off already");
        assert_eq!(set(&mut msi, &[24, TRIGGER_EVENTFD, MSI_INDEX, 0, 1, u32::MAX]), Ok(0));
        msi.send();
        assert_eq!(signalled(&event), 0, "on, without an eventfd");
        assert_eq!(set(&mut msi, &[24, TRIGGER_EVENTFD, MSI_INDEX, 0, 1, fd]), Ok(0));
        msi.send();
        msi.send();
        assert_eq!(signalled(&event), 2);
        assert_eq!(set(&mut msi, &off), Ok(0));
        msi.send();
        assert_eq!(signalled(&event), 0);
    }

    #[test]
    fn what_the_program_triggers_itself() {
        let (event, fd) = eventfd();
        let mut msi = Msi::default();
        let none = [20, TRIGGER_NONE, MSI_INDEX, 0, 1];
        let level = |level| [21, TRIGGER_BOOL, MSI_INDEX, 0, 1, level];
        assert_eq!(set(&mut msi, &none), Err(Errno::EINVAL), "it is off");
        assert_eq!(set(&mut msi, &level(1)), Err(Errno::EINVAL));
        assert_eq!(set(&mut msi, &[24, TRIGGER_EVENTFD, MSI_INDEX, 0, 1, fd]), Ok(0));
        assert_eq!((set(&mut msi, &none), signalled(&event)), (Ok(0), 1));
        assert_eq!((set(&mut msi, &level(1)), signalled(&event)), (Ok(0), 1));
        assert_eq!((set(&mut msi, &level(0x100)), signalled(&event)), (Ok(0), 0), "false");
        // Of no vector: nothing changes.
        assert_eq!(set(&mut msi, &[20, TRIGGER_EVENTFD, MSI_INDEX, 0, 0]), Ok(0));
        assert_eq!((set(&mut msi, &none), signalled(&event)), (Ok(0), 1));
    }

    #[test]
    fn what_a_device_with_one_vector_does_not_have() {
        let mut msi = Msi::default();
        for (words, errno) in [
            // No room for the eventfd, or for the head; a second vector; MSI-X; two kinds of data,
            // or none; an unknown flag; a mask.
            ([20, TRIGGER_EVENTFD, MSI_INDEX, 0, 1, 0], Errno::EINVAL),
            ([16, TRIGGER_NONE, MSI_INDEX, 0, 0, 0], Errno::EINVAL),
            ([24, TRIGGER_EVENTFD, MSI_INDEX, 1, 1, 0], Errno::EINVAL),
            ([24, TRIGGER_EVENTFD, MSI_INDEX, 0, u32::MAX, 0], Errno::EINVAL),
            ([24, TRIGGER_EVENTFD, 2, 0, 1, 0], Errno::EINVAL),
            ([24, TRIGGER_EVENTFD, IRQS, 0, 1, 0], Errno::EINVAL),
            ([24, TRIGGER | DATA_NONE | DATA_BOOL, MSI_INDEX, 0, 1, 0], Errno::EINVAL),
            ([24, TRIGGER, MSI_INDEX, 0, 1, 0], Errno::EINVAL),
            ([24, TRIGGER_NONE | 1 << 6, MSI_INDEX, 0, 1, 0], Errno::EINVAL),
            ([24, 1 << 3 | DATA_EVENTFD, MSI_INDEX, 0, 1, 0], Errno::ENOTTY),
        ] {
            assert_eq!(set(&mut msi, &words), Err(errno), "{words:x?}");
        }
        let no_file = [24, TRIGGER_EVENTFD, MSI_INDEX, 0, 1, 1 << 20];
        assert_eq!(set(&mut msi, &no_file), Err(Errno::from_raw(libc::EBADF)));
        assert!(msi.on.is_none());
        assert_eq!(msi.set(&Process::own(), 0), Err(Errno::EFAULT));
    }

    #[test]
    fn a_descriptor_that_is_no_eventfd_leaves_the_vector_without_one() {
        let (event, fd) = eventfd();
        let mut msi = Msi::default();
        assert_eq!(set(&mut msi, &[24, TRIGGER_EVENTFD, MSI_INDEX, 0, 1, fd]), Ok(0));
        assert_eq!(set(&mut msi, &[24, TRIGGER_EVENTFD, MSI_INDEX, 0, 1, 2]), Err(Errno::EINVAL));
        msi.send();
        assert_eq!(signalled(&event), 0);
        assert!(msi.on.is_some(), "MSI stays on");
    }
}
