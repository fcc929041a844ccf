// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupts of a VFIO device, set up by `VFIO_DEVICE_SET_IRQS`: MSI with one vector, or the pin,
//! each of which writes an eventfd; and the eventfd by which a host asks for the device back, which
//! it never does here. The pin is masked when it is sent, until the program unmasks it, by a call
//! or by an eventfd of its own.
//!
//! As for a conventional PCI device, there are no errors to report (`EINVAL`).

use std::mem::size_of;
use std::sync::Arc;

use rustix::event::PollFlags;
use twostage::iommufd::Errno;
pub use vfio_bindings::bindings::vfio::VFIO_PCI_NUM_IRQS as IRQS;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE,
    VFIO_IRQ_INFO_NORESIZE, VFIO_IRQ_SET_ACTION_MASK as MASK,
    VFIO_IRQ_SET_ACTION_TRIGGER as TRIGGER, VFIO_IRQ_SET_ACTION_TYPE_MASK as ACTION,
    VFIO_IRQ_SET_ACTION_UNMASK as UNMASK, VFIO_IRQ_SET_DATA_BOOL as DATA_BOOL,
    VFIO_IRQ_SET_DATA_EVENTFD as DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE as DATA_NONE,
    VFIO_IRQ_SET_DATA_TYPE_MASK as DATA, VFIO_PCI_ERR_IRQ_INDEX as ERR_INDEX,
    VFIO_PCI_INTX_IRQ_INDEX as INTX_INDEX, VFIO_PCI_MSI_IRQ_INDEX as MSI_INDEX,
    VFIO_PCI_REQ_IRQ_INDEX as REQUEST_INDEX,
};

use crate::callers::process::Process;
use crate::sys;
use crate::table::Internal;

/// `struct vfio_irq_set` without its data: argsz, flags, index, start, count.
type Head = [u32; 5];
const HEAD_SIZE: usize = size_of::<Head>();

/// Flags and number of the interrupts of index `index`.
///
/// # Errors
/// `EINVAL` there is no such index.
pub fn info(index: u32) -> Result<(u32, u32), Errno> {
    const FLAGS: u32 = VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE;
    const OF_PIN: u32 = VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED;
    match index {
        INTX_INDEX => Ok((OF_PIN, 1)),
        MSI_INDEX | REQUEST_INDEX => Ok((FLAGS, 1)),
        ERR_INDEX => Err(Errno::EINVAL),
        _ if index < IRQS => Ok((0, 0)),
        _ => Err(Errno::EINVAL),
    }
}

/// The interrupts of one device.
#[derive(Debug, Default)]
pub struct Irqs {
    /// MSI is enabled; with the eventfd, if it has one.
    on: Option<Option<Internal>>,
    /// The pin, if it is enabled, which MSI then is not.
    intx: Option<Intx>,
    /// The device asserts the pin.
    level: bool,
    /// Asks for the device.
    request: Option<Internal>,
    /// A new one of [`Intx::unmask`].
    unwatched: Option<Arc<Internal>>,
}

/// The pin, enabled.
#[derive(Debug, Default)]
struct Intx {
    event: Option<Internal>,
    masked: bool,
    /// Unmasks it when it is written.
    unmask: Option<Arc<Internal>>,
}

impl Irqs {
    /// `VFIO_DEVICE_SET_IRQS` with the structure at `address` of `process`.
    ///
    /// # Errors
    /// As vfio-pci for a conventional device with MSI; `EOPNOTSUPP` an eventfd of another process.
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
        let [_, flags, index, _, count] = head;
        if index == INTX_INDEX {
            return self.set_intx(process, flags, count, bytes);
        }
        if flags & ACTION != TRIGGER {
            return Err(Errno::ENOTTY);
        }
        if index == REQUEST_INDEX {
            return self.set_request(process, flags & DATA, count, bytes);
        }
        match (flags & DATA, bytes) {
            _ if self.intx.is_some() => return Err(Errno::EINVAL),
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

    /// Enables, disables, masks or unmasks the pin, or signals it as the program asks.
    fn set_intx(
        &mut self,
        process: &Process,
        flags: u32,
        count: u32,
        bytes: &[u8],
    ) -> Result<i64, Errno> {
        let (action, data) = (flags & ACTION, flags & DATA);
        if (action, data, count) == (TRIGGER, DATA_NONE, 0) && self.intx.take().is_some() {
            return Ok(0);
        }
        if count != 1 || self.on.is_some() {
            return Err(Errno::EINVAL);
        }
        let meant = !matches!((data, bytes), (DATA_BOOL, [0]));
        match (action, data, &mut self.intx) {
            (TRIGGER, DATA_EVENTFD, intx) => {
                let event = numbered(process, bytes)?;
                intx.get_or_insert_default().event = event;
                self.assert();
            }
            (MASK | UNMASK | TRIGGER, _, None) => return Err(Errno::EINVAL),
            (UNMASK, DATA_EVENTFD, Some(intx)) => {
                intx.unmask = numbered(process, bytes)?.map(Arc::new);
                self.unwatched.clone_from(&intx.unmask);
            }
            (MASK, DATA_NONE | DATA_BOOL, Some(intx)) => intx.masked |= meant,
            (UNMASK, _, Some(_)) if meant => self.unmask(),
            (TRIGGER, _, Some(intx)) if meant => signal(intx.event.as_ref()),
            (UNMASK | TRIGGER, ..) => {}
            _ => return Err(Errno::ENOTTY),
        }
        Ok(0)
    }

    /// Sends the pin's interrupt if the device asserts it, and masks it.
    fn assert(&mut self) {
        let Some(intx) = &mut self.intx else { return };
        if self.level && !intx.masked {
            intx.masked = true;
            signal(intx.event.as_ref());
        }
    }

    fn unmask(&mut self) {
        if let Some(intx) = &mut self.intx {
            intx.masked = false;
            self.assert();
        }
    }

    /// The device asserts its pin, or does not.
    pub fn set_level(&mut self, level: bool) {
        self.level = level;
        self.assert();
    }

    /// The eventfd that unmasks the pin, if it is new since the last call: when it is written,
    /// [`Self::woken`] is to be called.
    pub fn wake_event(&mut self) -> Option<Arc<Internal>> {
        self.unwatched.take()
    }

    /// Unmasks the pin if its eventfd says so.
    pub fn woken(&mut self) {
        let unmask = self.intx.as_ref().and_then(|intx| intx.unmask.clone());
        // The program may have made it one that blocks.
        let is_written = |event: &Arc<Internal>| sys::events(event.raw()).contains(PollFlags::IN);
        if unmask.filter(is_written).is_some_and(|event| sys::read_number(event.raw()).is_ok()) {
            self.unmask();
        }
    }

    /// Sets the eventfd of requests, or signals it as the program asks.
    fn set_request(
        &mut self,
        process: &Process,
        data: u32,
        count: u32,
        bytes: &[u8],
    ) -> Result<i64, Errno> {
        match (data, bytes) {
            (DATA_NONE, _) if count == 0 => self.request = None,
            (DATA_EVENTFD, fd) => {
                self.request = numbered(process, fd)?;
            }
            (DATA_BOOL, []) => return Err(Errno::EINVAL),
            (DATA_BOOL, [0, ..]) => {}
            _ => signal(self.request.as_ref()),
        }
        Ok(0)
    }

    /// Sends the message.
    pub fn send(&self) {
        signal(self.on.as_ref().and_then(Option::as_ref));
    }
}

fn signal(event: Option<&Internal>) {
    if let Some(event) = event {
        // If it is full, it is already signalled; writing does not fail otherwise.
        let _ = sys::write_number(event.raw(), 1);
    }
}

/// Number of data bytes after `head`.
///
/// # Errors
/// `EINVAL` not supported by any device, or of a vector that this one does not have.
fn data_size(head: Head) -> Result<usize, Errno> {
    let [argsz, flags, index, start, count] = head;
    let (_, vectors) = info(index)?;
    let last = start.checked_add(count).filter(|end| *end < u32::MAX);
    let exists = start < vectors && last.is_some_and(|end| end <= vectors);
    if flags & !(DATA | ACTION) != 0 || !exists {
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

/// The eventfd whose number is in `bytes`, or none if that is negative.
fn numbered(process: &Process, bytes: &[u8]) -> Result<Option<Internal>, Errno> {
    let fd = bytes.first_chunk().ok_or(Errno::EINVAL)?;
    let fd = i32::from_ne_bytes(*fd);
    (fd >= 0).then(|| own(process, fd)).transpose()
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

    fn set(msi: &mut Irqs, words: &[u32]) -> Result<i64, Errno> {
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
        let mut msi = Irqs::default();
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
        let mut msi = Irqs::default();
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
        let mut msi = Irqs::default();
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
    fn a_request_for_the_device_is_an_eventfd() {
        let (event, fd) = eventfd();
        let mut irqs = Irqs::default();
        let none = |count| [20, TRIGGER_NONE, REQUEST_INDEX, 0, count];
        assert_eq!(set(&mut irqs, &none(1)), Ok(0), "nobody is told");
        assert_eq!(set(&mut irqs, &[24, TRIGGER_EVENTFD, REQUEST_INDEX, 0, 1, fd]), Ok(0));
        assert_eq!((set(&mut irqs, &none(1)), signalled(&event)), (Ok(0), 1));
        let level = |level| [21, TRIGGER_BOOL, REQUEST_INDEX, 0, 1, level];
        assert_eq!((set(&mut irqs, &level(0)), signalled(&event)), (Ok(0), 0));
        assert_eq!((set(&mut irqs, &level(1)), signalled(&event)), (Ok(0), 1));
        irqs.send();
        assert_eq!(signalled(&event), 0, "MSI is another one");
        assert_eq!(set(&mut irqs, &none(0)), Ok(0));
        assert_eq!((set(&mut irqs, &none(1)), signalled(&event)), (Ok(0), 0));
    }

    #[test]
    fn a_pin_is_sent_once_until_it_is_unmasked() {
        let ((event, fd), (end, end_fd)) = (eventfd(), eventfd());
        let mut irqs = Irqs::default();
        let of = |flags, count| [20, flags, INTX_INDEX, 0, count];
        let with = |flags, fd| [24, flags | DATA_EVENTFD, INTX_INDEX, 0, 1, fd];
        irqs.set_level(true);
        assert_eq!(set(&mut irqs, &of(UNMASK | DATA_NONE, 1)), Err(Errno::EINVAL), "it is off");
        assert_eq!(set(&mut irqs, &with(TRIGGER, fd)), Ok(0));
        assert_eq!(signalled(&event), 1, "it is asserted already");
        irqs.set_level(true);
        assert_eq!(signalled(&event), 0, "masked");
        assert_eq!(set(&mut irqs, &of(UNMASK | DATA_NONE, 1)), Ok(0));
        assert_eq!(signalled(&event), 1, "still asserted");
        irqs.set_level(false);
        assert_eq!(set(&mut irqs, &of(UNMASK | DATA_NONE, 1)), Ok(0));
        assert_eq!(signalled(&event), 0);
        assert_eq!(set(&mut irqs, &of(MASK | DATA_NONE, 1)), Ok(0));
        irqs.set_level(true);
        assert_eq!(signalled(&event), 0);

        assert_eq!(set(&mut irqs, &with(UNMASK, end_fd)), Ok(0));
        assert!(irqs.wake_event().is_some() && irqs.wake_event().is_none());
        irqs.woken();
        assert_eq!(signalled(&event), 0, "nobody wrote it");
        sys::write_number(end.raw(), 1).unwrap();
        irqs.woken();
        assert_eq!((signalled(&event), signalled(&end)), (1, 0));
        assert_eq!(set(&mut irqs, &with(MASK, end_fd)), Err(Errno::ENOTTY));
        let msi = [24, TRIGGER_EVENTFD, MSI_INDEX, 0, 1, fd];
        assert_eq!(set(&mut irqs, &msi), Err(Errno::EINVAL), "one kind at a time");
        assert_eq!(set(&mut irqs, &of(TRIGGER_NONE, 0)), Ok(0));
        assert_eq!(set(&mut irqs, &msi), Ok(0));
        assert_eq!(set(&mut irqs, &with(TRIGGER, fd)), Err(Errno::EINVAL));
    }

    #[test]
    fn indices() {
        let counts = [0, 1, 2, 3, 4, 5].map(|index| info(index).map(|(_, count)| count));
        let (none, invalid) = (Ok(0), Err(Errno::EINVAL));
        assert_eq!(counts, [Ok(1), Ok(1), none, invalid, Ok(1), invalid]);
    }

    #[test]
    fn a_descriptor_that_is_no_eventfd_leaves_the_vector_without_one() {
        let (event, fd) = eventfd();
        let mut msi = Irqs::default();
        assert_eq!(set(&mut msi, &[24, TRIGGER_EVENTFD, MSI_INDEX, 0, 1, fd]), Ok(0));
        assert_eq!(set(&mut msi, &[24, TRIGGER_EVENTFD, MSI_INDEX, 0, 1, 2]), Err(Errno::EINVAL));
        msi.send();
        assert_eq!(signalled(&event), 0);
        assert!(msi.on.is_some(), "MSI stays on");
    }
}
