// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Statistics of a virtual SMMUv3.

use crate::counters::Counter;
use crate::spec::smmuv3::command::Command;

crate::counters! {
    /// Statistics of a virtual SMMUv3.
    #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
    pub struct SmmuCounters;
    /// The counters as they run: a snapshot reads one after the other, not all at one moment.
    running pub(super) struct Counters of Counter {
        /// Register reads by the guest.
        register_reads,
        /// Register writes by the guest.
        register_writes,
        /// CMD_PREFETCH_CONFIG, CMD_PREFETCH_ADDR.
        prefetch,
        /// CMD_CFGI_STE.
        cfgi_ste,
        /// CMD_CFGI_STE_RANGE, CMD_CFGI_ALL.
        cfgi_ste_range,
        /// CMD_CFGI_CD.
        cfgi_cd,
        /// CMD_CFGI_CD_ALL.
        cfgi_cd_all,
        /// CMD_TLBI_NH_ALL.
        tlbi_nh_all,
        /// CMD_TLBI_NH_ASID.
        tlbi_nh_asid,
        /// CMD_TLBI_NH_VA.
        tlbi_nh_va,
        /// CMD_TLBI_NH_VAA.
        tlbi_nh_vaa,
        /// CMD_TLBI_NSNH_ALL.
        tlbi_nsnh_all,
        /// CMD_TLBI_* of EL2 and stage 2.
        tlbi_other,
        /// CMD_ATC_INV.
        atc_inv,
        /// CMD_PRI_RESP, CMD_RESUME, CMD_STALL_TERM.
        responses,
        /// CMD_SYNC.
        sync,
        /// Invalidation batches given to the host: one call each.
        batches,
        /// Commands in them.
        invalidations,
        /// Times that stream table entries were read again for all that a command, or an enable,
        /// names.
        evaluations,
        /// Policies given to the host.
        policies,
        /// Events written to the event queue.
        events_recorded,
        /// Events lost for lack of space or memory, and reports of lost events by the host.
        events_lost,
        /// Events suppressed.
        events_suppressed,
        /// Times the command queue stopped with an error.
        command_errors,
        /// Other mistakes of the guest: ignored writes, messages to invalid addresses.
        guest_errors,
        /// Requests refused by the host.
        host_errors,
    }
}

impl Counters {
    /// Counts a command by its opcode.
    pub fn command(&self, command: &Command) {
        let counter = match command {
            Command::PrefetchConfig { .. } | Command::PrefetchAddr { .. } => &self.prefetch,
            Command::CfgiSte { .. } => &self.cfgi_ste,
            Command::CfgiSteRange { .. } => &self.cfgi_ste_range,
            Command::CfgiCd { .. } => &self.cfgi_cd,
            Command::CfgiCdAll { .. } => &self.cfgi_cd_all,
            Command::TlbiNhAll { .. } => &self.tlbi_nh_all,
            Command::TlbiNhAsid { .. } => &self.tlbi_nh_asid,
            Command::TlbiNhVa { .. } => &self.tlbi_nh_va,
            Command::TlbiNhVaa { .. } => &self.tlbi_nh_vaa,
            Command::TlbiNsnhAll => &self.tlbi_nsnh_all,
            Command::TlbiEl2All
            | Command::TlbiEl2Asid { .. }
            | Command::TlbiEl2Va { .. }
            | Command::TlbiEl2Vaa { .. }
            | Command::TlbiS12Vmall { .. }
            | Command::TlbiS2Ipa { .. } => &self.tlbi_other,
            Command::AtcInv { .. } => &self.atc_inv,
            Command::PriResp { .. } | Command::Resume { .. } | Command::StallTerm { .. } => {
                &self.responses
            }
            Command::Sync { .. } => &self.sync,
        };
        counter.count();
    }
}
