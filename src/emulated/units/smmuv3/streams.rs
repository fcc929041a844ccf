// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The stream table, and the cache of the configurations of streams.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use twostage::sync::Mutex;

use super::config::SmmuV3UnitConfig;
use super::context::AddressSpace;
use super::invalidation::{GLOBAL, STAGE2_ONLY};
use crate::units::engine::{HostStage2, Lookup, Source};
use crate::units::hardware::CacheTag;
use crate::units::stage2::{DirtyLog, Stage2};
use twostage::spec::smmuv3::regs::{Idr0, STALL_OR_TERMINATE};
use twostage::spec::smmuv3::stream_table::{S1Format, Ste};

/// Maximum number of configurations. If a guest uses more, descriptors are read for every request
/// that misses in its port, until something is invalidated.
const CAPACITY: usize = 1024;

/// Page sizes in the IOTLB without stage 1, as powers of two.
const STAGE2_SHIFTS: &[u8] = &[30, 21, 12];

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
    /// The stream's translation requests are answered (EATS).
    pub ats: bool,
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
    /// Its translation requests are answered.
    pub ats: bool,
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
            // Where no transaction stalls (IDR0.STALL_MODEL), that cannot be disabled.
            || ste.qw1.s1stalld() && idr0.stall_model() != STALL_OR_TERMINATE
            || ste.context_table() >> config.output_bits() != 0;
        if illegal {
            Self::Illegal
        } else {
            Self::Contexts(ste)
        }
    }
}

/// The stream table as filled by the host's driver. Streams without an entry abort. Substreams that
/// the host owns are in it, too: they stand for the host's context descriptor tables.
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
        let StreamEntry { tag, stage2, dirty, stage1, ats } = entry;
        let stage1 = stage1.map(|words| UserStage1::new(words, config));
        let host = HostStage2::new(stage2, stage2_tag, dirty);
        self.0.insert((sid, pasid), Stream { tag: tag.0, host, stage1, ats })
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

/// How transactions of one stream and substream are translated.
#[derive(Debug, Clone)]
pub(super) struct Configuration {
    /// Tag of what is cached of them: the VMID.
    pub tag: u32,
    /// Stage 1; none if it is bypassed.
    pub space: Option<AddressSpace>,
    /// Stage 2.
    pub host: HostStage2,
}

impl Configuration {
    /// Where the IOTLB has its translations.
    pub fn lookup(&self) -> Lookup {
        match &self.space {
            None => Lookup::plain(Source::new(self.tag, STAGE2_ONLY), STAGE2_SHIFTS),
            Some(space) => Lookup {
                source: Source::new(self.tag, space.asid.into()),
                global: Source::new(self.tag, GLOBAL),
                halves: space.lookup(),
            },
        }
    }
}

/// Stream, and SubstreamID of requests that carry one.
pub(super) type Requester = (u16, Option<u32>);

/// The configuration cache: decoded stream table entries and context descriptors, per stream and
/// substream. Entries stay until they are invalidated, whatever happens to the descriptors in
/// memory.
///
/// Any thread may add to it while others look up; dropping needs exclusive access.
#[derive(Debug)]
pub(super) struct Configurations {
    slots: Box<[OnceLock<Configuration>]>,
    indices: Mutex<BTreeMap<Requester, usize>>,
}

impl Default for Configurations {
    fn default() -> Self {
        let slots = (0..CAPACITY).map(|_| OnceLock::new()).collect();
        Self { slots, indices: Mutex::default() }
    }
}

impl Configurations {
    /// The configuration at `index`.
    pub fn get(&self, index: usize) -> Option<&Configuration> {
        self.slots.get(index)?.get()
    }

    /// The index of the configuration of `requester`.
    pub fn find(&self, requester: Requester) -> Option<usize> {
        let indices = self.indices.lock();
        indices.get(&requester).copied()
    }

    /// Caches `configuration` for `requester`; returns its index, or `configuration` if the cache
    /// is full.
    pub fn add(
        &self,
        requester: Requester,
        configuration: Configuration,
    ) -> Result<usize, Box<Configuration>> {
        let mut indices = self.indices.lock();
        if let Some(index) = indices.get(&requester) {
            // Another thread was faster.
            return Ok(*index);
        }
        let mut configuration = configuration;
        for (index, slot) in self.slots.iter().enumerate() {
            match slot.set(configuration) {
                Ok(()) => {
                    indices.insert(requester, index);
                    return Ok(index);
                }
                Err(back) => configuration = back,
            }
        }
        Err(Box::new(configuration))
    }

    /// Drops the configurations of the requesters for which `condemned` holds; all if the cache is
    /// full. Returns their number.
    pub fn drop_where(&mut self, condemned: impl Fn(Requester) -> bool) -> u64 {
        let Self { slots, indices } = self;
        let indices = indices.get_mut();
        let full = indices.len() >= slots.len();
        let before = indices.len();
        indices.retain(|requester, index| {
            let dropped = full || condemned(*requester);
            if let (true, Some(slot)) = (dropped, slots.get_mut(*index)) {
                slot.take();
            }
            !dropped
        });
        (before - indices.len()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configuration(tag: u32) -> Configuration {
        let host = HostStage2::new(Arc::<Stage2>::default(), 0, None);
        Configuration { tag, space: None, host }
    }

    #[test]
    fn a_configuration_stays_until_it_is_dropped() {
        let mut cache = Configurations::default();
        for pasid in 0..3 {
            cache.add((8, Some(pasid)), configuration(pasid)).unwrap();
        }
        let index = cache.find((8, Some(1))).unwrap();
        assert_eq!(cache.add((8, Some(1)), configuration(9)).unwrap(), index);
        assert_eq!(cache.get(index).unwrap().tag, 1);
        assert_eq!(cache.drop_where(|requester| requester == (8, Some(5))), 0);
        assert_eq!(cache.drop_where(|requester| requester == (8, Some(1))), 1);
        assert!(cache.get(index).is_none() && cache.find((8, Some(1))).is_none());
        assert!(cache.find((8, Some(2))).is_some());
    }

    #[test]
    fn a_full_cache_takes_no_more_until_something_goes() {
        let mut cache = Configurations::default();
        for pasid in 0..CAPACITY as u32 {
            cache.add((8, Some(pasid)), configuration(0)).unwrap();
        }
        assert!(cache.add((9, None), configuration(0)).is_err());
        assert_eq!(cache.drop_where(|requester| requester == (8, Some(0))), CAPACITY as u64);
        assert!(cache.add((9, None), configuration(0)).is_ok());
    }
}
