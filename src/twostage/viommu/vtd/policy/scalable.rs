// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Policies from scalable-mode root, context and PASID entries (§3.4.3, §6.2, §9.2, §9.4–§9.6).

use super::{Blocked, Served, Tables};
use crate::spec::pci::{Bdf, Pasid};
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::pasid::{
    PagingMode, PasidDirectoryEntry, PasidEntry, Pgtt, DIRECTORY_ENTRY_SIZE, TABLE_ENTRIES,
    TABLE_ENTRY_SIZE,
};
use crate::spec::vtd::regs::Rtaddr;
use crate::spec::vtd::root::{
    RootHalf, ScalableContextHigh, ScalableContextLow, ROOT_ENTRY_SIZE, SCALABLE_CONTEXT_ENTRIES,
    SCALABLE_CONTEXT_ENTRY_SIZE,
};
use crate::viommu::vtd::host_side::{DomainTag, Stage1, VtdFirstStage, VtdNested, VtdSecondStage};
use crate::viommu::Requester;

/// What the tables at `root` say about `requester`.
pub(super) fn serve(
    tables: &Tables<'_>,
    root: Rtaddr,
    requester: Requester,
) -> Result<Served, Blocked> {
    entry(tables, root, requester)?
}

/// What a PASID table entry says; or why its PASID is blocked, if there is none, or it says
/// nothing: it is not present, and has no FPD of its own.
pub(super) type OfEntry = Result<Result<Served, Blocked>, Blocked>;

/// What the PASID table entry of `requester` says.
pub(super) fn entry(tables: &Tables<'_>, root: Rtaddr, requester: Requester) -> OfEntry {
    let (directory, pasid) = directory_of(tables, root, requester)?;
    entry_in(tables, &directory, pasid)
}

/// What the entry of `pasid` in the table of `directory` says.
fn entry_in(tables: &Tables<'_>, directory: &Directory, pasid: u32) -> OfEntry {
    let entry = table_entry(tables, directory, pasid)?;
    let qw0 = entry.entry.qw0;
    match entry.serve(tables, pasid) {
        Err(blocked) if !qw0.p() && !qw0.fpd() => Err(blocked),
        said => Ok(said),
    }
}

/// What the tables at `root` would say about `requester` if its PASID table entry were all zero.
pub(super) fn without_entry(tables: &Tables<'_>, root: Rtaddr, requester: Requester) -> Blocked {
    let reason = FaultReason::PasidEntryNotPresent;
    directory_of(tables, root, requester).map_or_else(
        |blocked| blocked,
        |(directory, _)| Blocked { reason, fault_disabled: directory.fault_disabled },
    )
}

/// The directory entry for `requester`, and its PASID or RID_PASID.
fn directory_of(
    tables: &Tables<'_>,
    root: Rtaddr,
    requester: Requester,
) -> Result<(Directory, u32), Blocked> {
    let context = context_entry(tables, root, requester.rid)?;
    let blocked = |reason| Err(Blocked { reason, fault_disabled: context.low.fpd() });
    let pasid = match requester.pasid {
        Some(_) if !context.low.paside() => return blocked(FaultReason::PasidDisabled),
        Some(pasid) if pasid.raw() >= context.pasids(tables) => {
            return blocked(FaultReason::PasidBeyondDirectory);
        }
        Some(pasid) => pasid.raw(),
        None if context.high.rid_pasid() >= context.low.pasids() => {
            return blocked(FaultReason::RidPasidBeyondDirectory);
        }
        None => context.high.rid_pasid(),
    };
    Ok((directory_entry(tables, &context, pasid / TABLE_ENTRIES)?, pasid))
}

/// Whether page requests of `rid` are enabled (PRE).
pub(super) fn page_requests(tables: &Tables<'_>, root: Rtaddr, rid: Bdf) -> Result<(), Blocked> {
    let low = context_entry(tables, root, rid)?.low;
    let disabled = Blocked { reason: FaultReason::PageRequestDisabled, fault_disabled: low.fpd() };
    low.pre().then_some(()).ok_or(disabled)
}

/// The PASID tables of a function.
pub(in crate::viommu::vtd) struct PasidTables<'a> {
    tables: &'a Tables<'a>,
    context: Context,
}

impl<'a> PasidTables<'a> {
    /// The tables of `rid`; `None` if it has no requests with PASID.
    pub fn of(tables: &'a Tables<'a>, root: Rtaddr, rid: Bdf) -> Option<Self> {
        let context = context_entry(tables, root, rid).ok()?;
        context.low.paside().then_some(Self { tables, context })
    }

    /// PASIDs that may have an entry: `0..pasids`. The smaller of the directory's range and what
    /// the unit offers.
    pub fn pasids(&self) -> u32 {
        self.context.pasids(self.tables)
    }

    /// The table that contains `pasid`; `None` if there is none, or a wrong one.
    pub fn table(&self, pasid: u32) -> Option<PasidTable<'a>> {
        let directory = directory_entry(self.tables, &self.context, pasid / TABLE_ENTRIES).ok()?;
        Some(PasidTable { tables: self.tables, directory })
    }
}

/// One PASID table.
pub(in crate::viommu::vtd) struct PasidTable<'a> {
    tables: &'a Tables<'a>,
    directory: Directory,
}

impl PasidTable<'_> {
    /// What the entry of `pasid`, which is in this table, says.
    pub(super) fn entry(&self, pasid: Pasid) -> OfEntry {
        entry_in(self.tables, &self.directory, pasid.raw())
    }
}

/// A present and well-formed context entry.
struct Context {
    low: ScalableContextLow,
    high: ScalableContextHigh,
}

impl Context {
    /// PASIDs of requests with PASID: `0..pasids`.
    fn pasids(&self, tables: &Tables<'_>) -> u32 {
        self.low.pasids().min(1 << tables.caps.ecap.pasid_bits())
    }
}

fn context_entry(tables: &Tables<'_>, root: Rtaddr, rid: Bdf) -> Result<Context, Blocked> {
    let address = root.root_table() + u64::from(rid.bus()) * ROOT_ENTRY_SIZE;
    let halves: [u64; 2] =
        tables.words(address).map_err(|_| Blocked::recorded(FaultReason::RootAccess))?;
    let [lower, upper] = halves;
    let word = if rid.devfn() < SCALABLE_CONTEXT_ENTRIES { lower } else { upper };
    let half = RootHalf::from_bits(word);
    if !half.p() {
        return Err(Blocked::recorded(FaultReason::RootNotPresent));
    }
    let table = half.context_table();
    if word & RootHalf::RESERVED != 0 || tables.is_beyond_width(table) {
        return Err(Blocked::recorded(FaultReason::RootReserved));
    }
    let index = u64::from(rid.devfn() % SCALABLE_CONTEXT_ENTRIES);
    let words: [u64; 4] = tables
        .words(table + index * SCALABLE_CONTEXT_ENTRY_SIZE)
        .map_err(|_| Blocked::recorded(FaultReason::ContextAccess))?;
    let [low_word, high_word, third, fourth] = words;
    let low = ScalableContextLow::from_bits(low_word);
    let high = ScalableContextHigh::from_bits(high_word);
    let blocked = |reason| Err(Blocked { reason, fault_disabled: low.fpd() });
    if !low.p() {
        return blocked(FaultReason::ContextNotPresent);
    }
    let ecap = tables.caps.ecap;
    let not_offered = (low.dte() && !ecap.dt())
        || (low.paside() && !ecap.pasid())
        || (low.pre() && !ecap.prs())
        || (high.rid_priv() && !ecap.rprivs());
    if low_word & ScalableContextLow::RESERVED != 0
        || high_word & ScalableContextHigh::RESERVED != 0
        || third | fourth != 0
        || tables.is_beyond_width(low.pasid_directory())
        || not_offered
    {
        return blocked(FaultReason::ContextReserved);
    }
    Ok(Context { low, high })
}

/// A present and well-formed PASID directory entry.
struct Directory {
    table: u64,
    /// FPD of the context entry or of this one.
    fault_disabled: bool,
}

fn directory_entry(
    tables: &Tables<'_>,
    context: &Context,
    index: u32,
) -> Result<Directory, Blocked> {
    let address = context.low.pasid_directory() + u64::from(index) * DIRECTORY_ENTRY_SIZE;
    let word = tables
        .memory
        .load_u64(address)
        .map_err(|_| Blocked::recorded(FaultReason::PasidDirectoryAccess))?;
    let entry = PasidDirectoryEntry::from_bits(word);
    let fault_disabled = context.low.fpd() || entry.fpd();
    let blocked = |reason| Err(Blocked { reason, fault_disabled });
    if !entry.p() {
        return blocked(FaultReason::PasidDirectoryNotPresent);
    }
    if word & PasidDirectoryEntry::RESERVED != 0 || tables.is_beyond_width(entry.pasid_table()) {
        return blocked(FaultReason::PasidDirectoryReserved);
    }
    Ok(Directory { table: entry.pasid_table(), fault_disabled })
}

/// A PASID table entry. Of one that is not present, only the first word is read.
struct TableEntry {
    words: [u64; 8],
    entry: PasidEntry,
    /// FPD of this entry or of an earlier one.
    fault_disabled: bool,
}

fn table_entry(
    tables: &Tables<'_>,
    directory: &Directory,
    pasid: u32,
) -> Result<TableEntry, Blocked> {
    let address = directory.table + u64::from(pasid % TABLE_ENTRIES) * TABLE_ENTRY_SIZE;
    let access = |_| Blocked::recorded(FaultReason::PasidTableAccess);
    // Most entries of a table are not present: their first word is enough.
    let [first] = tables.words(address).map_err(access)?;
    let mut words = [first, 0, 0, 0, 0, 0, 0, 0];
    let present = PasidEntry::from_words(words).qw0.p();
    if present {
        words = tables.words(address).map_err(access)?;
    }
    let entry = PasidEntry::from_words(words);
    let fault_disabled = directory.fault_disabled || entry.qw0.fpd();
    Ok(TableEntry { words, entry, fault_disabled })
}

impl TableEntry {
    fn serve(&self, tables: &Tables<'_>, pasid: u32) -> Result<Served, Blocked> {
        let blocked = |reason| Blocked { reason, fault_disabled: self.fault_disabled };
        if !self.entry.qw0.p() {
            return Err(blocked(FaultReason::PasidEntryNotPresent));
        }
        if self.has_reserved_bits(tables) {
            return Err(blocked(FaultReason::PasidEntryReserved));
        }
        let stage1 = self.stage1(tables).ok_or_else(|| blocked(FaultReason::PasidEntryInvalid))?;
        let tag = DomainTag { domain: self.entry.qw1.did(), pasid };
        Ok(Served { stage1, tag, fault_disabled: self.fault_disabled })
    }

    /// Whether a reserved field is set, including fields that control features which the unit does
    /// not offer.
    fn has_reserved_bits(&self, tables: &Tables<'_>) -> bool {
        let PasidEntry { qw0, qw1, qw2, .. } = self.entry;
        let ecap = tables.caps.ecap;
        let reserved =
            self.words.iter().zip(PasidEntry::RESERVED).any(|(word, mask)| word & mask != 0);
        let not_offered = (qw0.ssee() && !ecap.ers())
            || (qw0.ssade() && !ecap.ssads())
            || (qw1.pgsnp() && !ecap.sc())
            || (qw2.sre() && !ecap.srs())
            || (qw2.ere() && !ecap.ers())
            || (qw2.eafe() && !ecap.eafs());
        // A pointer matters only if the type uses it. (The width of the second stage, which may be
        // less for FSPTPTR of a nested entry, is the walk's business.)
        let first = tables.is_beyond_width(self.entry.first_stage_table());
        let second = tables.is_beyond_width(self.entry.second_stage_table());
        let beyond_width = match self.entry.translation_type() {
            Some(Pgtt::FirstStage) => first,
            Some(Pgtt::SecondStage) => second,
            Some(Pgtt::Nested) => first || second,
            Some(Pgtt::PassThrough) | None => false,
        };
        reserved || not_offered || beyond_width
    }

    /// The tables of the entry, none for pass-through; `None` if it is programmed wrongly.
    fn stage1(&self, tables: &Tables<'_>) -> Option<Option<Stage1>> {
        let ecap = tables.caps.ecap;
        let stage1 = match self.entry.translation_type()? {
            Pgtt::FirstStage if ecap.fsts() => Stage1::VtdFirstStage(self.first_stage(tables)?),
            Pgtt::SecondStage if ecap.ssts() => Stage1::VtdSecondStage(self.second_stage(tables)?),
            // A unit with NEST has both stages.
            Pgtt::Nested if ecap.nest() => Stage1::VtdNested(VtdNested {
                first: self.first_stage(tables)?,
                second: self.second_stage(tables)?,
            }),
            Pgtt::PassThrough if ecap.pt() => return Some(None),
            Pgtt::FirstStage | Pgtt::SecondStage | Pgtt::Nested | Pgtt::PassThrough => return None,
        };
        Some(Some(stage1))
    }

    /// `None` if FSPM is reserved, or for more levels than the unit has.
    fn first_stage(&self, tables: &Tables<'_>) -> Option<VtdFirstStage> {
        let qw2 = self.entry.qw2;
        let paging_mode = PagingMode::from_bits(qw2.fspm())?;
        if paging_mode == PagingMode::Level5 && !tables.caps.cap.fs5lp() {
            return None;
        }
        Some(VtdFirstStage {
            table: self.entry.first_stage_table(),
            paging_mode,
            supervisor_requests: qw2.sre(),
            write_protect: qw2.wpe(),
            extended_accessed: qw2.eafe(),
        })
    }

    /// `None` if the unit has no second-stage tables of the width AW.
    fn second_stage(&self, tables: &Tables<'_>) -> Option<VtdSecondStage> {
        let qw0 = self.entry.qw0;
        Some(VtdSecondStage {
            table: self.entry.second_stage_table(),
            address_width: tables.second_stage_width(qw0.aw())?,
            accessed_dirty: qw0.ssade(),
        })
    }
}
