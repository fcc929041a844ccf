// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The state of the recording host: objects, attachments, requested failures, and queues: an empty
//! one, and one that a test fills.

use crate::sync::Mutex;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, MutexGuard, Weak};

use super::super::{
    Errno, EventQueue, FaultQueue, FaultSink, HostError, HwInfo, HwInfoData, ObjectId,
    PageRequestGroup, PageResponseCode, Protection, Readiness, Verb, Vevent, ViommuKind,
};

#[derive(Debug, Default)]
pub(super) struct State {
    pub log: Vec<String>,
    pub muted: bool,
    pub calls: u64,
    /// The first call to fail, how many do, and with what.
    pub fail_at: Option<(u64, u64, Errno)>,
    pub failures: VecDeque<(Verb, Errno)>,
    pub partial: VecDeque<(usize, Errno)>,
    /// Commands of an SMMU that are always refused.
    pub refused_commands: Vec<[u64; 2]>,
    pub objects: BTreeMap<ObjectId, Object>,
    pub attached: BTreeMap<(ObjectId, Option<u32>), ObjectId>,
    pub reaches: BTreeMap<(ObjectId, Option<u32>), ObjectId>,
    pub sinks: BTreeMap<ObjectId, Weak<dyn FaultSink>>,
    /// What was copied to an IOAS, by that and the IOVA.
    pub copies: BTreeMap<(ObjectId, u64), Copied>,
}

/// A mapping: its length and source in bytes, and what is allowed.
pub(super) type Copied = (u64, u64, Protection);
/// The same, after its IOVA.
pub type Reached = (u64, u64, u64, Protection);

#[derive(Debug, Clone)]
pub(super) enum Object {
    Ioas,
    FaultQueue,
    Device {
        iommu: u32,
        info: HwInfo,
    },
    Hwpt {
        pt: ObjectId,
        iommu: u32,
        pasid: bool,
        /// The stream table entry of one on a vIOMMU.
        ste: Option<[u64; 2]>,
    },
    Viommu {
        hwpt: ObjectId,
        iommu: u32,
    },
    Vdevice {
        viommu: ObjectId,
        dev: ObjectId,
        virt_id: u64,
    },
    EventQueue {
        viommu: ObjectId,
        /// Alive while the queue is open.
        events: Weak<Events>,
    },
}

/// Config of a stream table entry for which a stream needs a vDEVICE.
fn translates(ste: [u64; 2]) -> bool {
    const STAGE_1: u64 = 0b101;
    (ste[0] >> 1) & 0b111 == STAGE_1
}

impl State {
    /// Takes the lowest free ID, as Linux does, so that stale IDs are soon reused.
    pub fn insert(&mut self, object: Object) -> ObjectId {
        let id = (1..).map(ObjectId).find(|id| !self.objects.contains_key(id));
        let id = id.expect("a test makes fewer than 2^32 objects");
        self.objects.insert(id, object);
        id
    }

    pub fn fail_from(&mut self, nth: u64, count: u64, errno: Errno) {
        self.fail_at = Some((self.calls + nth, count, errno));
    }

    pub fn forget_failures(&mut self) {
        self.failures.clear();
        self.fail_at = None;
    }

    pub fn ordered_failure(&mut self, verb: Verb) -> Option<Errno> {
        let call = self.calls;
        self.calls += 1;
        if let Some((at, count, errno)) = self.fail_at.filter(|(at, ..)| *at <= call) {
            self.fail_at = self.fail_at.filter(|_| call + 1 < at + count);
            return Some(errno);
        }
        self.next_failure(verb)
    }

    /// What [`super::RecordingHost::fail_next`] ordered for `verb`.
    pub fn next_failure(&mut self, verb: Verb) -> Option<Errno> {
        let at = self.failures.iter().position(|(of, _)| *of == verb)?;
        self.failures.remove(at).map(|(_, errno)| errno)
    }

    pub fn get(&self, id: ObjectId) -> Result<&Object, Errno> {
        self.objects.get(&id).ok_or(Errno::ENOENT)
    }

    pub fn device(&self, id: ObjectId) -> Result<(u32, HwInfo), Errno> {
        match self.get(id)? {
            Object::Device { iommu, info } => Ok((*iommu, *info)),
            _ => Err(Errno::ENOENT),
        }
    }

    /// The nesting parent of a vIOMMU, and the physical IOMMU that it is a slice of.
    pub fn viommu(&self, id: ObjectId) -> Result<(ObjectId, u32), Errno> {
        match self.get(id)? {
            Object::Viommu { hwpt, iommu } => Ok((*hwpt, *iommu)),
            _ => Err(Errno::ENOENT),
        }
    }

    pub fn in_use(&self, id: ObjectId) -> bool {
        let stands_on_it = |object: &Object| match object {
            Object::Hwpt { pt, .. } => *pt == id,
            Object::Viommu { hwpt, .. } => *hwpt == id,
            Object::Vdevice { viommu, .. } | Object::EventQueue { viommu, .. } => *viommu == id,
            _ => false,
        };
        let open = match self.objects.get(&id) {
            Some(Object::Device { .. }) => true,
            Some(Object::EventQueue { events, .. }) => events.strong_count() > 0,
            _ => false,
        };
        open || self.attached.values().any(|pt| *pt == id)
            || self.objects.values().any(stands_on_it)
    }

    pub fn attach(
        &mut self,
        dev: ObjectId,
        pasid: Option<u32>,
        pt: ObjectId,
    ) -> Result<ObjectId, Errno> {
        let (iommu, _) = self.device(dev)?;
        match self.get(pt)? {
            Object::Hwpt { iommu: of, pasid: for_pasid, ste, .. }
                if *of == iommu && (*for_pasid || pasid.is_none()) =>
            {
                if ste.is_some_and(translates) && !self.has_vdevice(dev) {
                    return Err(Errno::ENOENT);
                }
            }
            Object::Ioas => {}
            _ => return Err(Errno::EINVAL),
        }
        // Attaching the current page table is a success that does not touch the hardware.
        if self.attached.insert((dev, pasid), pt) != Some(pt) {
            self.reaches.insert((dev, pasid), pt);
        }
        Ok(pt)
    }

    /// Maps a copy in `ioas`; a whole one, and where nothing is.
    pub fn copy(&mut self, ioas: ObjectId, iova: u64, copied: Copied) -> Result<u64, Errno> {
        self.get(ioas)?;
        let before = self.copies.range((ioas, 0)..(ioas, iova + copied.0)).next_back();
        if before.is_some_and(|((_, start), (length, ..))| start + length > iova) {
            return Err(Errno::EEXIST);
        }
        self.copies.insert((ioas, iova), copied);
        Ok(iova)
    }

    /// See [`RecordingHost::live_objects`](super::RecordingHost::live_objects).
    pub fn live_objects(&self) -> Vec<ObjectId> {
        let made = |(id, object): (&ObjectId, &Object)| {
            (!matches!(object, Object::Device { .. })).then_some(*id)
        };
        self.objects.iter().filter_map(made).collect()
    }

    pub fn reached_copies(&self, dev: ObjectId, pasid: Option<u32>) -> Vec<Reached> {
        let Some(pt) = self.reaches.get(&(dev, pasid)).copied() else { return Vec::new() };
        let ioas = match self.objects.get(&pt) {
            Some(Object::Hwpt { pt, .. }) => *pt,
            _ => pt,
        };
        let of = |(&(of, iova), &(length, gpa, access)): (&(ObjectId, u64), &Copied)| {
            (of == ioas).then_some((iova, length, gpa, access))
        };
        self.copies.iter().filter_map(of).collect()
    }

    /// Unmaps copies: whole ones only. Other mappings are not looked at.
    pub fn unmap(&mut self, ioas: ObjectId, iova: u64, length: u64) -> Result<u64, Errno> {
        self.get(ioas)?;
        let end = iova.saturating_add(length);
        let before = self.copies.range((ioas, 0)..(ioas, iova)).next_back();
        let before = before.filter(|((_, start), (length, ..))| start + length > iova);
        let inside = self.copies.range((ioas, iova)..(ioas, end));
        let touched = before.into_iter().chain(inside);
        let touched: Vec<_> = touched.map(|((_, start), (length, ..))| (*start, *length)).collect();
        let torn = touched.iter().any(|(start, length)| *start < iova || start + length > end);
        let has_others = || self.copies.range((ioas, 0)..=(ioas, u64::MAX)).next().is_some();
        if torn || touched.is_empty() && has_others() {
            return Err(Errno::ENOENT);
        }
        for (start, _) in touched {
            self.copies.remove(&(ioas, start));
        }
        Ok(length)
    }

    /// The effect of a failed attach of `dev`: VT-d blocks first and does not revert, though the
    /// old page table stays recorded; an SMMU keeps the old one.
    pub fn attach_failed(&mut self, dev: ObjectId, pasid: Option<u32>) {
        let smmu = matches!(self.device(dev), Ok((_, info)) if is_smmu(&info));
        if !smmu {
            self.reaches.remove(&(dev, pasid));
        }
    }

    fn has_vdevice(&self, dev: ObjectId) -> bool {
        let of_dev =
            |object: &Object| matches!(object, Object::Vdevice { dev: of, .. } if *of == dev);
        self.objects.values().any(of_dev)
    }

    pub fn unbind(&mut self, dev: ObjectId) -> Result<(), Errno> {
        self.device(dev)?;
        self.attached.retain(|(of, _), _| *of != dev);
        self.reaches.retain(|(of, _), _| *of != dev);
        let of_dev =
            |object: &Object| matches!(object, Object::Vdevice { dev: of, .. } if *of == dev);
        self.objects.retain(|id, object| *id != dev && !of_dev(object));
        Ok(())
    }

    pub fn add_viommu(
        &mut self,
        kind: ViommuKind,
        dev: ObjectId,
        hwpt: ObjectId,
    ) -> Result<ObjectId, Errno> {
        let (iommu, info) = self.device(dev)?;
        if kind != ViommuKind::ArmSmmuV3 || !is_smmu(&info) {
            return Err(Errno::EOPNOTSUPP);
        }
        match self.get(hwpt)? {
            Object::Hwpt { iommu: of, .. } if *of == iommu => {}
            _ => return Err(Errno::EINVAL),
        }
        Ok(self.insert(Object::Viommu { hwpt, iommu }))
    }

    pub fn add_vdevice(
        &mut self,
        viommu: ObjectId,
        dev: ObjectId,
        virt_id: u64,
    ) -> Result<ObjectId, Errno> {
        let (_, of) = self.viommu(viommu)?;
        if self.device(dev)?.0 != of {
            return Err(Errno::EINVAL);
        }
        if self.has_vdevice(dev) || self.knows(viommu, virt_id) {
            return Err(Errno::EEXIST);
        }
        Ok(self.insert(Object::Vdevice { viommu, dev, virt_id }))
    }

    fn knows(&self, viommu: ObjectId, id: u64) -> bool {
        let named = |object: &Object| {
            matches!(object, Object::Vdevice { viommu: of, virt_id, .. }
                if *of == viommu && *virt_id == id)
        };
        self.objects.values().any(named)
    }

    /// Whether Linux accepts `command` from the user of `viommu`.
    pub fn takes_command(&self, viommu: ObjectId, command: [u64; 2]) -> bool {
        if self.refused_commands.contains(&command) {
            return false;
        }
        match command[0] & 0xff {
            // TLBI_NH_ALL, TLBI_NH_ASID, TLBI_NH_VA, TLBI_NH_VAA, TLBI_NSNH_ALL.
            0x10..=0x13 | 0x30 => true,
            // CFGI_CD, CFGI_CD_ALL, ATC_INV: of a stream with a vDEVICE.
            0x05 | 0x06 | 0x40 => self.knows(viommu, command[0] >> 32),
            _ => false,
        }
    }
}

fn is_smmu(info: &HwInfo) -> bool {
    matches!(info.data, HwInfoData::ArmSmmuV3(_))
}

/// A fault queue of devices without page requests.
#[derive(Debug)]
pub(super) struct SilentQueue(pub ObjectId);

impl FaultQueue for SilentQueue {
    fn object(&self) -> ObjectId {
        self.0
    }

    fn next_group(&self) -> crate::iommufd::Result<Option<PageRequestGroup>> {
        Ok(None)
    }

    fn respond(&self, cookie: u32, _: PageResponseCode) -> crate::iommufd::Result<()> {
        let detail = format!("no page request has the cookie {cookie}");
        Err(HostError::new(Verb::PageResponse, self.0, Errno::EINVAL, detail))
    }

    fn watch(&self, watcher: Arc<dyn Readiness>) -> crate::iommufd::Result<()> {
        watcher.changed(false);
        Ok(())
    }
}

/// The contents of a vEVENTQ, and its watcher.
#[derive(Default)]
pub(super) struct Events(Mutex<Held>);

#[derive(Default)]
struct Held {
    events: VecDeque<Vevent>,
    /// Why it cannot be watched.
    refusal: Option<Errno>,
    watcher: Option<Arc<dyn Readiness>>,
}

impl Events {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.lock()
    }

    /// A queue that cannot be watched, if `refusal` says why.
    pub fn new(refusal: Option<Errno>) -> Self {
        Self(Mutex::new(Held { refusal, ..Held::default() }))
    }

    /// Adds an event asynchronously, like a host.
    pub fn push(&self, event: Vevent) {
        let mut held = self.held();
        held.events.push_back(event);
        if let Some(watcher) = &held.watcher {
            watcher.changed(true);
        }
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Events").field(&self.held().events).finish()
    }
}

/// An open vEVENTQ.
#[derive(Debug)]
pub(super) struct OpenEvents(pub ObjectId, pub Arc<Events>);

impl EventQueue for OpenEvents {
    fn object(&self) -> ObjectId {
        self.0
    }

    fn next_event(&self) -> crate::iommufd::Result<Option<Vevent>> {
        let mut held = self.1.held();
        let event = held.events.pop_front();
        if let (true, Some(watcher)) = (held.events.is_empty(), &held.watcher) {
            watcher.changed(false);
        }
        Ok(event)
    }

    fn watch(&self, watcher: Arc<dyn Readiness>) -> crate::iommufd::Result<()> {
        let mut held = self.1.held();
        if let Some(errno) = held.refusal.take() {
            return Err(HostError::new(Verb::Vevent, self.0, errno, "as the test ordered"));
        }
        watcher.changed(!held.events.is_empty());
        held.watcher = Some(watcher);
        Ok(())
    }
}
