// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The objects on the emulated hardware: the effect of verbs on DMA, also of several iommufds on
//! one IOMMU concurrently: none blocks another forever, and each device accesses its own memory.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread;
use twostage::sync::Mutex;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, MmapRegion};

use super::fake::{memory, Failure};
use crate::{DeviceConfig, DmaAttributes, DmaPort, EmulatedHost, Machine, VtdUnit, VtdUnitConfig};
use twostage::iommufd::{
    iommu_hwpt_vtd_s1, iommu_hwpt_vtd_s1_invalidate, Errno, FaultSink, HostFault, HostIommu,
    HwptAlloc, HwptData, HwptFlags, InvalidateData, MapTarget, ObjectId, Protection, UserMemory,
};
use twostage::nesting::GuestIoas;
use twostage::spec::pci::Bdf;

const RW: Protection = Protection::READ_WRITE;
const PASID: DmaAttributes = DmaAttributes { pasid: Some(5), privileged: false, execute: false };

struct Rig {
    host: Arc<EmulatedHost>,
    port: DmaPort,
    dev: ObjectId,
    ioas: ObjectId,
    memory: UserMemory,
}

/// A bound device, and 64 KiB of memory mapped at 0x10000.
fn rig() -> Rig {
    let host = EmulatedHost::new();
    let unit = host.add_unit(VtdUnit::new(VtdUnitConfig::default()));
    let config = DeviceConfig { pasid_bits: 8, ..DeviceConfig::default() };
    host.add_device("edu", unit, Bdf::from_raw(0x20), config).unwrap();
    let port = host.dma_port("edu").unwrap();
    assert!(host.dma_port("nobody").is_none());
    let (dev, ioas) = (host.device_bind("edu").unwrap(), host.ioas_alloc().unwrap());
    let memory = memory(0x10000);
    host.ioas_map(ioas, &memory, MapTarget::Fixed(0x10000), RW).unwrap();
    Rig { host, port, dev, ioas, memory }
}

impl Rig {
    fn alloc(&self, pt: ObjectId, flags: HwptFlags, data: HwptData) -> ObjectId {
        let args = HwptAlloc { flags, dev: self.dev, pt, data, fault: None };
        self.host.hwpt_alloc(&args).unwrap()
    }

    fn poke(&self, offset: u64, value: u64) {
        self.memory.slice().write_obj(value, offset as usize).unwrap();
    }

    /// The result of a DMA read of 8 bytes.
    fn read(&mut self, attributes: DmaAttributes, iova: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        let outcome = self.port.read(attributes, iova, &mut bytes);
        outcome.ok().map(|()| u64::from_le_bytes(bytes))
    }
}

#[test]
fn a_device_reaches_what_its_ioas_maps_while_it_is_attached() {
    let mut rig = rig();
    rig.poke(0x1000, 42);
    let plain = DmaAttributes::default();
    assert_eq!(rig.read(plain, 0x11000), None, "blocked until attached");
    rig.host.device_attach(rig.dev, None, rig.ioas).unwrap();
    assert_eq!(rig.read(plain, 0x11000), Some(42));
    assert_eq!(rig.read(plain, 0x20000), None, "beyond the mapping");
    let copy = MapTarget::Fixed(0x50000);
    rig.host.ioas_copy(rig.ioas, copy, rig.ioas, 0x10000, 0x10000, RW).unwrap();
    assert_eq!(rig.read(plain, 0x51000), Some(42));
    rig.host.ioas_unmap(rig.ioas, 0x10000, 0x10000).unwrap();
    assert_eq!((rig.read(plain, 0x11000), rig.read(plain, 0x51000)), (None, Some(42)));
    let empty = rig.host.ioas_alloc().unwrap();
    rig.host.device_attach(rig.dev, None, empty).unwrap();
    assert_eq!(rig.read(plain, 0x51000), None, "replaced");
    rig.host.device_attach(rig.dev, None, rig.ioas).unwrap();
    assert_eq!(rig.read(plain, 0x51000), Some(42));
    rig.host.device_detach(rig.dev, None).unwrap();
    assert_eq!(rig.read(plain, 0x51000), None, "detached");
}

#[test]
fn read_only_memory_is_not_written() {
    let mut rig = rig();
    let target = MapTarget::Fixed(0x50000);
    rig.host.ioas_map(rig.ioas, &rig.memory, target, Protection::READ_ONLY).unwrap();
    rig.host.device_attach(rig.dev, None, rig.ioas).unwrap();
    let plain = DmaAttributes::default();
    assert!(rig.port.write(plain, 0x50000, &[1]).is_err());
    rig.port.write(plain, 0x10000, &[1]).unwrap();
    assert_eq!(rig.read(plain, 0x50000), Some(1));
}

#[test]
fn a_nested_hwpt_walks_the_users_tables_and_keeps_them_cached() {
    let mut rig = rig();
    // 4-level tables in the device's view of memory: IOVA 0 maps to `leaf`.
    for (level, table) in [0u64, 0x1000, 0x2000].into_iter().enumerate() {
        rig.poke(table, (0x11000 + 0x1000 * level as u64) | 7);
    }
    let leaf = |rig: &Rig, page: u64| rig.poke(0x3000, page | 7);
    rig.poke(0x4000, 44);
    rig.poke(0x5000, 55);
    leaf(&rig, 0x14000);
    let parent = rig.alloc(rig.ioas, HwptFlags::new().with_nest_parent(true), HwptData::None);
    let tables = iommu_hwpt_vtd_s1 { pgtbl_addr: 0x10000, addr_width: 48, ..Default::default() };
    let flags = HwptFlags::new().with_pasid(true);
    let nested = rig.alloc(parent, flags, HwptData::VtdS1(tables));
    rig.host.device_attach(rig.dev, Some(5), nested).unwrap();
    assert_eq!(rig.read(PASID, 0), Some(44));
    assert_eq!(rig.read(DmaAttributes::default(), 0), None, "another requester");
    leaf(&rig, 0x15000);
    assert_eq!(rig.read(PASID, 0), Some(44), "stale until invalidated");
    let page = iommu_hwpt_vtd_s1_invalidate { npages: 1, ..Default::default() };
    rig.host.hwpt_invalidate(nested, InvalidateData::VtdS1(&[page])).unwrap();
    assert_eq!(rig.read(PASID, 0), Some(55));
    rig.host.ioas_unmap(rig.ioas, 0, u64::MAX).unwrap();
    assert_eq!(rig.read(PASID, 0), None, "what stage 2 lost is gone at once");
}

#[test]
fn values_the_unit_cannot_walk_are_refused_at_the_attachment() {
    let rig = rig();
    let parent = rig.alloc(rig.ioas, HwptFlags::new().with_nest_parent(true), HwptData::None);
    for (flags, addr_width) in [(0, 57), (0, 39), (1, 48), (2, 48)] {
        let tables = iommu_hwpt_vtd_s1 { flags, addr_width, ..Default::default() };
        let nested = rig.alloc(parent, HwptFlags::new(), HwptData::VtdS1(tables));
        assert_eq!(rig.host.device_attach(rig.dev, None, nested).errno(), Errno::EINVAL);
    }
}

#[derive(Default)]
struct Seen(Mutex<Vec<HostFault>>);

impl FaultSink for Seen {
    fn dma_fault(&self, fault: &HostFault) {
        self.0.lock().push(*fault);
    }
}

#[test]
fn faults_name_the_device_object() {
    let mut rig = rig();
    let seen = Arc::new(Seen::default());
    let weak = Arc::downgrade(&seen);
    rig.host.set_fault_sink(rig.dev, weak).unwrap();
    rig.host.device_attach(rig.dev, None, rig.ioas).unwrap();
    assert_eq!(rig.read(DmaAttributes::default(), 0x5000), None);
    let faults = std::mem::take(&mut *seen.0.lock());
    assert_eq!(faults.len(), 1);
    assert_eq!((faults[0].dev, faults[0].address, faults[0].write), (rig.dev, 0x5000, false));
    assert!(faults[0].stage2);
    rig.host.device_unbind(rig.dev).unwrap();
    assert_eq!(rig.read(DmaAttributes::default(), 0x5000), None);
    assert!(seen.0.lock().is_empty(), "an unbound device reports to nobody");
}

#[test]
fn the_extensions_are_those_of_every_unit() {
    let host = EmulatedHost::new();
    assert!(!host.extensions().guest_second_stage && !host.extensions().fault_reports);
    host.add_unit(VtdUnit::new(VtdUnitConfig::default()));
    assert!(host.extensions().guest_second_stage && host.extensions().fault_reports);
    let plain = VtdUnitConfig { guest_second_stage: false, ..VtdUnitConfig::default() };
    host.add_unit(VtdUnit::new(plain));
    assert!(!host.extensions().guest_second_stage && host.extensions().fault_reports);
}

#[test]
fn a_nesting_parent_of_a_unit_with_erratum_772415_takes_no_read_only_mappings() {
    for (erratum_772415, outcome) in [(true, Err(Errno::EINVAL)), (false, Ok(0x10000))] {
        let host = EmulatedHost::new();
        let config = VtdUnitConfig { erratum_772415, ..VtdUnitConfig::default() };
        let unit = host.add_unit(VtdUnit::new(config));
        host.add_device("edu", unit, Bdf::from_raw(0x20), DeviceConfig::default()).unwrap();
        let (dev, pt) = (host.device_bind("edu").unwrap(), host.ioas_alloc().unwrap());
        let flags = HwptFlags::new().with_nest_parent(true);
        let args = HwptAlloc { flags, dev, pt, data: HwptData::None, fault: None };
        host.hwpt_alloc(&args).unwrap();
        let target = MapTarget::Fixed(0x10000);
        let mapped = host.ioas_map(pt, &memory(0x1000), target, Protection::READ_ONLY);
        assert_eq!(mapped.map_err(|error| error.errno), outcome);
    }
    assert!(VtdUnitConfig::default().erratum_772415, "as Linux says of every VT-d");
}

const IOVA: u64 = 0x10000;
const ROUNDS: u64 = 100;

/// Repeatedly attaches, detaches, replaces and unmaps, with memory that contains `mark`.
fn churn(host: &EmulatedHost, name: &str, mark: u64) {
    let dev = host.device_bind(name).unwrap();
    let memory = memory(0x1000);
    memory.slice().write_obj(mark, 0).unwrap();
    let ioases = [0; 2].map(|_| host.ioas_alloc().unwrap());
    for round in 0..ROUNDS {
        let ioas = ioases[(round % 2) as usize];
        let target = MapTarget::Fixed(IOVA);
        host.ioas_map(ioas, &memory, target, Protection::READ_WRITE).unwrap();
        host.device_attach(dev, None, ioas).unwrap();
        if round % 3 == 0 {
            host.device_detach(dev, None).unwrap();
        }
        host.ioas_unmap(ioas, IOVA, 0x1000).unwrap();
    }
    host.device_unbind(dev).unwrap();
}

/// Reads until told to stop; only `mark` may be found.
fn look(mut port: DmaPort, mark: u64, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let mut bytes = [0; 8];
        if port.read(DmaAttributes::default(), IOVA, &mut bytes).is_ok() {
            assert_eq!(u64::from_le_bytes(bytes), mark);
        }
        thread::yield_now();
    }
}

#[test]
fn iommufds_share_an_iommu_without_waiting_for_each_other() {
    let machine = Machine::new();
    let unit = machine.add_unit(VtdUnit::new(VtdUnitConfig::default()));
    let names = ["one", "two", "three"];
    for (rid, name) in (8..).zip(names) {
        machine.add_device(name, unit, Bdf::from_raw(rid), DeviceConfig::default()).unwrap();
    }
    let hosts: Vec<Arc<EmulatedHost>> = names.iter().map(|_| machine.open()).collect();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for (mark, name) in (0xa0..).zip(names) {
            let port = machine.dma_port(name).unwrap();
            let stop = &stop;
            scope.spawn(move || look(port, mark, stop));
        }
        let churns: Vec<_> = (0xa0..)
            .zip(names)
            .zip(&hosts)
            .map(|((mark, name), host)| scope.spawn(move || churn(host, name, mark)))
            .collect();
        let ended: Vec<_> = churns.into_iter().map(thread::ScopedJoinHandle::join).collect();
        stop.store(true, Ordering::Relaxed);
        assert!(ended.iter().all(Result::is_ok));
    });
    for host in hosts {
        host.close();
        assert_eq!((host.live_objects(), host.pinned_bytes()), (0, 0));
    }
}

#[test]
fn guest_memory_is_mapped_as_it_is_and_written_pages_are_marked() {
    let Rig { host, mut port, dev, .. } = rig();
    let ranges = [(GuestAddress(0), 0x8000), (GuestAddress(0x10_0000), 0x4000)];
    let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges).unwrap();
    // Pages of each region that were written since the last time, as bits.
    let marked = || -> Vec<u64> {
        memory.iter().flat_map(|region| MmapRegion::bitmap(region).get_and_reset()).collect()
    };
    let ioas = GuestIoas::new(host.clone()).unwrap();
    ioas.map_all(&memory).unwrap();
    host.device_attach(dev, None, ioas.id()).unwrap();
    let access = host.access_create(None).unwrap();
    access.attach(ioas.id()).unwrap();

    let (plain, mut byte) = (DmaAttributes::default(), [0]);
    port.write(plain, 0x3fff, &[1, 2]).unwrap();
    assert_eq!(marked(), [0b1_1000, 0]);
    port.write(plain, 0x10_3000, &[3]).unwrap();
    assert_eq!(marked(), [0, 0b1000]);
    access.write(0x10_0000, &[4]).unwrap();
    assert_eq!(marked(), [0, 1]);
    port.write(plain, 0x8000, &[5]).unwrap_err();
    for (iova, value) in [(0x3fff, 1), (0x4000, 2), (0x10_3000, 3), (0x10_0000, 4)] {
        port.read(plain, iova, &mut byte).unwrap();
        assert_eq!(byte, [value]);
        access.read(iova, &mut byte).unwrap();
        assert_eq!(byte, [value]);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(iova)).unwrap(), value);
    }
    assert_eq!(marked(), [0, 0]);

    // What is unmapped is let go, also by the hardware's caches.
    let mapping = memory.iter().next().unwrap().get_mmap();
    assert!(Arc::strong_count(&mapping) > 2);
    ioas.unmap(0, 0x8000).unwrap();
    assert_eq!(Arc::strong_count(&mapping), 2);
}
