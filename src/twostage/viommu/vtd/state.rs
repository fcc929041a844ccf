// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest-visible state of a virtual VT-d as plain data, and its statistics.

use super::fault_log::{EventRegisters, FaultLog};
use crate::counters::Counter;
use crate::spec::pci::Bdf;
use crate::spec::vtd::qi::Descriptor;
use crate::spec::vtd::regs::{
    Ccmd, Gsts, Ics, IotlbReg, Iqa, Iqercd, Irta, Iva, QueuePointer, Rtaddr,
};

/// Registers except those of faults, which have a lock of their own.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
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

/// The guest-visible state: a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct VtdState {
    /// Registers except those of faults.
    pub registers: Registers,
    /// Fault status and records.
    pub faults: FaultLog,
    /// The functions behind the unit, ascending.
    pub devices: Vec<Bdf>,
}

crate::counters! {
    /// Statistics of a virtual VT-d.
    #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
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
    /// Counts a descriptor by its type.
    pub fn descriptor(&self, descriptor: &Descriptor) {
        let counter = match descriptor {
            Descriptor::ContextCache(_) => &self.context_cache,
            Descriptor::Iotlb { .. } => &self.iotlb,
            Descriptor::DeviceTlb { .. } => &self.device_tlb,
            Descriptor::InterruptEntryCache(_) => &self.interrupt_entry_cache,
            Descriptor::Wait { .. } => &self.wait,
            Descriptor::PasidIotlb { .. } => &self.pasid_iotlb,
            Descriptor::PasidCache(_) => &self.pasid_cache,
            Descriptor::PasidDeviceTlb { .. } => &self.pasid_device_tlb,
            Descriptor::PageGroupResponse { .. } => &self.page_group_response,
        };
        counter.count();
    }
}
