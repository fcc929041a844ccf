// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Raw ioctls of vIOMMUs, and an SMMUv3's structures in memory.
#![allow(unsafe_code)]

use std::io::Result;
use std::mem::size_of;
use std::os::fd::RawFd;

use iommufd_bindings::*;

use crate::guest::{Guest, PAGE};
use crate::uapi::{hwpt_alloc, ioctl};

/// `IOMMU_VIOMMU_TYPE_ARM_SMMUV3`, which is also the number of its events, and one less than that
/// of its GET_HW_INFO.
const TYPE: u32 = 1;

/// ASID of the guest's tables.
const ASID: u64 = 7;

/// The addresses of a context descriptor, and of four adjacent tables.
#[derive(Clone, Copy)]
pub struct Tables {
    pub context: u64,
    pub tables: u64,
}

impl Tables {
    /// Writes the context descriptor: 48 bits in pages of 4 KiB by TTB0, no TTB1.
    pub fn write_context(self, guest: &Guest) {
        /// T0SZ, cacheability, EPD1, V, IPS of 44 bits, AA64, R, A, ASET.
        const WORD: u64 =
            16 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 30 | 1 << 31 | 4 << 32 | 1 << 41 | 7 << 45;
        // MAIR: normal memory, write-back.
        let words = [WORD | ASID << 48, self.tables, 0, 0xff, 0, 0, 0, 0];
        for (index, word) in (0..).zip(words) {
            guest.set(self.context + index * 8, word);
        }
    }

    /// Makes the tables map `iova` to `page`; `None`: to nothing.
    pub fn map(self, guest: &Guest, iova: u64, page: Option<u64>) {
        /// A page: AP, shareable, accessed, not global.
        const LEAF: u64 = 3 | 1 << 6 | 3 << 8 | 1 << 10 | 1 << 11;
        for level in 0..4u64 {
            let table = self.tables + level * PAGE;
            let entry = table + (iova >> (39 - 9 * level) & 0x1ff) * 8;
            let value = match (level, page) {
                (3, Some(page)) => page | LEAF,
                (3, None) => 0,
                _ => (table + PAGE) | 3,
            };
            guest.set(entry, value);
        }
    }

    /// The user's half of a stream table entry: stage 1 with the context descriptor.
    pub fn entry(self) -> [u64; 2] {
        [1 | 5 << 1 | self.context, 1 << 2 | 1 << 4 | 3 << 6]
    }
}

/// A stream table entry that bypasses, and one that aborts.
pub const BYPASS: [u64; 2] = [1 | 4 << 1, 0];
pub const ABORT: [u64; 2] = [1, 0];

/// `CMD_TLBI_NH_VA`.
pub fn tlbi_va(iova: u64) -> [u64; 2] {
    [0x12 | ASID << 48, iova & !0xfff]
}

/// `CMD_CFGI_CD`.
pub fn cfgi_cd(stream: u64) -> [u64; 2] {
    [0x05 | stream << 32, 1]
}

/// `CMD_SYNC`.
pub const SYNC: [u64; 2] = [0x46, 0];

/// Whether the device is behind an SMMUv3, and its IDR0.
pub fn idr0(fd: RawFd, dev: u32) -> Result<Option<u32>> {
    let mut smmu = iommu_hw_info_arm_smmuv3::default();
    let mut info = iommu_hw_info {
        size: size_of::<iommu_hw_info>() as u32,
        dev_id: dev,
        data_len: size_of::<iommu_hw_info_arm_smmuv3>() as u32,
        data_uptr: &raw mut smmu as u64,
        ..Default::default()
    };
    ioctl(fd, IOMMUFD_CMD_GET_HW_INFO, &mut info)?;
    // SAFETY: both members of the union are this number.
    let kind = unsafe { info.__bindgen_anon_1.out_data_type };
    Ok((kind == TYPE + 1).then_some(smmu.idr[0]))
}

/// A vIOMMU on the nesting parent `hwpt`.
pub fn viommu_alloc(fd: RawFd, dev: u32, hwpt: u32) -> Result<u32> {
    let mut alloc = iommu_viommu_alloc {
        size: size_of::<iommu_viommu_alloc>() as u32,
        type_: TYPE,
        dev_id: dev,
        hwpt_id: hwpt,
        ..Default::default()
    };
    ioctl(fd, IOMMUFD_CMD_VIOMMU_ALLOC, &mut alloc)?;
    Ok(alloc.out_viommu_id)
}

/// The guest's StreamID of a device.
pub fn vdevice_alloc(fd: RawFd, viommu: u32, dev: u32, stream: u64) -> Result<u32> {
    let mut alloc = iommu_vdevice_alloc {
        size: size_of::<iommu_vdevice_alloc>() as u32,
        viommu_id: viommu,
        dev_id: dev,
        virt_id: stream,
        ..Default::default()
    };
    ioctl(fd, IOMMUFD_CMD_VDEVICE_ALLOC, &mut alloc)?;
    Ok(alloc.out_vdevice_id)
}

/// A vEVENTQ of the vIOMMU: its object and its descriptor.
pub fn veventq_alloc(fd: RawFd, viommu: u32) -> Result<(u32, RawFd)> {
    let mut alloc = iommu_veventq_alloc {
        size: size_of::<iommu_veventq_alloc>() as u32,
        viommu_id: viommu,
        type_: TYPE,
        veventq_depth: 16,
        ..Default::default()
    };
    ioctl(fd, IOMMUFD_CMD_VEVENTQ_ALLOC, &mut alloc)?;
    Ok((alloc.out_veventq_id, alloc.out_veventq_fd as RawFd))
}

/// A nested page table with these words of a stream table entry.
pub fn nested_stream(fd: RawFd, dev: u32, pt: u32, ste: [u64; 2]) -> Result<u32> {
    let alloc = iommu_hwpt_alloc {
        dev_id: dev,
        pt_id: pt,
        // `IOMMU_HWPT_DATA_ARM_SMMUV3`.
        data_type: 2,
        data_len: size_of::<[u64; 2]>() as u32,
        data_uptr: &raw const ste as u64,
        ..Default::default()
    };
    hwpt_alloc(fd, alloc)
}

/// Gives commands to a vIOMMU; returns the number completed according to the kernel.
pub fn issue(fd: RawFd, viommu: u32, commands: &[[u64; 2]]) -> (Result<()>, u32) {
    let mut invalidate = iommu_hwpt_invalidate {
        size: size_of::<iommu_hwpt_invalidate>() as u32,
        hwpt_id: viommu,
        data_uptr: commands.as_ptr() as u64,
        // `IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3`.
        data_type: 1,
        entry_len: size_of::<[u64; 2]>() as u32,
        entry_num: commands.len() as u32,
        ..Default::default()
    };
    let result = ioctl(fd, IOMMUFD_CMD_HWPT_INVALIDATE, &mut invalidate);
    (result, invalidate.entry_num)
}

/// The fields of an event record.
pub struct Event {
    /// Flags of the header.
    pub flags: u32,
    pub sequence: u32,
    pub id: u64,
    pub stream: u64,
    pub address: u64,
    /// The access was a read.
    pub read: bool,
}

/// The next event, if there is one within `milliseconds`.
pub fn event(fd: RawFd, milliseconds: i32) -> Option<Event> {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // A header of two 32-bit words, and four 64-bit words.
    let mut record = [0u64; 5];
    // SAFETY: there is room for one event; the descriptor is the caller's.
    unsafe {
        if libc::poll(&mut poll, 1, milliseconds) != 1 {
            return None;
        }
        let size = size_of_val(&record);
        assert_eq!(libc::read(fd, record.as_mut_ptr().cast(), size), size as isize);
    }
    let [header, first, second, address, _] = record;
    Some(Event {
        flags: header as u32,
        sequence: (header >> 32) as u32,
        id: first & 0xff,
        stream: first >> 32,
        address,
        read: second >> 35 & 1 != 0,
    })
}
