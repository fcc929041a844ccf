// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Decoding of context descriptors (§5.4).

use super::config::SmmuV3UnitConfig;
use super::stage1::Stage1;
use twostage::spec::smmuv3::address_size;
use twostage::spec::smmuv3::context::Cd;
use twostage::spec::smmuv3::translation::Granule;

/// The address bit that selects the half, whatever the bits above.
const HALF: u32 = 55;

/// The smallest address space that tables may translate, in bits: IDR3.STT is 0.
const MIN_INPUT_BITS: u8 = 25;

/// An address space of two halves, with their tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct AddressSpace {
    /// ASID.
    pub asid: u16,
    /// R: faults are recorded.
    pub recorded: bool,
    /// Of TTB0 and TTB1; none for a half without walks (EPD).
    halves: [Option<Stage1>; 2],
    /// TBI0 and TBI1: the upper byte of an address is ignored.
    top_byte_ignored: [bool; 2],
}

impl AddressSpace {
    /// Decodes `cd`; none if it is not valid, or ILLEGAL for an SMMU of `config`.
    pub fn new(cd: &Cd, config: &SmmuV3UnitConfig) -> Option<Self> {
        let word = cd.qw0;
        // TERM_MODEL is 1, STALL_MODEL 0b01, TTENDIAN 0b10, TTF 0b10 and HTTU 0.
        let endless = word.epd0() && word.epd1();
        let legal = word.v()
            && word.a()
            && !word.s()
            && (endless || !word.endi())
            && word.aa64()
            && !word.ha()
            && !word.hd();
        if !legal {
            return None;
        }
        let output_bits = address_size(word.ips())
            .map_or(config.output_bits(), |it| it.min(config.output_bits()));
        let half = |upper, disabled, table, granule: Option<Granule>, size: u8| {
            if disabled {
                return Some(None);
            }
            let granule = granule.filter(|granule| config.has_granule(*granule))?;
            let input_bits = 64u8.saturating_sub(size);
            let fits = (MIN_INPUT_BITS..=config.input_bits(granule)).contains(&input_bits);
            // Only the 64K granule has tables above 2^48.
            let table_bits = if granule == Granule::K64 { 52 } else { 48 }.min(output_bits);
            (fits && table >> table_bits == 0).then_some(Some(Stage1 {
                table,
                granule,
                input_bits,
                upper,
                output_bits,
                access_flag_ignored: word.affd(),
                write_no_execute: word.wxn(),
                privileged_access_never: word.pan(),
                recorded: word.r(),
            }))
        };
        let lower = half(false, word.epd0(), cd.table0(), cd.granule0(), word.t0sz())?;
        let upper = half(true, word.epd1(), cd.table1(), cd.granule1(), word.t1sz())?;
        Some(Self {
            asid: word.asid(),
            recorded: word.r(),
            halves: [lower, upper],
            top_byte_ignored: [word.tbi0(), word.tbi1()],
        })
    }

    /// GPAs (bytes) of the top tables of both halves; none for a half without walks.
    pub fn tables(&self) -> [Option<u64>; 2] {
        self.halves.map(|half| half.map(|tables| tables.table))
    }

    /// `address` as the tables take it, and the tables of its half.
    #[inline]
    pub fn half(&self, address: u64) -> (u64, Option<&Stage1>) {
        let upper = address >> HALF & 1 != 0;
        // In bounds: an index of 0 or 1 into two.
        let (half, ignored) =
            (&self.halves[usize::from(upper)], self.top_byte_ignored[usize::from(upper)]);
        let address = match (ignored, upper) {
            (false, _) => address,
            (true, false) => address & (u64::MAX >> 8),
            (true, true) => address | !(u64::MAX >> 8),
        };
        (address, half.as_ref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use twostage::spec::smmuv3::context::{Cd0, Cd1, Cd2};

    fn good() -> Cd {
        let qw0 = Cd0::new()
            .with_v(true)
            .with_a(true)
            .with_r(true)
            .with_aa64(true)
            .with_ips(5)
            .with_t0sz(16)
            .with_t1sz(16)
            .with_tg1(2)
            .with_asid(7);
        let table = 0x1000 >> 4;
        Cd {
            qw0,
            qw1: Cd1::new().with_ttb0(table),
            qw2: Cd2::new().with_ttb1(table),
            ..Cd::default()
        }
    }

    fn legal(cd: Cd) -> bool {
        AddressSpace::new(&cd, &SmmuV3UnitConfig::default()).is_some()
    }

    #[test]
    fn what_the_unit_has_not_is_illegal() {
        assert!(legal(good()));
        let with = |change: fn(Cd0) -> Cd0| Cd { qw0: change(good().qw0), ..good() };
        for (number, change) in [
            (|word| word.with_v(false)) as fn(Cd0) -> Cd0,
            |word| word.with_a(false),
            |word| word.with_s(true),
            |word| word.with_endi(true),
            |word| word.with_aa64(false),
            |word| word.with_ha(true),
            |word| word.with_hd(true),
            |word| word.with_t0sz(15),
            |word| word.with_t0sz(40),
            |word| word.with_t1sz(15),
            |word| word.with_tg0(3),
            |word| word.with_tg1(0),
            |word| word.with_ips(0).with_t0sz(16).with_epd1(false).with_tg0(3),
        ]
        .into_iter()
        .enumerate()
        {
            assert!(!legal(with(change)), "{number}");
        }
        assert!(legal(with(|word| word.with_tg0(3).with_epd0(true))), "nobody looks at it");
        let far = Cd { qw1: Cd1::new().with_ttb0(1 << 44), ..good() };
        assert!(!legal(far), "beyond 48 bits");
        let near = |ips| Cd {
            qw0: good().qw0.with_ips(ips),
            qw1: Cd1::new().with_ttb0(1 << 30),
            ..good()
        };
        assert!(legal(near(1)) && !legal(near(0)), "beyond IPS");
    }

    #[test]
    fn bit_55_says_which_half() {
        let space = AddressSpace::new(&good(), &SmmuV3UnitConfig::default()).unwrap();
        let upper = |address| space.half(address).1.map(|tables| tables.upper);
        assert_eq!((upper(0x1000), upper(u64::MAX)), (Some(false), Some(true)));
        assert_eq!(upper(0xff00_0000_0000_1000), Some(false));
        assert_eq!(space.half(0xff00_0000_0000_1000).0, 0xff00_0000_0000_1000);
        let tagged = Cd { qw0: good().qw0.with_tbi0(true).with_tbi1(true), ..good() };
        let space = AddressSpace::new(&tagged, &SmmuV3UnitConfig::default()).unwrap();
        assert_eq!(space.half(0xff00_0000_0000_1000).0, 0x1000);
        assert_eq!(space.half(0x00ff_ffff_ffff_f000).0, 0xffff_ffff_ffff_f000);
        let off = Cd { qw0: good().qw0.with_epd1(true), ..good() };
        let space = AddressSpace::new(&off, &SmmuV3UnitConfig::default()).unwrap();
        assert_eq!(space.half(u64::MAX).1, None);
    }
}
