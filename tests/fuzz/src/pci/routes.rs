// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupt routes, on a hypervisor that refuses some tables and a remapper that blocks some
//! messages: what the hypervisor has is never what neither software nor the remapper wants.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU8, Ordering};
use std::sync::{Arc, Weak};
use twostage::sync::Mutex;

use twostage::spec::pci::Bdf;
use twostage::viommu::routes::{
    MsiRoute, MsiRouting, MsiSource, RemappedRoutes, Route, RouteEnd, RouteId, RouteState,
    RouteTable,
};
use twostage::viommu::{InterruptListener, InterruptRemapper, InterruptSink, MsiMessage};

use crate::input::Input;

const MAX_STEPS: usize = 64;
const VECTORS: usize = 6;
const FIRST: u32 = 24;

/// The hypervisor.
#[derive(Default)]
struct Hypervisor {
    table: Mutex<BTreeMap<RouteId, Route>>,
    /// 1: it has no memory.
    refuses: AtomicU8,
}

impl MsiRouting for Hypervisor {
    fn set(&self, table: &BTreeMap<RouteId, Route>) -> io::Result<()> {
        if self.refuses.load(Ordering::Relaxed) == 1 {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        if table.values().any(|route| route.message.address >> 32 & 0xff != 0) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.table.lock().clone_from(table);
        Ok(())
    }
}

/// Adds to the data, or blocks.
#[derive(Default)]
struct Remapper(AtomicU32);

impl Remapper {
    /// The message that becomes of one.
    fn remapped(&self, message: MsiMessage) -> Option<MsiMessage> {
        let add = self.0.load(Ordering::Relaxed);
        let data = message.data.wrapping_add(add);
        (add % 5 != 4).then_some(MsiMessage { data, ..message })
    }
}

impl InterruptRemapper for Remapper {
    fn send_remapped(&self, _: Bdf, message: MsiMessage, sink: &dyn InterruptSink) -> bool {
        let remapped = self.remapped(message);
        if let Some(MsiMessage { address, data }) = remapped {
            sink.send_msi(address, data);
        }
        remapped.is_some()
    }

    fn translate(&self, _: Bdf, message: MsiMessage) -> Option<MsiMessage> {
        self.remapped(message)
    }
}

/// What comes out.
#[derive(Default)]
struct End(Mutex<Vec<MsiMessage>>);

impl RouteEnd for End {
    fn kick(&self, message: MsiMessage) {
        self.0.lock().push(message);
    }

    fn send(&self, source: &MsiSource, message: MsiMessage) -> bool {
        source.send(message, self)
    }
}

impl InterruptSink for End {
    fn send_msi(&self, address: u64, data: u32) {
        self.kick(MsiMessage { address, data });
    }
}

/// A vector, with the message that software has set.
struct Vector {
    route: MsiRoute,
    id: RouteId,
    message: Option<MsiMessage>,
    /// The hypervisor refused nothing when the route was last made.
    fresh: bool,
}

impl Vector {
    fn has_foreign_address(&self) -> bool {
        self.message.is_some_and(|message| message.address >> 32 != 0)
    }
}

/// One execution.
pub fn run(input: &mut Input<'_>) {
    let hypervisor = Arc::<Hypervisor>::default();
    let remapper = Arc::<Remapper>::default();
    let table = Arc::new(RouteTable::new(hypervisor.clone(), FIRST..FIRST + 4));
    let routes = RemappedRoutes::new(table.clone());
    let end = Arc::<End>::default();
    let mut vectors: Vec<Option<Vector>> = (0..VECTORS).map(|_| None).collect();
    // A message that cannot be routed came while the hypervisor had no memory: it is not known
    // which one it is.
    let mut mixed = false;
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        let number = input.below(VECTORS);
        let refuses = hypervisor.refuses.load(Ordering::Relaxed) == 1;
        match (input.byte() % 8, &mut vectors[number]) {
            (0, place @ None) => {
                let Some(id) = table.allocate() else { continue };
                let weak = Arc::downgrade(&remapper) as Weak<dyn InterruptRemapper>;
                let source = MsiSource::new(Bdf::from_raw(number as u16), Some(weak));
                let route = routes.add(id, source, end.clone());
                // Who had its number may have left something while the hypervisor refused.
                *place = Some(Vector { route, id, message: None, fresh: false });
            }
            (0, place) => {
                if let Some(Vector { route, id, .. }) = place.take() {
                    drop(route);
                    table.release(id);
                }
            }
            (1..=3, Some(vector)) => {
                let address = 0xfee0_0000 | u64::from(input.byte() & 1) << 32;
                let data = u32::from(input.byte());
                vector.message = (data != 0).then_some(MsiMessage { address, data });
                mixed |= refuses && vector.has_foreign_address();
                vector.fresh = !refuses && !mixed;
                vector.route.set(vector.message);
            }
            (4, _) => {
                remapper.0.store(u32::from(input.byte()), Ordering::Relaxed);
                routes.interrupts_changed();
                let mut all = vectors.iter_mut().flatten();
                mixed |= refuses && all.any(|vector| vector.has_foreign_address());
                vectors.iter_mut().flatten().for_each(|vector| vector.fresh = !refuses && !mixed);
            }
            (5, _) => hypervisor.refuses.store(u8::from(input.flag()), Ordering::Relaxed),
            (6, Some(vector)) => {
                end.0.lock().clear();
                vector.route.fire();
                vector.fresh &= !refuses;
                let sent = std::mem::take(&mut *end.0.lock());
                let wanted = vector.message.and_then(|message| remapper.remapped(message));
                assert_eq!(sent, wanted.into_iter().collect::<Vec<_>>());
            }
            (7, Some(vector)) => {
                let routed =
                    vector.route.with_state(|state| matches!(state, RouteState::Routed(_)));
                let fired = input.flag();
                end.0.lock().clear();
                vector.route.fire_unrouted(|| fired);
                vector.fresh &= !refuses;
                let wanted = vector.message.and_then(|message| remapper.remapped(message));
                let wanted = wanted.filter(|_| fired && !routed);
                let sent = std::mem::take(&mut *end.0.lock());
                assert_eq!(sent, wanted.into_iter().collect::<Vec<_>>());
            }
            _ => {}
        }
        check(&hypervisor, &remapper, &vectors);
    }
}

fn check(hypervisor: &Hypervisor, remapper: &Remapper, vectors: &[Option<Vector>]) {
    let table = hypervisor.table.lock();
    let mut ids = BTreeSet::new();
    for vector in vectors.iter().flatten() {
        let Vector { route, id, message, fresh } = vector;
        assert!(ids.insert(*id), "{id} twice");
        let wanted = message.and_then(|message| remapper.remapped(message));
        let has = table.get(id).map(|route| route.message);
        route.with_state(|state| {
            let expected = match (*message, wanted) {
                (None, _) => RouteState::Masked,
                (_, None) => RouteState::Blocked,
                (_, Some(wanted)) => RouteState::Routed(wanted),
            };
            if state == RouteState::Unroutable && wanted.is_some() {
                assert!(!fresh || vector.has_foreign_address(), "{id} can be routed");
            } else {
                assert_eq!(state, expected);
            }
            match state {
                RouteState::Routed(message) => assert_eq!(has, Some(message)),
                _ => assert!(!fresh || has.is_none(), "{id} has an old route"),
            }
        });
    }
}
