// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Routes of MSIs: remapped messages that the hypervisor sends by itself, when an eventfd is
//! written or the like, without asking the virtual IOMMU each time.
//!
//! The VMM sets the message of each vector ([`MsiRoute::set`]); [`RemappedRoutes`] translates them
//! all, now and whenever the guest changes its remapping, and gives the hypervisor's part
//! ([`MsiRouting`]) the new table, once for all changes. A message that the IOMMU blocks has no
//! route: each time its vector fires ([`MsiRoute::fire`]) the message is sent through the IOMMU, so
//! that the guest gets its fault each time, and gets the interrupt as soon as it passes. So is one
//! that the hypervisor does not accept.
//!
//! Without a remapper messages are routed as they are.
//!
//! Lock order: the routes by their age, the remapper, the table. Nothing here is locked while a
//! remapper tells of changes but what these need, so a guest's invalidation waits only for vectors
//! that are firing right now.
//!
//! ```
//! use std::collections::BTreeMap;
//! use std::io;
//! use std::sync::{Arc, Mutex};
//!
//! use twostage::spec::pci::Bdf;
//! use twostage::viommu::routes::{
//!     MsiRouting, MsiSource, RemappedRoutes, Route, RouteEnd, RouteId, RouteState, RouteTable,
//! };
//! use twostage::viommu::{InterruptSink, MsiMessage};
//!
//! /// The hypervisor. With KVM: `KVM_SET_GSI_ROUTING`, with the pins' entries and these.
//! #[derive(Default)]
//! struct Hypervisor(Mutex<BTreeMap<RouteId, Route>>);
//!
//! impl MsiRouting for Hypervisor {
//!     fn set(&self, table: &BTreeMap<RouteId, Route>) -> io::Result<()> {
//!         self.0.lock().unwrap().clone_from(table);
//!         Ok(())
//!     }
//! }
//!
//! /// One vector. With KVM: the eventfd that is an irqfd of the route's GSI, and `KVM_SIGNAL_MSI`.
//! struct Vector;
//!
//! impl RouteEnd for Vector {
//!     fn kick(&self, message: MsiMessage) {
//!         println!("the hypervisor sends {message:x?}");
//!     }
//!     fn send(&self, source: &MsiSource, message: MsiMessage) -> bool {
//!         source.send(message, self)
//!     }
//! }
//!
//! impl InterruptSink for Vector {
//!     fn send_msi(&self, address: u64, data: u32) {
//!         println!("{data:#x} is written to {address:#x}");
//!     }
//! }
//!
//! let hypervisor = Arc::new(Hypervisor::default());
//! // Numbers below 24 are those of interrupt controllers' pins.
//! let table = Arc::new(RouteTable::new(hypervisor.clone(), 24..4096));
//! let routes = RemappedRoutes::new(table.clone());
//! // Behind a virtual VT-d, `Some` of a weak reference to `vtd.interrupt_remapper()`; and once:
//! // `vtd.add_interrupt_listener(..)` with a weak reference to `routes`. Until then the unit sees
//! // each message: nobody would say that a route is no longer right.
//! let source = MsiSource::new(Bdf::from_raw(0x18), None);
//! let id = table.allocate().expect("4072 are free");
//! let route = routes.add(id, source, Arc::new(Vector));
//!
//! // The guest unmasks a vector, which then fires.
//! let message = MsiMessage { address: 0xfee0_0000, data: 0x41 };
//! assert_eq!(route.set(Some(message)), RouteState::Routed(message));
//! route.fire();
//! assert_eq!(hypervisor.0.lock().unwrap()[&id].message, message);
//!
//! // The function goes.
//! drop(route);
//! table.release(id);
//! assert!(hypervisor.0.lock().unwrap().is_empty());
//! ```

mod table;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::{Arc, MutexGuard, Weak};

use super::{InterruptListener, InterruptRemapper, InterruptSink, MsiMessage};
use crate::spec::pci::Bdf;
use crate::sync::Mutex;
use crate::warn_limited;

pub use table::RouteTable;

/// The number of a route, for the hypervisor: with KVM, a GSI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RouteId(pub u32);

impl fmt::Display for RouteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where a route leads: a message after remapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Who sends it, which an interrupt controller may need to know.
    pub source: Bdf,
    /// What it sends.
    pub message: MsiMessage,
}

/// The hypervisor's routing of messages.
pub trait MsiRouting: Send + Sync {
    /// Replaces the routing of messages by `table`. When this returns `Ok`, the old one is no
    /// longer used.
    ///
    /// # Errors
    /// The old one remains. [`io::ErrorKind::InvalidInput`] (`EINVAL`) if that is because of a
    /// message which cannot be routed: the others are then tried without it.
    fn set(&self, table: &BTreeMap<RouteId, Route>) -> io::Result<()>;
}

/// A function as the sender of messages.
#[derive(Clone)]
pub struct MsiSource {
    function: Bdf,
    /// Weak, as what listens to the remapper often keeps this. When it is gone, so is the guest.
    remapper: Option<Weak<dyn InterruptRemapper>>,
}

impl MsiSource {
    /// `function`, whose messages `remapper` remaps, or nobody.
    pub fn new(function: Bdf, remapper: Option<Weak<dyn InterruptRemapper>>) -> Self {
        Self { function, remapper }
    }

    /// Where `message` leads, until the next change of remapping; `None` when it would be blocked,
    /// or must not be kept.
    pub fn route(&self, message: MsiMessage) -> Option<Route> {
        let message = match &self.remapper {
            None => message,
            Some(remapper) => remapper.upgrade()?.translate(self.function, message)?,
        };
        Some(Route { source: self.function, message })
    }

    /// Sends `message` to `sink`, remapped. `false` when it is blocked, and the guest is told.
    pub fn send(&self, message: MsiMessage, sink: &dyn InterruptSink) -> bool {
        match &self.remapper {
            None => {
                sink.send_msi(message.address, message.data);
                true
            }
            Some(remapper) => remapper
                .upgrade()
                .is_some_and(|remapper| remapper.send_remapped(self.function, message, sink)),
        }
    }
}

impl fmt::Debug for MsiSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = if self.remapper.is_some() { "remapped" } else { "direct" };
        write!(f, "{}, {how}", self.function)
    }
}

/// What became of the message of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RouteState {
    /// There is none.
    Masked,
    /// The hypervisor sends it by itself, remapped to this.
    Routed(MsiMessage),
    /// The remapper blocks it, or has to see it each time.
    Blocked,
    /// The hypervisor cannot route it.
    Unroutable,
}

/// What the VMM has at a route's end. It is called with the route locked: it must not use it.
pub trait RouteEnd: Send + Sync {
    /// The vector fires and is routed: makes the hypervisor send its message, which is `message`,
    /// by writing an eventfd or the like.
    fn kick(&self, message: MsiMessage);

    /// The vector fires and is not routed: sends `message`, which is not remapped yet, through
    /// [`MsiSource::send`] of `source`, and returns what that does.
    fn send(&self, source: &MsiSource, message: MsiMessage) -> bool;

    /// The hypervisor is about to lose the route, if it has one. Whoever else writes the eventfd
    /// must be disconnected from it now, as it would discard what they write.
    fn unrouting(&self) {}

    /// The route's message, or what became of it, was set, perhaps as it was: the time to connect
    /// whoever else writes the eventfd to its new reader.
    ///
    /// # Errors
    /// They cannot be connected to the hypervisor: the route is [`RouteState::Unroutable`].
    fn settled(&self, _state: RouteState) -> io::Result<()> {
        Ok(())
    }
}

/// Routes of messages, of functions behind any number of virtual IOMMUs, or none. To be added as
/// an [`InterruptListener`] to each that remaps interrupts.
pub struct RemappedRoutes {
    table: Arc<RouteTable>,
    routes: Mutex<Vec<Weak<Vector>>>,
}

impl RemappedRoutes {
    /// No routes yet; they will be in `table`.
    pub fn new(table: Arc<RouteTable>) -> Arc<Self> {
        Arc::new(Self { table, routes: Mutex::default() })
    }

    /// A route for a vector of `source`, without a message. `id` must be allocated in the table,
    /// and may be released when the route has been dropped.
    pub fn add(&self, id: RouteId, source: MsiSource, end: Arc<dyn RouteEnd>) -> MsiRoute {
        let state = Mutex::new(State { message: None, now: RouteState::Masked, gone: false });
        let vector = Arc::new(Vector { table: self.table.clone(), id, source, end, state });
        let mut routes = self.routes.lock();
        routes.retain(|route| route.strong_count() > 0);
        routes.push(Arc::downgrade(&vector));
        MsiRoute(vector)
    }
}

impl InterruptListener for RemappedRoutes {
    fn interrupts_changed(&self) {
        let routes: Vec<_> = self.routes.lock().iter().filter_map(Weak::upgrade).collect();
        // All are locked until the hypervisor has the new table: no vector fires by the old one
        // meanwhile.
        let mut states: Vec<_> = routes.iter().map(|route| route.state.lock()).collect();
        let states = states.iter_mut().map(|state| &mut **state);
        let routes = routes.iter().map(|route| &**route).zip(states);
        // One that was dropped while this waited for a lock has given its number away.
        install(&self.table, routes.filter(|(_, state)| !state.gone).collect());
    }
}

impl fmt::Debug for RemappedRoutes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RemappedRoutes").field(&self.table).finish()
    }
}

/// Translates the messages of `routes`, which are locked, and tells the hypervisor all changes at
/// once.
fn install(table: &RouteTable, mut routes: Vec<(&Vector, &mut State)>) {
    let translate = |(route, state): &(&Vector, &mut State)| {
        (route.id, state.message.and_then(|message| route.source.route(message)))
    };
    let changes: Vec<_> = routes.iter().map(translate).collect();
    for ((route, _), (_, leads_to)) in routes.iter().zip(&changes) {
        if leads_to.is_none() {
            route.end.unrouting();
        }
    }
    let left_out = table.update(changes.iter().copied()).map_err(|error| {
        warn_limited!("interrupt routes: {error}; messages are sent one by one");
    });
    for ((route, state), (id, leads_to)) in routes.iter_mut().zip(&changes) {
        let is_set = left_out.as_ref().is_ok_and(|left_out| !left_out.contains(id));
        state.now = match (state.message, leads_to) {
            (None, _) => RouteState::Masked,
            (_, None) => RouteState::Blocked,
            (_, Some(route)) if is_set => RouteState::Routed(route.message),
            _ => RouteState::Unroutable,
        };
        if let Err(error) = route.end.settled(state.now) {
            warn_limited!("interrupt route {id}: {error}; its messages are sent one by one");
            state.now = RouteState::Unroutable;
        }
    }
}

/// The route of one vector. Dropping it takes its message from the hypervisor.
pub struct MsiRoute(Arc<Vector>);

struct Vector {
    table: Arc<RouteTable>,
    id: RouteId,
    source: MsiSource,
    end: Arc<dyn RouteEnd>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// The message as software set it, unless the vector is masked.
    message: Option<MsiMessage>,
    /// What became of it.
    now: RouteState,
    /// The route was dropped: its number may be that of another one.
    gone: bool,
}

impl MsiRoute {
    /// Sets the message as software wrote it; `None` while the vector is masked. When this returns,
    /// the hypervisor no longer sends the old one. Returns what became of it.
    pub fn set(&self, message: Option<MsiMessage>) -> RouteState {
        let mut state = self.state();
        self.0.set(&mut state, message)
    }

    /// The vector fires. A masked one does nothing.
    pub fn fire(&self) {
        let mut state = self.state();
        match (state.message, state.now) {
            (None, _) => {}
            (_, RouteState::Routed(message)) => self.0.end.kick(message),
            (Some(message), _) => self.0.send(&mut state, message),
        }
    }

    /// The vector may have fired without the hypervisor's being connected: if it has a message and
    /// no route, asks `has_fired`, and sends the message if so.
    pub fn fire_unrouted(&self, has_fired: impl FnOnce() -> bool) {
        let mut state = self.state();
        if let (Some(message), RouteState::Blocked | RouteState::Unroutable) =
            (state.message, state.now)
        {
            if has_fired() {
                self.0.send(&mut state, message);
            }
        }
    }

    /// Calls `use_it` with what became of the message, which does not change meanwhile.
    pub fn with_state<R>(&self, use_it: impl FnOnce(RouteState) -> R) -> R {
        use_it(self.state().now)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock()
    }
}

impl Vector {
    fn set(&self, state: &mut State, message: Option<MsiMessage>) -> RouteState {
        state.message = message;
        install(&self.table, vec![(self, &mut *state)]);
        state.now
    }

    /// Sends `message` past the hypervisor's routing.
    fn send(&self, state: &mut State, message: MsiMessage) {
        if self.end.send(&self.source, message) {
            // It was blocked and no longer is, without a notification; or it is always sent like
            // this, and this changes nothing.
            self.set(state, Some(message));
        }
    }
}

impl Drop for MsiRoute {
    fn drop(&mut self) {
        let mut state = self.state();
        self.0.set(&mut state, None);
        state.gone = true;
    }
}

impl fmt::Debug for MsiRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MsiRoute")
            .field("id", &self.0.id)
            .field("source", &self.0.source)
            .field("state", &self.0.state)
            .finish_non_exhaustive()
    }
}
