// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupt remapping as a guest sets it up and devices use it.

use std::sync::atomic::{AtomicBool, AtomicU32};

use super::*;
use crate::patience::wait_until;
use crate::spec::vtd::interrupt::RemappableAddress;
use crate::spec::vtd::qi::InterruptEntryScope;
use crate::spec::vtd::regs::{Fsts, IqErrorInfo, Iqercd};
use crate::viommu::{InterruptListener, InterruptRemapper};

const TABLE: u64 = 0x9000;
/// IRTA.S of a table of 256 entries.
pub(super) const SIZE: u64 = 7;
const EXTENDED: u64 = 1 << 11;

const ALL: Descriptor = Descriptor::InterruptEntryCache(InterruptEntryScope::Global);

fn entries(index: u16, mask: u8) -> Descriptor {
    Descriptor::InterruptEntryCache(InterruptEntryScope::Index { index, mask })
}

/// An entry, for any source, that sends `vector` to APIC 2.
pub(super) fn irte(vector: u64) -> [u64; 2] {
    [0x200 << 32 | vector << 16 | 1, 0]
}

fn of_handle(handle: u16) -> MsiMessage {
    let address = RemappableAddress::new().with_handle(handle).into_bits();
    MsiMessage { address: address.into(), data: 0 }
}

const COMPATIBILITY: MsiMessage = MsiMessage { address: 0xfee0_3000, data: 0x33 };

impl Guest {
    pub(super) fn with_remapping(config: VtdConfig) -> Self {
        Self::new(VtdConfig { interrupt_remapping: true, ..config })
    }

    /// A remapping unit without caching mode, with an empty table.
    fn remapping() -> Self {
        let guest = Self::with_remapping(VtdConfig { caching_mode: false, ..Default::default() });
        guest.enable_queue(0x800);
        guest.set_interrupt_table(SIZE);
        guest.enable_remapping();
        guest
    }

    pub(super) fn set_interrupt_table(&self, flags: u64) {
        self.write64(regs::IRTA, TABLE | flags);
        self.command(|enabled| enabled | 1 << 24);
    }

    pub(super) fn enable_remapping(&self) {
        self.command(|enabled| enabled | 1 << 25);
    }

    pub(super) fn write_irte(&self, index: u64, words: [u64; 2]) {
        self.write(TABLE + 16 * index, &words);
    }

    /// The remapped message of [`RID`].
    fn interrupt(&self, message: MsiMessage) -> Option<(u64, u32)> {
        let sink = FakeSink::default();
        let sent = self.iommu.send_remapped(RID, message, &sink);
        let messages = sink.0.into_inner();
        assert_eq!(messages.len(), usize::from(sent));
        messages.first().copied()
    }

    /// The remapped vector of `handle`.
    pub(super) fn vector(&self, handle: u16) -> Option<u32> {
        self.interrupt(of_handle(handle)).map(|(_, data)| data & 0xff)
    }

    /// The fault record in use, which is cleared: reason, source and index.
    fn interrupt_fault(&self) -> Option<(u8, u16, u16)> {
        let status = Fsts::from_bits(self.read32(regs::FSTS));
        let number = status.ppf().then(|| u64::from(status.fri()))?;
        let record = self.fault_record(number);
        self.write64(0x228 + 16 * number, 1 << 63);
        assert!(record.high.f() && !record.high.t1() && !record.high.pp());
        Some((record.high.fr(), record.high.sid(), record.low.interrupt_index()))
    }
}

#[test]
fn what_is_not_offered_has_no_effect() {
    let guest = Guest::new(VtdConfig::default());
    guest.enable_queue(0x800);
    guest.set_interrupt_table(SIZE);
    guest.enable_remapping();
    guest.command(|enabled| enabled | 1 << 23);
    assert_eq!(guest.read32(regs::GSTS), 1 << 26);
    assert_eq!(guest.interrupt(of_handle(0)), Some((0xfee0_0010, 0)));
    guest.submit(&[ALL]);
    assert_eq!(
        Iqercd::from_bits(guest.read64(regs::IQERCD)).iqei(),
        IqErrorInfo::InvalidType.code()
    );
}

#[test]
fn commands_are_told_by_their_status() {
    let guest = Guest::with_remapping(VtdConfig::default());
    assert_eq!(guest.interrupt(COMPATIBILITY), Some((0xfee0_3000, 0x33)));
    guest.set_interrupt_table(SIZE);
    assert_eq!(guest.read32(regs::GSTS), 1 << 24);
    assert_eq!(guest.interrupt(COMPATIBILITY), Some((0xfee0_3000, 0x33)));
    guest.enable_remapping();
    assert_eq!(guest.read32(regs::GSTS), 1 << 25 | 1 << 24);
    assert_eq!(guest.interrupt(COMPATIBILITY), None);
    guest.command(|enabled| enabled | 1 << 23);
    assert_eq!(guest.read32(regs::GSTS), 0b111 << 23);
    assert_eq!(guest.interrupt(COMPATIBILITY), Some((0xfee0_3000, 0x33)));
    guest.command(|enabled| enabled & !(1 << 25));
    assert_eq!(guest.interrupt(of_handle(0)), Some((0xfee0_0010, 0)));
    let counters = guest.iommu.counters();
    assert_eq!((counters.interrupts_remapped, counters.interrupts_blocked), (1, 1));
}

#[test]
fn a_table_pointer_counts_from_its_command_on() {
    let guest = Guest::remapping();
    guest.write_irte(1, irte(0x41));
    guest.write(TABLE + 0x1000 + 16, &irte(0x42));
    assert_eq!(guest.vector(1), Some(0x41));
    guest.write64(regs::IRTA, (TABLE + 0x1000) | SIZE);
    assert_eq!(guest.vector(1), Some(0x41));
    // The command invalidates the cache.
    guest.command(|enabled| enabled | 1 << 24);
    assert_eq!(guest.vector(1), Some(0x42));
}

#[test]
fn extended_mode_has_wide_destinations_and_blocks_compatibility_format() {
    let guest = Guest::with_remapping(VtdConfig::default());
    guest.set_interrupt_table(SIZE | EXTENDED);
    guest.enable_remapping();
    guest.command(|enabled| enabled | 1 << 23);
    guest.write_irte(0, [0x0001_0203 << 32 | 0x50 << 16 | 1, 0]);
    assert_eq!(guest.interrupt(of_handle(0)), Some((0x0001_0200_fee0_3000, 0x4050)));
    assert_eq!(guest.interrupt(COMPATIBILITY), None);
    assert_eq!(guest.interrupt_fault(), Some((0x25, RID.raw(), 0)));
}

#[test]
fn each_fault_is_in_the_log() {
    let guest = Guest::remapping();
    guest.write_irte(2, [1 << 12 | 1, 0]);
    guest.write_irte(3, [1, 1 << 18 | 0x4321]);
    let reserved = RemappableAddress::new().with_shv(true).into_bits();
    for (message, reason, index) in [
        (MsiMessage { address: reserved.into(), data: 1 << 16 }, 0x20, 0),
        (of_handle(0x8000), 0x21, 0x8000),
        (of_handle(1), 0x22, 1),
        (of_handle(2), 0x24, 2),
        (COMPATIBILITY, 0x25, 0),
        (of_handle(3), 0x26, 3),
    ] {
        assert_eq!(guest.interrupt(message), None);
        assert_eq!(guest.interrupt_fault(), Some((reason, RID.raw(), index)));
    }
    guest.write64(regs::IRTA, MEMORY_SIZE | SIZE);
    guest.command(|enabled| enabled | 1 << 24);
    assert_eq!(guest.interrupt(of_handle(5)), None);
    assert_eq!(guest.interrupt_fault(), Some((0x23, RID.raw(), 5)));
    assert_eq!(guest.iommu.counters().interrupts_blocked, 7);
}

#[test]
fn a_fault_interrupts_unremapped_and_fpd_keeps_it_quiet() {
    let guest = Guest::remapping();
    guest.write32(regs::FEDATA, 0x61);
    guest.write32(regs::FEADDR, 0xfee0_4000);
    guest.write32(regs::FECTL, 0);
    guest.write_irte(4, [0b10, 0]);
    assert_eq!(guest.vector(4), None);
    assert_eq!((guest.interrupt_fault(), guest.messages()), (None, vec![]));
    assert_eq!(guest.vector(5), None);
    assert_eq!(guest.messages(), [(0xfee0_4000, 0x61)]);
    assert_eq!(guest.interrupt_fault(), Some((0x22, RID.raw(), 5)));
    let counters = guest.iommu.counters();
    assert_eq!((counters.faults_recorded, counters.faults_suppressed), (1, 1));
}

#[test]
fn a_write_past_the_interrupt_range_is_no_interrupt() {
    let guest = Guest::remapping();
    let message = MsiMessage { address: 0x1_fee0_0010, data: 0 };
    assert_eq!((guest.interrupt(message), guest.interrupt_fault()), (None, None));
    assert_eq!(guest.iommu.counters().guest_errors, 1);
}

#[test]
fn an_entry_is_stale_until_its_invalidation() {
    let guest = Guest::remapping();
    let change = |vector| (0..8).for_each(|index| guest.write_irte(index, irte(vector)));
    let vectors = || (0..8).map(|index| guest.vector(index).unwrap()).collect::<Vec<_>>();
    change(0x41);
    assert_eq!(vectors(), [0x41; 8]);
    change(0x42);
    assert_eq!(vectors(), [0x41; 8]);
    guest.submit(&[entries(3, 0)]);
    assert_eq!(vectors(), [0x41, 0x41, 0x41, 0x42, 0x41, 0x41, 0x41, 0x41]);
    // The low bits of the index are ignored.
    guest.submit(&[entries(5, 1)]);
    assert_eq!(vectors(), [0x41, 0x41, 0x41, 0x42, 0x42, 0x42, 0x41, 0x41]);
    guest.submit(&[entries(0, 15)]);
    assert_eq!(vectors(), [0x42; 8]);
    change(0x43);
    assert_eq!(vectors(), [0x42; 8]);
    guest.submit(&[ALL, wait(1)]);
    assert_eq!((vectors(), guest.status()), (vec![0x43; 8], 1));
    // So is a removed entry.
    (0..8).for_each(|index| guest.write_irte(index, [0, 0]));
    assert_eq!(vectors(), [0x43; 8]);
    guest.submit(&[entries(0, 3)]);
    assert_eq!(guest.vector(0), None);
    // It was not cached: that it is present again needs no invalidation.
    change(0x44);
    assert_eq!(guest.vector(0), Some(0x44));
}

#[test]
fn caching_mode_keeps_entries_that_are_not_present() {
    let guest = Guest::with_remapping(VtdConfig::default());
    guest.enable_queue(0x800);
    guest.set_interrupt_table(SIZE);
    guest.enable_remapping();
    assert_eq!(guest.vector(1), None);
    guest.write_irte(1, irte(0x41));
    assert_eq!(guest.vector(1), None);
    guest.submit(&[entries(1, 0)]);
    assert_eq!(guest.vector(1), Some(0x41));
}

#[test]
fn a_mask_beyond_what_is_offered_stops_the_queue() {
    let guest = Guest::remapping();
    guest.submit(&[entries(0, 16)]);
    let code = Iqercd::from_bits(guest.read64(regs::IQERCD)).iqei();
    assert_eq!(code, IqErrorInfo::ReservedField.code());
}

/// Records the translation of a message, and the status word, at each notification of a change.
struct Listener {
    guest: Guest,
    told: Mutex<Vec<(Option<u32>, u32)>>,
}

impl InterruptListener for Listener {
    fn interrupts_changed(&self) {
        let message = self.guest.iommu.translate(RID, of_handle(1));
        let told = (message.map(|message| message.data & 0xff), self.guest.status());
        self.told.lock().push(told);
    }
}

#[test]
fn a_listener_knows_before_the_guest_does() {
    let guest = Guest::with_remapping(VtdConfig { caching_mode: false, ..Default::default() });
    guest.enable_queue(0x800);
    let listener = Arc::new(Listener { guest, told: Mutex::default() });
    let guest = &listener.guest;
    let told = || std::mem::take(&mut *listener.told.lock());
    let weak = Arc::downgrade(&listener);
    guest.iommu.add_interrupt_listener(weak);
    // It may have looked up something before.
    assert_eq!(told(), [(Some(0), 0)]);
    guest.set_interrupt_table(SIZE);
    assert_eq!(told(), [(Some(0), 0)]);
    guest.enable_remapping();
    assert_eq!(told(), [(None, 0)]);
    guest.write_irte(1, irte(0x41));
    guest.submit(&[ALL, wait(7)]);
    assert_eq!((told(), guest.status()), (vec![(Some(0x41), 0)], 7));
    guest.submit(&[entries(9, 0), wait(8)]);
    assert_eq!((told(), guest.status()), (vec![(Some(0x41), 7)], 8));
    guest.command(|enabled| enabled | 1 << 23);
    guest.command(|enabled| enabled & !(1 << 25));
    assert_eq!(told(), [(Some(0x41), 8), (Some(0), 8)]);
    // A command that changes nothing is not a change; a translation that blocks is not a fault.
    guest.command(|enabled| enabled);
    assert_eq!((told(), guest.interrupt_fault()), (vec![], None));
}

#[test]
fn nobody_keeps_what_changes_without_a_notification() {
    let guest = Guest::remapping();
    guest.write_irte(1, irte(0x41));
    let kept = || guest.iommu.translate(RID, of_handle(1)).map(|message| message.data & 0xff);
    assert_eq!((kept(), guest.vector(1)), (None, Some(0x41)));
    let told = Mutex::default();
    let listener = Arc::new(Listener { guest: Guest::remapping(), told });
    let weak = Arc::downgrade(&listener);
    guest.iommu.add_interrupt_listener(weak);
    assert_eq!(kept(), Some(0x41));
    drop(listener);
    assert_eq!((kept(), guest.vector(1)), (None, Some(0x41)));
}

#[test]
fn what_is_cached_stays_cached_in_a_restored_unit() {
    let guest = Guest::remapping();
    guest.write_irte(1, irte(0x41));
    guest.write_irte(2, irte(0x51));
    assert_eq!((guest.vector(1), guest.vector(2)), (Some(0x41), Some(0x51)));
    // Not announced.
    guest.write_irte(1, irte(0x42));
    let state = guest.iommu.snapshot().unwrap();
    let indices: Vec<_> = state.interrupt_entries.iter().map(|entry| entry.index).collect();
    assert_eq!(indices, [1, 2]);
    let restored = guest.restored(&state).unwrap();
    assert_eq!((restored.vector(1), restored.vector(2)), (Some(0x41), Some(0x51)));
    restored.submit(&[entries(1, 0), wait(1)]);
    assert_eq!((restored.vector(1), restored.status()), (Some(0x42), 1));
}

/// Receives vectors, none of which may be below the floor.
#[derive(Default)]
struct Rising {
    floor: AtomicU32,
    seen: AtomicU32,
}

impl InterruptSink for Rising {
    fn send_msi(&self, _: u64, data: u32) {
        let vector = data & 0xff;
        assert!(vector >= self.floor.load(Ordering::SeqCst), "{vector:#x} is stale");
        self.seen.fetch_max(vector, Ordering::SeqCst);
    }
}

#[test]
fn no_interrupt_of_before_comes_after_the_invalidation() {
    let guest = Guest::remapping();
    let sink = Rising::default();
    let over = AtomicBool::new(false);
    guest.write_irte(1, irte(0x20));
    std::thread::scope(|scope| {
        let senders = [(); 2].map(|()| {
            scope.spawn(|| {
                while !over.load(Ordering::SeqCst) {
                    assert!(guest.iommu.send_remapped(RID, of_handle(1), &sink));
                }
            })
        });
        for vector in 0x21..0xf0 {
            // Only the vector changes: a concurrent reader sees either entry.
            guest.write_irte(1, irte(vector));
            guest.submit(&[entries(1, 0), wait(vector as u32)]);
            assert_eq!(guest.status(), vector as u32);
            sink.floor.store(vector as u32, Ordering::SeqCst);
            // One by the new entry comes first, so that a late one by the old would be noticed.
            wait_until("an interrupt by the new entry", || {
                assert!(senders.iter().all(|sender| !sender.is_finished()));
                sink.seen.load(Ordering::SeqCst) >= vector as u32
            });
        }
        over.store(true, Ordering::SeqCst);
    });
}
