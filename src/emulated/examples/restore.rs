// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A machine moves to another host: the virtual VT-d is saved as JSON with guest memory, and
//! restored there. The guest notices nothing.
//!
//!     cargo run -p twostage-emulated --features serde,test-kit --example restore

use std::error::Error;
use std::sync::Arc;

use twostage::iommufd::{HostIommu, ObjectId};
use twostage::nesting::GuestIoas;
use twostage::spec::pci::{Bdf, Pasid};
use twostage::spec::vtd::fault::FaultReason;
use twostage::spec::vtd::qi::Descriptor;
use twostage::spec::vtd::regs;
use twostage::unit::VtdBuilder;
use twostage::viommu::vtd::VtdState;
use twostage::viommu::InterruptSink;
use twostage_emulated::kit::vtd::{Completion, Driver, Entry};
use twostage_emulated::kit::{Mmio, Pages};
use twostage_emulated::{DeviceConfig, DmaAttributes, EmulatedHost, VtdUnit, VtdUnitConfig};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const IOVA: u64 = 0x7000_0000_4000;
const DOMAIN: u16 = 7;
const MEMORY: usize = 4 << 20;

/// The unit's own interrupts. A test of what it sends has them in `vtd.rs`.
struct Messages;

impl InterruptSink for Messages {
    fn send_msi(&self, address: u64, data: u32) {
        println!("message {data:#x} to {address:#x}");
    }
}

/// What both machines begin with: a host, its device, and guest memory that is mapped there.
struct Ground {
    host: Arc<EmulatedHost>,
    dev: ObjectId,
    memory: Arc<GuestMemoryMmap>,
    ioas: Arc<GuestIoas>,
}

impl Ground {
    fn new(contents: &[u8]) -> Result<Self, Box<dyn Error>> {
        let host = EmulatedHost::new();
        let unit = host.add_unit(VtdUnit::new(VtdUnitConfig::default()));
        let place = Bdf::new(0, 4, 0).ok_or("no such address")?;
        host.add_device("nic", unit, place, DeviceConfig::default())?;
        let dev = host.device_bind("nic")?;
        let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)])?);
        memory.write_slice(contents, GuestAddress(0))?;
        let ioas = GuestIoas::new(host.clone())?;
        ioas.map_all(&memory)?;
        Ok(Self { host, dev, memory, ioas })
    }

    fn builder(&self) -> VtdBuilder {
        VtdBuilder::new(self.ioas.clone(), self.memory.clone(), Arc::new(Messages))
    }

    /// One byte from the device to `iova`.
    fn dma(&self, iova: u64, value: u8) -> Result<(), Box<dyn Error>> {
        let mut nic = self.host.dma_port("nic").ok_or("no such device")?;
        Ok(nic.write(DmaAttributes::default(), iova, &[value])?)
    }

    fn load(&self, gpa: u64) -> Result<u8, Box<dyn Error>> {
        Ok(self.memory.read_obj(GuestAddress(gpa))?)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let rid = Bdf::new(0, 3, 0).ok_or("no such address")?;

    // A machine's life: a table, a DMA by it, and a fault that the guest has not read yet.
    let here = Ground::new(&[])?;
    let vtd = Arc::new(here.builder().device(rid, here.dev, "nic").build()?);
    let guest = Driver::new(Pages::new(here.memory.clone(), 0x10_0000), vtd.clone());
    let [table, page] = [guest.page(), guest.page()];
    guest.map(table, IOVA, page, 1, true);
    guest.set_entry(rid, 0, Entry::FirstStage { table, domain: DOMAIN });
    guest.enable();
    here.dma(IOVA, 1)?;
    here.dma(IOVA + 0x1000, 1).expect_err("nothing is mapped there");
    let head = guest.registers.read64(regs::IQH);

    // The VMM stops vCPUs and devices, and saves the unit and memory. Only then it halts the unit.
    let saved = serde_json::to_string_pretty(&vtd.snapshot()?)?;
    let mut contents = vec![0; MEMORY];
    here.memory.read_slice(&mut contents, GuestAddress(0))?;
    vtd.shutdown()?;
    here.host.device_unbind(here.dev)?;
    println!("saved: {} bytes of state", saved.len());

    // On the other host: memory first, then the same device, then the unit.
    let there = Ground::new(&contents)?;
    let state: VtdState = serde_json::from_str(&saved)?;
    let vtd = Arc::new(there.builder().device(rid, there.dev, "nic").restore(&state)?);
    // The queue goes on where it was, if something was left in it.
    vtd.drain_queue();
    let free = guest.pages.free();
    let guest = guest.moved(Pages::new(there.memory.clone(), free), vtd.clone());

    // The registers read the same, and the fault is still there.
    assert!(guest.status().tes() && guest.status().qies());
    assert_eq!(guest.registers.read64(regs::IQH), head);
    let (record, reason) = guest.take_fault().ok_or("the fault is lost")?;
    assert_eq!(
        (reason, record.address()),
        (Some(FaultReason::FirstStageNotPresent), IOVA + 0x1000)
    );

    // DMA goes on by the guest's table, which is now another host's HWPT.
    there.dma(IOVA, 2)?;
    assert_eq!((here.load(page)?, there.load(page)?), (1, 2));
    println!("{}", there.host.graph());
    guest.unmap(table, IOVA);
    let pasid = Pasid::new(0).ok_or("no such PASID")?;
    let all = Descriptor::PasidIotlb { domain: DOMAIN, pasid, range: None };
    assert_eq!(guest.submit(&[all]), Completion::Done);
    there.dma(IOVA, 3).expect_err("unmapped, and invalidated");

    // A state of another version is refused by name.
    let newer = saved.replacen("\"version\": 1", "\"version\": 99", 1);
    let error = serde_json::from_str::<VtdState>(&newer).expect_err("nobody knows version 99");
    println!("{error}");
    assert!(error.to_string().contains("version 99"));

    vtd.shutdown()?;
    there.host.device_unbind(there.dev)?;
    Ok(())
}
