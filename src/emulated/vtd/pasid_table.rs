// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host-side PASID table. A requester's PASID cache is in front of it.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use super::context::Context;
use crate::emulated::engine::ConfigCache;

/// Who a context serves: requester id, and PASID for requests that carry one.
type Requester = (u16, Option<u32>);

/// Where each requester's DMA goes. Who is not in it is blocked.
#[derive(Debug, Default)]
pub(super) struct PasidTable {
    /// Contexts by index.
    contexts: Vec<Option<Context>>,
    /// Indices that no requester has.
    free: Vec<usize>,
    indices: BTreeMap<Requester, usize>,
    /// Counts changes: what was looked up in an earlier generation is no longer true.
    generation: u64,
}

impl PasidTable {
    /// Gives `rid` (or its `pasid`), which must have none, a context.
    pub fn insert(&mut self, rid: u16, pasid: Option<u32>, context: Context) {
        self.generation += 1;
        let index = self.free.pop().unwrap_or(self.contexts.len());
        match self.contexts.get_mut(index) {
            Some(slot) => *slot = Some(context),
            None => self.contexts.push(Some(context)),
        }
        self.indices.insert((rid, pasid), index);
    }

    /// What `rid` (or its `pasid`) has.
    pub fn get(&self, rid: u16, pasid: Option<u32>) -> Option<&Context> {
        self.contexts.get(*self.indices.get(&(rid, pasid))?)?.as_ref()
    }

    /// Takes away what `rid` (or its `pasid`) has.
    pub fn remove(&mut self, rid: u16, pasid: Option<u32>) -> Option<Context> {
        self.generation += 1;
        let index = self.indices.remove(&(rid, pasid))?;
        self.free.push(index);
        self.contexts.get_mut(index)?.take()
    }

    /// The context of requests with `pasid`, when `cache` has it.
    #[inline]
    pub fn cached(&self, cache: &ConfigCache, pasid: Option<u32>) -> Option<&Context> {
        self.contexts.get(cache.get(self.generation, pasid)?)?.as_ref()
    }

    /// The context of `rid` (or its `pasid`), in `cache` from now on, and whether another had to go
    /// for it. A requester without a context is not cached.
    pub fn fill(
        &self,
        cache: &mut ConfigCache,
        rid: u16,
        pasid: Option<u32>,
    ) -> Option<(&Context, bool)> {
        let index = *self.indices.get(&(rid, pasid))?;
        let context = self.contexts.get(index)?.as_ref()?;
        Some((context, cache.fill(self.generation, pasid, index)))
    }
}
