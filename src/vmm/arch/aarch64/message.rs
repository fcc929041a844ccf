// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an interrupt's message says, in words.

use serde_json::{json, Value};

use twostage::viommu::MsiMessage;

/// `message` as it was written: its data is the number of the event, which the interrupt
/// translation service looks up by who sends it.
pub(crate) fn decoded(message: MsiMessage) -> Value {
    let MsiMessage { address, data } = message;
    json!({ "address": format!("{address:#x}"), "event": data })
}
