// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory as one device accesses it, for devices written against `vm_memory` and
//! `virtio-queue`: by GPA, or by IOVA through the IOMMU.

use std::iter::FusedIterator;

use twostage::sync::Mutex;
use vm_memory::bitmap::{BS, MS};
use vm_memory::guest_memory::{GuestMemoryBackendSliceIterator, GuestMemorySliceIterator};
use vm_memory::iommu::{Error as IommuError, IovaRange};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    GuestMemoryResult, Permissions, VolatileSlice,
};

use super::section::Section;
use super::{DmaAttributes, DmaPort};
use crate::dma::error::DmaError;

/// The memory that one device can access.
///
/// `M` has the regions that the IOMMU's second stage maps, where the guest has them. Whatever the
/// type of its bitmap, what the device writes is marked there, as it is without an IOMMU.
/// (`vm_memory`'s `IommuMemory` would mark a bitmap of IOVAs instead.)
///
/// ```
/// use std::sync::Arc;
/// use twostage_emulated::{DeviceConfig, DmaMemory, EmulatedHost, VtdUnit, VtdUnitConfig};
/// use twostage::iommufd::*;
/// use twostage::spec::pci::Bdf;
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};
///
/// let host = EmulatedHost::new();
/// let unit = host.add_unit(VtdUnit::new(VtdUnitConfig::default()));
/// host.add_device("disk", unit, Bdf::new(0, 4, 0).expect("an address"), DeviceConfig::default())?;
/// let region = Arc::new(GuestRegionMmap::from_range(GuestAddress(0), 0x10000, None)?);
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_arc_regions(vec![region.clone()])?;
/// let (dev, ioas) = (host.device_bind("disk")?, host.ioas_alloc()?);
/// let target = MapTarget::Fixed(0x70_0000);
/// host.ioas_map(ioas, &UserMemory::whole(region), target, Protection::READ_WRITE)?;
/// host.device_attach(dev, None, ioas)?;
///
/// let port = host.dma_port("disk").expect("the device");
/// let mut device = DmaMemory::behind_iommu(memory.clone(), port);
/// // `&section` is what a `virtio_queue::Queue` takes.
/// let section = device.section();
/// section.write_obj(7u32, GuestAddress(0x70_1000))?;
/// assert!(section.write_obj(7u32, GuestAddress(0x1000)).is_err());
/// drop(section);
/// assert_eq!(memory.read_obj::<u32>(GuestAddress(0x1000))?, 7);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct DmaMemory<M> {
    memory: M,
    /// Where the device's DMA enters the IOMMU, if it is behind one.
    port: Option<DmaPort>,
    attributes: DmaAttributes,
}

impl<M: GuestMemoryBackend> DmaMemory<M> {
    /// The memory of a device without an IOMMU: addresses are GPAs.
    pub fn direct(memory: M) -> Self {
        Self { memory, port: None, attributes: DmaAttributes::default() }
    }

    /// The memory of a device behind an IOMMU: addresses are IOVAs, and requests go through `port`,
    /// without PASID.
    pub fn behind_iommu(memory: M, port: DmaPort) -> Self {
        Self { port: Some(port), ..Self::direct(memory) }
    }

    /// The same with `attributes` in every request, such as a PASID.
    #[must_use]
    pub fn with_attributes(self, attributes: DmaAttributes) -> Self {
        Self { attributes, ..self }
    }

    /// Whether the device is behind an IOMMU.
    pub fn is_behind_iommu(&self) -> bool {
        self.port.is_some()
    }

    /// Starts a critical section: until it is dropped, invalidations **wait**, and vCPUs with them.
    /// It is for one bounded piece of work, such as a pass over a virtqueue's rings, without I/O or
    /// other waiting. Faults are reported at its end.
    pub fn section(&mut self) -> DmaSection<'_, M> {
        let port = self.port.as_mut().map(|port| Mutex::new(port.enter()));
        DmaSection { memory: &self.memory, port, attributes: self.attributes }
    }

    /// Reads memory at `address` (bytes) into `bytes`: see [`DmaPort::read`]. For data this is
    /// better than a section, as nobody waits for long.
    ///
    /// # Errors
    /// It cannot be accessed; bytes before the failing address may have been read.
    pub fn read(&mut self, address: u64, bytes: &mut [u8]) -> GuestMemoryResult<()> {
        let length = bytes.len();
        match &mut self.port {
            Some(port) => port
                .read(self.attributes, address, bytes)
                .map_err(|error| not_translated(address, length, &error)),
            None => self.memory.read_slice(bytes, GuestAddress(address)),
        }
    }

    /// Writes `bytes` to memory at `address` (bytes): see [`DmaPort::write`].
    ///
    /// # Errors
    /// It cannot be accessed; bytes before the failing address may have been written.
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> GuestMemoryResult<()> {
        match &mut self.port {
            Some(port) => port
                .write(self.attributes, address, bytes)
                .map_err(|error| not_translated(address, bytes.len(), &error)),
            None => self.memory.write_slice(bytes, GuestAddress(address)),
        }
    }
}

fn not_translated(address: u64, length: usize, error: &DmaError) -> GuestMemoryError {
    let iova_range = IovaRange { base: GuestAddress(address), length };
    let reason = error.to_string();
    GuestMemoryError::IommuError(IommuError::CannotResolve { iova_range, reason })
}

/// The memory of a device during one critical section. Each access is translated, and an
/// invalidation returns only when no access by an older translation is in progress: slices live no
/// longer than this. As on a bus, what precedes the first byte that cannot be reached may have been
/// read or written.
#[derive(Debug)]
pub struct DmaSection<'p, M> {
    memory: &'p M,
    /// None: addresses are GPAs.
    port: Option<Mutex<Section<'p>>>,
    attributes: DmaAttributes,
}

impl<'p, M> DmaSection<'p, M> {
    fn pieces(&self, iova: GuestAddress, length: usize, access: Permissions) -> Pieces<'_, 'p, M> {
        Pieces { section: self, iova: iova.0, left: length, access }
    }

    /// The GPA of `iova`, and how many of the `length` bytes from there on are contiguous.
    fn translate(
        &self,
        iova: u64,
        length: usize,
        access: Permissions,
    ) -> GuestMemoryResult<(GuestAddress, usize)> {
        let Some(port) = &self.port else { return Ok((GuestAddress(iova), length)) };
        let found = port.lock().translate(self.attributes, iova, access);
        let (address, piece) = found
            .and_then(|found| found.ok_or(DmaError::NoMemory { address: iova }))
            .map_err(|error| not_translated(iova, length, &error))?;
        Ok((address, length.min(piece)))
    }
}

impl<M: GuestMemoryBackend> GuestMemory for DmaSection<'_, M> {
    type PhysicalMemory = M;
    type Bitmap = <M::R as GuestMemoryRegion>::B;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        self.pieces(addr, count, access).all(|piece| {
            piece.is_ok_and(|(address, length)| self.memory.check_range(address, length))
        })
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        let (pieces, slices) = (self.pieces(addr, count, access), None);
        Ok(Slices { memory: self.memory, pieces, slices })
    }

    fn physical_memory(&self) -> Option<&M> {
        self.port.is_none().then_some(self.memory)
    }
}

/// What contiguous GPAs a range of IOVAs leads to. Ends at the first error.
struct Pieces<'a, 'p, M> {
    section: &'a DmaSection<'p, M>,
    iova: u64,
    left: usize,
    access: Permissions,
}

impl<M> Iterator for Pieces<'_, '_, M> {
    type Item = GuestMemoryResult<(GuestAddress, usize)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let piece = self.section.translate(self.iova, self.left, self.access);
        let length = piece.as_ref().map_or(self.left, |(_, length)| *length);
        self.left -= length;
        match self.iova.checked_add(length as u64) {
            Some(next) => self.iova = next,
            // Nothing follows the end of the address space.
            None if self.left > 0 => {
                self.left = 0;
                return Some(Err(GuestMemoryError::GuestAddressOverflow));
            }
            None => {}
        }
        Some(piece)
    }
}

/// The memory of a range of IOVAs, with the bitmap of its regions.
struct Slices<'a, 'p, M: GuestMemoryBackend> {
    memory: &'a M,
    pieces: Pieces<'a, 'p, M>,
    /// Those of the current piece.
    slices: Option<GuestMemoryBackendSliceIterator<'a, M>>,
}

impl<'a, M: GuestMemoryBackend> Iterator for Slices<'a, '_, M> {
    type Item = GuestMemoryResult<VolatileSlice<'a, MS<'a, M>>>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(slice) = self.slices.as_mut().and_then(Iterator::next) {
                if slice.is_err() {
                    self.pieces.left = 0;
                }
                return Some(slice);
            }
            match self.pieces.next()? {
                Ok((address, length)) => {
                    self.slices = Some(self.memory.get_slices(address, length))
                }
                Err(error) => {
                    self.slices = None;
                    return Some(Err(error));
                }
            }
        }
    }
}

impl<M: GuestMemoryBackend> FusedIterator for Slices<'_, '_, M> {}

impl<'a, M: GuestMemoryBackend> GuestMemorySliceIterator<'a, MS<'a, M>> for Slices<'a, '_, M> {}

#[cfg(test)]
mod tests {
    use std::sync::{mpsc, Arc};
    use std::thread;
    use std::time::Duration;

    use super::super::port_iommu::tests::{port, regions};
    use super::*;
    use crate::{DeviceConfig, EmulatedHost, VtdUnit, VtdUnitConfig};
    use twostage::iommufd::*;
    use twostage::spec::pci::Bdf;
    use virtio_queue::desc::split::Descriptor;
    use virtio_queue::{Queue, QueueT};
    use vm_memory::bitmap::{AtomicBitmap, Bitmap};
    use vm_memory::{GuestMemoryMmap, GuestRegionMmap};

    /// IOVAs of a virtqueue and its buffers, each on a page of its own; the last is followed by
    /// one elsewhere.
    const TABLE: u64 = 0x1000;
    const AVAILABLE: u64 = 0x2000;
    const USED: u64 = 0x3000;
    const SOURCE: u64 = 0x4000;
    const TARGET: u64 = 0x5000;
    const TEXT: [u8; 16] = *b"through two maps";
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;

    /// A guest whose tables scatter a device's IOVAs over its memory.
    struct Guest {
        host: Arc<EmulatedHost>,
        nested: ObjectId,
        memory: GuestMemoryMmap,
    }

    impl Guest {
        fn new() -> Self {
            let host = EmulatedHost::new();
            let unit = host.add_unit(VtdUnit::new(VtdUnitConfig::default()));
            let bdf = Bdf::new(0, 4, 0).unwrap();
            host.add_device("virtio", unit, bdf, DeviceConfig::default()).unwrap();
            let region = GuestRegionMmap::<()>::from_range(GuestAddress(0), 0x2_0000, None);
            let region = Arc::new(region.unwrap());
            let memory = GuestMemoryMmap::from_arc_regions(vec![region.clone()]).unwrap();
            for table in [0x1000, 0x2000, 0x3000u64] {
                memory.write_obj((table + 0x1000) | 7, GuestAddress(table)).unwrap();
            }
            let (dev, ioas) = (host.device_bind("virtio").unwrap(), host.ioas_alloc().unwrap());
            let target = MapTarget::Fixed(0);
            host.ioas_map(ioas, &UserMemory::whole(region), target, Protection::READ_WRITE)
                .unwrap();
            let (flags, fault) = (HwptFlags::new().with_nest_parent(true), None);
            let parent = HwptAlloc { flags, dev, pt: ioas, data: HwptData::None, fault };
            let pt = host.hwpt_alloc(&parent).unwrap();
            let tables =
                iommu_hwpt_vtd_s1 { pgtbl_addr: 0x1000, addr_width: 48, ..Default::default() };
            let (flags, data) = (HwptFlags::new(), HwptData::VtdS1(tables));
            let nested = host.hwpt_alloc(&HwptAlloc { flags, dev, pt, data, fault }).unwrap();
            host.device_attach(dev, None, nested).unwrap();
            let guest = Self { host, nested, memory };
            for iova in [TABLE, AVAILABLE, USED, SOURCE, TARGET, TARGET + 0x1000] {
                guest.map(iova, 0x1_0000 - iova);
            }
            guest
        }

        fn map(&self, iova: u64, page: u64) {
            self.memory.write_obj(page | 7, GuestAddress(0x4000 + (iova >> 12) * 8)).unwrap();
        }

        fn invalidate(&self) {
            let all = iommu_hwpt_vtd_s1_invalidate { npages: u64::MAX, ..Default::default() };
            self.host.hwpt_invalidate(self.nested, InvalidateData::VtdS1(&[all])).unwrap();
        }

        fn device(&self) -> DmaMemory<GuestMemoryMmap> {
            let port = self.host.dma_port("virtio").unwrap();
            DmaMemory::behind_iommu(self.memory.clone(), port)
        }

        /// Makes a chain available, the `number`th: from SOURCE to `target`.
        fn send(&self, number: u16, target: u64) {
            let write =
                |descriptor, at| self.memory.write_obj::<Descriptor>(descriptor, at).unwrap();
            let length = TEXT.len() as u32;
            write(Descriptor::new(SOURCE, length, NEXT, 1), GuestAddress(0x1_0000 - TABLE));
            write(Descriptor::new(target, length, WRITE, 0), GuestAddress(0x1_0010 - TABLE));
            self.memory.write_slice(&TEXT, GuestAddress(0x1_0000 - SOURCE)).unwrap();
            self.memory.write_obj(number, GuestAddress(0x1_0002 - AVAILABLE)).unwrap();
        }

        fn load<const N: usize>(&self, gpa: u64) -> [u8; N] {
            let mut bytes = [0; N];
            self.memory.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
            bytes
        }
    }

    /// A device that copies, and knows nothing of IOMMUs.
    fn serve(queue: &mut Queue, memory: &impl GuestMemory) {
        assert!(queue.is_valid(memory));
        let chain = queue.pop_descriptor_chain(memory).unwrap();
        let (head, mut bytes) = (chain.head_index(), Vec::new());
        for part in chain {
            if part.is_write_only() {
                memory.write_slice(&bytes, part.addr()).unwrap();
            } else {
                bytes.resize(part.len() as usize, 0);
                memory.read_slice(&mut bytes, part.addr()).unwrap();
            }
        }
        queue.add_used(memory, head, bytes.len() as u32).unwrap();
    }

    fn queue() -> Queue {
        let mut queue = Queue::new(16).unwrap();
        queue.try_set_desc_table_address(GuestAddress(TABLE)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_ready(true);
        queue
    }

    #[test]
    fn a_virtqueue_works_by_iova_and_by_the_old_ones_until_they_are_invalidated() {
        let (guest, mut queue) = (Guest::new(), queue());
        let mut device = guest.device();
        // A buffer across pages that are not adjacent.
        guest.send(1, TARGET + 0xff8);
        serve(&mut queue, &device.section());
        assert_eq!(guest.load::<8>(0x1_0ff8 - TARGET), TEXT[..8]);
        assert_eq!(guest.load::<8>(0xf000 - TARGET), TEXT[8..]);
        // Index 1; chain 0, with 16 bytes.
        let used = [0, 0, 1, 0, 0, 0, 0, 0, 16, 0, 0, 0];
        assert_eq!(guest.load(0x1_0000 - USED), used);

        const ELSEWHERE: u64 = 0x1_8000;
        guest.map(TARGET, ELSEWHERE);
        guest.send(2, TARGET);
        serve(&mut queue, &device.section());
        assert_eq!((guest.load(0x1_0000 - TARGET), guest.load(ELSEWHERE)), (TEXT, [0; 16]));
        guest.invalidate();
        guest.send(3, TARGET);
        serve(&mut queue, &device.section());
        assert_eq!(guest.load(ELSEWHERE), TEXT);
    }

    #[test]
    fn an_invalidation_waits_for_the_section() {
        let guest = Guest::new();
        let mut device = guest.device();
        thread::scope(|scope| {
            let section = device.section();
            section.write_obj(1u8, GuestAddress(TARGET)).unwrap();
            let mut slices =
                section.get_slices(GuestAddress(TARGET), 1, Permissions::Write).unwrap();
            let slice = slices.next().unwrap().unwrap();
            let (done, is_done) = mpsc::channel();
            let guest = &guest;
            scope.spawn(move || {
                guest.map(TARGET, 0x1_8000);
                guest.invalidate();
                done.send(guest.load(0x1_0000 - TARGET)).unwrap();
            });
            let early = is_done.recv_timeout(Duration::from_millis(30));
            assert_eq!(early, Err(mpsc::RecvTimeoutError::Timeout));
            slice.write_obj(2u8, 0).unwrap();
            drop(slices);
            drop(section);
            assert_eq!(is_done.recv().unwrap(), [2u8]);
        });
        device.section().write_obj(3u8, GuestAddress(TARGET)).unwrap();
        assert_eq!((guest.load(0x1_0000 - TARGET), guest.load(0x1_8000)), ([2], [3]));
    }

    #[test]
    fn memory_behind_the_iommu_is_reached_by_iova() {
        let regions = regions();
        let memory = GuestMemoryMmap::from_arc_regions(regions.to_vec()).unwrap();
        let mut device = DmaMemory::behind_iommu(memory.clone(), port(&regions));
        assert!(device.is_behind_iommu());
        let data: Vec<u8> = (0..0x6000u32).map(|i| (i % 253) as u8).collect();
        let mut back = vec![0; data.len()];
        {
            let behind = device.section();
            assert!(behind.physical_memory().is_none());
            behind.write_slice(&data, GuestAddress(0x1800)).unwrap();
            behind.read_slice(&mut back, GuestAddress(0x1800)).unwrap();
            assert_eq!(back, data);
            assert!(behind.check_range(GuestAddress(0x8fff), 1, Permissions::ReadWrite));
            assert!(!behind.check_range(GuestAddress(0x8fff), 2, Permissions::Write));
            assert!(!behind.check_range(GuestAddress(0x8fff), 1, Permissions::No));
            assert!(behind.write_slice(&data, GuestAddress(0x4000)).is_err());
            assert!(behind.write_slice(&[0; 2], GuestAddress(u64::MAX)).is_err());
            assert!(behind.write_slice(&[], GuestAddress(u64::MAX)).is_ok());
        }
        device.read(0x1800, &mut back).unwrap();
        // What could not be written as a whole was written as far as possible.
        assert!(back[..0x2800] == data[..0x2800] && back[0x2800..] == data[..0x3800]);
        device.write(0x1800, &[9]).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x80_0800)).unwrap(), 9);
        let error = device.write(0x8fff, &[0; 2]).unwrap_err().to_string();
        assert!(error.contains("0x9000"), "{error}");
        // Nothing is attached for the PASID.
        let attributes = DmaAttributes { pasid: Some(1), ..DmaAttributes::default() };
        let mut device = device.with_attributes(attributes);
        assert!(device.read(0x1800, &mut back).is_err());
        assert!(device.section().read_obj::<u8>(GuestAddress(0x1800)).is_err());
    }

    #[test]
    fn the_bitmap_of_memory_is_marked_where_it_is_written() {
        let regions = regions();
        let ranges = regions.each_ref().map(|region| (region.start_addr(), region.len() as usize));
        let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges).unwrap();
        let is_marked = |gpa| {
            let region = memory.find_region(GuestAddress(gpa)).unwrap();
            region.bitmap().dirty_at((gpa - region.start_addr().0) as usize)
        };
        let mut device = DmaMemory::behind_iommu(memory.clone(), port(&regions));
        device.section().write_obj(7u64, GuestAddress(0x4ffc)).unwrap();
        let pages = [0x80_2fff, 0x80_3000, 0x10_0000, 0x10_1000].map(is_marked);
        assert_eq!(pages, [false, true, true, false]);
        let mut device = DmaMemory::direct(memory.clone());
        assert!(!device.is_behind_iommu());
        device.section().write_obj(7u8, GuestAddress(0x10_1000)).unwrap();
        device.write(0x10_2000, &[7]).unwrap();
        assert_eq!([0x10_1000, 0x10_2000, 0x10_3000].map(is_marked), [true, true, false]);
        assert!(device.read(0x1000, &mut [0]).is_err());
        assert!(device.section().physical_memory().is_some());
    }
}
