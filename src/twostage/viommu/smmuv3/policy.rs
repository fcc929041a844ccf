// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The treatment of a stream's transactions, from the guest's stream table (§3.3, §5.1, §5.2).
//!
//! Pure functions: they read guest memory and nothing else. Context descriptors and translation
//! tables are not looked at: the host's hardware reads those itself.

use super::config::Capabilities;
use super::StreamPolicy;
use crate::spec::smmuv3::event::{EventId, EventRecord};
use crate::spec::smmuv3::regs::{Gbpa, StrtabBase, StrtabBaseCfg, StrtabFormat, STALL_NONE};
use crate::spec::smmuv3::stream_table::{
    EnableAts, L1StreamTableDescriptor, S1Format, Ste, Ste0, Ste1, StreamConfig,
    L1_DESCRIPTOR_SIZE, STE_SIZE,
};
use crate::spec::smmuv3::{StreamId, ADDRESS_WIDTH};
use crate::viommu::{BadAddress, TableMemory};

/// Why the stream table cannot serve the transactions of a stream: all are terminated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct ConfigFault {
    /// The event of such a transaction: C_BAD_STREAMID, F_STE_FETCH or C_BAD_STE.
    pub event: EventId,
    /// FetchAddr: the address that could not be read, 0 if there is none.
    pub fetch_address: u64,
    /// There is no valid entry: drivers turn streams off like that, so it need not be a mistake.
    pub off: bool,
}

impl ConfigFault {
    const BAD_STREAM_ID: Self = Self { event: EventId::BadStreamId, fetch_address: 0, off: true };
    pub(super) const BAD_STE: Self = Self { event: EventId::BadSte, fetch_address: 0, off: false };
    const INVALID_STE: Self = Self { off: true, ..Self::BAD_STE };

    /// The record of a transaction of `stream` that ends with this.
    pub(super) fn record(self, stream: StreamId) -> EventRecord {
        let second_address = self.fetch_address & EventRecord::FETCH_ADDRESS;
        EventRecord { second_address, ..EventRecord::new(self.event, stream, None) }
    }
}

impl From<BadAddress> for ConfigFault {
    fn from(error: BadAddress) -> Self {
        Self { event: EventId::SteFetch, fetch_address: error.address, off: false }
    }
}

/// The policy of every stream while translation is off (§6.3.14).
pub(super) const fn policy_while_disabled(gbpa: Gbpa) -> StreamPolicy {
    if gbpa.abort() {
        StreamPolicy::Abort
    } else {
        StreamPolicy::GlobalBypass
    }
}

/// The inputs of the decision while translation is on: guest memory, the SMMU's features, and the
/// stream table's location.
#[derive(Clone, Copy)]
pub(super) struct StreamTable<'a> {
    pub memory: &'a dyn TableMemory,
    pub caps: &'a Capabilities,
    pub base: StrtabBase,
    pub cfg: StrtabBaseCfg,
}

impl StreamTable<'_> {
    /// The policy of `stream`.
    ///
    /// # Errors
    /// The table has no valid entry for it.
    pub fn policy(&self, stream: StreamId) -> Result<StreamPolicy, ConfigFault> {
        let address = self.entry(stream)?;
        // An entry is 64-byte aligned, so none of its words wraps.
        let qw0 = Ste0::from_bits(self.memory.load_u64(address)?);
        let qw1 = Ste1::from_bits(self.memory.load_u64(address + 8)?);
        // The other words concern stage 2, which is not offered.
        stream_policy(&Ste { qw0, qw1, ..Ste::default() }, self.caps)
    }

    /// Address of the stream table entry of `stream`.
    fn entry(&self, stream: StreamId) -> Result<u64, ConfigFault> {
        let log2size = self.cfg.log2size().min(self.caps.idr1.sidsize());
        let index = u64::from(stream.raw());
        if index >> log2size != 0 {
            return Err(ConfigFault::BAD_STREAM_ID);
        }
        if self.cfg.format() != StrtabFormat::TwoLevel {
            return Ok(self.table(self.cfg.log2size() + 6) + index * STE_SIZE);
        }
        let split = self.cfg.effective_split();
        let table = self.table((self.cfg.log2size() + 3).saturating_sub(split));
        let descriptor = self.memory.load_u64(table + (index >> split) * L1_DESCRIPTOR_SIZE)?;
        let descriptor = L1StreamTableDescriptor::from_bits(descriptor);
        let index = index & ((1 << split) - 1);
        // A descriptor whose table is larger than one split is invalid.
        if descriptor.span() > split + 1 || index >= u64::from(descriptor.entries()) {
            return Err(ConfigFault::BAD_STREAM_ID);
        }
        Ok(self.within_output(descriptor.l2_table()) + index * STE_SIZE)
    }

    /// Address of the table that STRTAB_BASE names, of `2^log2_bytes` bytes but at least 64: it is
    /// aligned to its size.
    fn table(&self, log2_bytes: u8) -> u64 {
        let low = u64::MAX.checked_shl(log2_bytes.max(6).into()).unwrap_or(0);
        self.within_output(self.base.address()) & low
    }

    /// `address` without the bits above the output address size (§3.4.3).
    fn within_output(&self, address: u64) -> u64 {
        address & !above_output(self.caps)
    }
}

/// The bits above the size of output addresses, which are GPAs.
fn above_output(caps: &Capabilities) -> u64 {
    u64::MAX << caps.idr5.output_bits().unwrap_or(ADDRESS_WIDTH)
}

/// The policy of the entry `ste`.
///
/// The words of a stage 1 are normalized, so that equivalent entries are equal, and the host sees
/// no field that belongs to the owner of stage 2.
fn stream_policy(ste: &Ste, caps: &Capabilities) -> Result<StreamPolicy, ConfigFault> {
    if !ste.qw0.v() {
        return Err(ConfigFault::INVALID_STE);
    }
    match ste.config() {
        StreamConfig::Abort => Ok(StreamPolicy::Abort),
        StreamConfig::Bypass => Ok(StreamPolicy::Bypass),
        StreamConfig::Stage1 => stage1(ste, caps),
        StreamConfig::Stage2 | StreamConfig::Nested => Err(ConfigFault::BAD_STE),
    }
}

fn stage1(ste: &Ste, caps: &Capabilities) -> Result<StreamPolicy, ConfigFault> {
    let illegal = ste.qw0.s1cdmax() > caps.idr1.ssidsize() && caps.idr1.ssidsize() > 0
        || ste.context_table() & above_output(caps) != 0
        // Where stalls are not offered, there are none to disable.
        || ste.qw1.s1stalld() && caps.idr0.stall_model() == STALL_NONE
        || caps.idr0.ats() && ste.ats() == EnableAts::SplitStage;
    if illegal {
        return Err(ConfigFault::BAD_STE);
    }
    let qw0 = Ste0::new()
        .with_v(true)
        .with_config(StreamConfig::Stage1.into_bits())
        .with_s1contextptr(ste.qw0.s1contextptr());
    let qw1 = Ste1::new()
        .with_s1cir(ste.qw1.s1cir())
        .with_s1cor(ste.qw1.s1cor())
        .with_s1csh(ste.qw1.s1csh())
        .with_s1stalld(ste.qw1.s1stalld() || caps.disable_stalls)
        .with_eats(u8::from(caps.idr0.ats() && ste.ats() == EnableAts::Full));
    if ste.qw0.s1cdmax() == 0 || caps.idr1.ssidsize() == 0 {
        return Ok(StreamPolicy::Stage1 { ste: [qw0.into_bits(), qw1.into_bits()] });
    }
    let format = ste.s1_format();
    if format != S1Format::Linear && !caps.idr0.cd2l() {
        return Err(ConfigFault::BAD_STE);
    }
    let qw0 = qw0.with_s1fmt(format.into_bits()).with_s1cdmax(ste.qw0.s1cdmax());
    let qw1 = qw1.with_s1dss(ste.default_substream().into_bits());
    Ok(StreamPolicy::Stage1 { ste: [qw0.into_bits(), qw1.into_bits()] })
}

/// Whether some entry of a guest leads to a stage 1 with the words `ste`.
pub(super) fn is_possible(ste: [u64; 2], caps: &Capabilities) -> bool {
    let [qw0, qw1] = ste;
    let (qw0, qw1) = (Ste0::from_bits(qw0), Ste1::from_bits(qw1));
    // This is not from the entry where all stalls are disabled.
    let qw1 = qw1.with_s1stalld(qw1.s1stalld() && !caps.disable_stalls);
    stage1(&Ste { qw0, qw1, ..Ste::default() }, caps) == Ok(StreamPolicy::Stage1 { ste })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::viommu::smmuv3::SmmuConfig;
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    const MEMORY: usize = 1 << 20;
    const TABLE: u64 = 0x1_0000;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()
    }

    fn caps(substream_bits: u8) -> Capabilities {
        let config = SmmuConfig { substream_bits: Some(substream_bits), ..Default::default() };
        config.capabilities().unwrap()
    }

    fn write(memory: &GuestMemoryMmap, address: u64, words: &[u64]) {
        for (word, at) in words.iter().zip((address..).step_by(8)) {
            memory.write_obj(word.to_le(), GuestAddress(at)).unwrap();
        }
    }

    fn base(address: u64) -> StrtabBase {
        StrtabBase::new().with_addr(address >> 6)
    }

    fn linear(log2size: u8) -> StrtabBaseCfg {
        StrtabBaseCfg::new().with_log2size(log2size)
    }

    fn two_level(log2size: u8, split: u8) -> StrtabBaseCfg {
        linear(log2size).with_fmt(1).with_split(split)
    }

    /// The policy of `entry` on an SMMU with `caps`.
    fn of_entry(entry: [u64; 2], caps: &Capabilities) -> Result<StreamPolicy, EventId> {
        let memory = memory();
        write(&memory, TABLE + 3 * STE_SIZE, &entry);
        let tables = StreamTable { memory: &memory, caps, base: base(TABLE), cfg: linear(8) };
        tables.policy(StreamId(3)).map_err(|fault| fault.event)
    }

    const BAD_STE: Result<StreamPolicy, EventId> = Err(EventId::BadSte);

    /// An entry as Linux's driver writes it: stage 1, one context descriptor, write-back and inner
    /// shareable.
    const LINUX_STAGE_1: [u64; 2] = [0xf0f0_f0f0_f0c0 | 5 << 1 | 1, 1 << 2 | 1 << 4 | 3 << 6];

    #[test]
    fn entries_of_a_linux_driver_are_taken() {
        let caps = caps(0);
        assert_eq!(of_entry([1, 0], &caps), Ok(StreamPolicy::Abort));
        // Bypass, with the incoming shareability.
        assert_eq!(of_entry([4 << 1 | 1, 1 << 44], &caps), Ok(StreamPolicy::Bypass));
        let stage1 = Ok(StreamPolicy::Stage1 { ste: LINUX_STAGE_1 });
        assert_eq!(of_entry(LINUX_STAGE_1, &caps), stage1);
        assert_eq!(of_entry([0, 0], &caps), BAD_STE);
    }

    #[test]
    fn substreams_keep_their_fields_only_where_they_count() {
        let [qw0, qw1] = LINUX_STAGE_1;
        let wanted = [qw0 | 2 << 4 | 16 << 59, qw1 | 2];
        assert_eq!(of_entry(wanted, &caps(16)), Ok(StreamPolicy::Stage1 { ste: wanted }));
        assert_eq!(of_entry(wanted, &caps(15)), BAD_STE);
        let plain = Ok(StreamPolicy::Stage1 { ste: LINUX_STAGE_1 });
        assert_eq!(of_entry(wanted, &caps(0)), plain, "S1CDMax is ignored");
        assert_eq!(of_entry([qw0 | 2 << 4, qw1 | 2], &caps(16)), plain, "no substreams");
        let reserved = [qw0 | 3 << 4 | 1 << 59, qw1 | 3];
        let linear = [qw0 | 1 << 59, qw1];
        assert_eq!(of_entry(reserved, &caps(16)), Ok(StreamPolicy::Stage1 { ste: linear }));
    }

    #[test]
    fn two_levels_of_context_descriptors_are_an_offer() {
        let mut caps = caps(16);
        caps.idr0.set_cd2l(false);
        let [qw0, qw1] = LINUX_STAGE_1;
        assert_eq!(of_entry([qw0 | 1 << 4 | 4 << 59, qw1], &caps), BAD_STE);
        assert!(of_entry([qw0 | 4 << 59, qw1], &caps).is_ok());
        assert!(of_entry([qw0 | 1 << 4, qw1], &caps).is_ok());
    }

    #[test]
    fn the_host_sees_no_field_of_stage_2_or_of_the_architecture_at_large() {
        // The fields that iommufd accepts from the owner of stage 1 (IOMMU_HWPT_DATA_ARM_SMMUV3).
        const ALLOWED: [u64; 2] = [0xf80f_ffff_ffff_ffff, 0x3800_00ff];
        let [qw0, qw1] = LINUX_STAGE_1;
        let noisy = [qw0 | !ALLOWED[0], qw1 | !ALLOWED[1]];
        let policy = of_entry(noisy, &caps(16)).unwrap();
        assert_eq!(policy, StreamPolicy::Stage1 { ste: LINUX_STAGE_1 });
    }

    #[test]
    fn what_is_not_offered_is_illegal() {
        let [qw0, qw1] = LINUX_STAGE_1;
        let caps = caps(16);
        assert_eq!(of_entry([qw0 & !0xe | 6 << 1, qw1], &caps), BAD_STE, "stage 2");
        assert_eq!(of_entry([qw0 | 7 << 1, qw1], &caps), BAD_STE, "nested");
        assert_eq!(of_entry([qw0, qw1 | 1 << 27], &caps), BAD_STE, "S1STALLD");
        assert_eq!(of_entry([qw0 | 1 << 48, qw1], &caps), BAD_STE, "beyond OAS");
    }

    #[test]
    fn stalls_are_disabled_where_the_host_has_them() {
        let caps = Capabilities { disable_stalls: true, ..caps(0) };
        let [qw0, qw1] = LINUX_STAGE_1;
        let ste = [qw0, qw1 | 1 << 27];
        assert_eq!(of_entry(LINUX_STAGE_1, &caps), Ok(StreamPolicy::Stage1 { ste }));
    }

    #[test]
    fn ats_goes_by_what_is_offered() {
        let [qw0, qw1] = LINUX_STAGE_1;
        let off = Ok(StreamPolicy::Stage1 { ste: LINUX_STAGE_1 });
        let mut caps = caps(0);
        for eats in 0..4 {
            assert_eq!(of_entry([qw0, qw1 | eats << 28], &caps), off, "ignored without ATS");
        }
        caps.idr0.set_ats(true);
        let full = [qw0, qw1 | 1 << 28];
        assert_eq!(of_entry(full, &caps), Ok(StreamPolicy::Stage1 { ste: full }));
        assert_eq!(of_entry([qw0, qw1 | 2 << 28], &caps), BAD_STE, "split stages");
        assert_eq!(of_entry([qw0, qw1 | 3 << 28], &caps), off, "reserved");
    }

    #[test]
    fn while_translation_is_off_gbpa_decides() {
        let gbpa = Gbpa::new().with_shcfg(1);
        assert_eq!(policy_while_disabled(gbpa), StreamPolicy::GlobalBypass);
        assert_eq!(policy_while_disabled(gbpa.with_abort(true)), StreamPolicy::Abort);
    }

    #[test]
    fn the_table_has_an_end() {
        let (memory, caps) = (memory(), caps(0));
        write(&memory, TABLE + 0x1ff * STE_SIZE, &[1, 0]);
        let tables =
            |config| StreamTable { memory: &memory, caps: &caps, base: base(TABLE), cfg: config };
        let bad = ConfigFault::BAD_STREAM_ID;
        assert_eq!(tables(linear(9)).policy(StreamId(0x1ff)), Ok(StreamPolicy::Abort));
        assert_eq!(tables(linear(8)).policy(StreamId(0x1ff)), Err(bad));
        assert_eq!(tables(linear(0)).policy(StreamId(1)), Err(bad));
        // LOG2SIZE is capped at SIDSIZE.
        assert_eq!(tables(linear(63)).policy(StreamId(0x1_0000)), Err(bad));
    }

    #[test]
    fn tables_are_aligned_to_their_size() {
        let (memory, caps) = (memory(), caps(0));
        write(&memory, TABLE + STE_SIZE, &[1, 0]);
        let tables = |base, config| StreamTable { memory: &memory, caps: &caps, base, cfg: config };
        let low = base(TABLE + 0x3fc0);
        assert_eq!(tables(low, linear(8)).policy(StreamId(1)), Ok(StreamPolicy::Abort));
        // Two levels of 2^16 StreamIDs: 256 descriptors, 2 KiB.
        write(&memory, 0x2_0000, &[TABLE | 9]);
        let low = base(0x2_07c0);
        assert_eq!(tables(low, two_level(16, 8)).policy(StreamId(1)), Ok(StreamPolicy::Abort));
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let (memory, caps) = (memory(), caps(0));
        let end = MEMORY as u64;
        let tables = StreamTable { memory: &memory, caps: &caps, base: base(end), cfg: linear(4) };
        let fault = tables.policy(StreamId(2)).unwrap_err();
        assert_eq!((fault.event, fault.fetch_address), (EventId::SteFetch, end + 2 * STE_SIZE));
        let record = fault.record(StreamId(2));
        assert_eq!((record.id(), record.stream()), (Some(EventId::SteFetch), StreamId(2)));
        assert_eq!(record.second_address, fault.fetch_address);
        let tables = StreamTable { cfg: two_level(16, 8), ..tables };
        assert_eq!(tables.policy(StreamId(0x300)).unwrap_err().fetch_address, end + 24);
        write(&memory, TABLE, &[0x8_0000_0000 | 9]);
        let tables = StreamTable { base: base(TABLE), ..tables };
        let fault = tables.policy(StreamId(1)).unwrap_err();
        assert_eq!((fault.event, fault.fetch_address), (EventId::SteFetch, 0x8_0000_0040));
    }

    #[test]
    fn what_keeps_a_stream_off_is_no_mistake() {
        let caps = caps(0);
        let memory = memory();
        write(&memory, TABLE + STE_SIZE, &[6 << 1 | 1]);
        let table = StreamTable { memory: &memory, caps: &caps, base: base(TABLE), cfg: linear(1) };
        let off = |stream| table.policy(StreamId(stream)).unwrap_err().off;
        assert!(off(0), "not valid");
        assert!(!off(1), "stage 2");
        assert!(off(2), "beyond the table");
    }

    #[test]
    fn spans_end_where_they_say() {
        let (memory, caps) = (memory(), caps(0));
        for index in 0..64 {
            write(&memory, 0x2_0000 + index * STE_SIZE, &[1, 0]);
        }
        let decide = |span: u64, stream| {
            write(&memory, TABLE, &[0x2_0000 | span]);
            let config = two_level(16, 6);
            let tables =
                StreamTable { memory: &memory, caps: &caps, base: base(TABLE), cfg: config };
            tables.policy(StreamId(stream)).map_err(|fault| fault.event)
        };
        let bad = Err(EventId::BadStreamId);
        assert_eq!(decide(0, 0), bad);
        assert_eq!(decide(1, 0), Ok(StreamPolicy::Abort));
        assert_eq!(decide(1, 1), bad);
        assert_eq!(decide(7, 63), Ok(StreamPolicy::Abort));
        for span in 8..32 {
            assert_eq!(decide(span, 0), bad, "span {span} is more than SPLIT + 1");
        }
    }

    proptest! {
        #[test]
        fn one_level_and_two_say_the_same(
            entries in proptest::collection::vec((any::<u64>(), any::<u64>()), 1..16),
            split in prop_oneof![Just(6u8), Just(8), Just(10)],
            stream in 0u32..64,
        ) {
            let (memory, caps) = (memory(), caps(16));
            for (index, &(qw0, qw1)) in (0..).zip(&entries) {
                // The V bit and a stage more often than by chance.
                write(&memory, TABLE + index * STE_SIZE, &[qw0 | 1, qw1]);
            }
            write(&memory, 0x8_0000, &[TABLE | u64::from(split + 1)]);
            let (base_one, cfg) = (base(TABLE), linear(6));
            let one = StreamTable { memory: &memory, caps: &caps, base: base_one, cfg };
            let two = StreamTable { base: base(0x8_0000), cfg: two_level(6, split), ..one };
            prop_assert_eq!(one.policy(StreamId(stream)), two.policy(StreamId(stream)));
        }

        #[test]
        fn no_table_makes_a_panic_and_no_policy_says_more_than_the_host_takes(
            words in proptest::collection::vec(any::<u64>(), 64),
            address in any::<u64>(),
            config in any::<u32>(),
            stream in any::<u32>(),
            sid_bits in 1u8..=32,
            substream_bits in 0u8..=20,
        ) {
            let memory = memory();
            write(&memory, 0, &words);
            let smmu = SmmuConfig {
                stream_bits: sid_bits,
                substream_bits: Some(substream_bits),
                ats: true,
                ..Default::default()
            };
            let caps = smmu.capabilities().unwrap();
            for (address, stream) in [(address, stream), (0, stream % 8)] {
                let tables = StreamTable {
                    memory: &memory,
                    caps: &caps,
                    base: StrtabBase::from_bits(address),
                    cfg: StrtabBaseCfg::from_bits(config),
                };
                match tables.policy(StreamId(stream)) {
                    Ok(StreamPolicy::Stage1 { ste: [qw0, qw1] }) => {
                        prop_assert_eq!(qw0 & 0xf, 0xb);
                        prop_assert_eq!(qw0 & !0xf80f_ffff_ffff_ffff, 0);
                        prop_assert_eq!(qw1 & !0x1000_00ff, 0);
                    }
                    Ok(_) => {}
                    Err(fault) => prop_assert!(fault.fetch_address < 1 << 49),
                }
            }
        }
    }
}
