// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A PC's BIOS data in the first 640 KiB: its data area, and the extended one at the end. An
//! operating system that starts its other processors looks there for unused memory.
//!
//! Source: System BIOS for IBM PCs, Compatibles, and EISA Computers (Phoenix), "BIOS Data Area".

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::MachineMemory;

/// The segment of the extended data area: a word.
const EXTENDED_SEGMENT: u64 = 0x40e;
/// Memory from 0 to the extended data area, in KiB: a word.
const BASE_MEMORY: u64 = 0x413;

/// Start of the extended data area: all memory below is RAM.
pub(super) const EXTENDED_START: u64 = 0x9_fc00;
/// The memory before it, in KiB.
pub(super) const BASE_MEMORY_KIB: u16 = (EXTENDED_START >> 10) as u16;
/// Its length in KiB, stored in its first byte.
const EXTENDED_KIB: u8 = 1;

/// Writes both areas.
///
/// # Errors
/// There is no memory.
pub(super) fn write(memory: &MachineMemory) -> Result<(), GuestMemoryError> {
    let map = memory.map();
    map.write_slice(&((EXTENDED_START >> 4) as u16).to_le_bytes(), GuestAddress(EXTENDED_SEGMENT))?;
    map.write_slice(&BASE_MEMORY_KIB.to_le_bytes(), GuestAddress(BASE_MEMORY))?;
    map.write_slice(&[EXTENDED_KIB], GuestAddress(EXTENDED_START))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_area_tells_where_base_memory_ends() {
        let memory = MachineMemory::new(1 << 20).unwrap();
        write(&memory).unwrap();
        let word = |at| memory.map().read_obj::<u16>(GuestAddress(at)).unwrap();
        assert_eq!((word(0x40e), word(0x413)), (0x9fc0, 639));
        assert_eq!(word(0x9_fc00), 1);
    }
}
