// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Event indices (virtio 1.3 §2.7.7): neither side waits for what the other does not tell it.

use proptest::prelude::*;
use vm_memory::GuestMemoryMmap;

use super::*;
use crate::pci::Msix;

const SIZE: u16 = 8;
const DESCRIPTORS: GuestAddress = GuestAddress(0x1000);
const AVAILABLE: GuestAddress = GuestAddress(0x2000);
const USED: GuestAddress = GuestAddress(0x3000);

/// A step of one side, as small as the other can see.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// The driver makes a chain available.
    Add,
    /// The driver notifies the device of what it has added, if that wants it.
    Kick,
    /// The driver takes what was returned, as far as it has been told.
    Take,
    /// The driver asks to be told of the next one that is returned ...
    Ask,
    /// ... and looks whether there is one already.
    Look,
    /// The device takes a chain if there is one.
    Pop,
    /// The device, which has found none, asks to be notified, and looks again.
    Rest,
    /// The device is done with the chain of this number, and returns it.
    Return(usize),
    /// The device returns all that it has, and interrupts the driver once.
    ReturnAll,
    /// The device returns all that it has, and will interrupt the driver ...
    ReturnQuietly,
    /// ... now.
    Interrupt,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    use Step::*;
    let step = prop_oneof![
        4 => Just(Add), 2 => Just(Kick), 2 => Just(Take), 2 => Just(Ask), 2 => Just(Look),
        4 => Just(Pop), 2 => Just(Rest), 2 => (0..8usize).prop_map(Return), 1 => Just(ReturnAll),
        1 => Just(ReturnQuietly), 1 => Just(Interrupt)
    ];
    proptest::collection::vec(step, 0..200)
}

struct Sides {
    memory: GuestMemoryMmap,
    device_memory: DeviceMemory,
    queue: Virtqueue,
    link: Arc<Link>,
    /// Chains that the driver may use.
    free: Vec<u16>,
    /// The driver's available index, and what it was when the driver last decided to notify.
    added: u16,
    kicked: u16,
    /// Returned chains that the driver has taken.
    taken: u16,
    /// The driver sleeps until it is interrupted.
    asleep: bool,
    /// Interrupts that it has seen.
    interrupts: u64,
    /// The driver has asked to be told, and will look.
    asked: bool,
    /// The device sleeps until it is notified.
    idle: bool,
    held: Vec<u16>,
}

impl Sides {
    fn new(start: u16) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let device_memory = DeviceMemory::direct(memory.clone());
        let gate = device_memory.gate();
        gate.set_bus_master(true);
        gate.start();
        let link = Link::new("test".into(), 1, Msix::new(Vec::new()), gate, None).unwrap();
        let link = Arc::new(link);
        let setup = QueueSetup {
            max_size: SIZE,
            size: SIZE,
            enabled: true,
            descriptors: DESCRIPTORS.0,
            available: AVAILABLE.0,
            used: USED.0,
        };
        let mut queue = Virtqueue::new(&setup, true, 0, link.clone()).unwrap();
        queue.queue.set_next_avail(start);
        queue.queue.set_next_used(start);
        let sides = Self {
            memory,
            device_memory,
            queue,
            link,
            free: (0..SIZE).collect(),
            added: start,
            kicked: start,
            taken: start,
            asleep: false,
            interrupts: 0,
            asked: false,
            idle: false,
            held: Vec::new(),
        };
        for (area, offset) in [(AVAILABLE, 2), (USED, 2), (AVAILABLE, 20), (USED, 68)] {
            sides.memory.write_obj(start, GuestAddress(area.0 + offset)).unwrap();
        }
        sides
    }

    fn u16(&self, area: GuestAddress, offset: u64) -> u16 {
        self.memory.read_obj(GuestAddress(area.0 + offset)).unwrap()
    }

    /// The index of the chain that the device takes next.
    fn next_available(&self) -> u16 {
        self.queue.queue.next_avail()
    }

    /// Makes a step, unless whoever would make it sleeps.
    fn step(&mut self, step: Step) {
        // What wakes them.
        let interrupts = self.link.queue_counters[0].interrupts.get();
        if interrupts != self.interrupts {
            (self.interrupts, self.asleep) = (interrupts, false);
        }
        match step {
            Step::Add => {
                let Some(head) = self.free.pop() else { return };
                let at = GuestAddress(DESCRIPTORS.0 + 16 * u64::from(head));
                self.memory.write_slice(&[0; 16], at).unwrap();
                let at = AVAILABLE.0 + 4 + 2 * u64::from(self.added % SIZE);
                self.memory.write_obj(head, GuestAddress(at)).unwrap();
                self.added = self.added.wrapping_add(1);
                self.memory.write_obj(self.added, GuestAddress(AVAILABLE.0 + 2)).unwrap();
            }
            // §2.7.10: the device's event index is after the used ring.
            Step::Kick => {
                let event = self.u16(USED, 4 + 8 * u64::from(SIZE));
                let (old, new) = (std::mem::replace(&mut self.kicked, self.added), self.added);
                if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old) {
                    self.idle = false;
                }
            }
            Step::Take if !self.asleep => {
                while self.taken != self.u16(USED, 2) {
                    let at = USED.0 + 4 + 8 * u64::from(self.taken % SIZE);
                    let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
                    self.free.push(head as u16);
                    self.taken = self.taken.wrapping_add(1);
                }
            }
            Step::Ask if !self.asleep => {
                let at = AVAILABLE.0 + 4 + 2 * u64::from(SIZE);
                self.memory.write_obj(self.taken, GuestAddress(at)).unwrap();
                self.asked = true;
            }
            Step::Look if self.asked => {
                self.asked = false;
                // What it has asked for may be long ago, and it may have taken some since.
                let asked = self.u16(AVAILABLE, 4 + 2 * u64::from(SIZE)) == self.taken;
                self.asleep = asked && self.taken == self.u16(USED, 2);
            }
            Step::Pop if !self.idle => {
                if let Some(chain) = self.queue.pop(&mut self.device_memory).unwrap() {
                    self.queue.keep();
                    self.held.push(chain.head());
                }
            }
            Step::Rest if !self.idle && self.next_available() == self.u16(AVAILABLE, 2) => {
                let more = self.queue.enable_notification(&mut self.device_memory).unwrap();
                self.idle = !more;
            }
            Step::Return(number) if number < self.held.len() => {
                let head = self.held.remove(number);
                self.queue.give_back(&mut self.device_memory, &[(head, 0)]).unwrap();
                self.queue.interrupt(&mut self.device_memory).unwrap();
            }
            Step::ReturnAll => {
                let used: Vec<_> = self.held.drain(..).rev().map(|head| (head, 0)).collect();
                self.queue.give_back(&mut self.device_memory, &used).unwrap();
                self.queue.interrupt(&mut self.device_memory).unwrap();
            }
            Step::ReturnQuietly => {
                let used: Vec<_> = self.held.drain(..).map(|head| (head, 0)).collect();
                self.queue.give_back(&mut self.device_memory, &used).unwrap();
            }
            Step::Interrupt => self.queue.interrupt(&mut self.device_memory).unwrap(),
            _ => {}
        }
    }
}

proptest! {
    #[test]
    fn no_notification_and_no_interrupt_is_lost(steps in steps(), start in any::<u16>()) {
        let mut sides = Sides::new(start);
        for step in steps {
            sides.step(step);
        }
        // Each does what it does before it sleeps, and what it was woken for.
        let rest = [Step::Kick, Step::Pop, Step::Rest, Step::ReturnAll, Step::Take, Step::Interrupt];
        for _ in 0..4 * SIZE {
            rest.into_iter().for_each(|step| sides.step(step));
        }
        prop_assert_eq!(sides.next_available(), sides.added, "a chain lies there");
        prop_assert_eq!(sides.taken, sides.added, "a returned chain lies there");
        prop_assert_eq!(sides.free.len(), usize::from(SIZE));
    }
}
