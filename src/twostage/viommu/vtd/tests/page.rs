// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The register page as memory of the guest.

use std::sync::atomic::Ordering;
use std::thread;

use proptest::prelude::*;

use super::*;
use crate::viommu::testing::{any_access, AnyAccess, Slot};
use crate::viommu::{BadAddress, Look, PageLender, PagedRegisters, Recall, RegisterPage};

/// A guest with a page.
pub(super) struct Paged {
    pub guest: Guest,
    pub page: Arc<RegisterPage>,
    pub slot: Arc<Slot>,
}

impl Paged {
    pub fn of(guest: Guest) -> Self {
        let page = RegisterPage::new().unwrap();
        guest.iommu.keep_page(page.clone());
        Self { guest, page, slot: Arc::default() }
    }

    pub fn running() -> Self {
        Self::of(Guest::running())
    }

    pub fn lend(&self) -> bool {
        self.guest.iommu.lend_page(self.slot.clone())
    }

    fn look(&self) -> Look {
        // Not each look is at the whole page.
        let mut looks = (0..2048).map(|_| self.guest.iommu.look_at_page());
        looks.find(|look| *look != Look::Nothing).unwrap_or(Look::Nothing)
    }

    /// A vCPU writes 32 bits: to memory if the page is there, or else with an exit.
    pub fn write(&self, offset: u64, value: u32) {
        let memory = || self.page.store_as_guest(offset, value);
        self.slot.access(memory, || self.guest.write32(offset, value));
    }

    pub fn read(&self, offset: u64) -> u32 {
        self.slot.access(|| self.page.load(offset), || self.guest.read32(offset))
    }

    /// Where the page differs from what reads return.
    pub fn differences(&self) -> Vec<(u64, u32, u32)> {
        let offsets = (0..MMIO_SIZE).step_by(4);
        let all = offsets.map(|at| (at, self.page.load(at), self.guest.read32(at)));
        all.filter(|(_, page, read)| page != read).collect()
    }

    /// One page of a domain, and a wait for it; returns the new tail.
    fn queue(&self, data: u32) -> u32 {
        let words = [Descriptor::Iotlb {
            scope: crate::spec::vtd::qi::IotlbScope::Global,
            drain_reads: false,
            drain_writes: false,
        }];
        let words = words.iter().chain([&wait(data)]).map(Descriptor::encode).collect::<Vec<_>>();
        self.guest.queue_words(&words) as u32
    }
}

#[test]
fn a_kept_page_is_what_reads_return() {
    let paged = Paged::of(Guest::new(VtdConfig::default()));
    assert_eq!(paged.differences(), []);
    paged.guest.write_tables();
    paged.guest.set_root(0x400);
    paged.guest.enable_queue(0x800);
    paged.guest.enable_translation();
    assert_eq!(paged.differences(), []);
    assert_eq!(paged.page.load(regs::GSTS), 1 << 31 | 1 << 30 | 1 << 26);
    paged.guest.iommu.dma_fault(&fault(Requester::rid(RID)));
    assert_eq!(paged.differences(), []);
    assert_eq!(paged.page.load(regs::FSTS), 2);
    paged.guest.submit_words(&[[0xf, 0, 0, 0]]);
    assert_eq!((paged.page.load(regs::FSTS), paged.page.load(regs::IQERCD)), (0x12, 3));
    assert_eq!(paged.differences(), []);
    paged.guest.iommu.reset().unwrap();
    assert_eq!(paged.differences(), []);
    // Another page has no effect.
    paged.guest.iommu.keep_page(RegisterPage::new().unwrap());
    paged.guest.write32(regs::FEDATA, 7);
    assert_eq!(paged.page.load(regs::FEDATA), 7);
}

fn access() -> impl Strategy<Value = AnyAccess> {
    any_access(prop_oneof![0..0x120u64, 0x220..0x2a0u64, 0..MMIO_SIZE])
}

proptest! {
    #[test]
    fn a_kept_page_is_always_what_reads_return(
        accesses in prop::collection::vec(access(), 0..48),
        faults in prop::collection::vec(any::<bool>(), 48),
    ) {
        let paged = Paged::running();
        for (access, faulty) in accesses.iter().zip(faults) {
            paged.guest.access(access);
            if faulty {
                paged.guest.iommu.dma_fault(&fault(Requester::rid(RID)));
            }
            prop_assert_eq!(paged.differences(), []);
        }
    }

    /// The same accesses have the same effects, whether the page is lent in between or not.
    #[test]
    fn lending_changes_nothing(
        accesses in prop::collection::vec((access(), any::<bool>(), any::<bool>()), 0..32),
    ) {
        let (paged, plain) = (Paged::running(), Guest::running());
        for (access, lend, faulty) in accesses {
            let before = plain.iommu.snapshot().unwrap();
            plain.access(&access);
            if lend && access.write && access.offset % 8 == 0 && access.size == 8 && paged.lend() {
                for half in [0, 4] {
                    // As memory has it: what is equal to what was there is no write at all.
                    paged.write(access.offset + half, (access.value >> (8 * half)) as u32);
                }
                paged.look();
                prop_assert!(!paged.slot.is_there() || paged.guest.iommu.take_back());
            } else {
                paged.guest.access(&access);
            }
            if faulty {
                for guest in [&paged.guest, &plain] {
                    guest.iommu.dma_fault(&fault(Requester::rid(RID)));
                }
            }
            prop_assert_eq!(paged.differences(), []);
            let (paged, plain) = (&paged.guest.iommu, &plain.iommu);
            let states = [paged, plain].map(|iommu| iommu.snapshot().unwrap());
            prop_assert_eq!(&states[0], &states[1], "{:?}", before);
        }
    }
}

impl VtdIommu {
    fn take_back(&self) -> bool {
        self.take_page_back();
        true
    }
}

/// Guest memory that compares the page with what a status word says.
struct Watched {
    memory: GuestMemoryMmap,
    page: Mutex<Option<Arc<RegisterPage>>>,
    heads: Mutex<Vec<u32>>,
}

impl TableMemory for Watched {
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), BadAddress> {
        TableMemory::read(&self.memory, address, bytes)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), BadAddress> {
        TableMemory::write(&self.memory, address, bytes)
    }

    fn store_u32(&self, address: u64, value: u32) -> Result<(), BadAddress> {
        let page = self.page.lock();
        let head = page.as_ref().map(|page| page.load(regs::IQH));
        self.heads.lock().extend(head);
        self.memory.store_u32(address, value)
    }

    fn load_u64(&self, address: u64) -> Result<u64, BadAddress> {
        self.memory.load_u64(address)
    }

    fn compare_exchange_u64(&self, address: u64, old: u64, new: u64) -> Result<bool, BadAddress> {
        self.memory.compare_exchange_u64(address, old, new)
    }
}

#[test]
fn who_sees_the_status_of_a_wait_finds_the_head_behind_it() {
    let memory = crate::viommu::testing::guest_memory();
    let watched = Arc::new(Watched {
        memory: memory.clone(),
        page: Mutex::new(None),
        heads: Mutex::default(),
    });
    let guest = Guest::reading(VtdConfig::default(), memory, watched.clone());
    let paged = Paged::of(guest);
    *watched.page.lock() = Some(paged.page.clone());
    paged.guest.enable_queue(0x800);
    for lent in [false, true] {
        if lent {
            paged.guest.set_root(0x400);
            paged.guest.enable_translation();
            assert!(paged.lend());
        }
        let before = paged.page.load(regs::IQH);
        let tail = paged.queue(1);
        paged.write(regs::IQT, tail);
        paged.look();
        assert_eq!(std::mem::take(&mut *watched.heads.lock()), [before + 64]);
    }
}

#[test]
fn a_tail_in_memory_is_served() {
    let paged = Paged::running();
    assert!(paged.lend() && paged.slot.is_there() && paged.page.is_lent());
    assert_eq!(paged.look(), Look::Nothing);
    for round in 1..200 {
        let tail = paged.queue(round);
        paged.write(regs::IQT, tail);
        assert_eq!(paged.guest.iommu.look_at_page(), Look::Tail);
        assert_eq!((paged.guest.status(), paged.page.load(regs::IQH)), (round, tail));
    }
    assert!(paged.slot.is_there() && paged.look() == Look::Nothing);
    // Reserved bits are gone as soon as somebody looked.
    let tail = paged.queue(7);
    paged.write(regs::IQT, tail | 0xf);
    paged.look();
    assert_eq!((paged.page.load(regs::IQT), paged.guest.status()), (tail, 7));
    assert!(paged.slot.is_there());
    paged.guest.iommu.take_page_back();
    assert_eq!((paged.differences(), paged.slot.is_there()), (vec![], false));
    assert_eq!((paged.page.lends(), paged.page.recalls(Recall::Asked)), (1, 1));
}

#[test]
fn a_tail_by_an_exit_while_it_is_lent_is_served_too() {
    // A vCPU that had exited before.
    let paged = Paged::running();
    assert!(paged.lend());
    let tail = paged.queue(3);
    paged.guest.write64(regs::IQT, tail.into());
    assert_eq!((paged.guest.status(), paged.page.load(regs::IQT)), (3, tail));
    assert!(paged.slot.is_there());
    // A later one of another vCPU is not overwritten.
    let next = paged.queue(4);
    paged.write(regs::IQT, next);
    paged.guest.write64(regs::IQT, tail.into());
    assert_eq!(paged.page.load(regs::IQT), next);
    paged.look();
    assert_eq!(paged.guest.status(), 4);
}

#[test]
fn any_other_write_ends_the_loan_and_takes_effect() {
    for (offset, value, reads) in [
        (regs::FEDATA, 0x41, 0x41),
        (regs::FECTL, 0, 0),
        (regs::IEADDR, 0xfee0_0003, 0xfee0_0000),
        (regs::RTADDR, 0x9400, 0x9400),
        (regs::IRTA, 0x7000, 0x7000),
        // Read-only and reserved ones.
        (regs::IQH, 0xff0, 0),
        (regs::CAP, 1, Guest::running().read32(regs::CAP)),
        (0xff0, 5, 0),
        // Nothing to clear.
        (regs::FSTS, 0x7f, 0),
        (regs::ICS, 1, 0),
    ] {
        let paged = Paged::running();
        assert!(paged.lend());
        paged.write(offset, value);
        assert_eq!(paged.look(), Look::NotLent, "{offset:#x}");
        assert_eq!((paged.guest.read32(offset), paged.page.load(offset)), (reads, reads));
        assert_eq!((paged.slot.is_there(), paged.page.recalls(Recall::Written)), (false, 1));
        assert_eq!(paged.differences(), []);
    }
}

#[test]
fn what_is_written_before_the_tail_is_done_before_it() {
    let paged = Paged::running();
    assert!(paged.lend());
    let tail = paged.queue(7);
    paged.write(regs::IEDATA, 0x77);
    paged.write(regs::IQT, tail);
    assert_eq!(paged.guest.iommu.look_at_page(), Look::NotLent);
    assert_eq!((paged.read(regs::IEDATA), paged.read(regs::IQH)), (0x77, tail));
}

#[test]
fn a_command_in_memory_is_executed() {
    // All bits clear, too, although GCMD reads as zero.
    for command in [1 << 26, 0] {
        let paged = Paged::running();
        assert!(paged.lend());
        paged.write(regs::GCMD, command);
        assert_eq!(paged.look(), Look::NotLent);
        assert_eq!(paged.guest.read32(regs::GSTS), 1 << 30 | command);
        assert_eq!(paged.differences(), []);
    }
}

#[test]
fn a_pointer_that_is_set_again_is_seen_set_when_it_is() {
    const SRTP: u32 = 1 << 30;
    let paged = Paged::running();
    let enabled = paged.read(regs::GSTS) & !SRTP;
    assert!(paged.lend());
    paged.write(regs::RTADDR, 0x9400);
    paged.write(regs::GCMD, enabled | SRTP);
    // Not yet, so that no other command takes its place.
    assert_eq!(paged.read(regs::GSTS), enabled);
    paged.look();
    assert_eq!(paged.read(regs::GSTS), enabled | SRTP);
    let root = paged.guest.iommu.snapshot().unwrap().registers.root;
    assert_eq!(root.map(|root| root.into_bits()), Some(0x9400));
    // Its status does not end the loan.
    assert!(paged.lend());
    let tail = paged.queue(5);
    paged.write(regs::IQT, tail);
    assert_eq!((paged.look(), paged.guest.status(), paged.slot.is_there()), (Look::Tail, 5, true));
}

#[test]
fn what_memory_cannot_express_is_not_lent_or_ends_the_loan() {
    let paged = Paged::running();
    assert!(paged.lend());
    paged.guest.iommu.dma_fault(&fault(Requester::rid(RID)));
    // The guest had it until then: it has not seen the fault, so it cannot have cleared it.
    assert!(!paged.slot.is_there() && paged.page.load(regs::FSTS) == 0);
    assert_eq!((paged.guest.read32(regs::FSTS), paged.page.load(regs::FSTS)), (2, 2));
    assert_eq!(paged.page.recalls(Recall::Changed), 1);
    assert!(!paged.lend());
    paged.guest.write64(0x228, 1 << 63);
    assert!(paged.lend());
    let words = Descriptor::Wait {
        status: None,
        interrupt: true,
        fence: false,
        drain_page_requests: false,
    };
    let tail = paged.guest.queue_words(&[words.encode()]) as u32;
    paged.write(regs::IQT, tail);
    paged.look();
    assert!(!paged.slot.is_there());
    assert_eq!(paged.guest.read32(regs::ICS), 1);
    assert!(!paged.lend());
    // The interrupt is pending as well.
    paged.guest.write32(regs::ICS, 1);
    assert!(paged.lend());
    paged.guest.submit_words(&[[0xf, 0, 0, 0]]);
    assert_eq!((paged.slot.is_there(), paged.guest.read32(regs::FSTS)), (false, 0x10));
}

#[test]
fn nothing_is_lost_when_a_fault_takes_the_page() {
    let paged = Paged::running();
    assert!(paged.lend());
    let tail = paged.queue(9);
    paged.write(regs::IQT, tail);
    paged.write(regs::FEDATA, 0x77);
    // Without effect: nothing was set when it was written.
    paged.write(regs::FSTS, 0x7f);
    paged.write(0x22c, 1 << 31);
    paged.guest.iommu.dma_fault(&fault(Requester::rid(RID)));
    assert_eq!(paged.guest.read32(regs::FEDATA), 0x77);
    assert_eq!((paged.guest.status(), paged.guest.read32(regs::IQT)), (9, tail));
    assert!(paged.guest.fault_record(0).high.f());
    assert_eq!(paged.guest.read32(regs::FSTS), 2);
    assert_eq!(paged.differences(), []);
}

#[test]
fn a_page_that_is_not_mapped_stays_kept() {
    let paged = Paged::running();
    paged.slot.refuses.store(true, Ordering::Relaxed);
    assert!(!paged.lend() && !paged.page.is_lent());
    // The hypervisor may not even have taken it away: it shows what reads return, and goes on so.
    let page = |offset| paged.page.load(offset);
    assert_eq!((page(regs::GCMD), page(regs::GSTS)), (0, 1 << 31 | 1 << 30 | 1 << 26));
    paged.guest.iommu.dma_fault(&fault(Requester::rid(RID)));
    assert_eq!(page(regs::FSTS), 2);
    paged.write(0x22c, 1 << 31);
    assert_eq!(paged.differences(), []);
    paged.slot.refuses.store(false, Ordering::Relaxed);
    assert!(paged.lend());
}

/// A hypervisor that refuses the page, while a device faults.
struct Refuses {
    unit: Arc<VtdIommu>,
    fault: Mutex<Option<thread::JoinHandle<()>>>,
}

impl PageLender for Refuses {
    fn lend(&self) -> bool {
        let unit = self.unit.clone();
        // This takes the page back, for which it waits until it is lent or refused.
        let fault = thread::spawn(move || unit.dma_fault(&fault(Requester::rid(RID))));
        *self.fault.lock() = Some(fault);
        (0..100).for_each(|_| thread::yield_now());
        false
    }

    fn take_back(&self) {
        unreachable!("it was never lent");
    }
}

#[test]
fn what_changes_while_the_page_is_refused_is_shown() {
    let paged = Paged::running();
    let unit = paged.guest.iommu.clone();
    let refuses = Arc::new(Refuses { unit, fault: Mutex::default() });
    assert!(!paged.guest.iommu.lend_page(refuses.clone()));
    refuses.fault.lock().take().unwrap().join().unwrap();
    assert_eq!(paged.page.load(regs::FSTS), 2);
    assert_eq!(paged.differences(), []);
}

#[test]
fn snapshots_and_resets_take_it_back() {
    let paged = Paged::running();
    assert!(paged.lend());
    paged.write(regs::FEDATA, 0x55);
    assert_eq!(paged.guest.iommu.snapshot().unwrap().faults.event.data, 0x55);
    assert!(!paged.slot.is_there() && paged.lend());
    paged.write(regs::FEDATA, 0x56);
    paged.guest.iommu.reset().unwrap();
    assert!(!paged.slot.is_there() && !paged.lend());
    assert_eq!(paged.differences(), []);
    paged.guest.iommu.halt();
    assert!(!paged.lend());
}

#[test]
fn a_tail_from_a_ring_waits_for_the_queue() {
    let paged = Paged::running();
    let tail = paged.queue(5);
    assert_eq!(paged.guest.iommu.tail_register(), (regs::IQT, 8));
    paged.guest.iommu.write_tail(regs::IQT, &tail.to_le_bytes());
    assert_eq!((paged.guest.read32(regs::IQT), paged.guest.status()), (tail, 0));
    paged.guest.iommu.work_through_queue();
    assert_eq!(paged.guest.status(), 5);
    // Nothing else goes that way.
    paged.guest.iommu.write_tail(regs::FEDATA, &[1; 4]);
    paged.guest.iommu.write_tail(regs::IQT, &[1; 3]);
    assert_eq!(paged.guest.read32(regs::FEDATA), 0);
    // Nor does it overtake what was written to memory.
    assert!(paged.lend());
    paged.write(regs::FEDATA, 3);
    paged.guest.iommu.dma_fault(&fault(Requester::rid(RID)));
    let tail = paged.queue(6);
    paged.guest.iommu.write_tail(regs::IQT, &tail.to_le_bytes());
    assert_eq!(paged.page.load(regs::FEDATA), 3);
}
