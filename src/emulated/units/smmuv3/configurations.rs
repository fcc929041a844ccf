// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configuration cache: decoded stream table entries and context descriptors, per stream and
//! substream. Entries stay until they are invalidated, whatever happens to the descriptors in
//! memory.
//!
//! Any thread may add to it while others look up; dropping needs exclusive access.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use twostage::sync::Mutex;

use super::context::AddressSpace;
use crate::units::engine::HostStage2;

/// Maximum number of configurations. If a guest uses more, descriptors are read for every request
/// that misses in its port, until something is invalidated.
const CAPACITY: usize = 1024;

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

/// Stream, and SubstreamID of requests that carry one.
type Requester = (u16, Option<u32>);

/// See the [module's documentation](self).
#[derive(Debug)]
pub(super) struct Configurations {
    slots: Box<[OnceLock<Configuration>]>,
    indices: Mutex<BTreeMap<Requester, usize>>,
    /// Counts drops: indices of earlier generations are invalid.
    generation: u64,
}

impl Default for Configurations {
    fn default() -> Self {
        let slots = (0..CAPACITY).map(|_| OnceLock::new()).collect();
        Self { slots, indices: Mutex::default(), generation: 0 }
    }
}

impl Configurations {
    /// The current generation of indices.
    #[inline]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The configuration at `index`.
    #[inline]
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
    ) -> Result<usize, Configuration> {
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
        Err(configuration)
    }

    /// Drops the configurations of the requesters for which `condemned` holds; all if the cache is
    /// full. Returns their number.
    pub fn drop_where(&mut self, condemned: impl Fn(Requester) -> bool) -> u64 {
        let Self { slots, indices, generation } = self;
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
        let dropped = before - indices.len();
        if dropped != 0 {
            *generation += 1;
        }
        dropped as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::stage2::Stage2;
    use std::sync::Arc;

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
        let generation = cache.generation();
        assert_eq!(cache.drop_where(|requester| requester == (8, Some(5))), 0);
        assert_eq!(cache.generation(), generation);
        assert_eq!(cache.drop_where(|requester| requester == (8, Some(1))), 1);
        assert_ne!(cache.generation(), generation);
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
