// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A DMA port as `vm_memory`'s `Iommu`, for devices written against that crate.

use std::sync::Arc;
use twostage::sync::Mutex;

use vm_memory::iommu::{Error, IotlbIterator, IovaRange, MappedRange};
use vm_memory::{GuestAddress, Iommu, Iotlb, Permissions};

use crate::dma::section::Section;
use crate::dma::{DmaAttributes, DmaPort};

/// One requester's DMA as a [`vm_memory::Iommu`] for the duration of one critical section: with it
/// and the guest's memory in a [`vm_memory::IommuMemory`], a device that knows nothing of IOMMUs
/// works behind one.
///
/// The memory must have what the IOAS maps at the same guest's address
/// ([`UserMemory::gpa`](twostage::iommufd::UserMemory::gpa)): translations lead there.
///
/// `vm_memory` translates first and accesses later. So the section is entered when this is created
/// and left when it is dropped, and a [`vm_memory::IommuMemory`] that owns it lends no slice for
/// longer: an invalidation returns only when no access by an older translation is in progress.
/// Meanwhile invalidations **wait**, and vCPUs with them. Create it for a bounded piece of work,
/// such as one pass over a virtqueue's rings; never hold it across I/O or any other wait, and do
/// not invalidate while holding it. Faults are reported when it is dropped. For data,
/// [`DmaPort::read`] and [`DmaPort::write`] are several times as fast: they do not store a
/// translation to look it up again.
///
/// What was translated for writing is marked in the bitmaps of the memory that the IOAS maps when
/// this is dropped. Before the writes would be too early: who copies marked pages might clear the
/// mark and copy the old bytes. So the last copy is made when no section is open. (An
/// `IommuMemory` itself marks a bitmap of IOVAs.) [`DmaMemory`](crate::DmaMemory) marks each write
/// at once, and needs no `IommuMemory`.
///
/// ```
/// use twostage_emulated::DmaAttributes;
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, IommuMemory};
/// # use std::sync::Arc;
/// # use twostage::iommufd::{HostIommu, MapTarget, Protection, UserMemory};
/// # use twostage::spec::pci::Bdf;
/// # use twostage_emulated::{DeviceConfig, EmulatedHost, VtdUnit, VtdUnitConfig};
/// # let host = EmulatedHost::new();
/// # let unit = host.add_unit(VtdUnit::new(VtdUnitConfig::default()));
/// # host.add_device("disk", unit, Bdf::new(0, 4, 0).ok_or("no slot")?, DeviceConfig::default())?;
/// # let (dev, ioas) = (host.device_bind("disk")?, host.ioas_alloc()?);
/// # let region = vm_memory::GuestRegionMmap::<()>::from_range(GuestAddress(0), 0x1000, None)?;
/// # let region = Arc::new(region);
/// # let whole = UserMemory::whole(region.clone());
/// # host.ioas_map(ioas, &whole, MapTarget::Fixed(0x8000), Protection::READ_WRITE)?;
/// # host.device_attach(dev, None, ioas)?;
///
/// // The device "disk" is attached to an IOAS with the guest's memory at 0x8000.
/// let memory = GuestMemoryMmap::from_arc_regions(vec![region])?;
/// let mut port = host.dma_port("disk").ok_or("no such device")?;
/// let section = port.section(DmaAttributes::default());
/// // What a virtqueue gets in place of `memory`:
/// let behind = IommuMemory::new(memory.clone(), section, true, ());
/// behind.write_obj(7u32, GuestAddress(0x8010))?;
/// drop(behind);
/// assert_eq!(memory.read_obj::<u32>(GuestAddress(0x10))?, 7);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct PortIommu<'a> {
    attributes: DmaAttributes,
    state: Mutex<State<'a>>,
}

#[derive(Debug)]
struct State<'a> {
    section: Section<'a>,
    /// What was translated in this section, and is valid until its end.
    iotlb: Arc<Iotlb>,
    /// What was translated for writing, if anybody records writes.
    written: Vec<MappedRange>,
}

impl Drop for State<'_> {
    fn drop(&mut self) {
        for MappedRange { base, length } in self.written.drain(..) {
            self.section.mark_dirty(base.0, length as u64);
        }
    }
}

impl DmaPort {
    /// Starts a critical section in which every request has `attributes`.
    pub fn section(&mut self, attributes: DmaAttributes) -> PortIommu<'_> {
        let state = State { section: self.enter(), iotlb: Arc::default(), written: Vec::new() };
        PortIommu { attributes, state: Mutex::new(state) }
    }
}

impl State<'_> {
    /// Puts translations of `iova` to `end` for `access` into the IOTLB.
    fn fill(
        &mut self,
        attributes: DmaAttributes,
        iova: u64,
        end: u64,
        access: Permissions,
    ) -> Result<(), String> {
        // One that somebody still iterates over is left to them, and a new one starts empty.
        let mut iotlb = Arc::into_inner(std::mem::take(&mut self.iotlb)).unwrap_or_default();
        let mut at = iova;
        while at < end {
            let piece = self.section.translate(attributes, at, access);
            let piece = piece.map_err(|error| error.to_string())?;
            let (address, length) = piece.ok_or("no access requested")?;
            // It may exceed the request, but not the address space.
            let length = length.min((u64::MAX - at) as usize);
            iotlb
                .set_mapping(GuestAddress(at), address, length, access)
                .map_err(|error| error.to_string())?;
            // At least one byte: `at` is below `end`.
            at += length as u64;
        }
        self.iotlb = Arc::new(iotlb);
        Ok(())
    }
}

impl Iommu for PortIommu<'_> {
    type IotlbGuard<'b>
        = Arc<Iotlb>
    where
        Self: 'b;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Self::IotlbGuard<'_>>, Error> {
        let cannot =
            |reason| Error::CannotResolve { iova_range: IovaRange { base: iova, length }, reason };
        let not_covered = |_| cannot("the translations do not cover the range".into());
        let end = iova.0.checked_add(length as u64);
        let end = end.ok_or_else(|| cannot("past the end of the address space".into()))?;
        if length == 0 {
            return Iotlb::lookup(Arc::default(), iova, 0, access).map_err(not_covered);
        }
        let mut state = self.state.lock();
        let found = match Iotlb::lookup(Arc::clone(&state.iotlb), iova, length, access) {
            Ok(found) => found,
            Err(_) => {
                state.fill(self.attributes, iova.0, end, access).map_err(cannot)?;
                let filled = Iotlb::lookup(Arc::clone(&state.iotlb), iova, length, access);
                filled.map_err(not_covered)?
            }
        };
        if access.has_write() && state.section.records_writes() {
            state.written.extend(found.clone());
        }
        Ok(found)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::units::hardware::{CacheTag, Hardware, Translation};
    use crate::units::stage2::{Mapping, Stage2};
    use crate::{DeviceConfig, EmulatedHost, VtdUnit, VtdUnitConfig};
    use twostage::iommufd::{HostIommu, Protection, UserMemory};
    use twostage::nesting::GuestIoas;
    use twostage::spec::pci::Bdf;
    use vm_memory::bitmap::AtomicBitmap;
    use vm_memory::{
        Bytes, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
        GuestRegionMmap, IommuMemory,
    };

    /// Two, far apart.
    pub fn regions() -> [Arc<GuestRegionMmap>; 2] {
        [0x10_0000, 0x80_0000].map(|base| {
            Arc::new(GuestRegionMmap::<()>::from_range(GuestAddress(base), 0x4000, None).unwrap())
        })
    }

    /// A port to the regions in reverse order: IOVA 0x1000 is in the second, followed by the first.
    pub fn port(regions: &[Arc<GuestRegionMmap>; 2]) -> DmaPort {
        let stage2 = Arc::new(Stage2::default());
        for (start, region) in [(0x1000, &regions[1]), (0x5000, &regions[0])] {
            stage2.insert(Mapping {
                start,
                last: start + region.len() - 1,
                memory: UserMemory::whole(Arc::clone(region)),
                protection: Protection::READ_WRITE,
            });
        }
        let unit = VtdUnit::new(VtdUnitConfig::default());
        unit.install(8, None, Translation { tag: CacheTag(1), tables: None, stage2, dirty: None });
        unit.port(8)
    }

    #[test]
    fn memory_behind_the_iommu_is_reached_by_iova() {
        let regions = regions();
        let memory = GuestMemoryMmap::from_arc_regions(regions.to_vec()).unwrap();
        let mut port = port(&regions);
        let section = port.section(DmaAttributes::default());
        let behind = IommuMemory::new(memory.clone(), section, true, ());

        let data: Vec<u8> = (0..0x6000u32).map(|i| (i % 253) as u8).collect();
        behind.write_slice(&data, GuestAddress(0x1800)).unwrap();
        let mut back = vec![0; data.len()];
        behind.read_slice(&mut back, GuestAddress(0x1800)).unwrap();
        assert_eq!(back, data);
        memory.read_slice(&mut back[..0x800], GuestAddress(0x80_0800)).unwrap();
        assert_eq!(back[..0x800], data[..0x800]);
        memory.read_slice(&mut back[..0x800], GuestAddress(0x10_0000)).unwrap();
        assert_eq!(back[..0x800], data[0x3800..0x4000]);
        assert!(behind.write_slice(&data, GuestAddress(0x4000)).is_err());
        assert!(behind.write_slice(&[0; 2], GuestAddress(u64::MAX)).is_err());
        assert!(behind.write_slice(&[], GuestAddress(u64::MAX)).is_ok());
        assert!(behind.read_slice(&mut [], GuestAddress(0x1800)).is_ok());
    }

    #[test]
    fn memory_is_where_the_guest_has_it_whatever_its_region_says() {
        let region =
            || GuestRegionMmap::<AtomicBitmap>::from_range(GuestAddress(0), 0x4000, None).unwrap();
        let (low, firmware) = (region(), region());
        let host = EmulatedHost::new();
        let unit = host.add_unit(VtdUnit::new(VtdUnitConfig::default()));
        host.add_device("disk", unit, Bdf::from_raw(0x20), DeviceConfig::default()).unwrap();
        let ioas = GuestIoas::new(host.clone()).unwrap();
        for (gpa, region) in [(0, &low), (0x10_0000, &firmware)] {
            ioas.map(gpa, &UserMemory::of(region), Protection::READ_WRITE).unwrap();
        }
        let dev = host.device_bind("disk").unwrap();
        host.device_attach(dev, None, ioas.id()).unwrap();
        let high = GuestRegionMmap::with_arc(firmware.get_mmap(), GuestAddress(0x10_0000)).unwrap();
        let memory = GuestMemoryMmap::from_regions(vec![low, high]).unwrap();

        let mut port = host.dma_port("disk").unwrap();
        let section = port.section(DmaAttributes::default());
        let behind = IommuMemory::new(memory.clone(), section, true, AtomicBitmap::default());
        behind.write_obj(7u8, GuestAddress(0x10_1000)).unwrap();
        let marked = || -> Vec<u64> {
            memory.iter().flat_map(|region| region.get_mmap().bitmap().get_and_reset()).collect()
        };
        // The memory itself marks nothing.
        assert_eq!(marked(), [0, 0]);
        drop(behind);
        assert_eq!(marked(), [0, 0b10]);
        let read = |gpa| memory.read_obj::<u8>(GuestAddress(gpa)).unwrap();
        assert_eq!([0x1000, 0x10_1000].map(read), [0, 7]);
    }

    #[test]
    fn slices_of_one_section_are_independent() {
        let regions = regions();
        let memory = GuestMemoryMmap::from_arc_regions(regions.to_vec()).unwrap();
        let mut port = port(&regions);
        let section = port.section(DmaAttributes::default());
        let behind = IommuMemory::new(memory, section, true, ());
        // A lookup during another one, which does not affect it.
        let mut first = behind.get_slices(GuestAddress(0x1000), 0x8000, Permissions::Read).unwrap();
        let mut length = first.next().unwrap().unwrap().len();
        behind.store(7u32, GuestAddress(0x5000), std::sync::atomic::Ordering::SeqCst).unwrap();
        for slice in first {
            length += slice.unwrap().len();
        }
        assert_eq!(length, 0x8000);
        assert_eq!(behind.read_obj::<u32>(GuestAddress(0x5000)).unwrap(), 7);
        assert!(!behind.check_range(GuestAddress(0x8fff), 2, Permissions::Write));
        assert!(behind.check_range(GuestAddress(0x8fff), 1, Permissions::ReadWrite));
    }
}
