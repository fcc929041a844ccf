// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Context descriptors: fetched from the user's tables, through stage 2 (§3.3.2, §5.2, §5.3),
//! and decoded (§5.4).

use std::sync::atomic::Ordering;

use super::config::SmmuV3UnitConfig;
use super::fault::{Fault, FaultModel};
use super::tables::{Shape, Stage1};
use crate::units::engine::{
    half, without_top_byte, Caches, Half, HostStage2, LocalCounters, PathRights, Stage2Refusal,
};
use twostage::spec::smmuv3::address_size;
use twostage::spec::smmuv3::context::{
    Cd, L1ContextDescriptor, CD_SIZE, CD_WORDS, L1_DESCRIPTOR_SIZE,
};
use twostage::spec::smmuv3::event::{EventClass, EventId};
use twostage::spec::smmuv3::regs::Httu;
use twostage::spec::smmuv3::stream_table::{DefaultSubstream, Ste};
use twostage::spec::smmuv3::translation::Granule;

/// The smallest address space that tables may translate, in bits: IDR3.STT is 0.
const MIN_INPUT_BITS: u8 = 25;

/// An address space of two halves, with their tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct AddressSpace {
    /// ASID.
    pub asid: u16,
    /// R and S: what becomes of faults.
    pub faults: FaultModel,
    /// Of TTB0 and TTB1; none for a half without walks (EPD).
    halves: [Option<Stage1>; 2],
    /// TBI0 and TBI1: the upper byte of an address is ignored.
    top_byte_ignored: [bool; 2],
}

impl AddressSpace {
    /// Decodes `cd`; none if it is not valid, or ILLEGAL for an SMMU of `config` and a stream that
    /// `may_stall` (S1STALLD).
    pub fn new(cd: &Cd, config: &SmmuV3UnitConfig, may_stall: bool) -> Option<Self> {
        let word = cd.qw0;
        let faults = match word.s() {
            true => FaultModel::Stall,
            false => FaultModel::Terminate { recorded: word.r() },
        };
        // TERM_MODEL is 1, TTENDIAN 0b10 and TTF 0b10.
        let endless = word.epd0() && word.epd1();
        let legal = word.v()
            && word.a()
            && (!word.s() || config.stalls && may_stall)
            && (endless || !word.endi())
            && word.aa64()
            && (!word.ha() || config.httu >= Httu::Access)
            && (!word.hd() || config.httu >= Httu::Dirty);
        if !legal {
            return None;
        }
        // HD without HA is reserved, and counts as neither.
        let updates = match (word.ha(), word.hd()) {
            (false, _) => Httu::None,
            (true, false) => Httu::Access,
            (true, true) => Httu::Dirty,
        };
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
            let tables = Stage1 {
                table,
                granule,
                input_bits,
                upper,
                output_bits,
                access_flag_ignored: word.affd(),
                updates,
                write_no_execute: word.wxn(),
                privileged_access_never: word.pan(),
                faults,
                shape: Shape::new(granule, input_bits),
                rights: PathRights::NONE,
            };
            (fits && table >> table_bits == 0).then(|| Some(tables.with_rights()))
        };
        let lower = half(false, word.epd0(), cd.table0(), cd.granule0(), word.t0sz())?;
        let upper = half(true, word.epd1(), cd.table1(), cd.granule1(), word.t1sz())?;
        Some(Self {
            asid: word.asid(),
            faults,
            halves: [lower, upper],
            top_byte_ignored: [word.tbi0(), word.tbi1()],
        })
    }

    /// GPAs (bytes) of the top tables of both halves; none for a half without walks.
    pub fn tables(&self) -> [Option<u64>; 2] {
        self.halves.map(|half| half.map(|tables| tables.table))
    }

    /// Both halves for lookups in the IOTLB.
    pub fn lookup(&self) -> [Half; 2] {
        [0, 1].map(|half| Half {
            // In bounds: two of two.
            shifts: self.halves[half].as_ref().map_or(&[], Stage1::shifts),
            top_byte_ignored: self.top_byte_ignored[half],
        })
    }

    /// `address` as the tables take it, and the tables of its half.
    pub fn half(&self, address: u64) -> (u64, Option<&Stage1>) {
        let half = half(address);
        // In bounds: an index of 0 or 1 into two.
        let (tables, ignored) = (self.halves[half].as_ref(), self.top_byte_ignored[half]);
        (if ignored { without_top_byte(address) } else { address }, tables)
    }
}

/// The context descriptor that a transaction uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Choice {
    /// The one with this number.
    Context(u32),
    /// None: stage 1 is bypassed.
    Bypass,
}

/// The context descriptor for a transaction with `pasid` of a stream with the entry `ste`.
pub(super) fn choose(ste: &Ste, pasid: Option<u32>) -> Result<Choice, Fault> {
    let contexts = ste.qw0.s1cdmax();
    let Some(pasid) = pasid else {
        return match ste.default_substream() {
            _ if contexts == 0 => Ok(Choice::Context(0)),
            DefaultSubstream::Terminate => Err(Fault::config(EventId::StreamDisabled)),
            DefaultSubstream::Bypass => Ok(Choice::Bypass),
            DefaultSubstream::Substream0 => Ok(Choice::Context(0)),
        };
    };
    // No shift overflows: S1CDMax has 5 bits.
    if contexts == 0 || pasid >> contexts != 0 {
        return Err(Fault::config(EventId::BadSubstreamId));
    }
    if pasid == 0 && ste.default_substream() == DefaultSubstream::Substream0 {
        return Err(Fault::config(EventId::StreamDisabled));
    }
    Ok(Choice::Context(pasid))
}

/// Reads context descriptors of one stream.
#[derive(Debug)]
pub(super) struct ContextTable<'a> {
    pub caches: &'a Caches,
    pub host: &'a HostStage2,
    pub counters: &'a LocalCounters,
    /// Size of addresses in bits.
    pub address_bits: u8,
}

impl ContextTable<'_> {
    /// The context descriptor number `number` (below 2^S1CDMax) of the stream with the entry `ste`.
    pub fn fetch(&self, ste: &Ste, number: u32) -> Result<Cd, Fault> {
        let (table, number) = (ste.context_table(), u64::from(number));
        let two_level = match ste.qw0.s1cdmax() {
            0 => None,
            _ => ste.s1_format().l2_index_bits(),
        };
        let Some(index_bits) = two_level else {
            return self.read(table + number * CD_SIZE);
        };
        let at = table + (number >> index_bits) * L1_DESCRIPTOR_SIZE;
        let descriptor = L1ContextDescriptor::from_bits(self.word(at)?);
        let leaf = descriptor.l2_table();
        if !descriptor.v() || leaf >> self.address_bits != 0 {
            return Err(Fault::config(EventId::BadSubstreamId));
        }
        self.read(leaf + (number & ((1 << index_bits) - 1)) * CD_SIZE)
    }

    /// The context descriptor at `ipa`.
    fn read(&self, ipa: u64) -> Result<Cd, Fault> {
        let mut words = [0; CD_WORDS];
        for (at, word) in (ipa..).step_by(8).zip(&mut words) {
            *word = self.word(at)?;
        }
        Ok(Cd::from_words(words))
    }

    /// The 8-byte word at `ipa`.
    fn word(&self, ipa: u64) -> Result<u64, Fault> {
        let refused = |why| Fault::stage2(why, EventClass::Cd, ipa);
        let page = self.caches.stage2(self.host, ipa, self.counters).map_err(refused)?;
        if !page.read {
            return Err(refused(Stage2Refusal::Denied));
        }
        let word = self.caches.word(page.place);
        let word = word.ok_or_else(|| Fault::fetch(EventId::CdFetch, EventClass::Cd, ipa))?;
        Ok(u64::from_le(word.load(Ordering::Acquire)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::engine::testing::*;
    use crate::units::smmuv3::tests::{
        stage1_event, stage2_event, ste, va, Machine, Tables, ALL, RW, SID, VMID,
    };
    use crate::units::smmuv3::Invalidation;
    use twostage::spec::smmuv3::context::{Cd0, Cd1, Cd2};
    use twostage::spec::smmuv3::stream_table::{S1Format, Ste0, Ste1};

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
        AddressSpace::new(&cd, &SmmuV3UnitConfig::default(), true).is_some()
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
    fn ha_and_hd_are_legal_as_far_as_httu_says() {
        use Httu::{Access, Dirty, None as Nothing};
        let illegal = None;
        for (httu, [none, ha, hd, both]) in [
            (Nothing, [Some(Nothing), illegal, illegal, illegal]),
            (Access, [Some(Nothing), Some(Access), illegal, illegal]),
            (Dirty, [Some(Nothing), Some(Access), Some(Nothing), Some(Dirty)]),
        ] {
            let config = SmmuV3UnitConfig { httu, ..Default::default() };
            for (ha, hd, expected) in
                [(false, false, none), (true, false, ha), (false, true, hd), (true, true, both)]
            {
                let cd = Cd { qw0: good().qw0.with_ha(ha).with_hd(hd), ..good() };
                let space = AddressSpace::new(&cd, &config, true);
                let found = space.map(|space| space.half(0).1.unwrap().updates);
                assert_eq!(found, expected, "{httu:?}, HA {ha}, HD {hd}");
            }
        }
    }

    #[test]
    fn bit_55_says_which_half() {
        let space = AddressSpace::new(&good(), &SmmuV3UnitConfig::default(), true).unwrap();
        let upper = |address| space.half(address).1.map(|tables| tables.upper);
        assert_eq!((upper(0x1000), upper(u64::MAX)), (Some(false), Some(true)));
        assert_eq!(upper(0xff00_0000_0000_1000), Some(false));
        assert_eq!(space.half(0xff00_0000_0000_1000).0, 0xff00_0000_0000_1000);
        let tagged = Cd { qw0: good().qw0.with_tbi0(true).with_tbi1(true), ..good() };
        let space = AddressSpace::new(&tagged, &SmmuV3UnitConfig::default(), true).unwrap();
        assert_eq!(space.half(0xff00_0000_0000_1000).0, 0x1000);
        assert_eq!(space.half(0x00ff_ffff_ffff_f000).0, 0xffff_ffff_ffff_f000);
        let off = Cd { qw0: good().qw0.with_epd1(true), ..good() };
        let space = AddressSpace::new(&off, &SmmuV3UnitConfig::default(), true).unwrap();
        assert_eq!(space.half(u64::MAX).1, None);
    }

    fn stream(s1cdmax: u8, s1dss: DefaultSubstream) -> Ste {
        let qw0 = Ste0::new().with_v(true).with_s1cdmax(s1cdmax);
        Ste { qw0, qw1: Ste1::new().with_s1dss(s1dss.into_bits()), ..Ste::default() }
    }

    #[test]
    fn s1dss_and_s1cdmax_say_which_context() {
        use DefaultSubstream::{Bypass, Substream0, Terminate};
        let bad = |id| Err(Fault::config(id));
        let disabled = bad(EventId::StreamDisabled);
        for (contexts, default, pasid, choice) in [
            (0, Terminate, None, Ok(Choice::Context(0))),
            (0, Terminate, Some(0), bad(EventId::BadSubstreamId)),
            (4, Terminate, None, disabled),
            (4, Bypass, None, Ok(Choice::Bypass)),
            (4, Substream0, None, Ok(Choice::Context(0))),
            (4, Substream0, Some(0), disabled),
            (4, Bypass, Some(0), Ok(Choice::Context(0))),
            (4, Substream0, Some(15), Ok(Choice::Context(15))),
            (4, Substream0, Some(16), bad(EventId::BadSubstreamId)),
        ] {
            assert_eq!(choose(&stream(contexts, default), pasid), choice, "{contexts} {pasid:?}");
        }
    }

    const IOVA: u64 = 0x1234_5000;

    /// A context descriptor with its own tables, which map [`IOVA`] to a page that holds `word`.
    fn context(machine: &Machine, asid: u16, word: u64) -> Cd {
        let root = machine.table(0x1000);
        let granule = Granule::K4;
        let tables = Tables { machine, root, granule, input_bits: 39, upper: false };
        let page = HIGH + word * 0x1000;
        machine.poke(page, word);
        tables.map(IOVA, 3, page, RW);
        let cd = tables.cd();
        Cd { qw0: cd.qw0.with_asid(asid), ..cd }
    }

    #[test]
    fn tables_of_context_descriptors_are_linear_or_of_two_levels() {
        for (format, leaf_bits) in
            [(S1Format::Linear, 12), (S1Format::TwoLevel4K, 6), (S1Format::TwoLevel64K, 10)]
        {
            let machine = Machine::new(SmmuV3UnitConfig::default());
            let (low, high) = (context(&machine, 1, 1), context(&machine, 2, 2));
            let (number, s1cdmax) = (1500u64, 12);
            let place = |table: u64, index: u64| table + index * CD_SIZE;
            let leaf_size = CD_SIZE << leaf_bits;
            let table = if format == S1Format::Linear {
                let table = machine.table(leaf_size);
                machine.poke_cd(place(table, 3), &low);
                machine.poke_cd(place(table, number), &high);
                table
            } else {
                let table = machine.table(0x1000);
                let leaf = |index: u64, cd: &Cd| {
                    let leaf = machine.table(leaf_size);
                    let pointer = L1ContextDescriptor::new().with_v(true).with_l2ptr(leaf >> 12);
                    let at = table + (index >> leaf_bits) * L1_DESCRIPTOR_SIZE;
                    machine.poke(at, pointer.into_bits());
                    machine.poke_cd(place(leaf, index % (1 << leaf_bits)), cd);
                };
                leaf(3, &low);
                leaf(number, &high);
                table
            };
            machine.install(None, VMID, Some(ste(table, s1cdmax, format, 0)));
            let mut port = machine.port();
            assert_eq!(machine.read(&mut port, pasid(3), IOVA), Ok(1), "{format:?}");
            assert_eq!(machine.read(&mut port, pasid(number as u32), IOVA), Ok(2), "{format:?}");
            let bad = |id| stage1_event(id);
            // Not valid; beyond S1CDMax; S1DSS.
            assert_eq!(machine.read(&mut port, pasid(4), IOVA), bad(EventId::BadCd), "{format:?}");
            let beyond = machine.read(&mut port, pasid(1 << 12), IOVA);
            assert_eq!(beyond, bad(EventId::BadSubstreamId), "{format:?}");
            let plain = machine.read(&mut port, PLAIN, IOVA);
            assert_eq!(plain, bad(EventId::StreamDisabled), "{format:?}");
            let missing = machine.read(&mut port, pasid(3000), IOVA);
            let expected = match format {
                S1Format::Linear => EventId::BadCd,
                _ => EventId::BadSubstreamId,
            };
            assert_eq!(missing, bad(expected), "{format:?}");
        }
    }

    #[test]
    fn requests_without_pasid_go_by_s1dss() {
        let machine = Machine::new(SmmuV3UnitConfig::default());
        let table = machine.table(0x1000);
        machine.poke_cd(table, &context(&machine, 1, 1));
        machine.poke(HIGH + 0x8000, 8);
        let mut port = machine.port();
        machine.install(None, VMID, Some(ste(table, 2, S1Format::Linear, 1)));
        assert_eq!(machine.read(&mut port, PLAIN, HIGH + 0x8000), Ok(8), "past stage 1");
        assert_eq!(machine.read(&mut port, PLAIN, NOWHERE), stage2_event(EventId::Translation));
        assert_eq!(machine.read(&mut port, PLAIN, 1 << 48), stage1_event(EventId::AddressSize));
        assert_eq!(machine.read(&mut port, pasid(0), IOVA), Ok(1));
        machine.install(None, VMID, Some(ste(table, 2, S1Format::Linear, 2)));
        assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1), "substream 0");
        let disabled = stage1_event(EventId::StreamDisabled);
        assert_eq!(machine.read(&mut port, pasid(0), IOVA), disabled);
    }

    #[test]
    fn a_context_descriptor_is_cached_until_a_command_names_it() {
        let machine = Machine::new(SmmuV3UnitConfig::default());
        let (one, two) = (context(&machine, 1, 1), context(&machine, 2, 2));
        let table = machine.table(0x1000);
        machine.install(None, VMID, Some(ste(table, 2, S1Format::Linear, 2)));
        let place = |number: u64| table + number * CD_SIZE;
        machine.poke_cd(place(0), &one);
        machine.poke_cd(place(3), &one);
        let mut port = machine.port();
        let context = |substream| Invalidation::Context { sid: SID, substream };
        for (attributes, number) in [(PLAIN, 0), (pasid(3), 3)] {
            assert_eq!(machine.read(&mut port, attributes, IOVA), Ok(1));
            machine.poke_cd(place(number), &two);
            for command in
                [context(1), Invalidation::Contexts { sid: SID + 1 }, ALL, va(IOVA, false)]
            {
                machine.invalidate(command);
                assert_eq!(machine.read(&mut port, attributes, IOVA), Ok(1), "{command:?}");
                let other = machine.read(&mut machine.port(), attributes, IOVA);
                assert_eq!(other, Ok(1), "of every thread");
            }
            machine.invalidate(context(number as u32));
            assert_eq!(machine.read(&mut port, attributes, IOVA), Ok(2));
            machine.poke_cd(place(number), &one);
            machine.invalidate(Invalidation::Contexts { sid: SID });
            assert_eq!(machine.read(&mut port, attributes, IOVA), Ok(1));
        }
        let counters = machine.unit.counters();
        assert!(counters.configuration_cache_hits > counters.configuration_cache_misses);
    }

    #[test]
    fn a_stream_table_entry_may_be_illegal() {
        let machine = Machine::new(SmmuV3UnitConfig { two_level_cd: false, ..Default::default() });
        let table = machine.table(0x1000);
        let good = ste(table, 2, S1Format::Linear, 0);
        let stalls = [good[0], Ste1::new().with_s1stalld(true).into_bits()];
        for words in [
            ste(table, 17, S1Format::Linear, 0),
            ste(table, 2, S1Format::TwoLevel4K, 0),
            ste(1 << 48, 2, S1Format::Linear, 0),
            stalls,
        ] {
            machine.install(None, VMID, Some(words));
            let outcome = machine.read(&mut machine.port(), pasid(1), IOVA);
            assert_eq!(outcome, stage1_event(EventId::BadSte), "{words:x?}");
        }
        machine.install(None, VMID, Some(ste(table, 0, S1Format::TwoLevel4K, 0)));
        let outcome = machine.read(&mut machine.port(), PLAIN, IOVA);
        assert_eq!(
            outcome,
            stage1_event(EventId::BadCd),
            "the format of one descriptor is ignored"
        );
    }

    #[test]
    fn descriptors_are_read_through_stage_2() {
        let machine = Machine::new(SmmuV3UnitConfig::default());
        machine.install(None, VMID, Some(ste(NOWHERE, 0, S1Format::Linear, 0)));
        let sink = machine.sink();
        let outcome = machine.read(&mut machine.port(), PLAIN, IOVA);
        assert_eq!(outcome, stage2_event(EventId::Translation));
        let record = sink.take()[0];
        assert_eq!((record.qw1.class(), record.second_address), (0, NOWHERE), "CLASS is CD");
        machine.install(None, VMID, Some(ste(1 << 47, 2, S1Format::TwoLevel64K, 2)));
        let outcome = machine.read(&mut machine.port(), PLAIN, IOVA);
        assert_eq!(outcome, stage2_event(EventId::Translation));
    }
}
