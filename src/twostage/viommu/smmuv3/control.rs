// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Enables (CR0), settings that are fixed while enabled (CR1, CR2), and what applies while
//! translation is disabled (GBPA); §6.3.
//!
//! What a write asks for has been given to the host when the register says so: CR0ACK follows CR0,
//! and GBPA.Update is clear again. If the host leaves a stream with a revoked mapping, these stay
//! unchanged, and the next write retries.

use super::state::Registers;
use super::Smmu;
use crate::spec::smmuv3::regs::{Cr0, Cr1, Cr2, Gbpa};

impl Smmu {
    /// The guest writes CR0. Queues come first, so that events of newly enabled parts are recorded.
    pub(super) fn write_cr0(&self, registers: &mut Registers, value: Cr0) {
        let idr0 = self.caps.idr0;
        let cr0 = Cr0::new()
            .with_smmuen(value.smmuen())
            .with_priqen(value.priqen() && idr0.pri())
            .with_eventqen(value.eventqen())
            .with_cmdqen(value.cmdqen())
            .with_atschk(value.atschk() && idr0.ats());
        registers.cr0 = cr0;
        {
            let mut log = self.fault_log();
            log.events.enabled = cr0.eventqen();
            // In effect while translation is enabled only (§6.3.9.5), which is looked at elsewhere.
            log.pages.enabled = cr0.priqen();
        }
        let smmuen = registers.cr0ack.smmuen();
        registers.cr0ack = cr0.with_smmuen(smmuen);
        // Differs from CR0ACK if an earlier write could not be completed.
        let translating = self.streams.is_translating();
        if cr0.smmuen() != smmuen || cr0.smmuen() != translating {
            if let (Some(observer), true, false) = (&self.observer, smmuen, cr0.smmuen()) {
                observer.disabling_translation();
            }
            let applied = if cr0.smmuen() {
                self.enable_translation(registers)
            } else {
                self.disable_translation(registers)
            };
            if applied.is_ok() {
                registers.cr0ack.set_smmuen(cr0.smmuen());
            }
        } else {
            // What fails once more is given again before a command is complete.
            let _ = self.reapply(registers);
        }
    }

    /// The guest writes CR1: attributes of accesses, which are coherent in any case. Those of
    /// enabled parts are fixed.
    pub(super) fn write_cr1(&self, registers: &mut Registers, value: Cr1) {
        let Registers { cr0, cr0ack, cr1, .. } = *registers;
        let queues = [cr0, cr0ack].iter().any(|cr0| cr0.cmdqen() || cr0.eventqen());
        registers.cr1 = Cr1::new()
            .with_queue(if queues { cr1.queue() } else { value.queue() })
            .with_table(if registers.smmu_in_use() { cr1.table() } else { value.table() });
    }

    /// The guest writes CR2, which is fixed while translation is enabled.
    pub(super) fn write_cr2(&self, registers: &mut Registers, value: Cr2) {
        if registers.smmu_in_use() {
            self.guest_error(format_args!("CR2 is written while SMMUEN is set"));
            return;
        }
        registers.cr2 = Cr2::new()
            .with_e2h(value.e2h() && self.caps.idr0.hyp())
            .with_recinvsid(value.recinvsid())
            .with_ptm(value.ptm());
        self.streams.set_recording_bad_streams(value.recinvsid());
    }

    /// The guest writes GBPA: without Update it has no effect.
    pub(super) fn write_gbpa(&self, registers: &mut Registers, value: Gbpa) {
        if !value.update() {
            return;
        }
        // Field by field, so that no reserved bit is kept.
        registers.gbpa = Gbpa::new()
            .with_memattr(value.memattr())
            .with_mtcfg(value.mtcfg())
            .with_alloccfg(value.alloccfg())
            .with_shcfg(value.shcfg())
            .with_privcfg(value.privcfg())
            .with_instcfg(value.instcfg())
            .with_abort(value.abort())
            .with_update(true);
        let applied =
            if self.streams.is_translating() { Ok(()) } else { self.bypass_globally(registers) };
        registers.gbpa.set_update(applied.is_err());
    }
}
