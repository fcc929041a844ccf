// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's commands, and what becomes of them.

use twostage::spec::smmuv3::command::{Command, SyncSignal};
use twostage::spec::smmuv3::regs;
use twostage::spec::smmuv3::StreamId;
use twostage_emulated::kit::Mmio;

use super::account::is_reserved;
use super::image::page;
use super::naive::Registers;
use super::world::{World, DEVICES};
use crate::models::memory::PAGE;

/// Binary logarithm of the entries of the queue, of a page.
const COMMAND_BITS: u64 = 8;
/// Its index, with the bit that says which round it is.
const COMMAND_MASK: u32 = 2 << COMMAND_BITS;

impl World {
    /// The queues, empty.
    pub fn start_queue(&mut self) {
        let cr0 = self.cr0();
        if cr0.cmdqen() || cr0.eventqen() {
            self.write32(regs::CR0, cr0.with_cmdqen(false).with_eventqen(false).into_bits());
        }
        self.write32(regs::GERRORN, self.read32(regs::GERROR));
        self.write64(regs::CMDQ_BASE, (page::COMMANDS * PAGE) | COMMAND_BITS);
        self.write64(regs::CMDQ_PROD, 0);
        self.write64(regs::EVENTQ_BASE, (page::EVENTS * PAGE) | self.event_bits());
        self.write32(regs::EVENTQ_PROD, 0);
        self.write32(regs::EVENTQ_CONS, 0);
        let cr0 = self.cr0().with_cmdqen(true).with_eventqen(true);
        self.write32(regs::CR0, cr0.into_bits());
    }

    /// Starts the queue again if it stands, or is elsewhere.
    fn make_usable(&mut self) {
        let (prod, cons) = (self.read32(regs::CMDQ_PROD), self.read32(regs::CMDQ_CONS));
        let errors = self.read32(regs::GERROR) ^ self.read32(regs::GERRORN);
        let is_usable = self.cr0().cmdqen()
            && errors & 1 == 0
            && self.read64(regs::CMDQ_BASE) == (page::COMMANDS * PAGE) | COMMAND_BITS
            && prod < COMMAND_MASK
            && prod == cons & (COMMAND_MASK - 1);
        if !is_usable {
            self.start_queue();
        }
    }

    /// Puts `commands` into the queue, with a CMD_SYNC if `sync`, and writes CMDQ_PROD. Whether all
    /// are consumed.
    pub fn submit(&mut self, commands: &[[u64; 2]], sync: bool) -> bool {
        self.make_usable();
        let mut prod = self.read32(regs::CMDQ_PROD);
        let end = Command::Sync { signal: SyncSignal::None }.encode();
        for words in commands.iter().chain(sync.then_some(&end)) {
            let at = page::COMMANDS * PAGE + u64::from(prod % (1 << COMMAND_BITS)) * 16;
            self.memory.put(at, words[0]);
            self.memory.put(at + 8, words[1]);
            prod = (prod + 1) % COMMAND_MASK;
        }
        self.is_quiet = false;
        self.smmu.write32(regs::CMDQ_PROD, prod);
        let errors = self.read32(regs::GERROR) ^ self.read32(regs::GERRORN);
        self.read32(regs::CMDQ_CONS) == prod && errors & 1 == 0
    }

    /// Submits `commands`, and if they are complete, has the account know.
    pub fn say(&mut self, commands: &[Command]) -> bool {
        let words: Vec<_> = commands.iter().map(Command::encode).collect();
        self.make_usable();
        let before = self.read32(regs::EVENTQ_PROD);
        let done = self.submit(&words, true);
        if done {
            let now = self.memory.tick();
            commands.iter().for_each(|command| self.account.complete(*command, now));
        }
        match done && self.has_stalls() {
            true => {
                let (count, _) = self.events_since(before);
                let at = |number| before.wrapping_add(number);
                let records: Vec<_> = (0..count).map(|number| self.event_at(at(number))).collect();
                self.ended_by(commands, &records);
            }
            false => self.may_end(),
        }
        self.take_answers();
        done
    }

    /// The same, and checks whether they are, as far as that is known.
    pub fn command(&mut self, commands: &[Command]) {
        let accepted = commands.iter().all(|command| self.accepts(command));
        let done = self.say(commands);
        let is_silent = |stream: &StreamId| {
            let number = DEVICES.iter().position(|rid| u32::from(*rid) == stream.raw());
            number.is_some_and(|number| self.silent[number])
        };
        let asks_silent = commands
            .iter()
            .any(|command| matches!(command, Command::AtcInv { stream, .. } if is_silent(stream)));
        // A CMD_SYNC tells of all commands before it.
        let may_fail = asks_silent || self.is_unanswered;
        self.is_unanswered = may_fail && !done;
        crate::models::trace(|| format!("  {commands:x?}: {done}"));
        if !may_fail {
            assert_eq!(done, accepted, "{commands:x?}; {:x?}", self.header);
        }
    }

    /// Whether the SMMU executes `command` (§4), and a device that it is for answers.
    pub fn accepts(&self, command: &Command) -> bool {
        let Registers { idr0, .. } = self.registers();
        // IDR0.ATS, PRI and STALL_MODEL.
        match *command {
            Command::AtcInv { size, .. } => idr0 >> 10 & 1 != 0 && size <= 52,
            Command::PriResp { response, .. } => idr0 >> 16 & 1 != 0 && response < 3,
            Command::Resume { .. } | Command::StallTerm { .. } => idr0 >> 24 & 3 != 1,
            Command::TlbiNhVa { range, .. } | Command::TlbiNhVaa { range, .. } => {
                !is_reserved(&range)
            }
            _ => true,
        }
    }
}
