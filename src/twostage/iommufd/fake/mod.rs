// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A host for tests: records every call in order, fails on request, and tracks objects.
//!
//! It implements only those rules of iommufd that its callers depend on: IDs, reference counts
//! (`EBUSY`), one nesting parent and one kind of vIOMMU per physical IOMMU (`EINVAL`), vDEVICEs
//! before attachments, which commands an SMMU accepts, and the effects of a failed replace. Page
//! tables and DMA are left to the emulated host.

mod state;

use crate::sync::Mutex;
use std::fmt::Write as _;
use std::ops::RangeInclusive;
use std::sync::{Arc, MutexGuard, Weak};

use super::{
    iommu_hw_info_arm_smmuv3, iommu_hw_info_vtd, iommu_hwpt_vtd_s1_invalidate,
    iommu_viommu_arm_smmuv3_invalidate, DirtyRange, Errno, EventQueue, Extensions, FaultQueue,
    FaultSink, HostError, HostFault, HostIommu, HwCapabilities, HwInfo, HwInfoData, HwptAlloc,
    HwptData, HwptVtdNested, HwptVtdSecondStage, InvalidateData, InvalidateError, IovaRanges,
    MapTarget, ObjectId, Protection, Result, UserMemory, Verb, Vevent, ViommuKind,
    VEVENTQ_ARM_SMMUV3, VTD_INV_FLAGS_LEAF,
};
use state::{Events, Object, OpenEvents, Reached, SilentQueue, State};

/// A host that records its calls. See the [module](self).
#[derive(Debug)]
pub struct RecordingHost {
    extensions: Extensions,
    state: Mutex<State>,
}

impl RecordingHost {
    /// A host without objects that offers `extensions`.
    pub fn new(extensions: Extensions) -> Arc<Self> {
        Arc::new(Self { extensions, state: Mutex::default() })
    }

    /// A host with a bound device behind a VT-d that nests and has PASIDs.
    pub fn with_vtd() -> (Arc<Self>, ObjectId) {
        // CAP: addresses of 48 bits. ECAP: first stage, PASIDs of 20 bits, nesting.
        let (cap_reg, ecap_reg) = (47 << 16, 1 << 43 | 1 << 40 | 19 << 35 | 1 << 26);
        let unit = iommu_hw_info_vtd { cap_reg, ecap_reg, ..Default::default() };
        Self::with_device(HwInfoData::Vtd(unit), 20)
    }

    /// A host with a bound device behind an SMMUv3 that nests and has SubstreamIDs.
    pub fn with_smmuv3() -> (Arc<Self>, ObjectId) {
        // IDR0: AArch64 tables, ASIDs of 16 bits, two-level tables. IDR1: StreamIDs of
        // 32 bits, SubstreamIDs of 6. IDR3: invalidation by range. IDR5: every granule.
        let idr = [0x0808_100c, 6 << 6 | 32, 0, 1 << 10, 0, 0x70];
        let unit = iommu_hw_info_arm_smmuv3 { idr, aidr: 3, ..Default::default() };
        Self::with_device(HwInfoData::ArmSmmuV3(unit), 6)
    }

    fn with_device(data: HwInfoData, max_pasid_log2: u8) -> (Arc<Self>, ObjectId) {
        let host = Self::new(Extensions { fault_reports: true, ..Extensions::default() });
        let info = HwInfo { data, capabilities: HwCapabilities::new(), max_pasid_log2 };
        let dev = host.add_device(0, info);
        (host, dev)
    }

    /// A bound device behind the physical IOMMU number `iommu`. Not recorded as a call.
    pub fn add_device(&self, iommu: u32, info: HwInfo) -> ObjectId {
        self.state().insert(Object::Device { iommu, info })
    }

    /// The calls since the last time, in order, as text; a failed one ends with `! errno`.
    pub fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.state().log)
    }

    /// Stops recording, so that a benchmark measures the caller. Calls are still counted.
    pub fn mute(&self) {
        self.state().muted = true;
    }

    /// Number of calls so far.
    pub fn calls(&self) -> u64 {
        self.state().calls
    }

    /// Makes the `nth` call from now on (the next is 0) fail with `errno`.
    pub fn fail_nth(&self, nth: u64, errno: Errno) {
        self.fail_calls(nth, 1, errno);
    }

    /// The same, and the `count - 1` calls after it.
    pub fn fail_calls(&self, nth: u64, count: u64, errno: Errno) {
        self.state().fail_from(nth, count, errno);
    }

    /// Whether a failure requested by [`Self::fail_nth`] is still pending.
    pub fn failure_pending(&self) -> bool {
        self.state().fail_at.is_some()
    }

    /// Makes the next call of `verb` fail with `errno`; requests queue up. With [`Verb::Vevent`],
    /// nobody can watch the next vEVENTQ for the first time.
    pub fn fail_next(&self, verb: Verb, errno: Errno) {
        self.state().failures.push_back((verb, errno));
    }

    /// Cancels pending requests of calls to fail.
    pub fn forget_failures(&self) {
        self.state().forget_failures();
    }

    /// Makes the next invalidation stop with `errno` after `done` entries; requests queue up.
    pub fn fail_invalidation(&self, done: usize, errno: Errno) {
        self.state().partial.push_back((done, errno));
    }

    /// Makes every invalidation stop with `EIO` at this command of an SMMU. As in Linux, commands
    /// before it count as done but are not.
    pub fn refuse_command(&self, command: [u64; 2]) {
        self.state().refused_commands.push(command);
    }

    /// Accepts every command of an SMMU again that Linux accepts.
    pub fn refuse_no_command(&self) {
        self.state().refused_commands.clear();
    }

    /// Adds `event` to the vEVENTQ of `viommu`; returns whether it has an open one.
    pub fn push_event(&self, viommu: ObjectId, event: Vevent) -> bool {
        let events = self.state().objects.values().find_map(|object| match object {
            Object::EventQueue { viommu: of, events } if *of == viommu => events.upgrade(),
            _ => None,
        });
        // Not under the lock: the queue's watcher may call the host.
        events.inspect(|events| events.push(event)).is_some()
    }

    /// The page table that the hardware uses for `dev`, or its `pasid`; `None` if blocked.
    pub fn reaches(&self, dev: ObjectId, pasid: Option<u32>) -> Option<ObjectId> {
        self.state().reaches.get(&(dev, pasid)).copied()
    }

    /// What `dev` reaches by copies: IOVA, length and source in bytes, and what is allowed.
    pub fn reaches_copies(&self, dev: ObjectId) -> Vec<Reached> {
        self.reached_by(dev, None)
    }

    /// The same for a `pasid` of `dev`.
    pub fn reached_by(&self, dev: ObjectId, pasid: Option<u32>) -> Vec<Reached> {
        self.state().reached_copies(dev, pasid)
    }

    /// Every object except devices: what leaked, at the end of a test.
    pub fn live_objects(&self) -> Vec<ObjectId> {
        self.state().live_objects()
    }

    /// Delivers `fault` to the sink of its device, as a DMA thread would.
    pub fn report_fault(&self, fault: &HostFault) {
        let sink = self.state().sinks.get(&fault.dev).and_then(Weak::upgrade);
        sink.inspect(|sink| sink.dma_fault(fault));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Records `text`, and runs `serve` unless the call is to fail.
    fn call<T: Answer>(
        &self,
        verb: Verb,
        object: Option<ObjectId>,
        text: impl FnOnce() -> String,
        serve: impl FnOnce(&mut State) -> Result<T, Errno>,
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

impl HostIommu for RecordingHost {
    fn device_bind(&self, name: &str) -> Result<ObjectId> {
        let text = || format!("{name:?}");
        self.call(Verb::DeviceBind, None, text, |_| Err::<ObjectId, _>(Errno::ENODEV))
    }

    fn device_unbind(&self, dev: ObjectId) -> Result<()> {
        let text = || format!("{dev:?}");
        self.call(Verb::DeviceUnbind, Some(dev), text, |state| state.unbind(dev))
    }

    fn device_attach(&self, dev: ObjectId, pasid: Option<u32>, pt: ObjectId) -> Result<ObjectId> {
        let text = || format!("{} to {pt:?}", source(dev, pasid));
        let result = self
            .call(Verb::DeviceAttach, Some(dev), text, |state| {
                state.attach(dev, pasid, pt).map(|_| ())
            })
            .map(|()| pt);
        if result.is_err() {
            self.state().attach_failed(dev, pasid);
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
            state.copies.retain(|(ioas, _), _| *ioas != id);
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
        target: MapTarget,
        src: ObjectId,
        src_iova: u64,
        length: u64,
        protection: Protection,
    ) -> Result<u64> {
        let iova = match target {
            MapTarget::Fixed(iova) => iova,
            MapTarget::Anywhere => src_iova,
        };
        let flag = |set, name| if set { name } else { "" };
        let access = [flag(protection.read, "r"), flag(protection.write, "w")].concat();
        let text = || format!("{dst:?} {iova:#x} from {src:?} {src_iova:#x}+{length:#x} {access}");
        let copied = (length, src_iova, protection);
        self.call(Verb::IoasCopy, Some(dst), text, |state| state.copy(dst, iova, copied))
    }

    fn ioas_unmap(&self, ioas: ObjectId, iova: u64, length: u64) -> Result<u64> {
        let text = || format!("{ioas:?} {iova:#x}+{length:#x}");
        self.call(Verb::IoasUnmap, Some(ioas), text, |state| state.unmap(ioas, iova, length))
    }

    fn get_hw_info(&self, dev: ObjectId) -> Result<HwInfo> {
        let text = || format!("{dev:?}");
        self.call(Verb::GetHwInfo, Some(dev), text, |state| Ok(state.device(dev)?.1))
    }

    fn hwpt_alloc(&self, args: &HwptAlloc) -> Result<ObjectId> {
        let text = || hwpt_text(args);
        self.call(Verb::HwptAlloc, Some(args.pt), text, |state| {
            let (iommu, _) = state.device(args.dev)?;
            if let Object::Viommu { iommu: of, .. } =
                state.get(args.pt).map_err(|_| Errno::EINVAL)?
            {
                if *of != iommu {
                    return Err(Errno::EINVAL);
                }
            }
            let ste = match args.data {
                HwptData::ArmSmmuV3(smmu) => Some(smmu.ste),
                _ => None,
            };
            let pasid = args.flags.pasid();
            Ok(state.insert(Object::Hwpt { pt: args.pt, iommu, pasid, ste }))
        })
    }

    fn hwpt_invalidate(
        &self,
        hwpt: ObjectId,
        data: InvalidateData<'_>,
    ) -> Result<(), InvalidateError> {
        let text = || format!("{hwpt:?} {}", entries_text(data));
        let mut done = 0;
        self.call(Verb::HwptInvalidate, Some(hwpt), text, |state| {
            state.get(hwpt)?;
            if let Some((stop, errno)) = state.partial.pop_front() {
                done = stop.min(data.len());
                return Err(errno);
            }
            if let InvalidateData::ArmSmmuV3(commands) = data {
                let refused = |command| !state.takes_command(hwpt, command);
                if let Some(at) = commands.iter().position(|command| refused(command.cmd)) {
                    done = at;
                    return Err(Errno::EIO);
                }
            }
            Ok(())
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

    fn viommu_alloc(&self, kind: ViommuKind, dev: ObjectId, hwpt: ObjectId) -> Result<ObjectId> {
        let text = || format!("{dev:?} on {hwpt:?}");
        self.call(Verb::ViommuAlloc, Some(hwpt), text, |state| state.add_viommu(kind, dev, hwpt))
    }

    fn vdevice_alloc(&self, viommu: ObjectId, dev: ObjectId, virt_id: u64) -> Result<ObjectId> {
        let text = || format!("{viommu:?} {dev:?} {virt_id:#x}");
        self.call(Verb::VdeviceAlloc, Some(viommu), text, |state| {
            state.add_vdevice(viommu, dev, virt_id)
        })
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
        let events = Arc::new(Events::new(self.state().next_failure(Verb::Vevent)));
        let insert = |state: &mut State| {
            state.viommu(viommu)?;
            if kind != VEVENTQ_ARM_SMMUV3 {
                return Err(Errno::EOPNOTSUPP);
            }
            Ok(state.insert(Object::EventQueue { viommu, events: Arc::downgrade(&events) }))
        };
        let queue = self.call(Verb::VeventqAlloc, Some(viommu), text, insert)?;
        Ok(Arc::new(OpenEvents(queue, events)))
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

/// The text of a result in the log.
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

fn source(dev: ObjectId, pasid: Option<u32>) -> String {
    match pasid {
        Some(pasid) => format!("{dev:?} PASID {pasid:#x}"),
        None => format!("{dev:?}"),
    }
}

fn second_stage_text(tables: &HwptVtdSecondStage) -> String {
    let flags = if tables.accessed_dirty { ", SSADE" } else { "" };
    format!("{:#x}, {} bits{flags}", tables.pgtbl_addr, tables.addr_width)
}

fn hwpt_text(args: &HwptAlloc) -> String {
    let mut text = match args.data {
        HwptData::None => "paging".to_owned(),
        HwptData::VtdS1(s1) => {
            format!("VTD_S1({:#x}, {} bits, flags {:#x})", s1.pgtbl_addr, s1.addr_width, s1.flags)
        }
        HwptData::VtdSecondStage(ss) => {
            format!("second-stage({})", second_stage_text(&ss))
        }
        HwptData::VtdNested(HwptVtdNested { first, second }) => format!(
            "nested({:#x}, {} bits, over {})",
            first.pgtbl_addr,
            first.addr_width,
            second_stage_text(&second)
        ),
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
            let one = |command: &iommu_viommu_arm_smmuv3_invalidate| {
                format!("{:#x}:{:#x}", command.cmd[0], command.cmd[1])
            };
            return format!("[{}]", commands.iter().map(one).collect::<Vec<_>>().join(", "));
        }
    };
    let one = |entry: &iommu_hwpt_vtd_s1_invalidate| {
        if entry.npages == u64::MAX {
            return "all".to_owned();
        }
        let leaf = if entry.flags & VTD_INV_FLAGS_LEAF != 0 { " leaf" } else { "" };
        format!("{:#x}/{}{leaf}", entry.addr, entry.npages)
    };
    format!("{kind}[{}]", entries.iter().map(one).collect::<Vec<_>>().join(", "))
}
