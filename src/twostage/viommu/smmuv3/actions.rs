// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The action for each command (§4): whether the SMMU supports it, and who executes it.
//!
//! Changes to the configuration of streams are executed here. Invalidations of hardware caches go
//! to the host: as decoded commands, so that no bit outside a known field reaches it.

use super::apply::Scope;
use super::Smmu;
use crate::spec::smmuv3::command::{AddressRange, Command, SyncSignal, ATC_SIZE_ALL};
use crate::spec::smmuv3::queue::CommandError;
use crate::spec::smmuv3::regs::STALL_NONE;
use crate::spec::smmuv3::StreamId;

/// The action for a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// None: a hint, or an unknown stream.
    Nothing,
    /// The host executes the command.
    Invalidate,
    /// Stream table entries are read again.
    Configure(Scope),
    /// All earlier commands are complete: signal it.
    Sync(SyncSignal),
}

impl Smmu {
    /// The action for `command`.
    ///
    /// # Errors
    /// The SMMU does not support it.
    pub(super) fn action(&self, command: &Command) -> Result<Action, CommandError> {
        let idr0 = self.caps.idr0;
        let invalidate = Action::Invalidate;
        match *command {
            Command::PrefetchConfig { .. } | Command::PrefetchAddr { .. } => Ok(Action::Nothing),
            Command::CfgiSte { stream, .. } => Ok(Action::Configure(Scope::One(stream))),
            Command::CfgiSteRange { stream, range } => {
                Ok(Action::Configure(Scope::range(stream, range)))
            }
            Command::CfgiCd { stream, .. } | Command::CfgiCdAll { stream } => {
                offered(idr0.s1p(), self.of_stream(stream, invalidate))
            }
            Command::TlbiNhAll { .. } => offered(idr0.s1p(), invalidate),
            Command::TlbiNhAsid { asid, .. } => offered(idr0.s1p(), self.of_asid(asid, invalidate)),
            Command::TlbiNhVa { asid, range, .. } => {
                let offers = idr0.s1p() && self.offers_range(range);
                offered(offers, self.of_asid(asid, invalidate))
            }
            Command::TlbiNhVaa { range, .. } => {
                offered(idr0.s1p() && self.offers_range(range), invalidate)
            }
            Command::TlbiNsnhAll => Ok(invalidate),
            Command::TlbiEl2All | Command::TlbiEl2Asid { .. } => offered(idr0.hyp(), invalidate),
            Command::TlbiEl2Va { range, .. } | Command::TlbiEl2Vaa { range } => {
                offered(idr0.hyp() && self.offers_range(range), invalidate)
            }
            Command::TlbiS12Vmall { .. } => offered(idr0.s2p(), invalidate),
            Command::TlbiS2Ipa { range, .. } => {
                offered(idr0.s2p() && self.offers_range(range), invalidate)
            }
            // Larger sizes may be refused: they always are, whatever the host's hardware does.
            Command::AtcInv { size, .. } if size > ATC_SIZE_ALL => Err(CommandError::Illegal),
            Command::AtcInv { stream, .. } => {
                let translating = self.streams.is_translating();
                let action = if translating { invalidate } else { Action::Nothing };
                offered(idr0.ats(), self.of_stream(stream, action))
            }
            Command::PriResp { .. } => offered(idr0.pri(), invalidate),
            Command::Resume { .. } | Command::StallTerm { .. } => {
                offered(idr0.stall_model() != STALL_NONE, invalidate)
            }
            Command::Sync { signal } => Ok(Action::Sync(signal)),
        }
    }

    /// `action` if `stream` exists: nothing is cached for another one.
    fn of_stream(&self, stream: StreamId, action: Action) -> Action {
        if self.streams.contains(stream) {
            action
        } else {
            Action::Nothing
        }
    }

    /// `action` if the ASID is valid: with 8-bit ASIDs, nothing has a larger one.
    fn of_asid(&self, asid: u16, action: Action) -> Action {
        if self.caps.idr0.asid16() || asid <= u8::MAX.into() {
            action
        } else {
            Action::Nothing
        }
    }

    /// Whether the SMMU supports the fields of `range`. Without IDR3.RIL they are reserved;
    /// ignoring them would leave most of the range stale.
    fn offers_range(&self, range: AddressRange) -> bool {
        (self.caps.idr3.ril() || !range.needs_ril()) && !range.is_reserved()
    }
}

fn offered(offered: bool, action: Action) -> Result<Action, CommandError> {
    offered.then_some(action).ok_or(CommandError::Illegal)
}
