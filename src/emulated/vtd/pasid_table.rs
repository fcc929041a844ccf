// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host-side PASID table, and the PASID cache of a requester in front of it.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use super::context::Context;

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
}

/// Lines of a PASID cache, each for the PASIDs of one remainder.
const LINES: usize = 8;

/// Where in the table the contexts of one requester id are. Belongs to one thread; what it holds is
/// invalid as soon as the table has changed.
#[derive(Debug, Default, Clone)]
pub(crate) struct PasidCache {
    generation: u64,
    /// The PASID and the index of its context.
    lines: [Option<(Option<u32>, usize)>; LINES],
}

impl PasidCache {
    /// The context for requests with `pasid`, when it is cached.
    #[inline]
    pub(super) fn get<'a>(&self, table: &'a PasidTable, pasid: Option<u32>) -> Option<&'a Context> {
        // In bounds: a remainder of the length.
        let (held, index) = self.lines[line(pasid)]?;
        if self.generation != table.generation || held != pasid {
            return None;
        }
        table.contexts.get(index)?.as_ref()
    }

    /// The context of `rid` (or its `pasid`), cached from now on, and whether another had to go for
    /// it. A requester without a context is not cached.
    pub(super) fn fill<'a>(
        &mut self,
        table: &'a PasidTable,
        rid: u16,
        pasid: Option<u32>,
    ) -> Option<(&'a Context, bool)> {
        if self.generation != table.generation {
            *self = Self { generation: table.generation, ..Self::default() };
        }
        let index = *table.indices.get(&(rid, pasid))?;
        let context = table.contexts.get(index)?.as_ref()?;
        // In bounds: a remainder of the length.
        let evicted = self.lines[line(pasid)].replace((pasid, index)).is_some();
        Some((context, evicted))
    }
}

/// The line that the context for requests with `pasid` can be in.
#[inline]
fn line(pasid: Option<u32>) -> usize {
    pasid.unwrap_or(0) as usize % LINES
}
