// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host's stage 2, as one context goes through it.

use std::sync::Arc;

use super::key::Source;
use crate::units::dirty::DirtyLog;
use crate::units::stage2::Stage2;

/// See the [module's documentation](self).
#[derive(Debug, Clone)]
pub(crate) struct HostStage2 {
    /// What the IOAS maps.
    pub stage2: Arc<Stage2>,
    /// What its cached translations are found by.
    pub source: Source,
    /// Where pages are marked when they are written; none when they cannot be tracked.
    pub dirty: Option<Arc<DirtyLog>>,
}

impl HostStage2 {
    /// A stage 2 whose `tag` no other one has that is cached at the same time.
    pub fn new(stage2: Arc<Stage2>, tag: u32, dirty: Option<Arc<DirtyLog>>) -> Self {
        Self { stage2, source: Source::new(tag, 0), dirty }
    }

    /// Where writes are marked, if they are to be.
    pub fn tracking(&self) -> Option<&DirtyLog> {
        self.dirty.as_deref().filter(|log| log.is_enabled())
    }
}
