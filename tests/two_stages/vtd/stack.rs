// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The VT-d machine as a stack for the architecture-independent tests.

use std::sync::Arc;

use twostage::iommufd::{iommu_hwpt_vtd_s1, Errno, FaultQueue, HwptData};
use twostage::spec::pci::Bdf;
use twostage::spec::vtd::fault::FaultReason;
use twostage::spec::vtd::qi::{ContextScope, Descriptor, IotlbScope};
use twostage_emulated::kit::Pages;
use twostage_emulated::{DmaError, ObjectGraph, ObjectKind, VtdUnitConfig};

use super::guest::{self, Entry};
use super::machine::{self, vtd_config, MachineOf, FIRST_STAGE, LEGACY};
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

/// The faults of second-stage tables do not say whether something is mapped.
fn cause_of_second_stage(is_read: bool) -> Cause {
    if is_read {
        Cause::NotMapped
    } else {
        Cause::WriteDenied
    }
}

impl<const MIRRORED: bool, const TABLES: u8> Stack for MachineOf<MIRRORED, TABLES> {
    type Invalidation = Descriptor;

    const REFUSALS_ARE_SHOWN: bool = false;

    fn start(failing: u64) -> Result<Self, (String, ObjectGraph)> {
        let unit = VtdUnitConfig::default().with_device_tlb(true).with_page_requests(true);
        let (host, unit) = machine::host(unit);
        host.fail_nth(failing, Errno::ENOMEM);
        let config = vtd_config().with_second_stage(TABLES != FIRST_STAGE);
        Self::on(host.clone(), unit, config).map_err(|error| (error, host.inner().inner().graph()))
    }

    fn memory(&self) -> &Pages {
        &self.guest.pages
    }

    fn enable(&self) {
        match TABLES {
            LEGACY => self.guest.enable_legacy(true),
            _ => self.guest.enable(),
        }
    }

    fn disable(&self) {
        self.guest.disable();
    }

    fn map(&self, table: u64, iova: u64, gpa: u64, leaf: Leaf, writable: bool) {
        let level = match leaf {
            Leaf::Page => 1,
            Leaf::Large => 2,
        };
        if TABLES == FIRST_STAGE {
            return self.guest.map(table, iova, gpa, level, writable);
        }
        self.guest.map_second_stage(table, iova, gpa, writable);
        if level == 2 {
            let large = gpa | 1 << 7 | u64::from(writable) << 1 | 1;
            self.guest.store(self.guest.entry_at(table, iova, 2), large);
        }
    }

    fn unmap(&self, table: u64, iova: u64) {
        self.guest.unmap(table, iova);
    }

    fn set(&self, rid: Bdf, way: Way) {
        let entry = match way {
            Way::Nowhere => Entry::NotPresent,
            Way::Bypass => Entry::PassThrough { domain: NAME },
            Way::Stage1 { table, name: domain } if TABLES == FIRST_STAGE => {
                Entry::FirstStage { table, domain }
            }
            Way::Stage1 { table, name: domain } => Entry::SecondStage { table, domain },
        };
        match TABLES {
            LEGACY => self.guest.set_legacy_entry(rid, entry),
            _ => self.guest.set_entry(rid, 0, entry),
        }
    }

    fn flush_tables(&self) -> Completion {
        match TABLES {
            LEGACY => self.guest.submit(&[Descriptor::ContextCache(ContextScope::Global)]).into(),
            _ => self.guest.flush_pasid_cache().into(),
        }
    }

    fn forget(&self, commands: &[Descriptor]) -> Completion {
        self.guest.submit(commands).into()
    }

    fn resume(&self) -> Completion {
        self.guest.resume().into()
    }

    fn page_of(name: u16, iova: u64) -> Descriptor {
        match TABLES {
            FIRST_STAGE => pasid_pages(name, 0, Some(pages(iova, 0))),
            _ => iotlb(IotlbScope::Pages { domain: name, range: pages(iova, 0) }),
        }
    }

    fn all_of(name: u16) -> Descriptor {
        match TABLES {
            FIRST_STAGE => pasid_pages(name, 0, None),
            _ => iotlb(IotlbScope::Domain(name)),
        }
    }

    fn enough() -> Vec<Descriptor> {
        let mut enough = vec![
            Self::page_of(NAME, IOVA),
            Self::all_of(NAME),
            iotlb(IotlbScope::Pages { domain: NAME, range: pages(IOVA, 0) }),
            iotlb(IotlbScope::Pages { domain: NAME, range: pages(IOVA, 9) }),
            iotlb(IotlbScope::Domain(NAME)),
            iotlb(IotlbScope::Global),
        ];
        if TABLES == FIRST_STAGE {
            enough.push(pasid_pages(NAME, 0, Some(pages(IOVA, 9))));
            // It covers all of the first-stage tables, whatever the address.
            enough.push(iotlb(IotlbScope::Pages { domain: NAME, range: pages(IOVA + PAGE, 0) }));
        }
        enough
    }

    fn not_enough() -> Vec<Descriptor> {
        let mut not_enough = vec![
            Self::page_of(NAME, IOVA + PAGE),
            Self::all_of(NAME + 1),
            iotlb(IotlbScope::Pages { domain: NAME + 1, range: pages(IOVA, 0) }),
            iotlb(IotlbScope::Domain(NAME + 1)),
        ];
        // Legacy mode has no such descriptor.
        if TABLES != LEGACY {
            not_enough.push(pasid_pages(NAME, 1, None));
        }
        not_enough
    }

    fn fault(&self) -> Fault {
        let (record, reason) = self.guest.take_fault().expect("the guest is told");
        let cause = match reason {
            Some(FaultReason::FirstStageNotPresent) => Cause::NotMapped,
            Some(FaultReason::WriteDenied) => Cause::WriteDenied,
            Some(
                FaultReason::SecondStageDenied
                | FaultReason::LegacyReadDenied
                | FaultReason::LegacyWriteDenied,
            ) => cause_of_second_stage(record.high.t1()),
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
