// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The nesting that a host's devices support, and what a virtual IOMMU in front of them could
//! offer.
//!
//! [`survey`] finds out with a host's verbs and leaves nothing behind. The answers are interpreted
//! by pure functions: [`DeviceReport::new`] for one device, [`Offer::new`] for all of them
//! together.

mod device;
mod offer;

use std::fmt;
use std::ops::RangeInclusive;

use crate::iommufd::{
    Errno, Extensions, HostError, HostIommu, HwInfo, HwInfoData, HwptAlloc, HwptData, HwptFlags,
    ObjectId, Result, ViommuKind,
};
use crate::spec::smmuv3::regs::Idr0;
pub use device::{DeviceReport, NestingFeatures, PasidReport, Region, RegionKind};
#[cfg(feature = "serde")]
pub use offer::hexadecimal;
pub use offer::{Offer, OfferError, OfferKind};

/// Devices, and the virtual IOMMU that could be in front of all of them.
///
/// ```no_run
/// # #[cfg(feature = "kernel")]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::path::Path;
/// use twostage::iommufd::KernelHost;
/// use twostage::nesting::survey::{survey, NestingReport};
///
/// let host = KernelHost::open(Path::new("/dev/iommu"))?;
/// let devices = ["/sys/bus/pci/devices/0000:01:00.0".to_owned()];
/// let report = NestingReport::new(&survey(&host, &devices)?);
/// println!("{report}");
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "kernel"))]
/// # fn main() {}
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct NestingReport {
    /// Each device by itself.
    pub devices: Vec<DeviceReport>,
    /// The most that one virtual IOMMU for all of them can offer.
    pub offer: Option<Offer>,
    /// Why there can be none.
    pub no_offer: Option<String>,
    /// What a virtual VT-d offers then, whose guest's tables are mirrored rather than nested.
    pub mirrored: Option<Offer>,
}

impl NestingReport {
    /// Interprets `facts`.
    pub fn new(facts: &[DeviceFacts]) -> Self {
        let (offer, no_offer) = match Offer::new(facts) {
            Ok(offer) => (Some(offer), None),
            Err(error) => (None, Some(error.to_string())),
        };
        let mirrored = if offer.is_none() { Offer::mirrored(facts) } else { None };
        let devices = facts.iter().map(DeviceReport::new).collect();
        Self { devices, offer, no_offer, mirrored }
    }
}

impl fmt::Display for NestingReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for device in &self.devices {
            writeln!(f, "{device}")?;
        }
        match (&self.offer, &self.no_offer) {
            (Some(offer), _) => write!(f, "{offer}"),
            (None, why) => {
                writeln!(f, "no virtual IOMMU over all of them: {}", why.as_deref().unwrap_or(""))?;
                let Some(mirrored) = &self.mirrored else { return Ok(()) };
                write!(
                    f,
                    "not nested, but with the guest's tables mirrored (nesting=auto), {mirrored}"
                )
            }
        }
    }
}

/// The host's description of a device, and what it allowed.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceFacts {
    /// The device's name as given.
    pub name: String,
    /// `GET_HW_INFO`.
    pub info: HwInfo,
    /// What its host does beyond the kernel's uAPI.
    pub extensions: Extensions,
    /// Nesting is impossible: the host's error for `HWPT_ALLOC` with `NEST_PARENT`, or for
    /// `VIOMMU_ALLOC` where nesting needs one.
    pub refusal: Option<HostError>,
    /// A nesting parent can track dirty pages.
    pub dirty_nesting: bool,
    /// The device, with its IOMMU, makes page requests that the host forwards.
    pub page_requests: bool,
    /// The IOVAs that stage 2 can map while the device is not attached: GPAs.
    pub iovas: Vec<RangeInclusive<u64>>,
    /// Those of them that cannot be mapped while it is attached.
    pub reserved: Vec<RangeInclusive<u64>>,
    /// The index of its SMMU among those of the devices: a vIOMMU belongs to one SMMU. `None` where
    /// nesting needs no vIOMMU.
    pub smmu: Option<usize>,
}

impl DeviceFacts {
    /// It has a device TLB, as far as the host knows, without which there are no page requests.
    fn ats(&self) -> bool {
        !self.info.capabilities.pci_ats_not_supported()
    }

    /// Its page requests reach the user. Behind an SMMUv3, a device that makes none can have a
    /// fault queue, too: what counts there is whether the host brings any.
    fn asks(&self) -> bool {
        let brought = match self.smmu_idr0() {
            Some(idr0) => self.extensions.smmu_faults && idr0.pri(),
            None => true,
        };
        self.page_requests && self.ats() && brought
    }

    /// IDR0 of its SMMUv3, if it is behind one.
    fn smmu_idr0(&self) -> Option<Idr0> {
        let HwInfoData::ArmSmmuV3(smmu) = self.info.data else { return None };
        let [idr0, ..] = smmu.idr;
        Some(Idr0::from_bits(idr0))
    }
}

/// Binds the devices of `host` given by `names`, finds out what each supports, and unbinds them
/// again. Their DMA is blocked meanwhile.
///
/// # Errors
/// A device cannot be bound, or a verb failed that every host has.
pub fn survey(host: &dyn HostIommu, names: &[String]) -> Result<Vec<DeviceFacts>> {
    let mut trial = Trial { host, devices: Vec::new(), objects: Vec::new(), viommus: Vec::new() };
    for name in names {
        trial.devices.push(host.device_bind(name)?);
    }
    let devices = trial.devices.clone();
    names.iter().zip(devices).map(|(name, dev)| trial.device(name, dev)).collect()
}

/// Whether `dev`, with its IOMMU, makes page requests that the host forwards. It must not be
/// attached to anything; it is attached to no memory meanwhile, and detached again.
///
/// # Errors
/// A verb failed that every host has.
pub fn makes_page_requests(host: &dyn HostIommu, dev: ObjectId) -> Result<bool> {
    let mut trial = Trial { host, devices: Vec::new(), objects: Vec::new(), viommus: Vec::new() };
    let ioas = host.ioas_alloc()?;
    trial.objects.push(ioas);
    trial.page_requests(dev, ioas)
}

/// Objects that exist only during the trial.
struct Trial<'a> {
    host: &'a dyn HostIommu,
    devices: Vec<ObjectId>,
    /// In the order of creation.
    objects: Vec<ObjectId>,
    /// One for each SMMU.
    viommus: Vec<ObjectId>,
}

impl Trial<'_> {
    fn device(&mut self, name: &str, dev: ObjectId) -> Result<DeviceFacts> {
        let info = self.host.get_hw_info(dev)?;
        let ioas = self.host.ioas_alloc()?;
        self.objects.push(ioas);
        let nest_parent = HwptFlags::new().with_nest_parent(true);
        let parent = self.hwpt(dev, ioas, nest_parent, None);
        let dirty_nesting = self.hwpt(dev, ioas, nest_parent.with_dirty_tracking(true), None);
        let stage2 = match parent {
            Ok(parent) => parent,
            Err(_) => self.hwpt(dev, ioas, HwptFlags::new(), None)?,
        };
        let iovas = self.host.ioas_iova_ranges(ioas)?.allowed;
        let reserved = self.reserved(dev, ioas, stage2, &iovas)?;
        let mut refusal = parent.clone().err();
        let mut smmu = None;
        if let (Ok(parent), HwInfoData::ArmSmmuV3(_)) = (parent, info.data) {
            match self.smmu(dev, parent) {
                Ok(number) => smmu = Some(number),
                Err(error) => refusal = Some(error),
            }
        }
        Ok(DeviceFacts {
            name: name.to_owned(),
            info,
            extensions: self.host.extensions(),
            refusal,
            dirty_nesting: dirty_nesting.is_ok(),
            page_requests: self.page_requests(dev, ioas)?,
            iovas,
            reserved,
            smmu,
        })
    }

    fn hwpt(
        &mut self,
        dev: ObjectId,
        ioas: ObjectId,
        flags: HwptFlags,
        fault: Option<ObjectId>,
    ) -> Result<ObjectId> {
        let data = HwptData::None;
        let hwpt = self.host.hwpt_alloc(&HwptAlloc { flags, dev, pt: ioas, data, fault })?;
        self.objects.push(hwpt);
        Ok(hwpt)
    }

    /// The part of `iovas`, which is all that `ioas` can map, that cannot be mapped while `dev` is
    /// attached to `hwpt`.
    fn reserved(
        &self,
        dev: ObjectId,
        ioas: ObjectId,
        hwpt: ObjectId,
        iovas: &[RangeInclusive<u64>],
    ) -> Result<Vec<RangeInclusive<u64>>> {
        self.host.device_attach(dev, None, hwpt)?;
        let attached = self.host.ioas_iova_ranges(ioas)?.allowed;
        self.host.device_detach(dev, None)?;
        Ok(difference(iovas, &attached))
    }

    /// Whether the device can be attached to a HWPT with page requests.
    fn page_requests(&mut self, dev: ObjectId, ioas: ObjectId) -> Result<bool> {
        let queue = self.host.fault_queue_alloc()?;
        // The file is closed when this returns; the object can be destroyed from then on.
        let fault = queue.object();
        self.objects.push(fault);
        let flags = HwptFlags::new().with_fault_id_valid(true);
        let Ok(hwpt) = self.hwpt(dev, ioas, flags, Some(fault)) else { return Ok(false) };
        let attached = self.host.device_attach(dev, None, hwpt).is_ok();
        self.host.device_detach(dev, None)?;
        Ok(attached)
    }

    /// The index of the SMMU of `dev`: that of the vIOMMU on which it can have a vDEVICE.
    fn smmu(&mut self, dev: ObjectId, parent: ObjectId) -> Result<usize> {
        // Unique among the devices, as required of a virtual id.
        let virt_id = u64::from(dev.0);
        for (number, viommu) in self.viommus.iter().enumerate() {
            match self.host.vdevice_alloc(*viommu, dev, virt_id) {
                // Destroyed when the device is unbound.
                Ok(_) => return Ok(number),
                Err(error) if error.errno == Errno::EINVAL => {}
                Err(error) => return Err(error),
            }
        }
        let viommu = self.host.viommu_alloc(ViommuKind::ArmSmmuV3, dev, parent)?;
        self.objects.push(viommu);
        self.viommus.push(viommu);
        self.host.vdevice_alloc(viommu, dev, virt_id)?;
        Ok(self.viommus.len() - 1)
    }
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        // Users of an object go before it; a failure is retried once.
        for dev in self.devices.drain(..) {
            let unbind = || self.host.device_unbind(dev);
            if let Err(error) = unbind().or_else(|_| unbind()) {
                log::error!("a device stays bound: {error}");
            }
        }
        for object in self.objects.drain(..).rev() {
            let destroy = || self.host.destroy(object);
            if let Err(error) = destroy().or_else(|_| destroy()) {
                log::error!("an object is left: {error}");
            }
        }
    }
}

/// The part of `all` that is not in `some`; both are ascending.
fn difference(
    all: &[RangeInclusive<u64>],
    some: &[RangeInclusive<u64>],
) -> Vec<RangeInclusive<u64>> {
    let mut missing = Vec::new();
    for range in all {
        // The first address of the range not covered so far; `None` past the last.
        let mut next = Some(*range.start());
        for part in some.iter().filter(|part| part.start() <= range.end()) {
            let Some(start) = next.filter(|start| part.end() >= start) else { continue };
            if *part.start() > start {
                missing.push(start..=part.start() - 1);
            }
            next = part.end().checked_add(1).filter(|next| next <= range.end());
        }
        if let Some(start) = next {
            missing.push(start..=*range.end());
        }
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing() {
        let whole = 0..=u64::MAX;
        assert_eq!(difference(std::slice::from_ref(&whole), &[]), [0..=u64::MAX]);
        assert_eq!(difference(std::slice::from_ref(&whole), &[5..=u64::MAX]), [0..=4]);
        assert_eq!(difference(std::slice::from_ref(&whole), std::slice::from_ref(&whole)), []);
        let parts = [0..=9, 20..=29];
        assert_eq!(difference(&parts, &[0..=4, 6..=9, 25..=29]), [5..=5, 20..=24]);
        assert_eq!(difference(&parts, &[20..=29]), [0..=9]);
    }
}
