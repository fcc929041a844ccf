// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest-facing virtual IOMMUs: registers, queues, tables and faults.
//!
//! A model here uses guest memory ([`TableMemory`]), a sink for interrupts ([`InterruptSink`];
//! [`smmuv3::SmmuInterrupts`]) and a small trait for what is behind it ([`vtd::VtdHostSide`];
//! [`smmuv3::SmmuHostSide`]). It knows neither file descriptors nor KVM. A pure function derives a
//! policy from guest tables, the policy is applied to the host, and only then is it acknowledged to
//! the guest.
//!
//! Files of the same name in both models' folders do the same, and can be read side by side:
//! `registers` and `control` (what a register write sets off), `page` (registers as memory of the
//! guest), `queue` (and what is done for each descriptor or command), `policy` (from tables),
//! `apply` and `requesters` (to the host), `faults` and `fault_log` (back to the guest),
//! `page_requests` (and the responses), `config`, `host_unit` (what hosts can serve), `host_side`,
//! `state` (and statistics), `restore` (and snapshot, and reset). What is the same protocol is in
//! `ledger`, `paged` and `register_page`. [`routes`] is for VMMs whose hypervisor sends remapped
//! messages by itself; [`bridges`] for those that have functions behind bridges.

/// Setters of a configuration, to be called in a chain: `with_x x: T` sets the field `x`.
// For the packages here, so not documented.
#[doc(hidden)]
#[macro_export]
macro_rules! setters {
    ($($with:ident $field:ident: $type:ty;)*) => {$(
        #[doc = concat!("Sets [`Self::", stringify!($field), "`].")]
        #[must_use]
        pub fn $with(mut self, $field: $type) -> Self {
            self.$field = $field;
            self
        }
    )*};
}

mod ahead;
pub mod bridges;
mod host_side;
mod ledger;
mod machine;
mod observer;
mod paged;
mod register_page;
mod registers;
mod restore;
pub mod routes;
pub mod smmuv3;
#[cfg(test)]
mod testing;
pub mod vtd;

pub use host_side::{CapabilityConflict, HostSideError, IntersectError, PageTicket, Requester};
pub use machine::{
    BadAddress, InterruptListener, InterruptRemapper, InterruptSink, MsiMessage, TableMemory,
};
pub use observer::{FaultOutcome, Observer, RegisterAccess};
pub use paged::{Look, PagedRegisters};
pub use register_page::{PageLender, Recall, RegisterPage, PAGE_SIZE};
pub use restore::{RestoreError, SnapshotError};
