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
use twostage_emulated::kit::vtd::{Driver, Entry};
use twostage_emulated::kit::Pages;
use twostage_emulated::{DeviceConfig, DmaMemory, EmulatedHost, VtdUnit, VtdUnitConfig};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestMemoryResult};

/// IOVAs of the descriptor table, the rings and two buffers.
const TABLE: u64 = 0x4000;
const AVAILABLE: u64 = 0x5000;
const USED: u64 = 0x6000;
const SOURCE: u64 = 0x7000;
const TARGET: u64 = 0x8000;
const TEXT: [u8; 16] = *b"hello, two stage";
/// Flags of a descriptor.
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// How many requests are served at once, and how many bytes of each are read: the guest's numbers
/// have no limit, and its lengths are up to 4 GiB each.
const AT_ONCE: usize = 16;
const LONGEST: usize = 4096;

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
    /// Serves requests, and returns of each how much was written.
    fn serve(&mut self) -> Result<Vec<GuestMemoryResult<u32>>, virtio_queue::Error> {
        let mut answers = Vec::new();
        while answers.len() < AT_ONCE {
            // A critical section, for which invalidations wait: for the rings, and no more.
            let rings = self.memory.section();
            let Some(chain) = self.queue.pop_descriptor_chain(&rings) else { break };
            let (head, parts) = (chain.head_index(), chain.collect::<Vec<_>>());
            drop(rings);
            let answer = self.answer(parts);
            // The driver gets its buffers back, whatever became of them.
            self.queue.add_used(&self.memory.section(), head, *answer.as_ref().unwrap_or(&0))?;
            answers.push(answer);
        }
        Ok(answers)
    }

    /// Reads and writes the data of one request, without a section.
    fn answer(&mut self, parts: Vec<Descriptor>) -> GuestMemoryResult<u32> {
        let (mut text, mut written) = (Vec::new(), 0);
        for part in parts {
            let length = part.len() as usize;
            if part.is_write_only() {
                let end = text.len().min(written + length);
                self.memory.write(part.addr().0, &text[written..end])?;
                written = end;
            } else {
                let start = text.len();
                text.resize(LONGEST.min(start + length), 0);
                self.memory.read(part.addr().0, &mut text[start..])?;
                text[start..].make_ascii_uppercase();
            }
        }
        Ok(written as u32)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let host = EmulatedHost::new();
    let vtd = VtdUnit::new(VtdUnitConfig::default().with_sanitize(true));
    let unit = host.add_unit(vtd.clone());
    host.add_device("capitals", unit, Bdf::from_raw(0x20), DeviceConfig::default())?;
    let dev = host.device_bind("capitals")?;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 16 << 20)])?;
    let ioas = GuestIoas::new(host.clone())?;
    ioas.map_all(&memory)?;
    let rid = Bdf::from_raw(0x18);
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
    let [chain, avail, used, source, target] = [TABLE, AVAILABLE, USED, SOURCE, TARGET].map(map);
    guest.set_entry(rid, 0, Entry::FirstStage { table, domain: 7 });
    guest.enable();
    let send = |target: u64, number: u16| -> GuestMemoryResult<()> {
        memory.write_obj(Descriptor::new(SOURCE, TEXT.len() as u32, NEXT, 1), chain)?;
        memory.write_obj(Descriptor::new(target, 16, WRITE, 0), GuestAddress(chain.0 + 16))?;
        // Each time the chain that begins at 0 is made available.
        memory.write_obj(number, GuestAddress(avail.0 + 2))
    };
    let load = |page| -> GuestMemoryResult<[u8; 16]> { memory.read_obj(page) };

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
    assert!(matches!(device.serve()?[..], [Ok(16)]));
    assert_eq!(load(target)?, *b"HELLO, TWO STAGE");

    // The guest maps another page, and forgets to invalidate: the device still uses the old one.
    let other = map(TARGET);
    memory.write_slice(&[0; 16], target)?;
    send(TARGET, 2)?;
    assert!(matches!(device.serve()?[..], [Ok(16)]));
    assert_eq!((load(target)?, load(other)?), (*b"HELLO, TWO STAGE", [0; 16]));
    let report = vtd.sanitizer_report().ok_or("the sanitizer is on")?;
    println!("{report}");
    assert_eq!(report.stale.first().map(|stale| stale.iova), Some(TARGET));

    // A buffer that is not mapped: nothing is written, and the guest is told, and has it back.
    send(0x9000, 3)?;
    let answer = device.serve()?.remove(0);
    println!("the device sees: {}", answer.expect_err("nothing is mapped there"));
    assert_eq!(memory.read_obj::<u16>(GuestAddress(used.0 + 2))?, 3);
    let (record, reason) = guest.take_fault().ok_or("the guest is not told")?;
    println!("the guest sees: {reason:?} at {:#x}", record.address());
    assert_eq!(record.address(), 0x9000);

    unit.shutdown()?;
    host.device_unbind(dev)?;
    assert_eq!(host.live_objects(), 0);
    Ok(())
}
