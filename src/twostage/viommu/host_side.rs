// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the host sides of all virtual IOMMUs have in common.

/// The host refused.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{what}: {source}")]
pub struct HostSideError {
    /// What was being done, and for which requester.
    pub what: String,
    /// Not even blocking succeeded: DMA may still take a way that the guest has taken back, so that
    /// nobody may tell the guest that it is gone.
    pub still_reachable: bool,
    /// The verb that failed.
    #[source]
    pub source: std::sync::Arc<dyn std::error::Error + Send + Sync>,
}
