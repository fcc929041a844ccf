// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory for devices.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::FromRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use twostage::iommufd::{MapTarget, Protection, UserMemory};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
    MmapRegion,
};

use super::{destroy, ioas_of, Bound, Subject, BASE, PAGE};

/// Memory shared by devices and the check.
pub struct Memory(Arc<GuestRegionMmap>);

/// Keeps a region.
pub struct Owner(Arc<GuestRegionMmap>);

impl Memory {
    /// `pages` of anonymous memory.
    pub fn new(pages: u64) -> Self {
        Self::at(0, pages)
    }

    /// `pages` of anonymous memory that the guest has at `gpa`.
    pub fn at(gpa: u64, pages: u64) -> Self {
        let region = GuestRegionMmap::from_range(GuestAddress(gpa), (pages * PAGE) as usize, None);
        Self(Arc::new(region.expect("memory")))
    }

    pub fn region(&self) -> Arc<GuestRegionMmap> {
        self.0.clone()
    }

    /// What keeps the bytes as a VMM's own.
    pub fn owner(&self) -> Arc<Owner> {
        Arc::new(Owner(self.region()))
    }

    /// The bytes as a VMM's own, which are kept by `owner`.
    pub fn raw(&self, owner: Arc<Owner>) -> UserMemory {
        assert!(Arc::ptr_eq(&owner.0, &self.0));
        let (start, length) = (self.0.as_ptr(), self.length() as usize);
        // SAFETY: the region keeps the bytes mapped, and they are accessed through it only.
        unsafe { UserMemory::from_raw(start, length, owner, None) }.expect("memory")
    }

    /// `pages` of a memfd, with one more before them.
    fn of_file(pages: u64) -> Self {
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"contract".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0, "memfd_create: {}", std::io::Error::last_os_error());
        // SAFETY: it is new, and nobody else's.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len((pages + 1) * PAGE).expect("room");
        let region = MmapRegion::from_file(FileOffset::new(file, PAGE), (pages * PAGE) as usize);
        let region = GuestRegionMmap::new(region.expect("a mapping"), GuestAddress(0));
        Self(Arc::new(region.expect("a region")))
    }

    pub fn length(&self) -> u64 {
        self.0.len()
    }

    pub fn whole(&self) -> UserMemory {
        UserMemory::whole(self.0.clone())
    }

    pub fn part(&self, offset: u64, length: u64) -> UserMemory {
        self.whole().part(offset, length).expect("a part of it")
    }

    pub fn get(&self, offset: u64) -> u64 {
        self.0.load(MemoryRegionAddress(offset), Ordering::SeqCst).expect("in the memory")
    }

    pub fn set(&self, offset: u64, word: u64) {
        self.0.store(word, MemoryRegionAddress(offset), Ordering::SeqCst).expect("in the memory");
    }

    /// A unique word.
    pub fn fresh_word(&self) -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(0x1234_5678_0000_0001);
        NEXT.fetch_add(1, Ordering::Relaxed)
    }
}

/// Devices access anonymous memory and file memory alike.
pub fn kinds(subject: &Subject) {
    let mut bound = Bound::new(subject);
    let host = bound.host();
    for memory in [Memory::new(4), Memory::of_file(4)] {
        let ioas = ioas_of(host, &memory, BASE);
        bound.attach(ioas);
        assert!(bound.reaches(&memory, BASE));
        assert_eq!(host.ioas_unmap(ioas, BASE, 4 * PAGE).expect("IOAS_UNMAP"), 4 * PAGE);
        assert!(!bound.reaches(&memory, BASE));
        bound.detach();
        destroy(host, &[ioas]);
    }
}

/// Memory of a VMM's own is kept until it is unmapped, and then let go.
pub fn raw(subject: &Subject) {
    let mut bound = Bound::new(subject);
    let host = bound.host();
    let memory = Memory::new(4);
    let owner = memory.owner();
    let raw = memory.raw(owner.clone());
    let ioas = host.ioas_alloc().expect("IOAS_ALLOC");
    host.ioas_map(ioas, &raw, MapTarget::Fixed(BASE), Protection::READ_WRITE).expect("IOAS_MAP");
    drop(raw);
    bound.attach(ioas);
    assert!(bound.reaches(&memory, BASE));
    assert!(Arc::strong_count(&owner) > 1, "kept");
    assert_eq!(host.ioas_unmap(ioas, BASE, 4 * PAGE).expect("IOAS_UNMAP"), 4 * PAGE);
    assert_eq!(Arc::strong_count(&owner), 1, "let go");
    bound.detach();
    destroy(host, &[ioas]);
}
