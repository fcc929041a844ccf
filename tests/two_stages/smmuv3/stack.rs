// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The SMMUv3 machine as a stack for the architecture-independent tests.

use std::sync::Arc;

use twostage::iommufd::{iommu_hwpt_arm_smmuv3, Errno, FaultQueue, HwptData};
use twostage::spec::pci::Bdf;
use twostage::spec::smmuv3::command::{AddressRange, Command};
use twostage::spec::smmuv3::event::EventId;
use twostage_emulated::kit::Pages;
use twostage_emulated::{DmaError, ObjectGraph, ObjectKind};

use super::guest::{self, Entry};
use super::machine::{self, Machine};
use crate::common::{serve_page_requests, A, B, PAGE};
use crate::conformance::{Cause, Completion, Fault, Leaf, Stack, Way, IOVA, NAME};

impl From<guest::Completion> for Completion {
    fn from(completion: guest::Completion) -> Self {
        match completion {
            guest::Completion::Done => Self::Done,
            guest::Completion::Stopped(..) => Self::Stopped,
        }
    }
}

impl Stack for Machine {
    type Invalidation = Command;

    const REFUSALS_ARE_SHOWN: bool = true;

    fn start(failing: u64) -> Result<Self, (String, ObjectGraph)> {
        let (host, unit) = machine::host();
        host.fail_nth(failing, Errno::ENOMEM);
        Self::on(host.clone(), unit).map_err(|error| (error, host.inner().inner().graph()))
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
            Leaf::Page => 3,
            Leaf::Large => 2,
        };
        self.guest.map(table, iova, gpa, level, writable);
    }

    fn unmap(&self, table: u64, iova: u64) {
        self.guest.unmap(table, iova);
    }

    fn set(&self, rid: Bdf, way: Way) {
        let entry = match way {
            Way::Nowhere => Entry::Abort,
            Way::Bypass => Entry::Bypass,
            Way::Stage1 { table, name } => Entry::Stage1 { cd: self.guest.context(table, name) },
        };
        self.guest.set_entry(rid.into(), entry);
    }

    fn flush_tables(&self) -> Completion {
        self.guest.flush_entries(&[A, B]).into()
    }

    fn forget(&self, commands: &[Command]) -> Completion {
        self.guest.submit(commands).into()
    }

    fn resume(&self) -> Completion {
        self.guest.resume().into()
    }

    fn page_of(name: u16, iova: u64) -> Command {
        Command::TlbiNhVa { vmid: 0, asid: name, range: AddressRange::at(iova) }
    }

    fn all_of(name: u16) -> Command {
        Command::TlbiNhAsid { vmid: 0, asid: name }
    }

    fn enough() -> Vec<Command> {
        let leaf = AddressRange { leaf: true, ..AddressRange::at(IOVA) };
        // Two pages of 4 KiB, starting one before.
        let range = AddressRange { tg: 1, num: 1, ..AddressRange::at(IOVA - PAGE) };
        vec![
            Self::page_of(NAME, IOVA),
            Command::TlbiNhVa { vmid: 0, asid: NAME, range: leaf },
            Command::TlbiNhVa { vmid: 0, asid: NAME, range },
            Command::TlbiNhVaa { vmid: 0, range: AddressRange::at(IOVA) },
            Self::all_of(NAME),
            Command::TlbiNhAll { vmid: 0 },
            // The host's VMID is used, not the guest's.
            Command::TlbiNhAll { vmid: 9 },
            Command::TlbiNsnhAll,
        ]
    }

    fn not_enough() -> Vec<Command> {
        vec![
            Self::page_of(NAME, IOVA + PAGE),
            Self::page_of(NAME + 1, IOVA),
            Self::all_of(NAME + 1),
            Command::TlbiNhVaa { vmid: 0, range: AddressRange::at(IOVA - PAGE) },
            guest::cfgi_cd(A),
        ]
    }

    fn fault(&self) -> Fault {
        let event = self.event();
        let cause = match event.id() {
            Some(EventId::Translation) => Cause::NotMapped,
            Some(EventId::Permission) => Cause::WriteDenied,
            _ => Cause::Other,
        };
        let rid = event.stream().bdf().expect("StreamIDs are Requester IDs");
        Fault { rid, address: event.input_address & !(PAGE - 1), cause }
    }

    fn drop_faults(&self) {
        while self.guest.take_event().is_some() {}
    }

    fn read(&self, rid: Bdf, iova: u64) -> Result<u64, DmaError> {
        Machine::read(self, rid, iova)
    }

    fn write(&self, rid: Bdf, iova: u64, value: u64) -> Result<(), DmaError> {
        Machine::write(self, rid, iova, value)
    }

    fn replug(&self, rid: Bdf, between: impl FnOnce(&Self)) {
        let dev = self.device(rid);
        self.guest.registers.remove_device(rid);
        self.nesting.remove_device(rid).unwrap();
        self.nesting.add_device(rid, dev).unwrap();
        between(self);
        self.guest.registers.add_device(rid).unwrap();
    }

    fn unmap_memory(&self, gpa: u64, length: u64) {
        self.nesting.ioas().unwrap().unmap(gpa, length).unwrap();
    }

    fn serve_page_requests(&self, rid: Bdf, table: u64) -> Arc<dyn FaultQueue> {
        let viommu = self.graph().of_kind(ObjectKind::Viommu).next().unwrap().id;
        // V, stage 1 only.
        let ste = [1 | 5 << 1 | self.guest.context(table, NAME), 0];
        let data = HwptData::ArmSmmuV3(iommu_hwpt_arm_smmuv3 { ste });
        serve_page_requests(&self.host, self.device(rid), viommu, data)
    }

    fn fail_nth(&self, n: u64) {
        self.host.fail_nth(n, Errno::ENOMEM);
    }

    fn fail_twice(&self) {
        self.host.fail_next(2, Errno::ENOMEM);
    }

    fn is_armed(&self) -> bool {
        self.host.is_armed()
    }

    fn graph(&self) -> ObjectGraph {
        self.host.inner().inner().graph()
    }

    fn host_calls(&self) -> u64 {
        self.nesting.counters().host_calls
    }

    fn refused_attaches(&self) -> u64 {
        self.nesting.counters().refused_attaches
    }

    fn end(self) -> usize {
        Machine::end(self)
    }
}
