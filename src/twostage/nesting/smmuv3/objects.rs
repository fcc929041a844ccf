// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The existing host objects and their dependencies, for reports.

use super::nested::Entry;
use super::state::State;
use crate::iommufd::ObjectId;
use crate::spec::smmuv3::StreamId;

/// The host objects of one virtual SMMUv3.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct SmmuObjects {
    /// The IOAS, until shutdown.
    pub ioas: Option<ObjectId>,
    /// The objects on it, while there are devices.
    pub unit: Option<UnitObjects>,
    /// The devices, by StreamID.
    pub devices: Vec<DeviceObjects>,
    /// What they are or were attached to.
    pub nested: Vec<NestedObject>,
}

/// The part of the physical SMMU that a virtual SMMUv3 has.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct UnitObjects {
    /// The nesting parent, on the IOAS.
    pub parent: ObjectId,
    /// The vIOMMU, on the parent.
    pub viommu: ObjectId,
    /// The vEVENTQ, on the vIOMMU.
    pub event_queue: Option<ObjectId>,
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct DeviceObjects {
    /// Its identity for the guest.
    pub stream: StreamId,
    /// The device object.
    pub device: ObjectId,
    /// Its vDEVICE, on the vIOMMU.
    pub vdevice: ObjectId,
    /// The `HWPT_NESTED` that it is attached to, or the nesting parent while translation is off;
    /// `None` while it is detached.
    pub attached: Option<ObjectId>,
}

/// A `HWPT_NESTED`, on the vIOMMU.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct NestedObject {
    /// The object.
    pub hwpt: ObjectId,
    /// Words 0 and 1 of its stream table entry.
    pub ste: Entry,
    /// The streams attached to it.
    pub streams: Vec<StreamId>,
}

impl State {
    /// See [`super::SmmuNesting::objects`].
    pub fn list(&self) -> SmmuObjects {
        let unit = self.unit.as_ref().map(|unit| UnitObjects {
            parent: unit.parent(),
            viommu: unit.viommu(),
            event_queue: unit.event_queue(),
        });
        let devices = self.devices.iter().map(|(stream, device)| DeviceObjects {
            stream: *stream,
            device: device.dev,
            vdevice: device.vdevice,
            attached: device.attached,
        });
        let users = |hwpt| {
            let on_it = self.devices.iter().filter(move |(_, it)| it.attached == Some(hwpt));
            on_it.map(|(stream, _)| *stream).collect()
        };
        let nested = self.nested.iter();
        let nested = nested.map(|(hwpt, ste)| NestedObject { hwpt, ste, streams: users(hwpt) });
        SmmuObjects {
            ioas: self.objects.ioas().ok().map(|ioas| ioas.id()),
            unit,
            devices: devices.collect(),
            nested: nested.collect(),
        }
    }
}
