// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requesters that are blocked because their table is not mirrored, and when they are tried again.
//!
//! A guest chooses how large its tables are and how often it invalidates. So a table is first read,
//! in slices, and its pieces are counted: the host is not called for what does not fit. One attempt
//! is made per table and batch; and a table that fits, but fails nevertheless, is left out of more
//! and more batches.

use super::calls::Part;
use super::follow::{refuse, Quota, AT_ONCE};
use super::mirror::Wanted;
use super::{too_many, Lost, Shadow, Starved, Trial, MAX_STARVED};
use crate::nesting::vtd::invalidate::{ByName, Refused};
use crate::nesting::vtd::state::State;
use crate::nesting::{NestingError, Result};
use crate::viommu::vtd::walk::{TooManyTables, Walk};
use crate::viommu::vtd::{DmaFault, DomainTag, Policy, RequesterConfig, Stage1};
use crate::viommu::Requester;
use crate::warn_limited;

/// A table that fails each time is tried once in so many batches that name it.
const MAX_PATIENCE: u32 = 64;

impl Starved {
    fn uses(&self, stage1: &Stage1) -> bool {
        self.config.policy == Policy::Stage1(*stage1)
    }
}

impl Shadow {
    /// A batch begins: those that it names are to be tried.
    fn call(&mut self, by_name: &ByName) {
        self.trial = None;
        for starved in self.starved.values_mut() {
            let DomainTag { domain, pasid } = starved.config.tag;
            let of = |domain| [(domain, Some(pasid)), (domain, None)];
            let names = [of(Some(domain)), of(None)];
            if names.as_flattened().iter().any(|name| by_name.contains_key(name)) {
                starved.due |= starved.skip == 0;
                starved.skip = starved.skip.saturating_sub(1);
            }
        }
    }

    /// Who is to be tried, with its table.
    fn due(&self) -> Option<(Requester, RequesterConfig, Stage1)> {
        let due = |of: Option<&Stage1>| {
            let mut due = self.starved.iter().filter(|(_, starved)| starved.due);
            due.find(|(_, starved)| of.is_none_or(|stage1| starved.uses(stage1)))
        };
        let begun = self.trial.as_ref().and_then(|trial| due(Some(&trial.stage1)));
        let (requester, Starved { config, .. }) = begun.or_else(|| due(None))?;
        match config.policy {
            Policy::Stage1(stage1) => Some((*requester, *config, stage1)),
            // Only tables are mirrored.
            _ => None,
        }
    }
}

impl State {
    /// Blocks `requester`, whose table is not mirrored because of `error`; the guest gets a fault.
    /// `config` is tried again when the guest invalidates.
    pub fn starve(&mut self, requester: Requester, config: &RequesterConfig, error: &NestingError) {
        self.block(requester);
        warn_limited!("{requester} is blocked: {error}");
        let address = match error {
            NestingError::NotMirrored { iova, .. } => *iova,
            _ => 0,
        };
        let reachable = self.is_reachable(requester);
        let Some(shadow) = self.shadow.as_mut() else { return };
        // One that could not be blocked must be, before an invalidation that names it completes.
        let is_full = shadow.starved.len() >= MAX_STARVED;
        if !is_full || reachable || shadow.starved.contains_key(&requester) {
            let patience = shadow.starved.get(&requester).map_or(0, |starved| starved.patience);
            let starved = Starved { config: *config, due: false, skip: 0, patience };
            shadow.starved.insert(requester, starved);
        }
        shadow.faults.push(DmaFault {
            requester,
            address,
            write: false,
            execute: false,
            privileged: false,
            reason: None,
            stage2: false,
        });
    }

    /// Tries those again that a batch names and whose table was not mirrored, as far as one slice
    /// goes; `begins`: it is the first one of the batch. Whether all are done.
    pub(super) fn feed_some(
        &mut self,
        by_name: &ByName,
        begins: bool,
        quota: &mut Quota,
        refused: &mut Option<Refused>,
    ) -> bool {
        if let Some(shadow) = self.shadow.as_mut().filter(|_| begins) {
            shadow.call(by_name);
        }
        while let Some((requester, config, stage1)) = self.shadow.as_ref().and_then(Shadow::due) {
            if quota.is_used() {
                return false;
            }
            match self.count_some(&stage1, quota) {
                Ok(false) => return false,
                Ok(true) if !self.prepare_within(requester, &config, quota) => return false,
                Ok(true) => {
                    quota.use_up();
                    self.feed_one(requester, &config, &stage1, refused);
                }
                Err(error) => {
                    for (requester, config) in self.due_users(&stage1) {
                        self.starve(requester, &config, &error);
                    }
                }
            }
        }
        true
    }

    /// Those that are due and use `stage1`, which are not from now on.
    fn due_users(&mut self, stage1: &Stage1) -> Vec<(Requester, RequesterConfig)> {
        let starved = self.shadow.iter_mut().flat_map(|shadow| &mut shadow.starved);
        let due = starved.filter(|(_, starved)| starved.due && starved.uses(stage1));
        due.map(|(requester, starved)| {
            starved.due = false;
            (*requester, starved.config)
        })
        .collect()
    }

    /// Serves `requester`, which uses `stage1`. If that fails, others who do are not tried.
    fn feed_one(
        &mut self,
        requester: Requester,
        config: &RequesterConfig,
        stage1: &Stage1,
        refused: &mut Option<Refused>,
    ) {
        let starved = self.shadow.as_mut().and_then(|it| it.starved.remove(&requester));
        let before = starved.map_or(0, |starved| starved.patience);
        if let Err(error) = self.configure_one(requester, config) {
            let reachable = self.is_reachable(requester);
            refuse(refused, &error).still_reachable |= reachable;
        }
        let starved = self.shadow.as_mut().and_then(|it| it.starved.get_mut(&requester));
        if let Some(starved) = starved {
            starved.patience = (2 * before).clamp(1, MAX_PATIENCE);
            starved.skip = starved.patience;
            self.due_users(stage1);
        }
    }

    /// Counts the pieces of `stage1`, or a part of them. Whether all are counted; an error if there
    /// is no room for them.
    fn count_some(&mut self, stage1: &Stage1, quota: &mut Quota) -> Result<bool> {
        let (budget, served) = (self.budget(), self.mirror_of(stage1).is_some());
        let shadow = self.shadow.as_mut().ok_or(NestingError::ShutDown)?;
        let tables = shadow.tables(stage1).ok_or(NestingError::ShutDown)?;
        if served || shadow.prepares(stage1) {
            // Somebody else is served; or it was counted before.
            return Ok(true);
        }
        let begun = shadow.trial.take().filter(|trial| trial.stage1 == *stage1);
        let mut trial = begun.unwrap_or_else(|| {
            let last = Wanted::default();
            Trial { stage1: *stage1, iova: 0, budget, pieces: 0, last }
        });
        let (limit, room) = (shadow.limit, shadow.pieces.room(Part::Serves, shadow.limit));
        let mut walk = Walk::new(&*shadow.memory, tables, trial.budget);
        let mut leaves = Vec::new();
        let next = walk.leaves(trial.iova..tables.end(), quota.tables.min(AT_ONCE), &mut |leaf| {
            leaves.push(leaf);
        });
        let next = next.map_err(|TooManyTables| too_many(trial.iova, limit))?;
        let read = trial.budget - walk.budget();
        quota.tables = quota.tables.saturating_sub(read);
        trial.budget = walk.budget();
        self.add_leaves(&leaves, &mut trial.last)?;
        let beyond = usize::try_from(room.saturating_sub(trial.pieces)).ok();
        if let Some(beyond) = beyond.and_then(|beyond| trial.last.pieces().get(beyond)) {
            return Err(too_many(beyond.iova, limit));
        }
        trial.pieces += trial.last.drop_all_but_the_last() as u64;
        if next >= tables.end() {
            return Ok(true);
        }
        trial.iova = next;
        if let Some(shadow) = self.shadow.as_mut() {
            shadow.trial = Some(trial);
        }
        Ok(false)
    }

    /// Blocks `requester`, which cannot use its mirror any more because of `error`.
    pub(super) fn lose(
        &mut self,
        requester: Requester,
        config: RequesterConfig,
        error: &NestingError,
    ) {
        self.block(requester);
        if let Some(shadow) = self.shadow.as_mut() {
            shadow.lost.push(Lost { requester, config, error: error.clone() });
        }
    }

    /// Serves those who lost their mirror again. Returns who is blocked still.
    pub(super) fn find_lost(&mut self) -> Vec<Lost> {
        let mut left = Vec::new();
        for lost in self.take_lost() {
            if let Err(error) = self.configure_one(lost.requester, &lost.config) {
                left.push(Lost { error, ..lost });
            }
        }
        // That is done once: a host that fails all the time does not hold anybody up.
        left.extend(self.take_lost());
        left
    }

    /// The same, where nobody but them is told: those who are blocked still get a fault. `but` has
    /// been told.
    ///
    /// # Errors
    /// Somebody could not be blocked.
    pub fn starve_lost(&mut self, but: Option<Requester>) -> Result<()> {
        if let Some(shadow) = self.shadow.as_mut() {
            shadow.lost.retain(|lost| Some(lost.requester) != but);
        }
        let mut result = Ok(());
        for Lost { requester, config, error } in self.find_lost() {
            self.starve(requester, &config, &error);
            if self.is_reachable(requester) {
                result = result.and(Err(error));
            }
        }
        result
    }

    pub(super) fn take_lost(&mut self) -> Vec<Lost> {
        self.shadow.as_mut().map(|shadow| std::mem::take(&mut shadow.lost)).unwrap_or_default()
    }
}
