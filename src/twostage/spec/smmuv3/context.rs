// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Context descriptors (§5.4) and level 1 context descriptors (§5.3).

use twostage_bits::bitfield;

use super::translation::Granule;

/// Size of a level 1 context descriptor, in bytes.
pub const L1_DESCRIPTOR_SIZE: u64 = 8;
/// Size of a context descriptor, in bytes.
pub const CD_SIZE: u64 = 64;
/// 64-bit words of a context descriptor.
pub const CD_WORDS: usize = 8;

/// Level 1 context descriptor, L1CD (§5.3).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct L1ContextDescriptor {
    /// V: valid.
    pub v: bool,
    #[bits(11)]
    __: u16,
    /// L2Ptr: address of the level 2 table, in units of 4 KiB.
    #[bits(40)]
    pub l2ptr: u64,
    #[bits(12)]
    __: u16,
}

impl L1ContextDescriptor {
    /// Address of the level 2 table, in bytes.
    pub const fn l2_table(self) -> u64 {
        self.l2ptr() << 12
    }
}

/// Bits 63:0 of a context descriptor (§5.4).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Cd0 {
    /// T0SZ: TTB0 covers `64 - t0sz` bits of address.
    #[bits(6)]
    pub t0sz: u8,
    /// TG0: granule of TTB0, as bits; see [`Granule::from_tg0`].
    #[bits(2)]
    pub tg0: u8,
    /// IR0: inner cacheability of the tables of TTB0.
    #[bits(2)]
    pub ir0: u8,
    /// OR0: outer cacheability of the tables of TTB0.
    #[bits(2)]
    pub or0: u8,
    /// SH0: shareability of the tables of TTB0.
    #[bits(2)]
    pub sh0: u8,
    /// EPD0: no walks through TTB0.
    pub epd0: bool,
    /// ENDI: the tables are big-endian.
    pub endi: bool,
    /// T1SZ: TTB1 covers `64 - t1sz` bits of address.
    #[bits(6)]
    pub t1sz: u8,
    /// TG1: granule of TTB1, as bits; see [`Granule::from_tg1`].
    #[bits(2)]
    pub tg1: u8,
    /// IR1: inner cacheability of the tables of TTB1.
    #[bits(2)]
    pub ir1: u8,
    /// OR1: outer cacheability of the tables of TTB1.
    #[bits(2)]
    pub or1: u8,
    /// SH1: shareability of the tables of TTB1.
    #[bits(2)]
    pub sh1: u8,
    /// EPD1: no walks through TTB1.
    pub epd1: bool,
    /// V: valid.
    pub v: bool,
    /// IPS: size of output addresses; see [`super::address_size`].
    #[bits(3)]
    pub ips: u8,
    /// AFFD: a clear access flag is not a fault.
    pub affd: bool,
    /// WXN: writable pages are not executable.
    pub wxn: bool,
    /// UWXN: pages that unprivileged requests may write are not executable by privileged ones.
    pub uwxn: bool,
    /// TBI0: bits 63:56 of an address below are ignored.
    pub tbi0: bool,
    /// TBI1: bits 63:56 of an address above are ignored.
    pub tbi1: bool,
    /// PAN: privileged requests cannot access unprivileged pages.
    pub pan: bool,
    /// AA64: the tables are VMSAv8-64.
    pub aa64: bool,
    /// HD: hardware updates the dirty state.
    pub hd: bool,
    /// HA: hardware updates the access flag.
    pub ha: bool,
    /// S: faulting transactions stall.
    pub s: bool,
    /// R: faults are recorded.
    pub r: bool,
    /// A: faulting transactions are aborted (1), or read as zero with writes ignored (0).
    pub a: bool,
    /// ASET: the ASID is not of the set that processors share.
    pub aset: bool,
    /// ASID: the address space that translations belong to.
    pub asid: u16,
}

/// Bits 127:64 of a context descriptor (§5.4): TTB0.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Cd1 {
    /// NSCFG0: Non-secure attribute of the walks of Secure streams.
    pub nscfg0: bool,
    /// HAD0: attributes in table descriptors are ignored.
    pub had0: bool,
    /// E0PD0: unprivileged requests cannot access this half.
    pub e0pd0: bool,
    /// HAFT: hardware updates the access flag of table descriptors.
    pub haft: bool,
    /// TTB0: address of the top table, in units of 16 bytes.
    #[bits(48)]
    pub ttb0: u64,
    #[bits(6)]
    __: u8,
    /// PnCH: bit 52 of a descriptor is Protected, not Contiguous.
    pub pnch: bool,
    /// EPAN: PAN also applies to pages that unprivileged requests may only execute.
    pub epan: bool,
    /// HWU059 to HWU062: use of descriptor bits 62:59 by hardware.
    #[bits(4)]
    pub hwu0: u8,
}

/// Bits 191:128 of a context descriptor (§5.4): TTB1.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Cd2 {
    /// NSCFG1: Non-secure attribute of the walks of Secure streams.
    pub nscfg1: bool,
    /// HAD1: attributes in table descriptors are ignored.
    pub had1: bool,
    /// E0PD1: unprivileged requests cannot access this half.
    pub e0pd1: bool,
    /// AIE: attribute indices have four bits.
    pub aie: bool,
    /// TTB1: address of the top table, in units of 16 bytes.
    #[bits(48)]
    pub ttb1: u64,
    #[bits(6)]
    __: u8,
    /// DS: the 4K and 16K granules have 52-bit addresses, in both halves.
    pub ds: bool,
    /// PIE: permission indirection.
    pub pie: bool,
    /// HWU159 to HWU162: use of descriptor bits 62:59 by hardware.
    #[bits(4)]
    pub hwu1: u8,
}

/// Context descriptor, CD (§5.4): 512 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cd {
    /// Bits 63:0: validity, geometry, faults, ASID.
    pub qw0: Cd0,
    /// Bits 127:64: TTB0.
    pub qw1: Cd1,
    /// Bits 191:128: TTB1.
    pub qw2: Cd2,
    /// Bits 255:192: MAIR0 (low half) and MAIR1 (high half), one byte of memory attributes for each
    /// value of a descriptor's AttrIndx.
    pub mair: u64,
    /// Bits 319:256: AMAIR0 and AMAIR1, IMPLEMENTATION DEFINED.
    pub amair: u64,
    /// Bits 511:320: MPAM, permission indirection.
    pub rest: [u64; 3],
}

impl Cd {
    /// Decodes `words`.
    pub const fn from_words(words: [u64; CD_WORDS]) -> Self {
        let [qw0, qw1, qw2, mair, amair, r5, r6, r7] = words;
        Self {
            qw0: Cd0::from_bits(qw0),
            qw1: Cd1::from_bits(qw1),
            qw2: Cd2::from_bits(qw2),
            mair,
            amair,
            rest: [r5, r6, r7],
        }
    }

    /// The words of the descriptor.
    pub const fn to_words(self) -> [u64; CD_WORDS] {
        let [r5, r6, r7] = self.rest;
        [
            self.qw0.into_bits(),
            self.qw1.into_bits(),
            self.qw2.into_bits(),
            self.mair,
            self.amair,
            r5,
            r6,
            r7,
        ]
    }

    /// Address of the top table of TTB0, in bytes. The walk aligns it (§5.4).
    pub const fn table0(&self) -> u64 {
        self.qw1.ttb0() << 4
    }

    /// Address of the top table of TTB1, in bytes. The walk aligns it (§5.4).
    pub const fn table1(&self) -> u64 {
        self.qw2.ttb1() << 4
    }

    /// The granule of TTB0; `None` for the reserved encoding.
    pub const fn granule0(&self) -> Option<Granule> {
        Granule::from_tg0(self.qw0.tg0())
    }

    /// The granule of TTB1; `None` for the reserved encoding.
    pub const fn granule1(&self) -> Option<Granule> {
        Granule::from_tg1(self.qw0.tg1())
    }

    /// The memory attributes for a descriptor's AttrIndx (0 to 7). Higher bits are ignored.
    pub const fn memory_attributes(&self, attr_index: u8) -> u8 {
        (self.mair >> ((attr_index & 7) * 8)) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        for (bits, first, last) in [
            (Cd0::new().with_t0sz(63), 0, 5),
            (Cd0::new().with_tg0(3), 6, 7),
            (Cd0::new().with_ir0(3), 8, 9),
            (Cd0::new().with_or0(3), 10, 11),
            (Cd0::new().with_sh0(3), 12, 13),
            (Cd0::new().with_epd0(true), 14, 14),
            (Cd0::new().with_endi(true), 15, 15),
            (Cd0::new().with_t1sz(63), 16, 21),
            (Cd0::new().with_tg1(3), 22, 23),
            (Cd0::new().with_ir1(3), 24, 25),
            (Cd0::new().with_or1(3), 26, 27),
            (Cd0::new().with_sh1(3), 28, 29),
            (Cd0::new().with_epd1(true), 30, 30),
            (Cd0::new().with_v(true), 31, 31),
            (Cd0::new().with_ips(7), 32, 34),
            (Cd0::new().with_affd(true), 35, 35),
            (Cd0::new().with_wxn(true), 36, 36),
            (Cd0::new().with_uwxn(true), 37, 37),
            (Cd0::new().with_tbi0(true), 38, 38),
            (Cd0::new().with_tbi1(true), 39, 39),
            (Cd0::new().with_pan(true), 40, 40),
            (Cd0::new().with_aa64(true), 41, 41),
            (Cd0::new().with_hd(true), 42, 42),
            (Cd0::new().with_ha(true), 43, 43),
            (Cd0::new().with_s(true), 44, 44),
            (Cd0::new().with_r(true), 45, 45),
            (Cd0::new().with_a(true), 46, 46),
            (Cd0::new().with_aset(true), 47, 47),
            (Cd0::new().with_asid(u16::MAX), 48, 63),
        ] {
            assert_eq!(bits.into_bits(), mask(first, last), "{bits:?}");
        }
        for (bits, first, last) in [
            (Cd1::new().with_nscfg0(true), 64, 64),
            (Cd1::new().with_had0(true), 65, 65),
            (Cd1::new().with_e0pd0(true), 66, 66),
            (Cd1::new().with_haft(true), 67, 67),
            (Cd1::new().with_ttb0(u64::MAX >> 16), 68, 115),
            (Cd1::new().with_pnch(true), 122, 122),
            (Cd1::new().with_epan(true), 123, 123),
            (Cd1::new().with_hwu0(15), 124, 127),
        ] {
            assert_eq!(bits.into_bits(), mask(first - 64, last - 64), "{bits:?}");
        }
        for (bits, first, last) in [
            (Cd2::new().with_nscfg1(true), 128, 128),
            (Cd2::new().with_had1(true), 129, 129),
            (Cd2::new().with_e0pd1(true), 130, 130),
            (Cd2::new().with_aie(true), 131, 131),
            (Cd2::new().with_ttb1(u64::MAX >> 16), 132, 179),
            (Cd2::new().with_ds(true), 186, 186),
            (Cd2::new().with_pie(true), 187, 187),
            (Cd2::new().with_hwu1(15), 188, 191),
        ] {
            assert_eq!(bits.into_bits(), mask(first - 128, last - 128), "{bits:?}");
        }
        assert_eq!(
            L1ContextDescriptor::from_bits(0xf_ffff_ffff_f001).l2_table(),
            !0xfff & !0 >> 12
        );
    }

    fn mask(first: u32, last: u32) -> u64 {
        u64::MAX >> (63 - last) & u64::MAX << first
    }

    #[test]
    fn words_round_trip() {
        let words = [1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(Cd::from_words(words).to_words(), words);
    }

    #[test]
    fn a_descriptor_as_a_linux_driver_writes_it() {
        // 48 bits of 4 KiB pages through TTB0, none through TTB1, ASID 0x1234, faults are recorded
        // and abort, ASIDs are not shared.
        let cd = Cd::from_words([
            0x1234_0000_0000_0000 | 7 << 45 | 1 << 41 | 5 << 32 | 0xc000_0000 | 0x3510,
            0x8_7654_3000,
            0,
            0x0000_0000_f404_ff44,
            0,
            0,
            0,
            0,
        ]);
        assert!(cd.qw0.v() && cd.qw0.aa64() && cd.qw0.epd1() && !cd.qw0.epd0());
        assert!(cd.qw0.r() && cd.qw0.a() && cd.qw0.aset() && !cd.qw0.s());
        assert_eq!((cd.qw0.t0sz(), cd.qw0.ips(), cd.qw0.asid()), (16, 5, 0x1234));
        assert_eq!((cd.qw0.ir0(), cd.qw0.or0(), cd.qw0.sh0()), (1, 1, 3));
        assert_eq!(cd.granule0(), Some(Granule::K4));
        assert_eq!(cd.granule1(), None);
        assert_eq!(cd.table0(), 0x8_7654_3000);
        assert_eq!(cd.memory_attributes(1), 0xff);
        assert_eq!(cd.memory_attributes(3), 0xf4);
    }
}
