// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The nesting that a host's devices support, and what a virtual IOMMU in front of them could
//! offer.
//!
//! [`survey`] finds out with a host's verbs and leaves nothing behind. The answers are interpreted
//! by pure functions: [`DeviceReport::new`] for one device, [`Offer::new`] for all of them
//! together.

mod device;
mod offer;
mod trial;

use std::fmt;

pub use device::{DeviceReport, PasidReport, Region, RegionKind};
#[cfg(feature = "serde")]
pub use offer::hexadecimal;
pub use offer::{Offer, OfferError, OfferKind};
pub use trial::{survey, DeviceFacts};

/// Devices, and the virtual IOMMU that could be in front of all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct NestingReport {
    /// Each device by itself.
    pub devices: Vec<DeviceReport>,
    /// The most that one virtual IOMMU for all of them can offer.
    pub offer: Option<Offer>,
    /// Why there can be none.
    pub no_offer: Option<String>,
}

impl NestingReport {
    /// Interprets `facts`.
    pub fn new(facts: &[DeviceFacts]) -> Self {
        let (offer, no_offer) = match Offer::new(facts) {
            Ok(offer) => (Some(offer), None),
            Err(error) => (None, Some(error.to_string())),
        };
        Self { devices: facts.iter().map(DeviceReport::new).collect(), offer, no_offer }
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
                writeln!(f, "no virtual IOMMU over all of them: {}", why.as_deref().unwrap_or(""))
            }
        }
    }
}
