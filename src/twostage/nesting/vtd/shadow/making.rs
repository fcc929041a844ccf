// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Mirrors in the making: the first one of a table, or one that takes the place of another. A table
//! may have very many pieces, so that is done in slices, between which the lock is given up.
//!
//! What takes the place of a mirror is made by the batches that need it: each goes on where another
//! one has stopped, and nothing else is done with the mirror before it is replaced. When it is
//! made, the users are attached to it, some in each slice; who comes meanwhile is attached to what
//! its neighbours are.
//!
//! The first mirror of a table is *prepared* before a requester is given the table. Nobody uses it
//! until then, so that what the guest invalidates in between does not reach it: it is begun again,
//! and after some times made in one piece; the same if another table is to be prepared. Who joins a
//! mirror under a name that nobody else has makes it be compared as a whole, which is prepared in
//! the same way.

use std::collections::VecDeque;

use super::calls::Part;
use super::follow::{Quota, AT_ONCE, EVERYTHING};
use super::mirror::{Mirror, Piece};
use super::{refused_attach, too_many, Mirrored, Shadow};
use crate::iommufd::ObjectId;
use crate::nesting::vtd::nested::Slot;
use crate::nesting::vtd::state::State;
use crate::nesting::{NestingError, Result};
use crate::spec::pci::Pasid;
use crate::viommu::vtd::walk::Tables;
use crate::viommu::vtd::{DomainTag, Policy, RequesterConfig, Stage1};
use crate::viommu::Requester;

/// So often the preparation of a mirror begins again.
const MAX_DISTURBED: u32 = 4;

/// A mirror in the making.
#[derive(Debug)]
pub(super) struct Making {
    /// What it is, up to the first piece of `rest`.
    pub new: Mirrored,
    /// What has been read, and is to be mapped: counted already, as it may be much.
    pub rest: VecDeque<Piece>,
    /// Where to read on, in bytes.
    next: u64,
    /// Tables that may still be read.
    budget: u64,
    /// The last piece, which may grow, and is not mapped.
    held: Option<Piece>,
    /// The users of the mirror whose place it takes are attached to it already, up to this one.
    pub moved: Option<Requester>,
}

/// A mirror that nobody uses yet.
#[derive(Debug)]
pub(super) struct Prepared {
    stage1: Stage1,
    making: Result<Making>,
}

/// A mirror that is compared for somebody who joins it.
#[derive(Debug)]
pub(super) struct Joining {
    id: ObjectId,
    /// Where to go on; `None`: all of it was compared.
    resume: Option<(u64, u64)>,
}

impl Making {
    /// Takes what there is in front of `map`, which goes to `end`, and leaves its last piece if
    /// that may grow.
    fn hold(&mut self, guide: &Mirror, map: &mut Vec<Piece>, end: u64) {
        let is_new = |piece: &Piece| guide.is_free(piece.iova..piece.end());
        if let Some(held) = self.held.take() {
            match map.first_mut().filter(|first| held.grows_by(first) && is_new(first)) {
                Some(first) => *first = held.with(first),
                None => map.insert(0, held),
            }
        }
        if end < self.new.tables.end() {
            self.held = map.pop_if(|last| last.end() == end && is_new(last));
        }
    }
}

impl State {
    fn begin_making(&mut self, tables: Tables, part: Part) -> Result<Making> {
        let (new, budget) = (self.new_mirror(tables, part)?, self.budget());
        Ok(Making { new, rest: VecDeque::new(), next: 0, budget, held: None, moved: None })
    }

    /// Makes a part of a mirror; of `guide`, whose place it takes, pieces stay where they can.
    /// Whether it is equal to its table, or was at each place when that was read.
    pub(super) fn make_some(
        &mut self,
        making: &mut Making,
        guide: &Mirror,
        quota: &mut Quota,
    ) -> Result<bool> {
        let (tables, part) = (making.new.tables, making.new.part);
        let end = tables.end();
        while making.next < end || making.held.is_some() || !making.rest.is_empty() {
            if quota.is_used() {
                return Ok(false);
            }
            if let Some(piece) = making.rest.pop_front() {
                quota.steps -= 1;
                self.copy(&mut making.new, &piece).inspect_err(|_| self.uncount(part, 1))?;
                continue;
            }
            let range = making.next..end;
            let (compared, mut map) = match range.is_empty() {
                true => (range, Vec::new()),
                false => {
                    let (before, pause) = (making.budget, quota.tables.min(AT_ONCE));
                    let (compared, wanted) =
                        self.look(tables, guide, range, &mut making.budget, pause)?;
                    quota.tables = quota.tables.saturating_sub(before - making.budget);
                    let map = guide.remade(&compared, wanted.pieces(), making.next);
                    (compared, map)
                }
            };
            making.hold(guide, &mut map, compared.end);
            making.next = compared.end;
            self.count(part, &map)?;
            making.rest = map.into();
        }
        Ok(true)
    }

    /// Destroys what was not finished.
    pub(super) fn destroy_making(&mut self, making: Making) {
        self.uncount(making.new.part, making.rest.len());
        self.destroy_mirror(making.new);
    }

    /// Begins to replace `mirrored`, or goes on with it. Whether it is another one now.
    pub(super) fn remake_some(
        &mut self,
        id: ObjectId,
        mirrored: &mut Mirrored,
        quota: &mut Quota,
    ) -> Result<bool> {
        mirrored.unsettled = true;
        let mut making = match mirrored.making.take() {
            Some(making) => making,
            None => Box::new(self.begin_making(mirrored.tables, Part::Comes)?),
        };
        self.count_as(mirrored, Part::Goes);
        match self.make_some(&mut making, &mirrored.mirror, quota) {
            Ok(made) if made && self.move_users(id, &mut making, quota) => {}
            Ok(_) => {
                mirrored.making = Some(making);
                return Ok(false);
            }
            Err(error) => {
                self.destroy_making(*making);
                self.count_as(mirrored, Part::Serves);
                return Err(error);
            }
        }
        self.count_as(&mut making.new, Part::Serves);
        let old = std::mem::replace(mirrored, making.new);
        self.destroy_mirror(old);
        quota.use_up();
        Ok(true)
    }

    /// Attaches users of the mirror `id` to what takes its place. Those that the host does not
    /// attach are blocked, and lost. Whether none are left.
    fn move_users(&mut self, id: ObjectId, making: &mut Making, quota: &mut Quota) -> bool {
        let Some(stage1) = self.nested.stage1(id) else { return true };
        while let Some(requester) = self.nested.next_user(id, making.moved) {
            if quota.is_used() {
                return false;
            }
            quota.steps -= 1;
            making.moved = Some(requester);
            let config = self.nested.config(requester, stage1);
            let Some(device) = self.devices.get(&requester.rid).copied() else { continue };
            let new = &mut making.new;
            let attached = Self::attachable_of(&mut self.objects, new, requester.rid, &device);
            let attached = attached.and_then(|pt| {
                let pasid = requester.pasid.map(Pasid::raw);
                let attached = self.objects.host().device_attach(device.dev, pasid, pt);
                self.counters.replaces += u64::from(attached.is_ok());
                self.counters.refused_attaches += u64::from(attached.is_err());
                attached.map(drop).map_err(|error| refused_attach(requester, error))
            });
            if let Err(error) = attached {
                let slot = self.nested.slots().get(requester);
                self.nested.set(requester, Slot { unsettled: true, ..slot });
                self.lose(requester, config, &error);
            }
        }
        true
    }

    /// See [`crate::viommu::vtd::VtdHostSide::prepare`].
    pub fn prepare(&mut self, requester: Requester, config: &RequesterConfig) -> bool {
        self.prepare_within(requester, config, &mut { Quota::SLICE })
    }

    /// The same, as far as `quota` goes.
    pub(super) fn prepare_within(
        &mut self,
        requester: Requester,
        config: &RequesterConfig,
        quota: &mut Quota,
    ) -> bool {
        let Policy::Stage1(stage1) = &config.policy else { return true };
        if self.shadow.is_none() || !self.devices.contains_key(&requester.rid) {
            return true;
        }
        match self.mirror_of(stage1) {
            Some(id) => self.compare_some(id, config.tag, quota),
            None => self.prepare_some(stage1, quota),
        }
    }

    /// The mirror of `stage1`, if there is one.
    pub(super) fn mirror_of(&self, stage1: &Stage1) -> Option<ObjectId> {
        let ioas = self.objects.ioas().ok()?.id();
        self.nested.hwpts.find(&(ioas, false, *stage1))
    }

    /// Compares a part of the mirror `id`, which somebody joins as `tag`. Whether nothing is left.
    fn compare_some(&mut self, id: ObjectId, tag: DomainTag, quota: &mut Quota) -> bool {
        let needless = self.nested.knows(id, tag) && !self.is_unsettled(id);
        let Some(shadow) = self.shadow.as_mut() else { return true };
        if needless || shadow.is_compared(id) || shadow.disturbed >= MAX_DISTURBED {
            return true;
        }
        if shadow.joining.as_ref().is_none_or(|joining| joining.id != id) {
            self.drop_prepared();
        }
        let begun = self.shadow.as_mut().and_then(|shadow| shadow.joining.take());
        let resume = begun.and_then(|joining| joining.resume);
        let compared = self.follow_ranges(id, &[EVERYTHING], resume, quota);
        // What fails is done once more when it is joined, which tells those who lose by it.
        let Ok(resume) = compared else { return true };
        let _ = self.starve_lost(None);
        if let Some(shadow) = self.shadow.as_mut() {
            shadow.joining = Some(Joining { id, resume });
        }
        resume.is_none()
    }

    /// Prepares a part of the mirror of `stage1`. Whether nothing is left, or may be.
    fn prepare_some(&mut self, stage1: &Stage1, quota: &mut Quota) -> bool {
        let Some(shadow) = self.shadow.as_ref() else { return true };
        if shadow.disturbed >= MAX_DISTURBED {
            return true;
        }
        if !shadow.prepares(stage1) {
            self.drop_prepared();
        }
        let begun = self.shadow.as_mut().and_then(|shadow| shadow.prepared.take());
        let making = match begun {
            Some(prepared) => prepared.making,
            None => self.begin_first(stage1),
        };
        let mut made = true;
        let making = making.and_then(|mut making| {
            match self.make_some(&mut making, &Mirror::default(), quota) {
                Ok(all) => {
                    made = all;
                    Ok(making)
                }
                Err(error) => {
                    self.destroy_making(making);
                    Err(error)
                }
            }
        });
        if let Some(shadow) = self.shadow.as_mut() {
            shadow.prepared = Some(Prepared { stage1: *stage1, making });
        }
        made
    }

    /// The mirror of `stage1` for `requester`, as far as it is prepared.
    pub(super) fn take_prepared(
        &mut self,
        requester: Requester,
        stage1: &Stage1,
    ) -> Result<Making> {
        let shadow = self.shadow.as_mut().ok_or(NestingError::GuestSecondStage(requester))?;
        shadow.disturbed = 0;
        match shadow.prepared.take_if(|prepared| prepared.stage1 == *stage1) {
            Some(prepared) => prepared.making,
            None => self.begin_first(stage1),
        }
    }

    fn begin_first(&mut self, stage1: &Stage1) -> Result<Making> {
        let shadow = self.shadow.as_ref().ok_or(NestingError::ShutDown)?;
        let tables = shadow.tables(stage1).ok_or(NestingError::ShutDown)?;
        // Tables that translate nothing cost objects of the host, too.
        if shadow.mirrors.len() as u64 >= shadow.limit {
            return Err(too_many(0, shadow.limit));
        }
        self.begin_making(tables, Part::Serves)
    }

    /// What was prepared is not what the table is any more, or not needed: it goes.
    pub fn drop_prepared(&mut self) {
        let prepared = self.shadow.as_mut().and_then(Shadow::disturb);
        if let Some(Prepared { making: Ok(making), .. }) = prepared {
            self.destroy_making(making);
        }
    }
}

impl Shadow {
    /// Takes what was prepared.
    fn disturb(&mut self) -> Option<Prepared> {
        let prepared = self.prepared.take();
        let joining = self.joining.take();
        self.disturbed += u32::from(prepared.is_some() || joining.is_some());
        prepared
    }

    /// Whether the mirror `id` was compared as a whole, and nothing has been said since.
    pub(super) fn is_compared(&self, id: ObjectId) -> bool {
        self.joining.as_ref().is_some_and(|it| it.id == id && it.resume.is_none())
    }

    /// The same, for who joins it now.
    pub fn take_compared(&mut self, id: ObjectId) -> bool {
        self.disturbed = 0;
        self.joining.take().is_some_and(|it| it.id == id && it.resume.is_none())
    }

    /// Whether the mirror of `stage1` is prepared, in part or not.
    pub(super) fn prepares(&self, stage1: &Stage1) -> bool {
        self.prepared.as_ref().is_some_and(|prepared| prepared.stage1 == *stage1)
    }
}
