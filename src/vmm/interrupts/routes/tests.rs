// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Routes on a fake table, remapper and irqfds that record calls.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicUsize};

use super::*;
use crate::arch::layout::PINS;
use twostage::spec::pci::Bdf;
use twostage::viommu::routes::{MsiRouting, Route};
use twostage::viommu::InterruptRemapper;

const SOURCE: Bdf = Bdf::from_raw(0x18);

/// Like KVM, it refuses messages with an upper address that is no APIC's.
#[derive(Default)]
struct FakeRouting {
    calls: AtomicUsize,
    refuse: AtomicBool,
}

impl MsiRouting for FakeRouting {
    fn set(&self, table: &BTreeMap<RouteId, Route>) -> io::Result<()> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        if self.refuse.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        if table.values().any(|route| route.message.address >> 32 & 0xff != 0) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        Ok(())
    }
}

#[derive(Default)]
struct Ties {
    /// The current ones.
    tied: Mutex<BTreeSet<u32>>,
    undone: Mutex<Vec<u32>>,
    refuse: AtomicBool,
}

impl Irqfds for Ties {
    fn tie(&self, _: &EventFd, gsi: u32) -> std::result::Result<(), errno::Error> {
        if self.refuse.load(Ordering::SeqCst) {
            return Err(errno::Error::new(libc::EMFILE));
        }
        assert!(self.tied.lock().insert(gsi), "{gsi} is tied already");
        Ok(())
    }

    fn untie(&self, _: &EventFd, gsi: u32) -> std::result::Result<(), errno::Error> {
        assert!(self.tied.lock().remove(&gsi), "{gsi} is not tied");
        self.undone.lock().push(gsi);
        Ok(())
    }
}

#[derive(Default)]
struct Sink(Mutex<Vec<(u64, u32)>>);

impl InterruptSink for Sink {
    fn send_msi(&self, address: u64, data: u32) {
        self.0.lock().push((address, data));
    }
}

/// Adds to the data; `None` blocks.
#[derive(Default)]
struct Adder {
    add: Mutex<Option<u32>>,
    blocked: Mutex<u32>,
}

impl InterruptRemapper for Adder {
    fn send_remapped(&self, source: Bdf, message: MsiMessage, sink: &dyn InterruptSink) -> bool {
        match self.translate(source, message) {
            Some(MsiMessage { address, data }) => sink.send_msi(address, data),
            None => *self.blocked.lock() += 1,
        }
        self.add.lock().is_some()
    }

    fn translate(&self, source: Bdf, message: MsiMessage) -> Option<MsiMessage> {
        assert_eq!(source, SOURCE);
        let add = (*self.add.lock())?;
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
        let table = Arc::new(RouteTable::new(routing.clone(), PINS..4096));
        let routes = MsiRoutes::new(table, irqfds.clone());
        let adder = Arc::new(Adder { add: Mutex::new(add), blocked: Mutex::default() });
        Self { routing, irqfds, sink, adder, routes }
    }

    fn route(&self) -> Arc<VectorRoute> {
        self.route_written_by(Writer::Here)
    }

    fn route_written_by(&self, writer: Writer) -> Arc<VectorRoute> {
        let adder: Arc<dyn InterruptRemapper> = self.adder.clone();
        let source = InterruptSource::new(SOURCE, "source", Some(Arc::downgrade(&adder)), None);
        self.routes.allocate(source, self.sink.clone(), writer).unwrap()
    }

    fn change(&self, add: Option<u32>) {
        *self.adder.add.lock() = add;
        self.routes.routes.interrupts_changed();
    }

    /// Number of tables given to KVM, and the data of the first GSI.
    fn routed(&self) -> (usize, Option<u32>) {
        let table = format!("{:?}", self.routes.kvm.table);
        let data = table.split(&format!("RouteId({PINS}): Route")).nth(1).map(|rest| {
            let data = rest.split("data: ").nth(1).unwrap();
            data[..data.find(' ').unwrap()].parse().unwrap()
        });
        (self.routing.calls.load(Ordering::SeqCst), data)
    }

    fn sent(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.sink.0.lock())
    }
}

fn message(data: u32) -> Option<MsiMessage> {
    Some(MsiMessage { address: 0xfee0_0000, data })
}

/// How often the eventfd was written since the last call.
fn written(route: &VectorRoute) -> u64 {
    route.wire.event.read().unwrap_or(0)
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
    // The fault is recorded for each interrupt sent, not for a translation.
    route.trigger();
    route.trigger();
    assert_eq!(*machine.adder.blocked.lock(), 2);
    *machine.adder.add.lock() = Some(1);
    route.trigger();
    assert_eq!((machine.sent(), machine.routed()), (vec![(0xfee0_0000, 6)], (1, Some(6))));
    route.trigger();
    assert_eq!((machine.sent(), written(&route)), (vec![], 1));
    machine.change(None);
    route.trigger();
    assert_eq!((machine.sent(), written(&route), machine.routed()), (vec![], 0, (2, None)));
    assert_eq!(*machine.adder.blocked.lock(), 3);
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
fn a_message_that_kvm_refuses_is_sent_one_by_one_and_the_others_are_routed() {
    let machine = Machine::new(Some(0));
    let (bad, good) = (machine.route(), machine.route());
    good.update(message(5));
    bad.update(message(6));
    bad.update(Some(MsiMessage { address: 0x1_fee0_0000, data: 7 }));
    for _ in 0..2 {
        for route in [&bad, &good] {
            route.trigger();
        }
        assert_eq!((machine.sent(), written(&bad)), (vec![(0x1_fee0_0000, 7)], 0));
        assert_eq!((machine.routes.triggered(), written(&good)), (1, 1));
        machine.change(Some(0));
        good.trigger();
        assert_eq!(written(&good), 1);
        machine.routes.kvm.triggered.store(0, Ordering::SeqCst);
    }
    // A right one is routed again.
    bad.update(message(8));
    bad.trigger();
    assert_eq!((machine.sent(), written(&bad)), (vec![], 1));
}

#[test]
fn a_route_that_is_dropped_is_given_back() {
    let machine = Machine::new(Some(0));
    let route = machine.route();
    route.update(message(5));
    drop(route);
    assert_eq!((machine.routed(), &machine.irqfds.undone.lock()[..]), ((2, None), &[PINS][..]));
    assert_eq!(machine.route().wire.gsi, RouteId(PINS));
    machine.change(Some(1));
}

#[test]
fn a_route_that_kvm_refuses_is_none() {
    let machine = Machine::new(Some(0));
    machine.irqfds.refuse.store(true, Ordering::SeqCst);
    let error = machine
        .routes
        .allocate(
            InterruptSource::new(SOURCE, "source", None, None),
            machine.sink.clone(),
            Writer::Here,
        )
        .unwrap_err();
    assert!(error.to_string().contains("interrupt route"), "{error}");
    machine.irqfds.refuse.store(false, Ordering::SeqCst);
    assert_eq!(machine.route().wire.gsi, RouteId(PINS));
}

#[test]
fn a_remapper_that_is_gone_blocks() {
    let machine = Machine::new(Some(0));
    let route = machine.route();
    let Machine { sink, adder, .. } = machine;
    drop(adder);
    route.update(message(5));
    route.trigger();
    assert_eq!((sink.0.lock().len(), written(&route)), (0, 0));
}

/// A machine with a vector whose eventfd a device writes, and what serves it in the event loop.
fn with_device(add: Option<u32>) -> (Machine, Arc<VectorRoute>, Arc<Unrouted>, Arc<Epoll>) {
    let machine = Machine::new(add);
    let unrouted = machine.routes.kvm.unrouted.clone();
    let epoll = unrouted.epoll().unwrap();
    let route = machine.route_written_by(Writer::Device);
    (machine, route, unrouted, epoll)
}

impl Machine {
    fn tied(&self) -> bool {
        !self.irqfds.tied.lock().is_empty()
    }
}

#[test]
fn kvm_has_a_devices_eventfd_only_while_it_leads_somewhere() {
    let (machine, route, ..) = with_device(Some(0));
    assert!(!machine.tied());
    route.update(message(5));
    assert!(machine.tied());
    route.update(message(6));
    assert!(machine.tied() && machine.irqfds.undone.lock().is_empty());
    assert!(!route.is_pending());
    // Masked: what the device writes stays there.
    route.update(None);
    assert!(!machine.tied());
    route.event().write(1).unwrap();
    assert!(route.is_pending() && route.is_pending());
    route.update(message(6));
    assert!(machine.tied());
    assert_eq!(written(&route), 1, "KVM looks at it when it is tied");
    drop(route);
    assert!(!machine.tied());
}

#[test]
fn a_blocked_device_is_heard_each_time() {
    let (machine, route, unrouted, epoll) = with_device(None);
    route.event().write(1).unwrap();
    unrouted.serve(&epoll);
    assert_eq!(*machine.adder.blocked.lock(), 0, "masked");
    route.update(message(5));
    unrouted.serve(&epoll);
    unrouted.serve(&epoll);
    assert_eq!((*machine.adder.blocked.lock(), machine.tied()), (1, false));
    // It passes now, and goes through KVM from then on.
    *machine.adder.add.lock() = Some(1);
    route.event().write(1).unwrap();
    unrouted.serve(&epoll);
    assert_eq!((machine.sent(), machine.tied()), (vec![(0xfee0_0000, 6)], true));
    route.event().write(1).unwrap();
    unrouted.serve(&epoll);
    assert_eq!((machine.sent(), written(&route)), (vec![], 1), "KVM's to read");
    // Blocked again by a change of remapping, and let through by another.
    machine.change(None);
    assert!(!machine.tied());
    route.event().write(1).unwrap();
    machine.change(Some(2));
    assert!(machine.tied());
    unrouted.serve(&epoll);
    assert_eq!((machine.sent(), written(&route)), (vec![], 1));
}

#[test]
fn a_devices_messages_that_kvm_will_not_route_are_sent_one_by_one() {
    for by_table in [false, true] {
        let (machine, route, unrouted, epoll) = with_device(Some(0));
        let refuse = if by_table { &machine.routing.refuse } else { &machine.irqfds.refuse };
        refuse.store(true, Ordering::SeqCst);
        route.update(message(5));
        assert!(!machine.tied());
        route.event().write(1).unwrap();
        unrouted.serve(&epoll);
        assert_eq!((machine.sent(), written(&route)), (vec![(0xfee0_0000, 5)], 0));
        // Its route is gone before it is looked at.
        route.event().write(1).unwrap();
        drop(route);
        unrouted.serve(&epoll);
        assert_eq!(machine.sent(), []);
    }
}
