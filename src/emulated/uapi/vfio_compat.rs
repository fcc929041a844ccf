// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An iommufd as a VFIO container: its ioctls of `linux/vfio.h`, and `IOMMU_VFIO_IOAS`.
//!
//! `VFIO_IOMMU_GET_INFO` answers page sizes, and a chain of capabilities after the structure.

use std::mem::{offset_of, size_of};
use std::ops::{Range, RangeInclusive};

use iommufd_bindings::*;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::argument::Argument;
use super::{vfio_request, UserSpace};
use crate::host::objects::{MapRequest, Unmap};
use crate::host::refusal::{refuse, Outcome};
use crate::ioas::Source;
use crate::EmulatedHost;
use twostage::iommufd::{Errno, MapTarget, Protection};
use vfio_bindings::bindings::vfio::{
    VFIO_TYPE1v2_IOMMU as VFIO_TYPE1V2_IOMMU, VFIO_API_VERSION, VFIO_DMA_CC_IOMMU,
    VFIO_DMA_MAP_FLAG_READ as MAP_READ, VFIO_DMA_MAP_FLAG_WRITE as MAP_WRITE,
    VFIO_DMA_UNMAP_FLAG_ALL as UNMAP_ALL, VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_INFO_PGSIZES,
    VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, VFIO_NOIOMMU_IOMMU,
    VFIO_TYPE1_IOMMU, VFIO_UNMAP_ALL,
};

const GET_API_VERSION: u32 = vfio_request(0);
const CHECK_EXTENSION: u32 = vfio_request(1);
const SET_IOMMU: u32 = vfio_request(2);
const IOMMU_GET_INFO: u32 = vfio_request(12);
const IOMMU_MAP_DMA: u32 = vfio_request(13);
const IOMMU_UNMAP_DMA: u32 = vfio_request(14);
const GET: u32 = iommufd_vfio_ioas_op_IOMMU_VFIO_IOAS_GET;
const SET: u32 = iommufd_vfio_ioas_op_IOMMU_VFIO_IOAS_SET;
const CLEAR: u32 = iommufd_vfio_ioas_op_IOMMU_VFIO_IOAS_CLEAR;
/// Size of the first version of [`Info`], in bytes.
const INFO_MIN: usize = offset_of!(Info, cap_offset);
/// Remaining mappings: VFIO's limit does not apply here; this is Linux's value.
const DMA_AVAIL: u32 = u32::MAX;

impl EmulatedHost {
    /// `ioctl(2)` of a VFIO container on the iommufd: for ioctls that are not in [`Self::ioctl`].
    ///
    /// `argument` is the third parameter, a number or an address of `user`; returns the call's
    /// result. `user` must not call the host.
    ///
    /// # Errors
    /// Linux's; `ENOTTY` for what Linux's iommufd does not support, including
    /// `VFIO_IOMMU_DIRTY_PAGES`.
    pub fn vfio_ioctl(
        &self,
        request: u32,
        argument: u64,
        user: &dyn UserSpace,
    ) -> Result<i32, Errno> {
        let outcome = match request {
            GET_API_VERSION => Ok(VFIO_API_VERSION as i32),
            CHECK_EXTENSION => check_extension(self, argument),
            SET_IOMMU => set_iommu(self, argument, user).map(|()| 0),
            IOMMU_GET_INFO => get_info(self, argument, user).map(|()| 0),
            IOMMU_MAP_DMA => map(self, argument, user).map(|()| 0),
            IOMMU_UNMAP_DMA => unmap(self, argument, user).map(|()| 0),
            _ => refuse(Errno::ENOTTY, "no ioctl of an iommufd"),
        };
        outcome.map_err(|refusal| {
            log::debug!("VFIO ioctl {request:#x}: {}: {}", refusal.errno, refusal.detail);
            refusal.errno
        })
    }

    /// A VFIO group whose device has an IOMMU is added to the container
    /// (`VFIO_GROUP_SET_CONTAINER`): VFIO's ioctls get an IOAS if they have none.
    ///
    /// # Errors
    /// `EINVAL` the container has a device without an IOMMU; `ENOMEM` no object ID is left.
    pub fn vfio_add_group(&self) -> Result<(), Errno> {
        self.objects().create_vfio_ioas().map_err(|refusal| refusal.errno)
    }

    /// A VFIO group whose device has no IOMMU is added to the container: VFIO's ioctls refuse
    /// everything but `VFIO_NOIOMMU_IOMMU` from now on.
    ///
    /// # Errors
    /// `EINVAL` VFIO's ioctls have an IOAS.
    pub fn vfio_add_group_without_iommu(&self) -> Result<(), Errno> {
        self.objects().set_vfio_no_iommu().map_err(|refusal| refusal.errno)
    }
}

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

/// `struct vfio_iommu_type1_dma_map`.
#[repr(C)]
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct Map {
    argsz: u32,
    flags: u32,
    vaddr: u64,
    iova: u64,
    size: u64,
}

/// `struct vfio_iommu_type1_dma_unmap`, without the dirty bitmap that may follow.
#[repr(C)]
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct UnmapDma {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
}

/// `IOMMU_VFIO_IOAS`.
pub(super) fn vfio_ioas(
    host: &EmulatedHost,
    argument: &mut Argument,
    _: &dyn UserSpace,
) -> Outcome<()> {
    let reserved = u16::from_ne_bytes(argument.bytes(offset_of!(iommu_vfio_ioas, __reserved)));
    if reserved != 0 {
        return refuse(Errno::EOPNOTSUPP, format!("the reserved field is {reserved:#x}"));
    }
    let ioas = argument.id(offset_of!(iommu_vfio_ioas, ioas_id));
    let operation = u16::from_ne_bytes(argument.bytes(offset_of!(iommu_vfio_ioas, op)));
    match u32::from(operation) {
        GET => {
            let ioas = host.objects().vfio_ioas()?;
            argument.set_u32(offset_of!(iommu_vfio_ioas, ioas_id), ioas.0);
            Ok(())
        }
        SET => host.objects().set_vfio_ioas(Some(ioas)),
        CLEAR => host.objects().set_vfio_ioas(None),
        _ => refuse(Errno::EOPNOTSUPP, format!("there is no operation {operation}")),
    }
}

fn check_extension(host: &EmulatedHost, extension: u64) -> Outcome<i32> {
    let objects = host.objects();
    let has = match u32::try_from(extension) {
        Ok(VFIO_TYPE1_IOMMU | VFIO_TYPE1V2_IOMMU | VFIO_UNMAP_ALL) => !objects.vfio_no_iommu(),
        Ok(VFIO_NOIOMMU_IOMMU) => true,
        Ok(VFIO_DMA_CC_IOMMU) => objects.enforces_coherency(objects.vfio_ioas()?)?,
        _ => false,
    };
    Ok(has.into())
}

/// The first version can unmap parts of a mapping, so pages must not be larger than the host's.
fn set_iommu(host: &EmulatedHost, kind: u64, user: &dyn UserSpace) -> Outcome<()> {
    let mut objects = host.objects();
    match (u32::try_from(kind), objects.vfio_no_iommu()) {
        (Ok(VFIO_NOIOMMU_IOMMU), true) if user.credentials().sys_rawio => Ok(()),
        (Ok(VFIO_NOIOMMU_IOMMU), true) => refuse(Errno::EPERM, "the process lacks CAP_SYS_RAWIO"),
        (Ok(VFIO_TYPE1_IOMMU), false) => {
            let ioas = objects.vfio_ioas()?;
            objects.set_huge_pages(ioas, false)
        }
        (Ok(VFIO_TYPE1V2_IOMMU), false) => objects.vfio_ioas().map(drop),
        (_, no_iommu) => {
            let without = if no_iommu { "without" } else { "with" };
            refuse(Errno::EINVAL, format!("IOMMU {kind} for a device {without} an IOMMU"))
        }
    }
}

fn get_info(host: &EmulatedHost, argument: u64, user: &dyn UserSpace) -> Outcome<()> {
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

fn map(host: &EmulatedHost, argument: u64, user: &dyn UserSpace) -> Outcome<()> {
    let mut bytes = [0; size_of::<Map>()];
    user.read(argument, &mut bytes)?;
    let Map { argsz, flags, vaddr, iova, size } = zerocopy::transmute!(bytes);
    check(argsz, size_of::<Map>(), flags, MAP_READ | MAP_WRITE)?;
    let protection = Protection { read: flags & MAP_READ != 0, write: flags & MAP_WRITE != 0 };
    let target = MapTarget::Fixed(iova);
    let source = Source::User(user.share(), vaddr);
    let mut objects = host.objects();
    let ioas = objects.vfio_ioas()?;
    objects.ioas_map(ioas, MapRequest { target, source, length: size, protection }).map(drop)
}

fn unmap(host: &EmulatedHost, argument: u64, user: &dyn UserSpace) -> Outcome<()> {
    let mut bytes = [0; size_of::<UnmapDma>()];
    user.read(argument, &mut bytes)?;
    let dma: UnmapDma = zerocopy::transmute!(bytes);
    let UnmapDma { argsz, flags, iova, size } = dma;
    check(argsz, bytes.len(), flags, UNMAP_ALL)?;
    let ioas = host.objects().vfio_ioas()?;
    let all = flags & UNMAP_ALL != 0;
    if all && (iova, size) != (0, 0) {
        return refuse(Errno::EINVAL, "unmapping everything needs IOVA 0 and size 0");
    }
    if !all {
        cut(host, iova, size)?;
    }
    let mut unmapped = 0;
    let outcome = if all { Ok(Unmap::all(ioas)) } else { Unmap::of_range(ioas, iova, size) };
    let outcome = outcome.and_then(|mut unmap| {
        let outcome = host.finish_unmap(&mut unmap);
        unmapped = unmap.bytes;
        outcome
    });
    // Whether it failed or not.
    user.write(argument, UnmapDma { size: unmapped, ..dma }.as_bytes())?;
    outcome
}

/// Splits mappings at the ends of a range, if the IOAS allows it.
fn cut(host: &EmulatedHost, iova: u64, size: u64) -> Outcome<()> {
    let mut objects = host.objects();
    let ioas = objects.vfio_ioas()?;
    if objects.huge_pages(ioas)? {
        return Ok(());
    }
    // A range that wraps is refused later, as in Linux.
    objects.cut(ioas, iova.wrapping_add(size).wrapping_sub(1))?;
    match iova.checked_sub(1) {
        Some(last) => objects.cut(ioas, last),
        None => Ok(()),
    }
}

/// Checks the declared size of a structure, and its flags.
fn check(argsz: u32, size: usize, flags: u32, known: u32) -> Outcome<()> {
    if (argsz as usize) < size || flags & !known != 0 {
        return refuse(Errno::EINVAL, format!("argsz {argsz}, flags {flags:#x}"));
    }
    Ok(())
}
