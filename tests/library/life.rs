// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtual VT-d in a VMM of cloud-hypervisor's types, by [`super::adapter`]: a guest's life with
//! DMA, interrupts, a move to another host, and devices that come and go.

use std::error::Error;
use std::sync::Arc;

use twostage::iommufd::{HostIommu, ObjectId};
use twostage::spec::pci::{Bdf, Pasid};
use twostage::spec::vtd::fault::FaultReason;
use twostage::spec::vtd::interrupt::{Irte, IrteHigh, IrteLow, RemappableAddress};
use twostage::spec::vtd::qi::{Descriptor, InterruptEntryScope};
use twostage_emulated::kit::vtd::{Completion, Driver, Entry};
use twostage_emulated::kit::{Mmio, Pages, PAGE};
use twostage_emulated::{
    DeviceConfig, DmaAttributes, EmulatedHost, UnitId, VtdUnit, VtdUnitConfig,
};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::adapter::{Memory, OnBus, Vmm};
use super::cloud_hypervisor::{
    BusDeviceSync, InterruptSourceConfig, InterruptSourceGroup, MsiIrqSourceConfig, Sent,
};

const IOVA: u64 = 0x7000_0000_4000;
const DOMAIN: u16 = 7;
/// Where the registers are on the bus.
const BASE: u64 = 0xfed9_0000;
/// The guest's devices.
const NET: Bdf = Bdf::from_raw(0x18);
const LATE: Bdf = Bdf::from_raw(0x20);

/// The guest's loads and stores go over the bus.
struct Bus(Arc<OnBus>);

impl Mmio for Bus {
    fn read(&self, offset: u64, bytes: &mut [u8]) {
        BusDeviceSync::read(&*self.0, BASE, offset, bytes);
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        assert!(BusDeviceSync::write(&*self.0, BASE, offset, bytes).is_none());
    }
}

/// A host with an IOMMU and the device `net0`.
fn host() -> Result<(Arc<EmulatedHost>, UnitId, ObjectId), Box<dyn Error>> {
    let host = EmulatedHost::new();
    let unit = host.add_unit(VtdUnit::new(VtdUnitConfig::default()));
    host.add_device("net0", unit, Bdf::from_raw(0x40), DeviceConfig::default())?;
    let dev = host.device_bind("net0")?;
    Ok((host, unit, dev))
}

/// Memory at 0 and above 4 GiB.
fn memory() -> Result<Memory, Box<dyn Error>> {
    Ok(Memory::from_ranges(&[(GuestAddress(0), 4 << 20), (GuestAddress(4 << 30), 1 << 20)])?)
}

/// One byte from a device to [`IOVA`] and `offset`.
fn dma(host: &EmulatedHost, name: &str, offset: u64, value: u8) -> Result<(), Box<dyn Error>> {
    let mut port = host.dma_port(name).ok_or("no such device")?;
    Ok(port.write(DmaAttributes::default(), IOVA + offset, &[value])?)
}

fn is_dirty(memory: &Memory, gpa: u64) -> bool {
    let region = memory.find_region(GuestAddress(gpa)).expect("guest memory");
    region.bitmap().dirty_at((gpa - region.start_addr().0) as usize)
}

/// All pages of `domain`, and what the unit caches of interrupts.
fn invalidate(guest: &Driver<Bus>) {
    let pasid = Pasid::new(0).expect("0 is one");
    let pages = Descriptor::PasidIotlb { domain: DOMAIN, pasid, range: None };
    let interrupts = Descriptor::InterruptEntryCache(InterruptEntryScope::Global);
    assert_eq!(guest.submit(&[pages, interrupts]), Completion::Done);
}

/// An entry that sends `vector` of LAPIC 1, for [`NET`] only.
fn interrupt(vector: u8) -> Irte {
    let low = IrteLow::new().with_p(true).with_v(vector).with_dst(1);
    Irte { low, high: IrteHigh::new().with_svt(1).with_sid(NET.raw()) }
}

/// The guest writes the device's MSI-X entry: the remappable interrupt 3.
fn unmask(vectors: &dyn InterruptSourceGroup) -> Result<(), Box<dyn Error>> {
    let low_addr = RemappableAddress::new().with_handle(3).into_bits();
    let config = MsiIrqSourceConfig { low_addr, devid: NET.raw().into(), ..Default::default() };
    Ok(vectors.update(0, InterruptSourceConfig::MsiIrq(config), false, true)?)
}

#[test]
fn a_vmm_of_cloud_hypervisors_types() -> Result<(), Box<dyn Error>> {
    let (host, _, dev) = host()?;
    let vmm = Vmm::new(host.clone(), memory()?, (NET, dev), None)?;
    let memory = Arc::new(vmm.memory.clone());
    let guest = Driver::new(Pages::new(memory.clone(), 0x10_0000), Bus(vmm.vtd.clone()));
    let at = |gpa: u64| memory.read_obj::<u8>(GuestAddress(gpa));

    // DMA, which marks its page.
    let (old, new, table) = (4 << 30, (4 << 30) + PAGE, guest.page());
    guest.map(table, IOVA, old, 1, true);
    guest.set_entry(NET, 0, Entry::FirstStage { table, domain: DOMAIN });
    guest.enable();
    assert!(!is_dirty(&memory, old));
    dma(&host, "net0", 0, 1)?;
    assert_eq!((at(old)?, is_dirty(&memory, old)), (1, true));

    // Stale, until it is invalidated.
    guest.map(table, IOVA, new, 1, true);
    dma(&host, "net0", 0, 2)?;
    assert_eq!((at(old)?, at(new)?, is_dirty(&memory, new)), (2, 0, false));
    invalidate(&guest);
    dma(&host, "net0", 0, 3)?;
    assert_eq!((at(old)?, at(new)?, is_dirty(&memory, new)), (2, 3, true));

    // A fault.
    dma(&host, "net0", PAGE, 4).unwrap_err();
    let (record, reason) = guest.take_fault().ok_or("the guest is not told")?;
    assert_eq!(reason, Some(FaultReason::FirstStageNotPresent));
    assert_eq!((record.high.sid(), record.address()), (NET.raw(), IOVA + PAGE));

    // Remapped interrupts: the guest changes where they go, and the VMM does nothing for that.
    let interrupts = guest.page();
    guest.set_interrupt(interrupts, 3, interrupt(0x51));
    guest.enable_remapping(interrupts);
    let vectors = vmm.vectors(NET)?;
    unmask(&*vectors)?;
    vectors.trigger(0)?;
    guest.set_interrupt(interrupts, 3, interrupt(0x52));
    invalidate(&guest);
    vectors.trigger(0)?;
    guest.set_interrupt(interrupts, 3, Irte::default());
    invalidate(&guest);
    vectors.trigger(0)?;
    let (record, _) = guest.take_fault().ok_or("the guest is not told")?;
    assert_eq!(record.high.sid(), NET.raw());
    // KVM sent the others by its routes, as they then were.
    let lapic = 0xfee0_1000;
    let [first, second] = [0x4051, 0x4052].map(|data| Sent::Routed(lapic, data));
    assert_eq!(*vmm.kvm.sent.lock().unwrap(), [first, second]);
    guest.set_interrupt(interrupts, 3, interrupt(0x53));

    // A move to another host: the state, memory, the same device.
    let state = vmm.vtd.0.snapshot()?;
    let mut low = vec![0; 4 << 20];
    memory.read_slice(&mut low, GuestAddress(0))?;
    vmm.vtd.0.shutdown()?;
    host.device_unbind(dev)?;
    assert_eq!(host.live_objects(), 0);
    let (host, unit, dev) = self::host()?;
    let copy = self::memory()?;
    copy.write_slice(&low, GuestAddress(0))?;
    let next = Vmm::new(host.clone(), copy, (NET, dev), Some(&state))?;
    let memory = Arc::new(next.memory.clone());
    let pages = Pages::new(memory.clone(), guest.pages.free());
    let guest = guest.moved(pages, Bus(next.vtd.clone()));
    next.vtd.0.drain_queue();
    let at = |gpa: u64| memory.read_obj::<u8>(GuestAddress(gpa));
    dma(&host, "net0", 0, 5)?;
    assert_eq!((at(new)?, is_dirty(&memory, new)), (5, true));
    let vectors = next.vectors(NET)?;
    unmask(&*vectors)?;
    invalidate(&guest);
    vectors.trigger(0)?;
    assert_eq!(*next.kvm.sent.lock().unwrap(), [Sent::Routed(lapic, 0x4053)]);

    // A device comes, and goes while the guest uses it.
    host.add_device("late", unit, Bdf::from_raw(0x48), DeviceConfig::default())?;
    let late = host.device_bind("late")?;
    next.vtd.0.add_device(LATE, late, "late")?;
    dma(&host, "late", 0, 6).unwrap_err();
    guest.take_fault().ok_or("its entry is not present")?;
    guest.set_entry(LATE, 0, Entry::FirstStage { table, domain: DOMAIN });
    assert_eq!(guest.flush_pasid_cache(), Completion::Done);
    dma(&host, "late", 0, 7)?;
    assert_eq!(at(new)?, 7);
    next.vtd.0.remove_device(LATE)?;
    dma(&host, "late", 0, 8).unwrap_err();
    assert_eq!(at(new)?, 7);
    host.device_unbind(late)?;

    next.vtd.0.shutdown()?;
    host.device_unbind(dev)?;
    assert_eq!(host.live_objects(), 0);
    Ok(())
}
