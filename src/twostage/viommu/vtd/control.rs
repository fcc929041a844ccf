// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The global command register (§11.4.4), the register-based invalidation interface (§6.5.1,
//! §11.4.6), and the completion of commands of any register.
//!
//! Each command is complete when its write returns, or its status does not say so: when the host
//! leaves a requester with a revoked mapping, the guest may repeat the command.
//!
//! A command that concerns many requesters is *under way* until all of them are done. The registers
//! are unlocked in between, with the old status; a thread that comes with another command, or works
//! through the queue, first continues the one under way.

use std::sync::MutexGuard;

use super::apply::Scope;
use super::evaluation::{Budget, By, Evaluation};
use super::host_side::{Invalidation, Progress};
use super::queue::{Pass, Slice};
use super::state::Registers;
use super::{Locked, VtdIommu};
use crate::spec::pci::Bdf;
use crate::spec::vtd::qi::{AddressMask, ContextScope, IotlbScope};
use crate::spec::vtd::regs::{
    Ccmd, ContextGranularity, Gcmd, IotlbGranularity, IotlbReg, QueuePointer, Rtaddr,
    TranslationTableMode,
};
use crate::spec::vtd::PAGE_SHIFT;
use crate::viommu::ledger::{Applied, NotApplied};
use crate::viommu::{HostSideError, Requester};

/// Work in progress that is not acknowledged yet. Changed with the registers locked only.
#[derive(Debug, Default)]
pub(super) struct UnderWay {
    command: Option<Command>,
    /// The invalidations at the head of the queue.
    pub queue: Option<Pass>,
    /// An empty one, for its memory: a batch takes no allocation.
    pub spare: Option<Pass>,
}

/// A command of a register.
#[derive(Debug)]
struct Command {
    what: What,
    then: Then,
}

/// The current step of a command.
#[derive(Debug)]
enum What {
    Invalidate(Invalidation, Progress),
    Evaluate(Evaluation),
}

/// What to do after the host part of a command.
#[derive(Debug, Clone, Copy)]
enum Then {
    /// Set RTPS, if everything went well; then execute the rest of the command.
    RootTable {
        /// Whether everything went well so far.
        applied: Applied,
        /// The command that SRTP is part of.
        rest: Gcmd,
    },
    /// Set TES to this.
    Translation(bool),
    /// Report in CAIG what was done, and clear ICC.
    Context(ContextGranularity),
    /// Report in IAIG what was done, and clear IVT.
    Iotlb(IotlbGranularity),
    /// The same, but nothing was done.
    Failed,
}

impl UnderWay {
    /// Whether translation is being disabled, and already is for `requester`.
    pub fn has_disabled(&self, requester: Requester) -> bool {
        let command = self.command.as_ref().map(|command| &command.what);
        matches!(command, Some(What::Evaluate(evaluation))
            if evaluation.by() == By::Nothing && evaluation.has_passed(requester))
    }
}

impl VtdIommu {
    pub(super) fn under_way(&self) -> MutexGuard<'_, UnderWay> {
        self.under_way.lock()
    }

    /// Locks the registers once no command is under way.
    pub(super) fn lock_idle(&self) -> Locked<'_, Registers> {
        loop {
            let mut registers = self.lock();
            if self.run_command(&mut registers) == Slice::Done {
                return registers;
            }
        }
    }

    /// Continues the command under way for one slice.
    pub(super) fn run_command(&self, registers: &mut Registers) -> Slice {
        let Some(mut command) = self.under_way().command.take() else { return Slice::Done };
        if self.is_halted() {
            // Never to be acknowledged.
            return Slice::Done;
        }
        let over = match &mut command.what {
            What::Invalidate(invalidation, progress) => {
                let batch = [*invalidation];
                let result = self.invalidate_host(&batch, progress);
                let failed = self.note_failure(&mut command.then, result);
                progress.is_done() || failed
            }
            What::Evaluate(evaluation) => {
                let mut budget = Budget::default();
                match self.evaluate(evaluation, registers.root, &mut budget) {
                    None => false,
                    Some(applied) => {
                        self.acknowledge(registers, command.then, applied);
                        return self.command_left();
                    }
                }
            }
        };
        if over {
            self.after_invalidation(registers, command.then);
        } else {
            self.under_way().command = Some(command);
        }
        self.command_left()
    }

    fn command_left(&self) -> Slice {
        match self.under_way().command {
            Some(_) => Slice::More,
            None => Slice::Done,
        }
    }

    /// Handles a failed invalidation of a command. Returns whether the command ends with it.
    fn note_failure(&self, then: &mut Then, result: Result<(), HostSideError>) -> bool {
        match (then, result) {
            (_, Ok(())) => false,
            // What the host could not invalidate it has blocked: that is logged, and if translation
            // is enabled, the policies are given again right after.
            (Then::RootTable { applied, .. }, Err(error)) => {
                if error.still_reachable {
                    *applied = Err(NotApplied::Host);
                }
                false
            }
            (then, Err(_)) => {
                *then = Then::Failed;
                true
            }
        }
    }

    /// The invalidation of a command is done: now for the tables.
    fn after_invalidation(&self, registers: &mut Registers, then: Then) {
        match then {
            Then::RootTable { .. } if registers.gsts.tes() => {
                self.requesters.set_translating(true, registers.root);
                self.begin_command(Scope::Global, By::Tables, then);
            }
            Then::Iotlb(_) if self.must_reapply(registers) => {
                self.begin_command(Scope::Unapplied, By::Tables, then);
            }
            then => self.acknowledge(registers, then, Ok(())),
        }
    }

    /// Starts a command with an invalidation.
    fn begin_invalidation(&self, invalidation: Invalidation, then: Then) {
        let what = What::Invalidate(invalidation, Progress::default());
        self.under_way().command = Some(Command { what, then });
    }

    /// Starts a command.
    fn begin_command(&self, scope: Scope, by: By, then: Then) {
        if by == By::Tables && scope != Scope::Unapplied {
            self.counters.evaluations.count();
        }
        let what = What::Evaluate(Evaluation::new(scope, by));
        self.under_way().command = Some(Command { what, then });
    }

    fn acknowledge(&self, registers: &mut Registers, then: Then, applied: Applied) {
        match then {
            Then::RootTable { applied: before, rest } => {
                registers.gsts.set_rtps(before.and(applied).is_ok());
                self.rest_of_global_command(registers, rest);
            }
            Then::Translation(enabled) if applied.is_ok() => {
                registers.gsts.set_tes(enabled);
                if !enabled {
                    self.requesters.set_translating(false, None);
                }
            }
            // Not all requesters pass: all follow their tables again, as TES says.
            Then::Translation(false) if registers.gsts.tes() => {
                self.begin_command(Scope::Global, By::Tables, Then::Translation(true));
            }
            // Nor can all: what passes still is given again before an invalidation is complete.
            Then::Translation(true) if registers.gsts.tes() => self.requesters.set_unapplied(),
            Then::Translation(_) => {}
            Then::Context(granularity) => {
                self.acknowledge_context_command(registers, applied.ok().and(Some(granularity)));
            }
            Then::Iotlb(granularity) => {
                self.acknowledge_iotlb_command(registers, applied.ok().and(Some(granularity)));
            }
            Then::Failed => self.acknowledge_iotlb_command(registers, None),
        }
    }

    /// Executes the changes of `command`. Drivers change one thing per write; if several change,
    /// pointers come first and translation last, so that nothing is enabled half-way. The queue is
    /// processed after all of them.
    pub(super) fn global_command(&self, registers: &mut Registers, command: Gcmd) {
        if command.srtp() {
            self.set_root_table_pointer(registers, command);
        } else {
            self.rest_of_global_command(registers, command);
        }
    }

    /// All of a command except SRTP.
    fn rest_of_global_command(&self, registers: &mut Registers, command: Gcmd) {
        if command.sirtp() && self.caps.ecap.ir() {
            self.set_interrupt_table_pointer(registers);
        }
        if command.qie() != registers.gsts.qies() {
            self.set_queue_enabled(registers, command.qie());
        }
        if self.caps.ecap.ir() {
            self.set_interrupt_remapping(registers, command);
        }
        // Differs from TES if an earlier command could not be completed.
        let translating = self.requesters.is_translating();
        if command.te() != registers.gsts.tes() || command.te() != translating {
            if let (Some(observer), true, false) =
                (&self.observer, registers.gsts.tes(), command.te())
            {
                observer.disabling_translation();
            }
            self.set_translation_enabled(registers, command.te());
        } else if self.must_reapply(registers) {
            self.begin_command(Scope::Unapplied, By::Tables, Then::Translation(true));
        }
        // WBF has nothing to flush (CAP.RWBF), SFL and EAFL no log (CAP.AFL), and without ECAP.IR
        // there is nothing to remap: these bits are ignored, and their status stays clear.
    }

    /// Latches RTADDR. This also invalidates the caches (CAP.ESRTPS).
    fn set_root_table_pointer(&self, registers: &mut Registers, command: Gcmd) {
        registers.gsts.set_rtps(false);
        registers.root = Some(registers.rtaddr);
        if registers.rtaddr.mode() == TranslationTableMode::Legacy && self.caps.cap.sagaw() == 0 {
            self.guest_error(format_args!(
                "a legacy-mode root table, which translates nothing: CAP.SAGAW is 0, as \
                 second-stage tables are not offered"
            ));
        }
        let then = Then::RootTable { applied: Ok(()), rest: command };
        self.begin_invalidation(Invalidation::ALL, then);
    }

    fn set_interrupt_remapping(&self, registers: &mut Registers, command: Gcmd) {
        let before = registers.gsts;
        registers.gsts.set_ires(command.ire());
        registers.gsts.set_cfis(command.cfi());
        if registers.gsts != before {
            self.publish_remapping(registers);
        }
    }

    fn set_queue_enabled(&self, registers: &mut Registers, enabled: bool) {
        registers.gsts.set_qies(enabled);
        // Invalidations under way are not acknowledged: the head is at the start.
        self.under_way().queue = None;
        if !enabled {
            registers.iqh = QueuePointer::new();
            registers.unanswered = None;
        }
    }

    /// Requesters follow their tables, or are blocked, before TES is set, and pass before it is
    /// cleared.
    fn set_translation_enabled(&self, registers: &Registers, enabled: bool) {
        let by = if enabled { By::Tables } else { By::Nothing };
        if enabled {
            self.requesters.set_translating(true, registers.root);
        }
        self.begin_command(Scope::Global, by, Then::Translation(enabled));
    }

    /// CCMD.ICC was written as 1. Afterwards ICC is cleared and CAIG reports what was done:
    /// nothing, if the register-based interface may not be used, the request is reserved or the
    /// host fails.
    pub(super) fn context_command(&self, registers: &mut Registers) {
        let command = registers.ccmd;
        let granularity = ContextGranularity::from_bits(command.cirg())
            .filter(|_| register_interface_allowed(registers));
        let scope = granularity.map(|granularity| match granularity {
            ContextGranularity::Global => ContextScope::Global,
            ContextGranularity::Domain => ContextScope::Domain(command.did()),
            ContextGranularity::Device => ContextScope::Device {
                domain: command.did(),
                source: Bdf::from_raw(command.sid()),
                function_mask: command.fm(),
            },
        });
        let (Some(scope), Some(granularity)) = (scope, granularity) else {
            let what = "a context command that is not allowed";
            self.guest_error(format_args!("{what}: {command:?}"));
            return self.acknowledge_context_command(registers, None);
        };
        if registers.gsts.tes() {
            let scope = Scope::of_contexts(scope, registers.root.map(Rtaddr::mode));
            return self.begin_command(scope, By::Tables, Then::Context(granularity));
        }
        self.acknowledge_context_command(registers, Some(granularity));
    }

    /// Clears ICC, and reports in CAIG what was done.
    fn acknowledge_context_command(
        &self,
        registers: &mut Registers,
        done: Option<ContextGranularity>,
    ) {
        let done = done.map_or(0, ContextGranularity::into_bits);
        registers.ccmd = Ccmd::with_caig(registers.ccmd, done).with_icc(false);
    }

    /// IOTLB.IVT was written as 1. IAIG reports what was done, like CAIG.
    pub(super) fn iotlb_command(&self, registers: &mut Registers) {
        let command = registers.iotlb;
        let iva = registers.iva;
        let granularity = IotlbGranularity::from_bits(command.iirg())
            .filter(|_| register_interface_allowed(registers))
            // A mask larger than offered widens to the domain.
            .map(|granularity| match granularity {
                IotlbGranularity::Page if iva.am() > self.caps.cap.mamv() => {
                    IotlbGranularity::Domain
                }
                granularity => granularity,
            });
        let scope = granularity.map(|granularity| match granularity {
            IotlbGranularity::Global => IotlbScope::Global,
            IotlbGranularity::Domain => IotlbScope::Domain(command.did()),
            IotlbGranularity::Page => IotlbScope::Pages {
                domain: command.did(),
                range: AddressMask {
                    address: iva.addr() << PAGE_SHIFT,
                    mask: iva.am(),
                    leaf: iva.ih(),
                },
            },
        });
        let (Some(scope), Some(granularity)) = (scope, granularity) else {
            self.guest_error(format_args!("an IOTLB command that is not allowed: {command:?}"));
            return self.acknowledge_iotlb_command(registers, None);
        };
        self.begin_invalidation(Invalidation::of_scope(scope), Then::Iotlb(granularity));
    }

    /// Clears IVT, and reports in IAIG what was done.
    fn acknowledge_iotlb_command(&self, registers: &mut Registers, done: Option<IotlbGranularity>) {
        let done = done.map_or(0, IotlbGranularity::into_bits);
        registers.iotlb = IotlbReg::with_iaig(registers.iotlb, done).with_ivt(false);
    }
}

/// Whether the register-based interface may be used: not together with the queue, and not in
/// scalable mode, which has queued invalidation only (§6.5).
fn register_interface_allowed(registers: &Registers) -> bool {
    let mode = registers.root.map(Rtaddr::mode);
    !registers.gsts.qies() && mode != Some(TranslationTableMode::Scalable)
}
