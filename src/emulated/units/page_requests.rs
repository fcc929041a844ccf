// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page requests of emulated devices (PCI PRI): who serves them, and what they were answered.
//!
//! A device that meets a translation which software can mend asks for the page, in a group of one
//! request, and tries again when the answer says so. The groups are here from the request until the
//! device has taken the answer; who waits holds no lock meanwhile, and is in no section of DMA.
//!
//! The lock here is taken last: nothing is called with it held.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Condvar, MutexGuard, PoisonError};
use twostage::sync::Mutex;

use crate::host::refusal::Outcome;
use crate::units::engine::request::Request;
use twostage::iommufd::{PageRequest, PageRequestFlags, PageRequestPermissions, PageResponseCode};

/// Groups that a device can have open: an index has 9 bits (PCIe 6.0 §10.4.1).
const MAX_GROUPS: u16 = 1 << 9;

/// Size of the pages that are asked for, in bytes.
const PAGE_SIZE: u64 = 4096;

/// Who serves the page requests of one device while it is bound.
pub(crate) trait PageRequestSink: Debug + Send + Sync {
    /// The device asks for a page.
    ///
    /// # Errors
    /// Nobody serves the request: there will be no answer.
    fn page_request(&self, request: PageRequest) -> Outcome<()>;
}

/// The page request interfaces of the devices behind one IOMMU.
#[derive(Debug, Default)]
pub(crate) struct PageRequests {
    /// By Requester ID.
    devices: Mutex<BTreeMap<u16, Interface>>,
    answered: Condvar,
}

/// The page request interface of one device.
#[derive(Debug, Default)]
struct Interface {
    sink: Option<Arc<dyn PageRequestSink>>,
    /// The open groups by index, and what they were answered.
    groups: BTreeMap<u16, Option<PageResponseCode>>,
    /// The index after the last one that was used: none is used again soon, so that nobody takes an
    /// answer to another.
    next: u16,
}

impl PageRequests {
    /// From now on `sink` serves the requests of `rid`, or nobody does. Those made before count as
    /// refused: whoever waits for an answer is woken. (The attachment need not end with them: other
    /// devices of the group may stay.)
    pub fn set_sink(&self, rid: u16, sink: Option<Arc<dyn PageRequestSink>>) {
        let mut devices = self.devices();
        let interface = devices.entry(rid).or_default();
        interface.sink = sink;
        interface.groups.clear();
        self.answered.notify_all();
    }

    /// Asks for the page of `request`: the index of the group; none when nobody serves it, or the
    /// device has as many groups open as it can.
    pub fn ask(&self, request: &Request) -> Option<u16> {
        let (group, sink) = self.open(request.rid)?;
        let outcome = sink.page_request(page_request(request, group));
        // It may have been answered by now: that is for whoever waits.
        if outcome.is_err() {
            self.close(request.rid, group);
            return None;
        }
        Some(group)
    }

    /// The device `rid` is told what became of its group `group`.
    pub fn answer(&self, rid: u16, group: u32, code: PageResponseCode) {
        let Ok(group) = u16::try_from(group) else { return };
        let mut devices = self.devices();
        let interface = devices.get_mut(&rid);
        if let Some(answer) = interface.and_then(|interface| interface.groups.get_mut(&group)) {
            *answer = Some(code);
            self.answered.notify_all();
        }
    }

    /// Takes the answer to a group of `rid`, whose index is free then; none as long as there is
    /// none. A group that is not open was refused.
    pub fn take_answer(&self, rid: u16, group: u16) -> Option<PageResponseCode> {
        take(&mut self.devices(), rid, group)
    }

    /// The same, when there is one.
    pub fn wait_for_answer(&self, rid: u16, group: u16) -> PageResponseCode {
        let mut devices = self.devices();
        loop {
            if let Some(code) = take(&mut devices, rid, group) {
                return code;
            }
            devices = self.answered.wait(devices).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Opens a group of `rid`, which somebody serves.
    fn open(&self, rid: u16) -> Option<(u16, Arc<dyn PageRequestSink>)> {
        let mut devices = self.devices();
        let interface = devices.get_mut(&rid)?;
        let sink = interface.sink.clone()?;
        let mut all = (0..MAX_GROUPS).map(|number| (interface.next + number) % MAX_GROUPS);
        let group = all.find(|group| !interface.groups.contains_key(group))?;
        interface.next = (group + 1) % MAX_GROUPS;
        interface.groups.insert(group, None);
        Some((group, sink))
    }

    fn close(&self, rid: u16, group: u16) {
        if let Some(interface) = self.devices().get_mut(&rid) {
            interface.groups.remove(&group);
        }
    }

    fn devices(&self) -> MutexGuard<'_, BTreeMap<u16, Interface>> {
        self.devices.lock()
    }
}

fn take(devices: &mut BTreeMap<u16, Interface>, rid: u16, group: u16) -> Option<PageResponseCode> {
    let interface = devices.get_mut(&rid);
    let Some(interface) = interface.filter(|interface| interface.groups.contains_key(&group))
    else {
        return Some(PageResponseCode::Invalid);
    };
    let code = (*interface.groups.get(&group)?)?;
    interface.groups.remove(&group);
    Some(code)
}

/// The request for the page that `request` wants, the only one of its group.
fn page_request(request: &Request, group: u16) -> PageRequest {
    let Request { pasid, address, kind, .. } = *request;
    PageRequest {
        flags: PageRequestFlags::new().with_pasid_valid(pasid.is_some()).with_last_page(true),
        pasid: pasid.unwrap_or_default(),
        group: group.into(),
        permissions: PageRequestPermissions::new()
            .with_read(!kind.write())
            .with_write(kind.write())
            .with_execute(kind.execute())
            .with_privileged(kind.privileged()),
        address: address & !(PAGE_SIZE - 1),
    }
}
