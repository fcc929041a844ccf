// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host objects and their lifecycle: the unit, devices, their attachments, and the stream table
//! entries that a `HWPT_NESTED` stands for.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use super::faults::{deliver, EventRoute};
use super::flush_set::Scratch;
use super::page_requests::PageRouter;
use super::SmmuNestingCounters;
use crate::iommufd::{
    iommu_viommu_arm_smmuv3_invalidate, Errno, EventQueue, HwInfo, HwInfoData, ObjectId,
    ViommuKind, VEVENTQ_ARM_SMMUV3,
};
use crate::nesting::objects::{NestedHwpts, Objects};
use crate::nesting::reader::{QueueThread, Signal};
use crate::nesting::{hw_info, page_route, Context, NestingError, Result};
use crate::spec::pci::Bdf;
use crate::spec::smmuv3::stream_table::{Ste0, Ste1, StreamConfig};
use crate::spec::smmuv3::StreamId;
use crate::threads::{StdThreads, ThreadStart};
use crate::viommu::smmuv3::StreamPolicy;

/// A device of the guest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Device {
    /// Its identity for the guest.
    pub rid: Bdf,
    /// The device object.
    pub dev: ObjectId,
    /// By which the vIOMMU knows its StreamID.
    pub vdevice: ObjectId,
    /// The host's description of it.
    pub info: HwInfo,
    /// The `HWPT_NESTED` that the host last reported success for; `None` while it is detached.
    pub attached: Option<ObjectId>,
    /// An attach or a detach has failed since, so that the host's bookkeeping and its hardware may
    /// disagree.
    pub unsettled: bool,
}

/// Everything behind the lock of [`super::SmmuNesting`].
#[derive(Debug)]
pub(super) struct State {
    pub objects: Objects,
    route: Arc<EventRoute>,
    router: Arc<PageRouter>,
    /// Page requests or stalls may be offered: tables get the fault queue, where the host has such.
    pub serves_faults: bool,
    /// Reads the fault queue, once there is one.
    pub pages: Option<QueueThread>,
    /// How many unread events the host keeps.
    pub event_depth: u32,
    /// Starts the thread that reads the vEVENTQ.
    pub threads: Arc<dyn ThreadStart>,
    /// Present while there are devices.
    pub unit: Option<Unit>,
    pub devices: BTreeMap<StreamId, Device>,
    pub nested: NestedHwpts<Entry>,
    /// A stream has used stage 1 since the host's TLB was last known to hold nothing of the guest.
    pub tlb_used: bool,
    /// The TLB may hold stale entries that no unblocked stream can use: it must be flushed before
    /// one can.
    pub flush_due: bool,
    pub scratch: Scratch,
    /// Of the last host call: memory for the next one.
    pub words: Vec<iommu_viommu_arm_smmuv3_invalidate>,
    /// Except the host calls and events, which are counted where they occur.
    pub counters: SmmuNestingCounters,
}

impl State {
    /// Without devices, on `objects`.
    pub fn new(
        objects: Objects,
        route: Arc<EventRoute>,
        router: Arc<PageRouter>,
        event_depth: u32,
    ) -> Self {
        Self {
            objects,
            route,
            router,
            serves_faults: false,
            pages: None,
            event_depth,
            threads: Arc::new(StdThreads),
            unit: None,
            devices: BTreeMap::new(),
            nested: NestedHwpts::default(),
            tlb_used: false,
            flush_due: false,
            scratch: Scratch::default(),
            words: Vec::new(),
            counters: SmmuNestingCounters::default(),
        }
    }

    /// Statistics.
    pub fn counters(&self) -> SmmuNestingCounters {
        SmmuNestingCounters {
            host_calls: self.objects.calls(),
            events: self.route.delivered(),
            events_lost: self.route.lost(),
            ..self.counters
        }
    }

    /// See [`super::SmmuNesting::add_device`].
    pub fn add_device(&mut self, rid: Bdf, dev: ObjectId) -> Result<()> {
        self.objects.ioas()?;
        if self.devices.values().any(|device| device.rid == rid || device.dev == dev) {
            return Err(NestingError::DeviceExists(rid));
        }
        // It may have been here before, and have a vDEVICE still.
        self.objects.destroy_owed();
        let info = self
            .objects
            .host()
            .get_hw_info(dev)
            .context(|| format!("querying the IOMMU of {rid}"))?;
        if !matches!(info.data, HwInfoData::ArmSmmuV3(_)) {
            return Err(NestingError::NoSmmu(rid));
        }
        hw_info::say_unknown(rid, &info);
        if self.serves_faults && self.objects.extensions().smmu_faults {
            self.open_fault_queue(rid)?;
        }
        let viommu = match &self.unit {
            Some(unit) => unit.viommu(),
            None => {
                let start = |queue| deliver(&*self.threads, queue, self.route.clone());
                let depth = self.event_depth;
                let unit = Unit::new(&mut self.objects, rid, dev, &info, depth, start)?;
                self.unit.insert(unit).viommu()
            }
        };
        let stream = StreamId::from(rid);
        let source = match self.objects.host().vdevice_alloc(viommu, dev, stream.raw().into()) {
            Ok(vdevice) => {
                let device = Device { rid, dev, vdevice, info, attached: None, unsettled: false };
                self.devices.insert(stream, device);
                self.router.add(dev, stream, !hw_info::has_ats(&info));
                return Ok(());
            }
            Err(source) => source,
        };
        let first = self.devices.values().next().map(|device| device.rid);
        match first {
            Some(first) if source.errno == Errno::EINVAL && self.is_behind_another(dev) => {
                Err(NestingError::OtherSmmu { rid, first })
            }
            _ => {
                let what = format!("allocating the vDEVICE of {rid}");
                Err(NestingError::Host { what, source })
            }
        }
    }

    /// Makes the fault queue of the host, if there is none, for the guest's `rid` and those after
    /// it: before any of them is in use, as it takes a thread.
    fn open_fault_queue(&mut self, rid: Bdf) -> Result<()> {
        if self.pages.is_some() {
            return Ok(());
        }
        let queue = self.objects.host().fault_queue_alloc();
        let queue = queue.context(|| format!("allocating a fault queue for {rid}"))?;
        let object = queue.object();
        let router = Arc::downgrade(&self.router);
        let bring = move || router.upgrade().map_or(Ok(false), |router| router.bring());
        match page_route::deliver(&*self.threads, queue, &self.router.route, bring) {
            Ok(pages) => self.pages = Some(pages),
            Err(error) => {
                self.objects.destroy(object);
                return Err(NestingError::NoThread(error.to_string()));
            }
        }
        Ok(())
    }

    /// Whether `dev` is behind another physical SMMU than the unit's: the nesting parent, too,
    /// belongs to one SMMU, and the host creates no vIOMMU on it for a device behind another.
    fn is_behind_another(&mut self, dev: ObjectId) -> bool {
        let Some(parent) = self.unit.as_ref().map(Unit::parent) else { return false };
        match self.objects.host().viommu_alloc(ViommuKind::ArmSmmuV3, dev, parent) {
            Ok(viommu) => {
                self.objects.destroy(viommu);
                false
            }
            Err(error) => error.errno == Errno::EINVAL,
        }
    }

    /// See [`super::SmmuNesting::remove_device`].
    pub fn remove_device(&mut self, rid: Bdf) -> Result<()> {
        let stream = StreamId::from(rid);
        let device = *self.devices.get(&stream).ok_or(NestingError::NoDevice(rid))?;
        self.detach(stream)?;
        self.devices.remove(&stream);
        self.router.remove(device.dev);
        self.objects.destroy(device.vdevice);
        Ok(())
    }

    /// See [`super::SmmuNesting::shutdown`]. `queue` is the closed vEVENTQ, and `pages` the fault
    /// queue, which nobody reads any more.
    pub fn shutdown(&mut self, queue: Option<ObjectId>, pages: Option<ObjectId>) -> Result<()> {
        if let Some(queue) = queue {
            self.objects.destroy(queue);
        }
        let streams: Vec<StreamId> = self.devices.keys().copied().collect();
        let mut result = Ok(());
        for stream in &streams {
            result = result.and(self.detach(*stream));
        }
        if result.is_ok() {
            self.destroy_nested();
        }
        // After the HWPTs that use it.
        pages.into_iter().for_each(|pages| self.objects.destroy(pages));
        // What is still attached keeps everything below it: the next call retries.
        result?;
        for device in std::mem::take(&mut self.devices).into_values() {
            self.objects.destroy(device.vdevice);
        }
        if let Some(unit) = self.take_idle_unit() {
            unit.end(None, &mut self.objects);
        }
        self.objects.end()
    }

    /// The objects of the physical SMMU, to be released, if there is no device.
    pub fn take_idle_unit(&mut self) -> Option<Unit> {
        if !self.devices.is_empty() {
            return None;
        }
        let unit = self.unit.take()?;
        self.destroy_nested();
        // The next unit has a new VMID.
        (self.tlb_used, self.flush_due) = (false, false);
        Some(unit)
    }

    fn destroy_nested(&mut self) {
        for hwpt in self.nested.take_all() {
            self.objects.destroy(hwpt);
        }
    }

    /// The guest's stream table entry that the host uses for `device`, as far as known.
    pub fn entry_of(&self, device: &Device) -> Option<Entry> {
        self.nested.stage1(device.attached?)
    }

    /// Whether `device` may use stage 1.
    pub fn may_translate(&self, device: &Device) -> bool {
        device.unsettled || self.entry_of(device).is_some_and(translates)
    }

    /// Whether any stream may use stage 1.
    pub fn any_translates(&self) -> bool {
        self.devices.values().any(|device| self.may_translate(device))
    }
}

/// A nesting parent, the vIOMMU on it, and the vIOMMU's event queue.
#[derive(Debug)]
pub(super) struct Unit {
    parent: ObjectId,
    viommu: ObjectId,
    events: Option<QueueThread>,
    misses_invalidations: bool,
}

impl Unit {
    /// Creates the objects for the SMMU of `dev`, the guest's `rid`, which the host describes by
    /// `info`. `start` starts delivering the events of the vEVENTQ.
    pub fn new(
        objects: &mut Objects,
        rid: Bdf,
        dev: ObjectId,
        info: &HwInfo,
        event_depth: u32,
        start: impl FnOnce(Arc<dyn EventQueue>) -> io::Result<QueueThread>,
    ) -> Result<Self> {
        let parent = objects.alloc_parent(rid, dev, false)?;
        let viommu = objects
            .host()
            .viommu_alloc(ViommuKind::ArmSmmuV3, dev, parent)
            .context(|| format!("allocating a vIOMMU for the SMMU of {rid}"))
            .inspect_err(|_| objects.destroy(parent))?;
        let misses_invalidations = hw_info::misses_invalidations(info);
        let unit = Self { parent, viommu, events: None, misses_invalidations };
        let queue = objects
            .host()
            .veventq_alloc(viommu, VEVENTQ_ARM_SMMUV3, event_depth)
            .context(|| format!("allocating an event queue for the SMMU of {rid}"));
        let (object, started) = match queue {
            Ok(queue) => (queue.object(), start(queue)),
            Err(error) => {
                unit.end(None, objects);
                return Err(error);
            }
        };
        match started {
            Ok(events) => Ok(Self { events: Some(events), ..unit }),
            Err(error) => {
                unit.end(Some(object), objects);
                Err(NestingError::NoThread(error.to_string()))
            }
        }
    }

    /// The nesting parent.
    pub fn parent(&self) -> ObjectId {
        self.parent
    }

    /// The vIOMMU.
    pub fn viommu(&self) -> ObjectId {
        self.viommu
    }

    /// Whether its SMMU may miss a CMD_TLBI_* or CMD_CFGI_* that is issued only once.
    pub fn misses_invalidations(&self) -> bool {
        self.misses_invalidations
    }

    /// The vEVENTQ, while events are delivered.
    pub fn event_queue(&self) -> Option<ObjectId> {
        self.events.as_ref().map(QueueThread::object)
    }

    /// What the event thread waits for.
    pub fn signal(&self) -> Option<Arc<Signal>> {
        self.events.as_ref().map(QueueThread::signal)
    }

    /// The event thread, to be stopped.
    pub fn take_events(&mut self) -> Option<QueueThread> {
        self.events.take()
    }

    /// Destroys the objects, which nothing but the closed `queue` uses any more.
    pub fn end(self, queue: Option<ObjectId>, objects: &mut Objects) {
        for object in queue.into_iter().chain([self.viommu, self.parent]) {
            objects.destroy(object);
        }
    }
}

/// Words 0 and 1 of a stream table entry.
pub(super) type Entry = [u64; 2];

/// The entry that terminates every transaction.
pub(super) const ABORT: Entry = fixed(StreamConfig::Abort);
/// The entry that lets every transaction pass, with events for those that cannot.
const BYPASS: Entry = fixed(StreamConfig::Bypass);

const fn fixed(config: StreamConfig) -> Entry {
    [Ste0::new().with_v(true).with_config(config.into_bits()).into_bits(), 0]
}

/// The entry of `policy`; `None` while translation is off, when the stream is attached to the
/// nesting parent. Linux reports no events of such a stream to the owner of stage 1, and none are
/// due. Only if the SMMU of `info` can stall, the entry says that it must not.
pub(super) fn entry(policy: &StreamPolicy, info: &HwInfo) -> Option<Entry> {
    match policy {
        StreamPolicy::Abort => Some(ABORT),
        StreamPolicy::GlobalBypass => None,
        StreamPolicy::Bypass => Some(BYPASS),
        StreamPolicy::Stage1 { ste: [low, high] } => {
            let high = Ste1::from_bits(*high);
            let stalls_disabled = high.s1stalld() && hw_info::can_stall(info);
            Some([*low, high.with_s1stalld(stalls_disabled).into_bits()])
        }
    }
}

/// Whether transactions use stage 1 with `entry`.
pub(super) fn translates(entry: Entry) -> bool {
    StreamConfig::from_bits(Ste0::from_bits(entry[0]).config()).stage1()
}

/// Whether devices may cache translations with `entry` (EATS). Without, the host disables ATS of
/// the device, and has it forget what it has when such an entry is attached (Linux 7.2's
/// `arm_smmu_attach_commit`): nothing is left that a CMD_ATC_INV could drop.
pub(super) fn uses_ats(entry: Entry) -> bool {
    translates(entry) && Ste1::from_bits(entry[1]).eats() != 0
}

/// Whether `entry` may have context descriptors for substreams (S1CDMax).
pub(super) fn has_substreams(entry: Entry) -> bool {
    translates(entry) && Ste0::from_bits(entry[0]).s1cdmax() != 0
}
