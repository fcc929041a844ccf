// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The register page as memory of the guest.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::viommu::testing::{any_access, AnyAccess, Slot};
use crate::viommu::{Look, PagedRegisters, Recall, RegisterPage};

/// A guest with a page.
struct Paged {
    guest: Guest,
    page: Arc<RegisterPage>,
    slot: Arc<Slot>,
}

impl Paged {
    fn of(guest: Guest) -> Self {
        let page = RegisterPage::new().unwrap();
        guest.smmu.keep_page(page.clone());
        Self { guest, page, slot: Arc::default() }
    }

    fn running() -> Self {
        Self::of(Guest::running())
    }

    fn lend(&self) -> bool {
        self.guest.smmu.lend_page(self.slot.clone())
    }

    fn look(&self) -> Look {
        // Not each look is at the whole page.
        let mut looks = (0..2048).map(|_| self.guest.smmu.look_at_page());
        looks.find(|look| *look != Look::Nothing).unwrap_or(Look::Nothing)
    }

    fn write(&self, offset: u64, value: u32) {
        let memory = || self.page.store_as_guest(offset, value);
        self.slot.access(memory, || self.guest.write32(offset, value));
    }

    fn read(&self, offset: u64) -> u32 {
        self.slot.access(|| self.page.load(offset), || self.guest.read32(offset))
    }

    /// Where the page differs from what reads return.
    fn differences(&self) -> Vec<(u64, u32, u32)> {
        let offsets = (0..0x1000).step_by(4);
        let all = offsets.map(|at| (at, self.page.load(at), self.guest.read32(at)));
        all.filter(|(_, page, read)| page != read).collect()
    }

    /// An invalidation and a CMD_SYNC; returns the new index.
    fn queue(&self, signal: SyncSignal) -> u32 {
        let commands = [tlbi(1), Command::Sync { signal }];
        self.guest.queue_words(&commands.map(|command| command.encode()))
    }
}

#[test]
fn a_kept_page_is_what_reads_return() {
    let paged = Paged::of(Guest::new(&SmmuConfig::default()));
    assert_eq!(paged.differences(), []);
    paged.guest.start();
    assert_eq!(paged.differences(), []);
    paged.guest.smmu.event(translation_fault(STREAM).to_words());
    paged.guest.submit_words(&[[0xff, 0]]);
    assert_eq!(paged.page.load(regs::GERROR), 1);
    assert_eq!(paged.differences(), []);
    paged.guest.smmu.reset().unwrap();
    assert_eq!(paged.differences(), []);
}

fn access() -> impl Strategy<Value = AnyAccess> {
    any_access(prop_oneof![0..0x100u64, 0x1_00a8..0x1_00b0u64, 0..regs::SIZE])
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
                paged.guest.smmu.event(translation_fault(STREAM).to_words());
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
            // Without an error to acknowledge, it must not be written.
            if access.offset & !7 == regs::GERROR {
                continue;
            }
            plain.access(&access);
            let whole = access.write && access.offset % 4 == 0 && access.size == 4;
            if lend && whole && access.offset < 0x1000 && paged.lend() {
                paged.write(access.offset, access.value as u32);
                paged.look();
                paged.guest.smmu.take_page_back();
            } else {
                paged.guest.access(&access);
            }
            if faulty {
                for guest in [&paged.guest, &plain] {
                    guest.smmu.event(translation_fault(STREAM).to_words());
                }
            }
            prop_assert_eq!(paged.differences(), []);
            let states = [&paged.guest, &plain].map(|guest| guest.smmu.snapshot().unwrap());
            prop_assert_eq!(&states[0], &states[1]);
        }
    }
}

#[test]
fn an_index_in_memory_is_served() {
    let paged = Paged::running();
    assert!(paged.lend() && paged.slot.is_there());
    assert_eq!(paged.look(), Look::Nothing);
    for _ in 0..200 {
        let prod = paged.queue(SyncSignal::None);
        paged.write(regs::CMDQ_PROD, prod);
        assert_eq!(paged.guest.smmu.look_at_page(), Look::Tail);
        assert_eq!(paged.page.load(regs::CMDQ_CONS), prod);
    }
    // Events are in the other page.
    paged.guest.smmu.event(translation_fault(STREAM).to_words());
    assert!(paged.slot.is_there() && paged.look() == Look::Nothing);
    paged.guest.smmu.take_page_back();
    assert_eq!((paged.differences(), paged.slot.is_there()), (vec![], false));
    assert_eq!((paged.page.lends(), paged.page.recalls(Recall::Asked)), (1, 1));
    let prod = paged.queue(SyncSignal::None);
    assert_eq!(paged.guest.smmu.tail_register(), (regs::CMDQ_PROD, 4));
    paged.guest.smmu.write_tail(regs::CMDQ_PROD, &prod.to_le_bytes());
    assert_ne!(paged.guest.read32(regs::CMDQ_CONS), prod);
    paged.guest.smmu.work_through_queue();
    assert_eq!(paged.guest.read32(regs::CMDQ_CONS), prod);
    paged.guest.smmu.write_tail(regs::CR0, &[0; 4]);
    assert_eq!(paged.guest.read32(regs::CR0), 0b1101);
}

#[test]
fn any_other_write_ends_the_loan_and_takes_effect() {
    for (offset, value, reads) in [
        (regs::CR0, 0b1100, 0b1100),
        (regs::CR0, 0, 0),
        (regs::IRQ_CTRL, 0, 0),
        (regs::STATUSR + 4, 1 << 31 | 1 << 20, 1 << 20),
        // Fixed while in use, read-only, reserved, nothing to acknowledge.
        (regs::STRTAB_BASE_CFG, 9, 4),
        (regs::CMDQ_CONS, 7, 0),
        (0xff0, 5, 0),
        (regs::GERRORN, 1, 0),
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
fn an_error_takes_the_page_before_it_shows() {
    let paged = Paged::running();
    assert!(paged.lend());
    let prod = paged.guest.queue_words(&[[0xff, 0]]);
    paged.write(regs::CMDQ_PROD, prod);
    paged.look();
    assert!(!paged.slot.is_there());
    assert_eq!((paged.guest.errors(), paged.guest.consumed().1), (1, Some(CommandError::Illegal)));
    assert!(!paged.lend());
    paged.guest.write(COMMANDS, &SYNC.encode());
    paged.guest.acknowledge_errors();
    assert!(paged.lend());
    paged.guest.smmu.halt();
    paged.guest.smmu.take_page_back();
    assert!(!paged.lend());
}

/// Two vCPUs send commands and a device faults, while a side core lends the page and takes it back:
/// no index is lost.
#[test]
fn no_index_is_lost_in_races() {
    let seconds = std::env::var("TWOSTAGE_STRESS_SECONDS").ok();
    let seconds = seconds.and_then(|text| text.parse().ok()).unwrap_or(2);
    let end = Instant::now() + Duration::from_secs(seconds);
    let (paged, running) = (Paged::running(), AtomicBool::new(true));
    let (paged, running, lock) = (&paged, &running, &crate::sync::Mutex::new(()));
    let vcpu = move |stray: bool| {
        let mut rounds = 0u64;
        while running.load(Ordering::Relaxed) || rounds < 100 {
            rounds += 1;
            let queue = lock.lock();
            let prod = paged.read(regs::CMDQ_PROD);
            paged.guest.write(COMMANDS + 16 * u64::from(prod & 0xff), &SYNC.encode());
            let prod = (prod + 1) & 0x1ff;
            paged.write(regs::CMDQ_PROD, prod);
            let start = Instant::now();
            while paged.read(regs::CMDQ_CONS) != prod {
                assert!(start.elapsed() < crate::patience::PATIENCE, "an index is lost");
                thread::yield_now();
            }
            drop(queue);
            if stray && rounds.is_multiple_of(64) {
                paged.write(regs::IRQ_CTRL, 0b100 | u32::from(rounds.is_multiple_of(128)));
                assert_eq!(paged.read(regs::IRQ_CTRL) >> 2, 1);
            }
        }
        rounds
    };
    thread::scope(|scope| {
        let vcpus = [false, true].map(|stray| scope.spawn(move || vcpu(stray)));
        let mut looks = 0u64;
        while Instant::now() < end || paged.slot.lends.load(Ordering::Relaxed) <= 10 {
            if paged.page.is_lent() || !paged.lend() {
                paged.guest.smmu.look_at_page();
                looks += 1;
            }
            if looks % 5000 == 4999 {
                paged.guest.smmu.event(translation_fault(STREAM).to_words());
                paged.guest.smmu.take_page_back();
            }
            thread::yield_now();
        }
        running.store(false, Ordering::Relaxed);
        for vcpu in vcpus {
            while !vcpu.is_finished() {
                paged.guest.smmu.look_at_page();
                thread::yield_now();
            }
            assert!(vcpu.join().unwrap() >= 100);
        }
    });
    paged.guest.smmu.take_page_back();
    assert!(paged.slot.lends.load(Ordering::Relaxed) > 10);
    assert_eq!(paged.differences(), []);
}
