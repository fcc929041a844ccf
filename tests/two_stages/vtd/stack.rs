// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The VT-d machine as a stack for the architecture-independent tests.

use std::sync::Arc;

use twostage::iommufd::{iommu_hwpt_vtd_s1, Errno, FaultQueue, HwptData};
use twostage::spec::pci::Bdf;
use twostage::spec::vtd::fault::FaultReason;
use twostage::spec::vtd::qi::{Descriptor, IotlbScope};
use twostage_emulated::kit::Pages;
use twostage_emulated::{DmaError, ObjectGraph, ObjectKind, VtdUnitConfig};

use super::guest::{self, Entry};
use super::machine::{self, vtd_config, MachineOf};
use super::{iotlb, pages, pasid_pages};
use crate::common::{serve_page_requests, PAGE};
use crate::conformance::{Cause, Completion, Fault, Leaf, Stack, Way, IOVA, NAME};

impl From<guest::Completion> for Completion {
    fn from(completion: guest::Completion) -> Self {
        match completion {
            guest::Completion::Done => Self::Done,
            guest::Completion::Stopped(status) => {
                assert!(status.iqe(), "the queue stands, and the guest is not told");
                Self::Stopped
            }
        }
    }
}

impl<const MIRRORED: bool> Stack for MachineOf<MIRRORED> {
    type Invalidation = Descriptor;

    const REFUSALS_ARE_SHOWN: bool = false;

    fn start(failing: u64) -> Result<Self, (String, ObjectGraph)> {
        let unit = VtdUnitConfig::default().with_device_tlb(true).with_page_requests(true);
        let (host, unit) = machine::host(unit);
        host.fail_nth(failing, Errno::ENOMEM);
        Self::on(host.clone(), unit, vtd_config())
            .map_err(|error| (error, host.inner().inner().graph()))
    }

    fn memory(&self) -> &Pages {
        &self.guest.pages
    }

    fn enable(&self) {
        self.guest.enable();
    }

    fn disable(&self) {
        self.guest.disable();
    }

    fn map(&self, table: u64, iova: u64, gpa: u64, leaf: Leaf, writable: bool) {
        let level = match leaf {
            Leaf::Page => 1,
            Leaf::Large => 2,
        };
        self.guest.map(table, iova, gpa, level, writable);
    }

    fn unmap(&self, table: u64, iova: u64) {
        self.guest.unmap(table, iova);
    }

    fn set(&self, rid: Bdf, way: Way) {
        let entry = match way {
            Way::Nowhere => Entry::NotPresent,
            Way::Bypass => Entry::PassThrough { domain: NAME },
            Way::Stage1 { table, name } => Entry::FirstStage { table, domain: name },
        };
        self.guest.set_entry(rid, 0, entry);
    }

    fn flush_tables(&self) -> Completion {
        self.guest.flush_pasid_cache().into()
    }

    fn forget(&self, commands: &[Descriptor]) -> Completion {
        self.guest.submit(commands).into()
    }

    fn resume(&self) -> Completion {
        self.guest.resume().into()
    }

    fn page_of(name: u16, iova: u64) -> Descriptor {
        pasid_pages(name, 0, Some(pages(iova, 0)))
    }

    fn all_of(name: u16) -> Descriptor {
        pasid_pages(name, 0, None)
    }

    fn enough() -> Vec<Descriptor> {
        vec![
            Self::page_of(NAME, IOVA),
            pasid_pages(NAME, 0, Some(pages(IOVA, 9))),
            Self::all_of(NAME),
            iotlb(IotlbScope::Pages { domain: NAME, range: pages(IOVA, 0) }),
            // It covers all of the first-stage tables, whatever the address.
            iotlb(IotlbScope::Pages { domain: NAME, range: pages(IOVA + PAGE, 0) }),
            iotlb(IotlbScope::Domain(NAME)),
            iotlb(IotlbScope::Global),
        ]
    }

    fn not_enough() -> Vec<Descriptor> {
        vec![
            Self::page_of(NAME, IOVA + PAGE),
            pasid_pages(NAME, 1, None),
            Self::all_of(NAME + 1),
            iotlb(IotlbScope::Pages { domain: NAME + 1, range: pages(IOVA, 0) }),
            iotlb(IotlbScope::Domain(NAME + 1)),
        ]
    }

    fn fault(&self) -> Fault {
        let (record, reason) = self.guest.take_fault().expect("the guest is told");
        let cause = match reason {
            Some(FaultReason::FirstStageNotPresent) => Cause::NotMapped,
            Some(FaultReason::WriteDenied) => Cause::WriteDenied,
            _ => Cause::Other,
        };
        Fault { rid: Bdf::from_raw(record.high.sid()), address: record.address(), cause }
    }

    fn drop_faults(&self) {
        while self.guest.take_fault().is_some() {}
    }

    fn read(&self, rid: Bdf, iova: u64) -> Result<u64, DmaError> {
        MachineOf::read(self, rid, None, iova)
    }

    fn write(&self, rid: Bdf, iova: u64, value: u64) -> Result<(), DmaError> {
        MachineOf::write(self, rid, None, iova, value)
    }

    fn replug(&self, rid: Bdf, between: impl FnOnce(&Self)) {
        let dev = self.device(rid);
        self.iommu.remove_device(rid);
        self.nesting.remove_device(rid).unwrap();
        self.nesting.add_device(rid, dev).unwrap();
        between(self);
        self.iommu.add_device(rid).unwrap();
    }

    fn unmap_memory(&self, gpa: u64, length: u64) {
        self.nesting.ioas().unwrap().unmap(gpa, length).unwrap();
    }

    fn serve_page_requests(&self, rid: Bdf, table: u64) -> Arc<dyn FaultQueue> {
        let parent = MachineOf::graph(self).of_kind(ObjectKind::HwptPaging).next().unwrap().id;
        let tables = iommu_hwpt_vtd_s1 { pgtbl_addr: table, addr_width: 48, ..Default::default() };
        serve_page_requests(&self.host, self.device(rid), parent, HwptData::VtdS1(tables))
    }

    fn fail_nth(&self, n: u64) {
        MachineOf::fail_nth(self, n);
    }

    fn fail_twice(&self) {
        self.fail_next(2);
    }

    fn is_armed(&self) -> bool {
        self.host.is_armed()
    }

    fn graph(&self) -> ObjectGraph {
        MachineOf::graph(self)
    }

    fn host_calls(&self) -> u64 {
        self.nesting.counters().host_calls
    }

    fn refused_attaches(&self) -> u64 {
        self.nesting.counters().refused_attaches
    }

    fn end(self) -> usize {
        MachineOf::end(self)
    }
}
