// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One virtqueue, from the device's side.

use std::sync::atomic::Ordering;
use std::sync::Arc;

use serde_json::json;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::{Broken, Chain, Unserved};
use super::link::{Link, RequestCounters};
use super::memory::DeviceMemory;

/// Offset of the first element of the used ring, and size of an element (virtio 1.3 §2.7.8).
const USED_RING: u64 = 4;
const USED_ELEMENT: u64 = 8;
/// Offset of the first element of the available ring, and size of an element (§2.7.6).
const AVAILABLE_RING: u64 = 4;
const AVAILABLE_ELEMENT: u64 = 2;

/// A queue as set up by the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueSetup {
    /// Maximum size: a power of two.
    pub max_size: u16,
    /// Its size.
    pub size: u16,
    /// Enabled by the driver.
    pub enabled: bool,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the available ring.
    pub available: u64,
    /// Address of the used ring.
    pub used: u64,
}

/// When a driver is interrupted for chains that are served one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interrupts {
    /// For each, as the next one may take long.
    Each,
    /// Once for several, as none takes long.
    Together,
}

/// Chains with one interrupt at most, if they have one together.
pub const BATCH: u16 = 64;

/// A virtqueue in use. A queue that the driver did not enable is always empty.
#[derive(Debug)]
pub struct Virtqueue {
    queue: Queue,
    number: usize,
    link: Arc<Link>,
    /// Its areas were checked to be accessible memory.
    checked: bool,
    /// Chains popped, and neither kept nor returned.
    taken: u16,
    /// The used index before the first chain that was returned and that the driver was not told of.
    untold: Option<u16>,
    /// A served chain that could not be returned yet: head, bytes written.
    served: Option<(u16, u32)>,
}

impl Virtqueue {
    /// Queue `number` as the driver set it up; `event_index` was negotiated.
    ///
    /// # Errors
    /// The setup is invalid.
    pub fn new(
        setup: &QueueSetup,
        event_index: bool,
        number: usize,
        link: Arc<Link>,
    ) -> Result<Self, Broken> {
        let mut queue = Queue::new(setup.max_size)?;
        if setup.enabled {
            queue.try_set_size(setup.size)?;
            queue.try_set_desc_table_address(GuestAddress(setup.descriptors))?;
            queue.try_set_avail_ring_address(GuestAddress(setup.available))?;
            queue.try_set_used_ring_address(GuestAddress(setup.used))?;
            queue.set_event_idx(event_index);
            queue.set_ready(true);
        }
        Ok(Self { queue, number, link, checked: false, taken: 0, untold: None, served: None })
    }

    /// Checks once whether the device can access the queue's areas, before anything else is done.
    ///
    /// # Errors
    /// It cannot, or may make no requests now.
    pub fn check(&mut self, memory: &mut DeviceMemory) -> Result<(), Unserved> {
        if self.queue.ready() && !self.checked {
            if !self.queue.is_valid(&*memory.section()?) {
                return Err(Broken::Areas(self.number).into());
            }
            self.checked = true;
        }
        Ok(())
    }

    /// The device's request statistics.
    pub fn counters(&self) -> Arc<RequestCounters> {
        self.link.counters.clone()
    }

    /// Its size.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Pops the next chain that the driver made available.
    ///
    /// # Errors
    /// The ring or the chain is malformed or cannot be accessed, or no requests are allowed.
    pub fn pop(&mut self, memory: &mut DeviceMemory) -> Result<Option<Chain>, Unserved> {
        if !self.queue.ready() {
            return Ok(None);
        }
        let section = memory.section()?;
        let available = self.queue.avail_idx(&*section, Ordering::Acquire)?;
        if available.0 == self.queue.next_avail() {
            return Ok(None);
        }
        // Not the size chosen by the driver: drivers size indirect chains by the device's maximum.
        let limit = self.queue.max_size();
        let chain = self.queue.iter(&*section)?.next().ok_or(Broken::Available)?;
        let chain = Chain::read_from(chain, limit)?;
        self.taken = self.taken.saturating_add(1);
        Ok(Some(chain))
    }

    /// The chain that was popped last is kept by the device, until it is returned: it will not be
    /// popped again.
    pub fn keep(&mut self) {
        self.taken = self.taken.saturating_sub(1);
    }

    /// Chains that were popped, and neither kept nor returned, will be popped again.
    pub fn undo_pops(&mut self) {
        for _ in 0..std::mem::take(&mut self.taken) {
            self.queue.go_to_previous_position();
        }
    }

    /// Returns chains to the driver, which sees all of them at once: the first descriptor of each,
    /// and how many bytes were written to the start of its buffers. Leaves the interrupt to
    /// [`Self::interrupt`].
    ///
    /// # Errors
    /// The used ring cannot be accessed; or no requests are allowed, and then none is returned.
    pub fn give_back(
        &mut self,
        memory: &mut DeviceMemory,
        used: &[(u16, u32)],
    ) -> Result<(), Unserved> {
        let Some(((head, written), before)) = used.split_last() else { return Ok(()) };
        let section = memory.section()?;
        let old = self.queue.next_used();
        let mut at = old;
        for (head, written) in before {
            self.used(*head, *written);
            let offset = USED_RING + USED_ELEMENT * u64::from(at % self.queue.size());
            let address = GuestAddress(self.queue.used_ring().saturating_add(offset));
            // The head, then the length.
            let element = u64::from(*head) | u64::from(*written) << 32;
            section
                .write_obj(element.to_le(), address)
                .map_err(virtio_queue::Error::GuestMemory)?;
            at = at.wrapping_add(1);
        }
        // The last one moves the index past all of them.
        self.queue.set_next_used(at);
        self.queue.add_used(&*section, *head, *written)?;
        self.untold.get_or_insert(old);
        // No more than there are descriptors.
        self.taken = self.taken.saturating_sub(used.len() as u16);
        self.used(*head, *written);
        Ok(())
    }

    /// Interrupts the driver if chains were returned that it was not told of, and it wants to know.
    ///
    /// # Errors
    /// The available ring cannot be accessed, or no requests are allowed.
    pub fn interrupt(&mut self, memory: &mut DeviceMemory) -> Result<(), Unserved> {
        let Some(old) = self.untold else { return Ok(()) };
        let section = memory.section()?;
        let mut interrupt = self.queue.needs_notification(&*section)?;
        if self.queue.event_idx_enabled() {
            // The check above covered only the last one of several (§2.7.7.2).
            let offset = AVAILABLE_RING + AVAILABLE_ELEMENT * u64::from(self.queue.size());
            let address = GuestAddress(self.queue.avail_ring().saturating_add(offset));
            let event = section.load::<u16>(address, Ordering::Relaxed);
            let event = u16::from_le(event.map_err(virtio_queue::Error::GuestMemory)?);
            let new = self.queue.next_used();
            interrupt |= new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old);
        }
        drop(section);
        self.untold = None;
        if interrupt {
            self.link.queue_used(self.number);
        }
        Ok(())
    }

    fn used(&self, head: u16, written: u32) {
        self.link.count(self.number, |queue| &queue.used);
        self.link.trace("used", self.number, || json!({ "head": head, "written": written }));
    }

    /// Enables notifications. Returns whether there is more already.
    ///
    /// # Errors
    /// The rings cannot be accessed, or no requests are allowed.
    pub fn enable_notification(&mut self, memory: &mut DeviceMemory) -> Result<bool, Unserved> {
        if !self.queue.ready() {
            return Ok(false);
        }
        Ok(self.queue.enable_notification(&*memory.section()?)?)
    }

    /// Disables notifications.
    ///
    /// # Errors
    /// The used ring cannot be accessed, or no requests are allowed.
    pub fn disable_notification(&mut self, memory: &mut DeviceMemory) -> Result<(), Unserved> {
        // With event indices they are off as soon as there was one (§2.7.7.2).
        if !self.queue.ready() || self.queue.event_idx_enabled() {
            return Ok(());
        }
        Ok(self.queue.disable_notification(&*memory.section()?)?)
    }

    /// Serves available chains, at most one queue full: `serve` returns how many bytes it wrote.
    /// Returns whether there may be more.
    ///
    /// # Errors
    /// Errors of `serve`; the queue is broken; or no requests are allowed. A chain that `serve` has
    /// completed is not served again.
    pub fn drain(
        &mut self,
        memory: &mut DeviceMemory,
        interrupts: Interrupts,
        serve: impl FnMut(&mut DeviceMemory, &Chain) -> Result<u32, Unserved>,
    ) -> Result<bool, Unserved> {
        let served = self.serve(memory, interrupts, serve);
        // Also of what was returned before an error.
        let told = self.interrupt(memory);
        let more = served?;
        told.map(|()| more)
    }

    fn serve(
        &mut self,
        memory: &mut DeviceMemory,
        interrupts: Interrupts,
        mut serve: impl FnMut(&mut DeviceMemory, &Chain) -> Result<u32, Unserved>,
    ) -> Result<bool, Unserved> {
        self.return_served(memory)?;
        self.disable_notification(memory)?;
        for number in 1..=self.queue.size() {
            match self.pop(memory)? {
                Some(chain) => {
                    let written = serve(memory, &chain)?;
                    self.taken = self.taken.saturating_sub(1);
                    self.served = Some((chain.head(), written));
                    self.return_served(memory)?;
                    if interrupts == Interrupts::Each || number % BATCH == 0 {
                        self.interrupt(memory)?;
                    }
                }
                None if self.enable_notification(memory)? => {
                    self.disable_notification(memory)?;
                }
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Returns the served chain to the driver, if there is one.
    fn return_served(&mut self, memory: &mut DeviceMemory) -> Result<(), Unserved> {
        if let Some((head, written)) = self.served {
            self.give_back(memory, &[(head, written)])?;
            self.served = None;
            self.link.counters.done.count();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
