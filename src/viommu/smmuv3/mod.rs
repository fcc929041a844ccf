// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtual Arm SMMUv3.

mod host_side;

pub use host_side::{
    EventRecordWords, EventTarget, RawCommand, SmmuHostSide, SmmuInvalidateError, StreamPolicy,
};
