// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Device TLBs (PCI ATS): what devices have cached of their own translations.
//!
//! A device whose ATS is enabled asks for translations, keeps them and uses them until it is told
//! to forget them, whatever happens to the tables and to the IOTLB. An entry is a copy of the
//! IOTLB's, with the same permissions.

use std::collections::{BTreeMap, BTreeSet};

use super::cache::Cache;
use super::key::{IovaRange, Key, Source};

/// The device TLBs of the devices behind a unit.
#[derive(Debug)]
pub(crate) struct DeviceTlbs {
    /// Capacity of each, in entries; 0 if the unit takes no translation requests.
    entries: usize,
    /// By Requester ID.
    tlbs: BTreeMap<u16, Cache>,
    /// Devices that answer no invalidation.
    silent: BTreeSet<u16>,
}

impl DeviceTlbs {
    /// No device TLBs, each of `entries` entries once it is enabled.
    pub fn new(entries: usize) -> Self {
        Self { entries, tlbs: BTreeMap::new(), silent: BTreeSet::new() }
    }

    /// From now on `rid` answers no invalidation, or each. (What it has cached goes all the same:
    /// memory that is no longer the guest's must not be reached.)
    pub fn set_silent(&mut self, rid: u16, silent: bool) {
        match silent {
            true => self.silent.insert(rid),
            false => self.silent.remove(&rid),
        };
    }

    /// Whether `rid` answers an invalidation.
    pub fn answers(&self, rid: u16) -> bool {
        !self.silent.contains(&rid)
    }

    /// Software has enabled ATS of `rid`, or disabled it: without it, nothing is left.
    pub fn set(&mut self, rid: u16, enabled: bool) {
        match enabled && self.entries != 0 {
            true => {
                self.tlbs.entry(rid).or_insert_with(|| Cache::new(self.entries));
            }
            false => {
                self.tlbs.remove(&rid);
            }
        }
    }

    /// Whether ATS of `rid` is enabled.
    #[inline]
    pub fn has(&self, rid: u16) -> bool {
        // Separate and first, as most units have none.
        !self.tlbs.is_empty() && self.tlbs.contains_key(&rid)
    }

    /// Whether ATS of no device is enabled.
    pub fn is_empty(&self) -> bool {
        self.tlbs.is_empty()
    }

    /// The device TLB of `rid`, if it is enabled.
    pub fn get(&self, rid: u16) -> Option<&Cache> {
        self.tlbs.get(&rid)
    }

    /// Drops what devices have of `tag` that has an address in one of `ranges`, as made by
    /// [`ascending`](super::ascending); returns the number of entries.
    pub fn drop_tag(&mut self, tag: u32, ranges: &[IovaRange]) -> u64 {
        self.drop_entries(|key, _| key.source().tag() == tag && key.overlaps_any(0, ranges))
    }

    /// Drops what `rid` has of the address space `space`, or of all if there is none, that has an
    /// address in `range`; returns the number of entries.
    pub fn drop_device(&mut self, rid: u16, space: Option<u32>, range: IovaRange) -> u64 {
        let condemned = |key: Key, _| {
            space.is_none_or(|space| key.source().space() == space) && key.overlaps_any(0, &[range])
        };
        self.tlbs.get_mut(&rid).map_or(0, |tlb| tlb.drop_entries(condemned))
    }

    /// Drops every entry for which `condemned` holds; returns their number.
    pub fn drop_entries(&mut self, mut condemned: impl FnMut(Key, u64) -> bool) -> u64 {
        self.tlbs.values_mut().map(|tlb| tlb.drop_entries(&mut condemned)).sum()
    }
}

/// The source of what a device has of `tag` for requests with `pasid`: requests without one are
/// separate from those with PASID 0.
pub(crate) fn device_source(tag: u32, pasid: Option<u32>) -> Source {
    Source::new(tag, device_space(pasid))
}

/// Its address space.
pub(crate) fn device_space(pasid: Option<u32>) -> u32 {
    pasid.map_or(0, |pasid| pasid + 1)
}
