// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory map for a kernel, with a PC BIOS's type numbers, which both protocols use.

use crate::arch::layout::{ECAM_SIZE, ECAM_START};
use crate::arch::x86_64::bios_data::EXTENDED_START;
use crate::memory::MachineMemory;

/// Usable memory.
const RAM: u32 = 1;
/// Reserved.
const RESERVED: u32 = 2;
/// Start of the legacy area: the BIOS's extended data, video and option ROMs.
const LEGACY_START: u64 = EXTENDED_START;
/// End of the legacy area.
const LEGACY_END: u64 = 0x10_0000;

/// One range of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MapEntry {
    pub start: u64,
    pub length: u64,
    pub kind: u32,
}

/// The map of `memory`, ascending.
pub(super) fn memory_map(memory: &MachineMemory) -> Vec<MapEntry> {
    let mut entries = vec![
        MapEntry { start: 0, length: LEGACY_START, kind: RAM },
        MapEntry { start: LEGACY_START, length: LEGACY_END - LEGACY_START, kind: RESERVED },
    ];
    for (start, length) in memory.ranges() {
        // The first region contains the legacy area: a machine that boots has more memory than
        // that.
        let skipped = if start == 0 { LEGACY_END } else { 0 };
        entries.push(MapEntry {
            start: start + skipped,
            length: length.saturating_sub(skipped),
            kind: RAM,
        });
    }
    entries.push(MapEntry { start: ECAM_START, length: ECAM_SIZE, kind: RESERVED });
    entries.sort_by_key(|entry| entry.start);
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_names_ram_and_configuration_space() {
        let map = memory_map(&MachineMemory::new(0x200_0000).unwrap());
        assert_eq!(
            map,
            [
                MapEntry { start: 0, length: 0x9_fc00, kind: RAM },
                MapEntry { start: 0x9_fc00, length: 0x6_0400, kind: RESERVED },
                MapEntry { start: 0x10_0000, length: 0x1f0_0000, kind: RAM },
                MapEntry { start: ECAM_START, length: ECAM_SIZE, kind: RESERVED },
            ]
        );
    }
}
