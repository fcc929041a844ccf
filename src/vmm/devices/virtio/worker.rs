// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The thread of a device, from DRIVER_OK to the reset.

#[cfg(feature = "test-support")]
mod here;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use twostage::sync::{Condvar, Mutex};

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use serde_json::json;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};
use vmm_sys_util::timerfd::TimerFd;

use super::backend::Backend;
use super::chain::{Broken, Unserved};
use super::link::Link;
use super::memory::DeviceMemory;
use super::queue::Virtqueue;
use crate::process::jail::{self, Kind};
use crate::process::limits;

/// Event identifiers: this, or the number of a queue.
const STOP: u32 = u32::MAX;
const INPUT: u32 = u32::MAX - 1;
const LOOK: u32 = u32::MAX - 2;

/// What the worker uses: the backend, and the memory it accesses.
pub(super) struct Device {
    pub backend: Box<dyn Backend>,
    pub memory: DeviceMemory,
}

/// How long to wait for a stopping worker before it is left behind. It makes no more requests by
/// then, and takes longer only in a system call, such as disk I/O.
const STOP_PATIENCE: Duration = Duration::from_millis(500);

/// Interval of checks for what arrived while the function could not make requests.
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

/// A running worker, which owns the device. Dropping it stops it and waits for a limited time: the
/// device belongs to its thread until that ends.
#[derive(Debug)]
pub(super) struct Worker {
    link: Arc<Link>,
    /// What of the host the device uses.
    host: Arc<str>,
    stop: EventFd,
    /// When it was told to stop.
    told: Option<Instant>,
    ended: Arc<Ended>,
    thread: Option<JoinHandle<()>>,
    /// For who has no thread serve the device.
    #[cfg(feature = "test-support")]
    here: Option<here::Here>,
}

/// Whether a worker has ended, so that its device is free for another.
#[derive(Debug, Default)]
pub(super) struct Ended {
    over: Mutex<bool>,
    changed: Condvar,
}

impl Ended {
    /// Waits until it has ended, at most for `limit`. Returns whether it has.
    pub fn wait(&self, limit: Duration) -> bool {
        let over = self.over.lock();
        *self.changed.wait_timeout_while(over, limit, |over| !*over).0
    }

    fn set(&self) {
        *self.over.lock() = true;
        self.changed.notify_all();
    }
}

/// Signals when it is dropped that a worker has ended, for whatever reason.
pub(super) struct EndOf(Arc<Ended>);

impl Drop for EndOf {
    fn drop(&mut self) {
        self.0.set();
    }
}

/// Workers that were left behind, of all machines of the process: each keeps its device, with a
/// disk's locks and the guest's memory, until it ends.
static LEFT_BEHIND: Mutex<Vec<Arc<Ended>>> = Mutex::new(Vec::new());

fn left_behind() -> MutexGuard<'static, Vec<Arc<Ended>>> {
    LEFT_BEHIND.lock()
}

/// Whether all workers that were left behind have ended and released their resources.
pub fn none_is_left_behind() -> bool {
    let mut left = left_behind();
    left.retain(|ended| !ended.wait(Duration::ZERO));
    left.is_empty()
}

impl Worker {
    /// Starts a worker for `device`, which uses `host` and holds its lock until it stops.
    pub fn start(
        device: Arc<Mutex<Device>>,
        host: Arc<str>,
        queues: Vec<Virtqueue>,
        link: Arc<Link>,
    ) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let stopped = stop.try_clone()?;
        let late = Late { timer: TimerFd::new()?, queues: BTreeSet::new(), allowed: false };
        let name = format!("{}-worker", link.name());
        let ended = Arc::<Ended>::default();
        let end = EndOf(ended.clone());
        let service = Service { queues, link: link.clone(), late };
        link.gate.start();
        #[cfg(feature = "test-support")]
        if crate::devices::threadless::is_wanted() {
            let here = Some(here::Here::new(device, service, end));
            return Ok(Self { link, host, stop, told: None, ended, thread: None, here });
        }
        let of_worker = link.clone();
        let work = move || {
            // Dropped last, after the device is unlocked or freed.
            let _end = end;
            let (device, link) = (device, of_worker);
            let device = device.lock();
            let server = Server { device, service, stop: stopped, over: false };
            if let Err(error) = run(server) {
                link.set_needs_reset(&of_event_loop(&error));
            }
        };
        let thread = Some(jail::start(&name, Kind::Device, work)?);
        Ok(Self {
            link,
            host,
            stop,
            told: None,
            ended,
            thread,
            #[cfg(feature = "test-support")]
            here: None,
        })
    }

    /// Tells it to stop: when this returns, it makes no more requests, and ends soon.
    pub fn tell_to_stop(&mut self) -> Arc<Ended> {
        if self.told.is_none() {
            self.told = Some(Instant::now());
            self.link.gate.stop();
            if let Err(error) = self.stop.write(1) {
                // Never: nothing else writes the event.
                log::error!("{} cannot be stopped: {error}", self.link.name());
            }
            #[cfg(feature = "test-support")]
            drop(self.here.take());
        }
        self.ended.clone()
    }

    /// Serves the device, if it has no thread ([`here::Here::turn`]).
    #[cfg(feature = "test-support")]
    pub fn turn(&mut self, input: bool) -> bool {
        self.here.as_mut().is_some_and(|here| here.turn(input))
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.ended.wait(Duration::ZERO)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let ended = self.tell_to_stop();
        let waited = self.told.map_or(Duration::ZERO, |told| told.elapsed());
        if !ended.wait(STOP_PATIENCE.saturating_sub(waited)) {
            log::warn!(
                "{}: {} has not answered yet: the device's thread is left behind, and the kernel \
                 may keep this process until it does",
                self.link.name(),
                self.host
            );
            left_behind().push(ended);
        } else if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("{}: its thread panicked", self.link.name());
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

/// The queues that have something to do, such as input, that arrived or was not ended while the
/// function could not make requests. It is not signalled a second time.
///
/// It is not served as soon as requests are allowed: the buffers may be a former driver's, whose
/// memory now belongs to another kernel (kexec). That kernel enables bus mastering and resets the
/// device right away.
#[derive(Debug)]
struct Late {
    /// Runs while there are some.
    timer: TimerFd,
    queues: BTreeSet<usize>,
    /// The function could make requests at the last check.
    allowed: bool,
}

impl Late {
    /// Queue `number` is served later.
    fn add(&mut self, number: usize) -> io::Result<()> {
        self.allowed = false;
        if self.queues.is_empty() {
            self.timer.reset(BETWEEN_LOOKS, None)?;
        }
        self.queues.insert(number);
        Ok(())
    }

    /// The timer has expired. Returns the queues that can be served; others keep waiting.
    fn look(&mut self, allowed: bool) -> io::Result<BTreeSet<usize>> {
        // It has expired, so this does not block.
        self.timer.wait()?;
        if allowed && self.allowed {
            return Ok(std::mem::take(&mut self.queues));
        }
        self.allowed = allowed;
        self.timer.reset(BETWEEN_LOOKS, None)?;
        Ok(BTreeSet::new())
    }
}

/// The queues of one device, and how their events are served.
#[derive(Debug)]
pub(super) struct Service {
    queues: Vec<Virtqueue>,
    link: Arc<Link>,
    late: Late,
}

impl Service {
    /// Queue `number` was notified.
    pub fn notified(&mut self, device: &mut Device, number: usize) {
        self.link.count(number, |queue| &queue.notified);
        self.link.trace("notified", number, || json!({}));
        self.serve(device, number);
    }

    /// There is input.
    pub fn input(&mut self, device: &mut Device) {
        let number = device.backend.input_queue();
        // What waits is not overtaken.
        match self.link.gate.bus_master() && self.late.queues.is_empty() {
            true => self.serve(device, number),
            false => self.serve_later(number),
        }
    }

    /// The timer of what is late has expired.
    pub fn look(&mut self, device: &mut Device) {
        match self.late.look(self.link.gate.bus_master()) {
            Ok(queues) => queues.into_iter().for_each(|number| self.serve(device, number)),
            Err(error) => self.link.set_needs_reset(&format_args!("timer: {error}")),
        }
    }

    /// As if the timer had expired twice: serves what is late, if that is allowed.
    #[cfg(feature = "test-support")]
    pub fn look_now(&mut self, device: &mut Device) {
        if self.link.gate.bus_master() {
            let late = std::mem::take(&mut self.late.queues);
            late.into_iter().for_each(|number| self.serve(device, number));
        }
    }

    /// The state shared with the transport.
    #[cfg(feature = "test-support")]
    pub fn link(&self) -> &Arc<Link> {
        &self.link
    }

    fn serve(&mut self, device: &mut Device, number: usize) {
        // A device that needs a reset does nothing until then.
        if self.link.needs_reset() {
            return;
        }
        match self.try_serve(device, number) {
            // Give other events their turn first.
            Ok(true) => self.link.notify(number),
            Ok(false) => {}
            Err(Unserved::NotNow(_)) => {
                self.queues.iter_mut().for_each(Virtqueue::undo_pops);
                self.serve_later(number);
            }
            Err(Unserved::Broken(broken)) => self.link.set_needs_reset(&broken),
        }
    }

    fn serve_later(&mut self, number: usize) {
        if let Err(error) = self.late.add(number) {
            self.link.set_needs_reset(&format_args!("timer: {error}"));
        }
    }

    fn try_serve(&mut self, device: &mut Device, number: usize) -> Result<bool, Unserved> {
        let Device { backend, memory } = device;
        let Some(queue) = self.queues.get_mut(number) else { return Ok(false) };
        queue.check(memory)?;
        backend.serve(number, &mut self.queues, memory)
    }
}

/// What an error of a worker's event loop is, and what to do about it.
fn of_event_loop(error: &event_manager::Error) -> String {
    limits::with_advice(&format!("its event loop: {error}"))
}

/// Serves the events of one device.
struct Server<'a> {
    device: MutexGuard<'a, Device>,
    service: Service,
    stop: EventFd,
    /// It was told to stop.
    over: bool,
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        // However it ended: a disk may still be written for the driver that there was.
        self.device.backend.stop();
    }
}

impl Server<'_> {
    fn watch(&self, ops: &mut EventOps) -> Result<(), Broken> {
        let failed = |error| Broken::Device(of_event_loop(&error));
        ops.add(Events::with_data(&self.stop, STOP, EventSet::IN)).map_err(failed)?;
        // Every signal is an edge, also of an event that nobody has read: none is.
        let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for (number, event) in (0..).zip(self.service.link.queue_events()) {
            ops.add(Events::with_data(event, number, edges)).map_err(failed)?;
        }
        if let Some(input) = self.device.backend.input() {
            ops.add(Events::with_data_raw(input, INPUT, edges)).map_err(failed)?;
        }
        let timer = self.service.late.timer.as_raw_fd();
        ops.add(Events::with_data_raw(timer, LOOK, EventSet::IN)).map_err(failed)
    }
}

impl MutEventSubscriber for Server<'_> {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(broken) = self.watch(ops) {
            self.service.link.set_needs_reset(&broken);
            self.over = true;
        }
        // Notifications before DRIVER_OK may have been missed.
        self.service.link.notify_all();
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        match events.data() {
            STOP => self.over = true,
            INPUT => self.service.input(&mut self.device),
            LOOK => self.service.look(&mut self.device),
            number => self.service.notified(&mut self.device, number as usize),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn late() -> Late {
        Late { timer: TimerFd::new().unwrap(), queues: BTreeSet::new(), allowed: false }
    }

    #[test]
    fn what_is_late_is_not_served_at_once_when_the_function_may_make_requests() {
        let mut late = late();
        late.add(3).unwrap();
        late.add(1).unwrap();
        let looks = [false, true, false, true, true];
        let served: Vec<_> = looks.map(|allowed| late.look(allowed).unwrap()).into();
        let none = BTreeSet::new();
        assert_eq!(served, [none.clone(), none.clone(), none.clone(), none, [1, 3].into()]);
        assert!(late.queues.is_empty());
    }

    #[test]
    fn what_becomes_late_between_two_looks_waits_for_two_more() {
        let mut late = late();
        late.add(0).unwrap();
        assert!(late.look(true).unwrap().is_empty());
        late.add(2).unwrap();
        assert!(late.look(true).unwrap().is_empty());
        assert_eq!(late.look(true).unwrap(), [0, 2].into());
    }
}
