// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Common parts of the machines: guest memory, two devices, and a host that fails.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread;

use twostage::iommufd::{
    FailNth, FaultQueue, HostIommu, HwptAlloc, HwptData, HwptFlags, ObjectId, Protection,
    UserMemory,
};
use twostage::nesting::GuestIoas;
use twostage::spec::pci::Bdf;
use twostage_emulated::kit::Pages;
pub use twostage_emulated::kit::PAGE;
use twostage_emulated::{DmaAttributes, DmaPort, EmulatedHost, ObjectGraph};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// The emulated host; one call of it can be made to fail, and the next one, too.
pub type Host = FailNth<FailNth<EmulatedHost>>;

/// Attaches `dev` to the tables of `data` on `pt`, by a HWPT whose page requests go to the returned
/// queue.
pub fn serve_page_requests(
    host: &Host,
    dev: ObjectId,
    pt: ObjectId,
    data: HwptData,
) -> Arc<dyn FaultQueue> {
    let queue = host.fault_queue_alloc().unwrap();
    let (flags, fault) = (HwptFlags::new().with_fault_id_valid(true), Some(queue.object()));
    let hwpt = host.hwpt_alloc(&HwptAlloc { flags, dev, pt, data, fault }).unwrap();
    host.device_attach(dev, None, hwpt).unwrap();
    queue
}

/// The guest's two devices.
pub const A: Bdf = Bdf::from_raw(0x20);
pub const B: Bdf = Bdf::from_raw(0x28);

/// Start and size of each region, in bytes.
const REGIONS: [(u64, usize); 2] = [(0, 16 << 20), (1 << 32, 4 << 20)];
/// The start of the region above 4 GiB.
pub const HIGH: u64 = REGIONS[1].0;
/// Its size.
pub const HIGH_SIZE: u64 = REGIONS[1].1 as u64;
/// Where page allocation starts.
const FIRST_FREE: u64 = 0x10_0000;

/// Guest memory. Every address is a GPA, in bytes.
#[derive(Clone)]
pub struct Memory {
    pub map: Arc<GuestMemoryMmap>,
    pub pages: Pages,
}

impl Memory {
    /// All regions; `mapped` is called for each with its start.
    ///
    /// # Errors
    /// The errors of `mapped`.
    pub fn new<E>(mut mapped: impl FnMut(u64, &UserMemory) -> Result<(), E>) -> Result<Self, E> {
        let region = |&(start, size)| {
            Arc::new(GuestRegionMmap::from_range(GuestAddress(start), size, None).unwrap())
        };
        let regions: Vec<_> = REGIONS.iter().map(region).collect();
        for ((start, _), region) in REGIONS.iter().zip(&regions) {
            mapped(*start, &UserMemory::whole(region.clone()))?;
        }
        let map = Arc::new(GuestMemoryMmap::from_arc_regions(regions).unwrap());
        Ok(Self::from_free(map, FIRST_FREE))
    }

    /// Other memory with the same contents below 4 GiB and the same free pages; `mapped` as in
    /// [`Self::new`].
    ///
    /// # Errors
    /// The errors of `mapped`.
    pub fn copied<E>(
        &self,
        mapped: impl FnMut(u64, &UserMemory) -> Result<(), E>,
    ) -> Result<Self, E> {
        let Self { map, .. } = Self::new(mapped)?;
        map.write_slice(&self.contents(), GuestAddress(0)).unwrap();
        Ok(Self::from_free(map, self.pages.free()))
    }

    fn from_free(map: Arc<GuestMemoryMmap>, free: u64) -> Self {
        Self { pages: Pages::new(map.clone(), free), map }
    }

    /// Has `contents` from its start; they are no free pages.
    pub fn fill(&self, contents: &[u8]) {
        self.map.write_slice(contents, GuestAddress(0)).unwrap();
    }

    /// What is below the first free page.
    pub fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.pages.free() as usize];
        self.map.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }
}

/// What a VMM has of two hosts: guest memory in each, and a device bound to each. [`A`] is of the
/// first, [`B`] of the second.
pub struct TwoHosts {
    hosts: [Arc<Host>; 2],
    pub ioases: [Arc<GuestIoas>; 2],
    pub devices: [ObjectId; 2],
    pub memory: Memory,
}

impl TwoHosts {
    /// On `hosts`, of which each has the devices "a" and "b".
    pub fn new(hosts: [Arc<Host>; 2]) -> Self {
        let ioases = hosts.each_ref().map(|host| GuestIoas::new(host.clone()).unwrap());
        let map = |start, region: &UserMemory| {
            ioases.iter().try_for_each(|ioas| ioas.map(start, region, Protection::READ_WRITE))
        };
        let memory = Memory::new(map).unwrap();
        let [first, second] = &hosts;
        let devices =
            [(first, "a"), (second, "b")].map(|(host, dev)| host.device_bind(dev).unwrap());
        Self { hosts, ioases, devices, memory }
    }

    /// Ends both, after the virtual unit. Nothing may be left.
    #[track_caller]
    pub fn end(self) {
        drop(self.ioases);
        for (host, dev) in self.hosts.iter().zip(self.devices) {
            host.device_unbind(dev).unwrap();
            let left = host.inner().inner().graph();
            assert_eq!(left, ObjectGraph { objects: Vec::new(), pinned_bytes: 0 });
        }
    }
}

/// Tells the DMA to stop when dropped, as by a test that fails.
pub struct Stops<'a>(pub &'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Eight bytes read through `port` at `iova`.
pub fn word(port: &mut DmaPort, iova: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    let read = port.read(DmaAttributes::default(), iova, &mut bytes);
    read.is_ok().then(|| u64::from_le_bytes(bytes))
}

/// All `ports` read at `iova`, as fast as they can, while `remap` maps one page after another there
/// and returns when its invalidation is complete: whatever is read by a request that begins later
/// is of that page, or of a later one.
pub fn reads_are_fresh(
    memory: &Memory,
    ports: [DmaPort; 2],
    iova: u64,
    mut remap: impl FnMut(u64, u64),
) {
    const ROUNDS: u64 = 400;
    let pages: Vec<u64> = (0..8).map(|_| memory.pages.page()).collect();
    let mut turn = |round: u64| {
        let page = pages[round as usize % pages.len()];
        memory.pages.store(page, round);
        remap(round, page);
    };
    turn(1);
    let (complete, over) = (AtomicU64::new(1), AtomicBool::new(false));
    thread::scope(|scope| {
        let reader = |mut port: DmaPort| {
            let (complete, over) = (&complete, &over);
            scope.spawn(move || {
                let mut reads = 0u64;
                while !over.load(Ordering::SeqCst) {
                    let least = complete.load(Ordering::SeqCst);
                    let found = word(&mut port, iova).expect("always mapped");
                    assert!(found >= least, "{found} after {least} was complete");
                    reads += 1;
                }
                reads
            })
        };
        let readers = ports.map(reader);
        for round in 2..=ROUNDS {
            if readers.iter().any(|reader| reader.is_finished()) {
                break;
            }
            turn(round);
            complete.store(round, Ordering::SeqCst);
        }
        over.store(true, Ordering::SeqCst);
        let reads = readers.map(|reader| reader.join().expect("what it read was fresh"));
        assert!(reads.iter().all(|reads| *reads > 0), "{reads:?}");
    });
}
