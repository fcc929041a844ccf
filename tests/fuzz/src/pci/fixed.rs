// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What no write to configuration space changes, and what is as it was written, naively.

use twostage_vmm::inside::pci::PciFunction;

use super::naive;

/// Identity, revision and class, header type, where capabilities start, and the pin: of all.
const OF_ALL: [std::ops::Range<u16>; 5] = [0..4, 8..0xc, 0xe..0xf, 0x34..0x35, 0x3d..0x3e];
/// Of functions that are no bridges: pointers that there are none of, and the subsystem.
const OF_ENDPOINTS: std::ops::Range<u16> = 0x28..0x30;
/// Memory space, bus mastering and the pin can be switched in the command register.
const COMMAND: u16 = 0x406;
/// What the status register shows by itself: an interrupt is pending.
const PENDING: u16 = 8;

/// Bytes that never change, by their offset.
pub type Fixed = Vec<(u16, u8)>;

fn u16(function: &dyn PciFunction, offset: u16) -> u16 {
    function.config().lock().u16(offset)
}

/// Those of `function` now.
pub fn fixed(function: &dyn PciFunction) -> Fixed {
    let byte = |at: u16| u16(function, at) as u8;
    let mut fixed: Fixed = OF_ALL.into_iter().flatten().map(|at| (at, byte(at))).collect();
    if byte(0xe) & 0x7f == 0 {
        fixed.extend(OF_ENDPOINTS.map(|at| (at, byte(at))));
        fixed.push((4, byte(4) & !(COMMAND as u8)));
        fixed.push((5, byte(5) & !((COMMAND >> 8) as u8)));
    }
    fixed.push((6, byte(6) & !(PENDING as u8)));
    // Which capabilities there are, and where.
    let headers = naive::capabilities(function).into_iter().flat_map(|(_, at)| [at, at + 1]);
    fixed.extend(headers.map(|at| (at, byte(at))));
    fixed
}

/// Software has written `data` to a register of `function`, which has no reset there: what it can
/// write of the command register, the BARs and the interrupt line is as it was written.
pub fn check_written(function: &dyn PciFunction, register: u16, data: &[u8]) {
    let written = data.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte));
    match (register, data.len()) {
        (4, 2..) => assert_eq!(u16(function, 4) & COMMAND, written as u16 & COMMAND, "command"),
        (0x10 | 0x14 | 0x18, 4) => {
            let number = usize::from(register - 0x10) / 4;
            if let Some((address, size)) = naive::bar(function, number) {
                assert_eq!(address, u64::from(written) & !(size - 1), "BAR {number}");
            }
        }
        (0x3c, _) => assert_eq!(u16(function, 0x3c) as u8, data[0], "the interrupt line"),
        _ => {}
    }
}
