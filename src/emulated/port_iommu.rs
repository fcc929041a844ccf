// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A DMA port as `vm_memory`'s `Iommu`, for devices that are written against that crate.
#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::iommu::{Error, IotlbIterator, IovaRange};
use vm_memory::{GuestAddress, Iommu, Iotlb, Permissions};

use super::dma::{DmaAccess, DmaAttributes, DmaError, DmaPort};

/// One requester's DMA as a [`vm_memory::Iommu`]: put it and the guest's memory into a
/// [`vm_memory::IommuMemory`], and a device that knows nothing of IOMMUs works behind one.
///
/// The memory must consist of the regions that the IOAS maps: translations are given as addresses
/// in them.
///
/// **What it does not promise.** `vm_memory` translates first and accesses later, and its guard is
/// a copy of the translations. An access may thus still go by a translation after the invalidation
/// that took it away has returned. Where that matters use [`DmaPort::read`], [`DmaPort::write`] or
/// [`DmaPort::translate`].
#[derive(Debug)]
pub struct PortIommu {
    port: Mutex<DmaPort>,
    attributes: DmaAttributes,
}

impl PortIommu {
    /// DMA through `port`, every request with `attributes`.
    pub fn new(port: DmaPort, attributes: DmaAttributes) -> Self {
        Self { port: Mutex::new(port), attributes }
    }

    /// Translates the bytes from `iova` on for `access` (in one direction), as many as are in one
    /// piece: where they are, and how many.
    fn piece(
        &self,
        iova: u64,
        length: usize,
        access: DmaAccess,
    ) -> Result<(GuestAddress, usize), String> {
        let mut port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        let translated = port
            .translate(self.attributes, iova, length, access)
            .map_err(|error: DmaError| error.to_string())?;
        let address = translated.guest_address().ok_or("the memory has no guest address")?;
        Ok((address, translated.length()))
    }
}

impl Iommu for PortIommu {
    type IotlbGuard<'a> = Arc<Iotlb>;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Self::IotlbGuard<'_>>, Error> {
        let range = || IovaRange { base: iova, length };
        let cannot = |reason| Error::CannotResolve { iova_range: range(), reason };
        let directions: &[DmaAccess] = match access {
            Permissions::No => return Err(cannot("no access asked for".into())),
            Permissions::Read => &[DmaAccess::Read],
            Permissions::Write => &[DmaAccess::Write],
            Permissions::ReadWrite => &[DmaAccess::Read, DmaAccess::Write],
        };
        let end = iova.0.checked_add(length as u64);
        let end = end.ok_or_else(|| cannot("past the end of the address space".into()))?;
        let mut iotlb = Iotlb::new();
        let mut at = iova.0;
        while at < end {
            let mut piece = (GuestAddress(0), (end - at) as usize);
            for &direction in directions {
                piece = self.piece(at, piece.1, direction).map_err(cannot)?;
            }
            let (address, length) = piece;
            iotlb.set_mapping(GuestAddress(at), address, length, access)?;
            // At least one byte: one was asked for.
            at += length as u64;
        }
        Iotlb::lookup(Arc::new(iotlb), iova, length, access)
            .map_err(|_| cannot("the translations do not cover the range".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emulated::hardware::{CacheTag, Hardware, Translation};
    use crate::emulated::stage2::{Mapping, Stage2};
    use crate::emulated::{VtdUnit, VtdUnitConfig};
    use crate::iommufd::{Protection, UserMemory};
    use vm_memory::{Bytes, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, IommuMemory};

    #[test]
    fn memory_behind_the_iommu_is_reached_by_iova() {
        let regions = [0x10_0000, 0x80_0000].map(|base| {
            Arc::new(GuestRegionMmap::<()>::from_range(GuestAddress(base), 0x4000, None).unwrap())
        });
        let memory = GuestMemoryMmap::from_arc_regions(regions.to_vec()).unwrap();
        let stage2 = Arc::new(Stage2::default());
        // Back to front: IOVA 0x1000 on is the second region, then comes the first.
        for (start, region) in [(0x1000, &regions[1]), (0x5000, &regions[0])] {
            stage2.insert(Mapping {
                start,
                last: start + region.len() - 1,
                memory: UserMemory::whole(Arc::clone(region)),
                protection: Protection::READ_WRITE,
            });
        }
        let unit = VtdUnit::new(VtdUnitConfig::default());
        unit.install(8, None, Translation { tag: CacheTag(1), tables: None, stage2 });
        let iommu = PortIommu::new(unit.port(8), DmaAttributes::default());
        let behind = IommuMemory::new(memory.clone(), iommu, true, ());

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
    }
}
