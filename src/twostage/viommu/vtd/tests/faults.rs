// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Faults reported by the host.

use super::slices::PASID_CACHE;
use super::*;
use crate::spec::vtd::qi::PasidCacheScope;
use crate::spec::vtd::regs::Fsts;

#[test]
fn a_fault_is_recorded_and_interrupts() {
    let guest = Guest::running();
    guest.write32(regs::FEDATA, 0x41);
    guest.write32(regs::FEADDR, 0xfee0_2000);
    guest.write32(regs::FECTL, 0);
    guest.iommu.dma_fault(&DmaFault {
        reason: FaultReason::from_code(0x71),
        ..fault(Requester::rid(RID))
    });
    assert_eq!(guest.messages(), [(0xfee0_2000, 0x41)]);
    let record = guest.fault_record(0);
    assert_eq!((record.address(), record.high.sid()), (0x1234_5000, RID.raw()));
    assert_eq!((record.high.fr(), record.high.t1(), record.high.pp()), (0x71, false, false));
    let status = Fsts::from_bits(guest.read32(regs::FSTS));
    assert!(status.ppf() && !status.pfo() && status.fri() == 0);
    guest.write32(0x22c, 1 << 31);
    assert_eq!(guest.read32(regs::FSTS), 0);
}

#[test]
fn the_log_overflows_and_recovers() {
    let guest = Guest::running();
    for _ in 0..10 {
        guest.iommu.dma_fault(&fault(Requester::rid(RID)));
    }
    let status = Fsts::from_bits(guest.read32(regs::FSTS));
    assert!(status.pfo() && status.ppf());
    assert!((0..8).all(|index| guest.fault_record(index).high.f()));
    let counters = guest.iommu.counters();
    assert_eq!((counters.faults_recorded, counters.faults_lost), (8, 2));
    for index in 0..8 {
        guest.write64(0x228 + 16 * index, 1 << 63);
    }
    guest.write32(regs::FSTS, 1);
    assert_eq!(guest.read32(regs::FSTS), 0);
    guest.iommu.dma_fault(&fault(Requester::rid(RID)));
    assert!(guest.fault_record(0).high.f());
}

#[test]
fn a_blocked_pasid_is_told_by_its_tables() {
    let guest = Guest::running();
    assert_eq!(guest.reason(with_pasid(9)), Some(0x59));
    assert_eq!(guest.reason(with_pasid(64)), Some(0x51));
    assert_eq!(guest.reason(with_pasid(0xf_ffff)), Some(0x46));
    // Present by now, without an invalidation: still blocked.
    guest.write_pasid(9, 0x6000);
    assert_eq!(guest.reason(with_pasid(9)), Some(0x59));
}

#[test]
fn fpd_suppresses_the_record() {
    let guest = Guest::running();
    guest.write(PASID_TABLE + 64 * 9, &[2]);
    assert_eq!(guest.reason(with_pasid(9)), None);
    assert_eq!(guest.iommu.counters().faults_suppressed, 1);
    assert_eq!(guest.read32(regs::FSTS), 0);
}

/// With caching mode, an entry counts as it was read, with its FPD, until it is invalidated.
#[test]
fn what_blocks_a_pasid_is_told_as_it_was_read() {
    let one = PasidCacheScope::Pasid { domain: DOMAIN, pasid: pasid(9) };
    for invalidation in [PASID_CACHE, Descriptor::PasidCache(one)] {
        // A reserved type with FPD and without, FPD alone, nothing.
        for (entry, told) in
            [(7 << 6 | 3, None), (7 << 6 | 1, Some(0x5b)), (2, None), (0, Some(0x59))]
        {
            let guest = Guest::running();
            guest.write_pasid(9, 0x6000);
            guest.submit(&[invalidation]);
            guest.write(PASID_TABLE + 64 * 9, &[entry]);
            guest.submit(&[invalidation]);
            assert_eq!(guest.reason(with_pasid(9)), told, "{entry:#x}");
            // Entries that would serve it, without FPD and with it.
            for served in [1 << 6 | 1, 1 << 6 | 3] {
                guest.write(PASID_TABLE + 64 * 9, &[served]);
                assert_eq!(guest.reason(with_pasid(9)), told, "{entry:#x}");
            }
            guest.calls();
            guest.submit(&[invalidation]);
            let calls = guest.calls();
            assert!(matches!(calls[..], [Call::Configure(who, _)] if who == with_pasid(9)));
        }
    }
}

/// FPD of a directory or context entry counts for all PASIDs, also those that the unit does not
/// offer, and is no reason to remember any.
#[test]
fn only_a_pasid_with_an_entry_is_remembered() {
    const FPD: u64 = 2;
    const CONTEXT_LOW: u64 = CONTEXT + 0x100;
    let entry = |pasid: u64| PASID_TABLE + 64 * pasid;
    let context = DIRECTORY | 1 << 3 | FPD | 1;
    let of =
        |value| Descriptor::PasidCache(PasidCacheScope::Pasid { domain: DOMAIN, pasid: value });
    let default = VtdConfig::default();
    for config in [
        VtdConfig { caching_mode: false, ..default.clone() },
        VtdConfig { pasid_bits: Some(0), ..default.clone() },
        default,
    ] {
        let invalidate = |guest: &Guest, pasid_selective: bool| {
            match pasid_selective {
                true => guest.submit(&[9, 0xff, 0x100, 0xf_ffff].map(|it| of(pasid(it)))),
                false => guest.submit(&[PASID_CACHE]),
            }
            guest.iommu.snapshot().unwrap().check().unwrap();
            guest.iommu.requesters.kept(RID)
        };
        let offered = usize::from(config.pasids() > 0);
        for selective in [true, false] {
            let guest = Guest::new(config.clone());
            guest.write_tables();
            guest.write(CONTEXT_LOW, &[context]);
            guest.set_root(0x400);
            guest.enable_queue(0x800);
            guest.enable_translation();
            assert_eq!(invalidate(&guest, selective), 0, "of the context entry");
            guest.write(CONTEXT_LOW, &[context & !FPD]);
            guest.write(DIRECTORY, &[PASID_TABLE | FPD | 1]);
            assert_eq!(invalidate(&guest, selective), 0, "of the directory entry");
            guest.write(entry(9), &[FPD]);
            assert_eq!(invalidate(&guest, selective), offered, "its own");
            assert_eq!(guest.reason(with_pasid(9)).is_some(), offered == 0);
            guest.write(entry(9), &[0]);
            assert_eq!(invalidate(&guest, selective), 0, "of the directory entry, as before");
            // What was given goes with the entries that lead to it.
            for (at, gone) in [(DIRECTORY, FPD), (CONTEXT_LOW, FPD), (ROOT + 0x10, 0)] {
                guest.write_pasid(9, 0x6000);
                assert_eq!(invalidate(&guest, selective), offered);
                let word: u64 = guest.memory.read_obj(GuestAddress(at)).unwrap();
                guest.write(at, &[gone]);
                assert_eq!(invalidate(&guest, selective), 0, "{at:#x}");
                guest.write(at, &[word]);
            }
        }
    }
}

#[test]
fn a_fault_of_a_stranger_is_not_recorded() {
    let guest = Guest::running();
    assert_eq!(guest.reason(Requester::rid(UPPER_RID)), None);
}

#[test]
fn a_fault_is_recorded_while_the_registers_are_locked() {
    let guest = Guest::running();
    let registers = guest.iommu.lock();
    let iommu = guest.iommu.clone();
    let worker = std::thread::spawn(move || iommu.dma_fault(&fault(Requester::rid(RID))));
    worker.join().unwrap();
    drop(registers);
    assert!(guest.fault_record(0).high.f());
}
