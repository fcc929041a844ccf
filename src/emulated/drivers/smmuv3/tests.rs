// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver through the verbs of an iommufd, with a unit behind it.

use std::sync::{Arc, Weak};
use twostage::sync::Mutex;

use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress};

use crate::{DeviceConfig, DmaAttributes, DmaPort, EmulatedHost, SmmuV3Unit, SmmuV3UnitConfig};
use twostage::iommufd::{
    iommu_hwpt_arm_smmuv3, iommu_viommu_arm_smmuv3_invalidate, Errno, FaultSink, HostFault,
    HostIommu, HwInfoData, HwptAlloc, HwptData, HwptFlags, InvalidateData, InvalidateError,
    MapTarget, ObjectId, Protection, UserMemory, Vevent, ViommuKind, VEVENTQ_ARM_SMMUV3,
};
use twostage::spec::pci::{Bdf, Pasid};
use twostage::spec::smmuv3::command::{AddressRange, Command, SyncSignal};
use twostage::spec::smmuv3::event::{EventId, EventRecord};
use twostage::spec::smmuv3::StreamId;

const PLAIN: DmaAttributes = DmaAttributes { pasid: None, privileged: false, execute: false };
const PARENT: HwptFlags = HwptFlags::new().with_nest_parent(true);
const PASID: HwptFlags = HwptFlags::new().with_pasid(true);
const MEMORY: u64 = 0x10_0000;
/// The guest's name of the device, and its ASID.
const VSID: u64 = 0x55;
const ASID: u64 = 7;
/// GPAs of the guest's context descriptor, its tables, and two pages.
const CONTEXT: u64 = 0x1000;
const TABLES: u64 = 0x2000;
const FIRST: u64 = 0x8000;
const SECOND: u64 = 0x9000;
const IOVA: u64 = 0x12_3456_7000;
/// A stream table entry of stage 1 at [`CONTEXT`].
const STAGE1: [u64; 2] = [1 | 5 << 1 | CONTEXT, 0];
/// The same, with ATS (EATS).
const STAGE1_ATS: [u64; 2] = [STAGE1[0], 1 << 28];
const BYPASS: [u64; 2] = [1 | 4 << 1, 0];
const ABORT: [u64; 2] = [1, 0];

type Outcome = twostage::iommufd::Result<ObjectId>;

/// A host with two devices behind one SMMU, one behind another, and a guest's memory.
struct Bench {
    host: Arc<EmulatedHost>,
    memory: Arc<GuestRegionMmap>,
    dev: ObjectId,
    ioas: ObjectId,
}

impl Bench {
    fn new(config: SmmuV3UnitConfig) -> Self {
        let host = EmulatedHost::new();
        let units = [(); 2].map(|()| host.add_unit(SmmuV3Unit::new(config.clone())));
        let device = DeviceConfig { pasid_bits: 8, ..DeviceConfig::default() };
        for (name, unit, rid) in [("a", units[0], 8), ("b", units[0], 9), ("far", units[1], 8)] {
            host.add_device(name, unit, Bdf::from_raw(rid), device.clone()).unwrap();
        }
        let memory =
            Arc::new(GuestRegionMmap::from_range(GuestAddress(0), MEMORY as usize, None).unwrap());
        let (dev, ioas) = (host.device_bind("a").unwrap(), host.ioas_alloc().unwrap());
        let whole = UserMemory::whole(memory.clone());
        host.ioas_map(ioas, &whole, MapTarget::Fixed(0), Protection::READ_WRITE).unwrap();
        Self { host, memory, dev, ioas }
    }

    fn hwpt(&self, dev: ObjectId, pt: ObjectId, flags: HwptFlags, data: HwptData) -> Outcome {
        self.host.hwpt_alloc(&HwptAlloc { flags, dev, pt, data, fault: None })
    }

    fn parent(&self) -> ObjectId {
        self.hwpt(self.dev, self.ioas, PARENT, HwptData::None).unwrap()
    }

    fn viommu(&self, parent: ObjectId) -> ObjectId {
        self.host.viommu_alloc(ViommuKind::ArmSmmuV3, self.dev, parent).unwrap()
    }

    fn nested(&self, viommu: ObjectId, ste: [u64; 2]) -> Outcome {
        let data = HwptData::ArmSmmuV3(iommu_hwpt_arm_smmuv3 { ste });
        self.hwpt(self.dev, viommu, HwptFlags::new(), data)
    }

    fn port(&self) -> DmaPort {
        self.host.dma_port("a").unwrap()
    }

    fn set(&self, gpa: u64, word: u64) {
        self.memory.write_obj(word, MemoryRegionAddress(gpa)).unwrap();
    }

    fn read(&self, iova: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        self.port().read(PLAIN, iova, &mut bytes).ok().map(|()| u64::from_le_bytes(bytes))
    }

    /// Writes a context descriptor and tables that map [`IOVA`] to `page`.
    fn lead(&self, page: u64) {
        let word = 16 | 1 << 30 | 1 << 31 | 5 << 32 | 1 << 41 | 3 << 45 | ASID << 48;
        self.set(CONTEXT, word);
        self.set(CONTEXT + 8, TABLES);
        for level in 0..4u64 {
            let index = IOVA >> (39 - 9 * level) & 0x1ff;
            let next = TABLES + (level + 1) * 0x1000;
            let value = if level == 3 { page | 0xc43 } else { next | 3 };
            self.set(TABLES + level * 0x1000 + index * 8, value);
        }
    }

    fn invalidate(&self, viommu: ObjectId, commands: &[Command]) -> Result<(), InvalidateError> {
        let words: Vec<_> = commands.iter().map(Command::encode).collect();
        self.invalidate_raw(viommu, &words)
    }

    fn invalidate_raw(&self, viommu: ObjectId, words: &[[u64; 2]]) -> Result<(), InvalidateError> {
        let commands: Vec<_> =
            words.iter().map(|&cmd| iommu_viommu_arm_smmuv3_invalidate { cmd }).collect();
        self.host.hwpt_invalidate(viommu, InvalidateData::ArmSmmuV3(&commands))
    }

    /// A vIOMMU that knows the device, which is attached to a stage 1 that maps to `page`.
    fn translated(&self, page: u64) -> ObjectId {
        let viommu = self.viommu(self.parent());
        self.host.vdevice_alloc(viommu, self.dev, VSID).unwrap();
        self.lead(page);
        self.attach(viommu, STAGE1);
        viommu
    }

    /// The user's stream table entry is `ste` from now on.
    fn attach(&self, viommu: ObjectId, ste: [u64; 2]) {
        let nested = self.nested(viommu, ste).unwrap();
        self.host.device_attach(self.dev, None, nested).unwrap();
    }
}

fn bench() -> Bench {
    Bench::new(SmmuV3UnitConfig::default())
}

fn errno<T: std::fmt::Debug>(result: twostage::iommufd::Result<T>) -> Errno {
    result.unwrap_err().errno
}

/// CMD_TLBI_NH_VA of [`IOVA`]; the VMID is ignored.
fn tlbi() -> Command {
    Command::TlbiNhVa { vmid: 99, asid: ASID as u16, range: AddressRange::at(IOVA) }
}

fn cfgi(vsid: u64) -> Command {
    let substream = Pasid::new(0).unwrap();
    Command::CfgiCd { stream: StreamId(vsid as u32), substream, leaf: true }
}

const SYNC: Command = Command::Sync { signal: SyncSignal::None };

#[test]
fn page_tables_are_of_the_stage_that_flags_ask_for() {
    let bench = bench();
    let alloc = |flags| bench.hwpt(bench.dev, bench.ioas, flags, HwptData::None);
    let dirty = HwptFlags::new().with_dirty_tracking(true);
    for flags in [HwptFlags::new(), PARENT, PASID, dirty, dirty.with_pasid(true)] {
        alloc(flags).unwrap();
    }
    // Linux tracks dirty pages in stage 1 only.
    for flags in [PARENT.with_pasid(true), PARENT.with_dirty_tracking(true)] {
        assert_eq!(errno(alloc(flags)), Errno::EOPNOTSUPP, "{flags:?}");
    }
    let plain = Bench::new(SmmuV3UnitConfig { nesting: false, ..Default::default() });
    for flags in [PARENT, PASID, dirty] {
        let outcome = plain.hwpt(plain.dev, plain.ioas, flags, HwptData::None);
        assert_eq!(errno(outcome), Errno::EOPNOTSUPP, "{flags:?}");
    }
    let HwInfoData::ArmSmmuV3(info) = bench.host.get_hw_info(bench.dev).unwrap().data else {
        panic!("an SMMU");
    };
    assert_eq!(info.idr[0] & 3, 3);
}

#[test]
fn the_window_of_messages_is_no_memory() {
    let bench = bench();
    bench.host.device_attach(bench.dev, None, bench.ioas).unwrap();
    let ranges = bench.host.ioas_iova_ranges(bench.ioas).unwrap().allowed;
    assert!(ranges.contains(&(0..=0x7ff_ffff)), "{ranges:x?}");
    assert!(ranges.iter().any(|range| *range.start() == 0x810_0000), "{ranges:x?}");
}

#[test]
fn a_viommu_stands_on_a_parent_of_its_own_smmu_that_cannot_be_got_around() {
    let bench = bench();
    let parent = bench.parent();
    let far = bench.host.device_bind("far").unwrap();
    let alloc = |dev, hwpt| bench.host.viommu_alloc(ViommuKind::ArmSmmuV3, dev, hwpt);
    assert_eq!(errno(alloc(far, parent)), Errno::EINVAL);
    let plain = bench.hwpt(bench.dev, bench.ioas, HwptFlags::new(), HwptData::None).unwrap();
    assert_eq!(errno(alloc(bench.dev, plain)), Errno::EINVAL);
    alloc(bench.dev, parent).unwrap();
    for (s2fwb, canwbs, fits) in [(false, false, false), (false, true, true), (true, false, true)] {
        let bench = Bench::new(SmmuV3UnitConfig { s2fwb, canwbs, ..Default::default() });
        let outcome = bench.host.viommu_alloc(ViommuKind::ArmSmmuV3, bench.dev, bench.parent());
        assert_eq!(outcome.is_ok(), fits, "{s2fwb} {canwbs}");
        assert!(fits || errno(outcome) == Errno::EOPNOTSUPP);
    }
}

#[test]
fn user_tables_stand_on_a_viommu_only() {
    let bench = bench();
    let (parent, data) =
        (bench.parent(), HwptData::ArmSmmuV3(iommu_hwpt_arm_smmuv3 { ste: STAGE1 }));
    let viommu = bench.viommu(parent);
    let alloc = |pt, flags, data| bench.hwpt(bench.dev, pt, flags, data);
    let plain = HwptFlags::new();
    assert_eq!(errno(alloc(parent, plain, data)), Errno::EOPNOTSUPP);
    assert_eq!(errno(alloc(viommu, PASID, data)), Errno::EOPNOTSUPP);
    let other = HwptData::VtdS1(Default::default());
    assert_eq!(errno(alloc(viommu, plain, other)), Errno::EINVAL);
    assert_eq!(errno(bench.nested(viommu, [1 | 6 << 1, 0])), Errno::EIO);
    let nested = alloc(viommu, plain, data).unwrap();
    let none = InvalidateData::ArmSmmuV3(&[]);
    let outcome = bench.host.hwpt_invalidate(nested, none);
    assert_eq!(outcome.unwrap_err().error.errno, Errno::EOPNOTSUPP);
}

#[test]
fn a_translated_stream_needs_a_vdevice() {
    let bench = bench();
    let viommu = bench.viommu(bench.parent());
    let attach = |nested| bench.host.device_attach(bench.dev, None, nested);
    bench.set(FIRST, 1);
    attach(bench.nested(viommu, BYPASS).unwrap()).unwrap();
    assert_eq!(bench.read(FIRST), Some(1));
    for ste in [ABORT, [0, 0], [0xfff0, u64::MAX]] {
        attach(bench.nested(viommu, ste).unwrap()).unwrap();
        assert_eq!(bench.read(FIRST), None, "{ste:x?}");
    }
    let nested = bench.nested(viommu, STAGE1).unwrap();
    assert_eq!(errno(attach(nested)), Errno::ENOENT);
    assert_eq!(bench.read(FIRST), None, "nothing has changed");
    bench.host.vdevice_alloc(viommu, bench.dev, VSID).unwrap();
    bench.lead(FIRST);
    attach(nested).unwrap();
    assert_eq!(bench.read(IOVA), Some(1));
    bench.host.device_detach(bench.dev, None).unwrap();
    assert_eq!(bench.read(IOVA), None);
}

#[test]
fn pasids_of_the_hosts_and_tables_of_the_users_exclude_each_other() {
    let bench = bench();
    let (parent, host) = (bench.parent(), &bench.host);
    let viommu = bench.viommu(parent);
    host.vdevice_alloc(viommu, bench.dev, VSID).unwrap();
    let nested = bench.nested(viommu, STAGE1).unwrap();
    let stage1 = bench.hwpt(bench.dev, bench.ioas, PASID, HwptData::None).unwrap();
    host.device_attach(bench.dev, Some(5), stage1).unwrap();
    let busy = |pt| errno(host.device_attach(bench.dev, None, pt));
    // The core refuses it before the driver: these are without the PASID flag.
    assert_eq!((busy(nested), busy(parent)), (Errno::EINVAL, Errno::EINVAL));
    bench.set(FIRST, 3);
    let mut bytes = [0; 8];
    let with_pasid = DmaAttributes { pasid: Some(5), ..PLAIN };
    bench.port().read(with_pasid, FIRST, &mut bytes).unwrap();
    assert_eq!(u64::from_le_bytes(bytes), 3);
    host.device_detach(bench.dev, Some(5)).unwrap();
    assert!(bench.port().read(with_pasid, FIRST, &mut bytes).is_err());
    host.device_attach(bench.dev, None, nested).unwrap();
    assert_eq!(errno(host.device_attach(bench.dev, Some(5), stage1)), Errno::EINVAL);
}

#[test]
fn a_device_has_its_own_translations_until_cmd_atc_inv() {
    let bench = Bench::new(SmmuV3UnitConfig { ats: true, ..Default::default() });
    bench.set(FIRST, 1);
    bench.set(SECOND, 2);
    let viommu = bench.translated(FIRST);
    bench.attach(viommu, STAGE1_ATS);
    let device = bench.port().control();
    device.set_device_tlb(true);
    assert_eq!(bench.read(IOVA), Some(1));
    bench.lead(SECOND);
    let atc = |substream, address, size| {
        let stream = StreamId(VSID as u32);
        Command::AtcInv { stream, substream, global: false, address, size }
    };
    let (far, other) = (atc(None, IOVA + 0x1000, 0), atc(Pasid::new(1), IOVA, 0));
    bench.invalidate(viommu, &[tlbi(), far, other]).unwrap();
    assert_eq!(bench.read(IOVA), Some(1), "stale");
    device.set_silent(true);
    // Of eight pages around it.
    let stopped = bench.invalidate(viommu, &[tlbi(), atc(None, IOVA, 3)]).unwrap_err();
    assert_eq!((stopped.done, stopped.error.errno), (1, Errno::ETIMEDOUT));
    assert_eq!(bench.read(IOVA), Some(2));
    device.set_silent(false);
    bench.invalidate(viommu, &[atc(None, 0, 52)]).unwrap();
}

#[test]
fn a_device_has_none_of_a_user_that_has_not_set_eats() {
    let bench = Bench::new(SmmuV3UnitConfig { ats: true, ..Default::default() });
    for (page, word) in [(FIRST, 1), (SECOND, 2)] {
        bench.set(page, word);
    }
    let viommu = bench.translated(FIRST);
    bench.port().control().set_device_tlb(true);
    for (ste, stale) in [(STAGE1_ATS, true), (STAGE1, false), (STAGE1_ATS, true)] {
        bench.lead(FIRST);
        bench.attach(viommu, ste);
        bench.invalidate(viommu, &[tlbi()]).unwrap();
        assert_eq!(bench.read(IOVA), Some(1), "nothing is left of another entry");
        bench.lead(SECOND);
        bench.invalidate(viommu, &[tlbi()]).unwrap();
        assert_eq!(bench.read(IOVA), Some(if stale { 1 } else { 2 }));
    }
}

#[test]
fn commands_name_what_is_the_users() {
    let bench = Bench::new(SmmuV3UnitConfig { ats: true, ..Default::default() });
    bench.set(FIRST, 1);
    bench.set(SECOND, 2);
    let viommu = bench.translated(FIRST);
    assert_eq!(bench.read(IOVA), Some(1));
    let (vmid, asid) = (99, ASID as u16);
    let vaa = Command::TlbiNhVaa { vmid, range: AddressRange::at(IOVA) };
    let atc = Command::AtcInv {
        stream: StreamId(VSID as u32),
        substream: None,
        global: false,
        address: 0,
        size: 52,
    };
    let all = [tlbi(), vaa, Command::TlbiNhAsid { vmid, asid }, Command::TlbiNhAll { vmid }];
    let (mut page, mut word) = (SECOND, 2);
    for command in all.into_iter().chain([Command::TlbiNsnhAll]) {
        bench.lead(page);
        bench.invalidate(viommu, &[cfgi(VSID), atc]).unwrap();
        assert_ne!(bench.read(IOVA), Some(word), "stale");
        bench.invalidate(viommu, &[command]).unwrap();
        assert_eq!(bench.read(IOVA), Some(word), "{command:?}");
        (page, word) = if word == 2 { (FIRST, 1) } else { (SECOND, 2) };
    }
    let stream = StreamId(VSID as u32);
    for command in [
        SYNC,
        Command::CfgiSte { stream, leaf: true },
        Command::CfgiSteRange { stream, range: 31 },
        Command::TlbiS12Vmall { vmid },
        Command::TlbiEl2All,
        Command::PrefetchConfig { stream, substream: None },
        cfgi(VSID + 1),
        cfgi(8),
        Command::CfgiCdAll { stream: StreamId(9) },
    ] {
        let error = bench.invalidate(viommu, &[command]).unwrap_err();
        assert_eq!((error.done, error.error.errno), (0, Errno::EIO), "{command:?}");
    }
    assert_eq!(bench.invalidate(viommu, &[]).unwrap_err().error.errno, Errno::EINVAL);
}

#[test]
fn commands_of_a_refused_block_count_as_done_and_are_not() {
    let bench = bench();
    bench.set(FIRST, 1);
    bench.set(SECOND, 2);
    let viommu = bench.translated(FIRST);
    assert_eq!(bench.read(IOVA), Some(1));
    bench.lead(SECOND);
    let error = bench.invalidate(viommu, &[tlbi(), tlbi(), SYNC, tlbi()]).unwrap_err();
    assert_eq!((error.done, error.error.errno), (2, Errno::EIO));
    assert_eq!(bench.read(IOVA), Some(1), "none was issued");
    // The relevant one is in a block before the refused one's.
    let mut commands = vec![cfgi(VSID); 62];
    commands.push(tlbi());
    commands.extend([cfgi(VSID); 10]);
    commands.push(SYNC);
    let error = bench.invalidate(viommu, &commands).unwrap_err();
    assert_eq!(error.done, 73);
    assert_eq!(bench.read(IOVA), Some(2), "the first 63 were issued");
}

/// Records the faults.
#[derive(Default)]
struct Faults(Mutex<Vec<HostFault>>);

impl FaultSink for Faults {
    fn dma_fault(&self, fault: &HostFault) {
        self.0.lock().push(*fault);
    }
}

#[test]
fn events_of_stage_1_are_the_users_and_those_of_stage_2_the_hosts() {
    let bench = bench();
    let viommu = bench.translated(MEMORY);
    let queue = bench.host.veventq_alloc(viommu, VEVENTQ_ARM_SMMUV3, 4).unwrap();
    let faults = Arc::new(Faults::default());
    let sink: Weak<Faults> = Arc::downgrade(&faults);
    bench.host.set_fault_sink(bench.dev, sink).unwrap();

    assert_eq!(bench.read(IOVA), None, "the page is beyond the memory");
    assert_eq!(queue.next_event().unwrap(), None);
    let fault = faults.0.lock().pop().unwrap();
    assert_eq!((fault.dev, fault.address, fault.stage2), (bench.dev, IOVA, true));
    assert_eq!(fault.reason, EventId::Translation.code());

    assert_eq!(bench.read(IOVA + 0x1000), None);
    assert!(faults.0.lock().is_empty());
    let Some(Vevent::Event { data, sequence: 0 }) = queue.next_event().unwrap() else {
        panic!("an event");
    };
    let words = [0, 8, 16, 24].map(|at| u64::from_le_bytes(data[at..at + 8].try_into().unwrap()));
    let record = EventRecord::from_words(words);
    assert_eq!((record.id(), record.stream()), (Some(EventId::Translation), StreamId(0x55)));
    assert_eq!((record.input_address, record.qw1.rnw()), (IOVA + 0x1000, true));

    bench.set(CONTEXT, 0);
    bench.invalidate(viommu, &[cfgi(VSID)]).unwrap();
    assert_eq!(bench.read(IOVA), None);
    assert!(matches!(queue.next_event().unwrap(), Some(Vevent::Event { sequence: 1, .. })));
    bench.host.device_detach(bench.dev, None).unwrap();
    assert_eq!(bench.read(IOVA), None);
    assert_eq!(queue.next_event().unwrap(), None, "nobody's any more");
}

#[test]
fn devices_of_one_vsmmu_share_translations() {
    let bench = bench();
    bench.set(FIRST, 1);
    bench.set(SECOND, 2);
    let viommu = bench.translated(FIRST);
    let other = bench.host.device_bind("b").unwrap();
    bench.host.vdevice_alloc(viommu, other, VSID + 1).unwrap();
    let nested = bench.nested(viommu, STAGE1).unwrap();
    bench.host.device_attach(other, None, nested).unwrap();
    let mut port = bench.host.dma_port("b").unwrap();
    let mut read = || {
        let mut bytes = [0; 8];
        port.read(PLAIN, IOVA, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    };
    assert_eq!((bench.read(IOVA), read()), (Some(1), 1));
    bench.lead(SECOND);
    assert_eq!((bench.read(IOVA), read()), (Some(1), 1));
    bench.invalidate(viommu, &[tlbi()]).unwrap();
    assert_eq!((bench.read(IOVA), read()), (Some(2), 2));
}

/// As in kernels after 7.2: Linux 7.2 accepts such commands.
#[test]
fn a_bit_of_no_field_is_refused() {
    let full = SmmuV3UnitConfig { ats: true, ..Default::default() };
    let poor = SmmuV3UnitConfig { ssid_bits: 0, range_invalidation: false, ..Default::default() };
    let benches = [full, poor].map(Bench::new);
    let viommus = benches.each_ref().map(|bench| bench.translated(FIRST));
    let taken = |words: [u64; 2]| {
        [0, 1].map(|it: usize| benches[it].invalidate_raw(viommus[it], &[words]).is_ok())
    };
    let stream = VSID << 32;
    let (vmid, asid, page) = (0xffff << 32, 0xffff << 48, !0xfff);
    // A command, which of its bits may be set, and whether the minimal SMMU accepts it.
    for (base, mask, poor) in [
        ([0x10, 0], [vmid, 0], true),
        ([0x11, 0], [vmid | asid, 0], true),
        ([0x12, 0], [vmid | asid, page | 1], true),
        ([0x13, 0], [vmid, page | 1], true),
        ([0x30, 0], [0, 0], true),
        ([5 | stream, 0], [0, 1], true),
        ([6 | stream, 0], [0, 0], true),
        ([0x40 | stream, 0], [1 << 9 | 1 << 11 | 0xfffff << 12, page | 0x3f], false),
    ] {
        assert_eq!(taken(base), [true, poor], "{base:x?}");
        // Neither of the opcode nor of the StreamID.
        for bit in (8..128).filter(|bit| base[0] >> 32 == 0 || !(32..64).contains(bit)) {
            let flip = [(1u128 << bit) as u64, ((1u128 << bit) >> 64) as u64];
            // SubstreamIDs of CMD_CFGI_CD need an SMMU that supports them.
            let id = base[0] & 0xff == 5 && (12..32).contains(&bit);
            let words = [base[0] | flip[0], base[1] | flip[1]];
            let good = flip[0] & mask[0] != 0 || flip[1] & mask[1] != 0;
            assert_eq!(taken(words), [good || id, good && poor], "{words:x?}");
        }
    }
    let range = |num: u64, scale: u64, tg: u64, ttl: u64| {
        taken([0x12 | num << 12 | scale << 20, 0x5000 | tg << 10 | ttl << 8])
    };
    for (fields, good) in [
        ([5, 3, 1, 0], true),
        ([0, 0, 2, 2], true),
        ([0, 31, 3, 1], true),
        ([0, 32, 3, 1], false),
        ([5, 3, 2, 1], false),
        ([0, 0, 1, 0], false),
        ([0, 0, 0, 3], false),
    ] {
        let [num, scale, tg, ttl] = fields;
        assert_eq!(range(num, scale, tg, ttl), [good, false], "{fields:?}");
    }
    assert_eq!(taken([0x40 | stream, 53]), [false, false], "more than all addresses");
}
