// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A page that is lent and taken back while a guest uses it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use super::page::Paged;
use super::*;
use crate::viommu::{Look, PagedRegisters};

/// Two vCPUs write registers at random, each its own, and invalidate, while a side core lends the
/// page and takes it back, and a device faults. Each vCPU reads what it wrote last, as in a naive
/// model of registers, and no tail is lost.
#[test]
fn no_write_is_lost_in_races() {
    let seconds = std::env::var("TWOSTAGE_STRESS_SECONDS").ok();
    let seconds = seconds.and_then(|text| text.parse().ok()).unwrap_or(2);
    let end = Instant::now() + Duration::from_secs(seconds);
    let paged = Paged::running();
    let (running, tail_lock) = (AtomicBool::new(true), Mutex::new(()));
    let shared = (&paged, &running, &tail_lock);
    let vcpu = |own: [(u64, u32); 3], seed: u64| {
        let (paged, running, tail_lock) = shared;
        let (mut random, mut rounds, mut naive) = (seed, 0u64, [None; 3]);
        while running.load(Ordering::Relaxed) || rounds < 100 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            rounds += 1;
            let at = (random % 3) as usize;
            let (offset, mask) = own[at];
            match random >> 60 {
                0..2 => {
                    let value = (random >> 8) as u32;
                    paged.write(offset, value);
                    naive[at] = Some(value & mask);
                }
                2..4 => {
                    // Memory has reserved bits until somebody looks.
                    let (read, expected) = (paged.read(offset) & mask, naive[at]);
                    assert!(expected.is_none_or(|it| it == read), "{offset:#x} {read:#x}");
                }
                4 => paged.write(regs::FSTS, 0x7f),
                _ => {
                    let _queue = tail_lock.lock();
                    let data = (random >> 16) as u32 | 1;
                    let words = [wait(data).encode()];
                    let tail = paged.read(regs::IQT);
                    assert_eq!(u64::from(tail) & 0x1f, 0);
                    paged.guest.write(QUEUE + u64::from(tail), &words[0]);
                    paged.write(regs::IQT, (tail + 32) % 0x1000);
                    let start = Instant::now();
                    while paged.guest.status() != data {
                        assert!(start.elapsed() < crate::patience::PATIENCE, "a tail is lost");
                        thread::yield_now();
                    }
                }
            }
        }
        (rounds, naive.map(Option::unwrap_or_default), own)
    };
    thread::scope(|scope| {
        let one = [(regs::FEDATA, u32::MAX), (regs::FEADDR, !3), (regs::IEADDR + 4, u32::MAX)];
        let other = [(regs::IEDATA, u32::MAX), (regs::IRTA, !0x7f0), (regs::FEADDR + 4, u32::MAX)];
        let vcpus = [(one, 0x9e37_79b9), (other, 0x1234_5678_9abc)]
            .map(|(own, seed)| scope.spawn(move || vcpu(own, seed)));
        let device = scope.spawn(|| {
            while running.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(3));
                paged.guest.iommu.dma_fault(&fault(Requester::rid(RID)));
                thread::sleep(Duration::from_millis(1));
                let records = (0..8).map(|record| 0x22c + 16 * record);
                records.for_each(|record| paged.write(record, 1 << 31));
                paged.write(regs::FSTS, 0x7f);
            }
        });
        let mut looks = 0u64;
        while Instant::now() < end || paged.slot.lends.load(Ordering::Relaxed) <= 10 {
            if paged.page.is_lent() || !paged.lend() {
                looks += u64::from(paged.guest.iommu.look_at_page() != Look::NotLent);
            }
            if looks % 5000 == 4999 {
                paged.guest.iommu.take_page_back();
            }
            thread::yield_now();
        }
        running.store(false, Ordering::Relaxed);
        paged.guest.iommu.take_page_back();
        for vcpu in vcpus {
            // The vCPU may wait for a tail until the page is looked at.
            while !vcpu.is_finished() {
                paged.guest.iommu.look_at_page();
                thread::yield_now();
            }
            let (rounds, naive, own) = vcpu.join().unwrap();
            assert!(rounds >= 100, "{rounds} rounds");
            for ((offset, mask), value) in own.into_iter().zip(naive) {
                assert_eq!(paged.guest.read32(offset) & mask, value, "{offset:#x}");
            }
        }
        device.join().unwrap();
    });
    assert!(paged.slot.lends.load(Ordering::Relaxed) > 10);
    assert_eq!(paged.differences(), []);
}
