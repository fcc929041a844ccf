// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the driver gives the device: requests in chains of buffers, frames from the wire, and
//! faults of the disk.

use twostage_vmm::inside::virtio::Outcome;
use vm_memory::{Bytes, GuestAddress};

use super::backend::Kind;
use super::driver::{Driver, UnderWay, AVAILABLE, QUEUE_AREA, SIZE, SLOT};
use super::model::{BlkRequest, Purpose, FRAME_HEADER, UNTOUCHED};
use crate::input::Input;

/// Whether the operation of a disk that meets with this fails, if it is no flush, and whether in
/// any case: others are tried again.
pub(super) fn fails(outcome: Outcome) -> (bool, bool) {
    let does = matches!(outcome, Outcome::Fails(5 | 28));
    (does || outcome == Outcome::Short(0), does)
}

/// Lengths of frames from the wire.
const FRAMES: [usize; 7] = [0, 13, 26, 60, 600, 1500, 3000];
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

impl Driver {
    /// Makes a request available.
    pub fn request(&mut self, input: &mut Input<'_>) {
        if self.queues.is_empty() {
            return;
        }
        let number = input.below(self.queues.len());
        let header = input.byte();
        let (indirect, split) = (header & 1 != 0, header & 2 != 0);
        let pieces = usize::from(header >> 2 & 3);
        let mut length = || input.pick(&[0, 1, 12, 100, 511, 512, 512, 512, 1024, 1024]);
        let lengths: Vec<usize> = (0..pieces).map(|_| length()).collect();
        let total: usize = lengths.iter().sum();
        // Device-readable buffers as bytes, and the lengths of writable ones.
        let (purpose, readable, writable) = match &self.kind {
            Kind::Blk { .. } => {
                let kind: u32 = input.pick(&[0, 0, 0, 1, 1, 1, 1, 4, 8, 2, 11, 13]);
                let sector = match input.byte() {
                    far @ 0xf8.. => u64::MAX >> ((far & 7) * 8),
                    sector => u64::from(sector % 36),
                };
                let mut bytes = [kind.to_le_bytes(), [0; 4]].concat();
                bytes.extend(sector.to_le_bytes());
                let fill = input.byte();
                let out = if kind == 1 { vec![fill; total] } else { Vec::new() };
                let mut readable = match split {
                    true => vec![bytes[..7].to_vec(), bytes[7..].to_vec()],
                    false => vec![bytes],
                };
                let mut writable = Vec::new();
                match kind {
                    1 => readable.extend(lengths.iter().map(|length| vec![fill; *length])),
                    _ => writable.extend(&lengths),
                }
                writable.push(1);
                let request = BlkRequest { kind, sector, data: out, raced: false };
                (Purpose::Blk(request), readable, writable)
            }
            Kind::Net(_) if number == 1 => {
                let fill = input.byte();
                let mut parts = vec![vec![0; if split { FRAME_HEADER } else { 5 }]];
                parts.extend(lengths.iter().map(|length| vec![fill; *length]));
                (Purpose::Transmit(parts.concat()), parts, Vec::new())
            }
            // A driver gives room for the header (§5.1.6.3.1).
            Kind::Net(_) => (Purpose::Receive, Vec::new(), [vec![FRAME_HEADER], lengths].concat()),
            Kind::Rng => (Purpose::Entropy, Vec::new(), lengths),
        };
        self.add(number, purpose, &readable, &writable, indirect);
    }

    /// Makes a chain of these buffers available, if there is room for it.
    fn add(
        &mut self,
        number: usize,
        purpose: Purpose,
        readable: &[Vec<u8>],
        writable: &[usize],
        indirect: bool,
    ) {
        let buffers = readable.len() + writable.len();
        let queue = &mut self.queues[number];
        let descriptors = if indirect { 1 } else { buffers };
        let slots = buffers + usize::from(indirect);
        if buffers == 0 || queue.free.len() < descriptors || self.slots.len() < slots {
            return;
        }
        let descriptors = queue.free.split_off(queue.free.len() - descriptors);
        let slots = self.slots.split_off(self.slots.len() - slots);
        let base = queue.base;
        let address = |slot: u16| QUEUE_AREA + u64::from(slot) * SLOT;
        let all = readable.iter().map(Vec::len).chain(writable.iter().copied());
        // Where descriptor number n is, and what the one before says to be next.
        let place = |n: usize| match indirect {
            true => (address(slots[buffers]) + 16 * n as u64, n as u16),
            false => (base + 16 * u64::from(descriptors[n]), descriptors[n]),
        };
        let mut back = Vec::new();
        for (n, length) in all.enumerate() {
            let at = address(slots[n]);
            let is_written = n >= readable.len();
            let bytes = readable.get(n).cloned().unwrap_or_else(|| vec![UNTOUCHED; length]);
            self.memory.write_slice(&bytes, GuestAddress(at)).expect("memory");
            if is_written {
                back.push((at, length));
            }
            let more = n + 1 < buffers;
            let flags = if more { NEXT } else { 0 } | if is_written { WRITE } else { 0 };
            let next = if more { place(n + 1).1 } else { 0 };
            self.descriptor(place(n).0, at, length as u32, flags, next);
        }
        let head = descriptors[0];
        if indirect {
            let table = address(slots[buffers]);
            let length = 16 * buffers as u32;
            self.descriptor(base + 16 * u64::from(head), table, length, INDIRECT, 0);
        }
        if purpose == Purpose::Receive {
            self.model.room.push_back(writable.iter().sum());
        }
        let mut chain = UnderWay { purpose, writable: back, descriptors, slots };
        self.note_races(&mut chain);
        self.queues[number].under_way.insert(head, chain);
        self.make_available(number, head);
    }

    /// Finds requests under way at the sectors of `chain`.
    fn note_races(&mut self, chain: &mut UnderWay) {
        let length = |chain: &UnderWay| chain.writable.iter().map(|(_, length)| length).sum();
        let new_length: usize = length(chain);
        let Purpose::Blk(new) = &mut chain.purpose else { return };
        for other in self.queues.iter_mut().flat_map(|queue| queue.under_way.values_mut()) {
            let other_length: usize = length(other);
            if let Purpose::Blk(old) = &mut other.purpose {
                if self.model.race((new, new_length), (old, other_length)) {
                    (new.raced, old.raced) = (true, true);
                }
            }
        }
    }

    /// Makes a chain available that is none, or of descriptors that are anywhere.
    pub fn wild_chain(&mut self, input: &mut Input<'_>) {
        if self.queues.is_empty() {
            return;
        }
        self.go_wild();
        let number = input.below(self.queues.len());
        let base = self.queues[number].base;
        for _ in 0..input.byte() % 4 + 1 {
            let index = input.half() % SIZE;
            let address = match input.flag() {
                true => QUEUE_AREA + u64::from(input.half()),
                false => input.number(),
            };
            let length = input.number() as u32;
            let (flags, next) = (u16::from(input.byte() % 8), u16::from(input.byte()) % 20);
            self.descriptor(base + 16 * u64::from(index), address, length, flags, next);
        }
        let head = u16::from(input.byte()) % 18;
        self.make_available(number, head);
        self.notify(number);
    }

    fn descriptor(&self, at: u64, address: u64, length: u32, flags: u16, next: u16) {
        let tail = u64::from(length) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.memory.write_obj([address, tail], GuestAddress(at)).expect("memory");
    }

    fn make_available(&mut self, number: usize, head: u16) {
        let queue = &mut self.queues[number];
        let ring = queue.base + AVAILABLE;
        let place = ring + 4 + 2 * u64::from(queue.available % SIZE);
        queue.available = queue.available.wrapping_add(1);
        self.memory.write_obj(head, GuestAddress(place)).expect("memory");
        self.memory.write_obj(queue.available, GuestAddress(ring + 2)).expect("memory");
    }

    /// A frame comes from the wire.
    pub fn frame(&mut self, input: &mut Input<'_>) {
        if !matches!(self.kind, Kind::Net(_)) {
            return;
        }
        let mut frame = vec![0; input.pick(&FRAMES)];
        input.fill(&mut frame);
        self.arrive(frame);
    }

    /// Some come together: after a long one, which may not fit, a short one may.
    fn burst(&mut self, input: &mut Input<'_>, count: u8) {
        for _ in 0..count {
            let length = input.pick(&FRAMES);
            self.arrive(vec![input.byte(); length]);
        }
    }

    /// This comes from the wire, each byte with its place in it.
    fn arrive(&mut self, mut frame: Vec<u8>) {
        let Kind::Net(wire) = &self.kind else { return };
        frame.iter_mut().zip(0_usize..).for_each(|(byte, at)| *byte ^= at as u8);
        let length = frame.len();
        wire.incoming.lock().push_back(Ok(frame.clone()));
        // Shorter ones than both headers are none.
        if length >= FRAME_HEADER + 14 {
            self.model.frames.push_back(frame);
        }
    }

    /// One of the next operations of the disk, or of the host's interface, fails; or frames come
    /// faster than they are taken.
    pub fn fault(&mut self, input: &mut Input<'_>) {
        let faults = match &self.kind {
            Kind::Blk { faults, .. } => faults,
            Kind::Net(wire) => {
                return match input.byte() {
                    choice @ 0xd0.. => wire.will_fail(choice & 1 == 0, choice >> 1),
                    count => self.burst(input, count % 4 + 1),
                };
            }
            Kind::Rng => return,
        };
        let outcome = match input.byte() % 8 {
            0 | 1 => Outcome::Done,
            2 => Outcome::Short(input.pick(&[0, 1, 512])),
            3 | 4 => Outcome::Later,
            // EIO, ENOSPC, EINTR, EAGAIN.
            _ => Outcome::Fails(input.pick(&[5, 28, 4, 11])),
        };
        let (may, does) = fails(outcome);
        self.injected.0 += usize::from(may);
        self.injected.1 += usize::from(does);
        faults.lock().push_back(outcome);
    }
}
