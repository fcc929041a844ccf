// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tables that another processor writes while they are read.

use super::*;
use crate::spec::vtd::qi::PasidCacheScope;
use crate::viommu::BadAddress;

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
    guest.submit(&[Descriptor::PasidCache(PasidCacheScope::Global)]);
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
        guest.submit(&[Descriptor::PasidCache(PasidCacheScope::Global)]);
    });
}

#[test]
fn a_pasid_that_came_back_while_it_was_withdrawn_ends_with_translation() {
    what_was_attached_ends(Guest::disable_translation);
}
