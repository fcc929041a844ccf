// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A host for tests: it writes down every call in order, fails on demand, and knows what lives.
//!
//! It keeps only as much of iommufd's rules as its callers depend on: ids, reference counts
//! (`EBUSY`), one nesting parent per physical IOMMU (`EINVAL`), and VT-d's way of failing a
//! replace: the books keep the old page table while the hardware is blocked. Page tables and DMA
//! are the emulated host's business.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::{
    DirtyRange, Errno, EventQueue, Extensions, FaultQueue, FaultSink, HostError, HostFault,
    HostIommu, HwInfo, HwptAlloc, HwptData, InvalidateData, InvalidateError, IovaRanges, MapTarget,
    ObjectId, PageRequestGroup, PageResponseCode, Protection, Readiness, Result, UserMemory, Verb,
    Vevent, ViommuKind, VTD_INV_FLAGS_LEAF,
};

/// A host whose calls can be read back. See the [module](self).
#[derive(Debug)]
pub struct RecordingHost {
    extensions: Extensions,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    log: Vec<String>,
    muted: bool,
    calls: u64,
    fail_at: Option<(u64, Errno)>,
    failures: VecDeque<(Verb, Errno)>,
    partial: VecDeque<(usize, Errno)>,
    objects: BTreeMap<ObjectId, Object>,
    attached: BTreeMap<(ObjectId, Option<u32>), ObjectId>,
    reaches: BTreeMap<(ObjectId, Option<u32>), ObjectId>,
    sinks: BTreeMap<ObjectId, Weak<dyn FaultSink>>,
}

#[derive(Debug, Clone)]
enum Object {
    Ioas,
    FaultQueue,
    Device { iommu: u32, info: HwInfo },
    Hwpt { pt: ObjectId, iommu: u32, pasid: bool },
}

impl RecordingHost {
    /// A host without objects that offers `extensions`.
    pub fn new(extensions: Extensions) -> Arc<Self> {
        Arc::new(Self { extensions, state: Mutex::default() })
    }

    /// A bound device behind the physical IOMMU number `iommu`. Not a call: it is not recorded.
    pub fn add_device(&self, iommu: u32, info: HwInfo) -> ObjectId {
        self.state().insert(Object::Device { iommu, info })
    }

    /// The calls since the last time, in order, as text; a failed one ends in `! errno`.
    pub fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.state().log)
    }

    /// Writes no more down, so that a benchmark measures the caller. Calls are still counted.
    pub fn mute(&self) {
        self.state().muted = true;
    }

    /// How many calls were made so far.
    pub fn calls(&self) -> u64 {
        self.state().calls
    }

    /// Makes the `nth` call from now on (the next is 0) fail with `errno`.
    pub fn fail_nth(&self, nth: u64, errno: Errno) {
        let mut state = self.state();
        state.fail_at = Some((state.calls + nth, errno));
    }

    /// Whether a call that [`Self::fail_nth`] named is still to come.
    pub fn failure_pending(&self) -> bool {
        self.state().fail_at.is_some()
    }

    /// Makes the next call of `verb` fail with `errno`; such orders queue up.
    pub fn fail_next(&self, verb: Verb, errno: Errno) {
        self.state().failures.push_back((verb, errno));
    }

    /// Makes the next invalidation stop with `errno` after `done` entries; such orders queue up.
    pub fn fail_invalidation(&self, done: usize, errno: Errno) {
        self.state().partial.push_back((done, errno));
    }

    /// The page table that the hardware uses for `dev`, or its `pasid`; `None` while blocked.
    pub fn reaches(&self, dev: ObjectId, pasid: Option<u32>) -> Option<ObjectId> {
        self.state().reaches.get(&(dev, pasid)).copied()
    }

    /// Every object but the devices: what leaked, at the end of a test.
    pub fn live_objects(&self) -> Vec<ObjectId> {
        let state = self.state();
        let made = |(id, object): (&ObjectId, &Object)| {
            (!matches!(object, Object::Device { .. })).then_some(*id)
        };
        state.objects.iter().filter_map(made).collect()
    }

    /// Delivers `fault` to the sink of its device, as a DMA thread would.
    pub fn report_fault(&self, fault: &HostFault) {
        let sink = self.state().sinks.get(&fault.dev).and_then(Weak::upgrade);
        if let Some(sink) = sink {
            sink.dma_fault(fault);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records `text`, and runs `serve` unless the call is ordered to fail.
    fn call<T: Answer>(
        &self,
        verb: Verb,
        object: Option<ObjectId>,
        text: impl FnOnce() -> String,
        serve: impl FnOnce(&mut State) -> std::result::Result<T, Errno>,
    ) -> Result<T> {
        let mut state = self.state();
        let result = match state.ordered_failure(verb) {
            Some(errno) => Err(errno),
            None => serve(&mut state),
        };
        if !state.muted {
            let answer = match &result {
                Ok(value) => value.text(),
                Err(errno) => format!(" ! {errno}"),
            };
            state.log.push(format!("{verb} {}{answer}", text()));
        }
        result.map_err(|errno| HostError::new(verb, object, errno, "as the test ordered"))
    }
}

/// How an answer reads in the log.
trait Answer {
    fn text(&self) -> String;
}

impl Answer for () {
    fn text(&self) -> String {
        String::new()
    }
}

impl Answer for ObjectId {
    fn text(&self) -> String {
        format!(" = {self:?}")
    }
}

impl Answer for u64 {
    fn text(&self) -> String {
        String::new()
    }
}

impl Answer for HwInfo {
    fn text(&self) -> String {
        String::new()
    }
}

impl State {
    /// Takes the lowest free id, as Linux does, so that a stale id soon names something else.
    fn insert(&mut self, object: Object) -> ObjectId {
        let id = (1..).map(ObjectId).find(|id| !self.objects.contains_key(id));
        let id = id.expect("a test makes fewer than 2^32 objects");
        self.objects.insert(id, object);
        id
    }

    fn ordered_failure(&mut self, verb: Verb) -> Option<Errno> {
        let call = self.calls;
        self.calls += 1;
        if let Some((_, errno)) = self.fail_at.take_if(|(at, _)| *at == call) {
            return Some(errno);
        }
        let at = self.failures.iter().position(|(of, _)| *of == verb)?;
        self.failures.remove(at).map(|(_, errno)| errno)
    }

    fn get(&self, id: ObjectId) -> std::result::Result<&Object, Errno> {
        self.objects.get(&id).ok_or(Errno::ENOENT)
    }

    fn device(&self, id: ObjectId) -> std::result::Result<(u32, HwInfo), Errno> {
        match self.get(id)? {
            Object::Device { iommu, info } => Ok((*iommu, *info)),
            _ => Err(Errno::ENOENT),
        }
    }

    fn in_use(&self, id: ObjectId) -> bool {
        let stands_on = |object: &Object| matches!(object, Object::Hwpt { pt, .. } if *pt == id);
        matches!(self.objects.get(&id), Some(Object::Device { .. }))
            || self.attached.values().any(|pt| *pt == id)
            || self.objects.values().any(stands_on)
    }

    fn attach(
        &mut self,
        dev: ObjectId,
        pasid: Option<u32>,
        pt: ObjectId,
    ) -> std::result::Result<ObjectId, Errno> {
        let (iommu, _) = self.device(dev)?;
        match self.get(pt)? {
            Object::Hwpt { iommu: of, pasid: for_pasid, .. }
                if *of == iommu && (*for_pasid || pasid.is_none()) => {}
            _ => return Err(Errno::EINVAL),
        }
        // Attaching what the books name already is a success that reaches no hardware.
        if self.attached.insert((dev, pasid), pt) != Some(pt) {
            self.reaches.insert((dev, pasid), pt);
        }
        Ok(pt)
    }
}

impl HostIommu for RecordingHost {
    fn device_bind(&self, name: &str) -> Result<ObjectId> {
        let text = || format!("{name:?}");
        self.call(Verb::DeviceBind, None, text, |_| Err::<ObjectId, _>(Errno::ENODEV))
    }

    fn device_unbind(&self, dev: ObjectId) -> Result<()> {
        let text = || format!("{dev:?}");
        self.call(Verb::DeviceUnbind, Some(dev), text, |state| {
            state.device(dev)?;
            state.attached.retain(|(of, _), _| *of != dev);
            state.reaches.retain(|(of, _), _| *of != dev);
            state.objects.remove(&dev);
            Ok(())
        })
    }

    fn device_attach(&self, dev: ObjectId, pasid: Option<u32>, pt: ObjectId) -> Result<ObjectId> {
        let text = || format!("{} to {pt:?}", source(dev, pasid));
        let result = self
            .call(Verb::DeviceAttach, Some(dev), text, |state| {
                state.attach(dev, pasid, pt).map(|_| ())
            })
            .map(|()| pt);
        if result.is_err() {
            // VT-d blocks first and reverts nothing; the books still name the old page table.
            self.state().reaches.remove(&(dev, pasid));
        }
        result
    }

    fn device_detach(&self, dev: ObjectId, pasid: Option<u32>) -> Result<()> {
        let text = || source(dev, pasid);
        self.call(Verb::DeviceDetach, Some(dev), text, |state| {
            state.device(dev)?;
            state.attached.remove(&(dev, pasid));
            state.reaches.remove(&(dev, pasid));
            Ok(())
        })
    }

    fn destroy(&self, id: ObjectId) -> Result<()> {
        let text = || format!("{id:?}");
        self.call(Verb::Destroy, Some(id), text, |state| {
            state.get(id)?;
            if state.in_use(id) {
                return Err(Errno::EBUSY);
            }
            state.objects.remove(&id);
            Ok(())
        })
    }

    fn ioas_alloc(&self) -> Result<ObjectId> {
        self.call(Verb::IoasAlloc, None, || "-".into(), |state| Ok(state.insert(Object::Ioas)))
    }

    fn ioas_allow_iovas(&self, ioas: ObjectId, ranges: &[RangeInclusive<u64>]) -> Result<()> {
        self.call(Verb::IoasAllowIovas, Some(ioas), || format!("{ioas:?} {ranges:x?}"), |_| Ok(()))
    }

    fn ioas_iova_ranges(&self, ioas: ObjectId) -> Result<IovaRanges> {
        self.call(Verb::IoasIovaRanges, Some(ioas), || format!("{ioas:?}"), |_| Ok(()))
            .map(|()| IovaRanges { allowed: vec![0..=u64::MAX], alignment: 4096 })
    }

    fn ioas_map(
        &self,
        ioas: ObjectId,
        memory: &UserMemory,
        target: MapTarget,
        protection: Protection,
    ) -> Result<u64> {
        let iova = match target {
            MapTarget::Fixed(iova) => iova,
            MapTarget::Anywhere => 0x1000,
        };
        let access = if protection.write { "rw" } else { "r" };
        let text = || format!("{ioas:?} {iova:#x}+{:#x} {access}", memory.length());
        self.call(Verb::IoasMap, Some(ioas), text, |state| state.get(ioas).map(|_| iova))
    }

    fn ioas_copy(
        &self,
        dst: ObjectId,
        _target: MapTarget,
        src: ObjectId,
        src_iova: u64,
        length: u64,
        _protection: Protection,
    ) -> Result<u64> {
        let text = || format!("{dst:?} from {src:?} {src_iova:#x}+{length:#x}");
        self.call(Verb::IoasCopy, Some(dst), text, |_| Ok(src_iova))
    }

    fn ioas_unmap(&self, ioas: ObjectId, iova: u64, length: u64) -> Result<u64> {
        let text = || format!("{ioas:?} {iova:#x}+{length:#x}");
        self.call(Verb::IoasUnmap, Some(ioas), text, |_| Ok(length))
    }

    fn get_hw_info(&self, dev: ObjectId) -> Result<HwInfo> {
        let text = || format!("{dev:?}");
        self.call(Verb::GetHwInfo, Some(dev), text, |state| Ok(state.device(dev)?.1))
    }

    fn hwpt_alloc(&self, args: &HwptAlloc) -> Result<ObjectId> {
        let text = || hwpt_text(args);
        self.call(Verb::HwptAlloc, Some(args.pt), text, |state| {
            let (iommu, _) = state.device(args.dev)?;
            state.get(args.pt).map_err(|_| Errno::EINVAL)?;
            Ok(state.insert(Object::Hwpt { pt: args.pt, iommu, pasid: args.flags.pasid() }))
        })
    }

    fn hwpt_invalidate(
        &self,
        hwpt: ObjectId,
        data: InvalidateData<'_>,
    ) -> std::result::Result<(), InvalidateError> {
        let text = || format!("{hwpt:?} {}", entries_text(data));
        let mut done = 0;
        self.call(Verb::HwptInvalidate, Some(hwpt), text, |state| {
            state.get(hwpt)?;
            let Some((stop, errno)) = state.partial.pop_front() else { return Ok(()) };
            done = stop.min(data.len());
            Err(errno)
        })
        .map_err(|error| InvalidateError { done, error })
    }

    fn hwpt_set_dirty_tracking(&self, hwpt: ObjectId, enable: bool) -> Result<()> {
        let text = || format!("{hwpt:?} {enable}");
        self.call(Verb::HwptSetDirtyTracking, Some(hwpt), text, |_| Err::<(), _>(Errno::EOPNOTSUPP))
    }

    fn hwpt_get_dirty_bitmap(
        &self,
        hwpt: ObjectId,
        range: &DirtyRange,
        clear: bool,
        _bitmap: &mut [u64],
    ) -> Result<()> {
        let text = || format!("{hwpt:?} {range:x?} {clear}");
        self.call(Verb::HwptGetDirtyBitmap, Some(hwpt), text, |_| Err::<(), _>(Errno::EOPNOTSUPP))
    }

    fn viommu_alloc(&self, _kind: ViommuKind, dev: ObjectId, hwpt: ObjectId) -> Result<ObjectId> {
        let text = || format!("{dev:?} on {hwpt:?}");
        self.call(Verb::ViommuAlloc, Some(hwpt), text, |_| Err::<ObjectId, _>(Errno::EOPNOTSUPP))
    }

    fn vdevice_alloc(&self, viommu: ObjectId, dev: ObjectId, virt_id: u64) -> Result<ObjectId> {
        let text = || format!("{viommu:?} {dev:?} {virt_id:#x}");
        self.call(Verb::VdeviceAlloc, Some(viommu), text, |_| Err::<ObjectId, _>(Errno::ENOENT))
    }

    fn fault_queue_alloc(&self) -> Result<Arc<dyn FaultQueue>> {
        let insert = |state: &mut State| Ok(state.insert(Object::FaultQueue));
        let queue = self.call(Verb::FaultQueueAlloc, None, String::new, insert)?;
        Ok(Arc::new(SilentQueue(queue)))
    }

    fn veventq_alloc(
        &self,
        viommu: ObjectId,
        kind: u32,
        depth: u32,
    ) -> Result<Arc<dyn EventQueue>> {
        let text = || format!("{viommu:?} type {kind:#x} depth {depth}");
        let none = |_: &mut State| Err::<ObjectId, _>(Errno::ENOENT);
        let queue = self.call(Verb::VeventqAlloc, Some(viommu), text, none)?;
        Ok(Arc::new(SilentQueue(queue)))
    }

    fn extensions(&self) -> Extensions {
        self.extensions
    }

    fn set_fault_sink(&self, dev: ObjectId, sink: Weak<dyn FaultSink>) -> Result<()> {
        let mut state = self.state();
        let refused = state.ordered_failure(Verb::DeviceBind);
        let refused = refused.or((!self.extensions.fault_reports).then_some(Errno::EOPNOTSUPP));
        let answer = refused.map(|errno| format!(" ! {errno}")).unwrap_or_default();
        state.log.push(format!("SET_FAULT_SINK {dev:?}{answer}"));
        if let Some(errno) = refused {
            return Err(HostError::new(Verb::DeviceBind, dev, errno, "as the test ordered"));
        }
        state.sinks.insert(dev, sink);
        Ok(())
    }
}

/// A queue of devices that never ask for pages, and vIOMMUs that nothing happens to.
#[derive(Debug)]
struct SilentQueue(ObjectId);

impl FaultQueue for SilentQueue {
    fn object(&self) -> ObjectId {
        self.0
    }

    fn next_group(&self) -> Result<Option<PageRequestGroup>> {
        Ok(None)
    }

    fn respond(&self, cookie: u32, _: PageResponseCode) -> Result<()> {
        let detail = format!("nothing was asked by the cookie {cookie}");
        Err(HostError::new(Verb::PageResponse, self.0, Errno::EINVAL, detail))
    }

    fn watch(&self, watcher: Arc<dyn Readiness>) {
        watcher.changed(false);
    }
}

impl EventQueue for SilentQueue {
    fn object(&self) -> ObjectId {
        self.0
    }

    fn next_event(&self) -> Result<Option<Vevent>> {
        Ok(None)
    }

    fn watch(&self, watcher: Arc<dyn Readiness>) {
        watcher.changed(false);
    }
}

fn source(dev: ObjectId, pasid: Option<u32>) -> String {
    match pasid {
        Some(pasid) => format!("{dev:?} PASID {pasid:#x}"),
        None => format!("{dev:?}"),
    }
}

fn hwpt_text(args: &HwptAlloc) -> String {
    let mut text = match args.data {
        HwptData::None => "paging".to_owned(),
        HwptData::VtdS1(s1) => {
            format!("VTD_S1({:#x}, {} bits, flags {:#x})", s1.pgtbl_addr, s1.addr_width, s1.flags)
        }
        HwptData::VtdSecondStage(ss) => {
            format!("second-stage({:#x}, {} bits)", ss.pgtbl_addr, ss.addr_width)
        }
        HwptData::ArmSmmuV3(smmu) => format!("ARM_SMMUV3({:#x}, {:#x})", smmu.ste[0], smmu.ste[1]),
    };
    if args.flags.nest_parent() {
        text.push_str(" NEST_PARENT");
    }
    if args.flags.pasid() {
        text.push_str(" PASID");
    }
    // Writing to a string cannot fail.
    let _ = write!(text, " on {:?} for {:?}", args.pt, args.dev);
    text
}

fn entries_text(data: InvalidateData<'_>) -> String {
    let (kind, entries) = match data {
        InvalidateData::VtdS1(entries) => ("", entries),
        InvalidateData::VtdSecondStage(entries) => ("second-stage ", entries),
        InvalidateData::ArmSmmuV3(commands) => {
            let one = |command: &super::iommu_viommu_arm_smmuv3_invalidate| {
                format!("{:#x}:{:#x}", command.cmd[0], command.cmd[1])
            };
            return format!("[{}]", commands.iter().map(one).collect::<Vec<_>>().join(", "));
        }
    };
    let one = |entry: &super::iommu_hwpt_vtd_s1_invalidate| {
        if entry.npages == u64::MAX {
            return "all".to_owned();
        }
        let leaf = if entry.flags & VTD_INV_FLAGS_LEAF != 0 { " leaf" } else { "" };
        format!("{:#x}/{}{leaf}", entry.addr, entry.npages)
    };
    format!("{kind}[{}]", entries.iter().map(one).collect::<Vec<_>>().join(", "))
}
