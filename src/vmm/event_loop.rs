// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The one loop that waits for file descriptors.

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use libc::SIGUSR1;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::signals;
use super::stop::{StopReason, Stopper};
use super::{Error, Result};

/// The loop, with whatever subscribes to it.
pub(super) struct EventLoop {
    manager: EventManager<Box<dyn MutEventSubscriber>>,
    stopper: Stopper,
}

impl EventLoop {
    /// A loop that ends when `stopper` stops the machine, or a signal does. `on_report` is called
    /// on SIGUSR1.
    pub fn new(stopper: Stopper, on_report: Box<dyn FnMut()>) -> Result<Self> {
        let mut manager =
            EventManager::new().map_err(|error| Error::EventLoop(format!("{error:?}")))?;
        let signals = signals::install()?;
        let control = Control { stopper: stopper.clone(), signals, on_report };
        manager.add_subscriber(Box::new(control) as Box<dyn MutEventSubscriber>);
        Ok(Self { manager, stopper })
    }

    /// Adds a subscriber.
    pub fn add(&mut self, subscriber: Box<dyn MutEventSubscriber>) {
        self.manager.add_subscriber(subscriber);
    }

    /// Serves file descriptors until the machine is stopped.
    pub fn run(&mut self) -> Result<StopReason> {
        loop {
            if let Some(reason) = self.stopper.reason() {
                return Ok(reason.clone());
            }
            self.manager.run().map_err(|error| Error::EventLoop(format!("{error:?}")))?;
        }
    }
}

/// What the loop itself listens to.
struct Control {
    stopper: Stopper,
    signals: &'static EventFd,
    on_report: Box<dyn FnMut()>,
}

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps) {
        for event in [self.stopper.event(), self.signals] {
            if let Err(error) = ops.add(Events::new(event, EventSet::IN)) {
                // Without these nothing would end the loop.
                self.stopper.stop(StopReason::Software(format!("event loop: {error:?}")));
            }
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        for signal in signals::take() {
            if signal == SIGUSR1 {
                (self.on_report)();
            } else {
                self.stopper.stop(StopReason::Signal(signal));
            }
        }
    }
}
