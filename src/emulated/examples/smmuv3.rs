// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtual SMMUv3 with one device: DMA by the guest's tables, a translation that stays stale
//! until it is invalidated, and an event.
//!
//!     cargo run -p twostage-emulated --features test-kit --example smmuv3
//!
//! The same as `vtd`, step by step. Here, too, only the first lines differ on a kernel's host.

use std::error::Error;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use twostage::iommufd::HostIommu;
use twostage::nesting::GuestIoas;
use twostage::spec::pci::Bdf;
use twostage::spec::smmuv3::command::{AddressRange, Command};
use twostage::spec::smmuv3::event::EventId;
use twostage::unit::Smmuv3Builder;
use twostage::viommu::smmuv3::{SmmuInterrupt, SmmuInterrupts};
use twostage_emulated::kit::smmuv3::{Completion, Driver, Entry};
use twostage_emulated::kit::Pages;
use twostage_emulated::{DeviceConfig, DmaAttributes, EmulatedHost, SmmuV3Unit, SmmuV3UnitConfig};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// An address that only the guest's tables map.
const IOVA: u64 = 0x7000_0000_4000;
/// The guest's name of an address space.
const ASID: u16 = 7;

/// Receives the unit's own interrupts. In a VMM they go to the virtual machine's GIC.
#[derive(Debug, Default)]
struct Interrupts(Mutex<Vec<(u64, u32)>>);

impl SmmuInterrupts for Interrupts {
    fn message(&self, address: u64, data: u32) -> bool {
        self.0.lock().expect("no panic").push((address, data));
        true
    }

    fn wire(&self, interrupt: SmmuInterrupt) {
        println!("an edge on the wire of {interrupt:?}");
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    // The host has an SMMU, and a device behind it.
    let host = EmulatedHost::new();
    let unit = host.add_unit(SmmuV3Unit::new(SmmuV3UnitConfig::default()));
    let place = Bdf::new(0, 4, 0).ok_or("no such address")?;
    host.add_device("nic", unit, place, DeviceConfig::default())?;
    let dev = host.device_bind("nic")?;

    // The VMM maps guest memory on the host, and builds the virtual unit on that.
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 16 << 20)])?);
    let ioas = GuestIoas::new(host.clone())?;
    ioas.map_all(&memory)?;
    let rid = Bdf::new(0, 3, 0).ok_or("no such address")?;
    let interrupts = Arc::new(Interrupts::default());
    let builder = Smmuv3Builder::new(ioas, memory.clone(), interrupts.clone());
    let smmu = Arc::new(builder.device(rid, dev, "nic").build()?);
    println!("the guest is offered {:?}", smmu.config());

    // From here on: the guest (`guest`) and the device (`nic`).
    let guest = Driver::new(Pages::new(memory.clone(), 0x10_0000), smmu.clone());
    let mut nic = host.dma_port("nic").ok_or("no such device")?;
    let any = DmaAttributes::default();
    let [old, new] = [guest.page(), guest.page()];
    let at = |gpa: u64| memory.read_obj::<u8>(GuestAddress(gpa));

    // Without translation, IOVAs are GPAs.
    nic.write(any, old, &[1])?;
    assert_eq!(at(old)?, 1);

    // The guest gives the device a table by a context descriptor, and enables translation.
    let table = guest.page();
    guest.map(table, IOVA, old, 3, true);
    guest.set_entry(rid.into(), Entry::Stage1 { cd: guest.context(table, ASID) });
    guest.enable();
    nic.write(any, IOVA, &[2])?;
    assert_eq!(at(old)?, 2);
    println!("{}", host.graph());

    // A changed table has no effect while the host still caches the old one.
    guest.map(table, IOVA, new, 3, true);
    nic.write(any, IOVA, &[3])?;
    assert_eq!((at(old)?, at(new)?), (3, 0), "the translation is stale");
    let page = Command::TlbiNhVa { vmid: 0, asid: ASID, range: AddressRange::at(IOVA) };
    assert_eq!(guest.submit(&[page]), Completion::Done);
    nic.write(any, IOVA, &[4])?;
    assert_eq!((at(old)?, at(new)?), (3, 4));

    // What no table maps is refused, and the guest is told: a record, then a message. The host
    // reports it by a file, which a thread of the unit reads.
    guest.enable_event_interrupt(0xfee0_0000, 0x41);
    let error = nic.write(any, IOVA + 0x1000, &[5]).expect_err("nothing is mapped there");
    println!("the device sees: {error}");
    let start = Instant::now();
    let told = || !interrupts.0.lock().expect("no panic").is_empty();
    while !told() {
        assert!(start.elapsed() < Duration::from_secs(10), "the guest is not told");
        thread::yield_now();
    }
    let event = guest.take_event().ok_or("an interrupt without an event")?;
    println!("the guest sees: {:?} at {:#x}", event.id(), event.input_address);
    assert_eq!(event.id(), Some(EventId::Translation));
    assert_eq!((event.stream(), event.input_address), (rid.into(), IOVA + 0x1000));
    assert_eq!(*interrupts.0.lock().expect("no panic"), [(0xfee0_0000, 0x41)]);

    // The guest takes the device's table away.
    guest.set_entry(rid.into(), Entry::Abort);
    assert_eq!(guest.flush_entries(&[rid]), Completion::Done);
    nic.write(any, IOVA, &[6]).expect_err("the stream aborts");
    assert_eq!(at(new)?, 4);

    // The end: the unit leaves nothing on the host, and memory goes with its last user.
    println!("{:?}", smmu.model().counters());
    smmu.shutdown()?;
    host.device_unbind(dev)?;
    assert_eq!(host.live_objects(), 0);
    Ok(())
}
