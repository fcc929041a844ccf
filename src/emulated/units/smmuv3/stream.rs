// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The stream table as the host's driver fills it: what becomes of each stream's transactions.
//!
//! Who is not in it has an entry that aborts. Substreams that the host owns are in it, too: it
//! plays the host's own tables of context descriptors.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::config::SmmuV3UnitConfig;
use crate::units::dirty::DirtyLog;
use crate::units::engine::HostStage2;
use crate::units::hardware::CacheTag;
use crate::units::stage2::Stage2;
use twostage::spec::smmuv3::regs::Idr0;
use twostage::spec::smmuv3::stream_table::{S1Format, Ste};

/// What the driver writes into the stream table, or into its own context descriptors.
#[derive(Debug, Clone)]
pub(crate) struct StreamEntry {
    /// What the host's tables are tagged with: the VMID of a stage 2, for stage 1 on top of it too.
    pub tag: CacheTag,
    /// What the IOAS maps.
    pub stage2: Arc<Stage2>,
    /// Where written pages are marked; none when they cannot be tracked.
    pub dirty: Option<Arc<DirtyLog>>,
    /// The first two words of the user's stream table entry, when stage 1 is its own; without,
    /// transactions go through the host's tables alone.
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

/// Stage 1 as the user's stream table entry has it.
#[derive(Debug, Clone, Copy)]
pub(super) enum UserStage1 {
    /// Context descriptors.
    Contexts(Ste),
    /// The entry is ILLEGAL.
    Illegal,
}

impl UserStage1 {
    /// What the words of an entry say to an SMMU of `config` (§5.2).
    fn new([low, high]: [u64; 2], config: &SmmuV3UnitConfig) -> Self {
        let ste = Ste::from_words([low, high, 0, 0, 0, 0, 0, 0]);
        let contexts = ste.qw0.s1cdmax();
        let two_level = contexts != 0 && ste.s1_format() != S1Format::Linear;
        let idr0 = Idr0::from_bits(config.info().idr[0]);
        let illegal = (config.ssid_bits() != 0 && contexts > config.ssid_bits())
            || two_level && !idr0.cd2l()
            // No transaction stalls (IDR0.STALL_MODEL), so none can be kept from it.
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
    /// Sets what the stream `sid` (or the host's substream `pasid` of it) has; gives what it had.
    /// `stage2_tag` is unique to the stage 2 among the entries.
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

    /// Takes away what `sid` (or its `pasid`) has.
    pub fn remove(&mut self, sid: u16, pasid: Option<u32>) -> Option<Stream> {
        self.0.remove(&(sid, pasid))
    }

    /// What `sid` (or its `pasid`) has.
    pub fn get(&self, sid: u16, pasid: Option<u32>) -> Option<&Stream> {
        self.0.get(&(sid, pasid))
    }

    /// Whether the host owns substreams of `sid`.
    pub fn has_substreams(&self, sid: u16) -> bool {
        self.0.range((sid, Some(0))..=(sid, Some(u32::MAX))).next().is_some()
    }
}
