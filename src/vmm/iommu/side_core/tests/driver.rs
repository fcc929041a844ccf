// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the vCPUs of the race do, and the naive model of what comes of it: a register has what its
//! vCPU wrote last, and a descriptor is done once.

use std::collections::BTreeMap;

use twostage::spec::vtd::qi::{Descriptor, StatusWrite};
use twostage::spec::vtd::regs;

use super::guest::{Step, Vcpu, REGISTERS};

/// The queue of invalidations, of one page, and the word for the status of waits.
pub const QUEUE: u64 = 0x2_0000;
const DESCRIPTORS: u64 = 0x1000 / 32;
pub const STATUS: u64 = 0x2_1000;
/// Where the first vCPU says which data of the fault event it has written.
pub const PROGRESS: u64 = 0x2_2000;
/// Two empty root tables.
const ROOTS: [u64; 2] = [0x2_3000, 0x2_4000];

/// The data of messages begin so, and are odd while the event is masked.
pub const FAULT_EVENT: u32 = 1 << 28;
pub const INVALIDATION_EVENT: u32 = 2 << 28;
const MASKED: u32 = 1 << 31;

/// GCMD and GSTS.
pub const ENABLED: u32 = 1 << 31 | 1 << 26;
const SRTP: u32 = 1 << 30;
const SIRTP: u32 = 1 << 24;

/// Random numbers (xorshift).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit
    }
}

/// One vCPU: its registers, and its script.
pub struct Driver {
    random: Random,
    steps: Vec<Step>,
    /// What it has written to each register of its own, and which bits of it are kept.
    naive: BTreeMap<u64, (u32, u32)>,
    /// Steps that read, and what.
    reads: Vec<(usize, u64)>,
    expected: Vec<(u32, u32)>,
    /// Data of the event, of waits; the tail.
    event: u32,
    waits: u32,
    /// Waits that it has not awaited.
    open: u64,
    tail: u64,
    root: u64,
}

impl Driver {
    pub fn new(event: u32, seed: u64) -> Self {
        Self {
            random: Random(seed),
            steps: Vec::new(),
            naive: BTreeMap::new(),
            reads: Vec::new(),
            expected: Vec::new(),
            event,
            waits: 0,
            open: 0,
            tail: 0,
            root: 0,
        }
    }

    /// A script of the vCPU that invalidates and has the fault event.
    pub fn invalidate_and_serve_faults(&mut self) -> &[Step] {
        self.begin();
        while self.steps.len() < 4000 {
            match self.random.below(64) {
                0 => {
                    self.write_event(regs::FECTL);
                    self.steps.push(Step::Write32(PROGRESS, self.event));
                }
                1 => self.write_any(regs::FEADDR, !3),
                2 => self.write_any(regs::FEADDR + 4, u32::MAX),
                3 => self.read(),
                4 => {
                    self.write(regs::FSTS, 0x7f);
                    // F of each fault recording register.
                    (0..8).for_each(|record| self.write(0x22c + 16 * record, 1 << 31));
                }
                _ => self.invalidate(),
            }
        }
        self.await_all();
        &self.steps
    }

    /// A script of the vCPU that has all else, with pauses: the page is lent when it does nothing.
    pub fn write_other_registers(&mut self) -> &[Step] {
        self.begin();
        for _ in 0..self.random.below(60) {
            match self.random.below(7) {
                0 => self.write_event(regs::IECTL),
                1 => self.write_any(regs::IEADDR, !3),
                2 => self.write_any(regs::IEADDR + 4, u32::MAX),
                3 => self.write(regs::ICS, 1),
                4 => self.set_root(),
                5 => self.set_interrupt_table(),
                _ => self.read(),
            }
            let longest = [0, 1_000, 20_000, 100_000][self.random.below(4) as usize];
            self.steps.push(Step::Pause(self.random.below(longest + 1) as u32));
        }
        &self.steps
    }

    /// Compares what `vcpu` has read with the naive model.
    pub fn compare_reads(&self, vcpu: &Vcpu) {
        for ((step, offset), (mask, value)) in self.reads.iter().zip(&self.expected) {
            // Memory has reserved bits until the thread has seen them.
            let read = vcpu.read(*step) & mask;
            assert_eq!(read, *value, "register {offset:#x} in step {step}");
        }
    }

    /// Compares all registers of this vCPU, read with `read`.
    pub fn compare(&self, read: impl Fn(u64) -> u32) {
        for (offset, (mask, value)) in &self.naive {
            assert_eq!(read(*offset) & mask, *value, "register {offset:#x}");
        }
    }

    /// Waits so far, and where the tail is.
    pub fn queued(&self) -> (u64, u64) {
        (self.waits.into(), self.tail)
    }

    /// RTADDR of the last SRTP, if there was any.
    pub fn root(&self) -> Option<u64> {
        (self.root != 0).then_some(self.root)
    }

    fn begin(&mut self) {
        self.steps.clear();
        self.reads.clear();
        self.expected.clear();
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.steps.push(Step::Write32(REGISTERS + offset, value));
    }

    fn write_any(&mut self, offset: u64, mask: u32) {
        let value = self.random.next() as u32;
        self.write(offset, value);
        self.naive.insert(offset, (mask, value & mask));
    }

    fn write_pair(&mut self, offset: u64, value: u64, masks: [u32; 2]) {
        self.steps.push(Step::Write64(REGISTERS + offset, value));
        for (at, mask, value) in
            [(offset, masks[0], value as u32), (offset + 4, masks[1], (value >> 32) as u32)]
        {
            self.naive.insert(at, (mask, value & mask));
        }
    }

    /// Control and data register of an event, in one write.
    fn write_event(&mut self, control: u64) {
        self.event += 1 + self.random.below(3) as u32;
        let mask = if self.event % 2 == 1 { MASKED } else { 0 };
        let value = u64::from(self.event) << 32 | u64::from(mask);
        self.write_pair(control, value, [MASKED, u32::MAX]);
    }

    fn read(&mut self) {
        let Some(chosen) = self.random.next().checked_rem(self.naive.len() as u64) else { return };
        let Some((offset, expected)) = self.naive.iter().nth(chosen as usize) else { return };
        self.reads.push((self.steps.len(), *offset));
        self.expected.push(*expected);
        self.steps.push(Step::Read(REGISTERS + offset));
    }

    /// One to four waits. Most of the time it goes on before they are done, as long as the queue
    /// has room: a busy machine lets the other thread run only now and then.
    fn invalidate(&mut self) {
        for _ in 0..1 + self.random.below(4) {
            self.waits += 1;
            self.open += 1;
            let wait = Descriptor::Wait {
                status: Some(StatusWrite { address: STATUS, data: self.waits }),
                interrupt: self.random.below(1000) == 0,
                fence: false,
                drain_page_requests: false,
            };
            let [low, high, ..] = wait.encode();
            let at = QUEUE + self.tail;
            self.steps.extend([Step::Write64(at, low), Step::Write64(at + 8, high)]);
            self.tail = (self.tail + 32) % (32 * DESCRIPTORS);
        }
        let tail = REGISTERS + regs::IQT;
        self.steps.push(match self.random.below(2) {
            0 => Step::Write64(tail, self.tail),
            _ => Step::Write32(tail, self.tail as u32),
        });
        if self.random.below(4) == 0 || self.open > DESCRIPTORS / 2 {
            self.await_all();
        }
    }

    /// Awaits the last wait.
    fn await_all(&mut self) {
        self.steps.push(Step::Await { address: STATUS, mask: u32::MAX, value: self.waits });
        self.open = 0;
    }

    fn set_root(&mut self) {
        const SCALABLE: u64 = 1 << 10;
        self.root = ROOTS[self.random.below(2) as usize] | SCALABLE;
        self.write_pair(regs::RTADDR, self.root, [!0x3ff, u32::MAX]);
        self.command(SRTP);
    }

    fn set_interrupt_table(&mut self) {
        self.write_any(regs::IRTA, !0x7f0);
        self.command(SIRTP);
    }

    /// A command, whose status has the same bit.
    fn command(&mut self, command: u32) {
        self.write(regs::GCMD, ENABLED | command);
        let address = REGISTERS + regs::GSTS;
        self.steps.push(Step::Await { address, mask: command, value: command });
    }
}
