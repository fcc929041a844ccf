// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why DMA reaches no memory.

use twostage::iommufd::PageResponseCode;
use twostage::spec::smmuv3::event::EventId;
use twostage::spec::vtd::fault::FaultReason;

/// Why an IOMMU blocked a DMA request, in its architecture's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DmaFaultReason {
    /// VT-d's fault reason (§7.1.3).
    #[error("{0}")]
    Vtd(FaultReason),
    /// The event of an SMMUv3 (§7.3).
    #[error("{}", .0.name())]
    SmmuV3(EventId),
    /// The stream table entry of an SMMUv3 says so, which is no event.
    #[error("the stream aborts")]
    SmmuV3Abort,
}

/// A DMA request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DmaError {
    /// The IOMMU blocked it, and reported the fault.
    #[error("DMA to {address:#x} blocked: {reason}{}", if *.stage2 { ", by stage 2" } else { "" })]
    Fault {
        /// IOVA, in bytes, of the first byte that could not be reached.
        address: u64,
        /// Why.
        reason: DmaFaultReason,
        /// The host's stage 2 refused, not the guest's own tables.
        stage2: bool,
    },
    /// The page is not there, and the device has asked for it (PCI PRI): try again when the answer
    /// is there ([`DmaPort::page_response`](crate::DmaPort::page_response)). Nobody was told of a
    /// fault.
    #[error("DMA to {address:#x} waits for a page")]
    PageRequested {
        /// IOVA, in bytes, of the first byte that could not be reached.
        address: u64,
        /// The index of the group of page requests, which is the device's until it has taken the
        /// answer.
        group: u16,
    },
    /// The page is not there although the device has asked for it.
    #[error("DMA to {address:#x} did not get the page it asked for: {response:?}")]
    PageRefused {
        /// IOVA, in bytes, of the first byte that could not be reached.
        address: u64,
        /// The answer: `Success` when it was given so often that the device gives up.
        response: PageResponseCode,
    },
    /// It is an interrupt message and no memory access: on VT-d, a request without PASID to
    /// 0xFEE0_0000–0xFEEF_FFFF (§3.14); on SMMUv3, a write that the tables send to the doorbell of
    /// an interrupt controller. Whoever made the request must send it there, or drop it.
    #[error("DMA to {address:#x} is an interrupt message")]
    Interrupt {
        /// The message's address in bytes: on VT-d the IOVA, which is not translated; on SMMUv3
        /// the GPA of the doorbell.
        address: u64,
    },
    /// Its memory is not there: never, while mappings are as long as their memory.
    #[error("DMA to {address:#x} leads to no memory")]
    NoMemory {
        /// IOVA in bytes.
        address: u64,
    },
    /// The request goes past the end of the address space. Nothing was transferred.
    #[error("DMA of {length:#x} bytes to {address:#x} goes past the end of the address space")]
    PastEnd {
        /// IOVA in bytes.
        address: u64,
        /// Length in bytes.
        length: usize,
    },
}
