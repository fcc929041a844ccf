// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What one virtual IOMMU in front of several devices can offer to its guest.

use std::collections::BTreeMap;
use std::fmt;

use super::{difference, DeviceFacts};
use crate::iommufd::HwInfoData;
use crate::nesting::{host_smmu, host_vtd};
use crate::spec::smmuv3::regs::{Httu, STALL_OR_TERMINATE};
use crate::spec::smmuv3::SubstreamId;
use crate::viommu::smmuv3::SmmuConfig;
use crate::viommu::vtd::{HostVtd, VtdConfig};
use crate::viommu::{CapabilityConflict, IntersectError};

/// The most that one virtual IOMMU for all devices can offer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Offer {
    /// Its kind.
    pub kind: OfferKind,
    /// Width of the IOVAs in bits.
    pub address_bits: u8,
    /// Width of the PASIDs in bits; 0 for none. A device may support fewer, or none.
    pub pasid_bits: u8,
    /// Device-TLBs, for devices that have them.
    pub ats: bool,
    /// Why page requests are not offered; `None`: they are, for devices that make them.
    pub no_page_requests: Option<String>,
    /// Why nothing sets the flags in the guest's tables that say what was accessed and written;
    /// `None`: the IOMMU does, as far as its features say.
    pub no_table_updates: Option<String>,
    /// Dirty pages can be tracked with devices behind it.
    pub dirty_tracking: bool,
    /// What its driver detects, one item each.
    pub features: Vec<String>,
    /// Its identification registers by name; in JSON each is a hexadecimal string.
    #[cfg_attr(feature = "serde", serde(serialize_with = "hexadecimal"))]
    pub registers: BTreeMap<&'static str, u64>,
}

/// Registers by name, as JSON has them: JSON numbers cannot hold 64 bits. For `serialize_with`.
///
/// # Errors
/// The serializer's errors.
#[cfg(feature = "serde")]
pub fn hexadecimal<S: serde::Serializer>(
    registers: &BTreeMap<&'static str, u64>,
    to: S,
) -> Result<S::Ok, S::Error> {
    to.collect_map(registers.iter().map(|(name, value)| (name, format!("{value:#x}"))))
}

/// Kinds of virtual IOMMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
#[non_exhaustive]
pub enum OfferKind {
    /// VT-d.
    Vtd,
    /// SMMUv3.
    Smmuv3,
}

/// Why one virtual IOMMU cannot be in front of all devices.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OfferError {
    /// There is no device.
    #[error("no device is given")]
    NoDevice,
    /// The IOMMU of this device cannot nest.
    #[error("{device}: {why}")]
    CannotNest {
        /// Its name.
        device: String,
        /// The host's error.
        why: String,
    },
    /// There is no virtual IOMMU for its architecture.
    #[error("{0} is behind an IOMMU of an architecture without a virtual IOMMU")]
    UnknownIommu(String),
    /// Two architectures.
    #[error("{0} and {1} are behind IOMMUs of different architectures")]
    Mixed(String, String),
    /// Two SMMUs; a vIOMMU belongs to one.
    #[error("{0} and {1} are behind different SMMUs: each needs a virtual SMMUv3 of its own")]
    TwoSmmus(String, String),
    /// A unit lacks a feature that a virtual IOMMU needs.
    #[error(transparent)]
    Conflict(#[from] CapabilityConflict),
    /// No configuration matches the units' features.
    #[error("no virtual IOMMU matches the units: {0}")]
    Impossible(String),
}

impl From<IntersectError> for OfferError {
    fn from(error: IntersectError) -> Self {
        match error {
            IntersectError::NoHosts => Self::NoDevice,
            IntersectError::Lacks(conflict) => Self::Conflict(conflict),
        }
    }
}

impl Offer {
    /// What one virtual IOMMU for all devices of `facts` can offer.
    ///
    /// # Errors
    /// There can be none.
    pub fn new(facts: &[DeviceFacts]) -> Result<Self, OfferError> {
        let first = facts.first().ok_or(OfferError::NoDevice)?;
        for device in facts {
            if let Some(refusal) = &device.refusal {
                let (device, why) = (device.name.clone(), refusal.to_string());
                return Err(OfferError::CannotNest { device, why });
            }
        }
        match first.info.data {
            HwInfoData::Vtd(_) => vtd(first, facts),
            HwInfoData::ArmSmmuV3(_) => smmuv3(first, facts),
            HwInfoData::Other(_) | HwInfoData::None => {
                Err(OfferError::UnknownIommu(first.name.clone()))
            }
        }
    }

    /// What a virtual VT-d for all devices of `facts` can offer if the guest's tables are mirrored;
    /// `None` for no devices, or those behind an SMMU.
    pub fn mirrored(facts: &[DeviceFacts]) -> Option<Self> {
        if facts.iter().any(|device| matches!(device.info.data, HwInfoData::ArmSmmuV3(_))) {
            return None;
        }
        let unit = |device: &DeviceFacts| {
            let last = difference(&device.iovas, &device.reserved).last().map(|range| *range.end());
            // Of all addresses, 64 bits.
            let bits = last.map_or(0, |last| last.checked_add(1).map_or(64, u64::ilog2));
            let pasid_bits = device.info.max_pasid_log2;
            HostVtd::mirrored(device.name.clone(), bits as u8, pasid_bits)
        };
        let hosts: Vec<_> = facts.iter().map(unit).collect();
        let wanted = VtdConfig { interrupt_remapping: true, ..VtdConfig::default() };
        let config = wanted.intersect(&hosts).ok()?;
        let offered = config.capabilities().ok()?;
        Some(Self {
            kind: OfferKind::Vtd,
            address_bits: offered.cap.guest_address_width(),
            pasid_bits: offered.ecap.pasid_bits(),
            ats: false,
            no_page_requests: Some("mirrored tables have none".into()),
            no_table_updates: Some("hardware sees mirrors of them".into()),
            dirty_tracking: false,
            features: Self::features([
                (true, "legacy and scalable mode, second-stage tables"),
                (config.snoop_control, "snoop control"),
                (config.coherent_walks, "coherent walks"),
                (config.interrupt_remapping, "interrupt remapping"),
            ]),
            registers: offered.registers(),
        })
    }

    fn features<'a>(all: impl IntoIterator<Item = (bool, &'a str)>) -> Vec<String> {
        all.into_iter().filter(|(there, _)| *there).map(|(_, text)| text.to_owned()).collect()
    }
}

fn ats(facts: &[DeviceFacts]) -> bool {
    facts.iter().any(DeviceFacts::ats)
}

/// Why a virtual IOMMU in front of all devices of `facts` takes no page requests, if not because
/// their units do not.
fn no_page_requests(facts: &[DeviceFacts], ats: bool) -> Option<String> {
    match facts.iter().any(DeviceFacts::asks) {
        _ if !ats => Some("they need device-TLBs (ATS)".into()),
        false => Some("no device makes them (PRI)".into()),
        true => None,
    }
}

/// The unit of `device` takes none.
fn takes_none(device: &str, bit: &str) -> String {
    format!("the IOMMU of {device} lacks {bit}")
}

fn mixed(first: &DeviceFacts, device: &DeviceFacts) -> OfferError {
    OfferError::Mixed(first.name.clone(), device.name.clone())
}

fn vtd(first: &DeviceFacts, facts: &[DeviceFacts]) -> Result<Offer, OfferError> {
    // Second-stage tables of the guest's, which only an emulated host walks, are not offered.
    let unit = |device: &DeviceFacts| {
        host_vtd(device.name.clone(), &device.info, device.extensions)
            .ok_or_else(|| mixed(first, device))
    };
    let hosts = facts.iter().map(unit).collect::<Result<Vec<_>, _>>()?;
    let pasid_bits = hosts.iter().map(|host| host.ecap.pasid_bits()).min();
    let wide = |host: &HostVtd| host.cap.fs5lp() && host.cap.guest_address_width() >= 57;
    let device_iotlb = ats(facts) && hosts.iter().all(|host| host.ecap.dt());
    let without = hosts.iter().find(|host| !host.ecap.prs());
    let no_page_requests = match without {
        Some(host) => Some(takes_none(&host.device, "ECAP.PRS")),
        None => no_page_requests(facts, device_iotlb),
    };
    let wanted = VtdConfig {
        address_width: if hosts.iter().all(wide) { 57 } else { 48 },
        pasid_bits,
        device_iotlb,
        page_requests: no_page_requests.is_none(),
        // A feature of the virtual unit alone; a machine has it if its interrupt controllers can be
        // split.
        interrupt_remapping: true,
        ..VtdConfig::default()
    };
    let config = wanted.intersect(&hosts)?;
    let offered =
        config.capabilities().map_err(|error| OfferError::Impossible(error.to_string()))?;
    Ok(Offer {
        kind: OfferKind::Vtd,
        address_bits: config.address_width,
        pasid_bits: offered.ecap.pasid_bits(),
        ats: config.device_iotlb,
        no_page_requests,
        no_table_updates: None,
        dirty_tracking: facts.iter().all(|device| device.dirty_nesting),
        features: Offer::features([
            (true, "scalable mode, first-stage tables"),
            (config.first_stage_1g, "1 GiB pages"),
            (config.supervisor_requests, "supervisor requests"),
            (config.extended_accessed, "extended accessed flags"),
            (config.snoop_control, "snoop control"),
            (config.coherent_walks, "coherent walks"),
            (config.interrupt_remapping, "interrupt remapping"),
        ]),
        registers: offered.registers(),
    })
}

fn smmuv3(first: &DeviceFacts, facts: &[DeviceFacts]) -> Result<Offer, OfferError> {
    let mut hosts = Vec::new();
    for device in facts {
        let host = host_smmu(device.name.clone(), &device.info, device.extensions);
        let host = host.ok_or_else(|| mixed(first, device))?;
        if device.smmu != first.smmu {
            return Err(OfferError::TwoSmmus(first.name.clone(), device.name.clone()));
        }
        hosts.push(host);
    }
    // One for all devices.
    let idr0 = first.smmu_idr0().unwrap_or_default();
    let served = first.extensions.smmu_faults;
    let stalls = served && idr0.stall_model() == STALL_OR_TERMINATE;
    let no_page_requests = match idr0.pri() {
        _ if !served => {
            let why = "Linux gives those of an SMMUv3 to nobody, nor transactions that it stalls";
            Some(why.into())
        }
        false => Some(takes_none(&first.name, "IDR0.PRI")),
        true => no_page_requests(facts, ats(facts)),
    };
    let page_requests = no_page_requests.is_none();
    let wanted = SmmuConfig { ats: ats(facts), page_requests, stalls, ..SmmuConfig::default() };
    // Whatever the unit's OAS, which the kernel does not tell: it caps CD.IPS to that (§3.4).
    let wide = SmmuConfig { input_bits: 52, output_bits: 52, ..wanted.clone() };
    let config = match wide.intersect(&hosts) {
        Ok(config) => config,
        Err(_) => wanted.intersect(&hosts)?,
    };
    let offered =
        config.capabilities().map_err(|error| OfferError::Impossible(error.to_string()))?;
    let httu = config.httu.unwrap_or_default();
    let no_table_updates = match (httu, first.extensions.table_updates) {
        (Httu::None, true) => Some("the SMMU has none (IDR0.HTTU)".into()),
        (Httu::None, false) => Some("Linux's vIOMMU has none (HTTU)".into()),
        _ => None,
    };
    Ok(Offer {
        kind: OfferKind::Smmuv3,
        address_bits: config.input_bits,
        pasid_bits: config.substream_bits.unwrap_or(0).min(SubstreamId::BITS as u8),
        ats: config.ats,
        no_page_requests,
        dirty_tracking: facts.iter().all(|device| device.dirty_nesting),
        no_table_updates,
        features: Offer::features([
            (config.granule_4k, "4 KiB granule"),
            (config.granule_16k, "16 KiB granule"),
            (config.granule_64k, "64 KiB granule"),
            (config.asid16, "16-bit ASIDs"),
            (config.two_level_contexts, "2-level context descriptor tables"),
            (config.range_invalidation, "invalidation by range"),
            (httu >= Httu::Access, "updates of access flags"),
            (httu >= Httu::Dirty, "updates of the dirty state"),
            (stalls, "stalls of transactions that fault"),
        ]),
        registers: offered.registers(),
    })
}

impl fmt::Display for Offer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            OfferKind::Vtd => "VT-d",
            OfferKind::Smmuv3 => "SMMUv3",
        };
        writeln!(f, "a virtual {kind} over all of them can offer:")?;
        writeln!(f, "  {} bits of IOVA", self.address_bits)?;
        match self.pasid_bits {
            0 => writeln!(f, "  no PASIDs")?,
            bits => writeln!(f, "  {bits} bits of PASID")?,
        }
        for feature in &self.features {
            writeln!(f, "  {feature}")?;
        }
        if self.ats {
            writeln!(f, "  device-TLBs (ATS)")?;
        }
        match &self.no_page_requests {
            None => writeln!(f, "  page requests (PRI)")?,
            Some(why) => writeln!(f, "  no page requests: {why}")?,
        }
        if let Some(why) = &self.no_table_updates {
            writeln!(f, "  no updates of flags in the guest's tables: {why}")?;
        }
        if self.dirty_tracking {
            writeln!(f, "  dirty page tracking")?;
        }
        write!(f, "  registers:")?;
        for (name, value) in &self.registers {
            write!(f, " {name} {value:#x}")?;
        }
        writeln!(f)
    }
}
