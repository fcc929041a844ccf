// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host objects of mirrors, and the calls that change them.

use std::collections::BTreeMap;

use super::follow::Quota;
use super::mirror::{Mirror, Piece, Steps};
use super::{is_reserved, reserved, too_many, Mirrored};
use crate::iommufd::{Errno, HwInfo, HwptFlags, MapTarget, ObjectId};
use crate::nesting::objects::Objects;
use crate::nesting::vtd::state::{Device, Parent, State};
use crate::nesting::{Context, NestingError, Result};
use crate::spec::pci::Bdf;
use crate::viommu::vtd::walk::Tables;
use crate::viommu::vtd::{RequesterConfig, Stage1};
use crate::viommu::Requester;

/// What a mirror is for those who use its table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// It serves them, or will as the first one.
    Serves,
    /// It serves them until another one takes its place.
    Goes,
    /// It takes the place of another one.
    Comes,
}

/// The pieces of all mirrors, by their parts: those that are mapped, and those that have been read
/// and are to be mapped.
#[derive(Debug, Default)]
pub(super) struct Account {
    serve: u64,
    go: u64,
    come: u64,
}

impl Account {
    fn of(&mut self, part: Part) -> &mut u64 {
        match part {
            Part::Serves => &mut self.serve,
            Part::Goes => &mut self.go,
            Part::Comes => &mut self.come,
        }
    }

    /// All of them.
    pub fn all(&self) -> u64 {
        self.serve + self.go + self.come
    }

    /// How many more there may be of `part`. What goes does not count against what comes, so that
    /// any mirror can be replaced, but it is in use, perhaps for long: so there are never more than
    /// twice the `limit`.
    pub fn room(&self, part: Part, limit: u64) -> u64 {
        let room = |taken| limit.saturating_sub(taken);
        match part {
            Part::Comes => {
                let all = limit.saturating_mul(2).saturating_sub(self.all());
                room(self.serve + self.come).min(all)
            }
            Part::Serves | Part::Goes => room(self.serve + self.go.max(self.come)),
        }
    }
}

impl State {
    /// What `dev`, the guest's `rid`, is attached to when it bypasses tables. Where the host has no
    /// PASIDs for it after all, `info` says so from then on.
    pub fn bypass(&mut self, rid: Bdf, dev: ObjectId, info: &mut HwInfo) -> Result<Parent> {
        let ioas = self.objects.ioas()?.id();
        if info.max_pasid_log2 > 0 {
            let flags = HwptFlags::new().with_pasid(true);
            let what = || format!("allocating the untranslated page table of {rid}");
            match self.objects.alloc_paging(flags, dev, ioas, what) {
                Ok(hwpt) => return Ok(Parent { hwpt, pasid: true }),
                Err(NestingError::Host { source, .. })
                    if matches!(source.errno, Errno::EOPNOTSUPP | Errno::EINVAL) =>
                {
                    log::info!("{rid} is used without PASIDs: {source}");
                    info.max_pasid_log2 = 0;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Parent { hwpt: ioas, pasid: false })
    }

    /// Width of the IOVAs that the host maps for `dev`, the guest's `rid`, from 0 on, reserved ones
    /// in between included: known once it is attached.
    pub fn iova_bits(&mut self, rid: Bdf, dev: ObjectId) -> Result<u8> {
        let what = || format!("asking for the IOVAs of {rid}");
        let ioas = self.objects.alloc_ioas(what)?;
        let ranges = self.objects.host().device_attach(dev, None, ioas);
        let ranges = ranges.and_then(|_| self.objects.host().ioas_iova_ranges(ioas)).context(what);
        let detached = self.objects.detach(dev, None).context(what);
        self.objects.destroy(ioas);
        let ranges = ranges.and_then(|ranges| detached.map(|()| ranges))?;
        let last = ranges.allowed.last().map_or(0, |range| *range.end());
        // All of them have all bits of addresses.
        Ok(last.checked_add(1).map_or(64, |end| end.ilog2()) as u8)
    }

    /// A mirror of `stage1`, equal to it, for `requester`. Returns its number.
    pub fn add_mirror(&mut self, requester: Requester, stage1: &Stage1) -> Result<ObjectId> {
        let (mut making, mut quota) = (self.take_prepared(requester, stage1)?, Quota::ALL);
        if let Err(error) = self.make_some(&mut making, &Mirror::default(), &mut quota) {
            self.destroy_making(making);
            return Err(error);
        }
        let shadow = self.shadow.as_mut().ok_or(NestingError::GuestSecondStage(requester))?;
        Ok(shadow.add(making.new))
    }

    pub(super) fn new_mirror(&mut self, tables: Tables, part: Part) -> Result<Mirrored> {
        let ioas = self.objects.alloc_ioas(|| "allocating the IOAS of a guest's table".into())?;
        let (hwpts, mirror) = (BTreeMap::new(), Mirror::default());
        let (unsettled, failures, making) = (false, 0, None);
        Ok(Mirrored { tables, ioas, hwpts, mirror, part, unsettled, failures, making })
    }

    /// Destroys the mirror with this number, which nothing is attached to.
    pub fn end_mirror(&mut self, id: ObjectId) {
        if let Some(mirrored) = self.shadow.as_mut().and_then(|shadow| shadow.mirrors.remove(&id)) {
            self.destroy_mirror(mirrored);
        }
    }

    pub(super) fn destroy_mirror(&mut self, mirrored: Mirrored) {
        self.uncount(mirrored.part, mirrored.mirror.len());
        for hwpt in mirrored.hwpts.into_values() {
            self.objects.destroy(hwpt);
        }
        self.objects.destroy(mirrored.ioas);
        if let Some(making) = mirrored.making {
            self.destroy_making(*making);
        }
    }

    /// There are `count` pieces less.
    pub(super) fn uncount(&mut self, part: Part, count: usize) {
        if let Some(shadow) = self.shadow.as_mut() {
            *shadow.pieces.of(part) -= count as u64;
        }
    }

    /// From now on the pieces of `mirrored` count as `part`.
    pub(super) fn count_as(&mut self, mirrored: &mut Mirrored, part: Part) {
        self.uncount(mirrored.part, mirrored.mirror.len());
        mirrored.part = part;
        if let Some(shadow) = self.shadow.as_mut() {
            *shadow.pieces.of(part) += mirrored.mirror.len() as u64;
        }
    }

    /// Counts `map`, which is to be mapped as `part`: all of it, or nothing.
    pub(super) fn count(&mut self, part: Part, map: &[Piece]) -> Result<()> {
        let shadow = self.shadow.as_mut().ok_or(NestingError::ShutDown)?;
        let room = shadow.pieces.room(part, shadow.limit);
        if let Some(beyond) = usize::try_from(room).ok().and_then(|room| map.get(room)) {
            return Err(too_many(beyond.iova, shadow.limit));
        }
        *shadow.pieces.of(part) += map.len() as u64;
        Ok(())
    }

    /// Destroys the page tables that the mirror `id` has for `rid` alone, if it uses that no more.
    pub fn end_unused_of(&mut self, id: ObjectId, rid: Bdf) {
        let mirrored = self.shadow.as_mut().and_then(|shadow| shadow.mirrors.get_mut(&id));
        let Some(mirrored) = mirrored.filter(|_| !self.nested.uses(rid, id)) else { return };
        let new = mirrored.making.as_mut().and_then(|making| making.new.hwpts.remove(&rid));
        for hwpt in new.into_iter().chain(mirrored.hwpts.remove(&rid)) {
            self.objects.destroy(hwpt);
        }
    }

    /// The object that `device`, of `requester`, is attached to so that this uses the mirror `id`.
    pub fn attachable(
        &mut self,
        id: ObjectId,
        requester: Requester,
        device: &Device,
    ) -> Result<ObjectId> {
        let mirrored = self.shadow.as_mut().and_then(|shadow| shadow.mirrors.get_mut(&id));
        // Numbers in use are those of mirrors; without mirrors they are the objects themselves.
        let Some(mirrored) = mirrored else { return Ok(id) };
        // Nobody looks again at those who have been moved.
        let is_past = mirrored.making.as_ref().is_some_and(|it| Some(requester) <= it.moved);
        let used = match mirrored.making.as_mut() {
            Some(making) if is_past => &mut making.new,
            _ => mirrored,
        };
        Self::attachable_of(&mut self.objects, used, requester.rid, device)
    }

    pub(super) fn attachable_of(
        objects: &mut Objects,
        mirrored: &mut Mirrored,
        rid: Bdf,
        device: &Device,
    ) -> Result<ObjectId> {
        if device.info.max_pasid_log2 == 0 {
            return Ok(mirrored.ioas);
        }
        if let Some(hwpt) = mirrored.hwpts.get(&rid) {
            return Ok(*hwpt);
        }
        let flags = HwptFlags::new().with_pasid(true);
        let what = || "allocating the page table of a mirror".into();
        let hwpt = objects.alloc_paging(flags, device.dev, mirrored.ioas, what)?;
        mirrored.hwpts.insert(rid, hwpt);
        Ok(hwpt)
    }

    /// Does `steps` in the host: first what goes, then what comes.
    pub(super) fn change(&mut self, mirrored: &mut Mirrored, steps: &Steps) -> Result<()> {
        mirrored.unsettled = true;
        for (iova, length) in steps.unmapped() {
            let unmapped = self.objects.host().ioas_unmap(mirrored.ioas, iova, length);
            unmapped.context(|| format!("unmapping IOVA {iova:#x} of a guest's table"))?;
        }
        steps.unmap.iter().for_each(|piece| mirrored.mirror.unmapped(piece));
        self.uncount(mirrored.part, steps.unmap.len());
        // What is beyond the limit is not mapped, and nothing before it.
        self.count(mirrored.part, &steps.map)?;
        for (number, piece) in steps.map.iter().enumerate() {
            if let Err(error) = self.copy(mirrored, piece) {
                self.uncount(mirrored.part, steps.map.len() - number);
                return Err(error);
            }
        }
        mirrored.unsettled = false;
        Ok(())
    }

    /// Maps `piece`, which is counted.
    pub(super) fn copy(&mut self, mirrored: &mut Mirrored, piece: &Piece) -> Result<()> {
        let Piece { iova, length, gpa, access } = *piece;
        let source = self.objects.ioas()?.id();
        let target = MapTarget::Fixed(iova);
        let host = self.objects.host();
        match host.ioas_copy(mirrored.ioas, target, source, gpa, length, access) {
            Ok(_) => {
                mirrored.mirror.mapped(*piece);
                Ok(())
            }
            Err(error) if is_reserved(error.errno) => Err(reserved(iova, &error.to_string())),
            Err(source) => Err(NestingError::Host {
                what: format!("mapping IOVA {iova:#x} of a guest's table to {gpa:#x}"),
                source,
            }),
        }
    }

    /// The users of the mirror `id`, as they were configured.
    pub(super) fn configs(&self, id: ObjectId) -> Vec<(Requester, RequesterConfig)> {
        let Some(stage1) = self.nested.stage1(id) else { return Vec::new() };
        let config = |requester: Requester| (requester, self.nested.config(requester, stage1));
        self.nested.users(id).into_iter().map(config).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// However mirrors grow, are replaced, and are kept after all: there is room for what is in
        /// use, and never more than twice the limit.
        #[test]
        fn there_are_never_more_pieces_than_twice_the_limit(
            steps in prop::collection::vec((0..5u8, 0..8usize, 1..12u64), 0..300),
        ) {
            const LIMIT: u64 = 10;
            let mut account = Account::default();
            // Of each one, and of what comes in its place.
            let mut mirrors = [(0u64, None::<u64>); 8];
            for (step, which, count) in steps {
                let (pieces, coming) = &mut mirrors[which];
                match (step, &mut *coming) {
                    (0, None) => {
                        let count = count.min(account.room(Part::Serves, LIMIT));
                        *account.of(Part::Serves) += count;
                        *pieces += count;
                    }
                    (1, None) => {
                        *account.of(Part::Serves) -= *pieces;
                        *account.of(Part::Goes) += *pieces;
                        *coming = Some(0);
                    }
                    (2, Some(new)) => {
                        let count = count.min(account.room(Part::Comes, LIMIT));
                        *account.of(Part::Comes) += count;
                        *new += count;
                    }
                    (3 | 4, Some(new)) => {
                        *account.of(Part::Comes) -= *new;
                        *account.of(Part::Goes) -= *pieces;
                        *pieces = if step == 3 { *new } else { *pieces };
                        *account.of(Part::Serves) += *pieces;
                        *coming = None;
                    }
                    _ => {}
                }
                prop_assert!(account.all() <= 2 * LIMIT, "{:?}", account);
            }
        }
    }
}
