// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The state of a virtual SMMUv3 as plain data, and its statistics.

use super::config::SmmuConfig;
use super::fault_log::FaultLog;
use super::host_side::StreamPolicy;
use super::policy::ConfigFault;
use crate::counters::Counter;
use crate::spec::smmuv3::command::Command;
use crate::spec::smmuv3::queue::{CmdqCons, CmdqProd, QueueBase};
use crate::spec::smmuv3::regs::{Cr0, Cr1, Cr2, Gbpa, StrtabBase, StrtabBaseCfg};
use crate::spec::smmuv3::StreamId;

/// The model, in errors.
pub(super) const MODEL: &str = "SMMUv3";

/// Registers except those of events, errors and interrupts, which have a lock of their own.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct Registers {
    /// CR0, as written.
    pub cr0: Cr0,
    /// CR0ACK: the part of it in effect.
    pub cr0ack: Cr0,
    /// CR1.
    pub cr1: Cr1,
    /// CR2.
    pub cr2: Cr2,
    /// GBPA. Update stays set while the host has failed.
    pub gbpa: Gbpa,
    /// STRTAB_BASE.
    pub strtab_base: StrtabBase,
    /// STRTAB_BASE_CFG.
    pub strtab_base_cfg: StrtabBaseCfg,
    /// CMDQ_BASE.
    pub cmdq_base: QueueBase,
    /// CMDQ_PROD.
    pub cmdq_prod: CmdqProd,
    /// CMDQ_CONS: everything before it is complete.
    pub cmdq_cons: CmdqCons,
    /// A device did not answer a CMD_ATC_INV: the next CMD_SYNC says so.
    pub unanswered: bool,
}

impl Default for Registers {
    /// The state after reset: everything is disabled, transactions pass with their own attributes.
    fn default() -> Self {
        Self {
            cr0: Cr0::new(),
            cr0ack: Cr0::new(),
            cr1: Cr1::new(),
            cr2: Cr2::new(),
            gbpa: Gbpa::new().with_shcfg(1),
            strtab_base: StrtabBase::new(),
            strtab_base_cfg: StrtabBaseCfg::new(),
            cmdq_base: QueueBase::new(),
            cmdq_prod: CmdqProd::new(),
            cmdq_cons: CmdqCons::new(),
            unanswered: false,
        }
    }
}

impl Registers {
    /// Whether translation is enabled, or is being enabled or disabled: registers that it depends
    /// on are then fixed.
    pub(super) fn smmu_in_use(&self) -> bool {
        self.cr0.smmuen() || self.cr0ack.smmuen()
    }

    /// The location of the stream table.
    pub(super) fn table_registers(&self) -> TableRegisters {
        TableRegisters { base: self.strtab_base, cfg: self.strtab_base_cfg }
    }
}

/// The location of a stream table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct TableRegisters {
    /// STRTAB_BASE.
    pub base: StrtabBase,
    /// STRTAB_BASE_CFG.
    pub cfg: StrtabBaseCfg,
}

/// All that [`Smmu::restore`](super::Smmu::restore) needs, as plain data: a snapshot.
///
/// With the feature `serde`, any format that keeps the order of fields refuses another version
/// before it reads anything else, and all formats refuse fields that are unknown. What the host has
/// for the SMMU, caches included, is not part of it: that follows from the decisions. So does what
/// is left of the command queue, from CMDQ_CONS.
///
/// ```
/// # #[cfg(feature = "serde")]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use twostage::viommu::smmuv3::SmmuState;
/// # use std::sync::Arc;
/// # use twostage::spec::smmuv3::{command::Command, StreamId};
/// # use twostage::viommu::smmuv3::*;
/// # use twostage::viommu::HostSideError;
/// # #[derive(Debug)]
/// # struct Host;
/// # impl SmmuHostSide for Host {
/// #     fn configure(&self, _: StreamId, _: &StreamPolicy) -> Result<(), HostSideError> {
/// #         Ok(())
/// #     }
/// #     fn invalidate(&self, _: &[Command]) -> Result<(), SmmuInvalidateError> {
/// #         Ok(())
/// #     }
/// # }
/// # impl SmmuInterrupts for Host {
/// #     fn message(&self, _: u64, _: u32) -> bool {
/// #         true
/// #     }
/// #     fn wire(&self, _: SmmuInterrupt) {}
/// # }
/// # let memory = Arc::new(vm_memory::GuestMemoryMmap::<()>::new());
/// # let host = Arc::new(Host);
/// # let smmu = Smmu::new(&SmmuConfig::default(), memory, host.clone(), host, None)?;
///
/// let state = smmu.snapshot()?;
/// let file = serde_json::to_string(&state)?;
/// let read: SmmuState = serde_json::from_str(&file)?;
/// assert_eq!(read, state);
///
/// let newer = file.replacen("\"version\":1", "\"version\":9", 1);
/// let error = serde_json::from_str::<SmmuState>(&newer).unwrap_err();
/// assert!(error.to_string().contains("has version 9"));
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "serde"))]
/// # fn main() {}
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct SmmuState {
    /// [`SmmuState::VERSION`].
    #[cfg_attr(feature = "serde", serde(deserialize_with = "version"))]
    pub version: u32,
    /// The configuration of the SMMU.
    pub config: SmmuConfig,
    /// Registers except those of events, errors and interrupts.
    pub registers: Registers,
    /// The registers of events, errors and interrupts.
    pub faults: FaultLog,
    /// The stream table in use, while translation is enabled or a failed attempt to enable it was
    /// not undone.
    pub table: Option<TableRegisters>,
    /// Some decision must be given to the host again, at the next occasion.
    pub unapplied: bool,
    /// The streams behind the SMMU, ascending, each with its decision: all that nesting has to make
    /// again.
    pub streams: Vec<StreamState>,
}

impl SmmuState {
    /// The version that this release reads and writes. It is the first: no release before 0.2.0 has
    /// snapshots, and what they contain may change without another version until that is released.
    pub const VERSION: u32 = 1;
}

#[cfg(feature = "serde")]
fn version<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    crate::viommu::restore::read_version(deserializer, MODEL, SmmuState::VERSION)
}

/// A stream behind an SMMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct StreamState {
    /// Its StreamID.
    pub stream: StreamId,
    /// The decision for its transactions; `None` before the first.
    pub decision: Option<DecisionState>,
}

/// The decision for a stream, made from the guest's tables as they were then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct DecisionState {
    /// The decision: a policy, or why the stream is blocked.
    pub policy: Result<StreamPolicy, ConfigFault>,
    /// The host has applied it. Otherwise the host refused or lost it, and must be told again.
    pub applied: bool,
}

type Given = crate::viommu::ledger::Given<Result<StreamPolicy, ConfigFault>>;

impl From<Given> for DecisionState {
    fn from(given: Given) -> Self {
        Self { policy: given.decision, applied: given.applied }
    }
}

impl From<DecisionState> for Given {
    fn from(state: DecisionState) -> Self {
        Self { decision: state.policy, applied: state.applied }
    }
}

crate::counters! {
    /// Statistics of a virtual SMMUv3.
    #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
    #[non_exhaustive]
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
        /// Page requests written to the PRI queue.
        page_requests,
        /// Page requests that found the PRI queue full, or that it was: the device tries again.
        page_requests_lost,
        /// Page requests that nothing takes: the device is told.
        page_requests_refused,
        /// Stalled transactions whose record was written to the event queue.
        stalls,
        /// Stalled transactions whose record the event queue could not take at once.
        stalls_held,
        /// Stalled transactions that were tried again, as a CMD_SYNC came before their record.
        stalls_retried,
        /// Stalled transactions that ended, as no guest could resume them.
        stalls_refused,
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
