// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The verbs of an IOAS.

use std::ops::RangeInclusive;
use std::sync::Arc;

use super::{Object, Objects};
use crate::emulated::ioas::{range_of, Area, IovaSpace, Pages, Piece, PAGE_SIZE};
use crate::emulated::refusal::{refuse, Outcome};
use crate::emulated::stage2::{Mapping, Stage2};
use crate::iommufd::{Errno, IovaRanges, MapTarget, ObjectId, Protection, UserMemory};

/// An I/O address space.
#[derive(Debug, Default)]
pub(crate) struct Ioas {
    /// What is mapped, reserved and allowed.
    pub space: IovaSpace,
    /// The same mappings as DMA finds them, shared by all HWPTs of the IOAS.
    pub stage2: Arc<Stage2>,
    /// HWPTs of the IOAS, oldest first.
    pub hwpts: Vec<ObjectId>,
}

impl Ioas {
    /// What IOVAs, lengths and addresses of memory must be multiples of, in bytes: the smallest
    /// page of the HWPTs, once there is one.
    pub fn alignment(&self) -> u64 {
        if self.hwpts.is_empty() {
            1
        } else {
            PAGE_SIZE
        }
    }
}

/// What to map, and where.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MapRequest {
    /// The IOVA.
    pub target: MapTarget,
    /// Address of the memory in the user's address space.
    pub user_va: u64,
    /// In bytes.
    pub length: u64,
    /// What devices may do.
    pub protection: Protection,
}

impl Objects {
    /// `IOMMU_IOAS_ALLOC`.
    pub fn ioas_alloc(&mut self) -> Outcome<ObjectId> {
        self.table.insert(Object::Ioas(Ioas::default()))
    }

    /// `IOMMU_IOAS_ALLOW_IOVAS`. Ranges are read one after the other, up to the first bad one.
    pub fn ioas_allow_iovas(
        &mut self,
        ioas: ObjectId,
        ranges: impl IntoIterator<Item = Outcome<RangeInclusive<u64>>>,
    ) -> Outcome<()> {
        self.table.ioas_mut(ioas)?.space.set_allowed(ranges)
    }

    /// `IOMMU_IOAS_IOVA_RANGES`.
    pub fn ioas_iova_ranges(&self, ioas: ObjectId) -> Outcome<IovaRanges> {
        let ioas = self.table.ioas(ioas)?;
        Ok(IovaRanges { allowed: ioas.space.usable(), alignment: ioas.alignment() })
    }

    /// `IOMMU_IOAS_MAP`. `memory` is asked for last.
    ///
    /// Linux does not touch the memory until the IOAS has a HWPT, so that a bad address can be
    /// mapped and fails later; here the owner of the memory goes with the mapping, so it must be
    /// known at once.
    pub fn ioas_map(
        &mut self,
        ioas: ObjectId,
        request: MapRequest,
        memory: impl FnOnce() -> Outcome<UserMemory>,
    ) -> Outcome<u64> {
        let MapRequest { target, user_va, length, protection } = request;
        check_numbers(target, length)?;
        check_protection(protection)?;
        let object = self.table.ioas(ioas)?;
        if user_va.checked_add(length).is_none() {
            return refuse(Errno::EOVERFLOW, format!("{user_va:#x} + {length:#x} is past 2^64"));
        }
        if length == 0 || length > u64::MAX - PAGE_SIZE {
            return refuse(Errno::EINVAL, format!("length {length:#x}"));
        }
        let iova = find_iova(object, target, length, user_va)?;
        check_page_offset(object, user_va)?;
        self.check_filling(object, protection)?;
        let pages = Pages::new(memory()?, protection.write, self.account.clone());
        let piece = Piece { pages: Arc::new(pages), offset: 0, length };
        self.insert_pieces(ioas, iova, vec![piece], protection)?;
        Ok(iova)
    }

    /// `IOMMU_IOAS_COPY`. Makes one mapping for each that it copies from.
    pub fn ioas_copy(
        &mut self,
        dst: ObjectId,
        target: MapTarget,
        src: ObjectId,
        src_iova: u64,
        length: u64,
        protection: Protection,
    ) -> Outcome<u64> {
        check_numbers(target, length)?;
        check_numbers(MapTarget::Fixed(src_iova), length)?;
        check_protection(protection)?;
        let pieces = self.table.ioas(src)?.space.pieces(src_iova, length)?;
        let object = self.table.ioas(dst)?;
        let user_va = pieces.first().map_or(0, |piece| piece.pages.user_va(piece.offset));
        let iova = find_iova(object, target, length, user_va)?;
        for piece in &pieces {
            if protection.write && !piece.pages.writable() {
                return refuse(
                    Errno::EPERM,
                    format!("IOAS {src} maps part of {length:#x} bytes at {src_iova:#x} read-only"),
                );
            }
            check_page_offset(object, piece.pages.user_va(piece.offset))?;
        }
        self.check_filling(object, protection)?;
        self.insert_pieces(dst, iova, pieces, protection)?;
        Ok(iova)
    }

    /// `IOMMU_IOAS_UNMAP`.
    pub fn ioas_unmap(&mut self, ioas: ObjectId, iova: u64, length: u64) -> Outcome<u64> {
        let object = self.table.ioas_mut(ioas)?;
        let areas = if (iova, length) == (0, u64::MAX) {
            object.space.take_all()
        } else {
            check_numbers(MapTarget::Fixed(iova), length)?;
            if length == 0 {
                return refuse(Errno::EINVAL, "length 0");
            }
            let Some(range) = range_of(iova, length) else {
                return refuse(Errno::EOVERFLOW, format!("{iova:#x} + {length:#x} is past 2^64"));
            };
            object.space.take(&range)?
        };
        self.drop_areas(ioas, areas)
    }

    /// Pins what the IOAS maps, for its first HWPT.
    pub(super) fn fill(&self, ioas: ObjectId) -> Outcome<()> {
        for (start, area) in self.table.ioas(ioas)?.space.areas() {
            area.pages.pin(area.offset, area.last - start + 1);
        }
        Ok(())
    }

    /// Unpins what the IOAS maps, after its last HWPT.
    pub(super) fn unfill(&self, ioas: ObjectId) -> Outcome<()> {
        for (start, area) in self.table.ioas(ioas)?.space.areas() {
            area.pages.unpin(area.offset, area.last - start + 1);
        }
        Ok(())
    }

    /// Finishes the unmapping of areas already taken from the IOAS; returns their size in bytes.
    /// When it returns no DMA uses them.
    pub(super) fn drop_areas(&mut self, ioas: ObjectId, areas: Vec<(u64, Area)>) -> Outcome<u64> {
        let object = self.table.ioas(ioas)?;
        for (start, _) in &areas {
            object.stage2.remove(*start);
        }
        let filled = !object.hwpts.is_empty();
        if filled && !areas.is_empty() {
            for unit in self.machine.units() {
                unit.hardware.stage2_unmapped(&object.stage2);
            }
        }
        let mut bytes = 0u64;
        for (start, area) in &areas {
            let length = area.last - start + 1;
            if filled {
                area.pages.unpin(area.offset, length);
            }
            bytes = bytes.saturating_add(length);
        }
        Ok(bytes)
    }

    /// Whether the HWPTs of the IOAS can hold a mapping of this protection.
    fn check_filling(&self, ioas: &Ioas, protection: Protection) -> Outcome<()> {
        for hwpt in &ioas.hwpts {
            if !protection.write && self.table.hwpt_paging(*hwpt)?.domain.only_writable {
                return refuse(
                    Errno::EINVAL,
                    format!("nesting parent {hwpt} cannot hold read-only mappings"),
                );
            }
        }
        Ok(())
    }

    /// Maps `pieces` one after the other from `iova` on, where room was found for all.
    fn insert_pieces(
        &mut self,
        ioas: ObjectId,
        iova: u64,
        pieces: Vec<Piece>,
        protection: Protection,
    ) -> Outcome<()> {
        let object = self.table.ioas_mut(ioas)?;
        let mut areas = Vec::with_capacity(pieces.len());
        let mut start = iova;
        for Piece { pages, offset, length } in pieces {
            let memory = match pages.piece(offset, length) {
                Ok(memory) => memory,
                Err(error) => return refuse(Errno::EFAULT, error.to_string()),
            };
            let last = start + (length - 1);
            let mapping = Mapping { start, last, memory, protection };
            areas.push((mapping, Area { last, pages, offset, protection }));
            // Past 2^64 only after the last piece: the whole range was found to fit.
            start = last.wrapping_add(1);
        }
        let pin = !object.hwpts.is_empty();
        for (mapping, area) in areas {
            if pin {
                area.pages.pin(area.offset, mapping.last - mapping.start + 1);
            }
            object.space.insert(mapping.start, area);
            object.stage2.insert(mapping);
        }
        Ok(())
    }
}

/// The largest number stands for "all" in some verbs and for nothing in the others.
fn check_numbers(target: MapTarget, length: u64) -> Outcome<()> {
    if target == MapTarget::Fixed(u64::MAX) || length == u64::MAX {
        return refuse(Errno::EOVERFLOW, "the IOVA or the length is 2^64-1");
    }
    Ok(())
}

fn check_protection(protection: Protection) -> Outcome<()> {
    if !protection.read && !protection.write {
        return refuse(Errno::EINVAL, "a mapping is readable or writable");
    }
    Ok(())
}

fn find_iova(ioas: &Ioas, target: MapTarget, length: u64, user_va: u64) -> Outcome<u64> {
    let alignment = ioas.alignment();
    if !length.is_multiple_of(alignment) {
        return refuse(
            Errno::EINVAL,
            format!("length {length:#x} is no multiple of {alignment:#x}"),
        );
    }
    match target {
        MapTarget::Fixed(iova) => {
            ioas.space.check_free(iova, length, alignment)?;
            Ok(iova)
        }
        MapTarget::Anywhere => ioas.space.place(length, user_va, alignment),
    }
}

fn check_page_offset(ioas: &Ioas, user_va: u64) -> Outcome<()> {
    let alignment = ioas.alignment();
    if !(user_va % PAGE_SIZE).is_multiple_of(alignment) {
        return refuse(
            Errno::EINVAL,
            format!("memory at {user_va:#x} is not aligned to {alignment:#x}"),
        );
    }
    Ok(())
}
