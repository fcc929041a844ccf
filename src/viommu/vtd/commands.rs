// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The global command register (§11.4.4): each command is complete when its write returns, or its
//! status does not say so. That is when the host lets a requester keep what the guest takes back:
//! the guest may give the command again.

use super::apply::NotApplied;
use super::state::Registers;
use super::VtdIommu;
use crate::spec::vtd::regs::{Gcmd, QueuePointer};
use crate::viommu::Invalidation;

impl VtdIommu {
    /// Carries out what `command` changes. Drivers change one thing a write; where several change,
    /// pointers come first and translation last, so that nothing is enabled half-way. The queue is
    /// worked through after all of them.
    pub(super) fn global_command(&self, registers: &mut Registers, command: Gcmd) {
        if command.srtp() {
            self.set_root_table_pointer(registers);
        }
        if command.sirtp() && self.caps.ecap.ir() {
            self.set_interrupt_table_pointer(registers);
        }
        if command.qie() != registers.gsts.qies() {
            self.set_queue_enabled(registers, command.qie());
        }
        // Differs from TES where the command before could not be completed.
        let translating = self.requesters.is_translating();
        if command.te() != registers.gsts.tes() || command.te() != translating {
            self.set_translation_enabled(registers, command.te());
        }
        if self.caps.ecap.ir() {
            self.set_interrupt_remapping(registers, command);
        }
        // WBF has nothing to flush (CAP.RWBF), SFL and EAFL no log (CAP.AFL), and without ECAP.IR
        // there is nothing to remap: such bits are ignored, and their status stays clear.
    }

    /// Latches RTADDR. Caches are emptied with it (CAP.ESRTPS).
    fn set_root_table_pointer(&self, registers: &mut Registers) {
        registers.gsts.set_rtps(false);
        registers.root = Some(registers.rtaddr);
        // What the host could not empty it has blocked: that is logged, and where translation is
        // enabled the policies are given anew right after.
        let mut applied = match self.invalidate_host(&[Invalidation::ALL]) {
            Err(error) if error.still_reachable => Err(NotApplied::StillReachable),
            _ => Ok(()),
        };
        if registers.gsts.tes() {
            applied = applied.and(self.enable_translation(registers.root));
        }
        registers.gsts.set_rtps(applied.is_ok());
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
        if !enabled {
            registers.iqh = QueuePointer::new();
            registers.unanswered = None;
        }
    }

    /// Requesters are blocked or served by their tables before TES is set, and pass before it is
    /// cleared.
    fn set_translation_enabled(&self, registers: &mut Registers, enabled: bool) {
        let applied = if enabled {
            self.enable_translation(registers.root)
        } else {
            self.disable_translation()
        };
        if applied.is_ok() {
            registers.gsts.set_tes(enabled);
        }
    }
}
