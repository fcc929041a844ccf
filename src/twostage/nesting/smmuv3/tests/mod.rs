// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests of [`SmmuNesting`] against a host that records its calls.

mod calls;
mod invalidations;
mod lives;
mod random;

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestRegionMmap};

use super::SmmuNesting;
use crate::iommufd::fake::RecordingHost;
use crate::iommufd::{
    iommu_hw_info_arm_smmuv3, Extensions, HwCapabilities, HwInfo, HwInfoData, ObjectId, UserMemory,
};
use crate::nesting::GuestIoas;
use crate::spec::pci::{Bdf, Pasid};
use crate::spec::smmuv3::command::{AddressRange, Command};
use crate::spec::smmuv3::stream_table::{Ste0, Ste1, StreamConfig};
use crate::spec::smmuv3::StreamId;
use crate::viommu::smmuv3::{SmmuHostSide as _, SmmuInvalidateError, StreamPolicy};
use crate::viommu::HostSideError;

/// The guest's devices: two behind one physical SMMU.
const A: Bdf = Bdf::from_raw(0x20);
const B: Bdf = Bdf::from_raw(0x28);
/// Their streams.
const STREAM_A: StreamId = StreamId(0x20);
const STREAM_B: StreamId = StreamId(0x28);
/// The device objects of the two: the first ids that the host assigns.
const DEV_A: ObjectId = ObjectId(1);
const DEV_B: ObjectId = ObjectId(2);
/// The next ids.
const IOAS: ObjectId = ObjectId(3);
const PARENT: ObjectId = ObjectId(4);
const VIOMMU: ObjectId = ObjectId(5);
const EVENTS: ObjectId = ObjectId(6);
const VDEVICE_A: ObjectId = ObjectId(7);
const VDEVICE_B: ObjectId = ObjectId(8);

fn hw_info() -> HwInfo {
    hw_info_with(0)
}

fn hw_info_with(flags: u32) -> HwInfo {
    let smmu = iommu_hw_info_arm_smmuv3 { flags, ..Default::default() };
    HwInfo {
        data: HwInfoData::ArmSmmuV3(smmu),
        capabilities: HwCapabilities::new(),
        max_pasid_log2: 0,
    }
}

fn memory() -> UserMemory {
    let region = GuestRegionMmap::<()>::from_range(GuestAddress(0), 0x10000, None).unwrap();
    UserMemory::whole(Arc::new(region))
}

/// Stage 1 with the context descriptors at `table`, with ATS or without.
fn stage1(table: u64, ats: bool) -> StreamPolicy {
    let low = Ste0::new()
        .with_v(true)
        .with_config(StreamConfig::Stage1.into_bits())
        .with_s1contextptr(table >> 6)
        .with_s1cdmax(if ats { 4 } else { 0 });
    StreamPolicy::Stage1 { ste: [low.into_bits(), Ste1::new().with_eats(ats.into()).into_bits()] }
}

fn va(asid: u16, page: u64) -> Command {
    Command::TlbiNhVa { vmid: 0, asid, range: AddressRange::at(page << 12) }
}

fn asid(asid: u16) -> Command {
    Command::TlbiNhAsid { vmid: 0, asid }
}

fn cd(stream: StreamId) -> Command {
    Command::CfgiCd { stream, substream: Pasid::new(0).unwrap(), leaf: true }
}

fn atc(stream: StreamId) -> Command {
    Command::AtcInv { stream, substream: None, global: false, address: 0x7000, size: 0 }
}

/// Both devices added and bypassing, the log empty.
struct Rig {
    host: Arc<RecordingHost>,
    nesting: SmmuNesting,
}

impl Rig {
    fn new() -> Self {
        Self::on(hw_info())
    }

    /// On an SMMU that the host describes by `info`.
    fn on(info: HwInfo) -> Self {
        let host = RecordingHost::new(Extensions::default());
        let (a, b) = (host.add_device(0, info), host.add_device(0, info));
        assert_eq!((a, b), (DEV_A, DEV_B));
        let nesting = SmmuNesting::new(GuestIoas::new(host.clone()).unwrap());
        nesting.add_device(A, DEV_A).unwrap();
        nesting.add_device(B, DEV_B).unwrap();
        let rig = Self { host, nesting };
        for stream in [STREAM_A, STREAM_B] {
            rig.configure(stream, StreamPolicy::GlobalBypass).unwrap();
        }
        rig.host.take_log();
        rig
    }

    /// With both devices on stage 1, A with ATS.
    fn nested() -> Self {
        Self::nested_on(hw_info())
    }

    fn nested_on(info: HwInfo) -> Self {
        let rig = Self::on(info);
        rig.configure(STREAM_A, stage1(0x1000, true)).unwrap();
        rig.configure(STREAM_B, stage1(0x2000, false)).unwrap();
        rig.host.take_log();
        rig
    }

    fn configure(&self, stream: StreamId, policy: StreamPolicy) -> Result<(), HostSideError> {
        self.nesting.configure(stream, &policy)
    }

    fn invalidate(&self, commands: &[Command]) -> Result<(), SmmuInvalidateError> {
        self.nesting.invalidate(commands)
    }

    /// Checks the host calls since the last time.
    #[track_caller]
    fn expect(&self, calls: &[&str]) {
        assert_eq!(self.host.take_log(), calls);
    }

    /// Drops nesting: nothing that it created may be left.
    #[track_caller]
    fn ends_clean(self) {
        drop(self.nesting);
        assert_eq!(self.host.live_objects(), []);
    }
}
