// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `IOMMU_FAULT_QUEUE_ALLOC` and `IOMMU_VEVENTQ_ALLOC`, and routing of page requests.

use std::sync::Arc;

use super::object::{Fault, Object, Veventq};
use super::Objects;
use crate::host::device::Slot;
use crate::host::events::{AttachmentId, FaultQueue, PendingGroup, VeventQueue, MAX_DEPTH};
use crate::host::refusal::{allocate, refuse, Outcome};
use twostage::iommufd::{Errno, ObjectId, PageRequest, PageResponseCode};

/// The default type of vEVENTQ, which is invalid (`IOMMU_VEVENTQ_TYPE_DEFAULT`).
const DEFAULT: u32 = iommufd_bindings::iommu_veventq_type_IOMMU_VEVENTQ_TYPE_DEFAULT;

impl Objects {
    /// `IOMMU_FAULT_QUEUE_ALLOC`: the object is open.
    pub fn fault_queue_alloc(&mut self) -> Outcome<(ObjectId, Arc<FaultQueue>)> {
        allocate("a fault queue")?;
        let queue = Arc::new(FaultQueue::default());
        let fault = Fault { queue: queue.clone(), open: true };
        let id = self.table.insert(Object::Fault(fault))?;
        self.table.hold(id);
        Ok((id, queue))
    }

    /// `IOMMU_VEVENTQ_ALLOC`: the object is open.
    pub fn veventq_alloc(
        &mut self,
        viommu: ObjectId,
        kind: u32,
        depth: u32,
    ) -> Outcome<(ObjectId, Arc<VeventQueue>)> {
        if kind == DEFAULT {
            return refuse(Errno::EOPNOTSUPP, "a vEVENTQ cannot have the default type");
        }
        if depth == 0 || depth > MAX_DEPTH {
            return refuse(Errno::EINVAL, format!("a vEVENTQ of {depth} events"));
        }
        let events = self.table.viommu(viommu)?.events.clone();
        if events.has(kind) {
            return refuse(
                Errno::EEXIST,
                format!("vIOMMU {viommu} has a vEVENTQ of type {kind:#x} already"),
            );
        }
        allocate("a vEVENTQ")?;
        let id = self.table.insert(Object::Veventq(Veventq { viommu, kind, open: true }))?;
        self.table.hold(viommu);
        self.table.hold(id);
        Ok((id, events.add(kind, depth)))
    }

    /// The descriptor of a queue is closed; ignored if the object is of another epoch.
    pub fn close_file(&mut self, epoch: u64, id: ObjectId) {
        if epoch == self.closed {
            self.close_queue(id);
        }
    }

    /// A queue is no longer open.
    pub(super) fn close_queue(&mut self, id: ObjectId) {
        let open = match self.table.get_mut(id) {
            Some(Object::Fault(fault)) => &mut fault.open,
            Some(Object::Veventq(veventq)) => &mut veventq.open,
            _ => return,
        };
        if std::mem::take(open) {
            self.table.release(id);
        }
    }

    /// The device `dev` sends a page request. A group is held until its last request, then passed
    /// to the slot's fault queue.
    ///
    /// # Errors
    /// `ENOENT` there is no such device; `EINVAL` there is no fault queue: the device gets a
    /// response.
    pub fn page_request(&mut self, dev: ObjectId, request: PageRequest) -> Outcome<()> {
        let part = self.table.device(dev)?.part.clone();
        let served = self.page_requests_of(dev, &request)?;
        let Some((queue, attachment, by)) = served else {
            part.driver.page_response(&part.requester, &request, PageResponseCode::Invalid);
            return refuse(Errno::EINVAL, "no HWPT of the device takes page requests");
        };
        let device = self.table.device_mut(dev)?;
        if !request.flags.last_page() {
            device.page_requests.push(request);
            return Ok(());
        }
        let of_group = |earlier: &mut PageRequest| earlier.group == request.group;
        let mut requests: Vec<_> = device.page_requests.extract_if(.., of_group).collect();
        requests.push(request);
        queue.report(PendingGroup {
            attachment,
            dev: by,
            requests,
            respond: Box::new(move |code| {
                part.driver.page_response(&part.requester, &request, code);
            }),
        });
        Ok(())
    }

    /// An ID for a new attachment.
    pub(super) fn next_attachment(&mut self) -> AttachmentId {
        self.last_attachment += 1;
        AttachmentId(self.last_attachment)
    }

    /// An attachment of `hwpt` has ended: responds to its requests.
    pub(super) fn end_page_requests(
        &self,
        hwpt: ObjectId,
        ended: Option<AttachmentId>,
    ) -> Outcome<()> {
        if let (Some(fault), Some(ended)) = (self.fault_of(hwpt), ended) {
            self.table.fault(fault)?.queue.end(ended);
        }
        Ok(())
    }

    /// The fault queue of `hwpt`.
    pub(super) fn fault_of(&self, hwpt: ObjectId) -> Option<ObjectId> {
        match self.table.get(hwpt)? {
            Object::HwptPaging(paging) => paging.fault,
            Object::HwptNested(nested) => nested.fault,
            _ => None,
        }
    }

    /// The queue for such page requests, their attachment, and the device that they are reported
    /// under.
    fn page_requests_of(
        &self,
        dev: ObjectId,
        request: &PageRequest,
    ) -> Outcome<Option<(Arc<FaultQueue>, AttachmentId, ObjectId)>> {
        let part = &self.table.device(dev)?.part;
        let slot: Slot = request.flags.pasid_valid().then_some(request.pasid);
        let Some(group) = self.groups.get(&part.group) else { return Ok(None) };
        let mut found = group.get(slot).map(|attachment| (slot, attachment));
        if found.is_none() && slot.is_some() && part.driver.user_pasid_table() {
            // The user's PASID table determines where the PASID goes.
            found = group
                .get(None)
                .map(|attachment| (None, attachment))
                .filter(|(_, own)| matches!(self.table.get(own.hwpt), Some(Object::HwptNested(_))));
        }
        let Some((slot, attachment)) = found else { return Ok(None) };
        let Some(fault) = self.fault_of(attachment.hwpt) else { return Ok(None) };
        let Some(id) = group.id(slot) else { return Ok(None) };
        let queue = self.table.fault(fault)?.queue.clone();
        Ok(Some((queue, id, attachment.by)))
    }
}
