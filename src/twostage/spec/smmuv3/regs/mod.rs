// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The two register pages (§6.2, §6.3): offsets and names, and what the SMMU can: IDR0 to IDR5,
//! IIDR, AIDR.

mod control;

use std::fmt;

use twostage_bits::bitfield;

use crate::spec::smmuv3::address_size;
pub use control::{
    Cr0, Cr1, Cr2, Gbpa, Gerror, IrqCfg0, IrqCtrl, StrtabBase, StrtabBaseCfg, StrtabFormat,
    PRIQ_LAST_ONLY,
};

/// Size of a register page, in bytes.
pub const PAGE_SIZE: u64 = 0x1_0000;
/// Size of all register pages, in bytes.
pub const SIZE: u64 = 2 * PAGE_SIZE;

macro_rules! registers {
    ($($(#[$doc:meta])* $name:ident = $offset:literal, $size:literal;)*) => {
        $($(#[$doc])* pub const $name: u64 = $offset;)*

        /// Offset, size in bytes, name.
        const REGISTERS: &[(u64, u64, &str)] = &[$(($offset, $size, stringify!($name)),)*];
    };
}

registers! {
    /// Identification 0: features.
    IDR0 = 0x00, 4;
    /// Identification 1: sizes.
    IDR1 = 0x04, 4;
    /// Identification 2: address translation operations.
    IDR2 = 0x08, 4;
    /// Identification 3: more features.
    IDR3 = 0x0c, 4;
    /// Identification 4: of the implementation.
    IDR4 = 0x10, 4;
    /// Identification 5: address sizes and granules.
    IDR5 = 0x14, 4;
    /// Implementation.
    IIDR = 0x18, 4;
    /// Architecture version.
    AIDR = 0x1c, 4;
    /// Control 0: enables.
    CR0 = 0x20, 4;
    /// Control 0, as far as it has taken effect.
    CR0ACK = 0x24, 4;
    /// Control 1: memory attributes of tables and queues.
    CR1 = 0x28, 4;
    /// Control 2: behaviours.
    CR2 = 0x2c, 4;
    /// Status.
    STATUSR = 0x40, 4;
    /// Global bypass attributes: used while translation is disabled.
    GBPA = 0x44, 4;
    /// Alternate global bypass attributes.
    AGBPA = 0x48, 4;
    /// Interrupt enables.
    IRQ_CTRL = 0x50, 4;
    /// Interrupt enables, as far as they have taken effect.
    IRQ_CTRLACK = 0x54, 4;
    /// Global errors: an error is active while its bit differs from that in [`GERRORN`].
    GERROR = 0x60, 4;
    /// Global errors, as acknowledged.
    GERRORN = 0x64, 4;
    /// Address of the message for global errors.
    GERROR_IRQ_CFG0 = 0x68, 8;
    /// Data of the message for global errors.
    GERROR_IRQ_CFG1 = 0x70, 4;
    /// Memory attributes of the message for global errors.
    GERROR_IRQ_CFG2 = 0x74, 4;
    /// Stream table address.
    STRTAB_BASE = 0x80, 8;
    /// Stream table format and size.
    STRTAB_BASE_CFG = 0x88, 4;
    /// Command queue address and size.
    CMDQ_BASE = 0x90, 8;
    /// Command queue write index.
    CMDQ_PROD = 0x98, 4;
    /// Command queue read index, and why it stopped.
    CMDQ_CONS = 0x9c, 4;
    /// Event queue address and size.
    EVENTQ_BASE = 0xa0, 8;
    /// Address of the message for events.
    EVENTQ_IRQ_CFG0 = 0xb0, 8;
    /// Data of the message for events.
    EVENTQ_IRQ_CFG1 = 0xb8, 4;
    /// Memory attributes of the message for events.
    EVENTQ_IRQ_CFG2 = 0xbc, 4;
    /// PRI queue address and size.
    PRIQ_BASE = 0xc0, 8;
    /// Address of the message for page requests.
    PRIQ_IRQ_CFG0 = 0xd0, 8;
    /// Data of the message for page requests.
    PRIQ_IRQ_CFG1 = 0xd8, 4;
    /// Memory attributes of the message for page requests.
    PRIQ_IRQ_CFG2 = 0xdc, 4;
    /// Event queue write index, and overflow; page 1.
    EVENTQ_PROD = 0x1_00a8, 4;
    /// Event queue read index, and acknowledged overflow; page 1.
    EVENTQ_CONS = 0x1_00ac, 4;
    /// PRI queue write index, and overflow; page 1.
    PRIQ_PROD = 0x1_00c8, 4;
    /// PRI queue read index, and acknowledged overflow; page 1.
    PRIQ_CONS = 0x1_00cc, 4;
}

/// The name of the register at byte `offset`, for traces; `"reserved"` if there is none.
pub fn name(offset: u64) -> &'static str {
    let found = REGISTERS.iter().find(|&&(start, size, _)| (start..start + size).contains(&offset));
    found.map_or("reserved", |&(_, _, name)| name)
}

/// [`Idr0::ttf`]: AArch64 translation tables.
pub const TTF_AARCH64: u8 = 0b10;
/// [`Idr0::stall_model`]: faults terminate, no transaction stalls.
pub const STALL_NONE: u8 = 0b01;
/// IDR0.STALL_MODEL: context descriptors choose whether faults stall, unless S1STALLD is set.
pub const STALL_OR_TERMINATE: u8 = 0b00;
/// [`Idr0::st_level`]: linear and 2-level stream tables.
pub const ST_LEVEL_2: u8 = 0b01;

/// [`Idr0::httu`]: which flags of translation tables an SMMU sets when it uses them (§3.13).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Httu {
    /// 0b00: none.
    #[default]
    None,
    /// 0b01: access flags.
    Access,
    /// 0b10: access flags, and the dirty state.
    Dirty,
}

impl Httu {
    /// Decodes `bits`; 0b11, which also has access flags in table descriptors, counts as
    /// [`Httu::Dirty`].
    pub const fn from_bits(bits: u8) -> Self {
        match bits {
            0 => Self::None,
            1 => Self::Access,
            _ => Self::Dirty,
        }
    }

    /// The bits of the field.
    pub const fn into_bits(self) -> u8 {
        self as u8
    }
}

impl fmt::Display for Httu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "off",
            Self::Access => "access",
            Self::Dirty => "dirty",
        })
    }
}

/// Identification register 0.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Idr0 {
    /// S2P: stage 2.
    pub s2p: bool,
    /// S1P: stage 1.
    pub s1p: bool,
    /// TTF: formats of translation tables; see [`TTF_AARCH64`].
    #[bits(2)]
    pub ttf: u8,
    /// COHACC: the SMMU's own accesses are coherent.
    pub cohacc: bool,
    /// BTM: broadcast TLB maintenance.
    pub btm: bool,
    /// HTTU: hardware updates of translation tables, as bits; see [`Httu`].
    #[bits(2)]
    pub httu: u8,
    /// DORMHINT: hint that the SMMU is dormant.
    pub dormhint: bool,
    /// Hyp: EL2 contexts of stage 1.
    pub hyp: bool,
    /// ATS: PCIe ATS.
    pub ats: bool,
    /// NS1ATS: no split-stage ATS.
    pub ns1ats: bool,
    /// ASID16: ASIDs have 16 bits, not 8.
    pub asid16: bool,
    /// MSI: interrupts as messages.
    pub msi: bool,
    /// SEV: wake-up events to processors.
    pub sev: bool,
    /// ATOS: address translation operations.
    pub atos: bool,
    /// PRI: page requests.
    pub pri: bool,
    /// VMW: matching of VMIDs with wildcards.
    pub vmw: bool,
    /// VMID16: VMIDs have 16 bits, not 8.
    pub vmid16: bool,
    /// CD2L: 2-level tables of context descriptors.
    pub cd2l: bool,
    /// VATOS: address translation operations of a virtual machine.
    pub vatos: bool,
    /// TTENDIAN: endianness of translation tables; 0 both, 2 little, 3 big.
    #[bits(2)]
    pub ttendian: u8,
    /// ATSRECERR: errors of ATS requests can be recorded.
    pub atsrecerr: bool,
    /// STALL_MODEL: 0 stall or terminate ([`STALL_OR_TERMINATE`]), 1 terminate ([`STALL_NONE`]),
    /// 2 stall.
    #[bits(2)]
    pub stall_model: u8,
    /// TERM_MODEL: terminated transactions are always aborted.
    pub term_model: bool,
    /// ST_LEVEL: stream tables; 0 linear, 1 also 2-level ([`ST_LEVEL_2`]).
    #[bits(2)]
    pub st_level: u8,
    #[bits(3)]
    __: u8,
}

/// Identification register 1.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Idr1 {
    /// SIDSIZE: bits of a StreamID, 0 to 32.
    #[bits(6)]
    pub sidsize: u8,
    /// SSIDSIZE: bits of a SubstreamID, 0 to 20.
    #[bits(5)]
    pub ssidsize: u8,
    /// PRIQS: binary logarithm of the maximum number of entries of the PRI queue.
    #[bits(5)]
    pub priqs: u8,
    /// EVENTQS: binary logarithm of the maximum number of entries of the event queue.
    #[bits(5)]
    pub eventqs: u8,
    /// CMDQS: binary logarithm of the maximum number of entries of the command queue.
    #[bits(5)]
    pub cmdqs: u8,
    /// ATTR_PERMS_OVR: incoming permissions can be overridden.
    pub attr_perms_ovr: bool,
    /// ATTR_TYPES_OVR: incoming memory types can be overridden.
    pub attr_types_ovr: bool,
    /// REL: preset addresses are relative to the SMMU.
    pub rel: bool,
    /// QUEUES_PRESET: addresses of queues are fixed.
    pub queues_preset: bool,
    /// TABLES_PRESET: addresses of tables are fixed.
    pub tables_preset: bool,
    /// ECMDQ: enhanced command queues.
    pub ecmdq: bool,
}

/// Identification register 3.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Idr3 {
    #[bits(2)]
    __: u8,
    /// HAD: hierarchical attributes can be disabled.
    pub had: bool,
    /// PBHA: page-based hardware attributes.
    pub pbha: bool,
    /// XNX: stage-2 control of execution by privilege.
    pub xnx: bool,
    /// PPS: PASIDs of page requests that fail automatically.
    pub pps: bool,
    #[bits(1)]
    __: u8,
    /// MPAM: memory partitioning and monitoring.
    pub mpam: bool,
    /// FWB: stage 2 forces memory types.
    pub fwb: bool,
    /// STT: small translation tables.
    pub stt: bool,
    /// RIL: invalidation by range, and level hints.
    pub ril: bool,
    /// BBML: required level of break-before-make, 0 to 2.
    #[bits(2)]
    pub bbml: u8,
    /// E0PD: unprivileged access to halves of the address space can be prevented.
    pub e0pd: bool,
    /// PTWNNC: walks of table entries in Normal non-cacheable memory.
    pub ptwnnc: bool,
    /// DPT: device permission table.
    pub dpt: bool,
    __: u16,
}

/// Identification register 5.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Idr5 {
    /// OAS: output address size; see [`Idr5::output_bits`].
    #[bits(3)]
    pub oas: u8,
    #[bits(1)]
    __: u8,
    /// GRAN4K: 4 KiB granule.
    pub gran4k: bool,
    /// GRAN16K: 16 KiB granule.
    pub gran16k: bool,
    /// GRAN64K: 64 KiB granule.
    pub gran64k: bool,
    #[bits(3)]
    __: u8,
    /// VAX: input address size; 0 is 48 bits, 1 is 52 bits with the 64 KiB granule.
    #[bits(2)]
    pub vax: u8,
    #[bits(4)]
    __: u8,
    /// STALL_MAX: the maximum number of stalled transactions.
    pub stall_max: u16,
}

impl Idr5 {
    /// The output address size in bits; `None` for the reserved encoding 7.
    pub const fn output_bits(self) -> Option<u8> {
        address_size(self.oas())
    }

    /// The input address size in bits; `None` for a reserved encoding.
    pub const fn input_bits(self) -> Option<u8> {
        match self.vax() {
            0 => Some(48),
            1 => Some(52),
            _ => None,
        }
    }
}

/// Implementation identification register.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Iidr {
    /// Implementer: JEP106 code.
    #[bits(12)]
    pub implementer: u16,
    /// Revision.
    #[bits(4)]
    pub revision: u8,
    /// Variant.
    #[bits(4)]
    pub variant: u8,
    /// ProductID.
    #[bits(12)]
    pub product_id: u16,
}

/// Architecture identification register.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Aidr {
    /// ArchMinorRev: the x of SMMUv3.x.
    #[bits(4)]
    pub minor: u8,
    /// ArchMajorRev: 0 for SMMUv3.
    #[bits(4)]
    pub major: u8,
    #[bits(24)]
    __: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_of_a_register_has_its_name() {
        assert_eq!((name(0), name(3), name(0x1c)), ("IDR0", "IDR0", "AIDR"));
        assert_eq!(
            (name(0x80), name(0x87), name(0x8c)),
            ("STRTAB_BASE", "STRTAB_BASE", "reserved")
        );
        assert_eq!((name(0x1_00a8), name(0xa8)), ("EVENTQ_PROD", "reserved"));
        assert_eq!(name(u64::MAX), "reserved");
    }

    #[test]
    fn registers_do_not_overlap() {
        for pair in REGISTERS.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
    }

    #[test]
    fn registers_are_aligned_and_on_the_pages() {
        for (offset, size, name) in REGISTERS {
            assert!(offset.is_multiple_of(*size) && offset + size <= SIZE, "{name}");
        }
    }

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        assert_eq!(Idr0::new().with_ttf(TTF_AARCH64).into_bits(), 1 << 3);
        assert_eq!(Idr0::new().with_hyp(true).with_ats(true).into_bits(), 3 << 9);
        assert_eq!(Idr0::new().with_asid16(true).with_msi(true).into_bits(), 3 << 12);
        assert_eq!(Idr0::new().with_pri(true).with_vmid16(true).into_bits(), 5 << 16);
        assert_eq!(Idr0::new().with_cd2l(true).with_ttendian(2).into_bits(), 1 << 19 | 1 << 22);
        assert_eq!(Idr0::new().with_stall_model(STALL_NONE).into_bits(), 1 << 24);
        assert_eq!(Idr0::new().with_term_model(true).with_st_level(1).into_bits(), 3 << 26);
        assert_eq!(Idr1::new().with_sidsize(63).into_bits(), 0x3f);
        assert_eq!(Idr1::new().with_ssidsize(31).into_bits(), 0x1f << 6);
        assert_eq!(Idr1::new().with_eventqs(31).into_bits(), 0x1f << 16);
        assert_eq!(Idr1::new().with_priqs(31).into_bits(), 0x1f << 11);
        assert_eq!(Idr1::new().with_cmdqs(31).into_bits(), 0x1f << 21);
        assert_eq!(Idr1::new().with_tables_preset(true).into_bits(), 1 << 30);
        assert_eq!(Idr3::new().with_had(true).with_fwb(true).into_bits(), 1 << 2 | 1 << 8);
        assert_eq!(Idr3::new().with_pps(true).into_bits(), 1 << 5);
        assert_eq!(Idr3::new().with_ril(true).with_bbml(3).into_bits(), 7 << 10);
        assert_eq!(Idr5::new().with_gran4k(true).with_gran64k(true).into_bits(), 5 << 4);
        assert_eq!(Idr5::new().with_vax(1).with_stall_max(1).into_bits(), 1 << 10 | 1 << 16);
        assert_eq!(Iidr::new().with_product_id(1).with_revision(1).into_bits(), 1 << 20 | 1 << 12);
        assert_eq!(Aidr::new().with_minor(2).into_bits(), 2);
    }

    #[test]
    fn address_sizes() {
        let bits = |oas| Idr5::new().with_oas(oas).output_bits();
        let all = [Some(32), Some(36), Some(40), Some(42), Some(44), Some(48), Some(52), None];
        assert_eq!([0, 1, 2, 3, 4, 5, 6, 7].map(bits), all);
        let bits = |vax| Idr5::new().with_vax(vax).input_bits();
        assert_eq!([0, 1, 2, 3].map(bits), [Some(48), Some(52), None, None]);
    }
}
