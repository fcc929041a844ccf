// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `VFIO_IOMMU_MAP_DMA` and `VFIO_IOMMU_UNMAP_DMA`.

use std::mem::size_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::super::UserSpace;
use crate::host::objects::{MapRequest, Unmap};
use crate::host::refusal::{refuse, Outcome};
use crate::ioas::Source;
use crate::EmulatedHost;
use twostage::iommufd::{Errno, MapTarget, Protection};
use vfio_bindings::bindings::vfio::{
    VFIO_DMA_MAP_FLAG_READ as MAP_READ, VFIO_DMA_MAP_FLAG_WRITE as MAP_WRITE,
    VFIO_DMA_UNMAP_FLAG_ALL as UNMAP_ALL,
};

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

pub(super) fn map(host: &EmulatedHost, argument: u64, user: &dyn UserSpace) -> Outcome<()> {
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

pub(super) fn unmap(host: &EmulatedHost, argument: u64, user: &dyn UserSpace) -> Outcome<()> {
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
