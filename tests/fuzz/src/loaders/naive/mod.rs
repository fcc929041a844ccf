// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a kernel finds in memory, by a naive reading of its file and of its boot protocol: that of
//! the architecture that this runs on.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use twostage_vmm::inside::{MachineMemory, PayloadConfig, StartState};
use vm_memory::{Bytes, GuestAddress};

/// A kernel that was loaded.
pub struct Loaded<'a> {
    pub memory: &'a MachineMemory,
    pub image: &'a [u8],
    pub payload: &'a PayloadConfig,
    pub start: StartState,
}

impl Loaded<'_> {
    fn bytes(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.map().read_slice(&mut bytes, GuestAddress(at)).expect("it is in memory");
        bytes
    }
}
