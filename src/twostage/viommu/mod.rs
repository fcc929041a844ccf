// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest-facing virtual IOMMUs: registers, queues, tables and faults.
//!
//! A model here uses guest memory ([`TableMemory`]), a sink for interrupts ([`InterruptSink`];
//! [`smmuv3::SmmuInterrupts`]) and a small trait for what is behind it ([`vtd::HostSide`];
//! [`smmuv3::SmmuHostSide`]). It knows neither file descriptors nor KVM. A pure function derives a
//! policy from guest tables, the policy is applied to the host, and only then is it acknowledged to
//! the guest.
//!
//! Files of the same name in both models' folders do the same, and can be read side by side:
//! `registers` and `control` (what a register write sets off), `queue`, `actions` (what is done for
//! each descriptor or command), `invalidate`, `policy` (from tables), `apply` and `requesters` (to
//! the host), `faults` (back to the guest), `config`, `caps`, `host_unit` (what hosts can serve),
//! `host_side`, `counters`, `state`. What is the same protocol is in `ledger`.

mod conflict;
mod fair_mutex;
mod host_side;
mod interrupts;
mod ledger;
mod memory;
mod observer;
mod register_slot;
mod requester;
pub mod smmuv3;
#[cfg(test)]
mod testing;
pub mod vtd;

pub use conflict::CapabilityConflict;
pub use host_side::HostSideError;
pub use interrupts::{InterruptListener, InterruptRemapper, InterruptSink, MsiMessage};
pub use memory::{BadAddress, TableMemory};
pub use observer::{FaultOutcome, Observer, RegisterAccess};
pub use requester::Requester;
