// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's commands, and what becomes of them.

use twostage::spec::smmuv3::command::{Command, SyncSignal};
use twostage::spec::smmuv3::queue::{CmdqCons, CommandError};
use twostage::spec::smmuv3::regs;
use twostage::spec::smmuv3::StreamId;
use twostage_emulated::kit::Mmio;

use super::account::is_reserved;
use super::dma::UNKNOWN;
use super::image::page;
use super::naive::{Registers, Walk};
use super::world::{World, DEVICES};
use crate::models::memory::PAGE;
use crate::models::oracle::every;

/// Binary logarithm of the entries of the queue, of a page.
const COMMAND_BITS: u64 = 8;
/// Its index, with the bit that says which round it is.
const COMMAND_MASK: u32 = 2 << COMMAND_BITS;

/// What became of commands and the CMD_SYNC after them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// All are complete, or this one, by number, is the first that is wrong.
    pub wrong: Option<usize>,
    /// A CMD_SYNC has told that a device did not answer.
    pub unanswered: bool,
}

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
        self.is_consumed()
    }

    fn is_consumed(&self) -> bool {
        self.command_error().is_none()
            && self.read32(regs::CMDQ_CONS) == self.read32(regs::CMDQ_PROD)
    }

    /// Why the queue stands, if it does.
    fn command_error(&self) -> Option<CommandError> {
        let errors = self.read32(regs::GERROR) ^ self.read32(regs::GERRORN);
        let code = CmdqCons::from_bits(self.read32(regs::CMDQ_CONS)).err();
        let error = || CommandError::from_code(code).expect("it says why");
        (errors & 1 != 0).then(error)
    }

    /// Submits `commands`, and if they are complete, has the account know. Whether they are, and
    /// all devices have answered.
    pub fn say(&mut self, commands: &[Command]) -> bool {
        self.ended(commands) == Ended { wrong: None, unanswered: false }
    }

    pub fn ended(&mut self, commands: &[Command]) -> Ended {
        let words: Vec<_> = commands.iter().map(Command::encode).collect();
        self.asked.may_have_ended(commands);
        self.make_usable();
        let start = self.read32(regs::CMDQ_PROD);
        let before = self.read32(regs::EVENTQ_PROD);
        let mut done = self.submit(&words, true);
        // The last one is of the submission.
        let is_sync = |command: &&Command| matches!(command, Command::Sync { .. });
        let mut syncs = commands.iter().filter(is_sync).count() + 1;
        let mut unanswered = false;
        while self.command_error() == Some(CommandError::AtcInvSync) {
            assert_ne!(syncs, 0, "a CMD_SYNC tells twice");
            syncs -= 1;
            unanswered = true;
            // The CMD_SYNC is consumed again.
            self.smmu.write32(regs::GERRORN, self.read32(regs::GERRORN) ^ 1);
            done = self.is_consumed();
        }
        if done {
            let now = self.memory.tick();
            for command in commands {
                if !self.is_for_silent(command) {
                    self.account.complete(*command, now);
                }
            }
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
        let read = CmdqCons::from_bits(self.read32(regs::CMDQ_CONS)).rd();
        let number = (read.wrapping_sub(start) % COMMAND_MASK) as usize;
        // All, where something else than a command is wrong.
        let wrong = (!done).then_some(number);
        self.take_answers();
        Ended { wrong, unanswered }
    }

    /// The same, and checks what becomes of them, as far as that is known.
    pub fn command(&mut self, commands: &[Command]) {
        if self.failures.are_due() {
            return self.command_that_may_fail(commands);
        }
        let wrong = commands.iter().position(|command| !self.accepts(command));
        let (asked, before) = (self.asks_silent(commands), self.is_unanswered);
        let ended = self.ended(commands);
        crate::models::trace(|| format!("  {commands:x?}: {ended:?}"));
        let what = || format!("{ended:?}, {asked:?}: {commands:x?}; {:x?}", self.header);
        let may_block = self.failures.may_block;
        // What is due since a verb failed ends with everything blocked, if a device is silent.
        let may_stop = may_block && self.silent.contains(&true);
        assert!(ended.wrong == wrong || may_stop, "{}", what());
        // A CMD_SYNC tells of all commands before it.
        match (wrong, asked) {
            (None, Some(true)) if !may_block => assert!(ended.unanswered, "{}", what()),
            (_, Some(false)) if !before => assert!(!ended.unanswered, "{}", what()),
            _ => {}
        }
        self.is_unanswered = ended.wrong.is_some() && (before || asked != Some(false));
        if ended.wrong.is_none() {
            self.may_repair(commands);
        }
    }

    fn is_for_silent(&self, command: &Command) -> bool {
        let Command::AtcInv { stream, .. } = command else { return false };
        let number = DEVICES.iter().position(|rid| u32::from(*rid) == stream.raw());
        number.is_some_and(|number| self.silent[number])
    }

    /// Whether one of `commands` reaches a device that does not answer; `None`: perhaps.
    fn asks_silent(&self, commands: &[Command]) -> Option<bool> {
        let mut may = false;
        for command in commands.iter().filter(|command| self.is_for_silent(command)) {
            let Command::AtcInv { stream, .. } = *command else { continue };
            match self.may_cache(stream) {
                Some(true) => return Some(true),
                found => may |= found.is_none(),
            }
        }
        (!may).then_some(false)
    }

    /// Whether the device of `stream` may cache translations; `None`: not known.
    fn may_cache(&self, stream: StreamId) -> Option<bool> {
        let rid = DEVICES.iter().position(|rid| u32::from(*rid) == stream.raw());
        if !self.is_enabled() || !rid.is_some_and(|number| self.plugged[number]) {
            return Some(false);
        }
        let since = self.account.of(stream.raw().into());
        let all = every(&self.memory, UNKNOWN, |words| {
            let mut walk = Walk { words, registers: self.registers(), since: &since };
            walk.may_cache(stream.raw().into())
        })?;
        (all.len() == 1).then(|| all[0])
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
