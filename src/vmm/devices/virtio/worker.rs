// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The thread of a device, from its driver's DRIVER_OK to the reset.
#![forbid(unsafe_code)]

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use serde_json::json;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use super::backend::Backend;
use super::broken::Broken;
use super::link::Link;
use super::memory::DeviceMemory;
use super::queue::Virtqueue;

/// Events are told apart by these, or by the number of a queue.
const STOP: u32 = u32::MAX;
const INPUT: u32 = u32::MAX - 1;

/// What a device works with: its own part, and the memory it reaches.
pub(super) struct Device {
    pub backend: Box<dyn Backend>,
    pub memory: DeviceMemory,
}

/// A running worker, who has the device to itself. Dropping it stops it and waits for that.
#[derive(Debug)]
pub(super) struct Worker {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a worker for `device`, which holds its lock until it stops.
    pub fn start(
        device: Arc<Mutex<Device>>,
        queues: Vec<Virtqueue>,
        link: Arc<Link>,
    ) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let stopped = stop.try_clone()?;
        let name = format!("{}-worker", link.name());
        let thread = thread::Builder::new().name(name).spawn(move || {
            let device = device.lock().unwrap_or_else(PoisonError::into_inner);
            let server = Server { device, queues, link: link.clone(), stop: stopped, over: false };
            if let Err(error) = run(server) {
                link.set_needs_reset(&format_args!("event loop: {error:?}"));
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let stopping = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            if let Err(error) = stopping {
                // Never: nobody else writes it. Waiting could be forever.
                log::error!("a device cannot be stopped: {error}");
            } else if thread.join().is_err() {
                log::error!("a device's worker panicked");
            }
        }
    }
}

fn run(server: Server<'_>) -> Result<(), event_manager::Error> {
    let mut manager = EventManager::new()?;
    let id = manager.add_subscriber(server);
    while !manager.subscriber_mut(id)?.over {
        manager.run()?;
    }
    Ok(())
}

/// Serves the events of one device.
struct Server<'a> {
    device: MutexGuard<'a, Device>,
    queues: Vec<Virtqueue>,
    link: Arc<Link>,
    stop: EventFd,
    /// It was told to stop.
    over: bool,
}

impl Server<'_> {
    fn serve(&mut self, number: usize) {
        // A device that needs a reset does nothing until then, nor does one that may not.
        if self.link.needs_reset() || !self.link.may_serve(number) {
            return;
        }
        let Device { backend, memory } = &mut *self.device;
        match backend.serve(number, &mut self.queues, memory) {
            // Other events get their turn first.
            Ok(true) => self.link.notify(number),
            Ok(false) => {}
            Err(broken) => self.link.set_needs_reset(&broken),
        }
    }

    fn watch(&self, ops: &mut EventOps) -> Result<(), Broken> {
        let failed = |error| Broken::Device(format!("event loop: {error:?}"));
        ops.add(Events::with_data(&self.stop, STOP, EventSet::IN)).map_err(failed)?;
        for (number, event) in (0..).zip(self.link.queue_events()) {
            ops.add(Events::with_data(event, number, EventSet::IN)).map_err(failed)?;
        }
        if let Some(input) = self.device.backend.input() {
            let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
            ops.add(Events::with_data_raw(input, INPUT, edges)).map_err(failed)?;
        }
        Ok(())
    }
}

impl MutEventSubscriber for Server<'_> {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(broken) = self.watch(ops) {
            self.link.set_needs_reset(&broken);
            self.over = true;
        }
        // What the driver did before it was ready may not have been heard.
        self.link.notify_all();
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        match events.data() {
            STOP => self.over = true,
            INPUT => {
                // While the function may make no requests, what comes in waits for the driver's next
                // word or the next that comes in: the buffers may be a former driver's.
                if self.link.bus_master() {
                    let number = self.device.backend.input_queue();
                    self.serve(number);
                }
            }
            number => {
                let number = number as usize;
                if let Some(event) = self.link.queue_events().get(number) {
                    // Without a count it is spurious, and looking does no harm.
                    let _ = event.read();
                }
                self.link.count(number, |queue| &queue.notified);
                self.link.trace("notified", number, || json!({}));
                self.serve(number);
            }
        }
    }
}
