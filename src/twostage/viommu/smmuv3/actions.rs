// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is done for each command (§4): whether the SMMU offers it, and who carries it out.
//!
//! What changes the configuration of streams is carried out here. Invalidations of what hardware
//! caches go to the host: as commands, not as words, so that no bit reaches it that is not one of a
//! field.

use super::apply::Scope;
use super::Smmu;
use crate::spec::smmuv3::command::{AddressRange, Command, SyncSignal, ATC_SIZE_ALL};
use crate::spec::smmuv3::queue::CommandError;
use crate::spec::smmuv3::regs::STALL_NONE;
use crate::spec::smmuv3::StreamId;

/// What is to be done for a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// Nothing: a hint, or a stream that is not here.
    Nothing,
    /// The host does the command.
    Invalidate,
    /// Stream table entries are read anew.
    Configure(Scope),
    /// All before it is complete: say so.
    Sync(SyncSignal),
}

impl Smmu {
    /// What `command` asks for.
    ///
    /// # Errors
    /// The SMMU does not offer it.
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
            // Larger sizes may be refused; of hardware that does, the guest is not to know.
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

    /// `action` if `stream` is here: nobody caches anything of one that is not.
    fn of_stream(&self, stream: StreamId, action: Action) -> Action {
        if self.streams.contains(stream) {
            action
        } else {
            Action::Nothing
        }
    }

    /// `action` if there are such ASIDs: of 8 bits, nothing has a larger one.
    fn of_asid(&self, asid: u16, action: Action) -> Action {
        if self.caps.idr0.asid16() || asid <= u8::MAX.into() {
            action
        } else {
            Action::Nothing
        }
    }

    /// Whether the SMMU takes the fields of `range`. Without IDR3.RIL they are reserved; to ignore
    /// them would leave most of the range stale.
    fn offers_range(&self, range: AddressRange) -> bool {
        (self.caps.idr3.ril() || !range.needs_ril()) && !range.is_reserved()
    }
}

fn offered(offered: bool, action: Action) -> Result<Action, CommandError> {
    offered.then_some(action).ok_or(CommandError::Illegal)
}
