// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an execution is made of, by its first bytes: the host's unit, and what guests are offered.

use twostage::viommu::vtd::VtdConfig;
use twostage_emulated::{AddressWidth, VtdUnitConfig};

use super::image::Start;

/// What an execution is made of.
#[derive(Debug, Clone, Copy)]
pub struct Header {
    pub start: Start,
    pub caching_mode: bool,
    pub mirrored: bool,
    pub device_tlbs: bool,
    /// Of five levels.
    pub wide: bool,
    pub small_caches: bool,
    pub remaps: bool,
    pub narrow_descriptors: bool,
    pub supervisor: bool,
    /// Stale translations are found while they are used.
    pub sanitized: bool,
    /// Translation is enabled at the start.
    pub enabled: bool,
    /// Devices can ask for pages.
    pub requests: bool,
    /// The most pieces of all mirrors: in some executions fewer than the tables have.
    pub pieces: u64,
    /// Calls to hosts may fail.
    pub fails: bool,
    /// Each device is of a host of its own.
    pub two_hosts: bool,
}

impl Header {
    pub fn of([first, second]: [u8; 2]) -> Self {
        let start = Start::of(first);
        let bit = |byte: u8, bit: u8| byte >> bit & 1 != 0;
        // Mirrors are of one stage.
        let mirrored = bit(first, 4) && start != Start::Nested;
        let device_tlbs = bit(first, 5) && !mirrored;
        let fails = second & 0xf0 == 0xe0;
        Self {
            start,
            caching_mode: bit(first, 3) || mirrored,
            mirrored,
            device_tlbs,
            wide: bit(first, 6),
            small_caches: bit(first, 7),
            remaps: bit(second, 0),
            narrow_descriptors: bit(second, 1) && start.is_legacy(),
            supervisor: bit(second, 2) && !mirrored,
            sanitized: bit(second, 3),
            enabled: second & 0xf0 != 0xf0,
            requests: device_tlbs
                && !start.is_legacy()
                && (second & 0x70 == 0x50 || fails && bit(first, 6)),
            pieces: if mirrored && bit(second, 2) { 12 } else { 1000 },
            fails,
            two_hosts: second & 0xf0 == 0xd0 || fails && bit(first, 7),
        }
    }

    pub fn unit(&self) -> VtdUnitConfig {
        let width = if self.wide { AddressWidth::Bits57 } else { AddressWidth::Bits48 };
        let unit = VtdUnitConfig::default()
            .with_address_width(width)
            .with_supervisor_requests(true)
            .with_extended_accessed(true)
            .with_device_tlb(true)
            .with_page_requests(true)
            .with_sanitize(self.sanitized);
        let entries = if self.small_caches { 2 } else { 16 };
        unit.with_iotlb_entries(entries)
            .with_paging_structure_entries(entries)
            .with_stage2_entries(entries)
    }

    pub fn offered(&self) -> VtdConfig {
        VtdConfig::default()
            .with_address_width(if self.wide && !self.mirrored { 57 } else { 48 })
            .with_pasid_bits(Some(4))
            .with_first_stage(self.mirrored.then_some(true))
            .with_second_stage(true)
            .with_nest(!self.mirrored)
            .with_caching_mode(self.caching_mode)
            .with_device_iotlb(self.device_tlbs)
            .with_page_requests(self.requests)
            .with_interrupt_remapping(self.remaps)
            .with_supervisor_requests(self.supervisor)
            .with_extended_accessed(self.supervisor)
            .with_fault_records(2)
    }

    /// Levels of the tables at the start.
    pub fn levels(&self) -> u64 {
        if self.wide && !self.mirrored {
            5
        } else {
            4
        }
    }
}
