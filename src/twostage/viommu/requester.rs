// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The source of DMA requests, in PCI terms.

use std::fmt;

use crate::spec::pci::{Bdf, Pasid};

/// The source of a DMA request: a PCI function, and a PASID if the request carries one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Requester {
    /// Requester ID as the guest sees it.
    pub rid: Bdf,
    /// PASID of the request; `None` for a request without.
    pub pasid: Option<Pasid>,
}

impl Requester {
    /// Requests of `rid` without PASID.
    pub const fn rid(rid: Bdf) -> Self {
        Self { rid, pasid: None }
    }
}

impl fmt::Display for Requester {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pasid {
            Some(pasid) => write!(f, "{} PASID {pasid}", self.rid),
            None => write!(f, "{}", self.rid),
        }
    }
}
