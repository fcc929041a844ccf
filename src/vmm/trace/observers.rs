// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is traced: host calls, virtual IOMMUs, message-signalled interrupts.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{json, Value};

use super::Trace;
use crate::iommufd::{ObjectId, Verb, VerbObserver};
use crate::spec::pci::Bdf;
use crate::viommu::{
    DmaFault, FaultOutcome, InterruptSink, MsiMessage, Observer, RegisterAccess, Requester,
    RequesterConfig,
};

impl VerbObserver for Trace {
    fn called(
        &self,
        verb: Verb,
        object: Option<ObjectId>,
        started: Instant,
        duration: Duration,
        error: Option<&dyn fmt::Display>,
    ) {
        let args = json!({
            "object": object.map(|id| id.0),
            "error": error.map(ToString::to_string),
        });
        self.complete("host", verb.name(), started, duration, args);
    }
}

/// Interrupts on their way to `inner`, traced.
pub(in crate::vmm) struct TracedInterrupts {
    pub inner: Arc<dyn InterruptSink>,
    pub trace: Arc<Trace>,
}

impl InterruptSink for TracedInterrupts {
    fn send_msi(&self, address: u64, data: u32) {
        let args = json!({ "address": format!("{address:#x}"), "data": format!("{data:#x}") });
        self.trace.instant("interrupt", "MSI", args);
        self.inner.send_msi(address, data);
    }
}

/// What a virtual IOMMU does, traced under its id.
pub(in crate::vmm) struct TracedIommu {
    pub trace: Arc<Trace>,
    pub id: String,
}

impl TracedIommu {
    fn instant(&self, category: &'static str, name: &str, mut args: Value) {
        args["iommu"] = self.id.as_str().into();
        self.trace.instant(category, name, args);
    }
}

impl Observer for TracedIommu {
    fn register(&self, access: &RegisterAccess) {
        let name = if access.write { "write" } else { "read" };
        let args = json!({
            "offset": format!("{:#x}", access.offset),
            "size": access.size,
            "value": format!("{:#x}", access.value),
        });
        self.instant("register", &format!("{name} {}", access.name), args);
    }

    fn descriptor(&self, name: &'static str, descriptor: &dyn fmt::Debug) {
        self.instant("descriptor", name, json!({ "descriptor": format!("{descriptor:?}") }));
    }

    fn policy(&self, requester: Requester, config: &RequesterConfig, applied: bool) {
        let args = json!({ "config": format!("{config:?}"), "applied": applied });
        self.instant("policy", &requester.to_string(), args);
    }

    fn fault(&self, fault: &DmaFault, reason: u8, outcome: FaultOutcome) {
        let args = json!({
            "address": format!("{:#x}", fault.address),
            "write": fault.write,
            "stage2": fault.stage2,
            "reason": format!("{reason:#x}"),
            "outcome": format!("{outcome:?}"),
        });
        self.instant("fault", &fault.requester.to_string(), args);
    }

    fn interrupt_fault(&self, source: Bdf, message: MsiMessage, reason: u8, outcome: FaultOutcome) {
        let args = json!({
            "address": format!("{:#x}", message.address),
            "data": format!("{:#x}", message.data),
            "reason": format!("{reason:#x}"),
            "outcome": format!("{outcome:?}"),
        });
        self.instant("interrupt fault", &source.to_string(), args);
    }
}
