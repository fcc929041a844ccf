// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtual VT-d with one device: DMA by the guest's tables, a translation that stays stale until
//! it is invalidated, and a fault.
//!
//!     cargo run -p twostage-emulated --features test-kit --example vtd
//!
//! The host is the emulated one. On a kernel's host only the first lines differ, and the device and
//! the guest are real: see `kernel_host` of the package `twostage`.

use std::error::Error;
use std::sync::{Arc, Mutex};

use twostage::iommufd::HostIommu;
use twostage::nesting::GuestIoas;
use twostage::spec::pci::{Bdf, Pasid};
use twostage::spec::vtd::fault::FaultReason;
use twostage::spec::vtd::qi::{AddressMask, Descriptor};
use twostage::spec::vtd::regs;
use twostage::unit::VtdBuilder;
use twostage::viommu::InterruptSink;
use twostage_emulated::kit::vtd::{Completion, Driver, Entry};
use twostage_emulated::kit::{Mmio, Pages};
use twostage_emulated::{DeviceConfig, DmaAttributes, EmulatedHost, VtdUnit, VtdUnitConfig};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// An address that only the guest's tables map.
const IOVA: u64 = 0x7000_0000_4000;
/// The guest's name of an address space.
const DOMAIN: u16 = 7;

/// Receives the unit's own interrupts. In a VMM it sends them to the virtual machine's LAPICs.
#[derive(Debug, Default)]
struct Messages(Mutex<Vec<(u64, u32)>>);

impl InterruptSink for Messages {
    fn send_msi(&self, address: u64, data: u32) {
        self.0.lock().expect("no panic").push((address, data));
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    // The host has an IOMMU, and a device behind it, which takes 8 bits of PASIDs.
    let host = EmulatedHost::new();
    let unit = host.add_unit(VtdUnit::new(VtdUnitConfig::default()));
    let place = Bdf::new(0, 4, 0).ok_or("no such address")?;
    host.add_device("nic", unit, place, DeviceConfig::default().with_pasid_bits(8))?;
    let dev = host.device_bind("nic")?;

    // The VMM maps guest memory on the host, and builds the virtual unit on that.
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 16 << 20)])?);
    let ioas = GuestIoas::new(host.clone())?;
    ioas.map_all(&memory)?;
    let rid = Bdf::new(0, 3, 0).ok_or("no such address")?;
    let messages = Arc::new(Messages::default());
    let builder = VtdBuilder::new(ioas, memory.clone(), messages.clone());
    let vtd = Arc::new(builder.device(rid, dev, "nic").build()?);
    println!("the guest is offered {:?}", vtd.config());

    // From here on: the guest (`guest`) and the device (`nic`).
    let guest = Driver::new(Pages::new(memory.clone(), 0x10_0000), vtd.clone());
    let mut nic = host.dma_port("nic").ok_or("no such device")?;
    let any = DmaAttributes::default();
    let [old, new] = [guest.page(), guest.page()];
    let at = |gpa: u64| memory.read_obj::<u8>(GuestAddress(gpa));

    // Without translation, IOVAs are GPAs.
    nic.write(any, old, &[1])?;
    assert_eq!(at(old)?, 1);

    // The guest gives the device a table, and enables translation.
    let table = guest.page();
    guest.map(table, IOVA, old, 1, true);
    guest.set_entry(rid, 0, Entry::FirstStage { table, domain: DOMAIN });
    guest.enable();
    nic.write(any, IOVA, &[2])?;
    assert_eq!(at(old)?, 2);
    println!("{}", host.graph());

    // A changed table has no effect while the host still caches the old one.
    guest.map(table, IOVA, new, 1, true);
    nic.write(any, IOVA, &[3])?;
    assert_eq!((at(old)?, at(new)?), (3, 0), "the translation is stale");
    let range = Some(AddressMask { address: IOVA, mask: 0, leaf: true });
    let pasid = Pasid::new(0).ok_or("no such PASID")?;
    let invalidation = Descriptor::PasidIotlb { domain: DOMAIN, pasid, range };
    assert_eq!(guest.submit(&[invalidation]), Completion::Done);
    nic.write(any, IOVA, &[4])?;
    assert_eq!((at(old)?, at(new)?), (3, 4));

    // A PASID has tables of its own.
    let (other, process) = (guest.page(), DmaAttributes { pasid: Some(5), ..any });
    guest.map(other, IOVA, old, 1, true);
    guest.set_entry(rid, 5, Entry::FirstStage { table: other, domain: DOMAIN });
    assert_eq!(guest.flush_pasid_cache(), Completion::Done);
    nic.write(process, IOVA, &[5])?;
    assert_eq!((at(old)?, at(new)?), (5, 4));

    // What no table maps is refused, and the guest is told: an interrupt, and a record.
    guest.registers.write32(regs::FEDATA, 0x41);
    guest.registers.write32(regs::FEADDR, 0xfee0_0000);
    guest.registers.write32(regs::FECTL, 0);
    let error = nic.write(any, IOVA + 0x1000, &[6]).expect_err("nothing is mapped there");
    println!("the device sees: {error}");
    let (record, reason) = guest.take_fault().ok_or("the guest is not told")?;
    println!("the guest sees: {reason:?} at {:#x} from {rid}", record.address());
    assert_eq!(reason, Some(FaultReason::FirstStageNotPresent));
    assert_eq!((record.high.sid(), record.address()), (rid.raw(), IOVA + 0x1000));
    assert_eq!(*messages.0.lock().expect("no panic"), [(0xfee0_0000, 0x41)]);

    // The end: the unit leaves nothing on the host, and memory goes with its last user.
    println!("{:?}", vtd.model().counters());
    vtd.shutdown()?;
    host.device_unbind(dev)?;
    assert_eq!(host.live_objects(), 0);
    Ok(())
}
