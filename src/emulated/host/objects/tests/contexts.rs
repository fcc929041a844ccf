// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Several iommufds on one IOMMU concurrently: none blocks another forever, and each device
//! accesses its own memory.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread;

use vm_memory::{Bytes, MemoryRegionAddress};

use super::fake::memory;
use crate::{DeviceConfig, DmaAttributes, DmaPort, EmulatedHost, Machine, VtdUnit, VtdUnitConfig};
use twostage::iommufd::{HostIommu, MapTarget, Protection};
use twostage::spec::pci::Bdf;

const IOVA: u64 = 0x10000;
const ROUNDS: u64 = 100;

/// Repeatedly attaches, detaches, replaces and unmaps, with memory that contains `mark`.
fn churn(host: &EmulatedHost, name: &str, mark: u64) {
    let dev = host.device_bind(name).unwrap();
    let memory = memory(0x1000);
    memory.region().write_obj(mark, MemoryRegionAddress(0)).unwrap();
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
