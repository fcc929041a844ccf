// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Routes on a hypervisor and a remapper that record calls.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;

use super::*;
use crate::patience::wait_until;

const SOURCE: Bdf = Bdf::from_raw(0x18);

/// Records each table. Like KVM, it refuses messages with an upper address that is no APIC's.
#[derive(Default)]
pub struct Recorder {
    calls: Mutex<Vec<Vec<u32>>>,
    refuse: AtomicBool,
    in_use: Mutex<BTreeMap<RouteId, Route>>,
    /// Called within each call.
    meanwhile: Mutex<Option<Box<dyn FnMut() + Send>>>,
}

impl Recorder {
    /// The routes of each table since the last call.
    pub fn calls(&self) -> Vec<Vec<u32>> {
        std::mem::take(&mut *self.calls.lock())
    }

    /// From now on every table is refused, for want of memory.
    pub fn refuse(&self, refuse: bool) {
        self.refuse.store(refuse, Ordering::SeqCst);
    }

    /// The routes of the accepted table.
    pub fn in_use(&self) -> Vec<u32> {
        self.in_use.lock().keys().map(|id| id.0).collect()
    }
}

impl MsiRouting for Recorder {
    fn set(&self, table: &BTreeMap<RouteId, Route>) -> io::Result<()> {
        self.calls.lock().push(table.keys().map(|id| id.0).collect());
        if let Some(meanwhile) = &mut *self.meanwhile.lock() {
            meanwhile();
        }
        if self.refuse.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        if table.values().any(|route| route.message.address >> 32 & 0xff != 0) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.in_use.lock().clone_from(table);
        Ok(())
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
        let translated = self.translate(source, message);
        match translated {
            Some(MsiMessage { address, data }) => sink.send_msi(address, data),
            None => *self.blocked.lock() += 1,
        }
        translated.is_some()
    }

    fn translate(&self, source: Bdf, message: MsiMessage) -> Option<MsiMessage> {
        assert_eq!(source, SOURCE);
        let add = (*self.add.lock())?;
        Some(MsiMessage { data: message.data + add, ..message })
    }
}

/// What happens at the end of a route.
#[derive(Debug, PartialEq, Eq)]
enum Event {
    Kicked(u32),
    Sent(u32),
    Unrouting,
    Settled(RouteState),
}
use Event::*;

#[derive(Default)]
struct End {
    events: Mutex<Vec<Event>>,
    unconnectable: AtomicBool,
}

impl End {
    fn push(&self, event: Event) {
        self.events.lock().push(event);
    }
}

impl RouteEnd for End {
    fn kick(&self, message: MsiMessage) {
        self.push(Kicked(message.data));
    }

    fn send(&self, source: &MsiSource, message: MsiMessage) -> bool {
        source.send(message, self)
    }

    fn unrouting(&self) {
        self.push(Unrouting);
    }

    fn settled(&self, state: RouteState) -> io::Result<()> {
        self.push(Settled(state));
        if self.unconnectable.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(())
    }
}

impl InterruptSink for End {
    fn send_msi(&self, _: u64, data: u32) {
        self.push(Sent(data));
    }
}

struct Machine {
    recorder: Arc<Recorder>,
    adder: Arc<Adder>,
    table: Arc<RouteTable>,
    routes: Arc<RemappedRoutes>,
}

impl Machine {
    fn new(add: Option<u32>) -> Self {
        let recorder = Arc::new(Recorder::default());
        let table = Arc::new(RouteTable::new(recorder.clone(), 24..100));
        let routes = RemappedRoutes::new(table.clone());
        let adder = Arc::new(Adder { add: Mutex::new(add), blocked: Mutex::default() });
        Self { recorder, adder, table, routes }
    }

    /// A route to the remapper, and its end.
    fn route(&self) -> (MsiRoute, Arc<End>) {
        let remapper: Arc<dyn InterruptRemapper> = self.adder.clone();
        self.route_of(MsiSource::new(SOURCE, Some(Arc::downgrade(&remapper))))
    }

    fn route_of(&self, source: MsiSource) -> (MsiRoute, Arc<End>) {
        let end = Arc::new(End::default());
        (self.routes.add(self.table.allocate().unwrap(), source, end.clone()), end)
    }

    fn change(&self, add: Option<u32>) {
        *self.adder.add.lock() = add;
        self.routes.interrupts_changed();
    }
}

fn message(data: u32) -> Option<MsiMessage> {
    Some(MsiMessage { address: 0xfee0_0000, data })
}

fn routed(data: u32) -> RouteState {
    RouteState::Routed(message(data).unwrap())
}

fn events(end: &End) -> Vec<Event> {
    std::mem::take(&mut *end.events.lock())
}

#[test]
fn without_a_remapper_messages_pass_as_they_are() {
    let machine = Machine::new(None);
    let (route, end) = machine.route_of(MsiSource::new(SOURCE, None));
    route.fire();
    assert_eq!(events(&end), []);
    assert_eq!(route.set(message(5)), routed(5));
    route.fire();
    machine.recorder.refuse(true);
    assert_eq!(route.set(message(6)), RouteState::Unroutable);
    route.fire();
    let settled = || Settled(RouteState::Unroutable);
    assert_eq!(events(&end), [Settled(routed(5)), Kicked(5), settled(), Sent(6), settled()]);
}

#[test]
fn a_change_of_remapping_is_one_call_for_all_routes() {
    let machine = Machine::new(Some(0x100));
    let ((one, _), (other, end)) = (machine.route(), machine.route());
    one.set(message(5));
    other.set(message(6));
    machine.recorder.calls();
    machine.change(Some(0x200));
    assert_eq!(machine.recorder.calls(), [[24, 25]]);
    machine.change(Some(0x200));
    assert_eq!(machine.recorder.calls().len(), 0);
    assert_eq!(other.with_state(|state| state), routed(0x206));
    events(&end);
    other.fire();
    assert_eq!(events(&end), [Kicked(0x206)]);
    // Blocked: first whoever writes the eventfd is disconnected.
    machine.change(None);
    assert_eq!(machine.recorder.calls(), [[0; 0]]);
    assert_eq!(events(&end), [Unrouting, Settled(RouteState::Blocked)]);
}

#[test]
fn a_blocked_vector_is_tried_each_time_until_it_passes() {
    let machine = Machine::new(None);
    let (route, end) = machine.route();
    // A translation records no fault; each interrupt sent does.
    assert_eq!(route.set(message(5)), RouteState::Blocked);
    route.fire();
    route.fire();
    route.fire_unrouted(|| true);
    route.fire_unrouted(|| false);
    assert_eq!(*machine.adder.blocked.lock(), 3);
    events(&end);
    // Nobody tells that it passes.
    *machine.adder.add.lock() = Some(1);
    route.fire();
    route.fire();
    assert_eq!(events(&end), [Sent(6), Settled(routed(6)), Kicked(6)]);
    let asked = || -> bool { panic!("whoever is connected reads it") };
    route.fire_unrouted(asked);
    route.set(None);
    route.fire_unrouted(asked);
}

#[test]
fn a_refused_message_is_sent_one_by_one_and_the_others_are_routed() {
    let machine = Machine::new(Some(0));
    let ((bad, bad_end), (good, good_end)) = (machine.route(), machine.route());
    good.set(message(5));
    bad.set(message(6));
    let refused = Some(MsiMessage { address: 0x1_fee0_0000, data: 7 });
    assert_eq!(bad.set(refused), RouteState::Unroutable);
    machine.change(Some(1));
    for (end, route) in [(&bad_end, &bad), (&good_end, &good)] {
        events(end);
        route.fire();
    }
    assert_eq!(events(&good_end), [Kicked(6)]);
    assert_eq!(events(&bad_end), [Sent(8), Settled(RouteState::Unroutable)]);
    assert_eq!(bad.set(message(9)), routed(10));
}

#[test]
fn an_end_that_cannot_be_connected_is_served_one_by_one() {
    let machine = Machine::new(Some(0));
    let (route, end) = machine.route();
    end.unconnectable.store(true, Ordering::SeqCst);
    assert_eq!(route.set(message(5)), RouteState::Unroutable);
    events(&end);
    route.fire();
    assert_eq!(events(&end), [Sent(5), Settled(routed(5))]);
}

#[test]
fn a_remapper_that_is_gone_blocks() {
    let mut machine = Machine::new(Some(0));
    let (route, end) = machine.route();
    machine.adder = Arc::default();
    assert_eq!(route.set(message(5)), RouteState::Blocked);
    route.fire();
    assert_eq!(events(&end), [Unrouting, Settled(RouteState::Blocked)]);
}

#[test]
fn a_route_that_is_dropped_is_gone() {
    let machine = Machine::new(Some(0));
    let (route, end) = machine.route();
    route.set(message(5));
    events(&end);
    drop(route);
    assert_eq!(events(&end), [Unrouting, Settled(RouteState::Masked)]);
    assert_eq!(machine.recorder.calls(), [vec![24], vec![]]);
    machine.change(Some(1));
    assert_eq!(machine.recorder.calls().len(), 0);
}

#[test]
fn a_dropped_route_leaves_its_number_to_the_next_while_a_change_is_under_way() {
    let machine = Machine::new(Some(0));
    let ((busy, _), (old, old_end)) = (machine.route(), machine.route());
    old.set(message(5));
    let id = old.0.id;
    thread::scope(|scope| {
        // The change knows both vectors by then, and waits for the first.
        let firing = busy.state();
        let change = scope.spawn(|| machine.routes.interrupts_changed());
        wait_until("the change", || Arc::strong_count(&old.0) == 2);
        drop(old);
        machine.table.release(id);
        events(&old_end);
        let (new, end) = machine.route();
        assert_eq!((new.0.id, new.set(message(6))), (id, routed(6)));
        drop(firing);
        change.join().unwrap();
        assert_eq!((machine.recorder.in_use(), events(&old_end)), (vec![id.0], vec![]));
        events(&end);
        new.fire();
        assert_eq!(events(&end), [Kicked(6)]);
    });
}

#[test]
fn no_vector_fires_by_the_old_table_while_it_is_replaced() {
    let machine = Machine::new(Some(0));
    let (route, end) = machine.route();
    route.set(message(5));
    events(&end);
    let (started, starts) = mpsc::channel();
    let (route, end) = (Arc::new(route), &end);
    let (firing, seen) = (route.clone(), end.clone());
    let (fired, fires) = mpsc::channel();
    *machine.recorder.meanwhile.lock() = Some(Box::new(move || {
        let (firing, fired, started) = (firing.clone(), fired.clone(), started.clone());
        thread::spawn(move || {
            started.send(()).unwrap();
            firing.fire();
            fired.send(()).unwrap();
        });
        starts.recv().unwrap();
        thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(*seen.events.lock(), [], "it waits");
    }));
    machine.change(Some(1));
    *machine.recorder.meanwhile.lock() = None;
    fires.recv().unwrap();
    assert_eq!(events(end), [Settled(routed(6)), Kicked(6)]);
}
