// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The small trait that a virtual SMMUv3 stands on, and the one it offers upward.
//!
//! They are not those of VT-d: an SMMU's invalidations name ASIDs and streams that only the guest's
//! context descriptors tell apart, so that they reach the host as the guest gave them.

use std::fmt::Debug;

use crate::spec::smmuv3::command::Command;
use crate::spec::smmuv3::StreamId;
use crate::viommu::HostSideError;

/// The four words of an event record, in host order (§7.3).
pub type EventRecordWords = [u64; 4];

/// What becomes of a stream's DMA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StreamPolicy {
    /// Every transaction is terminated.
    Abort,
    /// Untranslated, because translation is off and GBPA lets pass: the IOVA is the GPA, and no
    /// transaction makes an event (§6.3.14).
    GlobalBypass,
    /// Untranslated, because the stream table entry says so: the IOVA is the GPA. One that is
    /// beyond the address size, or has a SubstreamID, is terminated and makes an event (§3.4,
    /// §7.3.9).
    Bypass,
    /// Through stage-1 tables that the guest owns.
    Stage1 {
        /// Words 0 and 1 of the stream table entry, with no field set but those that the owner of
        /// stage 1 decides (§5.2): V, Config, S1Fmt, S1ContextPtr, S1CDMax; S1DSS, S1CIR, S1COR,
        /// S1CSH, S1STALLD, EATS.
        ste: [u64; 2],
    },
}

/// What is behind a virtual SMMUv3: it turns policies into translations.
///
/// Calls come one at a time (the virtual SMMU's lock is held). A call returns only when the host
/// has done what was asked: the virtual SMMU acknowledges to the guest right after.
pub trait SmmuHostSide: Debug + Send + Sync {
    /// From now on DMA of `stream` goes by `policy`. An unchanged policy costs nothing.
    ///
    /// # Errors
    /// The host refused; the stream is then blocked, whatever it was before, unless the error says
    /// [`HostSideError::still_reachable`].
    fn configure(&self, stream: StreamId, policy: &StreamPolicy) -> Result<(), HostSideError>;

    /// Does a batch of invalidations: the guest's commands, with its own StreamIDs, of those that a
    /// host takes from the owner of stage 1 (`TLBI_NH_ALL`, `TLBI_NH_ASID`, `TLBI_NH_VA`,
    /// `TLBI_NH_VAA`, `TLBI_NSNH_ALL`, `CFGI_CD`, `CFGI_CD_ALL`, `ATC_INV`).
    ///
    /// # Errors
    /// The host refused something of it, even if that was made good.
    fn invalidate(&self, commands: &[Command]) -> Result<(), SmmuInvalidateError>;
}

/// The host did not do a batch of invalidations.
#[derive(Debug, Clone, thiserror::Error)]
#[error("command {refused}: {error}")]
pub struct SmmuInvalidateError {
    /// The number of the command that the host refused: those before it are complete. 0, or the
    /// first that the host was asked for, when nothing is known of any.
    pub refused: usize,
    /// The host forgot everything instead, so that nothing is in use any more that the batch names.
    /// The guest is told all the same: commands of its own were refused.
    pub flushed: bool,
    /// Why. What could not be invalidated is blocked, unless it says
    /// [`HostSideError::still_reachable`].
    #[source]
    pub error: HostSideError,
}

/// What a virtual SMMUv3 offers to whoever brings events back.
///
/// May be called from any thread that holds no lock of the host.
pub trait EventTarget: Send + Sync {
    /// Something happened to a transaction of a stream: the record as the guest is to read it, with
    /// the guest's StreamID.
    fn event(&self, record: EventRecordWords);

    /// Events were lost on their way here.
    fn events_lost(&self);
}
