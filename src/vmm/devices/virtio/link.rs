// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! State shared by the transport and the worker of a device; neither waits for the other.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU8, Ordering};
use std::sync::Arc;

use serde_json::Value;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::devices::RequestGate;
use crate::pci::Msix;
use crate::trace::Trace;
use crate::{Error, Result};
use twostage::counters::Counter;
use twostage::ratelimit::RateLimit;

/// The "no vector" value (virtio 1.3 §4.1.4.3).
pub const NO_VECTOR: u16 = 0xffff;
/// Interrupt status: a queue was used (§4.1.4.5).
const ISR_QUEUE: u8 = 1;
/// Interrupt status: the configuration changed.
const ISR_CONFIGURATION: u8 = 2;

/// Request statistics of a device. Each counter is read on its own; together they are not a
/// snapshot.
#[derive(Debug, Default)]
pub struct RequestCounters {
    /// Requests served: chains taken one by one, and frames received.
    pub done: Counter,
    /// Requests that failed because a buffer could not be accessed.
    pub unreachable: Counter,
}

twostage::counters! {
    /// Traffic between a virtqueue's driver and its device: shows who waits for whom when a guest
    /// waits for a device.
    #[derive(serde::Serialize)]
    pub struct QueueReport;
    /// The same while they are counted.
    running pub struct QueueCounters of Counter {
        /// Notifications to the device.
        notified,
        /// Chains that the device returned.
        used,
        /// Interrupts of the device; a masked one stays pending.
        interrupts,
    }
}

/// State shared by the transport and the worker of a device.
pub struct Link {
    name: String,
    /// The vectors' messages.
    pub msix: Msix,
    /// The gate of the device's requests.
    pub gate: Arc<RequestGate>,
    /// Request statistics of the device.
    pub counters: Arc<RequestCounters>,
    /// Queue statistics, in queue order.
    pub queue_counters: Vec<QueueCounters>,
    /// Signalled when a queue has something new, by the guest or by the device itself.
    queue_events: Vec<EventFd>,
    queue_vectors: Vec<AtomicU16>,
    config_vector: AtomicU16,
    isr: AtomicU8,
    needs_reset: AtomicBool,
    driver_ok: AtomicBool,
    mistakes: RateLimit,
    trace: Option<Arc<Trace>>,
}

impl Link {
    /// The link of a device with `queues` queues that interrupts through `msix` and makes requests
    /// through `gate`; `name` is used in logs and `trace`.
    ///
    /// # Errors
    /// The process is out of file descriptors.
    pub fn new(
        name: String,
        queues: usize,
        msix: Msix,
        gate: Arc<RequestGate>,
        trace: Option<Arc<Trace>>,
    ) -> Result<Self> {
        let event = |_| EventFd::new(EFD_NONBLOCK).map_err(Error::os("creating an event"));
        Ok(Self {
            name,
            msix,
            gate,
            counters: Arc::default(),
            queue_counters: (0..queues).map(|_| QueueCounters::default()).collect(),
            queue_events: (0..queues).map(event).collect::<Result<_>>()?,
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            config_vector: AtomicU16::new(NO_VECTOR),
            isr: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            driver_ok: AtomicBool::new(false),
            mistakes: RateLimit::default(),
            trace,
        })
    }

    /// Traces an event at queue `number`.
    pub fn trace(&self, event: &str, number: usize, args: impl FnOnce() -> Value) {
        if let Some(trace) = &self.trace {
            let mut args = args();
            args["device"] = self.name.as_str().into();
            args["queue"] = number.into();
            trace.instant("device", event, args);
        }
    }

    /// The name of the device.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The queue events, in queue order.
    pub fn queue_events(&self) -> &[EventFd] {
        &self.queue_events
    }

    /// Increments a counter of queue `number`, if there is such a queue.
    pub fn count(&self, number: usize, which: impl FnOnce(&QueueCounters) -> &Counter) {
        if let Some(counters) = self.queue_counters.get(number) {
            which(counters).count();
        }
    }

    /// Notifies the worker of queue `number`.
    pub fn notify(&self, number: usize) {
        if let Some(event) = self.queue_events.get(number) {
            // It fails only after 2^64 - 2 writes without a read: the worker will look anyway.
            let _ = event.write(1);
        }
    }

    /// Notifies the worker of every queue.
    pub fn notify_all(&self) {
        (0..self.queue_events.len()).for_each(|number| self.notify(number));
    }

    /// Interrupts the driver: queue `number` has used buffers.
    pub fn queue_used(&self, number: usize) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::SeqCst);
        self.count(number, |queue| &queue.interrupts);
        if let Some(vector) = self.queue_vectors.get(number) {
            self.send(vector.load(Ordering::SeqCst));
        }
    }

    /// The device cannot continue until it is reset (§2.1.2); the driver is notified if it is
    /// ready for that.
    pub fn set_needs_reset(&self, why: &dyn fmt::Display) {
        self.mistake(why);
        self.needs_reset.store(true, Ordering::SeqCst);
        if self.driver_ok.load(Ordering::SeqCst) {
            self.isr.fetch_or(ISR_CONFIGURATION, Ordering::SeqCst);
            self.send(self.config_vector.load(Ordering::SeqCst));
        }
    }

    /// Whether the device needs a reset.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// Logs a mistake of the driver.
    pub fn mistake(&self, what: &dyn fmt::Display) {
        self.mistakes.warn(format_args!("{}: {what}", self.name));
    }

    /// The driver becomes ready, or stops being ready.
    pub fn set_driver_ok(&self, ok: bool) {
        self.driver_ok.store(ok, Ordering::SeqCst);
    }

    /// The function may make requests, or may not any more: then no request or message is
    /// outstanding when this returns. When it may again, no queue is looked at for that: it may
    /// belong to a former driver, whose rings are gone.
    pub fn set_bus_master(&self, allowed: bool) {
        self.gate.set_bus_master(allowed);
        // Messages are requests, too.
        self.msix.set_bus_master(allowed);
    }

    /// Reads the interrupt status, and clears it.
    pub fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }

    /// The vector of configuration changes.
    pub fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::SeqCst)
    }

    /// Sets the vector of configuration changes; a vector that does not exist becomes none.
    pub fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.existing(vector), Ordering::SeqCst);
    }

    /// The vector of queue `number`.
    pub fn queue_vector(&self, number: usize) -> u16 {
        self.queue_vectors.get(number).map_or(NO_VECTOR, |vector| vector.load(Ordering::SeqCst))
    }

    /// Sets the vector of queue `number`; a vector that does not exist becomes none.
    pub fn set_queue_vector(&self, number: usize, vector: u16) {
        if let Some(place) = self.queue_vectors.get(number) {
            place.store(self.existing(vector), Ordering::SeqCst);
        }
    }

    /// Resets it to its initial state. The worker must have stopped.
    pub fn reset(&self) {
        self.needs_reset.store(false, Ordering::SeqCst);
        self.driver_ok.store(false, Ordering::SeqCst);
        self.isr.store(0, Ordering::SeqCst);
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
    }

    fn existing(&self, vector: u16) -> u16 {
        match usize::from(vector) < self.msix.len() {
            true => vector,
            false => NO_VECTOR,
        }
    }

    fn send(&self, vector: u16) {
        if vector != NO_VECTOR {
            self.msix.trigger(vector);
        }
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("name", &self.name)
            .field("needs_reset", &self.needs_reset)
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_queue_is_looked_at_because_requests_are_allowed() {
        let gate = Arc::<RequestGate>::default();
        gate.start();
        let link = Link::new("test".into(), 3, Msix::new(Vec::new()), gate.clone(), None).unwrap();
        let heard = || link.queue_events().iter().map(|e| e.read().is_ok()).collect::<Vec<_>>();
        for _ in 0..2 {
            link.set_bus_master(true);
            assert_eq!(heard(), [false; 3]);
            link.set_bus_master(false);
        }
    }
}
