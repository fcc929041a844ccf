// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest-facing virtual IOMMUs: registers, queues, tables and faults.
//!
//! A model here knows guest memory ([`TableMemory`]), a place to send interrupts
//! ([`InterruptSink`]; [`smmuv3::SmmuInterrupts`]) and the small trait of what is behind it
//! ([`HostSide`]; [`smmuv3::SmmuHostSide`]). It never sees a file descriptor and never KVM. A pure
//! function decides a policy from guest tables, the policy is applied to the host, and only then
//! does the guest see it acknowledged.

mod conflict;
mod host_side;
mod in_turn;
mod interrupts;
mod memory;
mod observer;
mod policy;
mod register_slot;
pub mod smmuv3;
#[cfg(test)]
mod testing;
pub mod vtd;

pub use conflict::CapabilityConflict;
pub use host_side::{DmaFault, FaultTarget, HostSide, HostSideError, Progress};
pub use interrupts::{InterruptListener, InterruptRemapper, InterruptSink, MsiMessage};
pub use memory::{BadAddress, TableMemory};
pub use observer::{FaultOutcome, Observer, RegisterAccess};
pub use policy::{
    DomainTag, Invalidation, Policy, Requester, RequesterConfig, Stage1, VtdFirstStage,
    VtdSecondStage,
};
