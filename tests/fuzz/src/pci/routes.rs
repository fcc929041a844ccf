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

/// One execution.
pub fn run(input: &mut Input<'_>) {
    let hypervisor = Arc::<Hypervisor>::default();
    let remapper = Arc::<Remapper>::default();
    let table = Arc::new(RouteTable::new(hypervisor.clone(), FIRST..FIRST + 4));
    let routes = RemappedRoutes::new(table.clone());
    let end = Arc::<End>::default();
    let mut vectors: Vec<Option<(MsiRoute, RouteId, Option<MsiMessage>)>> =
        (0..VECTORS).map(|_| None).collect();
    // Whether every change reached the hypervisor.
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        let number = input.below(VECTORS);
        match (input.byte() % 8, &mut vectors[number]) {
            (0, place @ None) => {
                let Some(id) = table.allocate() else { continue };
                let weak = Arc::downgrade(&remapper) as Weak<dyn InterruptRemapper>;
                let source = MsiSource::new(Bdf::from_raw(number as u16), Some(weak));
                *place = Some((routes.add(id, source, end.clone()), id, None));
            }
            (0, place) => {
                if let Some((route, id, _)) = place.take() {
                    drop(route);
                    table.release(id);
                }
            }
            (1..=3, Some((route, _, message))) => {
                let address = 0xfee0_0000 | u64::from(input.byte() & 1) << 32;
                let data = u32::from(input.byte());
                *message = (data != 0).then_some(MsiMessage { address, data });
                route.set(*message);
            }
            (4, _) => {
                remapper.0.store(u32::from(input.byte()), Ordering::Relaxed);
                routes.interrupts_changed();
            }
            (5, _) => hypervisor.refuses.store(u8::from(input.flag()), Ordering::Relaxed),
            (6, Some((route, _, message))) => {
                end.0.lock().clear();
                route.fire();
                let sent = std::mem::take(&mut *end.0.lock());
                let wanted = message.and_then(|message| remapper.remapped(message));
                assert_eq!(sent, wanted.into_iter().collect::<Vec<_>>());
            }
            (7, Some((route, ..))) => route.fire_unrouted(|| input.flag()),
            _ => {}
        }
        check(&hypervisor, &remapper, &vectors);
    }
}

fn check(
    hypervisor: &Hypervisor,
    remapper: &Remapper,
    vectors: &[Option<(MsiRoute, RouteId, Option<MsiMessage>)>],
) {
    let table = hypervisor.table.lock();
    let mut ids = BTreeSet::new();
    for (route, id, message) in vectors.iter().flatten() {
        assert!(ids.insert(*id), "{id} twice");
        let wanted = message.and_then(|message| remapper.remapped(message));
        route.with_state(|state| {
            if let RouteState::Routed(message) = state {
                assert_eq!(Some(message), wanted);
                assert_eq!(table.get(id).map(|route| route.message), wanted);
            }
        });
    }
}
