// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What configuration space means, naively: from the registers that software reads.

use twostage_vmm::inside::pci::PciFunction;

/// Sizes of the BARs of an `edu`, and of a virtio device.
const EDU_BARS: [u64; 3] = [0x10_0000, 0x2000, 0x4000];
const VIRTIO_BAR: u64 = 0x8000;

fn u16(function: &dyn PciFunction, offset: u16) -> u16 {
    function.config().lock().u16(offset)
}

fn u32(function: &dyn PciFunction, offset: u16) -> u32 {
    function.config().lock().u32(offset)
}

/// The capabilities: ID and offset.
pub fn capabilities(function: &dyn PciFunction) -> Vec<(u8, u16)> {
    let mut found = Vec::new();
    if u16(function, 6) & 0x10 == 0 {
        return found;
    }
    let mut at = u16(function, 0x34) & 0xfc;
    while at != 0 {
        assert!(found.len() < 48, "the list of capabilities is a loop");
        let header = u16(function, at);
        found.push((header as u8, at));
        at = header >> 8 & 0xfc;
    }
    found
}

/// Offset of the first capability `id`.
pub fn capability(function: &dyn PciFunction, id: u8) -> Option<u16> {
    capabilities(function).into_iter().find(|(found, _)| *found == id).map(|(_, at)| at)
}

/// Offset of the extended capability `id`.
pub fn extended(function: &dyn PciFunction, id: u16) -> Option<u16> {
    let next = |at: &u16| Some((u32(function, *at) >> 20) as u16).filter(|next| *next != 0);
    std::iter::successors(Some(0x100), next).take(48).find(|at| u16(function, *at) == id)
}

/// Address and size of BAR `number`.
pub fn bar(function: &dyn PciFunction, number: usize) -> Option<(u64, u64)> {
    let size = match u32(function, 0) {
        0x11e8_1234 => EDU_BARS[number],
        id if id & 0xffff == 0x1af4 && number == 0 => VIRTIO_BAR,
        _ => return None,
    };
    let register = u64::from(u32(function, 0x10 + 4 * number as u16));
    assert_eq!(register & 0xf, 0, "32 bits, not prefetchable");
    assert_eq!(register & (size - 1), 0, "BAR {number} is not at a multiple of its size");
    Some((register, size))
}

/// Whether a BAR answers, through the bridges that it is behind.
pub fn decodes(
    function: &dyn PciFunction,
    start: u64,
    size: u64,
    ways: &[&dyn PciFunction],
) -> bool {
    let last = start + size - 1;
    let enabled = |function: &dyn PciFunction| u16(function, 4) & 2 != 0;
    enabled(function)
        && ways.iter().all(|bridge| enabled(*bridge) && forwards(*bridge, start, last))
}

/// Whether a window of `bridge` has these addresses.
fn forwards(bridge: &dyn PciFunction, start: u64, last: u64) -> bool {
    let window = |base: u16, upper: Option<u16>| {
        let high = |at: u16| upper.map_or(0, |_| u64::from(u32(bridge, at)) << 32);
        let upper = upper.unwrap_or_default();
        let first = u64::from(u16(bridge, base) & 0xfff0) << 16 | high(upper);
        let limit = u64::from(u16(bridge, base + 2) & 0xfff0) << 16 | 0xf_ffff | high(upper + 4);
        first <= start && last <= limit
    };
    window(0x20, None) || window(0x24, Some(0x28))
}

/// Whether a function may make requests: it, and each bridge, which calls the bus behind it by the
/// number that is given.
pub fn may_request<'a>(
    function: &dyn PciFunction,
    mut ways: impl Iterator<Item = (&'a dyn PciFunction, u8)>,
) -> bool {
    let master = |function: &dyn PciFunction| u16(function, 4) & 4 != 0;
    let takes = |(bridge, number): (&dyn PciFunction, u8)| {
        master(bridge) && u16(bridge, 0x19) as u8 == number
    };
    master(function) && ways.all(takes)
}

/// Whether an `edu` asserts its pin.
pub fn pin(function: &dyn PciFunction) -> bool {
    let pending = u16(function, 6) & 8 != 0;
    let disabled = u16(function, 4) & 0x400 != 0;
    let enabled =
        |id, bit: u16| capability(function, id).is_some_and(|at| u16(function, at + 2) & bit != 0);
    pending && !disabled && !enabled(5, 1) && !enabled(0x11, 0x8000)
}
