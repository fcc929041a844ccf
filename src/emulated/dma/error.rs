// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why a DMA request failed.

use twostage::iommufd::PageResponseCode;
use twostage::spec::smmuv3::event::EventId;
use twostage::spec::vtd::fault::FaultReason;

/// Why an IOMMU blocked a DMA request, in the architecture's terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DmaFaultReason {
    /// VT-d's fault reason (§7.1.3).
    #[error("{0}")]
    Vtd(FaultReason),
    /// The event of an SMMUv3 (§7.3).
    #[error("{}", .0.name())]
    SmmuV3(EventId),
    /// The stream table entry of an SMMUv3 aborts; there is no event.
    #[error("the stream aborts")]
    SmmuV3Abort,
}

/// A DMA request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DmaError {
    /// The IOMMU blocked it, and reported the fault.
    #[error("DMA to {address:#x} blocked: {reason}{}", if *.stage2 { ", by stage 2" } else { "" })]
    Fault {
        /// IOVA, in bytes, of the first byte that could not be reached.
        address: u64,
        /// Why.
        reason: DmaFaultReason,
        /// The host's stage 2 refused, not the guest's tables.
        stage2: bool,
    },
    /// The page is not present, and the device has requested it (PCI PRI): try again after the
    /// response ([`DmaPort::page_response`](crate::DmaPort::page_response)). No fault was reported.
    #[error("DMA to {address:#x} waits for a page")]
    PageRequested {
        /// IOVA, in bytes, of the first byte that could not be reached.
        address: u64,
        /// Page request group index, in use by the device until it has taken the response.
        group: u16,
    },
    /// The page is not present although the device has requested it.
    #[error("DMA to {address:#x} did not get the page it requested: {response:?}")]
    PageRefused {
        /// IOVA, in bytes, of the first byte that could not be reached.
        address: u64,
        /// The response: `Success` when it came so often that the device gives up.
        response: PageResponseCode,
    },
    /// It is an interrupt message, not a memory access: on VT-d, a request without PASID to
    /// 0xFEE0_0000–0xFEEF_FFFF (§3.14); on SMMUv3, a write that the tables direct to the doorbell
    /// of an interrupt controller. The caller must deliver it there or drop it.
    #[error("DMA to {address:#x} is an interrupt message")]
    Interrupt {
        /// The message's address in bytes: on VT-d the untranslated IOVA; on SMMUv3 the GPA of the
        /// doorbell.
        address: u64,
    },
    /// There is no memory behind it: never, as mappings are as long as their memory.
    #[error("DMA to {address:#x} is not backed by memory")]
    NoMemory {
        /// IOVA in bytes.
        address: u64,
    },
    /// The memory behind it has no guest's address
    /// ([`UserMemory::gpa`](twostage::iommufd::UserMemory::gpa)), which only sections need.
    #[error(
        "DMA to {address:#x} reaches memory without a GPA: map it `at_gpa`, or by `GuestIoas`"
    )]
    NoGpa {
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
