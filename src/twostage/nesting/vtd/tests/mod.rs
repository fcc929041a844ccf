// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests of [`VtdNesting`](super::VtdNesting) against a host that records its calls.

mod calls;
mod invalidations;
mod lives;

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestRegionMmap};

use super::VtdNesting;
use crate::iommufd::fake::RecordingHost;
use crate::iommufd::{
    iommu_hw_info_vtd, Extensions, HwCapabilities, HwInfo, HwInfoData, ObjectId, UserMemory,
};
use crate::nesting::GuestIoas;
use crate::spec::pci::{Bdf, Pasid};
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::pasid::PagingMode;
use crate::spec::vtd::root::AddressWidth;
use crate::spec::vtd::PageRange;
use crate::viommu::vtd::{
    DomainTag, Invalidation, Policy, Progress, RequesterConfig, Stage1, VtdFirstStage, VtdHostSide,
    VtdNested, VtdSecondStage,
};
use crate::viommu::{HostSideError, Requester};

/// The guest's devices: two behind one physical IOMMU, with 8-bit PASIDs.
const A: Bdf = Bdf::from_raw(0x20);
const B: Bdf = Bdf::from_raw(0x28);
/// The device objects of the two: the first ids that the host assigns.
const DEV_A: ObjectId = ObjectId(1);
const DEV_B: ObjectId = ObjectId(2);
/// The next ids.
const IOAS: ObjectId = ObjectId(3);
const PARENT: ObjectId = ObjectId(4);

const BLOCKED: Policy = Policy::Blocked(FaultReason::PasidTableAccess);
const TAG: DomainTag = DomainTag { domain: 7, pasid: 0 };

fn hw_info(flags: u32, max_pasid_log2: u8) -> HwInfo {
    let vtd = iommu_hw_info_vtd { flags, __reserved: 0, cap_reg: 0, ecap_reg: 0 };
    HwInfo { data: HwInfoData::Vtd(vtd), capabilities: HwCapabilities::new(), max_pasid_log2 }
}

fn memory() -> UserMemory {
    let region = GuestRegionMmap::<()>::from_range(GuestAddress(0), 0x10000, None).unwrap();
    UserMemory::whole(Arc::new(region))
}

fn pasid(rid: Bdf, pasid: u32) -> Requester {
    Requester { rid, pasid: Some(Pasid::new(pasid).unwrap()) }
}

fn first_stage(table: u64) -> Policy {
    Policy::Stage1(Stage1::VtdFirstStage(VtdFirstStage {
        table,
        paging_mode: PagingMode::Level4,
        supervisor_requests: false,
        write_protect: false,
        extended_accessed: false,
    }))
}

fn second_stage(table: u64) -> Policy {
    let address_width = AddressWidth::Bits48;
    Policy::Stage1(Stage1::VtdSecondStage(VtdSecondStage {
        table,
        address_width,
        accessed_dirty: false,
    }))
}

/// First-stage tables at `first` over second-stage tables at `second`.
fn nested(first: u64, second: u64) -> Policy {
    match (first_stage(first), second_stage(second)) {
        (
            Policy::Stage1(Stage1::VtdFirstStage(first)),
            Policy::Stage1(Stage1::VtdSecondStage(second)),
        ) => Policy::Stage1(Stage1::VtdNested(VtdNested { first, second })),
        other => unreachable!("{other:?}"),
    }
}

fn page(tag: DomainTag, address: u64) -> Invalidation {
    let range = PageRange::new(address, 1, true);
    Invalidation { domain: Some(tag.domain), pasid: Some(tag.pasid), range: Some(range) }
}

/// Both devices added and bypassing, the log empty.
struct Rig {
    host: Arc<RecordingHost>,
    nesting: VtdNesting,
}

impl Rig {
    fn new() -> Self {
        Self::with(Extensions::default())
    }

    /// On a host that walks second-stage tables of the guest.
    fn walking() -> Self {
        Self::with(Extensions { guest_second_stage: true, ..Extensions::default() })
    }

    fn with(extensions: Extensions) -> Self {
        let host = RecordingHost::new(extensions);
        let (a, b) = (host.add_device(0, hw_info(0, 8)), host.add_device(0, hw_info(0, 8)));
        assert_eq!((a, b), (DEV_A, DEV_B));
        let nesting = VtdNesting::new(GuestIoas::new(host.clone()).unwrap());
        nesting.add_device(A, DEV_A).unwrap();
        nesting.add_device(B, DEV_B).unwrap();
        let rig = Self { host, nesting };
        for rid in [A, B] {
            assert_eq!(rig.host.reaches(if rid == A { DEV_A } else { DEV_B }, None), None);
            rig.configure_tagged(Requester::rid(rid), Policy::Bypass, TAG).unwrap();
        }
        rig.host.take_log();
        rig
    }

    fn configure(&self, requester: Requester, policy: Policy) -> Result<(), HostSideError> {
        let tag = DomainTag { pasid: requester.pasid.map_or(TAG.pasid, Pasid::raw), ..TAG };
        self.configure_tagged(requester, policy, tag)
    }

    fn configure_tagged(
        &self,
        requester: Requester,
        policy: Policy,
        tag: DomainTag,
    ) -> Result<(), HostSideError> {
        self.nesting.configure(requester, &RequesterConfig { policy, tag, fault_disabled: false })
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
