// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether a host nests the guest's tables, or has mirrors of them.

use std::fmt;
use std::sync::Arc;

use crate::iommufd::{HostIommu, ObjectId};
use crate::nesting::host_vtd;
use crate::viommu::vtd::{HostVtd, VtdConfig};
use crate::viommu::TableMemory;

/// The way in which a host serves the guest's tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Nesting {
    /// It nests them. A device whose IOMMU cannot is refused.
    #[default]
    On,
    /// It nests them if the IOMMUs of all its first devices can; otherwise they are mirrored.
    Auto {
        /// As for [`Nesting::Off`].
        pieces: u64,
    },
    /// They are mirrored into IOASes, one for each, which any IOMMU can use. That takes a guest
    /// that invalidates what becomes present, too (caching mode), and one stage of tables.
    Off {
        /// The most mappings that all mirrors of one host may have together; twice as many while
        /// some are being replaced. Tables that take more are not served: their users are blocked,
        /// and the guest gets a fault.
        pieces: u64,
    },
}

impl Nesting {
    /// A usual limit: 4 GiB of single pages.
    pub const PIECES: u64 = 1 << 20;

    /// The most mappings of mirrors.
    pub fn pieces(self) -> u64 {
        match self {
            Self::On => 0,
            Self::Auto { pieces } | Self::Off { pieces } => pieces,
        }
    }
}

/// How hosts serve the tables of one virtual VT-d.
#[derive(Clone)]
pub struct Serving {
    pub(super) nesting: Nesting,
    pub(super) memory: Arc<dyn TableMemory>,
    pub(in crate::nesting::vtd) config: VtdConfig,
}

impl Serving {
    /// In the way of `nesting`, for a virtual VT-d of `config` with its tables in `memory`.
    pub fn new(nesting: Nesting, memory: Arc<dyn TableMemory>, config: VtdConfig) -> Self {
        Self { nesting, memory, config }
    }

    /// Whether `host` nests tables for `dev`, its first device.
    pub fn nests_for(&self, host: &dyn HostIommu, dev: ObjectId) -> bool {
        if !matches!(self.nesting, Nesting::Auto { .. }) {
            return self.nesting == Nesting::On;
        }
        // An error comes again when the device is added.
        let info = host.get_hw_info(dev).ok();
        let unit = info.and_then(|info| host_vtd(String::new(), &info, host.extensions()));
        self.why_mirrored("it", unit.as_ref()).is_none()
    }

    /// Why tables are mirrored for a host whose first device is `device`, behind `unit`; `None` if
    /// they are nested.
    pub(in crate::nesting::vtd) fn why_mirrored(
        &self,
        device: impl fmt::Display,
        unit: Option<&HostVtd>,
    ) -> Option<String> {
        match (self.nesting, unit) {
            (Nesting::On, _) => None,
            (Nesting::Off { .. }, _) => Some("nesting=off was requested".into()),
            (Nesting::Auto { .. }, None) => Some(format!("{device} is not behind a VT-d")),
            (Nesting::Auto { .. }, Some(unit)) => {
                let lacks = self.config.check_nesting(unit).err()?;
                Some(format!("the IOMMU of {} lacks {}", lacks.device, lacks.bit))
            }
        }
    }
}

impl fmt::Debug for Serving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { nesting, config, .. } = self;
        f.debug_struct("Serving")
            .field("nesting", nesting)
            .field("config", config)
            .finish_non_exhaustive()
    }
}
