// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The words of a stream table entry (§5.2).

use twostage_bits::bitfield;

/// Bits 63:0 of a stream table entry (§5.2).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Ste0 {
    /// V: valid.
    pub v: bool,
    /// Config: the treatment of transactions, as bits; see [`super::StreamConfig`].
    #[bits(3)]
    pub config: u8,
    /// S1Fmt: shape of the context descriptor table, as bits; see [`super::Ste::s1_format`].
    #[bits(2)]
    pub s1fmt: u8,
    /// S1ContextPtr: address of the context descriptor table, in units of 64 bytes.
    #[bits(46)]
    pub s1contextptr: u64,
    #[bits(7)]
    __: u8,
    /// S1CDMax: the table has `2^s1cdmax` context descriptors; 0 disables substreams.
    #[bits(5)]
    pub s1cdmax: u8,
}

/// Bits 127:64 of a stream table entry (§5.2).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Ste1 {
    /// S1DSS: transactions without SubstreamID, as bits; see [`super::Ste::default_substream`].
    #[bits(2)]
    pub s1dss: u8,
    /// S1CIR: inner cacheability of the context descriptor table.
    #[bits(2)]
    pub s1cir: u8,
    /// S1COR: outer cacheability of the context descriptor table.
    #[bits(2)]
    pub s1cor: u8,
    /// S1CSH: shareability of the context descriptor table.
    #[bits(2)]
    pub s1csh: u8,
    /// S2HWU59 to S2HWU62: use of descriptor bits 62:59 by hardware.
    #[bits(4)]
    pub s2hwu: u8,
    /// DRE: destructive reads are allowed.
    pub dre: bool,
    /// CONT: `2^cont` consecutive entries are equal.
    #[bits(4)]
    pub cont: u8,
    /// DCP: directed cache prefetches are allowed.
    pub dcp: bool,
    /// PPAR: page request auto-responses have the PASID.
    pub ppar: bool,
    /// MEV: events may be merged.
    pub mev: bool,
    /// SW_RESERVED: for software.
    #[bits(4)]
    pub sw_reserved: u8,
    /// S1PIE: stage 1 permission indirection.
    pub s1pie: bool,
    /// S2FWB: stage 2 forces write-back.
    pub s2fwb: bool,
    /// S1MPAM: stage 1 determines the MPAM values.
    pub s1mpam: bool,
    /// S1STALLD: stage 1 must not stall transactions.
    pub s1stalld: bool,
    /// EATS: ATS, as bits; see [`super::Ste::ats`].
    #[bits(2)]
    pub eats: u8,
    /// STRW: StreamWorld.
    #[bits(2)]
    pub strw: u8,
    /// MemAttr: memory type that overrides the incoming one.
    #[bits(4)]
    pub memattr: u8,
    /// MTCFG: MemAttr is valid.
    pub mtcfg: bool,
    /// ALLOCCFG: allocation hints.
    #[bits(4)]
    pub alloccfg: u8,
    #[bits(3)]
    __: u8,
    /// SHCFG: shareability; 0b01 is the incoming one.
    #[bits(2)]
    pub shcfg: u8,
    /// NSCFG: Non-secure attribute.
    #[bits(2)]
    pub nscfg: u8,
    /// PRIVCFG: privilege; 0b00 is the incoming one.
    #[bits(2)]
    pub privcfg: u8,
    /// INSTCFG: instruction or data; 0b00 is the incoming one.
    #[bits(2)]
    pub instcfg: u8,
    /// IMPLEMENTATION DEFINED.
    #[bits(12)]
    pub implementation: u16,
}

/// Bits 191:128 of a stream table entry (§5.2): stage 2.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Ste2 {
    /// S2VMID: the virtual machine that translations belong to.
    pub s2vmid: u16,
    /// IMPLEMENTATION DEFINED.
    pub implementation: u16,
    /// S2T0SZ: stage 2 takes `64 - s2t0sz` bits of address.
    #[bits(6)]
    pub s2t0sz: u8,
    /// S2SL0: level at which the walk starts.
    #[bits(2)]
    pub s2sl0: u8,
    /// S2IR0: inner cacheability of the tables.
    #[bits(2)]
    pub s2ir0: u8,
    /// S2OR0: outer cacheability of the tables.
    #[bits(2)]
    pub s2or0: u8,
    /// S2SH0: shareability of the tables.
    #[bits(2)]
    pub s2sh0: u8,
    /// S2TG: granule, as TG0 of a context descriptor; see
    /// [`crate::spec::smmuv3::translation::Granule`].
    #[bits(2)]
    pub s2tg: u8,
    /// S2PS: size of physical addresses; see
    /// [`crate::spec::smmuv3::address_size`].
    #[bits(3)]
    pub s2ps: u8,
    /// S2AA64: the tables are VMSAv8-64.
    pub s2aa64: bool,
    /// S2ENDI: the tables are big-endian.
    pub s2endi: bool,
    /// S2AFFD: a clear access flag is not a fault.
    pub s2affd: bool,
    /// S2PTW: table walks must not access Device memory.
    pub s2ptw: bool,
    /// S2HD: hardware updates the dirty state.
    pub s2hd: bool,
    /// S2HA: hardware updates the access flag.
    pub s2ha: bool,
    /// S2S: faulting transactions stall.
    pub s2s: bool,
    /// S2R: faults are recorded.
    pub s2r: bool,
    /// S2HAFT: hardware updates the access flag of table descriptors.
    pub s2haft: bool,
    /// S2PIE: stage 2 permission indirection.
    pub s2pie: bool,
    /// S2POE: stage 2 permission overlays.
    pub s2poe: bool,
    /// DPT_VMATCH: how the device permission table matches VMIDs.
    #[bits(2)]
    pub dpt_vmatch: u8,
}

/// Bits 255:192 of a stream table entry (§5.2): the stage 2 table.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Ste3 {
    /// S2NSW and S2NSA: of Secure streams.
    #[bits(2)]
    pub secure: u8,
    /// S2SL0_2: bit 2 of S2SL0, for 52-bit addresses of the 4K and 16K granules.
    pub s2sl0_2: bool,
    /// S2DS: the 4K and 16K granules have 52-bit addresses.
    pub s2ds: bool,
    /// S2TTB: address of the stage 2 table, in units of 16 bytes.
    #[bits(48)]
    pub s2ttb: u64,
    #[bits(12)]
    __: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        assert_eq!(Ste0::new().with_config(7).into_bits(), 7 << 1);
        assert_eq!(Ste0::new().with_s1fmt(3).into_bits(), 3 << 4);
        assert_eq!(Ste0::new().with_s1contextptr(u64::MAX >> 18).into_bits(), 0xf_ffff_ffff_ffc0);
        assert_eq!(Ste0::new().with_s1cdmax(31).into_bits(), 31 << 59);
        for (bits, first, last) in [
            (Ste1::new().with_s1dss(3), 64, 65),
            (Ste1::new().with_s1cir(3), 66, 67),
            (Ste1::new().with_s1cor(3), 68, 69),
            (Ste1::new().with_s1csh(3), 70, 71),
            (Ste1::new().with_s2hwu(15), 72, 75),
            (Ste1::new().with_dre(true), 76, 76),
            (Ste1::new().with_cont(15), 77, 80),
            (Ste1::new().with_dcp(true), 81, 81),
            (Ste1::new().with_ppar(true), 82, 82),
            (Ste1::new().with_mev(true), 83, 83),
            (Ste1::new().with_sw_reserved(15), 84, 87),
            (Ste1::new().with_s1pie(true), 88, 88),
            (Ste1::new().with_s2fwb(true), 89, 89),
            (Ste1::new().with_s1mpam(true), 90, 90),
            (Ste1::new().with_s1stalld(true), 91, 91),
            (Ste1::new().with_eats(3), 92, 93),
            (Ste1::new().with_strw(3), 94, 95),
            (Ste1::new().with_memattr(15), 96, 99),
            (Ste1::new().with_mtcfg(true), 100, 100),
            (Ste1::new().with_alloccfg(15), 101, 104),
            (Ste1::new().with_shcfg(3), 108, 109),
            (Ste1::new().with_nscfg(3), 110, 111),
            (Ste1::new().with_privcfg(3), 112, 113),
            (Ste1::new().with_instcfg(3), 114, 115),
        ] {
            assert_eq!(bits.into_bits(), mask(first - 64, last - 64), "{bits:?}");
        }
        for (bits, first, last) in [
            (Ste2::new().with_s2vmid(u16::MAX), 128, 143),
            (Ste2::new().with_s2t0sz(63), 160, 165),
            (Ste2::new().with_s2sl0(3), 166, 167),
            (Ste2::new().with_s2ir0(3), 168, 169),
            (Ste2::new().with_s2or0(3), 170, 171),
            (Ste2::new().with_s2sh0(3), 172, 173),
            (Ste2::new().with_s2tg(3), 174, 175),
            (Ste2::new().with_s2ps(7), 176, 178),
            (Ste2::new().with_s2aa64(true), 179, 179),
            (Ste2::new().with_s2endi(true), 180, 180),
            (Ste2::new().with_s2affd(true), 181, 181),
            (Ste2::new().with_s2ptw(true), 182, 182),
            (Ste2::new().with_s2hd(true), 183, 183),
            (Ste2::new().with_s2ha(true), 184, 184),
            (Ste2::new().with_s2s(true), 185, 185),
            (Ste2::new().with_s2r(true), 186, 186),
        ] {
            assert_eq!(bits.into_bits(), mask(first - 128, last - 128), "{bits:?}");
        }
        assert_eq!(Ste3::new().with_s2ttb(u64::MAX >> 16).into_bits(), 0xf_ffff_ffff_fff0);
    }

    fn mask(first: u32, last: u32) -> u64 {
        u64::MAX >> (63 - last) & u64::MAX << first
    }
}
