// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Without caching mode: tables that start to serve a requester without an invalidation, and tables
//! that another processor writes while they are read.

use std::collections::BTreeMap;

use super::slices::{PASID_CACHE, RTPS, TES};
use super::*;
use crate::spec::vtd::qi::PasidCacheScope;
use crate::viommu::BadAddress;

/// [`Guest::running`] without caching mode, with nothing behind the root table.
fn empty(config: VtdConfig) -> Guest {
    let guest = Guest::new(VtdConfig { caching_mode: false, ..config });
    guest.set_root(0x400);
    guest.enable_queue(0x800);
    guest.enable_translation();
    guest.calls();
    guest
}

#[test]
fn a_requester_is_served_once_its_tables_do() {
    let guest = empty(VtdConfig::default());
    let own = Requester::rid(RID);
    assert!(!guest.iommu.served_late(own));
    // Entry by entry, each with its reason.
    guest.write(ROOT + 0x10, &[CONTEXT | 1, 0]);
    assert!(!guest.iommu.served_late(own));
    assert_eq!(guest.reason(own), Some(0x41));
    guest.write(CONTEXT + 0x100, &[DIRECTORY | 1 << 3 | 1, 0, 0, 0]);
    assert!(!guest.iommu.served_late(own));
    assert_eq!(guest.reason(own), Some(0x51));
    guest.write(DIRECTORY, &[PASID_TABLE | 1]);
    assert!(!guest.iommu.served_late(own));
    assert_eq!(guest.reason(own), Some(0x59));
    assert_eq!(guest.calls(), [], "who is blocked costs the host nothing");
    guest.write_pasid(0, FIRST_STAGE);
    assert!(guest.iommu.served_late(own));
    assert_eq!(guest.calls(), [Call::Configure(own, first_stage(FIRST_STAGE))]);
    assert!(guest.iommu.served_late(own), "another thread found it");
    assert_eq!((guest.calls(), guest.iommu.counters().found_served), (vec![], 1));
}

#[test]
fn a_pasid_is_served_apart_from_its_function() {
    let guest = empty(VtdConfig::default());
    guest.write_tables();
    guest.write_pasid(9, 0x6000);
    assert!(guest.iommu.served_late(with_pasid(9)));
    assert!(!guest.iommu.served_late(with_pasid(8)));
    assert_eq!(guest.calls(), [Call::Configure(with_pasid(9), first_stage(0x6000))]);
    // What was found must be invalidated by the guest like anything else.
    guest.write(PASID_TABLE + 64 * 9, &[0]);
    let one = PasidCacheScope::Pasid { domain: DOMAIN, pasid: pasid(9) };
    guest.submit(&[Descriptor::PasidCache(one)]);
    let calls = guest.calls();
    assert!(calls.contains(&Call::Configure(with_pasid(9), blocked(0x59))), "{calls:?}");
}

#[test]
fn entries_that_are_wrong_are_not_kept_either() {
    let guest = empty(VtdConfig::default());
    guest.write_tables();
    // A reserved bit.
    guest.write(PASID_TABLE, &[1 << 6 | 1 | 1 << 5]);
    guest.submit(&[PASID_CACHE]);
    assert!(!guest.iommu.served_late(Requester::rid(RID)));
    guest.write_pasid(0, FIRST_STAGE);
    assert!(guest.iommu.served_late(Requester::rid(RID)));
}

#[test]
fn a_legacy_requester_is_served_once_its_entry_is_there() {
    let config = VtdConfig { second_stage: true, ..Default::default() };
    let guest = Guest::new(VtdConfig { caching_mode: false, ..config });
    guest.set_root(0);
    guest.enable_translation();
    let own = Requester::rid(RID);
    assert_eq!((guest.iommu.served_late(own), guest.reason(own)), (false, Some(0x01)));
    guest.write(ROOT + 0x10, &[CONTEXT | 1, 0]);
    assert_eq!((guest.iommu.served_late(own), guest.reason(own)), (false, Some(0x02)));
    guest.write(CONTEXT + 0x80, &[FIRST_STAGE | 1, u64::from(DOMAIN) << 8 | 2]);
    assert!(guest.iommu.served_late(own));
}

#[test]
fn what_the_tables_ask_of_faults_now_holds() {
    let guest = empty(VtdConfig::default());
    guest.write_tables();
    guest.write(PASID_TABLE, &[2]);
    // FPD, in an entry that was not read when the requester was blocked.
    assert_eq!(guest.reason(Requester::rid(RID)), None);
    assert_eq!(guest.iommu.counters().faults_suppressed, 1);
}

#[test]
fn in_caching_mode_who_is_not_told_does_not_look() {
    let guest = Guest::new(VtdConfig::default());
    guest.set_root(0x400);
    guest.enable_translation();
    guest.write_tables();
    assert!(!guest.iommu.served_late(Requester::rid(RID)));
    assert_eq!(guest.reason(Requester::rid(RID)), Some(0x39));
}

#[test]
fn nobody_is_served_while_translation_is_off_or_the_unit_halted() {
    let guest = empty(VtdConfig::default());
    guest.write_tables();
    guest.write_pasid(9, 0x6000);
    assert!(!guest.iommu.served_late(Requester::rid(UPPER_RID)), "a stranger");
    guest.disable_translation();
    assert!(!guest.iommu.served_late(with_pasid(9)));
    let guest = empty(VtdConfig::default());
    guest.write_tables();
    guest.iommu.halt();
    assert!(!guest.iommu.served_late(Requester::rid(RID)));
}

#[test]
fn what_the_host_refuses_is_tried_again_at_the_next_request() {
    let guest = empty(VtdConfig::default());
    guest.write_tables();
    guest.refuse(true);
    let own = Requester::rid(RID);
    assert!(!guest.iommu.served_late(own));
    assert_eq!(guest.reason(own), Some(0x5b), "programmed wrongly, as the host sees it");
    guest.refuse(false);
    assert!(guest.iommu.served_late(own));
    assert_eq!(guest.iommu.counters().found_served, 1);
}

/// Whether a function that the tables have started to serve is served, if `meanwhile` happens while
/// the caller most likely waits for the registers.
fn served_after(guest: &Guest, meanwhile: impl FnOnce()) -> bool {
    let registers = guest.iommu.lock();
    let iommu = guest.iommu.clone();
    let worker = std::thread::spawn(move || iommu.served_late(Requester::rid(RID)));
    std::thread::sleep(std::time::Duration::from_millis(20));
    meanwhile();
    drop(registers);
    worker.join().unwrap()
}

#[test]
fn tables_are_read_by_who_has_the_registers() {
    let guest = empty(VtdConfig::default());
    guest.write_tables();
    // Whether it is waiting already or not: what counts is the tables when it has the registers.
    assert!(!served_after(&guest, || guest.write(PASID_TABLE, &[0])));
    assert_eq!(
        guest
            .calls()
            .into_iter()
            .find(|call| matches!(call, Call::Configure(_, Policy::Stage1(_)))),
        None
    );
}

#[test]
fn nobody_serves_a_function_that_went_meanwhile() {
    let guest = empty(VtdConfig::default());
    guest.write_tables();
    // Like `remove_device`, with the registers locked.
    assert!(!served_after(&guest, || {
        guest.iommu.requesters.remove(RID).unwrap();
    }));
    assert_eq!(guest.calls(), []);
}

/// Of a function with thousands of PASIDs, 63 and 127 start to be served when a command that makes
/// `change` has processed the first of them, and not the other. Returns what the host has.
fn amid_a_command(change: impl FnOnce(u32) -> u32) -> (Guest, BTreeMap<Requester, Policy>) {
    let config = VtdConfig { caching_mode: false, pasid_bits: Some(13), ..Default::default() };
    let guest = Guest::with_directory_of(config);
    (0..63).for_each(|pasid| guest.write_pasid(pasid, 0x6000));
    guest.submit(&[PASID_CACHE]);
    let mut has = BTreeMap::new();
    guest.host_has(&mut has);
    (0..63).for_each(|pasid| guest.write_pasid(pasid, 0x7000));
    assert_eq!(guest.begin_command(change), Slice::More);
    while has.get(&with_pasid(70)) == Some(&first_stage(0x6000)) {
        assert_eq!(guest.slice(), Slice::More);
        guest.host_has(&mut has);
    }
    assert_eq!(has.get(&with_pasid(126)), Some(&first_stage(0x6000)), "not passed yet");
    guest.write_pasid(63, 0x7000);
    (guest, has)
}

#[test]
fn who_looks_does_not_do_the_work_of_a_command() {
    let (guest, mut has) = amid_a_command(|enabled| enabled | RTPS);
    assert!(guest.iommu.served_late(with_pasid(63)) && guest.iommu.served_late(with_pasid(127)));
    guest.host_has(&mut has);
    assert_eq!(has.get(&with_pasid(126)), Some(&first_stage(0x6000)), "not passed yet");
    assert_eq!((guest.status_bits(RTPS), guest.slice()), (0, Slice::More));
    while guest.slice() == Slice::More {}
    guest.host_has(&mut has);
    assert_eq!(guest.status_bits(RTPS), RTPS);
    assert!(has == guest.tables_say());
}

#[test]
fn nobody_is_served_whom_the_disabling_of_translation_has_passed() {
    let (guest, mut has) = amid_a_command(|enabled| enabled & !TES);
    assert!(!guest.iommu.served_late(with_pasid(63)), "it would stay");
    assert!(guest.iommu.served_late(with_pasid(127)), "not passed yet");
    assert!(guest.iommu.served_late(Requester::rid(RID)), "it passes by now");
    guest.host_has(&mut has);
    assert_eq!(has.get(&with_pasid(127)), Some(&first_stage(0x7000)));
    assert_eq!((guest.status_bits(TES), guest.slice()), (TES, Slice::More));
    while guest.slice() == Slice::More {}
    guest.host_has(&mut has);
    assert_eq!(guest.status_bits(TES), 0);
    let own = BTreeMap::from([(Requester::rid(RID), Policy::Bypass)]);
    assert!(has == own, "{} are served", has.len());
}

/// Guest memory of which one word changes right after it was read.
struct Racing {
    memory: GuestMemoryMmap,
    change: Mutex<Option<Change>>,
}

struct Change {
    address: u64,
    value: u64,
    /// After this many more reads of the word.
    reads: u32,
}

impl TableMemory for Racing {
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), BadAddress> {
        TableMemory::read(&self.memory, address, bytes)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), BadAddress> {
        TableMemory::write(&self.memory, address, bytes)
    }

    fn store_u32(&self, address: u64, value: u32) -> Result<(), BadAddress> {
        self.memory.store_u32(address, value)
    }

    fn compare_exchange_u64(&self, address: u64, old: u64, new: u64) -> Result<bool, BadAddress> {
        self.memory.compare_exchange_u64(address, old, new)
    }

    fn load_u64(&self, address: u64) -> Result<u64, BadAddress> {
        let word = self.memory.load_u64(address);
        let mut change = self.change.lock();
        if let Some(here) = change.as_mut().filter(|change| change.address == address) {
            here.reads -= 1;
            if here.reads == 0 {
                self.memory.write_obj(here.value, GuestAddress(address)).unwrap();
                *change = None;
            }
        }
        word
    }
}

/// PASID 9 is served, then withdrawn, and served by other tables once the word at `address` has
/// been read as 0 `reads` times, without an invalidation (no caching mode). Returns whether the
/// host attached it.
fn served_again(address: u64, reads: u32) -> (Guest, bool) {
    let memory = guest_memory();
    let racing = Arc::new(Racing { memory: memory.clone(), change: Mutex::default() });
    let config = VtdConfig { caching_mode: false, ..Default::default() };
    let guest = Guest::reading(config, memory, racing.clone());
    guest.write_tables();
    guest.set_root(0x400);
    guest.enable_queue(0x800);
    guest.enable_translation();
    guest.write_pasid(9, 0x6000);
    assert!(guest.iommu.served_late(with_pasid(9)));
    guest.write_pasid(9, 0x7000);
    let value = guest.memory.load_u64(address).unwrap();
    guest.write(address, &[0]);
    *racing.change.lock() = Some(Change { address, value, reads });
    guest.calls();
    guest.submit(&[PASID_CACHE]);
    *racing.change.lock() = None;
    let attached = guest.calls().contains(&Call::Configure(with_pasid(9), first_stage(0x7000)));
    (guest, attached)
}

/// Whatever is read when: what the host attached is blocked when `end` withdraws it.
fn what_was_attached_ends(end: impl Fn(&Guest)) {
    // Clearing any of these words withdraws PASID 9.
    for address in [ROOT + 0x10, CONTEXT + 0x100, DIRECTORY, PASID_TABLE + 64 * 9] {
        let mut attachments = 0;
        for reads in 1..8 {
            let (guest, attached) = served_again(address, reads);
            attachments += u32::from(attached);
            end(&guest);
            let blocked = guest.calls().contains(&Call::Configure(with_pasid(9), blocked(0x59)));
            assert!(blocked || !attached, "{address:#x} changes after {reads} reads");
        }
        assert_ne!(attachments, 0, "{address:#x}");
    }
}

#[test]
fn a_pasid_that_came_back_while_it_was_withdrawn_is_withdrawn_when_it_goes() {
    what_was_attached_ends(|guest| {
        guest.write(PASID_TABLE + 64 * 9, &[0]);
        guest.write(DIRECTORY, &[PASID_TABLE | 1]);
        guest.submit(&[PASID_CACHE]);
    });
}

#[test]
fn a_pasid_that_came_back_while_it_was_withdrawn_ends_with_translation() {
    what_was_attached_ends(Guest::disable_translation);
}
