// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory of a guest.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};

/// Length of guest memory, in bytes.
pub const MEMORY: u64 = 16 << 20;
/// Size of a page, in bytes.
pub const PAGE: u64 = 4096;

/// Memory of a guest, from address 0 on.
pub struct Guest(*mut u8);

impl Guest {
    pub fn new() -> Self {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping touches nothing.
        let memory =
            unsafe { libc::mmap(std::ptr::null_mut(), MEMORY as usize, rights, flags, -1, 0) };
        assert_ne!(memory, libc::MAP_FAILED);
        Self(memory.cast())
    }

    /// Its address in this process.
    pub fn address(&self) -> u64 {
        self.0 as u64
    }

    fn word(&self, address: u64) -> &AtomicU64 {
        assert!(address.is_multiple_of(8) && address < MEMORY);
        // SAFETY: it is within the mapping, aligned, and accessed by devices like by another
        // thread.
        unsafe { &*self.0.add(address as usize).cast() }
    }

    pub fn get(&self, address: u64) -> u64 {
        self.word(address).load(Ordering::SeqCst)
    }

    pub fn set(&self, address: u64, value: u64) {
        self.word(address).store(value, Ordering::SeqCst);
    }
}
