// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtio device behind a virtual VT-d, with rust-vmm's `virtio-queue`: rings and buffers are at
//! the guest's IOVAs, which its tables scatter over its memory. And the sanitizer, which names the
//! invalidation that a guest forgot.
//!
//!     cargo run -p twostage-emulated --features test-kit --example virtqueue

use std::error::Error;
use std::sync::Arc;

use twostage::iommufd::HostIommu;
use twostage::nesting::GuestIoas;
use twostage::spec::pci::Bdf;
use twostage::unit::VtdBuilder;
use twostage::viommu::InterruptSink;
use twostage_emulated::kit::vtd::{Completion, Driver, Entry};
use twostage_emulated::kit::Pages;
use twostage_emulated::{DeviceConfig, DmaMemory, EmulatedHost, VtdUnit, VtdUnitConfig};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// IOVAs of the descriptor table, the rings and two buffers.
const TABLE: u64 = 0x4000;
const AVAILABLE: u64 = 0x5000;
const USED: u64 = 0x6000;
const SOURCE: u64 = 0x7000;
const TARGET: u64 = 0x8000;
/// What the guest sends.
const TEXT: [u8; 16] = *b"hello, two stage";
/// Flags of a descriptor.
const NEXT: u16 = 1;
const WRITE: u16 = 2;

struct Messages;

impl InterruptSink for Messages {
    fn send_msi(&self, address: u64, data: u32) {
        println!("message {data:#x} to {address:#x}");
    }
}

/// A device that returns what it reads in capitals. It knows nothing of IOMMUs.
struct Capitals {
    queue: Queue,
    memory: DmaMemory<GuestMemoryMmap>,
}

impl Capitals {
    /// Serves the driver's buffers; returns how many.
    fn serve(&mut self) -> Result<usize, Box<dyn Error>> {
        // One critical section: no invalidation completes while accesses are in progress.
        let memory = self.memory.section();
        let mut served = 0;
        while let Some(chain) = self.queue.pop_descriptor_chain(&memory) {
            let (head, mut bytes, mut written) = (chain.head_index(), Vec::new(), 0);
            for part in chain {
                let length = part.len() as usize;
                if part.is_write_only() {
                    let answer = bytes.to_ascii_uppercase();
                    let answer = answer.get(..length).unwrap_or(&answer);
                    memory.write_slice(answer, part.addr())?;
                    written += answer.len() as u32;
                } else {
                    let start = bytes.len();
                    bytes.resize(start + length, 0);
                    memory.read_slice(&mut bytes[start..], part.addr())?;
                }
            }
            self.queue.add_used(&memory, head, written)?;
            served += 1;
        }
        Ok(served)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let host = EmulatedHost::new();
    let vtd = VtdUnit::new(VtdUnitConfig::default().with_sanitize(true));
    let unit = host.add_unit(vtd.clone());
    let place = Bdf::new(0, 4, 0).ok_or("no such address")?;
    host.add_device("capitals", unit, place, DeviceConfig::default())?;
    let dev = host.device_bind("capitals")?;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 16 << 20)])?;
    let ioas = GuestIoas::new(host.clone())?;
    ioas.map_all(&memory)?;
    let rid = Bdf::new(0, 3, 0).ok_or("no such address")?;
    let builder = VtdBuilder::new(ioas, Arc::new(memory.clone()), Arc::new(Messages));
    let unit = Arc::new(builder.device(rid, dev, "capitals").build()?);

    // The guest's driver: each IOVA on a page of its own.
    let guest = Driver::new(Pages::new(Arc::new(memory.clone()), 0x10_0000), unit.clone());
    let table = guest.page();
    let map = |iova| {
        let page = guest.page();
        guest.map(table, iova, page, 1, true);
        GuestAddress(page)
    };
    let [chain, available, used, source, target] =
        [TABLE, AVAILABLE, USED, SOURCE, TARGET].map(map);
    guest.set_entry(rid, 0, Entry::FirstStage { table, domain: 7 });
    guest.enable();
    let send = |target: u64, number: u16| -> Result<(), Box<dyn Error>> {
        memory.write_obj(Descriptor::new(SOURCE, TEXT.len() as u32, NEXT, 1), chain)?;
        let second = chain.0 + 16;
        memory.write_obj(Descriptor::new(target, 16, WRITE, 0), GuestAddress(second))?;
        // Each time the chain that begins at 0 is made available.
        memory.write_obj(number, GuestAddress(available.0 + 2))?;
        Ok(())
    };
    let load = |page| -> Result<[u8; 16], vm_memory::GuestMemoryError> { memory.read_obj(page) };

    // The device: the queue's addresses are IOVAs, as the driver wrote them to its registers.
    let mut queue = Queue::new(16)?;
    queue.try_set_desc_table_address(GuestAddress(TABLE))?;
    queue.try_set_avail_ring_address(GuestAddress(AVAILABLE))?;
    queue.try_set_used_ring_address(GuestAddress(USED))?;
    queue.set_ready(true);
    let port = host.dma_port("capitals").ok_or("no such device")?;
    let mut device = Capitals { queue, memory: DmaMemory::behind_iommu(memory.clone(), port) };

    memory.write_slice(&TEXT, source)?;
    send(TARGET, 1)?;
    assert_eq!(device.serve()?, 1);
    assert_eq!(load(target)?, *b"HELLO, TWO STAGE");
    assert_eq!(memory.read_obj::<u16>(GuestAddress(used.0 + 2))?, 1);

    // The guest maps another page, and forgets to invalidate: the device still uses the old one.
    let other = map(TARGET);
    memory.write_slice(&[0; 16], target)?;
    send(TARGET, 2)?;
    assert_eq!(device.serve()?, 1);
    assert_eq!((load(target)?, load(other)?), (*b"HELLO, TWO STAGE", [0; 16]));
    let report = vtd.sanitizer_report().ok_or("the sanitizer is on")?;
    println!("{report}");
    assert_eq!(report.stale.first().map(|stale| stale.iova), Some(TARGET));

    // A buffer that is not mapped: nothing is written, and the guest is told.
    send(0x9000, 3)?;
    println!("the device sees: {}", device.serve().expect_err("nothing is mapped there"));
    let (record, reason) = guest.take_fault().ok_or("the guest is not told")?;
    println!("the guest sees: {reason:?} at {:#x}", record.address());
    assert_eq!(record.address(), 0x9000);
    assert_eq!(guest.flush_pasid_cache(), Completion::Done);

    unit.shutdown()?;
    host.device_unbind(dev)?;
    assert_eq!(host.live_objects(), 0);
    Ok(())
}
