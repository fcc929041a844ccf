// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Routes of MSIs: each an eventfd that KVM turns into the remapped message within the kernel.
//!
//! The eventfd is written here, or by somebody who knows nothing of routes: an assigned device's
//! driver in the host. In the latter case KVM has the eventfd only while it has a route. While the
//! vector is masked nobody reads the eventfd, so that a pending write is sent with the next
//! message; while the message is blocked it is read here ([`Unrouted`]), so that the fault is
//! reported to the guest.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard, Weak};
use twostage::sync::Mutex;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use super::InterruptSource;
use crate::pci::{EventVector, InterruptVector};
use crate::{Error, Result};
use twostage::viommu::routes::{MsiRoute, MsiSource, RemappedRoutes, RouteEnd, RouteId};
use twostage::viommu::routes::{RouteState, RouteTable};
use twostage::viommu::{InterruptListener, InterruptSink, MsiMessage};
use twostage::warn_limited;

/// How many eventfds are looked at each time; the others wait for the next.
const BATCH: usize = 16;

/// Connects eventfds to GSIs.
pub(super) trait Irqfds: Send + Sync {
    /// From now on writing `event` triggers `gsi`.
    fn tie(&self, event: &EventFd, gsi: u32) -> std::result::Result<(), errno::Error>;

    /// Disconnects them.
    fn untie(&self, event: &EventFd, gsi: u32) -> std::result::Result<(), errno::Error>;
}

impl Irqfds for kvm_ioctls::VmFd {
    fn tie(&self, event: &EventFd, gsi: u32) -> std::result::Result<(), errno::Error> {
        self.register_irqfd(event, gsi)
    }

    fn untie(&self, event: &EventFd, gsi: u32) -> std::result::Result<(), errno::Error> {
        self.unregister_irqfd(event, gsi)
    }
}

/// Every route of a machine.
pub struct MsiRoutes {
    routes: Arc<RemappedRoutes>,
    kvm: Arc<Kvm>,
}

/// What the routes of a machine share.
struct Kvm {
    table: Arc<RouteTable>,
    irqfds: Arc<dyn Irqfds>,
    unrouted: Arc<Unrouted>,
    triggered: AtomicU64,
}

impl MsiRoutes {
    /// No routes yet; they will be in `table`.
    pub(super) fn new(table: Arc<RouteTable>, irqfds: Arc<dyn Irqfds>) -> Arc<Self> {
        let routes = RemappedRoutes::new(table.clone());
        let (unrouted, triggered) = (Arc::default(), AtomicU64::new(0));
        Arc::new(Self { routes, kvm: Arc::new(Kvm { table, irqfds, unrouted, triggered }) })
    }

    /// What listens to changes of remapping.
    pub(super) fn listener(&self) -> Weak<dyn InterruptListener> {
        let listener: Arc<dyn InterruptListener> = self.routes.clone();
        Arc::downgrade(&listener)
    }

    /// The event loop's subscriber for routes whose eventfd is read here.
    ///
    /// # Errors
    /// The process has no file descriptors left.
    pub(super) fn unrouted(&self) -> Result<UnroutedInterrupts> {
        UnroutedInterrupts::new(self.kvm.unrouted.clone()).map_err(Error::os("epoll"))
    }

    /// How often a route was triggered with KVM doing the rest.
    pub fn triggered(&self) -> u64 {
        self.kvm.triggered.load(Ordering::Relaxed)
    }

    /// A route for a vector of `source`, without a message, whose eventfd `writer` writes. Messages
    /// that cannot be routed are sent to `messages` directly.
    ///
    /// # Errors
    /// KVM has no more GSIs, or the process no more file descriptors.
    pub fn allocate(
        &self,
        source: InterruptSource,
        messages: Arc<dyn InterruptSink>,
        writer: Writer,
    ) -> Result<Arc<VectorRoute>> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(Error::os("eventfd"))?;
        let gsi = self.kvm.table.allocate();
        let gsi = gsi.ok_or(Error::Interrupts("KVM has no more interrupt routes".into()))?;
        let remapped = source.untraced().clone();
        let (kvm, tied) = (self.kvm.clone(), Mutex::new(false));
        let wire = |this| Wire { this, kvm, source, messages, gsi, event, writer, tied };
        let route = Arc::new_cyclic(|this: &Weak<VectorRoute>| {
            let wire = Arc::new(wire(this.clone()));
            VectorRoute { route: self.routes.add(gsi, remapped, wire.clone()), wire }
        });
        if writer == Writer::Here {
            route.wire.tie().map_err(Error::kvm("making an interrupt route"))?;
        }
        Ok(route)
    }
}

impl fmt::Debug for MsiRoutes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MsiRoutes").field(&self.kvm.table).finish()
    }
}

/// Who writes the eventfd of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writer {
    /// [`VectorRoute::trigger`], which knows whether the vector is routed.
    Here,
    /// A device, at any time.
    Device,
}

/// The route of one vector. Dropping it frees it.
#[derive(Debug)]
pub struct VectorRoute {
    // Dropped first: KVM has no message of a GSI that is free.
    route: MsiRoute,
    wire: Arc<Wire>,
}

impl InterruptVector for VectorRoute {
    /// When this returns, the old message is no longer sent.
    fn update(&self, message: Option<MsiMessage>) {
        self.route.set(message);
    }

    /// Nothing is sent without a message.
    fn trigger(&self) {
        self.route.fire();
    }

    fn is_pending(&self) -> bool {
        let event = &self.wire.event;
        self.route.with_state(|state| match (self.wire.writer, state) {
            // Nobody else reads it.
            (Writer::Device, RouteState::Masked) => {
                event.read().is_ok_and(|count| event.write(count).is_ok())
            }
            _ => false,
        })
    }
}

impl EventVector for VectorRoute {
    fn event(&self) -> &EventFd {
        &self.wire.event
    }
}

impl VectorRoute {
    /// The eventfd of this route, which may be blocked, was written. It may have been routed or
    /// masked since: then KVM reads it, or nobody.
    fn serve_blocked(&self) {
        self.route.fire_unrouted(|| self.wire.event.read().is_ok());
    }
}

/// An eventfd and its way into KVM.
struct Wire {
    this: Weak<VectorRoute>,
    kvm: Arc<Kvm>,
    source: InterruptSource,
    messages: Arc<dyn InterruptSink>,
    gsi: RouteId,
    event: EventFd,
    writer: Writer,
    /// It is connected to KVM, which reads it.
    tied: Mutex<bool>,
}

impl Wire {
    fn tie(&self) -> std::result::Result<(), errno::Error> {
        let mut tied = self.tied.lock();
        if !*tied {
            self.kvm.irqfds.tie(&self.event, self.gsi.0)?;
            *tied = true;
        }
        Ok(())
    }

    fn untie(&self) {
        if std::mem::take(&mut *self.tied.lock()) {
            if let Err(error) = self.kvm.irqfds.untie(&self.event, self.gsi.0) {
                warn_limited!("interrupt route {}: {error}", self.gsi);
            }
        }
    }

    /// From now on the eventfd is, or is not, read here.
    fn read_here(&self, here: bool) {
        let Self { kvm, gsi: RouteId(gsi), event, .. } = self;
        if here {
            kvm.unrouted.add(*gsi, event, self.this.clone());
        } else {
            kvm.unrouted.remove(*gsi, event);
        }
    }
}

impl RouteEnd for Wire {
    fn kick(&self, message: MsiMessage) {
        self.kvm.triggered.fetch_add(1, Ordering::Relaxed);
        self.source.trace_route(self.gsi.0, message);
        if let Err(error) = self.event.write(1) {
            log::debug!("interrupt route {}: {error}", self.gsi);
        }
    }

    fn send(&self, _: &MsiSource, message: MsiMessage) -> bool {
        self.source.send(message, &*self.messages)
    }

    fn unrouting(&self) {
        if self.writer == Writer::Device {
            self.untie();
        }
    }

    fn settled(&self, state: RouteState) -> io::Result<()> {
        if self.writer == Writer::Here {
            return Ok(());
        }
        if let RouteState::Routed(_) = state {
            self.read_here(false);
            return self.tie().map_err(|error| {
                self.read_here(true);
                error.into()
            });
        }
        self.untie();
        self.read_here(state != RouteState::Masked);
        Ok(())
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.untie();
        self.kvm.table.release(self.gsi);
    }
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire").field("gsi", &self.gsi).finish_non_exhaustive()
    }
}

/// The blocked routes of a machine, whose eventfds somebody else writes: here they are read, each
/// time, so that the interrupt is sent the long way and the guest is told that it is blocked.
#[derive(Default)]
struct Unrouted(Mutex<Blocked>);

#[derive(Default)]
struct Blocked {
    /// Waits for them all. Made with the first.
    epoll: Option<Arc<Epoll>>,
    routes: BTreeMap<u32, Weak<VectorRoute>>,
}

impl Unrouted {
    /// From now on `event`, of the route of `gsi`, is read here.
    fn add(&self, gsi: u32, event: &EventFd, route: Weak<VectorRoute>) {
        let mut blocked = self.blocked();
        if blocked.routes.insert(gsi, route).is_some() {
            return;
        }
        let Some(epoll) = &blocked.epoll else { return };
        let watched = EpollEvent::new(EventSet::IN, gsi.into());
        if let Err(error) = epoll.ctl(ControlOperation::Add, event.as_raw_fd(), watched) {
            warn_limited!("interrupt route {gsi}: {error}; it is lost while it is blocked");
        }
    }

    /// Ends that.
    fn remove(&self, gsi: u32, event: &EventFd) {
        let mut blocked = self.blocked();
        if blocked.routes.remove(&gsi).is_some() {
            if let Some(epoll) = &blocked.epoll {
                let nothing = EpollEvent::default();
                // It was there, or could not be added.
                let _ = epoll.ctl(ControlOperation::Delete, event.as_raw_fd(), nothing);
            }
        }
    }

    /// What becomes readable when one of them was written.
    fn epoll(&self) -> io::Result<Arc<Epoll>> {
        let mut blocked = self.blocked();
        if let Some(epoll) = &blocked.epoll {
            return Ok(epoll.clone());
        }
        let epoll = Arc::new(Epoll::new()?);
        blocked.epoll = Some(epoll.clone());
        Ok(epoll)
    }

    /// Sends what was written.
    fn serve(&self, epoll: &Epoll) {
        let mut events = [EpollEvent::default(); BATCH];
        let count = epoll.wait(0, &mut events).unwrap_or(0);
        for event in events.iter().take(count) {
            let gsi = event.data() as u32;
            // Not locked while the route is: it locks this when it changes.
            let route = self.blocked().routes.get(&gsi).and_then(Weak::upgrade);
            if let Some(route) = route {
                route.serve_blocked();
            }
        }
    }

    fn blocked(&self) -> MutexGuard<'_, Blocked> {
        self.0.lock()
    }
}

impl fmt::Debug for Unrouted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.blocked().routes.keys()).finish()
    }
}

/// Serves the blocked routes of a machine in its event loop.
pub(crate) struct UnroutedInterrupts {
    unrouted: Arc<Unrouted>,
    epoll: Arc<Epoll>,
}

impl UnroutedInterrupts {
    /// Those of `unrouted`, before there are any.
    ///
    /// # Errors
    /// The process has no file descriptors left.
    fn new(unrouted: Arc<Unrouted>) -> io::Result<Self> {
        let epoll = unrouted.epoll()?;
        Ok(Self { unrouted, epoll })
    }
}

impl MutEventSubscriber for UnroutedInterrupts {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&*self.epoll, EventSet::IN)) {
            log::error!("blocked interrupts of assigned devices are lost: {error}");
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.unrouted.serve(&self.epoll);
    }
}
