// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The one loop that waits for file descriptors.

use std::cell::Cell;
use std::rc::Rc;

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use libc::{SIGCONT, SIGUSR1};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::process::stop::{StopReason, Stopper};
use crate::{console::terminal, process::signals};
use crate::{Error, Result};

/// What the loop has to tell its owner.
#[derive(Debug)]
pub(crate) enum Wake {
    /// The user wants a report (SIGUSR1).
    Report,
    /// The machine is to stop.
    Stopped(StopReason),
}

/// The loop, with whatever subscribes to it.
pub(crate) struct EventLoop {
    manager: EventManager<Box<dyn MutEventSubscriber>>,
    stopper: Stopper,
    report: Rc<Cell<bool>>,
}

impl EventLoop {
    /// A loop that waits for signals and for `stopper`.
    pub fn new(stopper: Stopper) -> Result<Self> {
        let report = Rc::new(Cell::new(false));
        let mut manager =
            EventManager::new().map_err(|error| Error::EventLoop(format!("{error:?}")))?;
        let signals = signals::install()?;
        let control = Control { stopper: stopper.clone(), signals, report: report.clone() };
        manager.add_subscriber(Box::new(control) as Box<dyn MutEventSubscriber>);
        Ok(Self { manager, stopper, report })
    }

    /// Adds a subscriber.
    pub fn add(&mut self, subscriber: Box<dyn MutEventSubscriber>) {
        self.manager.add_subscriber(subscriber);
    }

    /// Serves file descriptors until there is something to tell.
    pub fn wait(&mut self) -> Result<Wake> {
        loop {
            if self.report.take() {
                return Ok(Wake::Report);
            }
            if let Some(reason) = self.stopper.reason() {
                return Ok(Wake::Stopped(reason.clone()));
            }
            self.manager.run().map_err(|error| Error::EventLoop(format!("{error:?}")))?;
        }
    }
}

/// What the loop itself listens to.
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
                self.stopper.stop(StopReason::Software(format!("event loop: {error:?}")));
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
                // This machine stops anyway; one that is started after it must not run on.
                signals::put_back(signal);
            }
        }
    }
}
