// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an interrupt's message says, in words.

use serde_json::{json, Value};

use crate::viommu::MsiMessage;

/// `message` as it was written: its data is the number of the event, which the interrupt translation
/// service looks up by who sends it.
pub(in crate::vmm) fn decoded(message: MsiMessage) -> Value {
    let MsiMessage { address, data } = message;
    json!({ "address": format!("{address:#x}"), "event": data })
}
