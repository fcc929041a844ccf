// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the transport and the worker of a device share, without waiting for each other.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, AtomicU8, Ordering};
use std::sync::Arc;

use serde_json::Value;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::devices::RequestGate;
use crate::pci::Msix;
use crate::trace::Trace;
use crate::{Error, Result};
use twostage::ratelimit::RateLimit;

/// The vector that is none (virtio 1.3 §4.1.4.3).
pub const NO_VECTOR: u16 = 0xffff;
/// Interrupt status: a queue was used (§4.1.4.5).
const ISR_QUEUE: u8 = 1;
/// Interrupt status: the configuration changed.
const ISR_CONFIGURATION: u8 = 2;

/// A count that one thread adds to and others read.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// One more.
    pub fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// How many there were.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Requests of a device. Reads are of each number alone, not of one moment.
#[derive(Debug, Default)]
pub struct RequestCounters {
    /// Requests that were served: chains that were taken one by one, and frames that came in.
    pub done: Count,
    /// Requests that failed because a buffer could not be reached.
    pub unreachable: Count,
}

/// What passed between a queue's driver and the device. As [`RequestCounters`] otherwise.
#[derive(Debug, Default)]
pub struct QueueCounters {
    /// Times the worker was told that there is something new.
    pub notified: Count,
    /// Chains that were given back to the driver.
    pub used: Count,
    /// Interrupts that were asked for; a masked one waits.
    pub interrupts: Count,
}

/// What the transport and the worker of a device share.
pub struct Link {
    name: String,
    /// The vectors' messages.
    pub msix: Msix,
    /// What the device's requests pass.
    pub gate: Arc<RequestGate>,
    /// Requests of the device.
    pub counters: Arc<RequestCounters>,
    /// The queues, in their order.
    pub queue_counters: Vec<QueueCounters>,
    /// Written when a queue has something new: by the guest, or by the device itself.
    queue_events: Vec<EventFd>,
    /// Queues that have something new which the device may not look at yet.
    held_back: Vec<AtomicBool>,
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
    /// through `gate`; `name` is for log lines and `trace`.
    ///
    /// # Errors
    /// When the system has no file descriptors left.
    pub fn new(
        name: String,
        queues: usize,
        msix: Msix,
        gate: Arc<RequestGate>,
        trace: Option<Arc<Trace>>,
    ) -> Result<Self> {
        let event = |_| EventFd::new(EFD_NONBLOCK).map_err(Error::os("making an event"));
        Ok(Self {
            name,
            msix,
            gate,
            counters: Arc::default(),
            queue_counters: (0..queues).map(|_| QueueCounters::default()).collect(),
            queue_events: (0..queues).map(event).collect::<Result<_>>()?,
            held_back: (0..queues).map(|_| AtomicBool::new(false)).collect(),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            config_vector: AtomicU16::new(NO_VECTOR),
            isr: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            driver_ok: AtomicBool::new(false),
            mistakes: RateLimit::default(),
            trace,
        })
    }

    /// Traces what happened at queue `number`.
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

    /// The events of the queues, in their order.
    pub fn queue_events(&self) -> &[EventFd] {
        &self.queue_events
    }

    /// Counts for queue `number`, if there is one.
    pub fn count(&self, number: usize, which: impl FnOnce(&QueueCounters) -> &Count) {
        if let Some(counters) = self.queue_counters.get(number) {
            which(counters).add();
        }
    }

    /// Tells the worker that queue `number` has something new.
    pub fn notify(&self, number: usize) {
        if let Some(event) = self.queue_events.get(number) {
            // It fails only when the event has been written 2^64 - 2 times and not read: the
            // worker will look anyway.
            let _ = event.write(1);
        }
    }

    /// Tells the worker to look at every queue.
    pub fn notify_all(&self) {
        (0..self.queue_events.len()).for_each(|number| self.notify(number));
    }

    /// Interrupts the driver: queue `number` was used.
    pub fn queue_used(&self, number: usize) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::SeqCst);
        self.count(number, |queue| &queue.interrupts);
        if let Some(vector) = self.queue_vectors.get(number) {
            self.send(vector.load(Ordering::SeqCst));
        }
    }

    /// The device cannot go on until it is reset (§2.1.2); the driver is told if it is ready for
    /// that.
    pub fn set_needs_reset(&self, why: &dyn fmt::Display) {
        self.mistake(why);
        self.needs_reset.store(true, Ordering::SeqCst);
        if self.driver_ok.load(Ordering::SeqCst) {
            self.isr.fetch_or(ISR_CONFIGURATION, Ordering::SeqCst);
            self.send(self.config_vector.load(Ordering::SeqCst));
        }
    }

    /// Whether the device cannot go on until it is reset.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// Logs what the driver did wrong.
    pub fn mistake(&self, what: &dyn fmt::Display) {
        self.mistakes.warn(format_args!("{}: {what}", self.name));
    }

    /// The driver is ready, or not any more.
    pub fn set_driver_ok(&self, ok: bool) {
        self.driver_ok.store(ok, Ordering::SeqCst);
    }

    /// The function may make requests of its own, or not any more: then none is made, nor a message
    /// sent, when this returns. When it may again, only what was held back meanwhile is looked at:
    /// queues that nobody spoke of may be a former driver's, which are no memory now.
    pub fn set_bus_master(&self, allowed: bool) {
        let changed = self.gate.set_bus_master(allowed);
        // Messages are requests too.
        self.msix.set_bus_master(allowed);
        if changed && allowed {
            for (number, held_back) in self.held_back.iter().enumerate() {
                if held_back.swap(false, Ordering::SeqCst) {
                    self.notify(number);
                }
            }
        }
    }

    /// Queue `number` has something that the device may not look at now: it is told to when it may.
    pub fn hold_back(&self, number: usize) {
        if let Some(held_back) = self.held_back.get(number) {
            held_back.store(true, Ordering::SeqCst);
            // It may be allowed by now, and whoever allowed it have looked before the store.
            if self.gate.is_open() && held_back.swap(false, Ordering::SeqCst) {
                self.notify(number);
            }
        }
    }

    /// Reads the interrupt status, and clears it.
    pub fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }

    /// The vector of configuration changes.
    pub fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::SeqCst)
    }

    /// Sets the vector of configuration changes; one that is not there becomes none.
    pub fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.existing(vector), Ordering::SeqCst);
    }

    /// The vector of queue `number`.
    pub fn queue_vector(&self, number: usize) -> u16 {
        self.queue_vectors.get(number).map_or(NO_VECTOR, |vector| vector.load(Ordering::SeqCst))
    }

    /// Sets the vector of queue `number`; one that is not there becomes none.
    pub fn set_queue_vector(&self, number: usize, vector: u16) {
        if let Some(place) = self.queue_vectors.get(number) {
            place.store(self.existing(vector), Ordering::SeqCst);
        }
    }

    /// Back to how it was made. The worker must have stopped.
    pub fn reset(&self) {
        self.needs_reset.store(false, Ordering::SeqCst);
        self.driver_ok.store(false, Ordering::SeqCst);
        self.isr.store(0, Ordering::SeqCst);
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        for held_back in &self.held_back {
            held_back.store(false, Ordering::SeqCst);
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
    fn only_what_was_held_back_is_looked_at_when_requests_are_allowed() {
        let gate = Arc::<RequestGate>::default();
        gate.start();
        let link = Link::new("test".into(), 3, Msix::new(Vec::new()), gate.clone(), None).unwrap();
        let heard = || link.queue_events().iter().map(|e| e.read().is_ok()).collect::<Vec<_>>();
        link.hold_back(1);
        assert_eq!(heard(), [false; 3]);
        link.set_bus_master(true);
        assert_eq!(heard(), [false, true, false]);
        // Allowed by now: at once.
        link.hold_back(1);
        assert_eq!(heard(), [false, true, false]);
        // Off and on again, with nothing new in between: nobody is sent to rings of before.
        link.set_bus_master(false);
        link.set_bus_master(true);
        assert_eq!(heard(), [false; 3]);
        // One that was told to stop is not woken for it.
        gate.stop();
        link.hold_back(2);
        assert_eq!(heard(), [false; 3]);
    }
}
