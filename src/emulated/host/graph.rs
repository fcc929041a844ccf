// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The objects of an iommufd and their relations, for reports and leak checks.

use std::collections::BTreeMap;
use std::fmt;

use crate::host::device::Slot;
use crate::host::objects::{Object, ObjectKind, Objects};
use twostage::iommufd::{HwptFlags, ObjectId};

/// Maximum number of reported attachments of one device: a guest can make 2^20.
const MAX_EDGES: usize = 1024;

/// One object.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct GraphObject {
    /// Its id.
    pub id: ObjectId,
    /// Its kind.
    pub kind: ObjectKind,
    /// Its name, if it has one, and other identification.
    pub name: String,
    /// Its allocation flags, by the uAPI's names; `AUTO` for an automatic HWPT.
    pub flags: Vec<&'static str>,
    /// What it depends on.
    pub on: Vec<GraphEdge>,
}

/// A reference from an object to one that it depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct GraphEdge {
    /// The object that it depends on.
    pub to: ObjectId,
    /// The attached PASID of a device; the first of several.
    pub pasid: Option<u32>,
    /// The last of them, if adjacent PASIDs are attached to the same.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub last_pasid: Option<u32>,
}

/// All objects of one iommufd, ascending by ID.
///
/// Its text is the tree of Linux's iommufd documentation: objects that depend on another one are
/// below it, after an arrow that points back.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct ObjectGraph {
    /// The objects.
    pub objects: Vec<GraphObject>,
    /// Bytes of pinned memory.
    pub pinned_bytes: u64,
}

impl ObjectGraph {
    /// The graph of `objects`.
    pub(crate) fn of(objects: &Objects) -> Self {
        Self {
            objects: objects
                .table()
                .iter()
                .map(|(id, object)| describe(objects, id, object))
                .collect(),
            pinned_bytes: objects.pinned_bytes(),
        }
    }

    /// The objects of one kind.
    pub fn of_kind(&self, kind: ObjectKind) -> impl Iterator<Item = &GraphObject> {
        self.objects.iter().filter(move |object| object.kind == kind)
    }

    /// Whether both have the same objects on the same ones. Automatic HWPTs may have other ids:
    /// they come and go with the devices that use them.
    pub fn is_like(&self, other: &Self) -> bool {
        self.without_automatic_ids() == other.without_automatic_ids()
    }

    /// Each object with what it is on, where an automatic HWPT is known by its own IOAS; sorted.
    fn without_automatic_ids(&self) -> Vec<(Option<ObjectId>, String, Vec<GraphEdge>)> {
        let automatic: BTreeMap<_, _> = (self.objects.iter())
            .filter(|object| object.flags.contains(&"AUTO"))
            .filter_map(|object| Some((object.id, object.on.first()?.to)))
            .collect();
        let known = |object: &GraphObject| {
            let id = Some(object.id).filter(|id| !automatic.contains_key(id));
            let text = format!("{} {:?} {}", object.kind, object.flags, object.name);
            let mut on = object.on.clone();
            for edge in &mut on {
                edge.to = automatic.get(&edge.to).copied().unwrap_or(edge.to);
            }
            (id, text, on)
        };
        let mut all: Vec<_> = self.objects.iter().map(known).collect();
        all.sort_by_key(|(id, text, on)| (*id, text.clone(), on.first().map(|edge| edge.to)));
        all
    }

    /// The objects below each object, with the kind of reference. A guest can create 60,000
    /// objects.
    fn above(&self) -> Above<'_> {
        let mut above = Above::new();
        for object in &self.objects {
            for edge in &object.on {
                above.entry(edge.to).or_default().push((object, edge));
            }
        }
        above
    }
}

/// The objects on each object, with the way to it.
type Above<'a> = BTreeMap<ObjectId, Vec<(&'a GraphObject, &'a GraphEdge)>>;

impl fmt::Display for ObjectGraph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let above = self.above();
        for object in self.objects.iter().filter(|object| object.on.is_empty()) {
            writeln!(f, "{object}")?;
            fmt_above(&above, object.id, 1, f)?;
        }
        writeln!(f, "{} objects, {:#x} bytes pinned", self.objects.len(), self.pinned_bytes)
    }
}

fn fmt_above(
    above: &Above<'_>,
    below: ObjectId,
    depth: usize,
    f: &mut fmt::Formatter<'_>,
) -> fmt::Result {
    for (object, edge) in above.get(&below).into_iter().flatten() {
        write!(f, "{:depth$}← {object}", "", depth = 2 * depth)?;
        match (edge.pasid, edge.last_pasid) {
            (Some(first), Some(last)) => writeln!(f, " PASIDs {first:#x} to {last:#x}")?,
            (Some(pasid), None) => writeln!(f, " PASID {pasid:#x}")?,
            (None, _) => writeln!(f)?,
        }
        fmt_above(above, object.id, depth + 1, f)?;
    }
    Ok(())
}

impl fmt::Display for GraphObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.id)?;
        if !self.flags.is_empty() {
            write!(f, " [{}]", self.flags.join("|"))?;
        }
        if !self.name.is_empty() {
            write!(f, " {}", self.name)?;
        }
        Ok(())
    }
}

fn describe(objects: &Objects, id: ObjectId, object: &Object) -> GraphObject {
    let (name, flags, on) = match object {
        Object::Ioas(ioas) => (format!("({})", mappings(ioas.space.area_count())), vec![], vec![]),
        Object::HwptPaging(hwpt) => {
            let mut flags = flag_names(hwpt.flags);
            if hwpt.automatic {
                flags.push("AUTO");
            }
            let on = objects.holds(id).into_iter().map(edge).collect();
            (String::new(), flags, on)
        }
        Object::HwptNested(hwpt) => {
            let on = objects.holds(id).into_iter().map(edge).collect();
            (hwpt.domain.describe(), flag_names(hwpt.flags), on)
        }
        Object::Device(device) => {
            let mut attachments = objects.attachments_of(id);
            let on: Vec<_> = attachments.by_ref().take(MAX_EDGES).map(edge_of_device).collect();
            let (name, rid) = (&device.part.name, device.part.requester.rid);
            let more = if attachments.next().is_some() { ", and to more" } else { "" };
            (format!("{name} ({rid}){more}"), vec![], on)
        }
        Object::Viommu(viommu) => {
            (format!("type {:#x}", viommu.kind), vec![], vec![edge(viommu.parent)])
        }
        Object::Vdevice(vdevice) => (
            format!("of DEVICE {}, virtual id {:#x}", vdevice.dev, vdevice.virt_id),
            vec![],
            vec![edge(vdevice.viommu)],
        ),
        Object::Access(_) | Object::Fault(_) | Object::HwQueue(_) => {
            (String::new(), vec![], objects.holds(id).into_iter().map(edge).collect())
        }
        Object::Veventq(veventq) => {
            (format!("type {:#x}", veventq.kind), vec![], vec![edge(veventq.viommu)])
        }
        Object::Selftest(selftest) => (format!("of DEVICE {}", selftest.dev), vec![], vec![]),
    };
    GraphObject { id, kind: object.kind(), name, flags, on }
}

fn mappings(count: usize) -> String {
    format!("{count} mapping{}", if count == 1 { "" } else { "s" })
}

fn edge(to: ObjectId) -> GraphEdge {
    GraphEdge { to, pasid: None, last_pasid: None }
}

fn edge_of_device((pasid, last, to): (Slot, Slot, ObjectId)) -> GraphEdge {
    GraphEdge { to, pasid, last_pasid: last.filter(|_| last != pasid) }
}

fn flag_names(flags: HwptFlags) -> Vec<&'static str> {
    [
        (flags.nest_parent(), "NEST_PARENT"),
        (flags.dirty_tracking(), "DIRTY_TRACKING"),
        (flags.fault_id_valid(), "FAULT_ID_VALID"),
        (flags.pasid(), "PASID"),
    ]
    .into_iter()
    .filter_map(|(set, name)| set.then_some(name))
    .collect()
}

#[cfg(test)]
mod tests {
    use crate::{DeviceConfig, EmulatedHost, VtdUnit, VtdUnitConfig};
    use twostage::iommufd::HostIommu;
    use twostage::spec::pci::Bdf;

    #[test]
    fn an_automatic_hwpt_may_have_another_id() {
        let host = EmulatedHost::new();
        let unit = host.add_unit(VtdUnit::new(VtdUnitConfig::default()));
        host.add_device("a", unit, Bdf::new(0, 1, 0).unwrap(), DeviceConfig::default()).unwrap();
        let (dev, ioas) = (host.device_bind("a").unwrap(), host.ioas_alloc().unwrap());
        host.device_attach(dev, None, ioas).unwrap();
        let before = host.graph();
        host.device_detach(dev, None).unwrap();
        let other = host.ioas_alloc().unwrap();
        host.device_attach(dev, None, ioas).unwrap();
        assert!(!host.graph().is_like(&before), "one IOAS more");
        host.destroy(other).unwrap();
        assert_ne!(host.graph(), before);
        assert!(host.graph().is_like(&before));
        host.device_detach(dev, None).unwrap();
        assert!(!host.graph().is_like(&before), "not attached");
    }

    #[cfg(feature = "serde")]
    #[test]
    fn a_graph_is_reported_as_json() {
        let host = EmulatedHost::new();
        host.ioas_alloc().unwrap();
        let json = serde_json::to_value(host.graph()).unwrap();
        let object = serde_json::json!({
            "id": 1, "kind": "IOAS", "name": "(0 mappings)", "flags": [], "on": []
        });
        assert_eq!(json, serde_json::json!({ "objects": [object], "pinned_bytes": 0 }));
    }
}
