// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The verbs of an IOAS, and the IOAS that VFIO's ioctls implicitly work on.

use std::ops::RangeInclusive;
use std::sync::Arc;

use super::object::{Ioas, Object};
use super::Objects;
use crate::host::dma_buf::DmaBuf;
use crate::host::refusal::{allocate, refuse, Outcome};
use crate::ioas::{Area, Pages, Piece, Source, PAGE_SIZE};
use twostage::iommufd::{Errno, IovaRanges, MapTarget, ObjectId, Protection};

/// The arguments of a mapping.
#[derive(Debug, Clone)]
pub(crate) struct MapRequest {
    /// The IOVA.
    pub target: MapTarget,
    /// The memory.
    pub source: Source,
    /// In bytes.
    pub length: u64,
    /// What devices may do.
    pub protection: Protection,
}

impl MapRequest {
    /// The checks of `IOMMU_IOAS_MAP` and `IOMMU_IOAS_MAP_FILE` that precede those of the IOAS.
    pub fn check(target: MapTarget, length: u64, protection: Protection) -> Outcome<()> {
        check_numbers(target, length)?;
        check_protection(protection)
    }
}

/// The iommufd's state as a VFIO container.
#[derive(Debug, Default)]
pub(crate) struct VfioCompat {
    /// The IOAS of VFIO's ioctls.
    pub ioas: Option<ObjectId>,
    /// A device without an IOMMU was added.
    pub no_iommu: bool,
}

impl Objects {
    /// `IOMMU_IOAS_ALLOC`.
    pub fn ioas_alloc(&mut self) -> Outcome<ObjectId> {
        self.table.insert(Object::Ioas(Ioas::default()))
    }

    /// `IOMMU_IOAS_ALLOW_IOVAS`. Ranges are read one by one, up to the first invalid one.
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
        Ok(IovaRanges { allowed: ioas.space.usable(), alignment: ioas.alignment })
    }

    /// The pages mapped by the IOASes: each set of pages once.
    #[cfg(feature = "selftest")]
    pub fn pages(&self) -> Vec<Arc<Pages>> {
        let mut all = std::collections::BTreeMap::new();
        for (_, object) in self.table.iter() {
            let Object::Ioas(ioas) = object else { continue };
            let areas = ioas.space.areas();
            all.extend(areas.map(|(_, area)| (Arc::as_ptr(&area.pages), area.pages.clone())));
        }
        all.into_values().collect()
    }

    /// A device's memory was revoked: its mappings lead nowhere from now on.
    pub fn lose_dma_buf(&mut self, buf: &DmaBuf) -> Outcome<()> {
        let ioases = self.table.iter().filter_map(|(id, object)| match object {
            Object::Ioas(ioas) => Some((id, ioas)),
            _ => None,
        });
        let mut touched = Vec::new();
        for (id, ioas) in ioases {
            for (start, area) in ioas.space.areas() {
                if area.pages.dma_buf().is_some_and(|of| std::ptr::eq(&**of, buf)) {
                    area.pages.lose();
                    ioas.stage2.remove_in(start..=area.last);
                    touched.push(id);
                }
            }
        }
        touched.dedup();
        touched.into_iter().try_for_each(|ioas| self.stage2_changed(ioas))
    }

    /// Maps `length` bytes of memory, checked by [`MapRequest::check`]. Without a HWPT the memory
    /// is not accessed.
    pub fn ioas_map(&mut self, ioas: ObjectId, request: MapRequest) -> Outcome<u64> {
        let MapRequest { target, source, length, protection } = request;
        let object = self.table.ioas(ioas)?;
        check_source(&source, length)?;
        if let Source::DmaBuf(buf, _) = &source {
            buf.check()?;
        }
        let iova = find_iova(object, target, length, source.start())?;
        check_page_offset(object, source.start())?;
        allocate("the pages of a mapping")?;
        let (mode, account) = (self.rlimit_mode, self.account.clone());
        let pages = Arc::new(Pages::new(source, length, protection.write, mode, account));
        self.insert_pieces(ioas, iova, vec![Piece { pages, offset: 0, length }], protection)?;
        Ok(iova)
    }

    /// `IOMMU_IOAS_COPY`. Makes one mapping for each source mapping.
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
        let start = pieces.first().map_or(0, |piece| piece.pages.start_of(piece.offset));
        let iova = find_iova(object, target, length, start)?;
        for piece in &pieces {
            if protection.write && !piece.pages.writable() {
                return refuse(
                    Errno::EPERM,
                    format!("IOAS {src} maps part of {length:#x} bytes at {src_iova:#x} read-only"),
                );
            }
            check_page_offset(object, piece.pages.start_of(piece.offset))?;
        }
        self.insert_pieces(dst, iova, pieces, protection)?;
        Ok(iova)
    }

    /// `IOMMU_OPTION_HUGE_PAGES`, read.
    pub fn huge_pages(&self, ioas: ObjectId) -> Outcome<bool> {
        Ok(self.table.ioas(ioas)?.huge_pages)
    }

    /// `IOMMU_OPTION_HUGE_PAGES`, set. Without huge pages, everything is aligned to the host's
    /// pages.
    ///
    /// # Errors
    /// `EINVAL` HWPTs have mappings already; `EADDRINUSE` a mapping is not aligned.
    pub fn set_huge_pages(&mut self, ioas: ObjectId, allowed: bool) -> Outcome<()> {
        let object = self.table.ioas_mut(ioas)?;
        if object.huge_pages == allowed {
            return Ok(());
        }
        if !allowed && !object.hwpts.is_empty() && object.space.area_count() > 0 {
            return refuse(Errno::EINVAL, "HWPTs may hold huge pages already");
        }
        object.huge_pages = allowed;
        let aligned = self.align(ioas);
        if aligned.is_err() {
            self.table.ioas_mut(ioas)?.huge_pages = !allowed;
        }
        aligned
    }

    /// Determines the alignment needed by all users of the IOAS.
    ///
    /// # Errors
    /// `EADDRINUSE` a mapping has less: the alignment is not changed.
    pub(super) fn align(&mut self, ioas: ObjectId) -> Outcome<()> {
        let object = self.table.ioas(ioas)?;
        let mut alignment = if object.huge_pages { 1 } else { PAGE_SIZE };
        for hwpt in &object.hwpts {
            alignment = alignment.max(self.table.hwpt_paging(*hwpt)?.domain.page_size());
        }
        for access in &object.accesses {
            alignment = alignment.max(self.table.access(*access)?.alignment());
        }
        if alignment > object.alignment {
            object.space.check_alignment(alignment)?;
        }
        self.table.ioas_mut(ioas)?.alignment = alignment;
        Ok(())
    }

    /// Maps `pieces` adjacently from `iova` on, where space was found for all.
    fn insert_pieces(
        &mut self,
        ioas: ObjectId,
        iova: u64,
        pieces: Vec<Piece>,
        protection: Protection,
    ) -> Outcome<()> {
        let mut start = iova;
        let area = |Piece { pages, offset, length }: Piece| {
            let (first, last) = (start, start + (length - 1));
            // Past 2^64 only after the last piece: the whole range was checked to fit.
            start = last.wrapping_add(1);
            allocate("an area")?;
            Ok((first, Area::new(last, pages, offset, protection)))
        };
        let areas: Outcome<Vec<_>> = pieces.into_iter().map(area).collect();
        self.add_areas(ioas, areas?)
    }

    /// `IOMMU_VFIO_IOAS_GET`: the IOAS of VFIO's ioctls.
    ///
    /// # Errors
    /// `ENODEV` there is none.
    pub fn vfio_ioas(&self) -> Outcome<ObjectId> {
        match self.vfio.ioas {
            Some(ioas) => Ok(ioas),
            None => refuse(Errno::ENODEV, "VFIO's ioctls have no IOAS"),
        }
    }

    /// `IOMMU_VFIO_IOAS_SET`, `IOMMU_VFIO_IOAS_CLEAR`.
    pub fn set_vfio_ioas(&mut self, ioas: Option<ObjectId>) -> Outcome<()> {
        if let Some(ioas) = ioas {
            self.table.ioas(ioas)?;
        }
        self.vfio.ioas = ioas;
        Ok(())
    }

    /// Creates an IOAS for VFIO's ioctls unless they have one: a group was added to the container.
    ///
    /// # Errors
    /// `EINVAL` it has a device without an IOMMU.
    pub fn create_vfio_ioas(&mut self) -> Outcome<()> {
        if self.vfio.no_iommu {
            return refuse(Errno::EINVAL, "the container has a device without an IOMMU");
        }
        if self.vfio.ioas.is_none() {
            self.vfio.ioas = Some(self.ioas_alloc()?);
        }
        Ok(())
    }

    /// A device without an IOMMU was added to the container.
    ///
    /// # Errors
    /// `EINVAL` VFIO's ioctls have an IOAS.
    pub fn set_vfio_no_iommu(&mut self) -> Outcome<()> {
        if self.vfio.ioas.is_some() {
            return refuse(Errno::EINVAL, "the container has a device with an IOMMU");
        }
        self.vfio.no_iommu = true;
        Ok(())
    }

    /// Whether a device without an IOMMU was added to the container.
    pub fn vfio_no_iommu(&self) -> bool {
        self.vfio.no_iommu
    }

    /// Whether every HWPT of the IOAS makes DMA coherent with caches, whatever a device requests.
    pub fn enforces_coherency(&self, ioas: ObjectId) -> Outcome<bool> {
        let enforces = |hwpt: &ObjectId| {
            self.table.hwpt_paging(*hwpt).is_ok_and(|hwpt| hwpt.domain.enforces_coherency())
        };
        Ok(self.table.ioas(ioas)?.hwpts.iter().all(enforces))
    }

    /// The page sizes that VFIO reports for the IOAS: a bit for each.
    pub fn vfio_page_sizes(&self, ioas: ObjectId) -> Outcome<u64> {
        let ioas = self.table.ioas(ioas)?;
        let mut sizes = u64::MAX;
        for hwpt in &ioas.hwpts {
            sizes &= self.table.hwpt_paging(*hwpt)?.domain.page_sizes();
        }
        if sizes & (PAGE_SIZE - 1) != 0 {
            // What supports smaller pages supports the host's.
            sizes = sizes & !(PAGE_SIZE - 1) | PAGE_SIZE;
        }
        Ok(sizes.max(ioas.alignment))
    }

    /// Splits the area that contains `last` after it, so that a part can be unmapped. Does nothing
    /// if nothing is mapped there, or at the last IOVA of an area.
    ///
    /// # Errors
    /// As [`crate::ioas::IovaSpace::split`]; also `EINVAL` if a HWPT may have a huge page there.
    pub fn cut(&mut self, ioas: ObjectId, last: u64) -> Outcome<()> {
        let object = self.table.ioas_mut(ioas)?;
        let huge_pages = object.huge_pages && !object.hwpts.is_empty();
        if object.space.split(last, object.alignment, huge_pages)? {
            object.stage2.split(last);
        }
        Ok(())
    }

    /// The IOAS `id` was destroyed.
    pub(super) fn forget_vfio_ioas(&mut self, id: ObjectId) {
        self.vfio.ioas = self.vfio.ioas.filter(|ioas| *ioas != id);
    }
}

/// Whether `length` bytes of `source` end within the address space, or the file.
fn check_source(source: &Source, length: u64) -> Outcome<()> {
    let start = source.start();
    let past_end = || refuse(Errno::EOVERFLOW, format!("{start:#x} + {length:#x} is past 2^64"));
    match source {
        Source::File(..) | Source::DmaBuf(..)
            if length > 0 && start.checked_add(length - 1).is_none() =>
        {
            past_end()
        }
        Source::Memory(_) | Source::User(..) if start.checked_add(length).is_none() => past_end(),
        _ if length == 0 || length > u64::MAX - PAGE_SIZE => {
            refuse(Errno::EINVAL, format!("length {length:#x}"))
        }
        _ => Ok(()),
    }
}

/// The largest number means "all" in some verbs and is invalid in the others.
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

fn find_iova(ioas: &Ioas, target: MapTarget, length: u64, start: u64) -> Outcome<u64> {
    let alignment = ioas.alignment;
    if !length.is_multiple_of(alignment) {
        return refuse(
            Errno::EINVAL,
            format!("length {length:#x} is not a multiple of {alignment:#x}"),
        );
    }
    match target {
        MapTarget::Fixed(iova) => {
            ioas.space.check_free(iova, length, alignment)?;
            Ok(iova)
        }
        MapTarget::Anywhere => ioas.space.place(length, start, alignment),
    }
}

fn check_page_offset(ioas: &Ioas, start: u64) -> Outcome<()> {
    let alignment = ioas.alignment;
    if !(start % PAGE_SIZE).is_multiple_of(alignment) {
        return refuse(
            Errno::EINVAL,
            format!("memory at {start:#x} is not aligned to {alignment:#x}"),
        );
    }
    Ok(())
}
