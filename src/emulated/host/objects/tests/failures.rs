// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Each step fails in turn: an allocation of a verb or a pin, after which the verb has had no
//! effect, and a call of a scenario, of which all can be removed then.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestRegionMmap};

use super::fake::{memory, s1, Bench, PARENT, PASID, PLAIN};
use super::viommus::KIND;
use crate::host::objects::{HwQueueArguments, MapRequest, Object, Objects};
use crate::host::refusal::{fail_nth, set_fail_nth};
use crate::ioas::Source;
use crate::uapi::{RegionSpace, UserFault, UserSpace};
use crate::{Access, AccessError, AccessUnmap};
use twostage::iommufd::{
    DirtyRange, Errno, FailNth, HostError, HostIommu, HwptAlloc, HwptData, HwptFlags,
    InvalidateData, MapTarget, ObjectId, Protection, Result, UserMemory, Verb, ViommuKind,
};

const PAGE: u64 = 0x1000;
const RW: Protection = Protection::READ_WRITE;

/// For pinning; never called.
#[derive(Debug)]
struct Listener;

impl AccessUnmap for Listener {
    fn unmap(&self, _: u64, _: u64) {}
}

/// The objects for the verbs.
struct Scene {
    bench: Bench,
    /// Attached to `parent`.
    dev: ObjectId,
    /// Attached to nothing.
    idle: ObjectId,
    /// Two mappings, and the HWPTs.
    ioas: ObjectId,
    /// Two mappings, and no HWPT.
    bare: ObjectId,
    parent: ObjectId,
    nested: ObjectId,
    viommu: ObjectId,
    fault: ObjectId,
    /// Attached to `ioas`.
    access: Access,
}

impl Scene {
    fn new() -> Self {
        let bench = Bench::with_viommus();
        let (dev, idle, ioas, bare) =
            (bench.bind("a"), bench.bind("b"), bench.ioas(), bench.ioas());
        for of in [ioas, bare] {
            bench.map(of, 0, 2 * PAGE).unwrap();
            bench.map(of, 2 * PAGE, 2 * PAGE).unwrap();
        }
        let flags = PARENT.with_pasid(true).with_dirty_tracking(true);
        let parent = bench.paging(dev, ioas, flags).unwrap();
        bench.host.device_attach(dev, None, parent).unwrap();
        bench.host.hwpt_set_dirty_tracking(parent, true).unwrap();
        let host = &bench.host;
        let viommu = host.viommu_alloc(ViommuKind::ArmSmmuV3, dev, parent).unwrap();
        let nested = bench.nested(dev, viommu, PASID, 0x1000).unwrap();
        // Closed: only a HWPT holds it.
        let fault = host.fault_queue_alloc().unwrap().object();
        let access = host.access_create(Some(Arc::new(Listener))).unwrap();
        access.attach(ioas).unwrap();
        // A few IDs are free, so that returning one leaves no trace in the table.
        let ids: Vec<_> = (0..4).map(|_| bench.ioas()).collect();
        ids.iter().for_each(|id| bench.host.destroy(*id).unwrap());
        bench.fake.told();
        Self { bench, dev, idle, ioas, bare, parent, nested, viommu, fault, access }
    }

    /// Everything that a verb could have changed.
    fn state(&self) -> String {
        let mut objects = self.bench.host.objects();
        let Objects { groups, vfio, mapped, mmaps, .. } = &*objects;
        let mut state = format!("{groups:?}\n{vfio:?}\n{mapped:?}\n{mmaps:?}\n");
        for (id, object) in objects.table.iter() {
            let users = objects.table.users(id);
            write!(state, "{id} {} {users} {:?} ", object.kind(), objects.holds(id)).unwrap();
            match object {
                // With the contents of its HWPTs.
                Object::Ioas(ioas) => writeln!(state, "{ioas:?}"),
                Object::Access(access) => writeln!(state, "{access:?}"),
                Object::Viommu(viommu) => writeln!(state, "{:?}", viommu.events),
                Object::Device(device) => writeln!(state, "{:?}", device.vdevice),
                _ => writeln!(state),
            }
            .unwrap();
        }
        writeln!(state, "{:?} {}", objects.table.next_id(), objects.pinned_bytes()).unwrap();
        // Whether unbound devices can be bound, also by another iommufd.
        let free = objects.device_bind("far").and_then(|dev| objects.device_unbind(dev));
        writeln!(state, "{free:?}").unwrap();
        drop(objects);
        self.bench.other.told();
        writeln!(state, "{:?}", self.bench.fake.told()).unwrap();
        state
    }

    fn hwpt(&self, pt: ObjectId, flags: HwptFlags, fault: Option<ObjectId>) -> Result<()> {
        let nested = pt == self.parent || pt == self.viommu;
        let data = if nested { HwptData::VtdS1(s1(0x2000)) } else { HwptData::None };
        let args = HwptAlloc { flags, dev: self.dev, pt, data, fault };
        self.bench.host.hwpt_alloc(&args).map(drop)
    }

    fn attach(&self, dev: ObjectId, pasid: Option<u32>, pt: ObjectId) -> Result<()> {
        self.bench.host.device_attach(dev, pasid, pt).map(drop)
    }

    fn map(&self, ioas: ObjectId, target: MapTarget) -> Result<()> {
        self.bench.host.ioas_map(ioas, &memory(2 * PAGE), target, RW).map(drop)
    }
}

/// The errno of a call that is not a verb of the trait.
fn errno_of<T>(outcome: Result<T, AccessError>) -> Result<()> {
    let error = |error: AccessError| HostError::new(Verb::IoasMap, None, error.errno, "");
    outcome.map(drop).map_err(error)
}

type Call = fn(&Scene) -> Result<()>;

/// Every verb, in all variants, with its number of allocations.
const CALLS: [(&str, u64, Call); 36] = [
    ("bind", 1, |s| s.bench.host.device_bind("far").map(drop)),
    ("get hw info", 0, |s| s.bench.host.get_hw_info(s.dev).map(drop)),
    ("alloc IOAS", 1, |s| s.bench.host.ioas_alloc().map(drop)),
    ("allow IOVAs", 2, |s| {
        s.bench.host.ioas_allow_iovas(s.ioas, &[0x1000..=0x1fff, 0x8000..=0xffff])
    }),
    ("IOVA ranges", 0, |s| s.bench.host.ioas_iova_ranges(s.ioas).map(drop)),
    ("map", 2, |s| s.map(s.bare, MapTarget::Fixed(0x10000))),
    ("map and pin", 4, |s| s.map(s.ioas, MapTarget::Fixed(0x10000))),
    ("map anywhere", 4, |s| s.map(s.ioas, MapTarget::Anywhere)),
    // One area each, pinned once; what is already pinned needs nothing.
    ("copy", 6, |s| {
        let target = MapTarget::Fixed(0x10000);
        s.bench.host.ioas_copy(s.ioas, target, s.bare, PAGE, 2 * PAGE, RW).map(drop)
    }),
    ("copy what is pinned", 4, |s| {
        let target = MapTarget::Fixed(0x10000);
        s.bench.host.ioas_copy(s.ioas, target, s.ioas, PAGE, 2 * PAGE, RW).map(drop)
    }),
    ("unmap", 0, |s| s.bench.host.ioas_unmap(s.ioas, 0, u64::MAX).map(drop)),
    // The first HWPT pins everything, others share it.
    ("alloc first HWPT", 7, |s| s.hwpt(s.bare, PLAIN, None)),
    ("alloc next HWPT", 5, |s| s.hwpt(s.ioas, PARENT, None)),
    ("alloc nested HWPT", 2, |s| s.hwpt(s.parent, PASID, None)),
    ("alloc nested HWPT of vIOMMU", 2, |s| {
        s.hwpt(s.viommu, PASID.with_fault_id_valid(true), Some(s.fault))
    }),
    ("attach", 2, |s| s.attach(s.idle, None, s.parent)),
    ("attach to IOAS", 10, |s| s.attach(s.idle, None, s.bare)),
    ("attach to nested HWPT", 2, |s| s.attach(s.idle, None, s.nested)),
    ("attach PASID", 1, |s| s.attach(s.dev, Some(1), s.nested)),
    ("replace", 2, |s| s.attach(s.dev, None, s.nested)),
    ("replace by the same", 0, |s| s.attach(s.dev, None, s.parent)),
    ("replace by IOAS", 10, |s| s.attach(s.dev, None, s.bare)),
    ("detach", 0, |s| s.bench.host.device_detach(s.dev, None)),
    ("alloc vIOMMU", 2, |s| {
        s.bench.host.viommu_alloc(ViommuKind::ArmSmmuV3, s.dev, s.parent).map(drop)
    }),
    ("alloc vDEVICE", 2, |s| s.bench.host.vdevice_alloc(s.viommu, s.dev, 7).map(drop)),
    ("alloc fault queue", 2, |s| s.bench.host.fault_queue_alloc().map(drop)),
    ("alloc vEVENTQ", 2, |s| s.bench.host.veventq_alloc(s.viommu, KIND, 4).map(drop)),
    ("alloc hardware queue", 1, |s| {
        let (viommu, base, length) = (s.viommu, 0, PAGE);
        let arguments = HwQueueArguments { viommu, kind: KIND, index: 0, base, length };
        let made = s.bench.host.objects().hw_queue_alloc(&arguments);
        errno_of(made.map_err(AccessError::from))
    }),
    ("invalidate", 1, |s| {
        let done = s.bench.host.hwpt_invalidate(s.nested, InvalidateData::VtdS1(&[]));
        done.map_err(|error| error.error)
    }),
    ("stop dirty tracking", 0, |s| s.bench.host.hwpt_set_dirty_tracking(s.parent, false)),
    ("dirty bitmap", 1, |s| {
        let range = DirtyRange { iova: 0, length: 4 * PAGE, page_size: PAGE };
        s.bench.host.hwpt_get_dirty_bitmap(s.parent, &range, true, &mut [0])
    }),
    ("create access", 1, |s| errno_of(s.bench.host.access_create(None))),
    ("move access", 1, |s| errno_of(s.access.replace(s.bare))),
    ("pin", 1, |s| errno_of(s.access.pin_pages(0, 4 * PAGE, true))),
    ("destroy", 0, |s| s.bench.host.destroy(s.nested)),
    ("unbind", 0, |s| s.bench.host.device_unbind(s.idle)),
];

#[test]
fn whichever_allocation_fails_the_verb_has_changed_nothing() {
    for (name, allocations, call) in CALLS {
        let scene = Scene::new();
        let before = scene.state();
        for nth in 1.. {
            set_fail_nth(nth);
            let outcome = call(&scene);
            let left = fail_nth();
            set_fail_nth(0);
            if left != 0 {
                outcome.unwrap_or_else(|error| panic!("{name}: {error}"));
                assert_eq!(nth - 1, allocations, "{name}");
                break;
            }
            let errno = outcome.map_err(|error| error.errno);
            assert_eq!(errno, Err(Errno::ENOMEM), "{name}, allocation {nth}");
            assert_eq!(scene.state(), before, "{name}, allocation {nth}");
        }
    }
}

/// What was created, to be removed in reverse order.
#[derive(Default)]
struct Made {
    objects: Vec<ObjectId>,
    attached: Vec<(ObjectId, Option<u32>)>,
    devices: Vec<ObjectId>,
}

fn set_up(host: &dyn HostIommu, made: &mut Made) -> Result<()> {
    let dev = host.device_bind("a")?;
    made.devices.push(dev);
    let ioas = host.ioas_alloc()?;
    made.objects.push(ioas);
    let target = MapTarget::Fixed(0);
    host.ioas_map(ioas, &memory(0x4000), target, RW)?;
    host.get_hw_info(dev)?;
    let parent = PARENT.with_pasid(true);
    let args = HwptAlloc { flags: parent, dev, pt: ioas, data: HwptData::None, fault: None };
    let parent = host.hwpt_alloc(&args)?;
    made.objects.push(parent);
    host.device_attach(dev, None, parent)?;
    made.attached.push((dev, None));
    // Closed when the set-up ends.
    let faults = host.fault_queue_alloc()?;
    made.objects.push(faults.object());
    let viommu = host.viommu_alloc(ViommuKind::ArmSmmuV3, dev, parent)?;
    made.objects.push(viommu);
    made.objects.push(host.vdevice_alloc(viommu, dev, 1)?);
    let events = host.veventq_alloc(viommu, KIND, 4)?;
    made.objects.push(events.object());
    let data = HwptData::VtdS1(s1(0x1000));
    let (flags, fault) = (PASID.with_fault_id_valid(true), Some(faults.object()));
    let nested = host.hwpt_alloc(&HwptAlloc { flags, dev, pt: viommu, data, fault })?;
    made.objects.push(nested);
    host.device_attach(dev, Some(1), nested)?;
    made.attached.push((dev, Some(1)));
    host.device_attach(dev, None, nested)?;
    host.hwpt_invalidate(nested, InvalidateData::VtdS1(&[])).map_err(|error| error.error)?;
    host.ioas_unmap(ioas, 0, 0x4000)?;
    Ok(())
}

fn take_apart(host: &dyn HostIommu, made: &Made) {
    for (dev, slot) in made.attached.iter().rev() {
        host.device_detach(*dev, *slot).unwrap();
    }
    for object in made.objects.iter().rev() {
        host.destroy(*object).unwrap();
    }
    for dev in &made.devices {
        host.device_unbind(*dev).unwrap();
    }
}

#[test]
fn whichever_call_fails_nothing_leaks() {
    let mut failures = 0;
    for nth in 1.. {
        let bench = Bench::with_viommus();
        let host = FailNth::new(bench.host.clone());
        host.fail_nth(nth, Errno::ENOMEM);
        let mut made = Made::default();
        let outcome = set_up(&host, &mut made);
        if host.is_armed() {
            outcome.unwrap();
            break;
        }
        assert_eq!(outcome.unwrap_err().errno, Errno::ENOMEM);
        failures += 1;
        take_apart(&host, &made);
        assert_eq!(bench.host.live_objects(), 0, "call {nth}");
        assert_eq!(bench.host.pinned_bytes(), 0, "call {nth}");
    }
    assert_eq!(failures, 15);
}

/// A process whose memory consists of pieces of one page, one of which cannot be pinned.
#[derive(Debug, Clone)]
struct Fragile {
    space: RegionSpace,
    /// Pages pinned before the failing one; negative if none fails.
    left: Arc<AtomicU64>,
}

const NEVER: u64 = u64::MAX / 2;

impl UserSpace for Fragile {
    fn share(&self) -> Arc<dyn UserSpace> {
        Arc::new(self.clone())
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), UserFault> {
        self.space.read(address, bytes)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), UserFault> {
        self.space.write(address, bytes)
    }

    fn memory(&self, address: u64, length: u64, writable: bool) -> Result<UserMemory, UserFault> {
        if self.left.fetch_sub(1, Ordering::Relaxed) == 0 {
            return Err(UserFault { address, length });
        }
        self.space.memory(address, length.min(PAGE - address % PAGE), writable)
    }
}

/// Two IOASes, the second with a HWPT, and an access object in the first.
struct Rig {
    bench: Bench,
    dev: ObjectId,
    src: ObjectId,
    dst: ObjectId,
    access: Access,
    user: Fragile,
    start: u64,
}

impl Rig {
    fn new() -> Self {
        let bench = Bench::new();
        let (dev, src, dst) = (bench.bind("a"), bench.ioas(), bench.ioas());
        bench.paging(dev, dst, PLAIN).unwrap();
        let access = bench.host.access_create(Some(Arc::new(Listener))).unwrap();
        access.attach(src).unwrap();
        let region = GuestRegionMmap::from_range(GuestAddress(0), 0x10000, None).unwrap();
        let region = Arc::new(region);
        let start = region.as_ptr() as u64;
        let (space, left) = (RegionSpace::new(vec![region]), Arc::new(AtomicU64::new(NEVER)));
        Self { bench, dev, src, dst, access, user: Fragile { space, left }, start }
    }

    fn map(&self, ioas: ObjectId, iova: u64, pages: u64) -> Result<(), Errno> {
        let source = Source::User(self.user.share(), self.start);
        let (target, length) = (MapTarget::Fixed(iova), pages * PAGE);
        let request = MapRequest { target, source, length, protection: RW };
        let mut objects = self.bench.host.objects();
        objects.ioas_map(ioas, request).map(drop).map_err(|refusal| refusal.errno)
    }

    /// Everything that pins, in sequence; stops at the first failure.
    fn everything(&self) -> Result<(), Errno> {
        self.map(self.src, 0x10000, 3)?;
        self.map(self.src, 0x13000, 3)?;
        self.access.pin_pages(0x11000, 3 * PAGE, true).map_err(|error| error.errno)?;
        let copy = MapTarget::Fixed(0x20000);
        let (host, dst) = (&self.bench.host, self.dst);
        host.ioas_copy(dst, copy, self.src, 0x10000, 6 * PAGE, RW).map_err(|error| error.errno)?;
        self.map(dst, 0x30000, 2)?;
        self.bench.paging(self.dev, self.src, PLAIN).map(drop).map_err(|error| error.errno)
    }

    /// What is mapped and pinned.
    fn state(&self) -> (String, u64) {
        (self.bench.host.graph().to_string(), self.bench.host.pinned_bytes())
    }
}

#[test]
fn a_pin_that_fails_leaves_nothing_behind() {
    let asked = {
        let rig = Rig::new();
        rig.everything().unwrap();
        NEVER - rig.user.left.load(Ordering::Relaxed)
    };
    // 6 pages shared by everything, 2 separate ones.
    assert_eq!(asked, 8, "each page is asked for once, however many share it");
    for failing in 0..asked {
        let rig = Rig::new();
        rig.user.left.store(failing, Ordering::Relaxed);
        assert_eq!(rig.everything(), Err(Errno::EFAULT), "{failing}");
        rig.user.left.store(NEVER, Ordering::Relaxed);
        let pinned = rig.state().1;
        assert!(pinned < asked * PAGE && pinned.is_multiple_of(PAGE));
        // What failed succeeds now.
        let again = rig.bench.paging(rig.dev, rig.src, PLAIN).unwrap();
        rig.bench.host.destroy(again).unwrap();
        assert_eq!(rig.state().1, pinned, "{failing}");
        rig.access.detach().unwrap();
        for ioas in [rig.src, rig.dst] {
            rig.bench.unmapped(ioas);
        }
        assert_eq!(rig.bench.host.pinned_bytes(), 0, "{failing}");
    }
}

#[test]
fn a_call_whose_pin_fails_changes_nothing() {
    let rig = Rig::new();
    rig.map(rig.src, 0x10000, 4).unwrap();
    rig.access.pin_pages(0x11000, PAGE, true).unwrap();
    let before = rig.state();
    // A pinned page is not looked up.
    for failing in 0..3 {
        let fail = || rig.user.left.store(failing, Ordering::Relaxed);
        fail();
        assert_eq!(rig.access.pin_pages(0x10000, 4 * PAGE, true).unwrap_err().errno, Errno::EFAULT);
        fail();
        let copy = MapTarget::Fixed(0x20000);
        let copied = rig.bench.host.ioas_copy(rig.dst, copy, rig.src, 0x10000, 4 * PAGE, RW);
        assert_eq!(copied.unwrap_err().errno, Errno::EFAULT);
        fail();
        assert_eq!(rig.map(rig.dst, 0x20000, 4), Err(Errno::EFAULT));
        fail();
        let hwpt = rig.bench.paging(rig.dev, rig.src, PLAIN);
        assert_eq!(hwpt.unwrap_err().errno, Errno::EFAULT);
        assert_eq!(rig.state(), before, "{failing}");
    }
}
