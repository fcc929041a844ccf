// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Layout of configuration space: offsets and fields of a type 0 header and its capabilities.

use bitfield_struct::bitfield;

/// Bytes of a function's configuration space.
pub const CONFIG_SIZE: usize = 4096;
/// Where extended configuration space starts.
pub const EXTENDED_START: u16 = 0x100;

/// Vendor ID.
pub const VENDOR_ID: u16 = 0x00;
/// Device ID.
pub const DEVICE_ID: u16 = 0x02;
/// Command register.
pub const COMMAND: u16 = 0x04;
/// Status register.
pub const STATUS: u16 = 0x06;
/// Revision ID; the class code follows.
pub const REVISION_ID: u16 = 0x08;
/// Header type: the layout of the header.
pub const HEADER_TYPE: u16 = 0x0e;
/// Header type of a bridge.
pub const HEADER_TYPE_BRIDGE: u8 = 1;
/// Subsystem vendor ID; the subsystem ID follows.
pub const SUBSYSTEM_VENDOR_ID: u16 = 0x2c;
/// First base address register.
pub const BAR0: u16 = 0x10;
/// Number of base address registers.
pub const BARS: usize = 6;
/// Bridge (§7.5.1.3): the number of its bus; that of the bus behind it and of the last one follow.
pub const PRIMARY_BUS: u16 = 0x18;
/// Bridge: the number of the bus behind it.
pub const SECONDARY_BUS: u16 = 0x19;
/// Bridge: the last bus behind it.
pub const SUBORDINATE_BUS: u16 = 0x1a;
/// Bridge: bits 31:20 of the first address of its memory window; those of the last one follow.
pub const MEMORY_BASE: u16 = 0x20;
/// Bridge: likewise of its window for prefetchable memory.
pub const PREFETCHABLE_BASE: u16 = 0x24;
/// Bridge: bits 63:32 of the first address of that window; those of the last one follow.
pub const PREFETCHABLE_BASE_UPPER: u16 = 0x28;
/// Bridge: in the registers of the prefetchable window, it has 64-bit addresses.
pub const PREFETCHABLE_64: u16 = 1;
/// The address bits in the registers of a window.
pub const WINDOW_ADDRESS: u16 = 0xfff0;
/// Bridge control.
pub const BRIDGE_CONTROL: u16 = 0x3e;
/// Bridge control: everything behind it is being reset.
pub const SECONDARY_BUS_RESET: u16 = 1 << 6;
/// Bridge control: how it treats errors, and whether it answers requests that nobody does. Kept for
/// software, without effect.
pub const BRIDGE_CONTROL_KEPT: u16 = 0b10_0011;
/// Offset of the first capability.
pub const CAPABILITIES_POINTER: u16 = 0x34;
/// Interrupt line: for use by software only.
pub const INTERRUPT_LINE: u16 = 0x3c;
/// Interrupt pin: 1 for INTA.
pub const INTERRUPT_PIN: u16 = 0x3d;
/// End of the type 0 header, and the first place for a capability.
pub const HEADER_END: u16 = 0x40;

/// Status: configuration requests are answered right after a reset, too (§7.5.1.1.4).
pub const STATUS_IMMEDIATE_READINESS: u16 = 1 << 0;
/// Status: an INTx interrupt is pending.
pub const STATUS_INTERRUPT: u16 = 1 << 3;
/// Status: there is a capability list.
pub const STATUS_CAPABILITIES: u16 = 1 << 4;

/// Capability ID of MSI.
pub const CAPABILITY_MSI: u8 = 0x05;
/// Capability ID of a vendor-specific capability.
pub const CAPABILITY_VENDOR: u8 = 0x09;
/// Capability ID of MSI-X.
pub const CAPABILITY_MSIX: u8 = 0x11;
/// Capability ID of PCI Express.
pub const CAPABILITY_EXPRESS: u8 = 0x10;
/// Extended capability ID of access control services (§7.7.11).
pub const EXTENDED_CAPABILITY_ACS: u16 = 0x0d;
/// Extended capability ID of address translation services (§10.5.1).
pub const EXTENDED_CAPABILITY_ATS: u16 = 0x0f;
/// Extended capability ID of the page request interface (§10.5.2).
pub const EXTENDED_CAPABILITY_PRI: u16 = 0x13;
/// Extended capability ID of PASID.
pub const EXTENDED_CAPABILITY_PASID: u16 = 0x1b;

/// PCI Express (§7.5.3), from the start of the capability: its capabilities register.
pub const EXPRESS_CAPABILITIES: u16 = 0x02;
/// Device capabilities.
pub const EXPRESS_DEVICE_CAPABILITIES: u16 = 0x04;
/// Device control; device status follows.
pub const EXPRESS_DEVICE_CONTROL: u16 = 0x08;
/// Device capabilities 2.
pub const EXPRESS_DEVICE_CAPABILITIES_2: u16 = 0x24;
/// Link capabilities; link control and link status follow.
pub const EXPRESS_LINK_CAPABILITIES: u16 = 0x0c;
/// Link status.
pub const EXPRESS_LINK_STATUS: u16 = 0x12;
/// PCI Express capabilities: the kind of device or port.
pub const EXPRESS_KIND: u16 = 0xf << 4;
/// PCI Express capabilities: a Root Complex Integrated Endpoint.
pub const EXPRESS_INTEGRATED_ENDPOINT: u16 = 9 << 4;
/// PCI Express capabilities: an endpoint, with a link.
pub const EXPRESS_ENDPOINT: u16 = 0;
/// PCI Express capabilities: a root port. It has no slot.
pub const EXPRESS_ROOT_PORT: u16 = 4 << 4;
/// PCI Express capabilities: a bridge to conventional PCI.
pub const EXPRESS_TO_PCI: u16 = 7 << 4;
/// In link capabilities and link status: one lane of 2.5 GT/s.
pub const EXPRESS_LINK_2_5_GT_X1: u16 = 1 << 4 | 1;
/// Device capabilities: errors are reported by role, which everything since PCIe 1.1 says.
pub const EXPRESS_ROLE_BASED_ERRORS: u32 = 1 << 15;
/// Device capabilities: function-level reset.
pub const EXPRESS_FLR_CAPABLE: u32 = 1 << 28;
/// Device control: reset the function. It reads as zero afterwards.
pub const EXPRESS_INITIATE_FLR: u16 = 1 << 15;
/// Device capabilities 2: End-End TLP prefixes (PASID is one).
pub const EXPRESS_END_END_TLP_PREFIX: u32 = 1 << 21;

/// Command register (§7.5.1.1.3).
#[bitfield(u16)]
#[derive(PartialEq, Eq)]
pub struct Command {
    /// Answers port accesses.
    pub io_space: bool,
    /// Answers memory accesses.
    pub memory_space: bool,
    /// May issue requests: DMA and MSI.
    pub bus_master: bool,
    #[bits(7)]
    __: u8,
    /// Must not assert INTx.
    pub interrupt_disable: bool,
    #[bits(5)]
    __: u8,
}

/// MSI message control (§7.7.1.2).
#[bitfield(u16)]
#[derive(PartialEq, Eq)]
pub struct MsiControl {
    /// MSI is enabled.
    pub enable: bool,
    /// Number of vectors requested, as a power of two.
    #[bits(3)]
    pub multiple_message_capable: u8,
    /// Number of vectors granted, as a power of two.
    #[bits(3)]
    pub multiple_message_enable: u8,
    /// The message address has 64 bits.
    pub address_64: bool,
    #[bits(8)]
    __: u8,
}

/// MSI-X message control (§7.7.2.2).
#[bitfield(u16)]
#[derive(PartialEq, Eq)]
pub struct MsixControl {
    /// Number of vectors, less one.
    #[bits(11)]
    pub table_size: u16,
    #[bits(3)]
    __: u8,
    /// Every vector is masked.
    pub function_mask: bool,
    /// MSI-X is enabled.
    pub enable: bool,
}

/// PASID capability register (§7.8.9.2).
#[bitfield(u16)]
#[derive(PartialEq, Eq)]
pub struct PasidCapabilities {
    __: bool,
    /// May request execute permission.
    pub execute_permission: bool,
    /// May request supervisor privilege.
    pub privileged_mode: bool,
    #[bits(5)]
    __: u8,
    /// Width of the PASIDs the function can use, in bits.
    #[bits(5)]
    pub max_width: u8,
    #[bits(3)]
    __: u8,
}

/// PASID control register (§7.8.9.3).
#[bitfield(u16)]
#[derive(PartialEq, Eq)]
pub struct PasidControl {
    /// Requests may carry a PASID.
    pub enable: bool,
    /// They may request execute permission.
    pub execute_permission: bool,
    /// They may request supervisor privilege.
    pub privileged_mode: bool,
    #[bits(13)]
    __: u16,
}

/// ATS capability register (§10.5.1.2).
#[bitfield(u16)]
#[derive(PartialEq, Eq)]
pub struct AtsCapabilities {
    /// Invalidations that it can take before it has answered one; 0 for 32.
    #[bits(5)]
    pub queue_depth: u8,
    /// Untranslated addresses are multiples of 4096.
    pub page_aligned: bool,
    /// It honours the Global Invalidate bit.
    pub global_invalidate: bool,
    #[bits(9)]
    __: u16,
}

/// ATS control register (§10.5.1.3).
#[bitfield(u16)]
#[derive(PartialEq, Eq)]
pub struct AtsControl {
    /// The smallest translation unit: 4096 bytes times this power of two.
    #[bits(5)]
    pub smallest_unit: u8,
    #[bits(10)]
    __: u16,
    /// May cache translations.
    pub enable: bool,
}

/// Page request control register (§10.5.2.2).
#[bitfield(u16)]
#[derive(PartialEq, Eq)]
pub struct PageRequestControl {
    /// May make page requests.
    pub enable: bool,
    /// Forget those that have no response; only while it is not enabled. Reads as zero.
    pub reset: bool,
    #[bits(14)]
    __: u16,
}

/// Page request status register (§10.5.2.3).
#[bitfield(u16)]
#[derive(PartialEq, Eq)]
pub struct PageRequestStatus {
    /// There was a response failure.
    pub response_failure: bool,
    /// There was a response to no group.
    pub unexpected_group: bool,
    #[bits(6)]
    __: u8,
    /// It has stopped: no page request is without a response. Means nothing while it is enabled.
    pub stopped: bool,
    #[bits(6)]
    __: u8,
    /// Responses to requests with a PASID have it, too.
    pub response_pasid_required: bool,
}
