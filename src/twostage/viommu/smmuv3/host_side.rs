// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The small trait that a virtual SMMUv3 is built on, and the one it offers to its callers.
//!
//! They differ from VT-d's: an SMMU's invalidations name ASIDs and streams that only the guest's
//! context descriptors give a meaning, so they reach the host as issued by the guest.

use std::fmt::Debug;

use crate::spec::pci::PageResponse;
use crate::spec::smmuv3::command::Command;
use crate::spec::smmuv3::page_request::PageRequest;
use crate::spec::smmuv3::{StreamId, SubstreamId};
use crate::viommu::{HostSideError, PageTicket};

/// The four words of an event record, in host order (§7.3).
pub type EventRecordWords = [u64; 4];

/// The treatment of a stream's DMA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub enum StreamPolicy {
    /// Every transaction is terminated.
    Abort,
    /// Untranslated, because translation is off and GBPA lets transactions pass: the IOVA is the
    /// GPA, and no transaction causes an event (§6.3.14).
    GlobalBypass,
    /// Untranslated by the stream table entry: the IOVA is the GPA. A transaction beyond the
    /// address size, or with a SubstreamID, is terminated with an event (§3.4, §7.3.9).
    Bypass,
    /// Translated by stage-1 tables owned by the guest.
    Stage1 {
        /// Words 0 and 1 of the stream table entry, restricted to the fields that the owner of
        /// stage 1 controls (§5.2): V, Config, S1Fmt, S1ContextPtr, S1CDMax; S1DSS, S1CIR, S1COR,
        /// S1CSH, S1STALLD, EATS.
        ste: [u64; 2],
    },
}

/// What is behind a virtual SMMUv3: turns policies into translations.
///
/// Calls come one at a time (the virtual SMMU's lock is held). A call returns only when the host is
/// done: the virtual SMMU acknowledges to the guest right after.
pub trait SmmuHostSide: Debug + Send + Sync {
    /// Applies `policy` to the DMA of `stream`. An unchanged policy costs nothing.
    ///
    /// # Errors
    /// The host refused; the stream is then blocked, whatever it was before, unless the error says
    /// [`HostSideError::still_reachable`].
    fn configure(&self, stream: StreamId, policy: &StreamPolicy) -> Result<(), HostSideError>;

    /// Does a batch of invalidations: commands of the guest, with its own StreamIDs, of the kinds
    /// that a host accepts from the owner of stage 1 (`TLBI_NH_ALL`, `TLBI_NH_ASID`, `TLBI_NH_VA`,
    /// `TLBI_NH_VAA`, `TLBI_NSNH_ALL`, `CFGI_CD`, `CFGI_CD_ALL`, `ATC_INV`).
    ///
    /// # Errors
    /// The host refused part of it, even if that was made good.
    fn invalidate(&self, commands: &[Command]) -> Result<(), SmmuInvalidateError>;

    /// Responds to what [`EventTarget::page_requests`] or [`EventTarget::stalled`] has taken of
    /// `stream`; once. A stalled transaction is tried again after [`PageResponse::Success`], and
    /// otherwise ends with an abort. Has no effect where the host has answered meanwhile. May be
    /// called from any thread, also at the same time as other methods.
    fn respond(&self, stream: StreamId, ticket: PageTicket, response: PageResponse) {
        let _ = (stream, ticket, response);
    }

    /// Takes the stalled transactions that the host has for the guest and that nobody has begun to
    /// read yet: they are not given to [`EventTarget::stalled`], and need a response. To be called
    /// like [`SmmuHostSide::respond`]; does not wait.
    fn take_unread(&self) -> Vec<(StalledTransaction, PageTicket)> {
        Vec::new()
    }
}

/// A transaction that a host has stalled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StalledTransaction {
    /// Its stream.
    pub stream: StreamId,
    /// SubstreamID, if it has one.
    pub substream: Option<SubstreamId>,
    /// STAG: distinguishes it from the others of its stream that are stalled.
    pub stag: u16,
    /// Its address, in bytes.
    pub address: u64,
    /// It is a write.
    pub write: bool,
    /// It is an instruction fetch.
    pub execute: bool,
    /// It is privileged.
    pub privileged: bool,
}

/// The host did not do a batch of invalidations.
#[derive(Debug, Clone, thiserror::Error)]
#[error("command {refused}: {error}")]
#[non_exhaustive]
pub struct SmmuInvalidateError {
    /// The number of the command that the host refused: earlier ones are complete. 0, or the number
    /// of the first forwarded command, when it is unknown.
    pub refused: usize,
    /// The host flushed everything instead, so that nothing named by the batch is still cached. The
    /// guest is told all the same: its commands were refused.
    pub flushed: bool,
    /// A device did not answer its CMD_ATC_INV in time.
    pub unanswered: bool,
    /// Nothing but that: every command was done.
    pub done: bool,
    /// The error. What could not be invalidated is blocked, unless it says
    /// [`HostSideError::still_reachable`].
    #[source]
    pub error: HostSideError,
}

impl SmmuInvalidateError {
    /// The host refused command number `refused`, with `error`; [`SmmuInvalidateError::flushed`].
    pub fn new(refused: usize, flushed: bool, error: HostSideError) -> Self {
        Self { refused, flushed, unanswered: false, done: false, error }
    }

    /// A device did not answer its CMD_ATC_INV; [`SmmuInvalidateError::unanswered`].
    pub fn unanswered(error: HostSideError) -> Self {
        Self { refused: 0, flushed: false, unanswered: true, done: true, error }
    }
}

/// What a virtual SMMUv3 offers to the source of events.
///
/// May be called from any thread that holds no lock of the host.
pub trait EventTarget: Send + Sync {
    /// An event for a transaction of a stream: the record as the guest is to read it, with the
    /// guest's StreamID.
    fn event(&self, record: EventRecordWords);

    /// Events were lost on their way here.
    fn events_lost(&self);

    /// A device asks for pages: `requests` are a whole group of one stream, the last one of which
    /// has [`PageRequest::last`]. Returns the response; or `None`, and the guest responds by
    /// [`SmmuHostSide::respond`] with `ticket`.
    fn page_requests(&self, requests: &[PageRequest], ticket: PageTicket) -> Option<PageResponse> {
        let _ = (requests, ticket);
        Some(PageResponse::Failure)
    }

    /// To be called before what the host has stalled is read, for [`EventTarget::stalled`].
    fn stall_epoch(&self) -> u64 {
        0
    }

    /// A transaction is stalled, as was read after [`EventTarget::stall_epoch`] had said `epoch`.
    /// Returns the response, as for [`SmmuHostSide::respond`]; or `None`, and the guest responds by
    /// that with `ticket`.
    fn stalled(
        &self,
        transaction: &StalledTransaction,
        ticket: PageTicket,
        epoch: u64,
    ) -> Option<PageResponse> {
        let _ = (transaction, ticket, epoch);
        Some(PageResponse::InvalidRequest)
    }
}
