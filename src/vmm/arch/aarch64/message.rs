// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Decodes interrupt messages for traces.

use serde_json::{json, Value};

use twostage::viommu::MsiMessage;

/// `message` as it was written: its data is the event number, which the interrupt translation
/// service looks up by the sender's device ID.
pub(crate) fn decoded(message: MsiMessage) -> Value {
    let MsiMessage { address, data } = message;
    json!({ "address": format!("{address:#x}"), "event": data })
}
