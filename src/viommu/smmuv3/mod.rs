// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtual Arm SMMUv3.

mod caps;
mod config;
mod host_side;
#[cfg_attr(not(test), expect(dead_code, reason = "the model that asks it comes next"))]
mod policy;

pub use caps::{Capabilities, HostSmmu};
pub use config::{SmmuConfig, SmmuConfigError};
pub use host_side::{
    EventRecordWords, EventTarget, RawCommand, SmmuHostSide, SmmuInvalidateError, StreamPolicy,
};
