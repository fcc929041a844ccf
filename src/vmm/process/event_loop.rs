// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The event loop.

use std::cell::Cell;
use std::rc::Rc;

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use libc::{SIGCONT, SIGUSR1};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::process::stop::{StopReason, Stopper};
use crate::{console::terminal, process::signals};
use crate::{Error, Result};

/// Why the loop returns to its owner.
#[derive(Debug)]
pub(crate) enum Wake {
    /// A report was requested (SIGUSR1).
    Report,
    /// The machine must stop.
    Stopped(StopReason),
}

/// The loop with its subscribers.
pub(crate) struct EventLoop {
    manager: EventManager<Box<dyn MutEventSubscriber>>,
    stopper: Stopper,
    report: Rc<Cell<bool>>,
}

impl EventLoop {
    /// A loop that handles signals and `stopper`.
    pub fn new(stopper: Stopper) -> Result<Self> {
        let report = Rc::new(Cell::new(false));
        let mut manager =
            EventManager::new().map_err(|error| Error::EventLoop(error.to_string()))?;
        let signals = signals::install()?;
        let control = Control { stopper: stopper.clone(), signals, report: report.clone() };
        manager.add_subscriber(Box::new(control) as Box<dyn MutEventSubscriber>);
        Ok(Self { manager, stopper, report })
    }

    /// Adds a subscriber.
    pub fn add(&mut self, subscriber: Box<dyn MutEventSubscriber>) {
        self.manager.add_subscriber(subscriber);
    }

    /// Serves file descriptors until there is a reason to return.
    pub fn wait(&mut self) -> Result<Wake> {
        loop {
            if self.report.take() {
                return Ok(Wake::Report);
            }
            if let Some(reason) = self.stopper.reason() {
                return Ok(Wake::Stopped(reason.clone()));
            }
            self.manager.run().map_err(|error| Error::EventLoop(error.to_string()))?;
        }
    }
}

/// The loop's own subscriber.
struct Control {
    stopper: Stopper,
    signals: &'static EventFd,
    report: Rc<Cell<bool>>,
}

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps) {
        for event in [self.stopper.event(), self.signals] {
            if let Err(error) = ops.add(Events::new(event, EventSet::IN)) {
                // Without these nothing would end the loop.
                self.stopper.stop(StopReason::Software(format!("event loop: {error}")));
            }
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        for signal in signals::take() {
            if signal == SIGUSR1 {
                self.report.set(true);
            } else if signal == SIGCONT {
                terminal::resume();
            } else if !self.stopper.stop(StopReason::Signal(signal)) {
                // This machine stops anyway; the signal must also stop one that is started after
                // it.
                signals::put_back(signal);
            }
        }
    }
}
