// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host-side PASID table, behind each port's PASID cache, and its entries.

use std::collections::BTreeMap;

use super::config::VtdUnitConfig;
use super::tables::{Tables, PAGE_SHIFTS};
use crate::units::engine::{HostStage2, Lookup, Source};
use crate::units::hardware::{CacheTag, Translation};
use twostage::runs::Runs;

/// PASID that tags translations for requests without PASID (RID_PASID, as set by Linux).
const RID_PASID: u32 = 0;

/// The last PASID (PCIe §6.20): the address spaces of requests.
pub(super) const LAST_PASID: u32 = (1 << 20) - 1;
/// The address space of what is cached of a second stage below a first one: of no PASID.
pub(super) const SECOND_STAGE: u32 = LAST_PASID + 1;

/// An entry of the PASID table, the same for all requesters that are attached to a HWPT.
#[derive(Debug)]
pub(super) struct Context {
    /// The HWPT.
    pub tag: CacheTag,
    /// The user's tables.
    pub tables: Tables,
    /// Stage 2.
    pub host: HostStage2,
}

impl Context {
    /// The context for `translation`; `stage2_tag` is unique to its stage 2 among the contexts of
    /// the unit.
    pub fn new(translation: Translation, stage2_tag: u32, config: &VtdUnitConfig) -> Self {
        Self {
            tag: translation.tag,
            tables: Tables::new(translation.tables.as_ref(), config),
            host: HostStage2::new(translation.stage2, stage2_tag, translation.dirty),
        }
    }

    /// Where the IOTLB has the translations for requests with `pasid`.
    pub fn lookup(&self, pasid: Option<u32>) -> Lookup {
        Lookup::plain(self.source(pasid), &PAGE_SHIFTS)
    }

    /// The source of cached translations for requests with `pasid`.
    pub fn source(&self, pasid: Option<u32>) -> Source {
        Source::new(self.tag.0, pasid.unwrap_or(RID_PASID))
    }

    /// The source of cached translations of a second stage below a first one.
    pub fn second_stage_source(&self) -> Source {
        Source::new(self.tag.0, SECOND_STAGE)
    }
}

/// Where each requester's DMA goes. Requesters without an entry are blocked.
#[derive(Debug, Default)]
pub(super) struct PasidTable {
    /// Contexts by index. Requesters that are attached to the same HWPT share one.
    contexts: Vec<Option<Shared>>,
    /// Unused indices.
    free: Vec<u32>,
    /// The index of the context of each HWPT.
    by_tag: BTreeMap<u32, u32>,
    functions: BTreeMap<u16, Function>,
}

/// A context, and its number of requesters: at least one.
#[derive(Debug)]
struct Shared {
    context: Context,
    users: usize,
}

/// The indices of the contexts of one requester id.
#[derive(Debug, Default)]
struct Function {
    own: Option<u32>,
    pasids: Runs<u32>,
}

impl PasidTable {
    /// Gives `rid` (or its `pasid`), which must have none, the context that `new` makes, or the
    /// existing one of the same `tag`.
    pub fn insert(
        &mut self,
        rid: u16,
        pasid: Option<u32>,
        tag: CacheTag,
        new: impl FnOnce() -> Context,
    ) {
        let index = match self.by_tag.get(&tag.0) {
            Some(index) => *index,
            None => self.add(tag, new()),
        };
        if let Some(Some(shared)) = self.contexts.get_mut(index as usize) {
            shared.users += 1;
        }
        self.functions.entry(rid).or_default().set(pasid, Some(index));
    }

    /// Adds an unused context.
    fn add(&mut self, tag: CacheTag, context: Context) -> u32 {
        let shared = Some(Shared { context, users: 0 });
        // There are fewer contexts than tags, which have 32 bits.
        let index = self.free.pop().unwrap_or(self.contexts.len() as u32);
        match self.contexts.get_mut(index as usize) {
            Some(slot) => *slot = shared,
            None => self.contexts.push(shared),
        }
        self.by_tag.insert(tag.0, index);
        index
    }

    /// The context of `rid` (or its `pasid`), and its index.
    pub fn find(&self, rid: u16, pasid: Option<u32>) -> Option<(usize, &Context)> {
        let index = self.index(rid, pasid)? as usize;
        Some((index, self.get(index)?))
    }

    /// The context at `index`.
    pub fn get(&self, index: usize) -> Option<&Context> {
        Some(&self.contexts.get(index)?.as_ref()?.context)
    }

    /// Removes the context of `rid` (or its `pasid`); `gone` is called for it.
    pub fn remove(&mut self, rid: u16, pasid: Option<u32>, gone: impl FnOnce(&Context)) {
        let Some(index) = self.index(rid, pasid) else { return };
        if let Some(function) = self.functions.get_mut(&rid) {
            function.set(pasid, None);
            if function.own.is_none() && function.pasids.is_empty() {
                self.functions.remove(&rid);
            }
        }
        let Some(place) = self.contexts.get_mut(index as usize) else { return };
        let Some(shared) = place else { return };
        gone(&shared.context);
        shared.users -= 1;
        if shared.users == 0 {
            self.by_tag.remove(&shared.context.tag.0);
            self.free.push(index);
            *place = None;
        }
    }

    fn index(&self, rid: u16, pasid: Option<u32>) -> Option<u32> {
        let function = self.functions.get(&rid)?;
        pasid.map_or(function.own, |pasid| function.pasids.get(pasid))
    }
}

impl Function {
    fn set(&mut self, pasid: Option<u32>, index: Option<u32>) {
        match pasid {
            None => self.own = index,
            Some(pasid) => self.pasids.set(pasid, index),
        }
    }
}
