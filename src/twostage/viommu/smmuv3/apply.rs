// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Policies, from the guest's tables to the host, and invalidations.
//!
//! Everything here runs under the model's lock.

use super::policy::{policy_while_disabled, ConfigFault};
use super::requesters::Decision;
use super::state::Registers;
use super::{Smmu, SmmuInvalidateError, StreamPolicy};
use crate::spec::smmuv3::command::{Command, RANGE_ALL};
use crate::spec::smmuv3::StreamId;
use crate::viommu::ledger::{host_refused, Applied, NotApplied};
use crate::viommu::HostSideError;

/// The streams that a CMD_CFGI_STE* names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// All.
    All,
    /// All that equal `stream` except in the low `bits` bits.
    Range { stream: StreamId, bits: u32 },
    /// One.
    One(StreamId),
}

impl Scope {
    /// The scope of a CMD_CFGI_STE_RANGE.
    pub fn range(stream: StreamId, range: u8) -> Self {
        match range {
            0..RANGE_ALL => Self::Range { stream, bits: u32::from(range) + 1 },
            _ => Self::All,
        }
    }

    fn names(self, named: StreamId) -> bool {
        match self {
            Self::All => true,
            // Fewer than 32 bits.
            Self::Range { stream, bits } => (named.0 ^ stream.0) >> bits == 0,
            Self::One(stream) => named == stream,
        }
    }
}

impl Smmu {
    /// Enables translation: every stream has its policy when this returns.
    pub(super) fn enable_translation(&self, registers: &Registers) -> Applied {
        self.streams.set_table(Some(registers.table_registers()));
        self.reevaluate(registers, Scope::All)
    }

    /// Disables translation: every stream follows GBPA. If not all can, all follow the table again,
    /// as CR0ACK says.
    pub(super) fn disable_translation(&self, registers: &Registers) -> Applied {
        if let Err(not_applied) = self.bypass_globally(registers) {
            if registers.cr0ack.smmuen() {
                // What fails once more is given again before a command is complete.
                let _ = self.reevaluate(registers, Scope::All);
            }
            return Err(not_applied);
        }
        self.streams.set_table(None);
        // From here on, none is added (§6.3.9.6).
        self.end_page_requests(None);
        self.end_stalls(None);
        Ok(())
    }

    /// Applies to every stream the policy for disabled translation.
    pub(super) fn bypass_globally(&self, registers: &Registers) -> Applied {
        let mut applied = Ok(());
        for stream in self.streams.all() {
            applied = applied.and(self.give(stream, Ok(policy_while_disabled(registers.gbpa))));
        }
        applied
    }

    /// Stream table entries changed. A wrong one is reported, see [`super::faults`].
    pub(super) fn configure(&self, registers: &Registers, scope: Scope) -> Applied {
        if !self.streams.is_translating() {
            return Ok(());
        }
        let Scope::One(stream) = scope else { return self.reevaluate(registers, scope) };
        let before = self.streams.given(stream);
        self.reevaluate(registers, scope)?;
        let given = self.streams.given(stream);
        match given.map(|given| given.decision) {
            Some(Err(fault)) if !fault.off && given != before => {
                self.record_event(fault.record(stream));
            }
            _ => {}
        }
        Ok(())
    }

    /// Reads the stream table again for the streams that `scope` names, and gives changes to the
    /// host. Afterwards nothing of their configuration, context descriptors included, is cached.
    pub(super) fn reevaluate(&self, registers: &Registers, scope: Scope) -> Applied {
        self.counters.evaluations.count();
        let table = self.stream_table(registers.table_registers());
        let mut applied = Ok(());
        let mut unchanged = Vec::new();
        for stream in self.streams.all() {
            if !scope.names(stream) {
                continue;
            }
            self.check_halted()?;
            let decision = table.policy(stream);
            if self.streams.has(stream, decision) {
                if matches!(decision, Ok(StreamPolicy::Stage1 { .. })) {
                    unchanged.push(Command::CfgiCdAll { stream });
                }
            } else {
                applied = applied.and(self.give(stream, decision));
            }
        }
        // Even if others failed: the guest may never repeat this for these.
        match self.invalidate_host(&unchanged) {
            // For commands that the guest did not issue, it need not be told.
            Err(error) if !error.flushed => Err(NotApplied::Host),
            _ => applied,
        }
    }

    /// Gives the host again what it lost because an invalidation failed, and what it refused
    /// without even blocking the stream. A guest that only invalidates does not ask for the lost
    /// policies, and a failed command may never be repeated: but nothing is complete while a stream
    /// has a mapping that the guest revoked.
    pub(super) fn reapply(&self, registers: &Registers) -> Applied {
        if !self.streams.has_unapplied() {
            return Ok(());
        }
        let losses = self.streams.losses();
        let table = self.stream_table(registers.table_registers());
        let mut applied = Ok(());
        for stream in self.streams.unapplied() {
            self.check_halted()?;
            let decision = if self.streams.is_translating() {
                table.policy(stream)
            } else {
                Ok(policy_while_disabled(registers.gbpa))
            };
            applied = applied.and(self.give(stream, decision));
        }
        applied?;
        self.streams.set_reapplied(losses);
        Ok(())
    }

    /// Gives `decision` to the host unless it has it. If the host refuses, the stream is blocked,
    /// and each of its transactions is a C_BAD_STE: the entry asks for something unsupported.
    pub(super) fn give(&self, stream: StreamId, decision: Decision) -> Applied {
        self.try_give(stream, decision).or_else(|error| self.host_failed(&error))
    }

    /// The same, with the host's error, which is not logged yet.
    pub(super) fn try_give(
        &self,
        stream: StreamId,
        decision: Decision,
    ) -> Result<(), HostSideError> {
        let policy = decision.unwrap_or(StreamPolicy::Abort);
        let configure = || self.host.configure(stream, &policy);
        let given = self.streams.give(stream, decision, Err(ConfigFault::BAD_STE), configure);
        let Some(result) = given else { return Ok(()) };
        self.policy_given(stream, &policy, &result);
        result.inspect_err(|error| {
            if error.still_reachable {
                self.streams.set_unapplied();
            }
        })
    }

    /// Counts and shows what the host was given.
    pub(super) fn policy_given(
        &self,
        stream: StreamId,
        policy: &StreamPolicy,
        result: &Result<(), HostSideError>,
    ) {
        self.counters.policies.count();
        if let Some(observer) = &self.observer {
            observer.stream_policy(stream, policy, result.is_ok());
        }
    }

    /// Gives a batch to the host, unless it is empty.
    ///
    /// # Errors
    /// The host refused something; it is counted and logged.
    pub(super) fn invalidate_host(&self, batch: &[Command]) -> Result<(), SmmuInvalidateError> {
        if batch.is_empty() {
            return Ok(());
        }
        self.counters.batches.count();
        self.counters.invalidations.add(batch.len() as u64);
        self.host.invalidate(batch).inspect_err(|error| {
            if error.done {
                self.log.warn(format_args!("SMMUv3: CMD_ATC_INV: {}", error.error));
                return;
            }
            if !error.flushed {
                // What the host blocked because of it is given again at the next occasion.
                self.streams.unapply_all();
            }
            // A failed invalidation is never acknowledged, whatever happened to its streams.
            let _ = self.host_failed(&error.error);
        })
    }

    /// See [`host_refused`].
    pub(super) fn host_failed(&self, error: &HostSideError) -> Applied {
        host_refused("SMMUv3", &self.counters.host_errors, &self.log, error)
    }

    /// Aborts long operations when the SMMU is halted.
    pub(super) fn check_halted(&self) -> Applied {
        if self.is_halted() {
            return Err(NotApplied::Halted);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_names_streams() {
        let of = |scope: Scope| [0x100, 0x107, 0x108, 0x200].map(|id| scope.names(StreamId(id)));
        assert_eq!(of(Scope::All), [true; 4]);
        assert_eq!(of(Scope::range(StreamId(0x105), 31)), [true; 4]);
        assert_eq!(of(Scope::range(StreamId(0x105), 2)), [true, true, false, false]);
        assert_eq!(of(Scope::range(StreamId(0x105), 0)), [false; 4]);
        assert_eq!(of(Scope::range(StreamId(0xffff_ffff), 30)), [false; 4]);
        assert_eq!(of(Scope::One(StreamId(0x107))), [false, true, false, false]);
    }
}
