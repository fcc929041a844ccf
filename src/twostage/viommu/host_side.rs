// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Common to the host sides of all virtual IOMMUs.

/// The host refused.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{what}: {source}")]
pub struct HostSideError {
    /// The attempted operation, and the requester.
    pub what: String,
    /// Blocking failed, too: DMA may still use a mapping that the guest has revoked, so the guest
    /// must not be told that it is gone.
    pub still_reachable: bool,
    /// The verb that failed.
    #[source]
    pub source: std::sync::Arc<dyn std::error::Error + Send + Sync>,
}
