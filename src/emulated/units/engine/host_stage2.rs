// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host's stage 2 as one context uses it.

use std::sync::Arc;

use super::key::Source;
use crate::units::dirty::DirtyLog;
use crate::units::stage2::Stage2;

/// See the [module's documentation](self).
#[derive(Debug, Clone)]
pub(crate) struct HostStage2 {
    /// The mappings of the IOAS.
    pub stage2: Arc<Stage2>,
    /// The source of its cached translations.
    pub source: Source,
    /// The log of written pages; none if they are not tracked.
    pub dirty: Option<Arc<DirtyLog>>,
}

impl HostStage2 {
    /// A stage 2 with a `tag` that is unique among those cached at the same time.
    pub fn new(stage2: Arc<Stage2>, tag: u32, dirty: Option<Arc<DirtyLog>>) -> Self {
        Self { stage2, source: Source::new(tag, 0), dirty }
    }

    /// The log for writes, if tracking is on.
    pub fn tracking(&self) -> Option<&DirtyLog> {
        self.dirty.as_deref().filter(|log| log.is_enabled())
    }
}
