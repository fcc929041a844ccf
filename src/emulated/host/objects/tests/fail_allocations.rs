// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Each allocation of each verb fails in turn: the verb returns `ENOMEM` and has no effect, neither
//! on the objects nor on the hardware; then it succeeds.

use std::fmt::Write;
use std::sync::Arc;

use super::fake::{memory, s1, Bench, PARENT, PASID, PLAIN};
use super::viommus::KIND;
use crate::host::fault_injection::{fail_nth, set_fail_nth};
use crate::host::objects::{HwQueueArguments, Object, Objects};
use crate::{Access, AccessError, AccessUnmap};
use twostage::iommufd::{
    DirtyRange, Errno, HostError, HostIommu, HwptAlloc, HwptData, HwptFlags, InvalidateData,
    MapTarget, ObjectId, Protection, Result, Verb, ViommuKind,
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
fn errno_of<T>(outcome: std::result::Result<T, AccessError>) -> Result<()> {
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
