// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Routes of message-signalled interrupts: an eventfd each, which KVM turns into the remapped
//! message without leaving the kernel.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vmm_sys_util::errno;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use super::gsi::{GsiTable, SentMessage};
use super::InterruptSource;
use crate::viommu::{InterruptListener, InterruptSink, MsiMessage};
use crate::vmm::pci::InterruptVector;
use crate::vmm::{Error, Result};

/// Ties eventfds to GSIs.
pub(super) trait Irqfds: Send + Sync {
    /// From now on writing `event` triggers `gsi`.
    fn tie(&self, event: &EventFd, gsi: u32) -> std::result::Result<(), errno::Error>;

    /// Not any more.
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
///
/// Lock order: the list of routes, a route, the remapper, KVM's table.
pub struct MsiRoutes {
    table: Arc<GsiTable>,
    irqfds: Arc<dyn Irqfds>,
    routes: Mutex<Vec<Weak<VectorRoute>>>,
    triggered: AtomicU64,
}

impl MsiRoutes {
    /// No routes yet.
    pub(super) fn new(table: Arc<GsiTable>, irqfds: Arc<dyn Irqfds>) -> Arc<Self> {
        let (routes, triggered) = (Mutex::default(), AtomicU64::new(0));
        Arc::new(Self { table, irqfds, routes, triggered })
    }

    /// How often a route was triggered, and KVM did the rest.
    pub fn triggered(&self) -> u64 {
        self.triggered.load(Ordering::Relaxed)
    }

    /// A route for a vector of `source`, without a message. Messages that cannot be routed go to
    /// `messages`, one by one.
    ///
    /// # Errors
    /// KVM has no more of them, or the process no more file descriptors.
    pub fn allocate(
        self: &Arc<Self>,
        source: InterruptSource,
        messages: Arc<dyn InterruptSink>,
    ) -> Result<Arc<VectorRoute>> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(Error::os("eventfd"))?;
        let gsi = self.table.allocate()?;
        if let Err(error) = self.irqfds.tie(&event, gsi) {
            self.table.release(gsi);
            return Err(Error::kvm("making an interrupt route")(error));
        }
        let state = Mutex::new(State { message: None, routed: None });
        let routes = self.clone();
        let route = Arc::new(VectorRoute { routes, source, messages, gsi, event, state });
        let mut routes = self.list();
        routes.retain(|route| route.strong_count() > 0);
        routes.push(Arc::downgrade(&route));
        Ok(route)
    }

    fn list(&self) -> MutexGuard<'_, Vec<Weak<VectorRoute>>> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl InterruptListener for MsiRoutes {
    fn interrupts_changed(&self) {
        let routes: Vec<_> = self.list().iter().filter_map(Weak::upgrade).collect();
        // All are held until KVM has the new table: nobody triggers by the old one meanwhile.
        let mut states: Vec<_> = routes.iter().map(|route| route.state()).collect();
        let changes: Vec<_> = routes
            .iter()
            .zip(&states)
            .map(|(route, state)| (route.gsi, route.translate(state.message)))
            .collect();
        let result = self.table.update(changes.iter().copied());
        if let Err(error) = &result {
            log::error!("interrupt routes: {error}; messages are sent one by one");
        }
        for (state, (_, sent)) in states.iter_mut().zip(&changes) {
            state.routed = sent.filter(|_| result.is_ok()).map(|sent| sent.message);
        }
    }
}

impl fmt::Debug for MsiRoutes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MsiRoutes").field(&self.table).finish()
    }
}

/// The route of one vector. Dropping it gives it back.
pub struct VectorRoute {
    routes: Arc<MsiRoutes>,
    source: InterruptSource,
    messages: Arc<dyn InterruptSink>,
    gsi: u32,
    event: EventFd,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// The message as software set it up, while it is not masked.
    message: Option<MsiMessage>,
    /// What becomes of it, if KVM knows: writing the eventfd sends that.
    routed: Option<MsiMessage>,
}

impl InterruptVector for VectorRoute {
    /// When this returns, nothing is sent by the old message.
    fn update(&self, message: Option<MsiMessage>) {
        self.install(&mut self.state(), message);
    }

    /// Nothing is sent while there is no message.
    fn trigger(&self) {
        let mut state = self.state();
        let Some(message) = state.message else { return };
        if let Some(routed) = state.routed {
            self.routes.triggered.fetch_add(1, Ordering::Relaxed);
            self.source.trace_route(self.gsi, routed);
            if let Err(error) = self.event.write(1) {
                log::debug!("interrupt route {}: {error}", self.gsi);
            }
        } else if self.source.send(message, &*self.messages) {
            // It was blocked and is not now, without a change that anybody was told of.
            self.install(&mut state, Some(message));
        }
    }
}

impl VectorRoute {
    fn install(&self, state: &mut State, message: Option<MsiMessage>) {
        let translated = self.translate(message);
        let result = self.routes.table.update([(self.gsi, translated)]);
        if let Err(error) = &result {
            log::error!("interrupt route {}: {error}; messages are sent one by one", self.gsi);
        }
        let routed = translated.filter(|_| result.is_ok());
        *state = State { message, routed: routed.map(|sent| sent.message) };
    }

    fn translate(&self, message: Option<MsiMessage>) -> Option<SentMessage> {
        message.and_then(|message| self.source.sent(message))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for VectorRoute {
    fn drop(&mut self) {
        if let Err(error) = self.routes.irqfds.untie(&self.event, self.gsi) {
            log::error!("interrupt route {}: {error}", self.gsi);
        }
        self.routes.table.release(self.gsi);
    }
}

impl fmt::Debug for VectorRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VectorRoute")
            .field("source", &self.source)
            .field("gsi", &self.gsi)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::super::gsi::tests::FakeRouting;
    use super::*;
    use crate::spec::pci::Bdf;
    use crate::viommu::InterruptRemapper;
    use crate::vmm::arch::layout::PINS;

    const SOURCE: Bdf = Bdf::from_raw(0x18);

    #[derive(Default)]
    struct Ties {
        undone: Mutex<Vec<u32>>,
        refuse: AtomicBool,
    }

    impl Irqfds for Ties {
        fn tie(&self, _: &EventFd, _: u32) -> std::result::Result<(), errno::Error> {
            match self.refuse.load(Ordering::SeqCst) {
                true => Err(errno::Error::new(libc::EMFILE)),
                false => Ok(()),
            }
        }

        fn untie(&self, _: &EventFd, gsi: u32) -> std::result::Result<(), errno::Error> {
            self.undone.lock().unwrap().push(gsi);
            Ok(())
        }
    }

    #[derive(Default)]
    struct Sink(Mutex<Vec<(u64, u32)>>);

    impl InterruptSink for Sink {
        fn send_msi(&self, address: u64, data: u32) {
            self.0.lock().unwrap().push((address, data));
        }
    }

    /// Adds to the data; `None` blocks.
    #[derive(Default)]
    struct Adder {
        add: Mutex<Option<u32>>,
        blocked: Mutex<u32>,
    }

    impl InterruptRemapper for Adder {
        fn send_remapped(
            &self,
            source: Bdf,
            message: MsiMessage,
            sink: &dyn InterruptSink,
        ) -> bool {
            match self.translate(source, message) {
                Some(MsiMessage { address, data }) => sink.send_msi(address, data),
                None => *self.blocked.lock().unwrap() += 1,
            }
            self.add.lock().unwrap().is_some()
        }

        fn translate(&self, source: Bdf, message: MsiMessage) -> Option<MsiMessage> {
            assert_eq!(source, SOURCE);
            let add = (*self.add.lock().unwrap())?;
            Some(MsiMessage { data: message.data + add, ..message })
        }
    }

    struct Machine {
        routing: Arc<FakeRouting>,
        irqfds: Arc<Ties>,
        sink: Arc<Sink>,
        adder: Arc<Adder>,
        routes: Arc<MsiRoutes>,
    }

    impl Machine {
        fn new(add: Option<u32>) -> Self {
            let (routing, irqfds) = (Arc::new(FakeRouting::default()), Arc::new(Ties::default()));
            let sink = Arc::new(Sink::default());
            let table = Arc::new(GsiTable::new(routing.clone(), Vec::new()));
            let routes = MsiRoutes::new(table, irqfds.clone());
            let adder = Arc::new(Adder { add: Mutex::new(add), blocked: Mutex::default() });
            Self { routing, irqfds, sink, adder, routes }
        }

        fn route(&self) -> Arc<VectorRoute> {
            let adder: Arc<dyn InterruptRemapper> = self.adder.clone();
            let source = InterruptSource::new(SOURCE, Some(Arc::downgrade(&adder)), None);
            self.routes.allocate(source, self.sink.clone()).unwrap()
        }

        fn change(&self, add: Option<u32>) {
            *self.adder.add.lock().unwrap() = add;
            self.routes.interrupts_changed();
        }

        /// Times KVM was given a table, and the data that the first GSI leads to.
        fn routed(&self) -> (usize, Option<u32>) {
            let table = format!("{:?}", self.routes.table);
            let data = table.split(&format!("{PINS}: SentMessage")).nth(1).map(|rest| {
                let data = rest.split("data: ").nth(1).unwrap();
                data[..data.find(' ').unwrap()].parse().unwrap()
            });
            (self.routing.calls.lock().unwrap().len(), data)
        }

        fn sent(&self) -> Vec<(u64, u32)> {
            std::mem::take(&mut self.sink.0.lock().unwrap())
        }
    }

    fn message(data: u32) -> Option<MsiMessage> {
        Some(MsiMessage { address: 0xfee0_0000, data })
    }

    /// How often the eventfd was written since the last time.
    fn written(route: &VectorRoute) -> u64 {
        route.event.read().unwrap_or(0)
    }

    #[test]
    fn a_routed_vector_is_an_eventfd_and_nothing_else() {
        let machine = Machine::new(Some(0x100));
        let route = machine.route();
        route.trigger();
        assert_eq!((written(&route), machine.routed()), (0, (0, None)));
        route.update(message(5));
        assert_eq!(machine.routed(), (1, Some(0x105)));
        route.trigger();
        route.trigger();
        assert_eq!((written(&route), machine.routed().0), (2, 1));
        assert_eq!(machine.routes.triggered(), 2);
        route.update(None);
        route.trigger();
        assert_eq!((written(&route), machine.routed()), (0, (2, None)));
        assert_eq!(machine.sent(), []);
    }

    #[test]
    fn routes_are_translated_anew_when_interrupts_change() {
        let machine = Machine::new(Some(0x100));
        let (route, other) = (machine.route(), machine.route());
        route.update(message(5));
        other.update(message(6));
        assert_eq!(machine.routed(), (2, Some(0x105)));
        machine.change(Some(0x200));
        // Both in one call.
        assert_eq!(machine.routed(), (3, Some(0x205)));
        machine.change(Some(0x200));
        assert_eq!(machine.routed().0, 3);
        route.trigger();
        assert_eq!((written(&route), machine.sent()), (1, vec![]));
    }

    #[test]
    fn a_blocked_vector_is_tried_each_time_until_it_passes() {
        let machine = Machine::new(None);
        let route = machine.route();
        route.update(message(5));
        assert_eq!(machine.routed(), (0, None));
        // The fault is recorded for each interrupt that was sent, and not for a translation.
        route.trigger();
        route.trigger();
        assert_eq!(*machine.adder.blocked.lock().unwrap(), 2);
        *machine.adder.add.lock().unwrap() = Some(1);
        route.trigger();
        assert_eq!((machine.sent(), machine.routed()), (vec![(0xfee0_0000, 6)], (1, Some(6))));
        route.trigger();
        assert_eq!((machine.sent(), written(&route)), (vec![], 1));
        machine.change(None);
        route.trigger();
        assert_eq!((machine.sent(), written(&route), machine.routed()), (vec![], 0, (2, None)));
        assert_eq!(*machine.adder.blocked.lock().unwrap(), 3);
    }

    #[test]
    fn what_kvm_will_not_route_is_sent_one_by_one() {
        let machine = Machine::new(Some(0));
        let route = machine.route();
        machine.routing.refuse.store(true, Ordering::SeqCst);
        route.update(message(5));
        route.trigger();
        assert_eq!((machine.sent(), written(&route)), (vec![(0xfee0_0000, 5)], 0));
    }

    #[test]
    fn a_route_that_is_dropped_is_given_back() {
        let machine = Machine::new(Some(0));
        let route = machine.route();
        route.update(message(5));
        drop(route);
        assert_eq!(
            (machine.routed(), &machine.irqfds.undone.lock().unwrap()[..]),
            ((2, None), &[PINS][..])
        );
        assert_eq!(machine.route().gsi, PINS);
        machine.change(Some(1));
    }

    #[test]
    fn a_route_that_kvm_refuses_is_none() {
        let machine = Machine::new(Some(0));
        machine.irqfds.refuse.store(true, Ordering::SeqCst);
        let error = machine
            .routes
            .allocate(InterruptSource::new(SOURCE, None, None), machine.sink.clone())
            .unwrap_err();
        assert!(error.to_string().contains("interrupt route"), "{error}");
        machine.irqfds.refuse.store(false, Ordering::SeqCst);
        assert_eq!(machine.route().gsi, PINS);
    }

    #[test]
    fn a_remapper_that_is_gone_blocks() {
        let machine = Machine::new(Some(0));
        let route = machine.route();
        let Machine { sink, adder, .. } = machine;
        drop(adder);
        route.update(message(5));
        route.trigger();
        assert_eq!((sink.0.lock().unwrap().len(), written(&route)), (0, 0));
    }
}
