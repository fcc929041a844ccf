// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver: what it has made available, and what came back.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use twostage::sync::Mutex;

use twostage_vmm::inside::pci::{InterruptVector, Location, PciFunction};
use twostage_vmm::inside::threadless::without_threads;
use twostage_vmm::inside::virtio::{Backend, DeviceMemory, Doorbells, VirtioPci};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::backend::{device, threaded, Kind};
use super::chains::fails;
use super::identity::disk_id;
use super::messages::{Messages, Vector};
use super::model::{Model, Purpose};
use crate::input::Input;

/// Bytes of guest memory.
const MEMORY: u64 = 0x4_0000;
/// Rings are below, buffers above, each in a slot of its own.
pub const QUEUE_AREA: u64 = 0x1_0000;
/// Bytes of a slot.
pub(super) const SLOT: u64 = 0x400;
const SLOTS: u16 = ((MEMORY - QUEUE_AREA) / SLOT) as u16;
/// Bytes of a queue's rings; the table is first.
const RINGS: u64 = 0x3000;
pub(super) const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Descriptors of a queue.
pub(super) const SIZE: u16 = 16;
/// No ring of a queue, nor its table, has more bytes.
const RING_LENGTH: usize = 16 * SIZE as usize;
/// The structures of MSI-X.
pub(super) const TABLE: u64 = 0x4000;
pub(super) const PENDING: u64 = 0x5000;
const EVENT_INDEX: u64 = 1 << 29;
const MERGEABLE: u64 = 1 << 15;
/// A driver that knows of flushes.
const FLUSHES: u64 = 1 << 9;
const NEEDS_RESET: u64 = 0x40;

/// How long a device may take that has threads.
const PATIENCE: Duration = Duration::from_secs(20);
/// After so long the driver looks again, as some of what it waits for comes without a message.
const LOOK_AGAIN: Duration = Duration::from_micros(100);

/// Every notification is an exit.
struct NoDoorbells;

impl Doorbells for NoDoorbells {
    fn attach(&self, _: u64, _: &EventFd) -> bool {
        false
    }

    fn detach(&self, _: u64, _: &EventFd) {}
}

/// A chain that the device has.
pub(super) struct UnderWay {
    pub(super) purpose: Purpose,
    /// Its writable buffers: address and length.
    pub(super) writable: Vec<(u64, usize)>,
    pub(super) descriptors: Vec<u16>,
    pub(super) slots: Vec<u16>,
}

/// A queue from the driver's side.
#[derive(Default)]
pub(super) struct Queue {
    pub(super) base: u64,
    pub(super) free: Vec<u16>,
    pub(super) available: u16,
    pub(super) seen: u16,
    pub(super) under_way: BTreeMap<u16, UnderWay>,
    pub(super) interrupts: u64,
}

/// The driver of one device.
pub struct Driver {
    pub(super) pci: VirtioPci,
    pub(super) kind: Kind,
    pub(super) memory: GuestMemoryMmap,
    pub(super) messages: Messages,
    pub(super) queues: Vec<Queue>,
    pub(super) slots: Vec<u16>,
    pub(super) model: Model,
    pub(super) event_index: bool,
    /// From DRIVER_OK on.
    pub(super) started: bool,
    pub(super) bus_master: bool,
    /// It did something that no driver does: nothing is expected of the device any more.
    pub(super) wild: bool,
    /// The device has threads.
    pub(super) waits: bool,
    /// Faults of the disk so far that make an operation fail, if it is no flush; and in any case.
    pub(super) injected: (usize, usize),
}

impl Driver {
    /// The driver of a device that `input` chooses; it has started, or not.
    pub fn new(input: &mut Input<'_>) -> Self {
        without_threads(true);
        let device = device(input);
        Self::of(device, false, input)
    }

    /// The driver of a device with threads, which it waits for.
    pub fn of_threads(input: &mut Input<'_>) -> Self {
        without_threads(false);
        let device = threaded(input);
        Self::of(device, true, input)
    }

    fn of((kind, backend): (Kind, Box<dyn Backend>), waits: bool, input: &mut Input<'_>) -> Self {
        let range = (GuestAddress(0), MEMORY as usize);
        let memory = GuestMemoryMmap::from_ranges(&[range]).expect("memory");
        let vectors = Mutex::new(Vec::new());
        let vector = || -> Result<Arc<dyn InterruptVector>, _> {
            let vector = Arc::new(Vector::new());
            vectors.lock().push(vector.clone());
            Ok(vector)
        };
        let location = Location { way: None, bar: 0xe000_0000 };
        let reach = DeviceMemory::direct(memory.clone());
        let doorbells = Arc::new(NoDoorbells);
        let name = "fuzz".to_owned();
        let pci = VirtioPci::new(name, backend, reach, location, &vector, doorbells, None)
            .expect("descriptors");
        let (read_only, id) = match &kind {
            Kind::Blk { file, read_only, .. } => (*read_only, disk_id(file)),
            _ => (false, [0; 20]),
        };
        let mut driver = Self {
            pci,
            kind,
            memory,
            messages: Messages::new(vectors.into_inner()),
            queues: Vec::new(),
            slots: Vec::new(),
            model: Model::new(read_only, id),
            event_index: false,
            started: false,
            bus_master: false,
            wild: false,
            waits,
            injected: (0, 0),
        };
        if input.byte() % 8 != 7 {
            driver.start(input);
        }
        driver
    }

    pub(super) fn read(&self, offset: u64, size: usize) -> u64 {
        let mut data = [0; 8];
        self.pci.read_bar(0, offset, &mut data[..size]);
        u64::from_le_bytes(data)
    }

    pub(super) fn write(&mut self, offset: u64, size: usize, value: u64) {
        self.pci.write_bar(0, offset, &value.to_le_bytes()[..size]);
        if let Some(offset) = offset.checked_sub(TABLE).filter(|at| *at < PENDING - TABLE) {
            self.messages.naive.write_table(offset, &value.to_le_bytes()[..size]);
            self.messages.changed();
        }
    }

    pub(super) fn config(&mut self, offset: u16, data: &[u8]) {
        self.pci.config().lock().write(offset, data);
        if self.pci.config_written(offset, data.len()) {
            self.messages.naive.reset();
            assert_eq!(self.read(PENDING, 8), 0, "a message outlives a reset");
        }
        let msix = self.capability(0x11).expect("it has MSI-X");
        let (control, command) = {
            let config = self.pci.config().lock();
            (config.u16(msix + 2), config.u16(4))
        };
        self.messages.naive.program(control, command & 4 != 0);
        self.messages.changed();
    }

    /// Initializes the device, after a reset, as drivers do.
    pub fn start(&mut self, input: &mut Input<'_>) {
        self.reset();
        let choice = input.byte();
        self.config(4, &[6, 0]);
        self.config(0x10, &0xe000_0000_u32.to_le_bytes());
        for vector in 0..self.messages.len() as u64 {
            self.write(TABLE + 16 * vector, 8, 0xfee0_0000 | vector << 32);
            self.write(TABLE + 16 * vector + 8, 8, 0x40 + vector);
        }
        let msix = self.capability(0x11).expect("it has MSI-X");
        self.config(msix + 2, &0x8000_u16.to_le_bytes());
        self.write(0x14, 1, 1);
        self.write(0x14, 1, 3);
        let refused = match choice & 3 {
            0 => EVENT_INDEX,
            1 => FLUSHES,
            2 => MERGEABLE | EVENT_INDEX,
            _ => 0,
        };
        for select in 0..2 {
            self.write(0, 4, select);
            let offered = self.read(4, 4) << (32 * select) & !refused;
            self.write(8, 4, select);
            self.write(0xc, 4, offered >> (32 * select));
            if select == 0 {
                self.event_index = offered & EVENT_INDEX != 0;
                self.model.mergeable = offered & MERGEABLE != 0;
                self.model.write_through = offered & FLUSHES == 0;
            }
        }
        self.write(0x14, 1, 0xb);
        self.write(0x10, 2, 0);
        let count = self.read(0x12, 2);
        self.queues = (0..count)
            .map(|number| {
                let base = number * RINGS;
                // Of what was there before, the device reads nothing.
                for area in [0, AVAILABLE, USED] {
                    let area = GuestAddress(base + area);
                    self.memory.write_slice(&[0; RING_LENGTH], area).expect("memory");
                }
                self.write(0x16, 2, number);
                self.write(0x18, 2, SIZE.into());
                self.write(0x1a, 2, number + 1);
                for (at, area) in [(0x20, 0), (0x28, AVAILABLE), (0x30, USED)] {
                    self.write(at, 4, base + area);
                    self.write(at + 4, 4, 0);
                }
                self.write(0x1c, 2, 1);
                let interrupts = self.messages.count(number as usize + 1);
                Queue { base, free: (0..SIZE).collect(), interrupts, ..Queue::default() }
            })
            .collect();
        self.slots = (0..SLOTS).collect();
        self.write(0x14, 1, 0xf);
        assert_eq!(self.read(0x14, 1), 0xf, "a driver that does everything right has started");
        self.check_identity();
        (self.started, self.bus_master, self.wild) = (true, true, false);
    }

    /// Offset of the first capability with this ID.
    pub(super) fn capability(&self, id: u8) -> Option<u16> {
        let config = self.pci.config().lock();
        let byte = |at: u16| config.u16(at) as u8;
        let mut at = byte(0x34);
        while at != 0 && byte(at.into()) != id {
            at = byte(u16::from(at) + 1);
        }
        (at != 0).then_some(at.into())
    }

    /// It does something that no driver does.
    pub(super) fn go_wild(&mut self) {
        self.wild = true;
        self.model.forget_all();
    }

    /// How many operations of the disk have failed as they were told to, of both kinds.
    fn failed(&self) -> (usize, usize) {
        let Kind::Blk { faults, .. } = &self.kind else { return (0, 0) };
        faults.lock().iter().fold(self.injected, |(may, does), outcome| {
            let left = fails(*outcome);
            (may - usize::from(left.0), does - usize::from(left.1))
        })
    }

    /// Nothing is under way any more.
    fn forget(&mut self) {
        self.model.failed = self.failed();
        let queues = std::mem::take(&mut self.queues);
        let chains = queues.iter().flat_map(|queue| queue.under_way.values());
        self.model.reset(chains.map(|chain| &chain.purpose));
        if let Kind::Net(wire) = &self.kind {
            wire.incoming.lock().clear();
            wire.sent.lock().clear();
        }
        self.started = false;
    }

    pub fn reset(&mut self) {
        self.write(0x14, 1, 0);
        self.wait_for_reset();
        self.forget();
    }

    /// Waits for the end of a reset, if the device has threads: else there is nothing to wait for.
    fn wait_for_reset(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.waits && self.read(0x14, 1) != 0 {
            assert!(Instant::now() < deadline, "a reset takes too long");
            thread::park_timeout(LOOK_AGAIN);
        }
        assert_eq!(self.read(0x14, 1), 0, "the reset is over");
    }

    pub fn reset_function(&mut self) {
        let express = self.capability(0x10).expect("it can be reset");
        self.config(express + 8, &[0, 0x80]);
        self.wait_for_reset();
        self.bus_master = false;
        self.forget();
    }

    pub fn set_bus_master(&mut self, on: bool) {
        self.config(4, &[if on { 6 } else { 2 }, 0]);
        self.bus_master = on;
    }

    pub fn write_register(&mut self, offset: u64, size: usize, value: u64) {
        // Except the registers that select, and notifications.
        if !matches!(offset, 0 | 8 | 0x3000..=0x3fff) {
            self.go_wild();
        }
        self.write(offset, size, value);
    }

    /// Reading changes nothing but the interrupt status.
    pub fn read_register(&self, offset: u64, size: usize) {
        self.read(offset, size);
    }

    pub fn write_config(&mut self, offset: u16, size: usize, value: u64) {
        self.go_wild();
        self.config(offset, &value.to_le_bytes()[..size]);
        self.look_at_table();
    }

    pub fn read_config(&self, offset: u16, size: usize) {
        self.pci.config_reading(offset, size);
        self.pci.config().lock().read(offset, &mut [0; 8][..size]);
        let _ = (self.pci.config_is_memory(), self.pci.queue_counters().len());
    }

    /// Accesses the BAR through configuration space.
    pub fn window(&mut self, input: &mut Input<'_>) {
        let mut at = self.capability(9);
        while let Some(offset) = at {
            let config = self.pci.config().lock();
            if config.u16(offset + 2) >> 8 == 5 {
                break;
            }
            let next = config.u16(offset) >> 8;
            at = (next != 0 && config.u16(next) as u8 == 9).then_some(next);
        }
        let Some(window) = at else { return };
        let offset = u32::from(input.byte() % 8) * 0x1000 + u32::from(input.byte() % 0x40);
        self.config(window + 4, &[input.byte() & 1]);
        self.config(window + 8, &offset.to_le_bytes());
        self.config(window + 12, &u32::from(input.byte() % 9).to_le_bytes());
        if input.flag() {
            self.go_wild();
            self.config(window + 16, &input.number().to_le_bytes()[..4]);
            self.look_at_table();
        }
        self.read_config(window + 16, 4);
    }

    /// Changes rings in a way that no driver does.
    pub fn scribble(&mut self, address: u64, value: u64) {
        self.go_wild();
        let length = (QUEUE_AREA - address).min(8) as usize;
        let bytes = &value.to_le_bytes()[..length];
        self.memory.write_slice(bytes, GuestAddress(address)).expect("memory");
    }

    pub fn notify(&mut self, queue: usize) {
        self.write(0x3000 + 4 * queue as u64, 2, queue as u64);
    }

    /// The device does what it can, and the driver looks at what it did.
    pub fn turn(&mut self, input: bool) {
        match self.waits {
            // It is in the middle of something: only when it has come to an end, all is known.
            true => thread::yield_now(),
            false => {
                self.pci.turn(input);
                self.collect();
            }
        }
    }

    /// Looks at the used rings.
    fn collect(&mut self) {
        if self.wild || !self.started {
            return;
        }
        assert_eq!(self.read(0x14, 1) & NEEDS_RESET, 0, "the driver made no mistake");
        self.model.failed = self.failed();
        for number in 0..self.queues.len() {
            let queue = &self.queues[number];
            let (ring, before) = (queue.base + USED, queue.seen);
            let index: u16 = self.memory.read_obj(GuestAddress(ring + 2)).expect("memory");
            while self.queues[number].seen != index {
                let seen = self.queues[number].seen;
                self.queues[number].seen = seen.wrapping_add(1);
                let place = ring + 4 + 8 * u64::from(seen % SIZE);
                let [head, written] =
                    self.memory.read_obj::<[u32; 2]>(GuestAddress(place)).expect("memory");
                self.take_back(number, head, written as usize);
            }
            let sent = self.messages.count(number + 1);
            let pending = self.read(PENDING, 8) >> (number + 1) & 1 != 0;
            let queue = &mut self.queues[number];
            let told = pending || sent != queue.interrupts;
            assert!(index == before || told, "nobody told of queue {number}");
            queue.interrupts = sent;
            let event = queue.base + AVAILABLE + 4 + 2 * u64::from(SIZE);
            self.memory.write_obj(index, GuestAddress(event)).expect("memory");
        }
        if let Kind::Net(wire) = &self.kind {
            assert!(wire.sent.lock().is_empty(), "a frame that the driver did not send");
        }
    }

    /// The device has used the chain of `head`.
    fn take_back(&mut self, number: usize, head: u32, written: usize) {
        let queue = &mut self.queues[number];
        let chain = u16::try_from(head).ok().and_then(|head| queue.under_way.remove(&head));
        let chain = chain.unwrap_or_else(|| panic!("queue {number}: {head} is not under way"));
        let mut buffer = Vec::new();
        for (at, length) in &chain.writable {
            let mut bytes = vec![0; *length];
            self.memory.read_slice(&mut bytes, GuestAddress(*at)).expect("memory");
            buffer.extend(bytes);
        }
        if let (Purpose::Transmit(frame), Kind::Net(wire)) = (&chain.purpose, &self.kind) {
            if Model::is_sent(frame) {
                let sent = wire.sent.lock().pop_front();
                assert!(sent.as_ref() == Some(frame), "another frame was sent");
            }
        }
        self.model.used(&chain.purpose, written, &buffer);
        queue.free.extend(chain.descriptors);
        self.slots.extend(chain.slots);
    }

    /// Waits until the device's threads have used everything.
    fn wait(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        let used = |driver: &Self, queue: &Queue| {
            let at = GuestAddress(queue.base + USED + 2);
            driver.memory.read_obj::<u16>(at).expect("memory") == queue.available
        };
        let told = |driver: &Self, number: usize| {
            let sent = driver.messages.count(number + 1);
            driver.queues[number].under_way.is_empty() || sent != driver.queues[number].interrupts
        };
        while !self.queues.iter().enumerate().all(|(n, queue)| used(self, queue) && told(self, n)) {
            assert!(Instant::now() < deadline, "the device takes too long");
            thread::park_timeout(LOOK_AGAIN);
        }
        self.collect();
    }

    /// Lets everything end that can.
    pub fn end(mut self) {
        if let Kind::Blk { faults, .. } = &self.kind {
            self.injected = self.failed();
            faults.lock().clear();
        }
        if let Kind::Net(wire) = &self.kind {
            wire.mend();
        }
        if self.started && !self.wild {
            self.set_bus_master(true);
            // Each turn serves a part; nothing here needs more.
            for _ in 0..8 {
                (0..self.queues.len()).for_each(|number| self.notify(number));
                self.turn(true);
            }
            if self.waits {
                self.wait();
            }
            let waits = |chain: &UnderWay| chain.purpose != Purpose::Receive;
            let left = self.queues.iter().flat_map(|queue| queue.under_way.values());
            assert_eq!(left.filter(|chain| waits(chain)).count(), 0, "chains were forgotten");
            self.model.nothing_is_left();
        }
        // Whatever it did, a reset succeeds.
        self.write(0x14, 1, 0);
        self.wait_for_reset();
        if let Kind::Blk { file, .. } = &self.kind {
            self.model.check_disk(file);
        }
    }
}
