// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Random verbs: in any order, the objects stay consistent and nothing leaks.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proptest::prelude::*;

use super::fake::{memory, Bench, Told};
use crate::host::objects::{Object, Objects};
use crate::ioas::{Pages, PAGE_SIZE};
use twostage::iommufd::{
    iommu_hwpt_vtd_s1_invalidate, HostIommu, HwptAlloc, HwptData, HwptFlags, InvalidateData,
    MapTarget, ObjectId, Protection, ViommuKind,
};

#[derive(Debug, Clone)]
enum Call {
    Bind(usize),
    Unbind(ObjectId),
    Attach(ObjectId, Option<u32>, ObjectId),
    Detach(ObjectId, Option<u32>),
    Destroy(ObjectId),
    IoasAlloc,
    Allow(ObjectId, u64),
    Map(ObjectId, u64, MapTarget, bool),
    Copy(ObjectId, ObjectId, MapTarget, u64, u64),
    Unmap(ObjectId, u64, u64),
    Paging(ObjectId, ObjectId, u32),
    Nested(ObjectId, ObjectId, bool, u32),
    Viommu(ObjectId, ObjectId),
    Vdevice(ObjectId, ObjectId, u64),
    Invalidate(ObjectId, u64),
}

fn id() -> impl Strategy<Value = ObjectId> {
    (0u32..12).prop_map(ObjectId)
}

fn slot() -> impl Strategy<Value = Option<u32>> {
    prop_oneof![2 => Just(None), 1 => (0u32..4).prop_map(Some)]
}

fn target() -> impl Strategy<Value = MapTarget> {
    prop_oneof![
        4 => (0u64..24).prop_map(|page| MapTarget::Fixed(page * PAGE_SIZE)),
        1 => Just(MapTarget::Fixed(0xfee0_0000)),
        1 => Just(MapTarget::Fixed(1 << 48)),
        2 => Just(MapTarget::Anywhere),
    ]
}

fn call() -> impl Strategy<Value = Call> {
    let pages = || (0u64..24, 1u64..8).prop_map(|(page, n)| (page * PAGE_SIZE, n * PAGE_SIZE));
    prop_oneof![
        2 => (0usize..3).prop_map(Call::Bind),
        1 => id().prop_map(Call::Unbind),
        6 => (id(), slot(), id()).prop_map(|(dev, slot, pt)| Call::Attach(dev, slot, pt)),
        2 => (id(), slot()).prop_map(|(dev, slot)| Call::Detach(dev, slot)),
        3 => id().prop_map(Call::Destroy),
        2 => Just(Call::IoasAlloc),
        1 => (id(), 0u64..16).prop_map(|(ioas, page)| Call::Allow(ioas, page)),
        4 => (id(), pages(), target(), any::<bool>())
            .prop_map(|(ioas, (_, length), target, write)| Call::Map(ioas, length, target, write)),
        3 => (id(), id(), target(), pages())
            .prop_map(|(dst, src, to, (iova, length))| Call::Copy(dst, src, to, iova, length)),
        2 => (id(), pages()).prop_map(|(ioas, (iova, length))| Call::Unmap(ioas, iova, length)),
        1 => id().prop_map(|ioas| Call::Unmap(ioas, 0, u64::MAX)),
        4 => (id(), id(), 0u32..20).prop_map(|(dev, pt, flags)| Call::Paging(dev, pt, flags)),
        4 => (id(), id(), any::<bool>(), prop_oneof![Just(48u32), Just(57)])
            .prop_map(|(dev, pt, pasid, width)| Call::Nested(dev, pt, pasid, width)),
        1 => (id(), id()).prop_map(|(dev, hwpt)| Call::Viommu(dev, hwpt)),
        1 => (id(), id(), 0u64..3).prop_map(|(viommu, dev, id)| Call::Vdevice(viommu, dev, id)),
        1 => (id(), any::<u64>()).prop_map(|(hwpt, npages)| Call::Invalidate(hwpt, npages)),
    ]
}

/// Makes the call; returns whether it succeeded.
fn make(bench: &Bench, call: &Call) -> bool {
    let host = &bench.host;
    let alloc = |dev, pt, flags, data| {
        host.hwpt_alloc(&HwptAlloc { flags, dev, pt, data, fault: None }).is_ok()
    };
    match *call {
        Call::Bind(device) => host.device_bind(["a", "b", "far"][device]).is_ok(),
        Call::Unbind(dev) => host.device_unbind(dev).is_ok(),
        Call::Attach(dev, slot, pt) => host.device_attach(dev, slot, pt).is_ok(),
        Call::Detach(dev, slot) => host.device_detach(dev, slot).is_ok(),
        Call::Destroy(id) => host.destroy(id).is_ok(),
        Call::IoasAlloc => host.ioas_alloc().is_ok(),
        Call::Allow(ioas, page) => {
            let start = page * PAGE_SIZE;
            host.ioas_allow_iovas(ioas, &[start..=start + 0x7fff]).is_ok()
        }
        Call::Map(ioas, length, target, write) => {
            let protection = Protection { read: true, write };
            host.ioas_map(ioas, &memory(length), target, protection).is_ok()
        }
        Call::Copy(dst, src, target, iova, length) => {
            host.ioas_copy(dst, target, src, iova, length, Protection::READ_WRITE).is_ok()
        }
        Call::Unmap(ioas, iova, length) => host.ioas_unmap(ioas, iova, length).is_ok(),
        Call::Paging(dev, pt, flags) => alloc(dev, pt, HwptFlags::from_bits(flags), HwptData::None),
        Call::Nested(dev, pt, pasid, addr_width) => {
            let tables = twostage::iommufd::iommu_hwpt_vtd_s1 { addr_width, ..Default::default() };
            alloc(dev, pt, HwptFlags::new().with_pasid(pasid), HwptData::VtdS1(tables))
        }
        Call::Viommu(dev, hwpt) => host.viommu_alloc(ViommuKind::ArmSmmuV3, dev, hwpt).is_ok(),
        Call::Vdevice(viommu, dev, id) => host.vdevice_alloc(viommu, dev, id).is_ok(),
        Call::Invalidate(hwpt, npages) => {
            let entry = iommu_hwpt_vtd_s1_invalidate { npages, ..Default::default() };
            host.hwpt_invalidate(hwpt, InvalidateData::VtdS1(&[entry])).is_ok()
        }
    }
}

/// The hardware's current translation of each requester.
#[derive(Default)]
struct Installed(BTreeSet<(usize, u16, Option<u32>)>);

impl Installed {
    fn follow(&mut self, unit: usize, told: &[Told]) {
        for told in told {
            match *told {
                Told::Install(rid, slot, _) => {
                    self.0.insert((unit, rid, slot));
                }
                Told::Remove(rid, slot) => {
                    self.0.remove(&(unit, rid, slot));
                }
                _ => {}
            }
        }
    }
}

fn check(objects: &Objects, installed: &Installed) -> Result<(), TestCaseError> {
    let table = objects.table();
    let mut users: BTreeMap<ObjectId, u32> = BTreeMap::new();
    let mut attached = BTreeSet::new();
    for (id, object) in table.iter() {
        for held in objects.holds(id) {
            prop_assert!(table.get(held).is_some(), "{:?} holds {:?}, which is gone", id, held);
            *users.entry(held).or_default() += 1;
        }
        if let Object::Device(device) = object {
            *users.entry(id).or_default() += 1;
            let (unit, rid) = (device.part.unit.0, device.part.requester.rid.raw());
            let slots = objects.slots_of(id).into_iter();
            attached.extend(slots.map(|(slot, _)| (unit, rid, slot)));
        }
    }
    prop_assert_eq!(&attached, &installed.0, "the hardware knows what is attached");
    for (id, object) in table.iter() {
        prop_assert_eq!(table.users(id), users.get(&id).copied().unwrap_or(0), "{:?}", id);
        if let Object::HwptPaging(hwpt) = object {
            prop_assert!(!hwpt.automatic || table.users(id) > 0, "{:?} should be gone", id);
            prop_assert!(table.ioas(hwpt.ioas).unwrap().hwpts.contains(&id));
        }
    }
    check_reservations(objects)?;
    check_mappings(objects)
}

/// A device's regions are reserved once, in the IOAS that it uses and in no other.
fn check_reservations(objects: &Objects) -> Result<(), TestCaseError> {
    for (dev, object) in objects.table().iter() {
        let Object::Device(_) = object else { continue };
        let own = objects.slots_of(dev).into_iter().find(|(slot, _)| slot.is_none());
        let served = own.map(|(_, hwpt)| objects.stage2_of(hwpt).unwrap().ioas);
        for (id, object) in objects.table().iter() {
            let Object::Ioas(ioas) = object else { continue };
            let expected = if served == Some(id) { 1 } else { 0 };
            prop_assert_eq!(ioas.space.reservations_of(dev), expected, "{:?} in {:?}", dev, id);
        }
    }
    Ok(())
}

/// Mappings do not overlap reservations, are visible to DMA, and their pages are accounted once.
fn check_mappings(objects: &Objects) -> Result<(), TestCaseError> {
    let mut pinned: BTreeSet<(*const Pages, u64)> = BTreeSet::new();
    for (id, object) in objects.table().iter() {
        let Object::Ioas(ioas) = object else { continue };
        let usable = ioas.space.usable();
        for (start, area) in ioas.space.areas() {
            let inside = |range: &&std::ops::RangeInclusive<u64>| {
                range.contains(&start) && range.contains(&area.last)
            };
            prop_assert!(usable.iter().find(inside).is_some(), "{:?} at {:#x}", id, start);
            let mapping = ioas.stage2.lookup(area.last);
            prop_assert_eq!(mapping.is_some(), !ioas.hwpts.is_empty());
            if let Some(mapping) = mapping {
                prop_assert_eq!((mapping.start, mapping.last), (start, area.last));
                prop_assert_eq!(mapping.memory.user_va(), area.pages.start_of(area.offset));
                let pages =
                    area.offset / PAGE_SIZE..(area.offset + area.last - start + 1) / PAGE_SIZE;
                pinned.extend(pages.map(|page| (Arc::as_ptr(&area.pages), page)));
            }
        }
    }
    prop_assert_eq!(objects.pinned_bytes(), pinned.len() as u64 * PAGE_SIZE);
    Ok(())
}

/// Makes `calls`, and checks after each.
fn check_calls(calls: &[Call]) -> Result<(), TestCaseError> {
    let bench = Bench::with_viommus();
    // Initial calls, as most sequences would otherwise only be refused.
    for call in [
        Call::Bind(0),
        Call::Bind(1),
        Call::IoasAlloc,
        Call::Paging(ObjectId(1), ObjectId(3), 0b1001),
        Call::Nested(ObjectId(1), ObjectId(4), true, 48),
    ] {
        prop_assert!(make(&bench, &call));
    }
    let mut installed = Installed::default();
    bench.fake.told();
    for call in calls {
        let before = bench.host.graph();
        let done = make(&bench, call);
        let told = [bench.fake.told(), bench.other.told()];
        // An unmap that stops at a mapping it would split has unmapped those below.
        if !done && !matches!(call, Call::Unmap(..)) {
            prop_assert_eq!(bench.host.graph(), before, "a call that fails changes nothing");
            prop_assert!(told.iter().all(Vec::is_empty), "{:?}: {:?}", call, told);
        }
        for (unit, told) in told.iter().enumerate() {
            installed.follow(unit, told);
        }
        check(&bench.host.objects(), &installed)?;
    }
    bench.host.close();
    prop_assert_eq!(bench.host.live_objects(), 0);
    prop_assert_eq!(bench.host.pinned_bytes(), 0);
    Ok(())
}

/// An IOAS in place of a device.
#[test]
fn an_attachment_to_what_is_none() {
    let attach = Call::Attach(ObjectId(1), None, ObjectId(3));
    check_calls(&[Call::IoasAlloc, Call::IoasAlloc, Call::IoasAlloc, attach]).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn random_verbs_leave_the_objects_consistent(
        calls in prop::collection::vec(call(), 1..80),
    ) {
        check_calls(&calls)?;
    }
}
