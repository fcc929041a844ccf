// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From policies to attachments: where each stream's DMA is attached.

use super::state::{self, Entry, State, Unit, ABORT};
use crate::iommufd::{iommu_hwpt_arm_smmuv3, HwptAlloc, HwptData, HwptFlags, ObjectId};
use crate::nesting::reader::QueueThread;
use crate::nesting::{NestingError, Result};
use crate::spec::pci::Bdf;
use crate::spec::smmuv3::StreamId;
use crate::viommu::smmuv3::StreamPolicy;
use crate::warn_limited;

impl State {
    /// See [`crate::viommu::smmuv3::SmmuHostSide::configure`].
    pub fn configure(&mut self, stream: StreamId, policy: &StreamPolicy) -> Result<()> {
        let result = self.apply(stream, policy);
        if result.is_err() {
            self.block(stream);
        }
        result
    }

    fn apply(&mut self, stream: StreamId, policy: &StreamPolicy) -> Result<()> {
        let Some(device) = self.devices.get(&stream).copied() else {
            return match policy {
                StreamPolicy::Abort => Ok(()),
                _ => Err(NestingError::NoStream(stream)),
            };
        };
        if device.unsettled {
            self.detach(stream)?;
        }
        let entry = state::entry(policy, &device.info);
        let found = match entry {
            Some(entry) => self.nested.find(&entry),
            None => self.unit.as_ref().map(Unit::parent),
        };
        let attached = self.devices.get(&stream).and_then(|device| device.attached);
        let is_there = match attached {
            Some(hwpt) => found == Some(hwpt),
            None => entry == Some(ABORT),
        };
        if is_there {
            self.counters.unchanged += 1;
            return Ok(());
        }
        let hwpt = match (found, entry) {
            (Some(hwpt), _) => hwpt,
            (None, Some(entry)) => self.alloc_nested(device.rid, device.dev, entry)?,
            // With a device there is a nesting parent.
            (None, None) => return Err(NestingError::NoDevice(device.rid)),
        };
        let result = self.prepare_stage1(entry).and_then(|()| self.attach(stream, hwpt));
        match result {
            Ok(()) => {
                self.counters.nested_shares += u64::from(found.is_some() && entry.is_some());
            }
            Err(_) => {
                self.block(stream);
                self.destroy_unused(hwpt);
            }
        }
        result
    }

    /// Before a stream uses stage 1 with `entry`: flushes pending stale translations.
    fn prepare_stage1(&mut self, entry: Option<Entry>) -> Result<()> {
        if !entry.is_some_and(state::translates) {
            return Ok(());
        }
        if self.flush_due {
            self.flush_everything()?;
        }
        self.tlb_used = true;
        Ok(())
    }

    /// Allocates the `HWPT_NESTED` of `entry`, without users.
    fn alloc_nested(&mut self, rid: Bdf, dev: ObjectId, entry: Entry) -> Result<ObjectId> {
        let Some(unit) = &self.unit else { return Err(NestingError::NoDevice(rid)) };
        let pages = self.pages.as_ref().filter(|_| state::translates(entry));
        let fault = pages.map(QueueThread::object);
        let args = HwptAlloc {
            flags: HwptFlags::new().with_fault_id_valid(fault.is_some()),
            dev,
            pt: unit.viommu(),
            data: HwptData::ArmSmmuV3(iommu_hwpt_arm_smmuv3 { ste: entry }),
            fault,
        };
        let hwpt = self
            .objects
            .alloc_hwpt(&args, || format!("nesting the stream table entry of {rid}"))?;
        self.counters.nested_allocs += 1;
        self.nested.insert(hwpt, entry);
        Ok(hwpt)
    }

    /// Attaches `stream` to `hwpt`, replacing its attachment. If refused, an SMMU continues with
    /// the old one.
    fn attach(&mut self, stream: StreamId, hwpt: ObjectId) -> Result<()> {
        let Some(device) = self.devices.get_mut(&stream) else {
            return Err(NestingError::NoStream(stream));
        };
        if let Err(source) = self.objects.host().device_attach(device.dev, None, hwpt) {
            device.unsettled = true;
            self.counters.refused_attaches += 1;
            return Err(NestingError::Host { what: format!("attaching {}", device.rid), source });
        }
        let before = device.attached.replace(hwpt);
        device.unsettled = false;
        self.nested.join(hwpt);
        self.counters.replaces += u64::from(before.is_some());
        self.release(before);
        Ok(())
    }

    /// Blocks `stream` as far as the host allows: with an aborting entry, or else with a detach. A
    /// failure is retried when the stream is next configured or removed.
    pub fn block(&mut self, stream: StreamId) {
        if !self.is_reachable(stream) {
            return;
        }
        if let Err(error) = self.abort(stream).or_else(|_| self.detach(stream)) {
            warn_limited!("stream {stream} could not be blocked: {error}");
        }
    }

    fn abort(&mut self, stream: StreamId) -> Result<()> {
        let Some(device) = self.devices.get(&stream).copied() else { return Ok(()) };
        let hwpt = match self.nested.find(&ABORT) {
            // The host would consider it attached already.
            Some(hwpt) if device.attached == Some(hwpt) => return self.detach(stream),
            Some(hwpt) => hwpt,
            None => self.alloc_nested(device.rid, device.dev, ABORT)?,
        };
        self.attach(stream, hwpt)
    }

    /// Detaches `stream`: its DMA is blocked.
    pub fn detach(&mut self, stream: StreamId) -> Result<()> {
        let Some(device) = self.devices.get_mut(&stream) else { return Ok(()) };
        if device.attached.is_none() && !device.unsettled {
            return Ok(());
        }
        if let Err(source) = self.objects.detach(device.dev, None) {
            device.unsettled = true;
            return Err(NestingError::Host { what: format!("detaching {}", device.rid), source });
        }
        let before = device.attached.take();
        device.unsettled = false;
        self.release(before);
        Ok(())
    }

    /// A stream no longer uses `hwpt`.
    fn release(&mut self, hwpt: Option<ObjectId>) {
        if let Some(hwpt) = hwpt {
            self.nested.leave(hwpt);
            self.destroy_unused(hwpt);
        }
    }

    /// Destroys a `HWPT_NESTED` without users. The aborting and the bypassing one stay: the guest
    /// needs them again.
    fn destroy_unused(&mut self, hwpt: ObjectId) {
        let of_the_guest = self.nested.stage1(hwpt).is_some_and(state::translates);
        if of_the_guest && self.nested.remove_unused(hwpt) {
            self.objects.destroy(hwpt);
        }
    }

    /// Whether the host may let DMA of `stream` pass.
    pub fn is_reachable(&self, stream: StreamId) -> bool {
        self.devices.get(&stream).is_some_and(|device| {
            device.unsettled || device.attached.is_some() && self.entry_of(device) != Some(ABORT)
        })
    }
}
