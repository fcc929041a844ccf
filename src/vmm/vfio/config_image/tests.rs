// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Configuration spaces that no device has.

use super::*;
use crate::pci::layout::{CAPABILITY_MSIX, CAPABILITY_VENDOR};
use crate::pci::MemoryBar;
use crate::vfio::host_device::Region;

#[test]
fn of_two_capabilities_that_are_emulated_the_first_is_shown() {
    let mut device = [0; CONFIG_SIZE];
    set(&mut device, STATUS, &STATUS_CAPABILITIES.to_le_bytes());
    set(&mut device, CAPABILITIES_POINTER, &[0x40]);
    set(&mut device, 0x40, &[CAPABILITY_MSIX, 0x50, 1, 0, 0, 0x10, 0, 0, 0, 0x18]);
    set(&mut device, 0x50, &[CAPABILITY_VENDOR, 0x60, 8]);
    set(&mut device, 0x60, &[CAPABILITY_MSIX, 0x70, 3, 0, 0, 0x20, 0, 0, 0, 0x28]);
    set(&mut device, 0x70, &[CAPABILITY_VENDOR, 0, 8]);
    let region = Region { size: 0x4000, ..Region::default() };
    let bar = MemoryBar { size: 0x4000, wide: false, prefetchable: false };
    let bars = [DeviceBar { index: 0, bar, region }];
    let behind = Behind { msix: 2, bars: &bars, ..Behind::default() };
    let image = ConfigImage::new(&device, &behind).unwrap();
    assert_eq!(image.msix.unwrap().table, (0, 0x1000), "the one that the host uses");
    assert_eq!(image.msix_vectors, Some(2));
    let next = |offset| image.config.u16(offset) >> 8;
    assert_eq!((next(0x40), next(0x50), next(0x70)), (0x50, 0x70, 0));
}

#[test]
fn a_second_one_does_not_stand_in_for_a_first_that_cannot_be_shown() {
    let mut device = [0; CONFIG_SIZE];
    set(&mut device, STATUS, &STATUS_CAPABILITIES.to_le_bytes());
    set(&mut device, CAPABILITIES_POINTER, &[0x40]);
    // The next capability begins within it.
    set(&mut device, 0x40, &[CAPABILITY_MSIX, 0x48, 1, 0, 0, 0x10, 0, 0]);
    set(&mut device, 0x48, &[CAPABILITY_VENDOR, 0x60, 8]);
    set(&mut device, 0x60, &[CAPABILITY_MSIX, 0, 3, 0, 0, 0x20, 0, 0, 0, 0x28]);
    let image = ConfigImage::new(&device, &Behind::default()).unwrap();
    assert!(image.msix_vectors.is_none(), "the host uses the first");
    assert_eq!(image.msix.unwrap().offset, 0x40);
}

#[test]
fn what_does_not_lie_in_configuration_space_is_left_out() {
    let device = [0x55; CONFIG_SIZE];
    let mut draft = Draft::new(&device, false);
    let (bytes, writable) = (draft.bytes.clone(), draft.writable.clone());
    for beyond in [CONFIG_SIZE as u16 - 1, CONFIG_SIZE as u16, u16::MAX - 2] {
        draft.put(beyond, &[1, 2]);
        draft.allow(beyond, &[1, 2]);
        draft.copy(beyond..beyond + 2);
        draft.live(beyond..beyond + 2);
        draft.link_extended(beyond, 0x100);
        assert_eq!(draft.device_u16(beyond), 0);
    }
    assert!(draft.bytes == bytes && draft.writable == writable);
    let last = CONFIG_SIZE as u16 - 2;
    draft.put(last, &[1, 2]);
    assert_eq!((draft.bytes[CONFIG_SIZE - 1], draft.device_u16(last)), (2, 0x5555));
}

#[test]
fn a_link_keeps_id_and_version() {
    let device = [0; CONFIG_SIZE];
    let mut draft = Draft::new(&device, false);
    draft.put(0x100, &0x0003_000d_u32.to_le_bytes());
    draft.link_extended(0x100, 0x140);
    draft.link_extended(0x100, 0xffc);
    assert_eq!(draft.bytes[0x100..0x104], 0xffc3_000d_u32.to_le_bytes());
}
