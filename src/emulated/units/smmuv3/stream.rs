// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The stream table as filled by the host's driver.
//!
//! Streams without an entry abort. Substreams that the host owns are in it, too: they stand for the
//! host's context descriptor tables.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::config::SmmuV3UnitConfig;
use crate::units::engine::HostStage2;
use crate::units::hardware::CacheTag;
use crate::units::stage2::{DirtyLog, Stage2};
use twostage::spec::smmuv3::regs::Idr0;
use twostage::spec::smmuv3::stream_table::{S1Format, Ste};

/// What the driver writes into the stream table, or into its context descriptors.
#[derive(Debug, Clone)]
pub(crate) struct StreamEntry {
    /// Tag of the host's tables: the VMID of a stage 2, also for stage 1 on top of it.
    pub tag: CacheTag,
    /// The mappings of the IOAS.
    pub stage2: Arc<Stage2>,
    /// The log of written pages; none if they cannot be tracked.
    pub dirty: Option<Arc<DirtyLog>>,
    /// The first two words of the user's stream table entry, if stage 1 is the user's; otherwise
    /// only the host's tables translate.
    pub stage1: Option<[u64; 2]>,
}

/// An entry of the stream table.
#[derive(Debug)]
pub(super) struct Stream {
    /// Tag of what is cached of it.
    pub tag: u32,
    /// The host's stage 2.
    pub host: HostStage2,
    /// The user's stage 1, if there is one.
    pub stage1: Option<UserStage1>,
}

/// Stage 1 according to the user's stream table entry.
#[derive(Debug, Clone, Copy)]
pub(super) enum UserStage1 {
    /// Context descriptors.
    Contexts(Ste),
    /// The entry is ILLEGAL.
    Illegal,
}

impl UserStage1 {
    /// Decodes the words of an entry for an SMMU of `config` (§5.2).
    fn new([low, high]: [u64; 2], config: &SmmuV3UnitConfig) -> Self {
        let ste = Ste::from_words([low, high, 0, 0, 0, 0, 0, 0]);
        let contexts = ste.qw0.s1cdmax();
        let two_level = contexts != 0 && ste.s1_format() != S1Format::Linear;
        let idr0 = Idr0::from_bits(config.info().idr[0]);
        let illegal = (config.ssid_bits() != 0 && contexts > config.ssid_bits())
            || two_level && !idr0.cd2l()
            // No transaction stalls (IDR0.STALL_MODEL), so stalls cannot be disabled.
            || ste.qw1.s1stalld()
            || ste.context_table() >> config.output_bits() != 0;
        if illegal {
            Self::Illegal
        } else {
            Self::Contexts(ste)
        }
    }
}

/// The streams and the host's substreams of them.
#[derive(Debug, Default)]
pub(super) struct StreamTable(BTreeMap<(u16, Option<u32>), Stream>);

impl StreamTable {
    /// Sets the entry of the stream `sid` (or the host's substream `pasid` of it); returns the old
    /// one. `stage2_tag` is unique to the stage 2 among the entries.
    pub fn insert(
        &mut self,
        sid: u16,
        pasid: Option<u32>,
        entry: StreamEntry,
        stage2_tag: u32,
        config: &SmmuV3UnitConfig,
    ) -> Option<Stream> {
        let StreamEntry { tag, stage2, dirty, stage1 } = entry;
        let stage1 = stage1.map(|words| UserStage1::new(words, config));
        let host = HostStage2::new(stage2, stage2_tag, dirty);
        self.0.insert((sid, pasid), Stream { tag: tag.0, host, stage1 })
    }

    /// Removes the entry of `sid` (or its `pasid`).
    pub fn remove(&mut self, sid: u16, pasid: Option<u32>) -> Option<Stream> {
        self.0.remove(&(sid, pasid))
    }

    /// The entry of `sid` (or its `pasid`).
    pub fn get(&self, sid: u16, pasid: Option<u32>) -> Option<&Stream> {
        self.0.get(&(sid, pasid))
    }

    /// Whether the host owns substreams of `sid`.
    pub fn has_substreams(&self, sid: u16) -> bool {
        self.0.range((sid, Some(0))..=(sid, Some(u32::MAX))).next().is_some()
    }
}
