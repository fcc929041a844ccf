// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a virtual SMMUv3 has done, in numbers.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::spec::smmuv3::command::Command;

/// One more than the highest opcode (CMD_SYNC's).
const OPCODES: usize = 0x47;

/// The counters as they run. Each is read alone, not all of one moment.
#[derive(Debug)]
pub(super) struct Counters {
    commands: [AtomicU64; OPCODES],
    pub register_reads: AtomicU64,
    pub register_writes: AtomicU64,
    pub batches: AtomicU64,
    pub invalidations: AtomicU64,
    pub evaluations: AtomicU64,
    pub policies: AtomicU64,
    pub events_recorded: AtomicU64,
    pub events_lost: AtomicU64,
    pub events_suppressed: AtomicU64,
    pub command_errors: AtomicU64,
    pub guest_errors: AtomicU64,
    pub host_errors: AtomicU64,
}

impl Default for Counters {
    fn default() -> Self {
        let zero = AtomicU64::default;
        Self {
            commands: std::array::from_fn(|_| zero()),
            register_reads: zero(),
            register_writes: zero(),
            batches: zero(),
            invalidations: zero(),
            evaluations: zero(),
            policies: zero(),
            events_recorded: zero(),
            events_lost: zero(),
            events_suppressed: zero(),
            command_errors: zero(),
            guest_errors: zero(),
            host_errors: zero(),
        }
    }
}

/// Adds one.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Counters {
    /// Counts a command by its opcode.
    pub fn command(&self, command: &Command) {
        if let Some(counter) = self.commands.get(usize::from(command.opcode())) {
            count(counter);
        }
    }

    pub fn snapshot(&self) -> SmmuCounters {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let commands = |opcodes: &[usize]| {
            opcodes.iter().filter_map(|&opcode| self.commands.get(opcode)).map(of).sum()
        };
        SmmuCounters {
            register_reads: of(&self.register_reads),
            register_writes: of(&self.register_writes),
            prefetch: commands(&[0x01, 0x02]),
            cfgi_ste: commands(&[0x03]),
            cfgi_ste_range: commands(&[0x04]),
            cfgi_cd: commands(&[0x05]),
            cfgi_cd_all: commands(&[0x06]),
            tlbi_nh_all: commands(&[0x10]),
            tlbi_nh_asid: commands(&[0x11]),
            tlbi_nh_va: commands(&[0x12]),
            tlbi_nh_vaa: commands(&[0x13]),
            tlbi_nsnh_all: commands(&[0x30]),
            tlbi_other: commands(&[0x20, 0x21, 0x22, 0x23, 0x28, 0x2a]),
            atc_inv: commands(&[0x40]),
            responses: commands(&[0x41, 0x44, 0x45]),
            sync: commands(&[0x46]),
            batches: of(&self.batches),
            invalidations: of(&self.invalidations),
            evaluations: of(&self.evaluations),
            policies: of(&self.policies),
            events_recorded: of(&self.events_recorded),
            events_lost: of(&self.events_lost),
            events_suppressed: of(&self.events_suppressed),
            command_errors: of(&self.command_errors),
            guest_errors: of(&self.guest_errors),
            host_errors: of(&self.host_errors),
        }
    }
}

/// What a virtual SMMUv3 has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct SmmuCounters {
    /// Register reads by the guest.
    pub register_reads: u64,
    /// Register writes by the guest.
    pub register_writes: u64,
    /// CMD_PREFETCH_CONFIG, CMD_PREFETCH_ADDR.
    pub prefetch: u64,
    /// CMD_CFGI_STE.
    pub cfgi_ste: u64,
    /// CMD_CFGI_STE_RANGE, CMD_CFGI_ALL.
    pub cfgi_ste_range: u64,
    /// CMD_CFGI_CD.
    pub cfgi_cd: u64,
    /// CMD_CFGI_CD_ALL.
    pub cfgi_cd_all: u64,
    /// CMD_TLBI_NH_ALL.
    pub tlbi_nh_all: u64,
    /// CMD_TLBI_NH_ASID.
    pub tlbi_nh_asid: u64,
    /// CMD_TLBI_NH_VA.
    pub tlbi_nh_va: u64,
    /// CMD_TLBI_NH_VAA.
    pub tlbi_nh_vaa: u64,
    /// CMD_TLBI_NSNH_ALL.
    pub tlbi_nsnh_all: u64,
    /// CMD_TLBI_* of EL2 and stage 2.
    pub tlbi_other: u64,
    /// CMD_ATC_INV.
    pub atc_inv: u64,
    /// CMD_PRI_RESP, CMD_RESUME, CMD_STALL_TERM.
    pub responses: u64,
    /// CMD_SYNC.
    pub sync: u64,
    /// Invalidation batches given to the host: one call each.
    pub batches: u64,
    /// Commands in them.
    pub invalidations: u64,
    /// Times that stream table entries were read anew for all that a command, or an enable, names.
    pub evaluations: u64,
    /// Policies given to the host.
    pub policies: u64,
    /// Events in the event queue.
    pub events_recorded: u64,
    /// Events that found no room or no memory, and times that the host said it lost some.
    pub events_lost: u64,
    /// Events that the guest is not to be told of.
    pub events_suppressed: u64,
    /// Times the command queue stopped with an error.
    pub command_errors: u64,
    /// Other mistakes of the guest: writes that were ignored, messages to where nothing is.
    pub guest_errors: u64,
    /// Requests that the host refused.
    pub host_errors: u64,
}
