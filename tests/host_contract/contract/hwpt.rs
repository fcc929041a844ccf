// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! HWPTs without user-owned tables: devices on them, dirty tracking, and fault queues, as far as
//! possible without a device with page requests.

use std::ops::RangeInclusive;
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};

use twostage::iommufd::{
    iommu_hwpt_vtd_s1, DirtyRange, Errno, HwInfoData, HwptAlloc, HwptData, HwptFlags, MapTarget,
    ObjectId, PageResponseCode, Protection, Readiness,
};

use super::memory::Memory;
use super::{destroy, ioas_of, refused, Bound, Subject, BASE, PAGE};

const NOBODY: ObjectId = ObjectId(12345);

pub fn allocation(subject: &Subject) {
    let bound = Bound::new(subject);
    let host = bound.host();
    let ioas = host.ioas_alloc().expect("IOAS_ALLOC");
    let none = HwptFlags::new();
    let args =
        HwptAlloc { flags: none, dev: bound.dev, pt: ioas, data: HwptData::None, fault: None };
    refused(host.hwpt_alloc(&HwptAlloc { dev: NOBODY, ..args }), Errno::ENOENT);
    refused(host.hwpt_alloc(&HwptAlloc { pt: NOBODY, ..args }), Errno::EINVAL);
    refused(host.hwpt_alloc(&HwptAlloc { pt: bound.dev, ..args }), Errno::EINVAL);
    let unknown = none.with_unknown(1 << 20);
    refused(host.hwpt_alloc(&HwptAlloc { flags: unknown, ..args }), Errno::EOPNOTSUPP);
    let with_fault = none.with_fault_id_valid(true);
    let faulty = HwptAlloc { flags: with_fault, fault: Some(NOBODY), ..args };
    refused(host.hwpt_alloc(&faulty), Errno::ENOENT);
    let both = with_fault.with_nest_parent(true);
    refused(host.hwpt_alloc(&HwptAlloc { flags: both, ..faulty }), Errno::EOPNOTSUPP);
    // User-owned tables need a nesting parent.
    let tables = HwptData::VtdS1(iommu_hwpt_vtd_s1::default());
    refused(host.hwpt_alloc(&HwptAlloc { data: tables, ..args }), Errno::EOPNOTSUPP);
    let hwpt = host.hwpt_alloc(&args).expect("HWPT_ALLOC");
    // On VT-d the driver checks the parent first, elsewhere the format.
    if let HwInfoData::Vtd(_) = bound.iommu() {
        refused(bound.hwpt(hwpt, none, tables), Errno::EINVAL);
    }
    refused(bound.hwpt(hwpt, none, HwptData::None), Errno::EOPNOTSUPP);
    refused(host.destroy(ioas), Errno::EBUSY);
    destroy(host, &[hwpt, ioas]);
}

pub fn limits(subject: &Subject) {
    let bound = Bound::new(subject);
    let host = bound.host();
    let memory = Memory::new(4);
    let ioas = ioas_of(host, &memory, BASE);
    let hwpt = bound.hwpt(ioas, HwptFlags::new(), HwptData::None).expect("HWPT_ALLOC");
    let ranges = host.ioas_iova_ranges(ioas).expect("IOAS_IOVA_RANGES");
    assert_eq!(ranges.alignment, PAGE);
    let last = ranges.allowed.last().expect("something is left");
    assert!(*last.end() < u64::MAX, "no IOMMU has so wide addresses: {last:?}");
    let map = |offset, length, iova| {
        let memory = memory.part(offset, length);
        host.ioas_map(ioas, &memory, MapTarget::Fixed(iova), Protection::READ_WRITE)
    };
    refused(map(0, PAGE, PAGE / 2), Errno::EINVAL);
    refused(map(0, PAGE / 2, 0), Errno::EINVAL);
    refused(map(PAGE / 2, PAGE, 0), Errno::EINVAL);
    refused(map(0, PAGE, last.end() + 1), Errno::EINVAL);
    destroy(host, &[hwpt]);
    let ranges = host.ioas_iova_ranges(ioas).expect("IOAS_IOVA_RANGES");
    assert_eq!((ranges.allowed, ranges.alignment), (vec![0..=u64::MAX], 1));
    map(PAGE / 2, PAGE / 2, PAGE / 2).expect("nobody minds any more");
    refused(bound.hwpt(ioas, HwptFlags::new(), HwptData::None), Errno::EADDRINUSE);
    destroy(host, &[ioas]);
}

pub fn attach(subject: &Subject) {
    let mut bound = Bound::new(subject);
    let host = bound.host();
    let (first, second) = (Memory::new(4), Memory::new(4));
    assert!(!bound.reaches(&first, BASE), "nothing is attached");
    let one = ioas_of(host, &first, BASE);
    let two = ioas_of(host, &second, BASE);
    refused(host.device_attach(bound.dev, None, NOBODY), Errno::ENOENT);
    refused(host.device_attach(bound.dev, None, bound.dev), Errno::EINVAL);
    let automatic = bound.attach(one);
    assert_ne!(automatic, one, "the HWPT that serves");
    assert!(bound.reaches(&first, BASE) && !bound.reaches(&second, BASE));
    assert!(!bound.reaches(&first, BASE + 0x10_0000), "nothing is mapped there");
    assert_eq!(bound.attach(one), automatic, "it is attached");
    refused(host.destroy(one), Errno::EBUSY);
    refused(host.device_attach(bound.dev, None, NOBODY), Errno::ENOENT);
    assert!(bound.reaches(&first, BASE), "what failed has changed nothing");

    let hwpt = bound.hwpt(two, HwptFlags::new(), HwptData::None).expect("HWPT_ALLOC");
    assert_eq!(bound.attach(hwpt), hwpt);
    assert!(bound.reaches(&second, BASE) && !bound.reaches(&first, BASE));
    refused(host.destroy(automatic), Errno::ENOENT);
    refused(host.destroy(hwpt), Errno::EBUSY);
    destroy(host, &[one]);
    // Mappings made while it is attached are effective at once, and so are unmaps.
    let (third, rights) = (Memory::new(4), Protection::READ_WRITE);
    let at = BASE + 0x10_0000;
    host.ioas_map(two, &third.whole(), MapTarget::Fixed(at), rights).expect("IOAS_MAP");
    assert!(bound.reaches(&third, at));
    host.ioas_unmap(two, at, third.length()).expect("IOAS_UNMAP");
    assert!(!bound.reaches(&third, at) && bound.reaches(&second, BASE));
    let only_read = Protection::READ_ONLY;
    host.ioas_map(two, &third.whole(), MapTarget::Fixed(at), only_read).expect("IOAS_MAP");
    assert!(bound.moves(&second, (0, BASE), (8, BASE + 8)));
    assert!(!bound.moves(&third, (0, at), (8, at + 8)), "it may not be written");

    bound.detach();
    bound.detach();
    assert!(!bound.reaches(&second, BASE));
    destroy(host, &[hwpt, two]);
}

/// The parts of `before` that are not in `after`.
fn lost(before: &[RangeInclusive<u64>], after: &[RangeInclusive<u64>]) -> Vec<u64> {
    let holes = after.windows(2).map(|pair| pair[0].end() + 1);
    holes.filter(|start| before.iter().any(|range| range.contains(start))).collect()
}

pub fn reserved(subject: &Subject) {
    let bound = Bound::new(subject);
    let host = bound.host();
    let memory = Memory::new(1);
    let ioas = host.ioas_alloc().expect("IOAS_ALLOC");
    let hwpt = bound.hwpt(ioas, HwptFlags::new(), HwptData::None).expect("HWPT_ALLOC");
    let ranges = || host.ioas_iova_ranges(ioas).expect("IOAS_IOVA_RANGES").allowed;
    let before = ranges();
    bound.attach(hwpt);
    let holes = lost(&before, &ranges());
    // The MSI window, on every architecture that Linux nests on.
    let hole = *holes.first().expect("a window of interrupt messages");
    println!("  reserved from {hole:#x} on");
    let map =
        || host.ioas_map(ioas, &memory.whole(), MapTarget::Fixed(hole), Protection::READ_WRITE);
    refused(map(), Errno::EINVAL);
    refused(host.ioas_allow_iovas(ioas, &[hole..=hole + PAGE - 1]), Errno::EADDRINUSE);
    bound.detach();
    assert_eq!(ranges(), before);
    map().expect("it is free without the device");
    refused(host.device_attach(bound.dev, None, hwpt), Errno::EADDRINUSE);
    destroy(host, &[hwpt, ioas]);
}

pub fn pasids(subject: &Subject) {
    let bound = Bound::new(subject);
    let host = bound.host();
    let bits = host.get_hw_info(bound.dev).expect("GET_HW_INFO").max_pasid_log2;
    let ioas = host.ioas_alloc().expect("IOAS_ALLOC");
    let hwpt = bound.hwpt(ioas, HwptFlags::new(), HwptData::None).expect("HWPT_ALLOC");
    let attach = |pasid, pt| host.device_attach(bound.dev, Some(pasid), pt);
    // An automatic HWPT, and one without the flag, cannot be used for PASIDs, whether there are any
    // or not.
    refused(attach(1, ioas), Errno::EINVAL);
    refused(attach(1, hwpt), Errno::EINVAL);
    host.device_detach(bound.dev, Some(1)).expect("nothing is attached");
    let flagged = bound.hwpt(ioas, HwptFlags::new().with_pasid(true), HwptData::None);
    if let Ok(flagged) = flagged {
        match bits {
            0 => refused(attach(1, flagged), Errno::EINVAL),
            bits => {
                assert_eq!(attach(1, flagged).expect("DEVICE_ATTACH"), flagged);
                refused(attach(1 << bits, flagged), Errno::EINVAL);
                refused(host.destroy(flagged), Errno::EBUSY);
                host.device_detach(bound.dev, Some(1)).expect("DEVICE_DETACH");
            }
        }
        destroy(host, &[flagged]);
    }
    destroy(host, &[hwpt, ioas]);
}

/// Dirty tracking, if the IOMMU supports it.
pub fn dirty_tracking(subject: &Subject) {
    let mut bound = Bound::new(subject);
    let host = bound.host();
    let memory = Memory::new(8);
    let ioas = ioas_of(host, &memory, BASE);
    let plain = bound.hwpt(ioas, HwptFlags::new(), HwptData::None).expect("HWPT_ALLOC");
    let range = DirtyRange { iova: BASE, length: 8 * PAGE, page_size: PAGE };
    refused(host.hwpt_set_dirty_tracking(plain, true), Errno::EOPNOTSUPP);
    refused(host.hwpt_get_dirty_bitmap(plain, &range, true, &mut [0]), Errno::EOPNOTSUPP);
    refused(host.hwpt_set_dirty_tracking(ioas, true), Errno::ENOENT);
    destroy(host, &[plain]);
    let tracked = bound.hwpt(ioas, HwptFlags::new().with_dirty_tracking(true), HwptData::None);
    let can = host.get_hw_info(bound.dev).expect("GET_HW_INFO").capabilities.dirty_tracking();
    if !can {
        println!("  this IOMMU has none");
        refused(tracked, Errno::EOPNOTSUPP);
        destroy(host, &[ioas]);
        return;
    }
    let hwpt = tracked.expect("HWPT_ALLOC");
    bound.attach(hwpt);
    host.hwpt_set_dirty_tracking(hwpt, true).expect("HWPT_SET_DIRTY_TRACKING");
    let dirty = |clear| {
        let mut bitmap = [0];
        host.hwpt_get_dirty_bitmap(hwpt, &range, clear, &mut bitmap).expect("the bitmap");
        bitmap[0]
    };
    assert_eq!(dirty(true), 0, "nothing is dirty when it starts");
    assert!(bound.moves(&memory, (0, BASE), (3 * PAGE, BASE + 3 * PAGE)));
    assert_eq!((dirty(false), dirty(true), dirty(true)), (1 << 3, 1 << 3, 0));
    let get = |range: DirtyRange, bitmap: &mut [u64]| {
        host.hwpt_get_dirty_bitmap(hwpt, &range, true, bitmap)
    };
    refused(get(DirtyRange { iova: BASE + 1, ..range }, &mut [0]), Errno::EINVAL);
    refused(get(DirtyRange { length: PAGE / 2, ..range }, &mut [0]), Errno::EINVAL);
    refused(get(range, &mut []), Errno::EFAULT);
    host.hwpt_set_dirty_tracking(hwpt, false).expect("HWPT_SET_DIRTY_TRACKING");
    bound.detach();
    destroy(host, &[hwpt, ioas]);
}

/// Forwards notifications.
pub struct Told(Mutex<Sender<bool>>);

impl Told {
    pub fn new() -> (Arc<Self>, Receiver<bool>) {
        let (sender, receiver) = channel();
        (Arc::new(Self(Mutex::new(sender))), receiver)
    }
}

impl Readiness for Told {
    fn changed(&self, readable: bool) {
        // The check may have ended.
        let _ = self.0.lock().unwrap_or_else(PoisonError::into_inner).send(readable);
    }
}

pub fn fault_queues(subject: &Subject) {
    let bound = Bound::new(subject);
    let host = bound.host();
    let queue = host.fault_queue_alloc().expect("FAULT_QUEUE_ALLOC");
    let id = queue.object();
    assert_eq!(queue.next_group().expect("a read"), None);
    refused(queue.respond(1, PageResponseCode::Success), Errno::EINVAL);
    let (watcher, told) = Told::new();
    queue.watch(watcher).expect("a watcher");
    assert_eq!(told.recv(), Ok(false));
    refused(host.destroy(id), Errno::EBUSY);
    let ioas = host.ioas_alloc().expect("IOAS_ALLOC");
    let args = HwptAlloc {
        flags: HwptFlags::new().with_fault_id_valid(true),
        dev: bound.dev,
        pt: ioas,
        data: HwptData::None,
        fault: Some(id),
    };
    let hwpt = host.hwpt_alloc(&args).expect("HWPT_ALLOC");
    drop(queue);
    refused(host.destroy(id), Errno::EBUSY);
    destroy(host, &[hwpt, id, ioas]);
}
