// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's tables without hardware that walks them: each is mirrored into an IOAS.
//!
//! A *mirror* has the translations of one table, as mappings that share the pages of the guest's
//! IOAS (`IOAS_COPY`): memory is pinned and accounted once. All devices that use the table are
//! attached to its mirror, and those that bypass tables to the guest's IOAS itself; what a device
//! is attached to is replaced without a gap. The guest invalidates whatever it changes (CAP.CM):
//! then the table is walked over the range, and compared with the mirror.
//!
//! A guest can name 2^36 pages with two tables, so the pieces of all mirrors together are limited,
//! and so are the tables that one comparison reads. Where a table has more, or IOVAs that the host
//! reserves, its users are blocked and the guest gets a fault; invalidations that name them try
//! again ([`starved`]). The upper half of a first stage's addresses, at the end of 64 bits, is left
//! out: no host maps it.
//!
//! Nothing that the guest has taken back stays mapped where a device can reach it: if the host
//! fails in the middle, the users of the mirror are blocked, and it goes with the last of them.
//! Those are *lost* until they are served again, or the guest is told: by the failure of what it
//! waits for, or by a fault if it waits for something else.

mod calls;
mod follow;
mod making;
mod mirror;
pub(super) mod serving;
mod starved;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::iommufd::{Errno, HostError, ObjectId};
use crate::nesting::NestingError;
use crate::spec::pci::Bdf;
use crate::viommu::vtd::walk::Tables;
use crate::viommu::vtd::{DmaFault, RequesterConfig, Stage1, VtdConfig};
use crate::viommu::{Requester, TableMemory};
use calls::{Account, Part};
use follow::Said;
use making::{Joining, Making, Prepared};
use mirror::{Mirror, Wanted};
use serving::Serving;

/// At most this many blocked requesters are tried again when the guest invalidates. Those beyond
/// are blocked and get a fault like the others, but are tried again when they get another table
/// only: what a guest can make of its PASIDs takes no memory, and no time of each batch.
const MAX_STARVED: usize = 4096;

/// What the guest's tables are mirrored with.
pub(super) struct Shadow {
    memory: Arc<dyn TableMemory>,
    /// The most pieces of all mirrors.
    limit: u64,
    /// First-stage tables may have pages of 1 GiB.
    huge: bool,
    /// Width of the IOVAs that are offered. Tables may have more, which no host need map.
    iova_bits: u8,
    why: String,
    /// By their numbers, which stand for objects of the host in the bookkeeping of attachments.
    mirrors: BTreeMap<ObjectId, Mirrored>,
    last: ObjectId,
    /// The pieces of all mirrors, those in the making included.
    pieces: Account,
    /// What the batch that was last at work invalidates.
    said: Option<Said>,
    /// The number of batches so far.
    batches: u32,
    prepared: Option<Prepared>,
    joining: Option<Joining>,
    /// How often in a row what was prepared had to go before it was used.
    disturbed: u32,
    /// Requesters that are blocked because their table cannot be mirrored, or was not.
    starved: BTreeMap<Requester, Starved>,
    /// Whose table is read, to try it again.
    trial: Option<Trial>,
    /// Not served again yet.
    lost: Vec<Lost>,
    /// Not delivered yet.
    faults: Vec<DmaFault>,
}

/// A requester that was blocked, while the virtual IOMMU did something else, because it could not
/// use its mirror any more.
#[derive(Debug)]
struct Lost {
    requester: Requester,
    config: RequesterConfig,
    error: NestingError,
}

/// A requester that is blocked because its table is not mirrored.
#[derive(Debug)]
struct Starved {
    config: RequesterConfig,
    /// A batch has named it, and it was not tried since.
    due: bool,
    /// Batches that it is left out of.
    skip: u32,
    /// The same after another failure.
    patience: u32,
}

/// The pieces of one table are being counted.
#[derive(Debug)]
struct Trial {
    stage1: Stage1,
    /// Where to go on, in bytes.
    iova: u64,
    /// Tables that may still be read.
    budget: u64,
    /// The pieces so far, without those in `last`.
    pieces: u64,
    last: Wanted,
}

/// One mirror.
#[derive(Debug)]
struct Mirrored {
    tables: Tables,
    ioas: ObjectId,
    /// For devices with PASIDs, which need a HWPT with that flag.
    hwpts: BTreeMap<Bdf, ObjectId>,
    mirror: Mirror,
    /// As what its pieces count.
    part: Part,
    /// The host has failed in the middle of a change, or another one is being made.
    unsettled: bool,
    /// How often the host has failed since the last batch.
    failures: u32,
    /// What takes its place.
    making: Option<Box<Making>>,
}

impl Shadow {
    /// As `serving` says, because of `why`.
    pub fn new(serving: &Serving, why: String) -> Self {
        Self {
            memory: serving.memory.clone(),
            limit: serving.nesting.pieces(),
            huge: serving.config.first_stage_1g,
            iova_bits: serving.config.iova_width(),
            why,
            mirrors: BTreeMap::new(),
            last: ObjectId(0),
            pieces: Account::default(),
            said: None,
            batches: 0,
            prepared: None,
            joining: None,
            disturbed: 0,
            starved: BTreeMap::new(),
            trial: None,
            lost: Vec::new(),
            faults: Vec::new(),
        }
    }

    /// The guest is offered `config`.
    pub fn set_offered(&mut self, config: &VtdConfig) {
        self.huge = config.first_stage_1g;
        self.iova_bits = config.iova_width();
    }

    /// `stage1` as it is mirrored, if it is one stage.
    fn tables(&self, stage1: &Stage1) -> Option<Tables> {
        Tables::new(stage1, self.huge, self.iova_bits)
    }

    /// Why tables are mirrored.
    pub fn because(&self) -> &str {
        &self.why
    }

    /// Faults to deliver, once no lock is held.
    pub fn take_faults(&mut self) -> Vec<DmaFault> {
        std::mem::take(&mut self.faults)
    }

    /// The number of mirrors, and of their pieces.
    pub fn size(&self) -> (u64, u64) {
        (self.mirrors.len() as u64, self.pieces.all())
    }

    /// `requester` is no longer blocked for what its table has.
    pub fn feed(&mut self, requester: Requester) {
        self.starved.remove(&requester);
    }

    /// Forgets the requesters of `rid`.
    pub fn forget(&mut self, rid: Bdf) {
        self.starved.retain(|requester, _| requester.rid != rid);
        self.lost.retain(|lost| lost.requester.rid != rid);
    }

    fn add(&mut self, mirrored: Mirrored) -> ObjectId {
        loop {
            self.last = ObjectId(self.last.0.wrapping_add(1).max(1));
            if !self.mirrors.contains_key(&self.last) {
                self.mirrors.insert(self.last, mirrored);
                return self.last;
            }
        }
    }
}

impl fmt::Debug for Shadow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shadow").field("mirrors", &self.mirrors).finish_non_exhaustive()
    }
}

/// Why a mirror is not attached: that IOVAs are reserved is the guest's mistake.
pub(super) fn refused_attach(requester: Requester, source: HostError) -> NestingError {
    if source.errno == Errno::EADDRINUSE {
        return reserved(0, &source.to_string());
    }
    NestingError::Host { what: format!("attaching {requester}"), source }
}

/// What the host says of IOVAs that it does not map for the devices.
fn is_reserved(errno: Errno) -> bool {
    matches!(errno, Errno::EINVAL | Errno::EADDRINUSE | Errno::EOVERFLOW | Errno::ERANGE)
}

fn reserved(iova: u64, error: &str) -> NestingError {
    let why = format!("the host reserves IOVAs there ({error}); the guest must not map them");
    NestingError::NotMirrored { iova, why }
}

/// The tables have more than is mirrored.
fn too_many(iova: u64, limit: u64) -> NestingError {
    let why = format!(
        "there are more pieces than shadow-pieces={limit} of them; raise that, or let the guest \
         map less"
    );
    NestingError::NotMirrored { iova, why }
}
