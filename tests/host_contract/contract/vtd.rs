// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Nesting on VT-d: user-owned tables on a nesting parent.

use twostage::iommufd::{
    iommu_hwpt_vtd_s1, iommu_hwpt_vtd_s1_invalidate, Errno, HwInfoData, HwptData, HwptFlags,
    InvalidateData, ObjectId, Protection, ViommuKind,
};
use twostage::iommufd::{InvalidateError, MapTarget};
use twostage::spec::vtd::regs::Ecap;

use super::memory::Memory;
use super::{destroy, ioas_of, refused, Bound, Subject, PAGE};

/// The IOVA that the tables map; memory is at 0 of the parent.
const IOVA: u64 = 0x234_5000;
const TABLES: u64 = 0;
const FIRST: u64 = 0x10 * PAGE;
const SECOND: u64 = 0x11 * PAGE;
const OUT: u64 = 0x12 * PAGE;
/// Present, writable, user, accessed, dirty.
const ENTRY: u64 = 0x67;

/// Makes the four levels of tables map `iova` to `page`, or to nothing.
fn lead(memory: &Memory, iova: u64, page: Option<u64>) {
    for level in (0..4).rev() {
        let table = TABLES + (3 - level) * PAGE;
        let entry = match (level, page) {
            (0, page) => page.map_or(0, |page| page | ENTRY),
            _ => (table + PAGE) | ENTRY,
        };
        memory.set(table + (iova >> (12 + 9 * level) & 0x1ff) * 8, entry);
    }
}

fn entry(addr: u64, npages: u64) -> iommu_hwpt_vtd_s1_invalidate {
    iommu_hwpt_vtd_s1_invalidate { addr, npages, ..Default::default() }
}

pub fn check(subject: &Subject) {
    let mut bound = Bound::new(subject);
    let host = bound.host();
    let HwInfoData::Vtd(info) = bound.iommu() else {
        println!("  this is none");
        return;
    };
    let memory = Memory::new(0x20);
    let ioas = ioas_of(host, &memory, 0);
    let parent = bound.hwpt(ioas, HwptFlags::new().with_nest_parent(true), HwptData::None);
    if !Ecap::from(info.ecap_reg).nest() {
        println!("  this one cannot nest");
        refused(parent, Errno::EOPNOTSUPP);
        destroy(host, &[ioas]);
        return;
    }
    let parent = parent.expect("a nesting parent");
    bound.attach(parent);
    assert!(bound.moves(&memory, (FIRST, FIRST), (OUT, OUT)), "stage 2 alone");
    let only_read = (&memory.part(0, PAGE), MapTarget::Fixed(0x4000_0000), Protection::READ_ONLY);
    refused(host.ioas_map(ioas, only_read.0, only_read.1, only_read.2), Errno::EINVAL);
    refused(host.viommu_alloc(ViommuKind::ArmSmmuV3, bound.dev, parent), Errno::EOPNOTSUPP);

    let tables = iommu_hwpt_vtd_s1 { pgtbl_addr: TABLES, addr_width: 48, ..Default::default() };
    let nested = bound.hwpt(parent, HwptFlags::new(), HwptData::VtdS1(tables));
    let nested = nested.expect("a nested HWPT");
    let on_nested = bound.hwpt(nested, HwptFlags::new(), HwptData::VtdS1(tables));
    refused(on_nested, Errno::EINVAL);
    refused(host.destroy(parent), Errno::EBUSY);
    translations(&mut bound, &memory, nested);
    invalidations(&bound, parent, nested);

    // Tables of an impossible width are refused on attach.
    let odd = iommu_hwpt_vtd_s1 { addr_width: 40, ..tables };
    let odd = bound.hwpt(parent, HwptFlags::new(), HwptData::VtdS1(odd)).expect("a HWPT");
    refused(host.device_attach(bound.dev, None, odd), Errno::EINVAL);
    // Linux may have blocked the device by then: detach first.
    bound.detach();
    bound.attach(parent);
    assert!(bound.moves(&memory, (FIRST, FIRST), (OUT, OUT)));
    bound.detach();
    destroy(host, &[odd, nested, parent, ioas]);
}

fn translations(bound: &mut Bound, memory: &Memory, nested: ObjectId) {
    let host = bound.host();
    let invalidate = |entries: &[_]| host.hwpt_invalidate(nested, InvalidateData::VtdS1(entries));
    let out = IOVA + PAGE;
    lead(memory, IOVA, Some(FIRST));
    lead(memory, out, Some(OUT));
    bound.attach(nested);
    assert!(bound.moves(memory, (FIRST, IOVA), (OUT, out)), "both stages");
    assert!(!bound.moves(memory, (FIRST, FIRST), (OUT, out)), "no table leads there");
    lead(memory, IOVA, Some(SECOND));
    assert!(bound.moves(memory, (FIRST, IOVA), (OUT, out)), "stale until the invalidation");
    invalidate(&[entry(IOVA, 1)]).expect("HWPT_INVALIDATE");
    assert!(bound.moves(memory, (SECOND, IOVA), (OUT, out)));
    lead(memory, IOVA, None);
    invalidate(&[entry(0, u64::MAX)]).expect("HWPT_INVALIDATE");
    assert!(!bound.moves(memory, (SECOND, IOVA), (OUT, out)));
}

#[track_caller]
fn stopped(result: Result<(), InvalidateError>, errno: Errno, done: usize) {
    let error = result.expect_err("an entry is wrong");
    assert_eq!((error.error.errno, error.done), (errno, done), "{error}");
}

/// Valid and invalid entries, and how far the host gets.
fn invalidations(bound: &Bound, parent: ObjectId, nested: ObjectId) {
    let host = bound.host();
    let invalidate =
        |hwpt, entries: &[_]| host.hwpt_invalidate(hwpt, InvalidateData::VtdS1(entries));
    let good = entry(IOVA, 1);
    invalidate(nested, &[]).expect("nothing to do");
    invalidate(nested, &[good; 100]).expect("HWPT_INVALIDATE");
    stopped(invalidate(nested, &[good, good, entry(IOVA + 1, 1), good]), Errno::EINVAL, 2);
    stopped(invalidate(nested, &[entry(PAGE, u64::MAX), good]), Errno::EINVAL, 0);
    let flags = iommu_hwpt_vtd_s1_invalidate { flags: 1 << 5, ..good };
    stopped(invalidate(nested, &[good, flags]), Errno::EOPNOTSUPP, 1);
    stopped(invalidate(parent, &[good]), Errno::EINVAL, 0);
    stopped(invalidate(bound.dev, &[good]), Errno::EINVAL, 0);
    stopped(invalidate(ObjectId(12345), &[good]), Errno::ENOENT, 0);
}
