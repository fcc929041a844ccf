// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The services that a function offers to software, and their rules (PCIe 6.0 §7.8.9, §10.5):
//! PASIDs, a device TLB (ATS) and page requests (PRI).

use std::fmt;
use std::sync::Arc;

use super::{ServiceControl, Services};
use crate::pci::{
    AtsCapabilities, AtsCapability, ConfigSpace, PasidCapabilities, PasidCapability, PriCapability,
};

/// What a function offers; each is a capability that it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OfferedServices {
    /// PASIDs.
    pub pasid: Option<PasidCapabilities>,
    /// A device TLB.
    pub ats: Option<AtsCapabilities>,
    /// Page requests: how many may be without a response, and whether responses to those with a
    /// PASID have it, too.
    pub pri: Option<(u32, bool)>,
}

impl OfferedServices {
    /// The room that all capabilities together take, in bytes.
    pub const LENGTH: u16 = 8 + 8 + 16;
}

/// What an assigned device may offer, because its host and the virtual IOMMU that it is behind have
/// it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HostServices {
    /// PASIDs.
    pub pasid: Option<PasidCapabilities>,
    /// A device TLB.
    pub ats: bool,
    /// Page requests.
    pub pri: bool,
}

/// Is told what software has enabled of an assigned device.
pub type ServiceListener = Arc<dyn Fn(Services) + Send + Sync>;

/// The capabilities of the services that a function has.
pub struct ServiceCapabilities {
    pasid: Option<PasidCapability>,
    ats: Option<AtsCapability>,
    pri: Option<PriCapability>,
    control: Option<Arc<dyn ServiceControl>>,
}

impl ServiceCapabilities {
    /// Adds the capabilities of `offered` to `config`. `control` is of a function in this process.
    pub fn add(
        config: &mut ConfigSpace,
        offered: OfferedServices,
        control: Option<Arc<dyn ServiceControl>>,
    ) -> Self {
        let pasid = offered.pasid.map(|pasid| PasidCapability::add(config, pasid));
        let ats = offered.ats.map(|ats| AtsCapability::add(config, ats));
        let add = |(capacity, with_pasid)| PriCapability::add(config, capacity, with_pasid);
        let pri = offered.pri.map(add);
        Self { pasid, ats, pri, control }
    }

    /// What software has enabled.
    pub fn enabled(&self, config: &ConfigSpace) -> Services {
        let ats = self.ats.is_some_and(|ats| ats.enabled(config));
        let may_ask = |pri: PriCapability| pri.enabled(config) && pri.allocation(config) > 0;
        Services {
            pasid: self.pasid.is_some_and(|pasid| pasid.enabled(config)),
            ats,
            // A device that has no translations to ask for cannot know that one is missing.
            pri: ats && self.pri.is_some_and(may_ask),
        }
    }

    /// Software wrote to `config`: what must stay while a service is enabled is locked.
    pub fn written(&self, config: &mut ConfigSpace) {
        let ats = self.ats.is_some_and(|ats| ats.enabled(config));
        self.lock(config, ats, self.pri.is_some_and(|pri| pri.enabled(config)));
        let reset = self.pri.is_some_and(|pri| pri.take_reset(config));
        if let Some(control) = self.control.as_ref().filter(|_| reset) {
            control.reset();
        }
        self.update(config);
    }

    /// Whether there is a page request interface.
    pub fn has_page_requests(&self) -> bool {
        self.pri.is_some()
    }

    /// Shows in `config` whether the page request interface has stopped.
    pub fn update(&self, config: &mut ConfigSpace) {
        if let Some(pri) = self.pri {
            let outstanding =
                self.control.as_ref().is_some_and(|control| control.outstanding() > 0);
            pri.set_stopped(config, !pri.enabled(config) && !outstanding);
        }
    }

    /// Before a reset of the function's configuration space: no bit is locked.
    pub fn unlock(&self, config: &mut ConfigSpace) {
        self.lock(config, false, false);
    }

    /// After it, when no request is being made: none waits for a page, and nothing is cached.
    pub fn reset(&self) {
        if let Some(control) = &self.control {
            control.reset();
            control.enabled(Services::default());
        }
    }

    /// After what software has enabled has changed, and requests know it.
    pub fn changed(&self, services: Services) {
        if let Some(control) = &self.control {
            control.enabled(services);
        }
    }

    fn lock(&self, config: &mut ConfigSpace, ats: bool, pri: bool) {
        // (Option is an iterator of at most one.)
        self.pasid.iter().for_each(|capability| capability.lock(config, ats));
        self.ats.iter().for_each(|capability| capability.lock(config, ats));
        self.pri.iter().for_each(|capability| capability.lock(config, pri));
    }
}

impl fmt::Debug for ServiceCapabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pasid, ats, pri, .. } = self;
        f.debug_struct("ServiceCapabilities")
            .field("pasid", pasid)
            .field("ats", ats)
            .field("pri", pri)
            .finish_non_exhaustive()
    }
}
