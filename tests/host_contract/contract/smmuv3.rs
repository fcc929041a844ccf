// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Nesting on SMMUv3: the user's stream table entries in a vIOMMU.

use std::sync::Arc;

use twostage::iommufd::{
    iommu_hwpt_arm_smmuv3, iommu_viommu_arm_smmuv3_invalidate, Errno, EventQueue, HwInfoData,
    HwptData, HwptFlags, InvalidateData, ObjectId, Result, Vevent, ViommuKind, VEVENTQ_ARM_SMMUV3,
};
use twostage::spec::smmuv3::context::{Cd, Cd0, Cd1};
use twostage::spec::smmuv3::event::{EventId, EventRecord};
use twostage::spec::smmuv3::stream_table::{Ste0, Ste1, StreamConfig};
use twostage::spec::smmuv3::translation::{Descriptor, Granule};

use super::hwpt::Told;
use super::memory::Memory;
use super::{destroy, ioas_of, refused, Bound, Subject, BASE, PAGE};

/// The guest's StreamID of the device.
const STREAM: u64 = 0x123;
const ASID: u16 = 7;
const IOVA: u64 = 0x234_5000;
/// Offsets in memory, which is mapped at [`BASE`] of the parent.
const CONTEXT: u64 = 0x4 * PAGE;
const TABLES: u64 = 0;
const FIRST: u64 = 0x10 * PAGE;
const SECOND: u64 = 0x11 * PAGE;
const OUT: u64 = 0x12 * PAGE;

/// Normal memory, write-back.
const MAIR: u64 = 0xff;

/// Makes four levels of tables (4 KiB, 48 bits) map `iova` to `page` of the memory, or to nothing.
fn lead(memory: &Memory, iova: u64, page: Option<u64>) {
    for level in 0..4u8 {
        let table = TABLES + u64::from(level) * PAGE;
        let table_or_page = Descriptor::new().with_valid(true).with_table(true);
        let descriptor = match (level, page) {
            (3, None) => Descriptor::new(),
            (3, Some(page)) => table_or_page
                .with_address(Granule::K4, BASE + page)
                .with_ap_unprivileged(true)
                .with_sh(3)
                .with_af(true)
                .with_ng(true),
            _ => table_or_page.with_address(Granule::K4, BASE + table + PAGE),
        };
        let index = Granule::K4.index(iova, level, 48);
        memory.set(table + index * 8, descriptor.into());
    }
}

/// Writes the context descriptor with the tables.
fn context(memory: &Memory) {
    let qw0 = Cd0::new()
        .with_t0sz(16)
        .with_ir0(1)
        .with_or0(1)
        .with_sh0(3)
        .with_epd1(true)
        .with_v(true)
        .with_ips(4)
        .with_aa64(true)
        .with_r(true)
        .with_a(true)
        .with_aset(true)
        .with_asid(ASID);
    let qw1 = Cd1::from((BASE + TABLES) & !0xf);
    let cd = Cd { qw0, qw1, mair: MAIR, ..Cd::from_words([0; 8]) };
    for (index, word) in (0..).zip(cd.to_words()) {
        memory.set(CONTEXT + index * 8, word);
    }
}

/// The words of a stream table entry.
fn ste(config: StreamConfig) -> HwptData {
    let qw0 = Ste0::new().with_v(true).with_config(config.into_bits());
    let (qw0, qw1) = match config {
        StreamConfig::Stage1 => (
            qw0.with_s1contextptr((BASE + CONTEXT) >> 6),
            Ste1::new().with_s1cir(1).with_s1cor(1).with_s1csh(3),
        ),
        _ => (qw0, Ste1::new()),
    };
    HwptData::ArmSmmuV3(iommu_hwpt_arm_smmuv3 { ste: [qw0.into(), qw1.into()] })
}

type Command = iommu_viommu_arm_smmuv3_invalidate;

const fn command(first: u64, second: u64) -> Command {
    Command { cmd: [first, second] }
}

/// `CMD_TLBI_NH_VA` of one leaf.
const fn tlbi_va(iova: u64) -> Command {
    command(0x12 | (ASID as u64) << 48, iova & !0xfff | 1)
}

/// `CMD_TLBI_NSNH_ALL`.
const TLBI_ALL: Command = command(0x30, 0);
/// `CMD_CFGI_CD` of a stream, and `CMD_SYNC`, which users must not issue.
const fn cfgi_cd(stream: u64) -> Command {
    command(0x05 | stream << 32, 1)
}
const SYNC: Command = command(0x46, 0);

/// A vIOMMU and its objects.
struct Viommu {
    parent: ObjectId,
    viommu: ObjectId,
}

impl Viommu {
    fn invalidate(&self, bound: &Bound, commands: &[Command]) -> Result<()> {
        let data = InvalidateData::ArmSmmuV3(commands);
        bound.host().hwpt_invalidate(self.viommu, data).map_err(|error| error.error)
    }

    fn nested(&self, bound: &Bound, config: StreamConfig) -> ObjectId {
        bound.hwpt(self.viommu, HwptFlags::new(), ste(config)).expect("a nested HWPT")
    }
}

pub fn check(subject: &Subject) {
    let mut bound = Bound::new(subject);
    let host = bound.host();
    let HwInfoData::ArmSmmuV3(_) = bound.iommu() else {
        println!("  this is none");
        return;
    };
    let memory = Memory::new(0x20);
    let ioas = ioas_of(host, &memory, BASE);
    let flags = HwptFlags::new().with_nest_parent(true);
    let parent = match bound.hwpt(ioas, flags, HwptData::None) {
        Ok(parent) => parent,
        Err(error) => {
            println!("  this one cannot nest: {error}");
            assert_eq!(error.errno, Errno::EOPNOTSUPP);
            destroy(host, &[ioas]);
            return;
        }
    };
    refused(host.viommu_alloc(ViommuKind::Default, bound.dev, parent), Errno::EOPNOTSUPP);
    refused(host.viommu_alloc(ViommuKind::ArmSmmuV3, bound.dev, ioas), Errno::ENOENT);
    let viommu = host.viommu_alloc(ViommuKind::ArmSmmuV3, bound.dev, parent);
    let viommu = Viommu { parent, viommu: viommu.expect("VIOMMU_ALLOC") };
    refused(host.destroy(parent), Errno::EBUSY);
    let queue = events(&bound, &viommu);
    let nested = viommu.nested(&bound, StreamConfig::Stage1);
    refused(host.device_attach(bound.dev, None, nested), Errno::ENOENT);
    let vdevice = vdevices(&bound, &viommu);
    lead(&memory, IOVA, Some(FIRST));
    lead(&memory, IOVA + PAGE, Some(OUT));
    context(&memory);
    translations(&mut bound, &memory, &viommu, nested);
    invalidations(&bound, &viommu);
    reported(&mut bound, &*queue);
    let others = others(&mut bound, &memory, &viommu);
    bound.detach();
    refused(host.destroy(viommu.viommu), Errno::EBUSY);
    let queue_id = queue.object();
    drop(queue);
    destroy(host, &others);
    destroy(host, &[nested, vdevice, queue_id, viommu.viommu, viommu.parent, ioas]);
}

fn events(bound: &Bound, viommu: &Viommu) -> Arc<dyn EventQueue> {
    let host = bound.host();
    let alloc = |kind, depth| host.veventq_alloc(viommu.viommu, kind, depth);
    refused(alloc(0, 8), Errno::EOPNOTSUPP);
    refused(alloc(VEVENTQ_ARM_SMMUV3, 0), Errno::EINVAL);
    refused(alloc(VEVENTQ_ARM_SMMUV3, (1 << 19) + 1), Errno::EINVAL);
    refused(host.veventq_alloc(viommu.parent, VEVENTQ_ARM_SMMUV3, 8), Errno::ENOENT);
    let queue = alloc(VEVENTQ_ARM_SMMUV3, 8).expect("VEVENTQ_ALLOC");
    refused(alloc(VEVENTQ_ARM_SMMUV3, 8), Errno::EEXIST);
    refused(host.destroy(queue.object()), Errno::EBUSY);
    assert_eq!(queue.next_event().expect("a read"), None);
    queue
}

fn vdevices(bound: &Bound, viommu: &Viommu) -> ObjectId {
    let host = bound.host();
    let nobody = ObjectId(12345);
    refused(host.vdevice_alloc(viommu.parent, bound.dev, STREAM), Errno::ENOENT);
    refused(host.vdevice_alloc(viommu.viommu, nobody, STREAM), Errno::ENOENT);
    let vdevice = host.vdevice_alloc(viommu.viommu, bound.dev, STREAM).expect("VDEVICE_ALLOC");
    refused(host.vdevice_alloc(viommu.viommu, bound.dev, STREAM + 1), Errno::EEXIST);
    vdevice
}

fn translations(bound: &mut Bound, memory: &Memory, viommu: &Viommu, nested: ObjectId) {
    let out = IOVA + PAGE;
    bound.attach(nested);
    assert!(bound.moves(memory, (FIRST, IOVA), (OUT, out)), "both stages");
    lead(memory, IOVA, Some(SECOND));
    assert!(bound.moves(memory, (FIRST, IOVA), (OUT, out)), "stale until the invalidation");
    viommu.invalidate(bound, &[tlbi_va(IOVA)]).expect("HWPT_INVALIDATE");
    assert!(bound.moves(memory, (SECOND, IOVA), (OUT, out)));
    lead(memory, IOVA, Some(FIRST));
    viommu.invalidate(bound, &[cfgi_cd(STREAM), TLBI_ALL]).expect("HWPT_INVALIDATE");
    assert!(bound.moves(memory, (FIRST, IOVA), (OUT, out)));
}

/// The commands that the owner of stage 1 may issue.
fn invalidations(bound: &Bound, viommu: &Viommu) {
    // Unlike VT-d: an empty array is malformed.
    refused(viommu.invalidate(bound, &[]), Errno::EINVAL);
    viommu.invalidate(bound, &[tlbi_va(IOVA); 256]).expect("HWPT_INVALIDATE");
    refused(viommu.invalidate(bound, &[tlbi_va(IOVA), SYNC]), Errno::EIO);
    refused(viommu.invalidate(bound, &[cfgi_cd(STREAM + 1)]), Errno::EIO);
    let entries = InvalidateData::ArmSmmuV3(&[TLBI_ALL]);
    let on_parent = bound.host().hwpt_invalidate(viommu.parent, entries);
    refused(on_parent.map_err(|error| error.error), Errno::EINVAL);
}

/// A fault of the device has the guest's StreamID.
fn reported(bound: &mut Bound, queue: &dyn EventQueue) {
    let (watcher, told) = Told::new();
    queue.watch(watcher).expect("a watcher");
    assert_eq!(told.recv(), Ok(false), "nothing has happened yet");
    let iova = IOVA + 0x10 * PAGE;
    bound.engine().load(iova);
    assert_eq!(told.recv(), Ok(true));
    let event = queue.next_event().expect("a read");
    let Some(Vevent::Event { data, .. }) = event else { panic!("an event, not {event:?}") };
    let mut words =
        data.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")));
    let record = EventRecord::from_words([(); 4].map(|()| words.next().expect("four words")));
    assert_eq!(record.id(), Some(EventId::Translation), "{record:?}");
    assert_eq!(u64::from(record.qw0.stream_id()), STREAM);
    assert_eq!(record.input_address, iova);
    while queue.next_event().expect("a read").is_some() {}
    assert_eq!(told.recv(), Ok(false));
}

/// Entries that bypass and abort; and one with forbidden fields.
fn others(bound: &mut Bound, memory: &Memory, viommu: &Viommu) -> [ObjectId; 2] {
    let bypass = viommu.nested(bound, StreamConfig::Bypass);
    let abort = viommu.nested(bound, StreamConfig::Abort);
    let (from, to) = ((FIRST, BASE + FIRST), (OUT, BASE + OUT));
    bound.attach(bypass);
    assert!(bound.moves(memory, from, to), "past stage 1");
    bound.attach(abort);
    assert!(!bound.moves(memory, from, to), "nowhere");
    bound.attach(bypass);
    assert!(bound.moves(memory, from, to));
    // Fields of stage 2 are the host's.
    let HwptData::ArmSmmuV3(mut entry) = ste(StreamConfig::Bypass) else { return [bypass, abort] };
    entry.ste[1] |= 1 << 44;
    refused(bound.hwpt(viommu.viommu, HwptFlags::new(), HwptData::ArmSmmuV3(entry)), Errno::EIO);
    [bypass, abort]
}
