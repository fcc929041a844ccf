// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Emulated devices, and how they reach memory.

pub(crate) mod debug_exit;
pub mod edu;
mod requests;
mod services;
#[cfg(feature = "test-support")]
pub mod threadless;
pub mod virtio;

pub use requests::{
    DirectMemory, DmaError, DmaMaster, MessageWrites, NotNow, Permit, RequestGate, ServiceControl,
    Services,
};
pub use services::{HostServices, OfferedServices, ServiceCapabilities, ServiceListener};
