// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupts of a VFIO device, set up by `VFIO_DEVICE_SET_IRQS` as vfio-pci does it: the pin, MSI
//! with one vector, or MSI-X, at most one of the three at a time; each writes an eventfd.
//!
//! Two more eventfds are for errors of the link or the device, which only PCI Express devices
//! report, and for a host that asks for the device back. Neither happens here: only the program
//! itself triggers them, as it can to test itself.

mod pin;

use std::collections::BTreeMap;
use std::mem::size_of;
use std::sync::Arc;

use twostage::iommufd::Errno;
use twostage_emulated::edu;
pub use vfio_bindings::bindings::vfio::VFIO_PCI_NUM_IRQS as IRQS;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE,
    VFIO_IRQ_INFO_NORESIZE, VFIO_IRQ_SET_ACTION_MASK as MASK,
    VFIO_IRQ_SET_ACTION_TRIGGER as TRIGGER, VFIO_IRQ_SET_ACTION_TYPE_MASK as ACTION,
    VFIO_IRQ_SET_ACTION_UNMASK as UNMASK, VFIO_IRQ_SET_DATA_BOOL as DATA_BOOL,
    VFIO_IRQ_SET_DATA_EVENTFD as DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE as DATA_NONE,
    VFIO_IRQ_SET_DATA_TYPE_MASK as DATA, VFIO_PCI_ERR_IRQ_INDEX as ERR_INDEX,
    VFIO_PCI_INTX_IRQ_INDEX as INTX_INDEX, VFIO_PCI_MSIX_IRQ_INDEX as MSIX_INDEX,
    VFIO_PCI_MSI_IRQ_INDEX as MSI_INDEX, VFIO_PCI_REQ_IRQ_INDEX as REQUEST_INDEX,
};

use crate::callers::process::Process;
use crate::sys;
use crate::table::Internal;
use pin::Pin;

/// `struct vfio_irq_set` without its data: argsz, flags, index, start, count.
type Head = [u32; 5];
const HEAD_SIZE: usize = size_of::<Head>();

/// The interrupts of one device.
#[derive(Debug)]
pub struct Irqs {
    /// It is a PCI Express device: with MSI-X, and an eventfd for errors.
    express: bool,
    on: On,
    /// The device asserts the pin.
    level: bool,
    /// Reports an error.
    error: Option<Internal>,
    /// Asks for the device.
    request: Option<Internal>,
    /// A new one of [`Pin::unmask`].
    unwatched: Option<Arc<Internal>>,
}

/// The kind that is enabled.
#[derive(Debug)]
enum On {
    Nothing,
    Pin(Pin),
    /// MSI or MSI-X, by its index; the vectors that have an eventfd.
    Messages(u32, BTreeMap<u32, Internal>),
}

/// What a call asks for.
#[derive(Debug)]
struct Set {
    action: u32,
    data: u32,
    index: u32,
    start: u32,
    count: u32,
    bytes: Vec<u8>,
}

impl Set {
    /// The descriptors of its vectors, one after the other; negative for none.
    fn descriptors(&self) -> impl Iterator<Item = i32> + '_ {
        let number = |bytes: &[u8]| bytes.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes));
        self.bytes.chunks_exact(size_of::<i32>()).filter_map(number)
    }

    /// The first of them.
    fn descriptor(&self) -> i32 {
        self.descriptors().next().unwrap_or(-1)
    }

    /// The vectors to be signalled: all, or those whose byte is not zero.
    fn meant(&self) -> impl Iterator<Item = u32> + '_ {
        let all = self.start..self.start.saturating_add(self.count);
        let is_meant = |at: usize| self.data == DATA_NONE || self.bytes.get(at) != Some(&0);
        all.enumerate().filter(move |(at, _)| is_meant(*at)).map(|(_, vector)| vector)
    }
}

impl Irqs {
    /// Those of a PCI Express device, or of a conventional one.
    pub fn new(express: bool) -> Self {
        let (on, level) = (On::Nothing, false);
        Self { express, on, level, error: None, request: None, unwatched: None }
    }

    /// How many interrupts of index `index` there are.
    fn count(&self, index: u32) -> u32 {
        match index {
            INTX_INDEX | MSI_INDEX | REQUEST_INDEX => 1,
            MSIX_INDEX if self.express => edu::VECTORS,
            ERR_INDEX if self.express => 1,
            _ => 0,
        }
    }

    /// Flags and number of the interrupts of index `index` (`VFIO_DEVICE_GET_IRQ_INFO`).
    ///
    /// # Errors
    /// `EINVAL` there is no such index, or the device reports no errors.
    pub fn info(&self, index: u32) -> Result<(u32, u32), Errno> {
        let flags = match index {
            INTX_INDEX => VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED,
            // Vectors can be added while it is enabled.
            MSIX_INDEX if self.express => 0,
            ERR_INDEX if !self.express => return Err(Errno::EINVAL),
            _ if index < IRQS => VFIO_IRQ_INFO_NORESIZE,
            _ => return Err(Errno::EINVAL),
        };
        Ok((flags | VFIO_IRQ_INFO_EVENTFD, self.count(index)))
    }

    /// `VFIO_DEVICE_SET_IRQS` with the structure at `address` of `process`.
    ///
    /// # Errors
    /// As vfio-pci; `EOPNOTSUPP` an eventfd of another process.
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
        let [_, flags, index, start, count] = head;
        let size = data_size(head, self.count(index))?;
        let (action, data, bytes) = (flags & ACTION, flags & DATA, vec![0; size]);
        let mut set = Set { action, data, index, start, count, bytes };
        if process.read_some(address.wrapping_add(HEAD_SIZE as u64), &mut set.bytes) < size {
            return Err(Errno::EFAULT);
        }
        match (index, action) {
            (INTX_INDEX, MASK | UNMASK | TRIGGER) => self.set_pin(process, &set)?,
            (MSI_INDEX | MSIX_INDEX, TRIGGER) => self.set_messages(process, &set)?,
            (ERR_INDEX, TRIGGER) => set_single(&mut self.error, process, &set)?,
            (REQUEST_INDEX, TRIGGER) => set_single(&mut self.request, process, &set)?,
            _ => return Err(Errno::ENOTTY),
        }
        Ok(0)
    }

    /// Enables, disables, masks or unmasks the pin, or signals it as the program asks.
    fn set_pin(&mut self, process: &Process, set: &Set) -> Result<(), Errno> {
        match &mut self.on {
            On::Pin(_) if (set.action, set.data, set.count) == (TRIGGER, DATA_NONE, 0) => {
                self.on = On::Nothing;
            }
            On::Pin(pin) => {
                pin.set(process, set, self.level)?;
                if (set.action, set.data) == (UNMASK, DATA_EVENTFD) {
                    self.unwatched.clone_from(&pin.unmask);
                }
            }
            On::Nothing => {
                let mut pin = Pin::enabled(process, set)?;
                pin.assert(self.level);
                self.on = On::Pin(pin);
            }
            On::Messages(..) => return Err(Errno::EINVAL),
        }
        Ok(())
    }

    /// Enables or disables MSI or MSI-X, sets eventfds of its vectors, or signals these as the
    /// program asks.
    fn set_messages(&mut self, process: &Process, set: &Set) -> Result<(), Errno> {
        match &mut self.on {
            On::Nothing if set.data == DATA_EVENTFD => {
                if set.start + set.count == 0 {
                    return Err(Errno::from_raw(libc::ERANGE));
                }
                let mut events = BTreeMap::new();
                set_events(&mut events, process, set)?;
                self.on = On::Messages(set.index, events);
            }
            On::Messages(index, events) if *index == set.index => match set.data {
                DATA_NONE if set.count == 0 => self.on = On::Nothing,
                DATA_EVENTFD => set_events(events, process, set)?,
                _ => set.meant().for_each(|vector| signal(events.get(&vector))),
            },
            _ => return Err(Errno::EINVAL),
        }
        Ok(())
    }

    /// The device asserts its pin, or does not.
    pub fn set_level(&mut self, level: bool) {
        self.level = level;
        if let On::Pin(pin) = &mut self.on {
            pin.assert(level);
        }
    }

    /// The eventfd that unmasks the pin, if it is new since the last call: when it is written,
    /// [`Self::woken`] is to be called.
    pub fn wake_event(&mut self) -> Option<Arc<Internal>> {
        self.unwatched.take()
    }

    /// Unmasks the pin if its eventfd says so.
    pub fn woken(&mut self) {
        if let On::Pin(pin) = &mut self.on {
            pin.woken(self.level);
        }
    }

    /// Sends the message for new `causes` of the device; with MSI-X, the messages of their vectors.
    pub fn send(&self, causes: u32) {
        match &self.on {
            On::Messages(MSIX_INDEX, events) => {
                edu::vectors(causes).for_each(|vector| signal(events.get(&vector)));
            }
            On::Messages(_, events) => signal(events.get(&0)),
            On::Nothing | On::Pin(_) => {}
        }
    }
}

/// Sets the eventfds of the vectors from `set.start` on. If one is invalid, those up to it have
/// none.
fn set_events(
    events: &mut BTreeMap<u32, Internal>,
    process: &Process,
    set: &Set,
) -> Result<(), Errno> {
    for (vector, descriptor) in (set.start..).zip(set.descriptors()) {
        // The old one is removed even if the new one is invalid.
        events.remove(&vector);
        match numbered(process, descriptor) {
            Ok(event) => events.extend(event.map(|event| (vector, event))),
            Err(errno) => {
                events.retain(|known, _| !(set.start..=vector).contains(known));
                return Err(errno);
            }
        }
    }
    Ok(())
}

/// Sets the eventfd `event`, takes it away, or signals it as the program asks.
fn set_single(event: &mut Option<Internal>, process: &Process, set: &Set) -> Result<(), Errno> {
    match (set.data, set.count) {
        (DATA_NONE, _) if event.is_none() => return Err(Errno::EINVAL),
        (DATA_NONE, 0) => *event = None,
        (_, 0) => return Err(Errno::EINVAL),
        (DATA_EVENTFD, _) if set.descriptor() < -1 => return Err(Errno::EINVAL),
        (DATA_EVENTFD, _) => *event = numbered(process, set.descriptor())?,
        _ => set.meant().for_each(|_| signal(event.as_ref())),
    }
    Ok(())
}

fn signal(event: Option<&Internal>) {
    if let Some(event) = event {
        // If it is full, it is already signalled; writing does not fail otherwise.
        let _ = sys::write_number(event.raw(), 1);
    }
}

/// Number of data bytes after `head`, of an index with `vectors` interrupts.
///
/// # Errors
/// `EINVAL` not supported by any device, or of a vector that this one does not have.
fn data_size(head: Head, vectors: u32) -> Result<usize, Errno> {
    let [argsz, flags, _, start, count] = head;
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
    // At most as many as there are vectors.
    let data = size * count as usize;
    let room = (argsz as usize).checked_sub(HEAD_SIZE).ok_or(Errno::EINVAL)?;
    if room < data {
        return Err(Errno::EINVAL);
    }
    Ok(data)
}

/// The eventfd `descriptor` of `process`, or none if it is negative.
fn numbered(process: &Process, descriptor: i32) -> Result<Option<Internal>, Errno> {
    (descriptor >= 0).then(|| own(process, descriptor)).transpose()
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
mod tests;
