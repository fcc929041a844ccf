// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Typed arguments and results of the verbs.
//!
//! Structures with hardware words are those of `iommufd-bindings`; where the uAPI has a type with a
//! length and a pointer, there is an `enum` here, so that an invalid pair of `data_type` and
//! `data_len` cannot be expressed.

use std::fmt;
use std::ops::RangeInclusive;

pub use iommufd_bindings::{
    iommu_hw_info_arm_smmuv3, iommu_hw_info_vtd, iommu_hwpt_arm_smmuv3, iommu_hwpt_vtd_s1,
    iommu_hwpt_vtd_s1_invalidate, iommu_viommu_arm_smmuv3_invalidate,
};
use twostage_bits::bitfield;

/// The ID of an object of one iommufd: IOAS, HWPT, device, vIOMMU, vDEVICE. Never 0.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct ObjectId(pub u32);

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Debug for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// Where in an IOAS a mapping goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapTarget {
    /// At this IOVA (`IOMMU_IOAS_MAP_FIXED_IOVA`), in bytes, with the alignment of the IOAS.
    Fixed(u64),
    /// Where the host finds space.
    Anywhere,
}

/// What devices may do with a mapping (`IOMMU_IOAS_MAP_READABLE`, `IOMMU_IOAS_MAP_WRITEABLE`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Protection {
    /// Devices may read.
    pub read: bool,
    /// Devices may write.
    pub write: bool,
}

impl Protection {
    /// Devices may read and write.
    pub const READ_WRITE: Self = Self { read: true, write: true };
    /// Devices may read.
    pub const READ_ONLY: Self = Self { read: true, write: false };
}

/// The IOVAs that an IOAS can map (`struct iommu_ioas_iova_ranges`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IovaRanges {
    /// IOVAs in bytes, both ends included, ascending, disjoint.
    pub allowed: Vec<RangeInclusive<u64>>,
    /// Required alignment of a fixed IOVA, a length and a `user_va`, in bytes.
    pub alignment: u64,
}

/// Flags of `IOMMU_HWPT_ALLOC` (`enum iommufd_hwpt_alloc_flags`).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct HwptFlags {
    /// `IOMMU_HWPT_ALLOC_NEST_PARENT`: a stage 2 for nested HWPTs.
    pub nest_parent: bool,
    /// `IOMMU_HWPT_ALLOC_DIRTY_TRACKING`.
    pub dirty_tracking: bool,
    /// `IOMMU_HWPT_FAULT_ID_VALID`: [`HwptAlloc::fault`] names a fault queue.
    pub fault_id_valid: bool,
    /// `IOMMU_HWPT_ALLOC_PASID`: may be attached to a PASID, or to a device that has PASIDs
    /// attached.
    pub pasid: bool,
    /// Bits that the uAPI does not define yet.
    #[bits(28)]
    pub unknown: u32,
}

/// The format of the new HWPT's user-owned tables (`data_type` and what it points to).
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum HwptData {
    /// `IOMMU_HWPT_DATA_NONE`: a HWPT_PAGING, filled from its IOAS.
    None,
    /// `IOMMU_HWPT_DATA_VTD_S1`: VT-d first-stage tables in the user's address space.
    VtdS1(iommu_hwpt_vtd_s1),
    /// Beyond Linux: VT-d *second-stage* tables that the user (the guest) owns, walked on top of
    /// the parent. No hardware supports this; a host offers it with
    /// [`Extensions::guest_second_stage`].
    VtdSecondStage(HwptVtdSecondStage),
    /// Beyond Linux: VT-d first-stage tables over second-stage tables, both of them the user's,
    /// walked on top of the parent (PGTT=011b of a guest that is a host itself). Offered with
    /// [`Extensions::guest_second_stage`].
    VtdNested(HwptVtdNested),
    /// `IOMMU_HWPT_DATA_ARM_SMMUV3`: words 0 and 1 of a user's stream table entry, on a vIOMMU of
    /// [`ViommuKind::ArmSmmuV3`]: abort, bypass or stage 1, whose context descriptors and tables
    /// are in the user's address space.
    ArmSmmuV3(iommu_hwpt_arm_smmuv3),
}

/// Data of [`HwptData::VtdSecondStage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HwptVtdSecondStage {
    /// Address of the top table in the parent's input address space (GPA), in bytes, 4 KiB aligned.
    pub pgtbl_addr: u64,
    /// Input address width of the tables: 39, 48 or 57 bits.
    pub addr_width: u32,
    /// The IOMMU sets accessed and dirty flags in the tables (SSADE).
    pub accessed_dirty: bool,
}

/// Data of [`HwptData::VtdNested`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HwptVtdNested {
    /// The first stage. Its addresses, and those in its tables, are input addresses of `second`.
    pub first: iommu_hwpt_vtd_s1,
    /// The second stage, in the parent's input address space (GPA).
    pub second: HwptVtdSecondStage,
}

/// Arguments of `IOMMU_HWPT_ALLOC` (`struct iommu_hwpt_alloc`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HwptAlloc {
    /// The kind of HWPT.
    pub flags: HwptFlags,
    /// The device the HWPT must be compatible with.
    pub dev: ObjectId,
    /// An IOAS (gives a HWPT_PAGING), or a nesting parent or a vIOMMU (gives a HWPT_NESTED).
    pub pt: ObjectId,
    /// Format of user-owned tables.
    pub data: HwptData,
    /// The fault queue, if the flags say that it is valid.
    pub fault: Option<ObjectId>,
}

/// An array of invalidations of one format (`struct iommu_hwpt_invalidate`).
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum InvalidateData<'a> {
    /// `IOMMU_HWPT_INVALIDATE_DATA_VTD_S1`. Addresses in bytes, counts in 4 KiB pages; `addr = 0,
    /// npages = u64::MAX` is everything.
    VtdS1(&'a [iommu_hwpt_vtd_s1_invalidate]),
    /// The same entries with second-stage addresses, for a HWPT of [`HwptData::VtdSecondStage`] or
    /// [`HwptData::VtdNested`]. (The latter takes both kinds: an address of the second stage names
    /// everything that was translated by both stages, §6.5.2.4.)
    VtdSecondStage(&'a [iommu_hwpt_vtd_s1_invalidate]),
    /// `IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3`, for a vIOMMU: commands of the SMMU's queue with
    /// the user's StreamIDs, without a VMID, and only those allowed for users.
    ArmSmmuV3(&'a [iommu_viommu_arm_smmuv3_invalidate]),
}

impl InvalidateData<'_> {
    /// Number of entries.
    pub fn len(&self) -> usize {
        match self {
            Self::VtdS1(entries) | Self::VtdSecondStage(entries) => entries.len(),
            Self::ArmSmmuV3(commands) => commands.len(),
        }
    }

    /// Whether the array has no entry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The range of a dirty bitmap (`struct iommu_hwpt_get_dirty_bitmap`): bit `n` is for the
/// `page_size` bytes from `iova + n * page_size` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirtyRange {
    /// First IOVA, in bytes, with the alignment of the IOAS and `page_size`.
    pub iova: u64,
    /// In bytes, aligned likewise, and not 0.
    pub length: u64,
    /// Bytes per bit of the bitmap: a power of two.
    pub page_size: u64,
}

impl DirtyRange {
    /// The first and last bit of a run of IOVAs in the range.
    pub fn bits(&self, iovas: &RangeInclusive<u64>) -> RangeInclusive<u64> {
        // Hosts only accept powers of two.
        let shift = self.page_size.trailing_zeros().min(63);
        let bit = |iova: u64| iova.saturating_sub(self.iova) >> shift;
        bit(*iovas.start())..=bit(*iovas.end())
    }
}

/// The `flags` bit of an invalidation that spares paging-structure caches
/// (`IOMMU_VTD_INV_FLAGS_LEAF`).
pub const VTD_INV_FLAGS_LEAF: u32 = 1;
/// `flags` bit of `struct iommu_hw_info_vtd`: nested translation may write through read-only
/// mappings of a nesting parent (`IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17`).
pub const HW_INFO_VTD_ERRATA_772415_SPR17: u32 = 1 << 0;
/// `flags` bit of `struct iommu_hw_info_arm_smmuv3`: the SMMU may miss a CMD_TLBI_* or CMD_CFGI_*,
/// so the owner of stage 1 must issue each a second time, after the first is complete
/// (`IOMMU_HW_INFO_ARM_SMMUV3_ERRATA_REPEAT_TLBI_CFGI`, from Linux 7.3 on).
pub const HW_INFO_ARM_SMMUV3_ERRATA_REPEAT_TLBI_CFGI: u32 = 1 << 0;
/// `flags` bit of `struct iommu_hwpt_vtd_s1`: supervisor requests are allowed (`IOMMU_VTD_S1_SRE`).
pub const VTD_S1_SRE: u64 = 1 << 0;
/// `flags` bit of `struct iommu_hwpt_vtd_s1`: the extended-accessed flag is updated
/// (`IOMMU_VTD_S1_EAFE`).
pub const VTD_S1_EAFE: u64 = 1 << 1;
/// `flags` bit of `struct iommu_hwpt_vtd_s1`: supervisor writes honour R/W (`IOMMU_VTD_S1_WPE`).
pub const VTD_S1_WPE: u64 = 1 << 2;

/// `IOMMU_HWPT_INVALIDATE` stopped in the middle (`entry_num` on return).
///
/// On VT-d the first `done` entries are complete, the entry at `done` failed, and none after it was
/// looked at. On SMMUv3 the number is too high: when a command is refused, commands before it may
/// not have been issued. So callers must not continue from there, but invalidate everything that
/// the batch might have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{error} ({done} entries were done)")]
#[non_exhaustive]
pub struct InvalidateError {
    /// Completed entries: exact on VT-d, an upper bound on SMMUv3.
    pub done: usize,
    /// Why it stopped.
    pub error: super::HostError,
}

impl InvalidateError {
    /// It stopped after `done` entries, because of `error`.
    pub fn new(done: usize, error: super::HostError) -> Self {
        Self { done, error }
    }
}

/// Stopped before the first entry.
impl From<super::HostError> for InvalidateError {
    fn from(error: super::HostError) -> Self {
        Self { done: 0, error }
    }
}

/// The IOMMU of a device and its registers (`IOMMU_GET_HW_INFO`).
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum HwInfoData {
    /// `IOMMU_HW_INFO_TYPE_NONE`.
    None,
    /// `IOMMU_HW_INFO_TYPE_INTEL_VTD`.
    Vtd(iommu_hw_info_vtd),
    /// `IOMMU_HW_INFO_TYPE_ARM_SMMUV3`.
    ArmSmmuV3(iommu_hw_info_arm_smmuv3),
    /// Another (`enum iommu_hw_info_type`).
    Other(u32),
}

/// Generic abilities of a device and its IOMMU (`enum iommufd_hw_capabilities`).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct HwCapabilities {
    /// `IOMMU_HW_CAP_DIRTY_TRACKING`.
    pub dirty_tracking: bool,
    /// `IOMMU_HW_CAP_PCI_PASID_EXEC`.
    pub pci_pasid_exec: bool,
    /// `IOMMU_HW_CAP_PCI_PASID_PRIV`.
    pub pci_pasid_priv: bool,
    /// `IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED`.
    pub pci_ats_not_supported: bool,
    #[bits(60)]
    __: u64,
}

/// The result of `IOMMU_GET_HW_INFO` for a device (`struct iommu_hw_info`).
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct HwInfo {
    /// Registers of the IOMMU.
    pub data: HwInfoData,
    /// Generic abilities.
    pub capabilities: HwCapabilities,
    /// Width of the PASIDs the device may use, in bits; 0 if it has none.
    pub max_pasid_log2: u8,
}

impl HwInfo {
    /// An IOMMU with the registers `data`: without generic abilities, and the device without
    /// PASIDs.
    pub const fn new(data: HwInfoData) -> Self {
        Self { data, capabilities: HwCapabilities::new(), max_pasid_log2: 0 }
    }

    /// Sets [`Self::capabilities`].
    #[must_use]
    pub const fn with_capabilities(self, capabilities: HwCapabilities) -> Self {
        Self { capabilities, ..self }
    }

    /// Sets [`Self::max_pasid_log2`].
    #[must_use]
    pub const fn with_max_pasid_log2(self, max_pasid_log2: u8) -> Self {
        Self { max_pasid_log2, ..self }
    }
}

/// Kinds of vIOMMU (`enum iommu_viommu_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ViommuKind {
    /// `IOMMU_VIOMMU_TYPE_DEFAULT`: no driver supports it.
    Default,
    /// `IOMMU_VIOMMU_TYPE_ARM_SMMUV3`.
    ArmSmmuV3,
}

impl ViommuKind {
    /// The uAPI's number.
    pub const fn number(self) -> u32 {
        match self {
            Self::Default => iommufd_bindings::iommu_viommu_type_IOMMU_VIOMMU_TYPE_DEFAULT,
            Self::ArmSmmuV3 => iommufd_bindings::iommu_viommu_type_IOMMU_VIOMMU_TYPE_ARM_SMMUV3,
        }
    }
}

/// Abilities of a host beyond the kernel's uAPI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Extensions {
    /// Supports [`HwptData::VtdSecondStage`] and [`HwptData::VtdNested`]: walks second-stage tables
    /// that the guest owns.
    pub guest_second_stage: bool,
    /// Reports every unrecoverable DMA fault to a [`super::FaultSink`] (Linux 7.2's VT-d driver
    /// reports none to user space).
    pub fault_reports: bool,
    /// Supports [`super::HostIommu::device_tlb_invalidate`]. Others invalidate device TLBs together
    /// with their own, as Linux's VT-d driver does.
    pub device_tlbs: bool,
    /// Sets the flags of a guest's stage 1, nested on an SMMUv3, as IDR0.HTTU says. (Linux 7.2's
    /// uAPI lists HTTU among what its kernel does not support for nesting.)
    pub table_updates: bool,
    /// Page requests of devices behind an SMMUv3 (IDR0.PRI), and transactions that it stalls
    /// (IDR0.STALL_MODEL), come to the fault queues of tables that the user owns. A device without
    /// ATS makes no page requests: what comes of it are stalls. (Linux 7.2's driver refuses page
    /// requests, and devices that it lets stall are not on PCI.)
    pub smmu_faults: bool,
}

impl Extensions {
    crate::setters! {
        with_guest_second_stage guest_second_stage: bool;
        with_fault_reports fault_reports: bool;
        with_device_tlbs device_tlbs: bool;
        with_table_updates table_updates: bool;
        with_smmu_faults smmu_faults: bool;
    }
}

/// An unrecoverable fault of one DMA request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostFault {
    /// The device that made the request.
    pub dev: ObjectId,
    /// Its PASID, if the request had one.
    pub pasid: Option<u32>,
    /// The IOVA, in bytes, of the first byte that could not be reached.
    pub address: u64,
    /// The request was a write (or an atomic).
    pub write: bool,
    /// The request needed execute permission.
    pub execute: bool,
    /// The request needed supervisor privilege.
    pub privileged: bool,
    /// The architecture's reason code (VT-d: §7.1.3; SMMUv3: §7.3).
    pub reason: u8,
    /// The host's stage 2 faulted, not the user's tables.
    pub stage2: bool,
}

/// Flags of a page request (`enum iommu_hwpt_pgfault_flags`).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct PageRequestFlags {
    /// `IOMMU_PGFAULT_FLAGS_PASID_VALID`: the request had a PASID.
    pub pasid_valid: bool,
    /// `IOMMU_PGFAULT_FLAGS_LAST_PAGE`: the last one of its group.
    pub last_page: bool,
    #[bits(30)]
    __: u32,
}

/// The permissions of a page request (`enum iommu_hwpt_pgfault_perm`).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct PageRequestPermissions {
    /// `IOMMU_PGFAULT_PERM_READ`.
    pub read: bool,
    /// `IOMMU_PGFAULT_PERM_WRITE`.
    pub write: bool,
    /// `IOMMU_PGFAULT_PERM_EXEC`.
    pub execute: bool,
    /// `IOMMU_PGFAULT_PERM_PRIV`.
    pub privileged: bool,
    /// Bits that the uAPI does not define yet.
    #[bits(28)]
    pub unknown: u32,
}

/// A page request of a device (`struct iommu_hwpt_pgfault`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRequest {
    /// Which fields are valid.
    pub flags: PageRequestFlags,
    /// Its PASID, if it had one.
    pub pasid: u32,
    /// The device's number for its group.
    pub group: u32,
    /// The requested permissions.
    pub permissions: PageRequestPermissions,
    /// The IOVA, in bytes.
    pub address: u64,
}

/// The response to a device's page requests (`enum iommufd_page_response_code`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageResponseCode {
    /// `IOMMUFD_PAGE_RESP_SUCCESS`: it may try again.
    Success,
    /// `IOMMUFD_PAGE_RESP_INVALID`: it cannot have the page.
    Invalid,
}

/// The type of vEVENTQ for event records of an SMMUv3: four 64-bit words, little-endian, with the
/// user's StreamID of the device (`IOMMU_VEVENTQ_TYPE_ARM_SMMUV3`).
pub const VEVENTQ_ARM_SMMUV3: u32 =
    iommufd_bindings::iommu_veventq_type_IOMMU_VEVENTQ_TYPE_ARM_SMMUV3;

/// A record of a vEVENTQ (`struct iommufd_vevent_header` and its data).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Vevent {
    /// An event of the vIOMMU.
    Event {
        /// Its number, one more than that of the previous event, modulo 2^31.
        sequence: u32,
        /// Its data, in the layout of the queue's type.
        data: Vec<u8>,
    },
    /// `IOMMU_VEVENTQ_FLAG_LOST_EVENTS`: the queue was full, and events were lost.
    Lost {
        /// The number of the last lost one.
        sequence: u32,
    },
}
