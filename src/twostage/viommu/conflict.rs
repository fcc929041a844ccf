// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A configuration of a virtual IOMMU that a host unit cannot support.

/// A host unit does not support what the configuration asks for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the IOMMU of {device} lacks {bit}: {needed_for}")]
pub struct CapabilityConflict {
    /// A device behind the unit.
    pub device: String,
    /// The register and field, such as `ECAP.NEST`, or the host's capability.
    pub bit: &'static str,
    /// What the field is needed for, and what to change.
    pub needed_for: String,
}
