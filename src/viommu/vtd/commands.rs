// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The global command register (§11.4.4): each command is complete when its write returns.

use super::state::Registers;
use super::VtdIommu;
use crate::spec::vtd::regs::{Gcmd, QueuePointer};
use crate::viommu::Invalidation;

impl VtdIommu {
    /// Carries out what `command` changes. Drivers change one thing a write; where several change,
    /// pointers come first and translation last, so that nothing is enabled half-way.
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
        if command.te() != registers.gsts.tes() {
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
        registers.root = Some(registers.rtaddr);
        // The command cannot fail. What the host could not empty it has blocked: that is logged,
        // and where translation is enabled the policies are given anew right after.
        let _ = self.invalidate_host(&[Invalidation::ALL]);
        if registers.gsts.tes() {
            self.enable_translation(registers.root);
        }
        registers.gsts.set_rtps(true);
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
        if enabled {
            self.run_queue(registers);
        } else {
            registers.iqh = QueuePointer::new();
        }
    }

    /// Requesters are blocked or served by their tables before TES is set, and pass before it is
    /// cleared.
    fn set_translation_enabled(&self, registers: &mut Registers, enabled: bool) {
        if enabled {
            self.enable_translation(registers.root);
        } else {
            self.disable_translation();
        }
        registers.gsts.set_tes(enabled);
    }
}
