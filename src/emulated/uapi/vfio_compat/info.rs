// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `VFIO_IOMMU_GET_INFO`: page sizes, and a chain of capabilities after the structure.

use std::mem::{offset_of, size_of};
use std::ops::{Range, RangeInclusive};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::super::UserSpace;
use crate::host::refusal::{refuse, Outcome};
use crate::EmulatedHost;
use twostage::iommufd::Errno;
use vfio_bindings::bindings::vfio::*;

/// `struct vfio_iommu_type1_info`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct Info {
    argsz: u32,
    flags: u32,
    iova_pgsizes: u64,
    cap_offset: u32,
    pad: u32,
}

/// Size of the first version.
const INFO_MIN: usize = offset_of!(Info, cap_offset);

/// `struct vfio_info_cap_header`.
#[repr(C)]
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct CapHeader {
    id: u16,
    version: u16,
    /// Offset of the next one from the start of the structure, in bytes; 0 for none.
    next: u32,
}

/// `struct vfio_iova_range`: the first and the last IOVA.
type IovaRange = [u64; 2];

/// Remaining mappings: VFIO's limit does not apply here; this is Linux's value.
const DMA_AVAIL: u32 = u32::MAX;

pub(super) fn get_info(host: &EmulatedHost, argument: u64, user: &dyn UserSpace) -> Outcome<()> {
    let mut info = Info::default();
    // In bounds: the first version is a part of the structure.
    user.read(argument, &mut info.as_mut_bytes()[..INFO_MIN])?;
    let room = info.argsz as usize;
    if room < INFO_MIN {
        return refuse(Errno::EINVAL, format!("argsz {room}"));
    }
    let objects = host.objects();
    let ioas = objects.vfio_ioas()?;
    let usable = objects.ioas_iova_ranges(ioas)?.allowed;
    info.iova_pgsizes = objects.vfio_page_sizes(ioas)?;
    drop(objects);

    let capabilities = [dma_avail(), iova_ranges(&usable)];
    let mut offset = size_of::<Info>();
    let mut before = None;
    for capability in &capabilities {
        let written = capability.written(room.saturating_sub(offset));
        if !written.is_empty() {
            // In bounds: a part of the capability.
            user.write(at(argument, offset + written.start)?, &capability.bytes[written])?;
        }
        // It links to a capability that starts within the room even if it does not fit.
        if let Some(before) = before.filter(|_| room >= offset) {
            let next = at(argument, before + offset_of!(CapHeader, next))?;
            user.write(next, (offset as u32).as_bytes())?;
        }
        before = Some(offset);
        offset += capability.bytes.len().next_multiple_of(size_of::<u64>());
    }
    info.flags = VFIO_IOMMU_INFO_PGSIZES | VFIO_IOMMU_INFO_CAPS;
    info.cap_offset = if room >= offset { size_of::<Info>() as u32 } else { 0 };
    // At most 2^32 ranges fit in memory.
    info.argsz = offset as u32;
    // In bounds: at most the structure.
    user.write(argument, &info.as_bytes()[..room.min(size_of::<Info>())])?;
    Ok(())
}

/// One capability of the chain.
struct Capability {
    bytes: Vec<u8>,
    /// Size of what precedes its ranges, if it has any, in bytes.
    fixed: usize,
}

impl Capability {
    /// The bytes that are written with room for `left`. If not all fit, Linux writes those of the
    /// ranges that fit, and nothing before them.
    fn written(&self, left: usize) -> Range<usize> {
        if left >= self.bytes.len() {
            return 0..self.bytes.len();
        }
        let ranges = left.saturating_sub(self.fixed) / size_of::<IovaRange>();
        self.fixed..self.fixed + ranges * size_of::<IovaRange>()
    }
}

/// `struct vfio_iommu_type1_info_dma_avail`.
fn dma_avail() -> Capability {
    let mut bytes = header(VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL);
    bytes.extend_from_slice(DMA_AVAIL.as_bytes());
    Capability { fixed: bytes.len(), bytes }
}

/// `struct vfio_iommu_type1_info_cap_iova_range`.
fn iova_ranges(ranges: &[RangeInclusive<u64>]) -> Capability {
    let mut bytes = header(VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE);
    bytes.extend_from_slice([ranges.len() as u32, 0].as_bytes());
    let fixed = bytes.len();
    for range in ranges {
        let range: IovaRange = [*range.start(), *range.end()];
        bytes.extend_from_slice(range.as_bytes());
    }
    Capability { bytes, fixed }
}

fn header(id: u32) -> Vec<u8> {
    // IDs have 16 bits.
    CapHeader { id: id as u16, version: 1, next: 0 }.as_bytes().to_vec()
}

/// The address `offset` bytes after `address`.
fn at(address: u64, offset: usize) -> Outcome<u64> {
    match address.checked_add(offset as u64) {
        Some(address) => Ok(address),
        None => refuse(Errno::EFAULT, "the structure passes the end of the address space"),
    }
}
