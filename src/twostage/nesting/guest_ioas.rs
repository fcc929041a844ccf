// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's memory as one IOAS.

use crate::sync::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::{Arc, MutexGuard, Weak};

use vm_memory::bitmap::Bitmap;
use vm_memory::GuestMemoryMmap;

use super::{hw_info, Context, NestingError, Result};
use crate::iommufd::{Errno, HostIommu, HwInfo, MapTarget, ObjectId, Protection, UserMemory};
use crate::spec::pci::Bdf;

/// The guest's memory map (GPA → host memory) as one IOAS of the host, shared by every virtual
/// IOMMU of the guest and by devices without one, so that memory is pinned and accounted once.
///
/// The IOAS is destroyed with the last reference, unless it was adopted. Its lock is taken after
/// the lock of a virtual IOMMU's nesting.
///
/// ```
/// use std::sync::Arc;
/// use twostage::iommufd::{HostIommu, Protection, UserMemory};
/// use twostage::nesting::vtd::VtdNesting;
/// use twostage::nesting::{GuestIoas, NestingError};
/// use vm_memory::bitmap::Bitmap;
/// use vm_memory::GuestMemoryMmap;
///
/// /// `B` is the VMM's bitmap: `()`, `AtomicBitmap`, or its own.
/// fn host_side<B: Bitmap + Send + Sync + 'static>(
///     host: Arc<dyn HostIommu>,
///     ram: &GuestMemoryMmap<B>,
///     firmware: &UserMemory,
/// ) -> Result<(VtdNesting, VtdNesting), NestingError> {
///     let ioas = GuestIoas::new(host)?;
///     ioas.map_all(ram)?;
///     ioas.map(0xffe0_0000, firmware, Protection::READ_ONLY)?;
///     Ok((VtdNesting::new(ioas.clone()), VtdNesting::new(ioas)))
/// }
/// ```
#[derive(Debug)]
pub struct GuestIoas {
    host: Arc<dyn HostIommu>,
    id: ObjectId,
    /// Destroyed with the last reference; otherwise by somebody else.
    ours: bool,
    users: Mutex<Users>,
    mirrors: Mutex<Vec<Weak<dyn Mirrors>>>,
}

/// Who maps the same memory elsewhere, by what tables of the guest say.
pub(super) trait Mirrors: Debug + Send + Sync {
    /// The map of guest memory has changed: returns when nothing is mapped elsewhere that it does
    /// not have. Called without locks of the IOAS.
    fn memory_changed(&self) -> Result<()>;
}

/// An IOMMU with erratum 772415 may write through a read-only stage 2 when it nests.
#[derive(Debug, Default)]
pub(super) struct Users {
    /// Length in bytes of each mapping, and whether it may be written, by its GPA.
    map: BTreeMap<u64, (u64, bool)>,
    /// There are mappings that are not in `map`.
    unknown: bool,
    /// Start addresses of read-only mappings, in bytes.
    read_only: BTreeSet<u64>,
    /// The devices behind an IOMMU with the erratum.
    erratum: BTreeMap<ObjectId, Bdf>,
}

impl GuestIoas {
    /// Creates an empty IOAS on `host`.
    ///
    /// # Errors
    /// The host's error.
    pub fn new(host: Arc<dyn HostIommu>) -> Result<Arc<Self>> {
        let id = host.ioas_alloc().context(|| "allocating the IOAS".into())?;
        Ok(Arc::new(Self::with(host, id, true, Users::default())))
    }

    /// An IOAS that the VMM has already on `host`, with its memory mapped: it is neither mapped
    /// again nor destroyed here. `read_only` lists the start addresses (bytes) of its read-only
    /// mappings.
    ///
    /// What this maps besides is the host's to keep, and the VMM's to unmap. The VMM keeps the IOAS
    /// and its memory until the last reference is gone.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use twostage::iommufd::{HostIommu, ObjectId};
    /// use twostage::nesting::vtd::VtdNesting;
    /// use twostage::nesting::{GuestIoas, NestingError};
    ///
    /// /// `ioas` maps the RAM, and the firmware at 4 GiB - 2 MiB, which is read-only.
    /// fn host_side(host: Arc<dyn HostIommu>, ioas: u32) -> Result<VtdNesting, NestingError> {
    ///     let memory = GuestIoas::adopt(host, ObjectId(ioas), &[0xffe0_0000])?;
    ///     Ok(VtdNesting::new(memory))
    /// }
    /// ```
    ///
    /// # Errors
    /// The host has no IOAS `id`.
    pub fn adopt(host: Arc<dyn HostIommu>, id: ObjectId, read_only: &[u64]) -> Result<Arc<Self>> {
        host.ioas_iova_ranges(id).context(|| format!("adopting the IOAS {id}"))?;
        let read_only = read_only.iter().copied().collect();
        let users = Users { read_only, unknown: true, ..Users::default() };
        Ok(Arc::new(Self::with(host, id, false, users)))
    }

    /// As [`GuestIoas::adopt`], with all mappings of the IOAS: GPA and length in bytes, and what is
    /// allowed. Needed where the guest's tables are mirrored. A VMM that unmaps some of it later
    /// does so by [`GuestIoas::unmap`].
    ///
    /// # Errors
    /// The host has no IOAS `id`.
    pub fn adopt_mapped(
        host: Arc<dyn HostIommu>,
        id: ObjectId,
        map: &[(u64, u64, Protection)],
    ) -> Result<Arc<Self>> {
        host.ioas_iova_ranges(id).context(|| format!("adopting the IOAS {id}"))?;
        let mut users = Users::default();
        for (gpa, length, access) in map {
            users.mapped(*gpa, *length, *access);
        }
        Ok(Arc::new(Self::with(host, id, false, users)))
    }

    fn with(host: Arc<dyn HostIommu>, id: ObjectId, ours: bool, users: Users) -> Self {
        Self { host, id, ours, users: Mutex::new(users), mirrors: Mutex::default() }
    }

    /// The host it belongs to.
    pub fn host(&self) -> &Arc<dyn HostIommu> {
        &self.host
    }

    /// The object to which a device is attached that may access all guest memory.
    pub fn id(&self) -> ObjectId {
        self.id
    }

    /// Maps `memory` at `gpa` (bytes, aligned as the host requires), for every device. There the
    /// guest has it, whatever its region says ([`UserMemory::at_gpa`]): an IOVA here is a GPA.
    ///
    /// # Errors
    /// The host refuses; or the mapping is read-only and the IOMMU of a device cannot enforce that
    /// under nested translation (erratum 772415).
    pub fn map(&self, gpa: u64, memory: &UserMemory, access: Protection) -> Result<()> {
        let mut users = self.users();
        if !access.write {
            users.check_read_only(gpa)?;
        }
        self.host
            .ioas_map(self.id, &memory.clone().at_gpa(gpa), MapTarget::Fixed(gpa), access)
            .context(|| format!("mapping guest memory at {gpa:#x}"))?;
        users.mapped(gpa, memory.length(), access);
        drop(users);
        if let Err(error) = self.tell_mirrors() {
            log::error!("guest memory at {gpa:#x} is not mirrored yet: {error}");
        }
        Ok(())
    }

    /// Maps every region of `memory` where the guest has it, for reading and writing.
    ///
    /// # Errors
    /// As [`GuestIoas::map`]; what this call has mapped is unmapped then.
    pub fn map_all<B: Bitmap + Send + Sync + 'static>(
        &self,
        memory: &GuestMemoryMmap<B>,
    ) -> Result<()> {
        let mut mapped = Vec::new();
        for (gpa, region) in UserMemory::pieces(memory) {
            if let Err(error) = self.map(gpa, &region, Protection::READ_WRITE) {
                for (gpa, length) in mapped {
                    if let Err(error) = self.unmap(gpa, length) {
                        log::error!("guest memory at {gpa:#x} stays mapped: {error}");
                    }
                }
                return Err(error);
            }
            mapped.push((gpa, region.length()));
        }
        Ok(())
    }

    /// Unmaps `length` bytes at `gpa`, which must be whole mappings.
    ///
    /// # Errors
    /// A mapping would be split; or the host refuses, as nothing is mapped there. Where it fails in
    /// the middle, each mapping is tried by itself: those that it keeps are as before.
    pub fn unmap(&self, gpa: u64, length: u64) -> Result<()> {
        if self.users().splits(gpa, length) {
            // Nothing is to go; and a host that did so would leave what is mirrored of it.
            return Err(NestingError::PartOfMapping { gpa, length });
        }
        // First where it is mapped because it is mapped here.
        let mut left = self.users().unmapped(gpa, length);
        let result = self.tell_mirrors().and_then(|()| {
            let Err(error) = self.unmap_host(gpa, length) else {
                left = Users::default();
                return Ok(());
            };
            let known = !left.unknown && !left.map.is_empty();
            let mappings: Vec<_> =
                left.map.iter().map(|(gpa, (length, _))| (*gpa, *length)).collect();
            for (gpa, length) in mappings {
                if self.has_unmapped(gpa, length) {
                    left.map.remove(&gpa);
                    left.read_only.remove(&gpa);
                }
            }
            if known && left.map.is_empty() {
                Ok(())
            } else {
                Err(error)
            }
        });
        if result.is_err() {
            self.users().keep(left);
            // What is not mirrored again now is when the guest invalidates it.
            let _ = self.tell_mirrors();
        }
        result
    }

    fn unmap_host(&self, gpa: u64, length: u64) -> Result<()> {
        let unmapped = self.host.ioas_unmap(self.id, gpa, length);
        unmapped.context(|| format!("unmapping guest memory at {gpa:#x}")).map(drop)
    }

    /// Unmaps one mapping, which may be gone already.
    fn has_unmapped(&self, gpa: u64, length: u64) -> bool {
        let unmapped = self.host.ioas_unmap(self.id, gpa, length);
        unmapped.map_or_else(|error| error.errno == Errno::ENOENT, |_| true)
    }

    /// From now on `mirrors` follow changes of the map, while they live.
    pub(super) fn add_mirrors(&self, mirrors: Weak<dyn Mirrors>) -> Result<()> {
        if self.users().unknown {
            return Err(NestingError::UnknownMap(self.id));
        }
        let mut all = self.mirrors.lock();
        all.retain(|other| other.strong_count() > 0 && !other.ptr_eq(&mirrors));
        all.push(mirrors);
        Ok(())
    }

    fn tell_mirrors(&self) -> Result<()> {
        let all: Vec<_> = self.mirrors.lock().iter().filter_map(Weak::upgrade).collect();
        let mut result = Ok(());
        for mirrors in all {
            result = result.and(mirrors.memory_changed());
        }
        result
    }

    /// Its users, locked: mapping and adding devices exclude each other.
    pub(super) fn users(&self) -> MutexGuard<'_, Users> {
        self.users.lock()
    }

    /// Gives up this reference; returns the object to the last owner, if it is to be destroyed.
    pub(super) fn give_up(self: Arc<Self>) -> Option<ObjectId> {
        let mut last = Arc::into_inner(self)?;
        std::mem::take(&mut last.ours).then_some(last.id)
    }
}

impl Drop for GuestIoas {
    fn drop(&mut self) {
        if !self.ours {
            return;
        }
        // Retry once: nobody else will.
        if let Err(error) = self.host.destroy(self.id).or_else(|_| self.host.destroy(self.id)) {
            log::error!("guest memory stays mapped: {error}");
        }
    }
}

impl Users {
    /// Checks whether memory may be mapped read-only at `gpa`.
    fn check_read_only(&self, gpa: u64) -> Result<()> {
        match self.erratum.values().next() {
            Some(rid) => Err(NestingError::ReadOnlyErratum { gpa, rid: *rid }),
            None => Ok(()),
        }
    }

    /// `length` bytes are mapped at `gpa`.
    fn mapped(&mut self, gpa: u64, length: u64, access: Protection) {
        self.map.insert(gpa, (length, access.write));
        if !access.write {
            self.read_only.insert(gpa);
        }
    }

    /// `length` bytes at `gpa` are unmapped. Returns what was mapped there.
    fn unmapped(&mut self, gpa: u64, length: u64) -> Self {
        let last = gpa.saturating_add(length.saturating_sub(1));
        let mut removed = Self { unknown: self.unknown, ..Self::default() };
        let gone = |start: &u64| (gpa..=last).contains(start);
        removed.read_only = self.read_only.iter().copied().filter(gone).collect();
        removed.map = self.map.range(gpa..=last).map(|(gpa, mapping)| (*gpa, *mapping)).collect();
        self.read_only.retain(|start| !gone(start));
        self.map.retain(|start, _| !gone(start));
        removed
    }

    /// What was removed is mapped after all.
    fn keep(&mut self, removed: Self) {
        self.map.extend(removed.map);
        self.read_only.extend(removed.read_only);
    }

    /// Whether a mapping is partly in `length` bytes at `gpa`.
    fn splits(&self, gpa: u64, length: u64) -> bool {
        let end = gpa.saturating_add(length);
        let crosses = |at: u64| {
            let before = self.map.range(..at).next_back();
            before.is_some_and(|(start, (length, _))| start.saturating_add(*length) > at)
        };
        crosses(gpa) || crosses(end)
    }

    /// Calls `each` with the parts of `length` bytes at `gpa` that are mapped, ascending: GPA,
    /// length, and whether it may be written.
    pub fn mapped_parts(&self, gpa: u64, length: u64, mut each: impl FnMut(u64, u64, bool)) {
        let end = gpa.saturating_add(length);
        let before = self.map.range(..=gpa).next_back();
        let inside = self.map.range(gpa.saturating_add(1)..end.max(gpa.saturating_add(1)));
        for (start, (length, write)) in before.into_iter().chain(inside) {
            let (from, to) = ((*start).max(gpa), start.saturating_add(*length).min(end));
            if from < to {
                each(from, to - from, *write);
            }
        }
    }

    /// Adds `dev`, the guest's `rid`, which will nest on the IOAS, if that is allowed.
    pub fn add_device(&mut self, rid: Bdf, dev: ObjectId, info: &HwInfo) -> Result<()> {
        if !hw_info::writes_through_read_only(info) {
            return Ok(());
        }
        if let Some(gpa) = self.read_only.first() {
            return Err(NestingError::ReadOnlyErratum { gpa: *gpa, rid });
        }
        self.erratum.insert(dev, rid);
        Ok(())
    }

    /// `dev` no longer nests on the IOAS.
    pub fn remove_device(&mut self, dev: ObjectId) {
        self.erratum.remove(&dev);
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::bitmap::AtomicBitmap;
    use vm_memory::GuestAddress;

    use super::*;
    use crate::iommufd::fake::RecordingHost;
    use crate::iommufd::{iommu_hw_info_vtd, Extensions, HwCapabilities, HwInfoData, Verb};
    use crate::nesting::vtd::VtdNesting;

    #[test]
    fn an_adopted_ioas_is_neither_made_nor_mapped_nor_destroyed_here() {
        let host = RecordingHost::new(Extensions::default());
        let info = HwInfo {
            data: HwInfoData::Vtd(iommu_hw_info_vtd::default()),
            capabilities: HwCapabilities::new(),
            max_pasid_log2: 0,
        };
        let dev = host.add_device(0, info);
        let ioas = host.ioas_alloc().unwrap();
        host.take_log();
        let adopted = GuestIoas::adopt(host.clone(), ioas, &[]).unwrap();
        assert_eq!(host.take_log(), [format!("IOAS_IOVA_RANGES {ioas:?}")]);
        let nesting = VtdNesting::new(adopted.clone());
        nesting.add_device(Bdf::from_raw(8), dev).unwrap();
        // The last reference: nesting's.
        drop(adopted);
        nesting.shutdown().unwrap();
        assert_eq!(host.live_objects(), [ioas]);
        drop(GuestIoas::adopt(host.clone(), ioas, &[]).unwrap());
        assert_eq!(host.live_objects(), [ioas]);
    }

    #[test]
    fn adopting_what_is_no_ioas_is_refused() {
        let host = RecordingHost::new(Extensions::default());
        host.fail_next(Verb::IoasIovaRanges, Errno::ENOENT);
        let error = GuestIoas::adopt(host, ObjectId(7), &[]).unwrap_err();
        assert!(error.to_string().starts_with("adopting the IOAS 7"), "{error}");
    }

    #[test]
    fn the_read_only_mappings_of_an_adopted_ioas_count() {
        let host = RecordingHost::new(Extensions::default());
        let ioas = host.ioas_alloc().unwrap();
        let erratum = iommu_hw_info_vtd {
            flags: crate::iommufd::HW_INFO_VTD_ERRATA_772415_SPR17,
            ..Default::default()
        };
        let info = HwInfo {
            data: HwInfoData::Vtd(erratum),
            capabilities: HwCapabilities::new(),
            max_pasid_log2: 0,
        };
        let rid = Bdf::from_raw(8);
        let add = |read_only: &[u64]| {
            let adopted = GuestIoas::adopt(host.clone(), ioas, read_only).unwrap();
            let added = adopted.users().add_device(rid, ObjectId(9), &info);
            added
        };
        let refused = add(&[0x20_0000, 0x1000]).unwrap_err();
        assert!(matches!(refused, NestingError::ReadOnlyErratum { gpa: 0x1000, .. }), "{refused}");
        add(&[]).unwrap();
    }

    #[test]
    fn all_memory_is_mapped_or_none() {
        let host = RecordingHost::new(Extensions::default());
        let ioas = GuestIoas::new(host.clone()).unwrap();
        let ranges = [(GuestAddress(0), 0x8000), (GuestAddress(0x10_0000), 0x4000)];
        let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges).unwrap();
        host.take_log();
        ioas.map_all(&memory).unwrap();
        let id = ioas.id();
        let low = format!("{id:?} 0x0+0x8000");
        let high = format!("IOAS_MAP {id:?} 0x100000+0x4000 rw");
        assert_eq!(host.take_log(), [format!("IOAS_MAP {low} rw"), high]);
        host.fail_nth(1, Errno::ENOMEM);
        let error = ioas.map_all(&memory).unwrap_err();
        assert!(error.to_string().starts_with("mapping guest memory at 0x100000"), "{error}");
        assert_eq!(host.take_log()[2..], [format!("IOAS_UNMAP {low}")]);
    }
    /// Of three mappings one is gone already, one goes, and one stays.
    #[test]
    fn a_host_that_fails_in_the_middle_keeps_what_it_does_not_unmap() {
        let memory = GuestMemoryMmap::<()>::from_ranges(
            &[0, 0x1000, 0x2000].map(|start| (GuestAddress(start), 0x1000)),
        )
        .unwrap();
        let mapped = |ioas: &GuestIoas| {
            let mut parts = Vec::new();
            ioas.users().mapped_parts(0, 0x3000, |gpa, length, _| parts.push((gpa, length)));
            parts
        };
        for (errnos, left) in [
            (&[Errno::EIO, Errno::ENOENT, Errno::EBUSY][..], vec![(0x1000, 0x1000)]),
            (&[Errno::EIO][..], vec![]),
        ] {
            let host = RecordingHost::new(Extensions::default());
            let ioas = GuestIoas::new(host.clone()).unwrap();
            ioas.map_all(&memory).unwrap();
            errnos.iter().for_each(|errno| host.fail_next(Verb::IoasUnmap, *errno));
            assert_eq!(ioas.unmap(0, 0x3000).is_err(), !left.is_empty());
            assert_eq!(mapped(&ioas), left);
        }
        // A mapping would be split: the host is not asked.
        let host = RecordingHost::new(Extensions::default());
        let ioas = GuestIoas::new(host.clone()).unwrap();
        ioas.map_all(&memory).unwrap();
        host.take_log();
        for part in [(0x800, 0x1000), (0x1000, 0x800)] {
            let error = ioas.unmap(part.0, part.1).unwrap_err();
            assert!(matches!(error, NestingError::PartOfMapping { .. }), "{error}");
            assert_eq!((mapped(&ioas).len(), host.take_log()), (3, vec![]));
        }
    }
}
