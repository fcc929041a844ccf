// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sources of events: host calls, virtual IOMMUs, remapped interrupts, a device's DMA.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{json, Value};

use super::{decoded, Trace};
use crate::arch::exits::{ExitKind, ExitObserver};
use crate::devices::{DmaError, DmaMaster, ServiceControl, Services};
use twostage::iommufd::{ObjectId, Verb, VerbObserver};
use twostage::spec::pci::{Bdf, Pasid};
use twostage::spec::smmuv3::event::{EventId, EventRecord};
use twostage::spec::smmuv3::StreamId;
use twostage::spec::vtd::fault::FaultReason;
use twostage::viommu::smmuv3::StreamPolicy;
use twostage::viommu::vtd::{DmaFault, RequesterConfig};
use twostage::viommu::{
    FaultOutcome, InterruptSink, MsiMessage, Observer, RegisterAccess, Requester,
};

impl VerbObserver for Trace {
    fn called(
        &self,
        verb: Verb,
        objects: &[ObjectId],
        started: Instant,
        duration: Duration,
        error: Option<&dyn fmt::Display>,
    ) {
        self.complete("host", verb.name(), started, duration, call(objects, error));
    }
}

impl ExitObserver for Trace {
    fn served(&self, kind: ExitKind, address: u64, bytes: usize, started: Instant) {
        let args = json!({ "address": format!("{address:#x}"), "bytes": bytes });
        self.complete("exit", kind.name(), started, started.elapsed(), args);
    }
}

/// Traces the calls of an emulated host beside the kernel's, whose objects have the same numbers.
pub(crate) struct EmulatedCalls(pub Arc<Trace>);

impl VerbObserver for EmulatedCalls {
    fn called(
        &self,
        verb: Verb,
        objects: &[ObjectId],
        started: Instant,
        duration: Duration,
        error: Option<&dyn fmt::Display>,
    ) {
        self.0.complete("emulated host", verb.name(), started, duration, call(objects, error));
    }
}

fn call(objects: &[ObjectId], error: Option<&dyn fmt::Display>) -> Value {
    json!({
        "objects": objects.iter().map(|id| id.0).collect::<Vec<_>>(),
        "error": error.map(ToString::to_string),
    })
}

/// The fields of `what` in one line, with hexadecimal numbers.
fn fields(what: &dyn fmt::Debug) -> String {
    let lines = format!("{what:#x?}");
    let line = lines.split_whitespace().collect::<Vec<_>>().join(" ");
    line.replace("( ", "(").replace(", )", ")").replace(", }", " }")
}

/// Traces remapped interrupts on their way to `inner`.
pub(crate) struct TracedInterrupts {
    pub inner: Arc<dyn InterruptSink>,
    pub trace: Arc<Trace>,
}

impl InterruptSink for TracedInterrupts {
    fn send_msi(&self, address: u64, data: u32) {
        self.trace.instant("interrupt", "MSI", decoded(MsiMessage { address, data }));
        self.inner.send_msi(address, data);
    }
}

/// The observer of a virtual IOMMU: the trace, if there is one, under its id.
pub(crate) struct IommuObserver {
    pub id: String,
    pub trace: Option<Arc<Trace>>,
    /// Called when the guest disables translation.
    pub disabling: Box<dyn Fn() + Send + Sync>,
}

impl IommuObserver {
    fn instant(
        &self,
        category: &'static str,
        name: impl fmt::Display,
        args: impl FnOnce() -> Value,
    ) {
        let Some(trace) = &self.trace else { return };
        let mut args = args();
        args["iommu"] = self.id.as_str().into();
        trace.instant(category, &name.to_string(), args);
    }
}

impl Observer for IommuObserver {
    fn register(&self, access: &RegisterAccess) {
        let name = if access.write { "write" } else { "read" };
        self.instant("register", format_args!("{name} {}", access.name), || {
            json!({
                "offset": format!("{:#x}", access.offset),
                "size": access.size,
                "value": format!("{:#x}", access.value),
            })
        });
    }

    fn disabling_translation(&self) {
        (self.disabling)();
    }

    fn descriptor(&self, name: &'static str, descriptor: &dyn fmt::Debug) {
        self.instant("descriptor", name, || json!({ "descriptor": fields(descriptor) }));
    }

    fn policy(&self, requester: Requester, config: &RequesterConfig, applied: bool) {
        let args = || json!({ "config": fields(config), "applied": applied });
        self.instant("policy", requester, args);
    }

    fn stream_policy(&self, stream: StreamId, policy: &StreamPolicy, applied: bool) {
        let args = || json!({ "policy": fields(policy), "applied": applied });
        self.instant("policy", stream, args);
    }

    fn event(&self, record: &EventRecord, outcome: FaultOutcome) {
        self.instant("fault", record.stream(), || {
            json!({
                "event": record.id().map(EventId::name),
                "substream": record.substream().map(Pasid::raw),
                "record": record.to_words().map(|word| format!("{word:#x}")),
                "outcome": format!("{outcome:?}"),
            })
        });
    }

    fn fault(&self, fault: &DmaFault, reason: Option<FaultReason>, outcome: FaultOutcome) {
        self.instant("fault", fault.requester, || {
            json!({
                "address": format!("{:#x}", fault.address),
                "write": fault.write,
                "stage2": fault.stage2,
                "reason": reason.map(|reason| format!("{:#x}", reason.code())),
                "outcome": format!("{outcome:?}"),
            })
        });
    }

    fn interrupt_fault(
        &self,
        source: Bdf,
        message: MsiMessage,
        reason: FaultReason,
        outcome: FaultOutcome,
    ) {
        self.instant("interrupt fault", source, || {
            let mut args = decoded(message);
            args["reason"] = format!("{:#x}", reason.code()).into();
            args["outcome"] = format!("{outcome:?}").into();
            args
        });
    }
}

/// Traces a device's memory requests on their way to `inner`.
pub(crate) struct TracedDma {
    pub inner: Box<dyn DmaMaster>,
    pub trace: Arc<Trace>,
    pub name: String,
}

impl TracedDma {
    fn done(
        &self,
        name: &str,
        started: Instant,
        (pasid, iova, length): (Option<Pasid>, u64, usize),
        result: &Result<(), DmaError>,
    ) {
        let args = json!({
            "device": self.name,
            "pasid": pasid.map(Pasid::raw),
            "address": format!("{iova:#x}"),
            "length": length,
            "failed_at": result.as_ref().err().map(|error| format!("{:#x}", error.address)),
        });
        self.trace.complete("device", name, started, started.elapsed(), args);
    }
}

impl DmaMaster for TracedDma {
    fn read(&mut self, pasid: Option<Pasid>, iova: u64, data: &mut [u8]) -> Result<(), DmaError> {
        let started = Instant::now();
        let result = self.inner.read(pasid, iova, data);
        self.done("DMA read", started, (pasid, iova, data.len()), &result);
        result
    }

    fn write(&mut self, pasid: Option<Pasid>, iova: u64, data: &[u8]) -> Result<(), DmaError> {
        let started = Instant::now();
        let result = self.inner.write(pasid, iova, data);
        self.done("DMA write", started, (pasid, iova, data.len()), &result);
        result
    }

    fn set_services(&mut self, services: Services) {
        self.inner.set_services(services);
    }

    fn service_control(&self) -> Option<Arc<dyn ServiceControl>> {
        self.inner.service_control()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_in_one_line_and_hexadecimal() {
        #[derive(Debug)]
        struct Wait {
            _status: Option<(u64, u32)>,
            _fence: bool,
        }
        let wait = Wait { _status: Some((0x1240_f00c, 10)), _fence: true };
        assert_eq!(fields(&wait), "Wait { _status: Some((0x1240f00c, 0xa)), _fence: true }");
    }
}
