// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a virtual VT-d has done, in numbers.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::spec::vtd::qi::Descriptor;

/// Types of descriptor, 1 to 9, and a place 0 for none of them.
const TYPES: usize = 10;

/// The counters as they run. Each is read alone, not all of one moment.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub register_reads: AtomicU64,
    pub register_writes: AtomicU64,
    pub descriptors: [AtomicU64; TYPES],
    pub batches: AtomicU64,
    pub invalidations: AtomicU64,
    pub evaluations: AtomicU64,
    pub policies: AtomicU64,
    pub found_served: AtomicU64,
    pub faults_recorded: AtomicU64,
    pub faults_lost: AtomicU64,
    pub faults_suppressed: AtomicU64,
    pub interrupts_remapped: AtomicU64,
    pub interrupts_blocked: AtomicU64,
    pub queue_errors: AtomicU64,
    pub guest_errors: AtomicU64,
    pub host_errors: AtomicU64,
}

impl Counters {
    /// Counts a descriptor by its type.
    pub fn descriptor(&self, descriptor: &Descriptor) {
        if let Some(count) = self.descriptors.get(usize::from(descriptor.descriptor_type())) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn snapshot(&self) -> VtdCounters {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let [_, context_cache, iotlb, device_tlb, interrupt_entry_cache, wait, pasid_iotlb, pasid_cache, pasid_device_tlb, page_group_response] =
            &self.descriptors;
        VtdCounters {
            register_reads: of(&self.register_reads),
            register_writes: of(&self.register_writes),
            context_cache: of(context_cache),
            iotlb: of(iotlb),
            device_tlb: of(device_tlb),
            interrupt_entry_cache: of(interrupt_entry_cache),
            wait: of(wait),
            pasid_iotlb: of(pasid_iotlb),
            pasid_cache: of(pasid_cache),
            pasid_device_tlb: of(pasid_device_tlb),
            page_group_response: of(page_group_response),
            batches: of(&self.batches),
            invalidations: of(&self.invalidations),
            evaluations: of(&self.evaluations),
            policies: of(&self.policies),
            found_served: of(&self.found_served),
            faults_recorded: of(&self.faults_recorded),
            faults_lost: of(&self.faults_lost),
            faults_suppressed: of(&self.faults_suppressed),
            interrupts_remapped: of(&self.interrupts_remapped),
            interrupts_blocked: of(&self.interrupts_blocked),
            queue_errors: of(&self.queue_errors),
            guest_errors: of(&self.guest_errors),
            host_errors: of(&self.host_errors),
        }
    }
}

/// What a virtual VT-d has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct VtdCounters {
    /// Register reads by the guest.
    pub register_reads: u64,
    /// Register writes by the guest.
    pub register_writes: u64,
    /// Descriptors of type 1, context-cache.
    pub context_cache: u64,
    /// Descriptors of type 2, IOTLB.
    pub iotlb: u64,
    /// Descriptors of type 3, device-TLB.
    pub device_tlb: u64,
    /// Descriptors of type 4, interrupt entry cache.
    pub interrupt_entry_cache: u64,
    /// Descriptors of type 5, wait.
    pub wait: u64,
    /// Descriptors of type 6, PASID-based IOTLB.
    pub pasid_iotlb: u64,
    /// Descriptors of type 7, PASID-cache.
    pub pasid_cache: u64,
    /// Descriptors of type 8, PASID-based device-TLB.
    pub pasid_device_tlb: u64,
    /// Descriptors of type 9, page group response.
    pub page_group_response: u64,
    /// Invalidation batches given to the host: one call each.
    pub batches: u64,
    /// Invalidations in them.
    pub invalidations: u64,
    /// Times that tables were read anew for all that an invalidation, or a command, names.
    pub evaluations: u64,
    /// Policies given to the host.
    pub policies: u64,
    /// Requests of a requester that was blocked, and that the tables were found to serve by then.
    /// Only without caching mode.
    pub found_served: u64,
    /// Faults in fault records.
    pub faults_recorded: u64,
    /// Faults that found no room.
    pub faults_lost: u64,
    /// Faults that the guest's tables asked not to record.
    pub faults_suppressed: u64,
    /// Interrupts that were sent through the unit while it remaps. Those that go past it by a
    /// translation it gave are not counted.
    pub interrupts_remapped: u64,
    /// Interrupts that were blocked.
    pub interrupts_blocked: u64,
    /// Times the invalidation queue stopped with an error.
    pub queue_errors: u64,
    /// Other mistakes of the guest: commands that were ignored, status addresses that are no
    /// memory.
    pub guest_errors: u64,
    /// Requests that the host refused.
    pub host_errors: u64,
}
