// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The invalidation queue: order, batches, waits, errors, and how it continues after them.

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestMemoryBackend, MmapRegion};

use super::*;
use crate::spec::vtd::qi::{
    AddressMask, ContextScope, DeviceTlbRange, InterruptEntryScope, IotlbScope, PasidCacheScope,
    StatusWrite,
};
use crate::spec::vtd::regs::{Fsts, IqErrorInfo, Iqercd};

const PASID_CACHE: Descriptor = Descriptor::PasidCache(PasidCacheScope::Global);
const PAGE: AddressMask = AddressMask { address: 0x5000, mask: 0, leaf: false };

fn iotlb(scope: IotlbScope) -> Descriptor {
    Descriptor::Iotlb { scope, drain_writes: true, drain_reads: true }
}

pub(super) fn pasid_iotlb(value: u32, range: Option<AddressMask>) -> Descriptor {
    Descriptor::PasidIotlb { domain: DOMAIN, pasid: pasid(value), range }
}

pub(super) fn device_tlb(source: Bdf) -> Descriptor {
    let range = DeviceTlbRange { address: 0, size: false };
    Descriptor::DeviceTlb { source, physical_function: 0, max_pending: 0, range }
}

fn invalidation(pasid: Option<u32>, range: Option<PageRange>) -> Invalidation {
    Invalidation { domain: Some(DOMAIN), pasid, range }
}

impl Guest {
    pub(super) fn fault_status(&self) -> Fsts {
        Fsts::from_bits(self.read32(regs::FSTS))
    }

    /// Checks that the queue stopped at `head` because of the host.
    #[track_caller]
    fn assert_stopped_by_host(&self, head: u64) {
        assert!(self.fault_status().iqe());
        assert_eq!(Iqercd::from_bits(self.read64(regs::IQERCD)).iqei(), 0);
        assert_eq!(self.head(), head);
    }

    /// Checks that the queue stopped at `head` with `info`.
    fn assert_stopped(&self, head: u64, info: IqErrorInfo) {
        assert!(self.fault_status().iqe(), "{info:?}");
        assert_eq!(self.head(), head, "{info:?}");
        let code = Iqercd::from_bits(self.read64(regs::IQERCD)).iqei();
        assert_eq!(IqErrorInfo::from_code(code), Some(info));
    }
}

#[test]
fn the_written_status_is_marked_dirty_and_nothing_else() {
    let ranges = [(GuestAddress(0), MEMORY_SIZE as usize)];
    let tracked = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges).unwrap();
    let guest = Guest::reading(VtdConfig::default(), guest_memory(), Arc::new(tracked.clone()));
    guest.enable_queue(0x800);
    tracked.write_obj(wait(7).encode(), GuestAddress(QUEUE)).unwrap();
    let bitmap = MmapRegion::bitmap(tracked.iter().next().unwrap());
    bitmap.reset();
    guest.write64(regs::IQT, 32);
    assert_eq!(tracked.read_obj::<u32>(GuestAddress(STATUS)).unwrap(), 7);
    let pages = (0..MEMORY_SIZE).step_by(0x1000);
    let marked: Vec<u64> = pages.filter(|page| bitmap.is_addr_set(*page as usize)).collect();
    assert_eq!(marked, [STATUS]);
}

#[test]
fn the_host_is_done_before_the_status_is_written() {
    let guest = Guest::running();
    guest.submit(&[pasid_iotlb(0, None), wait(7)]);
    assert_eq!(*guest.host.status_then.lock(), [0]);
    assert_eq!(guest.calls(), [Call::Invalidate(vec![invalidation(Some(0), None)])]);
    assert_eq!((guest.status(), guest.head()), (7, 64));
}

#[test]
fn what_stands_between_ordering_points_is_one_call() {
    let guest = Guest::running();
    let pages = PageRange::new(0x5000, 1, false);
    let first = [pasid_iotlb(0, Some(PAGE)), iotlb(IotlbScope::Domain(DOMAIN))];
    let pages_of = IotlbScope::Pages { domain: DOMAIN, range: PAGE };
    guest.submit(&[
        first[0],
        first[1],
        wait(1),
        iotlb(IotlbScope::Global),
        Descriptor::ContextCache(ContextScope::Global),
        iotlb(pages_of),
        Descriptor::PasidCache(PasidCacheScope::Global),
        pasid_iotlb(3, None),
        pasid_iotlb(4, None),
    ]);
    let batches = [
        vec![invalidation(Some(0), Some(pages)), invalidation(None, None)],
        vec![Invalidation::ALL],
        vec![invalidation(None, Some(pages))],
        vec![invalidation(Some(3), None), invalidation(Some(4), None)],
    ];
    assert_eq!(guest.calls(), batches.map(Call::Invalidate));
    assert_eq!(guest.head(), 9 * 32);
    let counters = guest.iommu.counters();
    // The first batch ever is SRTP's.
    assert_eq!((counters.batches, counters.invalidations), (5, 7));
    assert_eq!((counters.pasid_iotlb, counters.iotlb, counters.wait), (3, 3, 1));
}

#[test]
fn descriptors_of_128_bits_and_a_queue_that_wraps() {
    let guest = Guest::new(VtdConfig::default());
    guest.enable_queue(0);
    let words = iotlb(IotlbScope::Global).encode();
    for index in 0..256 {
        guest.write(QUEUE + 16 * index, &words[..2]);
    }
    guest.write64(regs::IQT, 0xff0);
    let Some(Call::Invalidate(batch)) = guest.calls().pop() else { panic!() };
    assert_eq!((batch.len(), guest.head()), (255, 0xff0));
    guest.write64(regs::IQT, 0x20);
    let Some(Call::Invalidate(batch)) = guest.calls().pop() else { panic!() };
    assert_eq!((batch.len(), guest.head()), (3, 0x20));
}

#[test]
fn each_wrong_descriptor_stops_the_queue_at_itself() {
    use IqErrorInfo::{InvalidType, ReservedField};
    let large = AddressMask { mask: 19, ..PAGE };
    let index = InterruptEntryScope::Index { index: 0, mask: 0 };
    let response = Descriptor::PageGroupResponse { requester: RID, pasid: None, group: 0, code: 0 };
    let pasid_device_tlb = Descriptor::PasidDeviceTlb {
        source: RID,
        pasid: pasid(1),
        global: false,
        physical_function: 0,
        max_pending: 0,
        range: DeviceTlbRange { address: 0, size: false },
    };
    let cases = [
        ([0, 0, 0, 0], InvalidType),
        ([0xa, 0, 0, 0], InvalidType),
        ([0x202, 0, 0, 0], InvalidType),
        ([u64::MAX; 4], InvalidType),
        // Granularity 00, and a reserved bit of each word.
        ([0x1, 0, 0, 0], ReservedField),
        ([0x2, 0, 0, 0], ReservedField),
        ([0x12 | 1 << 8, 0, 0, 0], ReservedField),
        ([0x12, 1 << 7, 0, 0], ReservedField),
        ([0x12, 0, 1, 0], ReservedField),
        ([0x12, 0, 0, 1], ReservedField),
        ([0x25, STATUS | 1, 0, 0], ReservedField),
        ([0x16, 0, 0, 0], ReservedField),
        ([0x27, 0, 0, 0], ReservedField),
        // Not offered by the unit.
        (iotlb(IotlbScope::Pages { domain: 0, range: large }).encode(), ReservedField),
        (device_tlb(RID).encode(), InvalidType),
        (Descriptor::InterruptEntryCache(index).encode(), InvalidType),
        (response.encode(), InvalidType),
        (pasid_device_tlb.encode(), InvalidType),
    ];
    for (words, info) in cases {
        let guest = Guest::running();
        guest.submit_words(&[pasid_iotlb(0, None).encode(), words, wait(9).encode()]);
        guest.assert_stopped(32, info);
        // Descriptors before it were done, those after it not looked at.
        assert_eq!(guest.calls(), [Call::Invalidate(vec![invalidation(Some(0), None)])]);
        assert_eq!(guest.status(), 0);
        // A new tail has no effect.
        guest.submit(&[wait(8)]);
        assert_eq!((guest.status(), guest.head()), (0, 32));
        // The driver's recovery: a valid descriptor in its place, and IQE cleared.
        guest.write(QUEUE + 32, &wait(5).encode());
        guest.write32(regs::FSTS, 1 << 4);
        assert_eq!((guest.status(), guest.head()), (8, 4 * 32));
        assert!(!guest.fault_status().iqe());
    }
}

#[test]
fn a_queue_error_raises_the_fault_event() {
    let guest = Guest::running();
    guest.write32(regs::FEDATA, 0x41);
    guest.write32(regs::FECTL, 0);
    guest.submit_words(&[[0; 4]]);
    assert_eq!(guest.messages(), [(0, 0x41)]);
}

#[test]
fn scalable_descriptors_need_scalable_mode() {
    for descriptor in [pasid_iotlb(0, None), Descriptor::PasidCache(PasidCacheScope::Global)] {
        let guest = Guest::new(VtdConfig::default());
        guest.enable_queue(0x800);
        guest.submit(&[iotlb(IotlbScope::Global), descriptor]);
        guest.assert_stopped(32, IqErrorInfo::InvalidType);
    }
}

#[test]
fn the_tail_must_lie_in_the_queue_and_be_aligned() {
    for (tail, info) in [(0x1000, IqErrorInfo::InvalidTail), (0x10, IqErrorInfo::TailMisaligned)] {
        let guest = Guest::running();
        guest.write64(regs::IQT, tail);
        guest.assert_stopped(0, info);
        guest.queue_words(&[]);
        guest.write(QUEUE, &wait(3).encode());
        guest.write64(regs::IQT, 0x20);
        assert_eq!(guest.status(), 0);
        guest.write32(regs::FSTS, 1 << 4);
        assert_eq!((guest.status(), guest.head()), (3, 0x20));
    }
}

#[test]
fn the_descriptor_width_must_fit_the_mode() {
    // 128 bits in scalable mode.
    let guest = Guest::new(VtdConfig::default());
    guest.set_root(0x400);
    guest.enable_queue(0);
    guest.submit(&[wait(1)]);
    guest.assert_stopped(0, IqErrorInfo::InvalidWidth);
    // 256 bits without scalable mode.
    let legacy = VtdConfig { scalable_mode: false, second_stage: true, ..Default::default() };
    let guest = Guest::new(legacy);
    guest.enable_queue(0x800);
    guest.submit(&[wait(1)]);
    guest.assert_stopped(0, IqErrorInfo::InvalidWidth);
    // Reserved modes: also the one that aborts DMA, without ECAP.ADMS.
    for mode in [0x800, 0xc00] {
        let guest = Guest::new(VtdConfig::default());
        guest.set_root(mode);
        guest.enable_queue(0x800);
        guest.submit(&[wait(1)]);
        guest.assert_stopped(0, IqErrorInfo::InvalidTtm);
    }
}

#[test]
fn a_queue_outside_memory_is_a_fetch_error() {
    for base in [MEMORY_SIZE, !0xfff] {
        let guest = Guest::new(VtdConfig::default());
        guest.write64(regs::IQA, base | 0x800);
        guest.command(|enabled| enabled | 1 << 26);
        guest.write64(regs::IQT, 0x40);
        guest.assert_stopped(0, IqErrorInfo::FetchError);
    }
}

#[test]
fn a_batch_that_the_host_cannot_do_stops_the_queue_before_it() {
    let guest = Guest::running();
    guest.submit(&[wait(1)]);
    guest.refuse(true);
    guest.submit(&[pasid_iotlb(0, None), pasid_iotlb(1, None), wait(2)]);
    assert!(guest.fault_status().iqe());
    assert_eq!(Iqercd::from_bits(guest.read64(regs::IQERCD)).iqei(), 0);
    assert_eq!((guest.head(), guest.status()), (32, 1));
    let counters = guest.iommu.counters();
    assert_eq!((counters.host_errors, counters.queue_errors), (1, 1));
    // Once the host works again, the batch is done, and what it had blocked is given again.
    guest.refuse(false);
    guest.calls();
    guest.write32(regs::FSTS, 1 << 4);
    assert_eq!((guest.head(), guest.status()), (4 * 32, 2));
    let batch = vec![invalidation(Some(0), None), invalidation(Some(1), None)];
    let again = Call::Configure(Requester::rid(RID), first_stage(FIRST_STAGE));
    assert_eq!(guest.calls(), [Call::Invalidate(batch), again]);
    guest.submit(&[Descriptor::PasidCache(PasidCacheScope::Global), pasid_iotlb(0, None)]);
    assert_eq!(guest.calls(), [Call::Invalidate(vec![invalidation(Some(0), None)])]);
}

#[test]
fn what_the_host_cannot_block_stops_the_queue_and_is_tried_again() {
    let guest = Guest::running();
    guest.write_pasid(1, 0x6000);
    guest.submit(&[PASID_CACHE, wait(1)]);
    // The PASID's entry alone, then its whole table.
    for gone in [PASID_TABLE + 64, DIRECTORY] {
        guest.write(gone, &[0]);
        guest.fail_to_block(true);
        let head = guest.head();
        guest.submit(&[PASID_CACHE, PASID_CACHE, wait(2)]);
        guest.assert_stopped_by_host(head);
        assert_eq!(guest.status(), 1);
        // It fails again.
        guest.write32(regs::FSTS, 1 << 4);
        guest.assert_stopped_by_host(head);
        guest.fail_to_block(false);
        guest.calls();
        guest.write32(regs::FSTS, 1 << 4);
        assert_eq!(guest.status(), 2);
        assert_ne!(guest.calls(), []);
        // Now it is done.
        guest.submit(&[PASID_CACHE]);
        assert_eq!(guest.calls(), []);
        guest.write(DIRECTORY, &[PASID_TABLE | 1]);
        guest.write_pasid(1, 0x6000);
        guest.submit(&[PASID_CACHE, wait(1)]);
        guest.calls();
    }
}

#[test]
fn invalidations_of_context_and_pasid_cache_are_merged() {
    let guest = Guest::running();
    let evaluations = |descriptors: &[Descriptor]| {
        let before = guest.iommu.counters().evaluations;
        guest.submit(descriptors);
        guest.iommu.counters().evaluations - before
    };
    let one = |value| {
        let scope = PasidCacheScope::Pasid { domain: DOMAIN, pasid: pasid(value) };
        Descriptor::PasidCache(scope)
    };
    assert_eq!(evaluations(&[PASID_CACHE; 100]), 1);
    assert_eq!(evaluations(&[one(1), one(2), one(1)]), 2);
    assert_eq!(evaluations(&[one(1), PASID_CACHE, one(2)]), 1);
    assert_eq!(evaluations(&(1..20).map(one).collect::<Vec<_>>()), 1);
    // Not past what is ordered after them.
    assert_eq!(evaluations(&[PASID_CACHE, wait(1), PASID_CACHE]), 2);
    assert_eq!(evaluations(&[PASID_CACHE, pasid_iotlb(0, None), PASID_CACHE]), 2);
    assert_eq!(guest.head(), guest.read64(regs::IQT));
}

#[test]
fn the_registers_are_let_go_at_each_ordering_point() {
    let guest = Guest::running();
    let queued = [PASID_CACHE, PASID_CACHE, pasid_iotlb(0, None), PASID_CACHE, wait(1), wait(2)];
    let tail = guest.queue_words(&queued.map(|descriptor| descriptor.encode()));
    guest.iommu.lock().iqt = regs::QueuePointer::from_offset(tail);
    // The first wait is complete with what it waits for.
    for head in [2, 3, 5] {
        assert_eq!(guest.iommu.run_slice(&mut guest.iommu.lock()), Slice::More);
        assert_eq!(guest.head(), 32 * head);
    }
    assert_eq!(guest.status(), 1);
    assert_eq!(guest.iommu.run_slice(&mut guest.iommu.lock()), Slice::Done);
    assert_eq!((guest.head(), guest.status()), (tail, 2));
}

#[test]
fn a_wait_behind_a_device_that_does_not_answer_is_aborted() {
    let guest = Guest::new(VtdConfig { device_iotlb: true, ..Default::default() });
    guest.enable_queue(0x800);
    guest.submit(&[device_tlb(RID), wait(1)]);
    assert_eq!((guest.status(), guest.head()), (1, 64));
    guest.submit(&[device_tlb(UPPER_RID), iotlb(IotlbScope::Global), wait(2), wait(3)]);
    assert!(guest.fault_status().ite() && !guest.fault_status().iqe());
    assert_eq!(Iqercd::from_bits(guest.read64(regs::IQERCD)).itesid(), UPPER_RID.raw());
    // The IOTLB invalidation was done; IQH is past the aborted wait.
    assert_eq!((guest.status(), guest.head()), (1, 5 * 32));
    let told = Call::DeviceTlb(RID, None, PageRange::new(0, 1, true));
    assert_eq!(guest.calls(), [told, Call::Invalidate(vec![Invalidation::ALL])]);
    guest.write32(regs::FSTS, 1 << 6);
    assert_eq!((guest.status(), guest.head()), (3, 6 * 32));
    // Without a wait after it, the error comes at the tail.
    guest.submit(&[device_tlb(UPPER_RID)]);
    assert!(guest.fault_status().ite());
    assert_eq!(guest.head(), 7 * 32);
}

#[test]
fn devices_forget_after_the_iotlb_and_before_the_wait() {
    let guest = Guest::new(VtdConfig { device_iotlb: true, ..Default::default() });
    guest.set_root(0x400);
    guest.enable_queue(0x800);
    guest.calls();
    let pasid = |global| Descriptor::PasidDeviceTlb {
        source: RID,
        pasid: Pasid::new(5).unwrap(),
        global,
        physical_function: 0,
        max_pending: 0,
        range: DeviceTlbRange { address: 0x5000, size: true },
    };
    guest.submit(&[device_tlb(RID), pasid(false), iotlb(IotlbScope::Global), pasid(true), wait(1)]);
    let told = |pasid| Call::DeviceTlb(RID, pasid, PageRange::new(0x4000, 4, true));
    let all = Call::DeviceTlb(RID, None, PageRange::new(0, 1, true));
    assert_eq!(*guest.host.status_then.lock(), [0; 4], "before the wait");
    let order = [Call::Invalidate(vec![Invalidation::ALL]), all, told(Some(5)), told(None)];
    assert_eq!((guest.calls(), guest.status()), (order.to_vec(), 1));
    // One that is there and does not answer: as one that is not.
    *guest.host.silent.lock() = Some(RID);
    guest.submit(&[pasid(false), wait(2)]);
    assert!(guest.fault_status().ite() && !guest.fault_status().iqe());
    assert_eq!(Iqercd::from_bits(guest.read64(regs::IQERCD)).itesid(), RID.raw());
    assert_eq!((guest.status(), guest.head()), (1, guest.read64(regs::IQT)));
    guest.write32(regs::FSTS, 1 << 6);
    *guest.host.silent.lock() = None;
    guest.submit(&[pasid(false), wait(3)]);
    assert_eq!(guest.status(), 3);
}

#[test]
fn a_slice_that_ends_at_the_tail_leaves_no_error_behind() {
    let guest = Guest::new(VtdConfig { device_iotlb: true, ..Default::default() });
    // Of 2048 descriptors of 16 bytes.
    guest.enable_queue(3);
    for number in 0..1024 {
        let gone = if number == 1023 { UPPER_RID } else { RID };
        guest.write(QUEUE + 16 * number, &device_tlb(gone).encode()[..2]);
    }
    guest.write64(regs::IQT, 16 * 1024);
    assert_eq!(guest.head(), 16 * 1024);
    assert!(guest.fault_status().ite());
    assert_eq!(Iqercd::from_bits(guest.read64(regs::IQERCD)).itesid(), UPPER_RID.raw());
}

#[test]
fn a_disabled_queue_stands_at_its_start() {
    let guest = Guest::running();
    guest.submit(&[wait(1)]);
    guest.command(|enabled| enabled & !(1 << 26));
    assert_eq!((guest.head(), guest.read64(regs::IQT)), (0, 32));
    // Tails are accepted while it is disabled, and processed when it is enabled.
    guest.write(QUEUE, &wait(4).encode());
    guest.write64(regs::IQT, 32);
    assert_eq!(guest.status(), 1);
    guest.command(|enabled| enabled | 1 << 26);
    assert_eq!((guest.status(), guest.head()), (4, 32));
}

#[test]
fn a_wait_can_interrupt() {
    let guest = Guest::running();
    guest.write32(regs::IEDATA, 0x42);
    guest.write64(regs::IEADDR, 0x1_fee0_1000);
    let interrupting =
        Descriptor::Wait { status: None, interrupt: true, fence: true, drain_page_requests: false };
    guest.submit(&[interrupting]);
    // Masked after reset: pending.
    assert_eq!(guest.messages(), []);
    assert_eq!((guest.read32(regs::ICS), guest.read32(regs::IECTL)), (1, 3 << 30));
    guest.write32(regs::IECTL, 0);
    assert_eq!(guest.messages(), [(0x1_fee0_1000, 0x42)]);
    assert_eq!(guest.read32(regs::IECTL), 0);
    // IWC is still set: no new event.
    guest.submit(&[interrupting]);
    assert_eq!(guest.messages(), []);
    guest.write32(regs::ICS, 1);
    assert_eq!(guest.read32(regs::ICS), 0);
    guest.submit(&[interrupting]);
    assert_eq!(guest.messages().len(), 1);
}

#[test]
fn a_status_address_that_is_no_memory_is_no_hang() {
    let guest = Guest::running();
    let status = StatusWrite { address: !3, data: 1 };
    let lost = Descriptor::Wait {
        status: Some(status),
        interrupt: false,
        fence: false,
        drain_page_requests: false,
    };
    guest.submit(&[lost, wait(2)]);
    assert_eq!((guest.status(), guest.read64(regs::IQH)), (2, 64));
    assert_eq!(guest.iommu.counters().guest_errors, 1);
}

/// Linux sets PD when it recovers from an error of the queue.
#[test]
fn a_wait_may_ask_to_drain_page_requests_of_which_there_are_none() {
    let drain = Descriptor::Wait {
        status: Some(StatusWrite { address: STATUS, data: 7 }),
        interrupt: false,
        fence: true,
        drain_page_requests: true,
    };
    let guest = Guest::running();
    assert_eq!(guest.read64(regs::ECAP) >> 42 & 1, 1, "ECAP.PDS");
    guest.submit(&[drain]);
    assert_eq!((guest.status(), guest.read64(regs::IQH)), (7, 32));
    // If not offered, the bit is reserved.
    let legacy = VtdConfig { scalable_mode: false, second_stage: true, ..Default::default() };
    let guest = Guest::new(legacy);
    assert_eq!(guest.read64(regs::ECAP) >> 42 & 1, 0, "ECAP.PDS");
    guest.enable_queue(0);
    guest.write(QUEUE, &drain.encode()[..2]);
    guest.write64(regs::IQT, 16);
    assert!(guest.fault_status().iqe());
    let code = Iqercd::from_bits(guest.read64(regs::IQERCD)).iqei();
    assert_eq!(IqErrorInfo::from_code(code), Some(IqErrorInfo::ReservedField));
    assert_eq!(guest.status(), 0);
}
