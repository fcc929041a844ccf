// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A driver with vIOMMUs, for the rules of them: otherwise that of VT-d.

use std::ops::RangeInclusive;
use std::sync::{Arc, Weak};

use crate::emulated::device::{Requester, Slot};
use crate::emulated::driver::{
    Domain, Driver, DriverInfo, NestedDomain, PagingDomain, UserData, ViommuDriver, ViommuRequest,
    VtdDriver,
};
use crate::emulated::refusal::Outcome;
use crate::emulated::stage2::Stage2;
use crate::iommufd::{Extensions, FaultSink, HwptFlags, ObjectId, ViommuKind};

/// See the [module's documentation](self).
#[derive(Debug)]
pub struct WithViommus(pub Arc<VtdDriver>);

impl Driver for WithViommus {
    fn info(&self) -> DriverInfo {
        self.0.info()
    }

    fn extensions(&self) -> Extensions {
        self.0.extensions()
    }

    fn pasid_bits(&self) -> u8 {
        self.0.pasid_bits()
    }

    fn reserved_regions(&self, device: &Requester) -> Vec<RangeInclusive<u64>> {
        self.0.reserved_regions(device)
    }

    fn dirty_tracking(&self, device: &Requester) -> bool {
        self.0.dirty_tracking(device)
    }

    fn alloc_paging(
        &self,
        device: &Requester,
        flags: HwptFlags,
        data: Option<&dyn UserData>,
    ) -> Outcome<Arc<dyn PagingDomain>> {
        self.0.alloc_paging(device, flags, data)
    }

    fn alloc_nested(
        &self,
        device: &Requester,
        parent: &Arc<dyn PagingDomain>,
        flags: HwptFlags,
        data: &dyn UserData,
    ) -> Outcome<Arc<dyn NestedDomain>> {
        self.0.alloc_nested(device, parent, flags, data)
    }

    fn has_viommu(&self, kind: u32) -> bool {
        kind == ViommuKind::ArmSmmuV3.number()
    }

    fn alloc_viommu(&self, request: &ViommuRequest<'_>) -> Outcome<Arc<dyn ViommuDriver>> {
        Ok(Arc::new(Viommu {
            driver: self.0.clone(),
            device: request.device.clone(),
            parent: request.parent.clone(),
        }))
    }

    fn attach(
        &self,
        devices: &[&Requester],
        slot: Slot,
        new: &Domain,
        old: Option<&Domain>,
    ) -> Outcome<()> {
        self.0.attach(devices, slot, new, old)
    }

    fn detach(&self, devices: &[&Requester], slot: Slot, old: &Domain) {
        self.0.detach(devices, slot, old);
    }

    fn block(&self, device: &Requester) {
        self.0.block(device);
    }

    fn stage2_changed(&self, stage2: &Arc<Stage2>) {
        self.0.stage2_changed(stage2);
    }

    fn set_fault_sink(&self, device: &Requester, sink: Option<(ObjectId, Weak<dyn FaultSink>)>) {
        self.0.set_fault_sink(device, sink);
    }
}

#[derive(Debug)]
struct Viommu {
    driver: Arc<VtdDriver>,
    device: Requester,
    parent: Arc<dyn PagingDomain>,
}

impl ViommuDriver for Viommu {
    fn alloc_nested(
        &self,
        flags: HwptFlags,
        data: &dyn UserData,
    ) -> Outcome<Arc<dyn NestedDomain>> {
        self.driver.alloc_nested(&self.device, &self.parent, flags, data)
    }
}
