// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page requests of emulated devices (PCI PRI), and transactions that an SMMU stalls: who serves
//! them, and the responses.
//!
//! A device that meets a translation which software can fix requests the page, in a group of one
//! request, and tries again after the response. To user space a stalled transaction is the same:
//! the number of the group is its stall tag. Groups are kept here from the request until the device
//! has taken the response; a waiting device holds no lock and is in no DMA section.
//!
//! The lock here is the innermost: nothing is called with it held.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::{Arc, MutexGuard};
use twostage::sync::{Condvar, Mutex};

use crate::host::refusal::Outcome;
use crate::units::engine::{Fault, Request};
use twostage::iommufd::{PageRequest, PageRequestFlags, PageRequestPermissions, PageResponseCode};

/// Maximum number of open groups of a device: an index has 9 bits (PCIe 6.0 §10.4.1).
pub(crate) const MAX_GROUPS: u16 = 1 << 9;

/// Size of the requested pages, in bytes.
const PAGE_SIZE: u64 = 4096;

/// Who serves the page requests of one device while it is bound.
pub(crate) trait PageRequestSink: Debug + Send + Sync {
    /// The device asks for a page.
    ///
    /// # Errors
    /// Nobody serves the request: there will be no response.
    fn page_request(&self, request: PageRequest) -> Outcome<()>;
}

/// When a device waits for software.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Waits {
    /// It has requested a page that it did not find (PRI).
    #[default]
    ForPages,
    /// Its transaction stalls, where the user's tables say so. Devices on PCIe must not be stalled
    /// (IHI 0070 §3.12.1), so this one is not of that kind, whatever it is otherwise.
    InStalls,
}

impl Waits {
    /// Whether such a device waits after `fault`.
    pub fn after(self, fault: &Fault) -> bool {
        match self {
            Self::ForPages => fault.asks_for_page,
            Self::InStalls => fault.stalls,
        }
    }
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
    waits: Waits,
    /// The open groups by index, and their responses.
    groups: BTreeMap<u16, Option<PageResponseCode>>,
    /// Open groups that the device has forgotten: their indices are not free before the response,
    /// which would be taken for another group's.
    forgotten: BTreeSet<u16>,
    /// The index after the last one used: indices are not reused soon, so that no response is taken
    /// for another.
    next: u16,
}

impl PageRequests {
    /// From now on `sink` serves the requests of `rid`, which waits as `waits` says, or nobody
    /// does. Requests made before count as refused, and whoever waits for a response is woken.
    /// (The attachment may continue: other devices of the group may stay.)
    pub fn set_sink(&self, rid: u16, waits: Waits, sink: Option<Arc<dyn PageRequestSink>>) {
        let mut devices = self.devices();
        let interface = devices.entry(rid).or_default();
        (interface.sink, interface.waits) = (sink, waits);
        interface.groups.clear();
        interface.forgotten.clear();
        self.answered.notify_all();
    }

    /// When `rid` waits, if somebody serves its requests.
    pub fn served(&self, rid: u16) -> Option<Waits> {
        let devices = self.devices();
        devices.get(&rid).filter(|interface| interface.sink.is_some()).map(|it| it.waits)
    }

    /// When `rid` waits, or would if somebody served its requests.
    pub fn waits(&self, rid: u16) -> Waits {
        self.devices().get(&rid).map(|interface| interface.waits).unwrap_or_default()
    }

    /// Requests the page of `request`: returns the index of the group; none if nobody serves it, or
    /// the device has the maximum of open groups.
    pub fn ask(&self, request: &Request) -> Option<u16> {
        let (group, sink, waits) = self.open(request.rid)?;
        let outcome = sink.page_request(page_request(request, group, waits));
        // It may already have a response, which the waiter takes.
        if outcome.is_err() {
            self.close(request.rid, group);
            return None;
        }
        Some(group)
    }

    /// Responds to group `group` of the device `rid`.
    pub fn answer(&self, rid: u16, group: u32, code: PageResponseCode) {
        let Ok(group) = u16::try_from(group) else { return };
        let mut devices = self.devices();
        let Some(interface) = devices.get_mut(&rid) else { return };
        interface.forgotten.remove(&group);
        if let Some(answer) = interface.groups.get_mut(&group) {
            *answer = Some(code);
            self.answered.notify_all();
        }
    }

    /// Takes the response to a group of `rid`, whose index is then free; none as long as there is
    /// none. A group that is not open was refused.
    pub fn take_answer(&self, rid: u16, group: u16) -> Option<PageResponseCode> {
        take(&mut self.devices(), rid, group)
    }

    /// The same, but waits for it.
    pub fn wait_for_answer(&self, rid: u16, group: u16) -> PageResponseCode {
        let mut devices = self.devices();
        loop {
            if let Some(code) = take(&mut devices, rid, group) {
                return code;
            }
            devices = self.answered.wait(devices);
        }
    }

    /// Forgets the requests of `rid`: whoever waits for a response is told that the page was
    /// refused, and what comes for them later is ignored (PCIe 6.0 §10.5.2.2, Reset).
    pub fn reset(&self, rid: u16) {
        if let Some(Interface { groups, forgotten, .. }) = self.devices().get_mut(&rid) {
            let open = groups.iter().filter(|(_, answer)| answer.is_none());
            forgotten.extend(open.map(|(group, _)| group));
            groups.clear();
            self.answered.notify_all();
        }
    }

    /// How many groups of `rid` the device has not taken a response to.
    pub fn outstanding(&self, rid: u16) -> usize {
        self.devices().get(&rid).map_or(0, |interface| interface.groups.len())
    }

    /// Opens a group of `rid`, if somebody serves its requests.
    fn open(&self, rid: u16) -> Option<(u16, Arc<dyn PageRequestSink>, Waits)> {
        let mut devices = self.devices();
        let interface = devices.get_mut(&rid)?;
        let sink = interface.sink.clone()?;
        let mut all = (0..MAX_GROUPS).map(|number| (interface.next + number) % MAX_GROUPS);
        let Interface { groups, forgotten, .. } = &*interface;
        let group = all.find(|group| !groups.contains_key(group) && !forgotten.contains(group))?;
        interface.next = (group + 1) % MAX_GROUPS;
        interface.groups.insert(group, None);
        Some((group, sink, interface.waits))
    }

    fn close(&self, rid: u16, group: u16) {
        if let Some(interface) = self.devices().get_mut(&rid) {
            interface.groups.remove(&group);
            interface.forgotten.remove(&group);
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

/// The page request of `request`, the only one in its group. Of a stalled transaction it has the
/// whole address, as from Linux.
fn page_request(request: &Request, group: u16, waits: Waits) -> PageRequest {
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
        address: match waits {
            Waits::ForPages => address & !(PAGE_SIZE - 1),
            Waits::InStalls => address,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::engine::RequestKind;

    /// Takes every request.
    #[derive(Debug)]
    struct Software;

    impl PageRequestSink for Software {
        fn page_request(&self, _: PageRequest) -> Outcome<()> {
            Ok(())
        }
    }

    #[test]
    fn a_forgotten_groups_index_is_not_another_ones_before_the_response() {
        let requests = PageRequests::default();
        requests.set_sink(7, Waits::ForPages, Some(Arc::new(Software)));
        let kind = RequestKind::new(false, false, false);
        let request = Request { rid: 7, pasid: None, address: 0, kind };
        assert_eq!(requests.ask(&request), Some(0));
        requests.reset(7);
        for group in 1..MAX_GROUPS {
            assert_eq!(requests.ask(&request), Some(group));
        }
        assert_eq!(requests.ask(&request), None);
        requests.answer(7, 0, PageResponseCode::Success);
        assert_eq!((requests.outstanding(7), requests.ask(&request)), (511, Some(0)));
        assert_eq!(requests.take_answer(7, 0), None, "that was the response to the first one");
    }
}
