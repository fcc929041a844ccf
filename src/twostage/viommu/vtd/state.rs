// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The state of a virtual VT-d as plain data, and its statistics.

use super::config::VtdConfig;
use super::fault_log::{EventRegisters, FaultLog};
use super::host_side::RequesterConfig;
use super::page_requests::PageQueue;
use crate::counters::Counter;
use crate::spec::pci::Bdf;
use crate::spec::vtd::qi::Descriptor;
use crate::spec::vtd::regs::{
    Ccmd, Gsts, Ics, IotlbReg, Iqa, Iqercd, Irta, Iva, QueuePointer, Rtaddr,
};
use crate::viommu::ledger::Given;

/// The model, in errors.
pub(super) const MODEL: &str = "VT-d";

/// Registers except those of faults, which have a lock of their own.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct Registers {
    /// GSTS.
    pub gsts: Gsts,
    /// RTADDR, as written.
    pub rtaddr: Rtaddr,
    /// The root table latched by GCMD.SRTP, which is the one in use.
    pub root: Option<Rtaddr>,
    /// CCMD.
    pub ccmd: Ccmd,
    /// IVA.
    pub iva: Iva,
    /// IOTLB.
    pub iotlb: IotlbReg,
    /// IQA.
    pub iqa: Iqa,
    /// IQH: everything before it is complete.
    pub iqh: QueuePointer,
    /// IQT.
    pub iqt: QueuePointer,
    /// A device that did not answer a device-TLB invalidation: the next wait is aborted because of
    /// it.
    pub unanswered: Option<Bdf>,
    /// IQERCD.
    pub iqercd: Iqercd,
    /// ICS.
    pub ics: Ics,
    /// IECTL, IEDATA, IEADDR, IEUADDR.
    pub invalidation_event: EventRegisters,
    /// IRTA, as written.
    pub irta: Irta,
    /// The interrupt remapping table latched by GCMD.SIRTP, which is the one in use.
    pub interrupt_table: Irta,
}

/// All that [`VtdIommu::restore`](super::VtdIommu::restore) needs, as plain data: a snapshot.
///
/// With the feature `serde`, any format that keeps the order of fields refuses another version
/// before it reads anything else, and all formats refuse fields that are unknown. What the host has
/// for the unit, caches included, is not part of it: that follows from the decisions. So does what
/// is left of the invalidation queue, from IQH.
///
/// ```
/// # #[cfg(feature = "serde")]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use twostage::viommu::vtd::VtdState;
/// # use std::sync::Arc;
/// # use twostage::viommu::vtd::{Invalidation, RequesterConfig, VtdConfig, VtdHostSide, VtdIommu};
/// # use twostage::viommu::{HostSideError, InterruptSink, Requester};
/// # #[derive(Debug)]
/// # struct Host;
/// # impl VtdHostSide for Host {
/// #     fn configure(&self, _: Requester, _: &RequesterConfig) -> Result<(), HostSideError> {
/// #         Ok(())
/// #     }
/// #     fn invalidate(&self, _: &[Invalidation]) -> Result<(), HostSideError> {
/// #         Ok(())
/// #     }
/// # }
/// # impl InterruptSink for Host {
/// #     fn send_msi(&self, _: u64, _: u32) {}
/// # }
/// # let memory = Arc::new(vm_memory::GuestMemoryMmap::<()>::new());
/// # let host = Arc::new(Host);
/// # let unit = VtdIommu::new(&VtdConfig::default(), memory, host.clone(), host, None)?;
///
/// let state = unit.snapshot()?;
/// let file = serde_json::to_string(&state)?;
/// let read: VtdState = serde_json::from_str(&file)?;
/// assert_eq!(read, state);
///
/// let newer = file.replacen("\"version\":1", "\"version\":9", 1);
/// let error = serde_json::from_str::<VtdState>(&newer).unwrap_err();
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
pub struct VtdState {
    /// [`VtdState::VERSION`].
    #[cfg_attr(feature = "serde", serde(deserialize_with = "version"))]
    pub version: u32,
    /// The configuration of the unit.
    pub config: VtdConfig,
    /// Registers except those of faults.
    pub registers: Registers,
    /// Fault status and records.
    pub faults: FaultLog,
    /// The page request queue. Open groups are not part of it: their devices ask again, and
    /// responses to them have no effect.
    pub page_requests: PageQueue,
    /// Whether functions follow tables.
    pub translating: Translating,
    /// Some decision must be given to the host again, at the next occasion.
    pub unapplied: bool,
    /// The functions behind the unit, ascending, each with its decisions: all that nesting has to
    /// make again.
    pub functions: Vec<FunctionState>,
    /// The interrupt entry cache, ascending: the table may differ, until the guest invalidates.
    pub interrupt_entries: Vec<InterruptEntryState>,
}

impl VtdState {
    /// The version that this release reads and writes. It is the first: no release before 0.2.0 has
    /// snapshots, and what they contain may change without another version until that is released.
    pub const VERSION: u32 = 1;
}

#[cfg(feature = "serde")]
fn version<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    crate::viommu::restore::read_version(deserializer, MODEL, VtdState::VERSION)
}

/// By which tables faults are explained, which differs from the registers if the host failed to
/// apply a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct Translating {
    /// Translation is enabled, or a failed attempt to enable it was not undone.
    pub enabled: bool,
    /// The root table in use.
    pub root: Option<Rtaddr>,
}

/// A function behind a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct FunctionState {
    /// Its Requester ID.
    pub rid: Bdf,
    /// The decision for its requests without PASID; `None` before the first.
    pub decision: Option<DecisionState>,
    /// The decisions for its PASIDs, ascending, of those that have one.
    pub pasids: Vec<PasidState>,
}

/// Adjacent PASIDs of a function with the same decision, except for their own tags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct PasidState {
    /// The first of them, never 0.
    pub first: u32,
    /// The last of them.
    pub last: u32,
    /// The decision, with the tag of the first.
    pub decision: DecisionState,
}

/// The decision for a requester, made from the guest's tables as they were then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct DecisionState {
    /// The decision.
    pub config: RequesterConfig,
    /// The host has applied it. Otherwise the host refused or lost it, and must be told again.
    pub applied: bool,
}

impl From<Given<RequesterConfig>> for DecisionState {
    fn from(given: Given<RequesterConfig>) -> Self {
        Self { config: given.decision, applied: given.applied }
    }
}

impl From<DecisionState> for Given<RequesterConfig> {
    fn from(state: DecisionState) -> Self {
        Self { decision: state.config, applied: state.applied }
    }
}

/// A cached entry of the interrupt remapping table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct InterruptEntryState {
    /// Its index in the table.
    pub index: u16,
    /// Its words.
    pub entry: [u64; 2],
}

crate::counters! {
    /// Statistics of a virtual VT-d.
    #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
    #[non_exhaustive]
    pub struct VtdCounters;
    /// The counters as they run: a snapshot reads one after the other, not all at one moment.
    running pub(super) struct Counters of Counter {
        /// Register reads by the guest.
        register_reads,
        /// Register writes by the guest.
        register_writes,
        /// Descriptors of type 1, context-cache.
        context_cache,
        /// Descriptors of type 2, IOTLB.
        iotlb,
        /// Descriptors of type 3, device-TLB.
        device_tlb,
        /// Descriptors of type 4, interrupt entry cache.
        interrupt_entry_cache,
        /// Descriptors of type 5, wait.
        wait,
        /// Descriptors of type 6, PASID-based IOTLB.
        pasid_iotlb,
        /// Descriptors of type 7, PASID-cache.
        pasid_cache,
        /// Descriptors of type 8, PASID-based device-TLB.
        pasid_device_tlb,
        /// Descriptors of type 9, page group response.
        page_group_response,
        /// Invalidation batches given to the host: one call each.
        batches,
        /// Invalidations in them.
        invalidations,
        /// Times that tables were read again for all that an invalidation, or a command, names.
        evaluations,
        /// Policies given to the host.
        policies,
        /// Requests of a blocked requester that was found to be served by the tables by then. Only
        /// without caching mode.
        found_served,
        /// Page requests given to the guest in its queue.
        page_requests,
        /// Page requests that the queue had no space for.
        page_requests_lost,
        /// Page requests answered at once, as nothing serves them.
        page_requests_refused,
        /// Faults in fault records.
        faults_recorded,
        /// Faults lost for lack of space.
        faults_lost,
        /// Faults suppressed by the guest's tables.
        faults_suppressed,
        /// Interrupts sent through the unit while it remaps. Those that bypass it with a
        /// translation from it are not counted.
        interrupts_remapped,
        /// Interrupts that were blocked.
        interrupts_blocked,
        /// Times the invalidation queue stopped with an error.
        queue_errors,
        /// Other mistakes of the guest: ignored commands, status addresses outside memory.
        guest_errors,
        /// Requests refused by the host.
        host_errors,
    }
}

impl Counters {
    /// The one of descriptors of the type of `descriptor`.
    pub fn of(&self, descriptor: &Descriptor) -> &Counter {
        match descriptor {
            Descriptor::ContextCache(_) => &self.context_cache,
            Descriptor::Iotlb { .. } => &self.iotlb,
            Descriptor::DeviceTlb { .. } => &self.device_tlb,
            Descriptor::InterruptEntryCache(_) => &self.interrupt_entry_cache,
            Descriptor::Wait { .. } => &self.wait,
            Descriptor::PasidIotlb { .. } => &self.pasid_iotlb,
            Descriptor::PasidCache(_) => &self.pasid_cache,
            Descriptor::PasidDeviceTlb { .. } => &self.pasid_device_tlb,
            Descriptor::PageGroupResponse { .. } => &self.page_group_response,
        }
    }
}
