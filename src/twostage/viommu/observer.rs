// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Observers of a virtual IOMMU, for traces.

use std::fmt;

use super::smmuv3::host_side::StreamPolicy;
use super::vtd::host_side::{DmaFault, RequesterConfig};
use super::{MsiMessage, Requester};
use crate::spec::pci::Bdf;
use crate::spec::smmuv3::event::EventRecord;
use crate::spec::smmuv3::StreamId;
use crate::spec::vtd::fault::FaultReason;

/// One register access by the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct RegisterAccess {
    /// The specification's name of the register.
    pub name: &'static str,
    /// Offset of the access in the register page, in bytes.
    pub offset: u64,
    /// Size of the access, in bytes.
    pub size: u8,
    /// What was read or written.
    pub value: u64,
    /// It is a write.
    pub write: bool,
}

/// What happened to a fault of a DMA or interrupt request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultOutcome {
    /// It is in a fault record.
    Recorded,
    /// There was no space: the guest sees the overflow.
    Lost,
    /// The guest's tables suppress it, or translation is off.
    Suppressed,
}

/// Observes what a virtual IOMMU does, in order. Called with locks of the virtual IOMMU held: an
/// observer must not call it. Without an observer, events are not even constructed.
pub trait Observer: Send + Sync {
    /// The guest read a register, or is about to write one: the effects of the write follow.
    fn register(&self, _access: &RegisterAccess) {}

    /// The guest disables translation, which is enabled. Nothing has changed yet: the host still
    /// has all that the guest used.
    fn disabling_translation(&self) {}

    /// A descriptor of the invalidation queue, or a command of the command queue, was fetched; its
    /// execution may be deferred to batch it with later ones.
    fn descriptor(&self, _name: &'static str, _descriptor: &dyn fmt::Debug) {}

    /// A policy was given to the host, which refused it if `applied` is false.
    fn policy(&self, _requester: Requester, _config: &RequesterConfig, _applied: bool) {}

    /// The policy of an SMMU stream was given to the host, which refused it if `applied` is false.
    fn stream_policy(&self, _stream: StreamId, _policy: &StreamPolicy, _applied: bool) {}

    /// An SMMU event for a transaction, with its record.
    fn event(&self, _record: &EventRecord, _outcome: FaultOutcome) {}

    /// A DMA request failed; `reason` is what the guest is told, or would be told if it were
    /// recorded.
    fn fault(&self, _fault: &DmaFault, _reason: Option<FaultReason>, _outcome: FaultOutcome) {}

    /// An interrupt of `source` was blocked; `reason` is what the guest is told.
    fn interrupt_fault(
        &self,
        _source: Bdf,
        _message: MsiMessage,
        _reason: FaultReason,
        _outcome: FaultOutcome,
    ) {
    }
}
