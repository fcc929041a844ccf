// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The table of routes, as the hypervisor has it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use super::{MsiRouting, Route, RouteId};
use crate::sync::Mutex;
use crate::warn_limited;

/// The table of routes, given to the hypervisor as a whole when it changes.
pub struct RouteTable {
    routing: Arc<dyn MsiRouting>,
    ids: Range<u32>,
    table: Mutex<Table>,
    updates: AtomicU64,
}

#[derive(Default)]
struct Table {
    routes: BTreeMap<RouteId, Route>,
    used: BTreeSet<u32>,
    /// What the hypervisor does not accept. It refuses a table with one of them, so they are left
    /// out.
    refused: BTreeMap<RouteId, Route>,
    /// The hypervisor does not have all of it.
    stale: bool,
}

/// A route's new destination.
type Change = (RouteId, Option<Route>);

impl Table {
    /// Makes a change; returns the inverse change.
    fn set(&mut self, (id, route): Change) -> Change {
        let before = match route {
            Some(route) => self.routes.insert(id, route),
            None => self.routes.remove(&id),
        };
        (id, before)
    }
}

impl RouteTable {
    /// An empty table, which `routing` has from the start. [`RouteTable::allocate`] gives out
    /// numbers of `ids`; the others are the VMM's, to use them as it likes.
    pub fn new(routing: Arc<dyn MsiRouting>, ids: Range<u32>) -> Self {
        Self { routing, ids, table: Mutex::default(), updates: AtomicU64::new(0) }
    }

    /// A free number, initially without a route, to be returned with [`RouteTable::release`];
    /// `None` if none is left.
    pub fn allocate(&self) -> Option<RouteId> {
        let mut table = self.table.lock();
        let free = self.ids.clone().find(|id| !table.used.contains(id))?;
        table.used.insert(free);
        Some(RouteId(free))
    }

    /// Frees `id`, without a route.
    pub fn release(&self, id: RouteId) {
        // If it fails, the route stays a little longer, which is harmless: nobody triggers it.
        let _ = self.update([(id, None)]);
        self.table.lock().used.remove(&id.0);
    }

    /// Sets routes, in one call if any differs from what there is. When this returns `Ok`, the old
    /// ones are no longer used. Returns those whose message the hypervisor does not accept, which
    /// have no route.
    ///
    /// # Errors
    /// The hypervisor has the old table, or one with some of the changes. They are all tried again
    /// with the next change of any route.
    pub fn update(
        &self,
        changes: impl IntoIterator<Item = (RouteId, Option<Route>)>,
    ) -> io::Result<BTreeSet<RouteId>> {
        let mut table = self.table.lock();
        let (mut changed, mut left_out) = (Vec::new(), BTreeSet::new());
        for (id, mut route) in changes {
            if route.is_some() && table.refused.get(&id) == route.as_ref() {
                // It would be refused again.
                left_out.insert(id);
                route = None;
            } else {
                table.refused.remove(&id);
            }
            if table.routes.get(&id) != route.as_ref() {
                changed.push((id, route));
            }
        }
        if table.stale || !changed.is_empty() {
            self.apply(&mut table, &changed, &mut left_out)?;
        }
        Ok(left_out)
    }

    /// Applies `changes`. If the hypervisor refuses the whole table because of a message, bisects
    /// to find it.
    fn apply(
        &self,
        table: &mut Table,
        changes: &[Change],
        left_out: &mut BTreeSet<RouteId>,
    ) -> io::Result<()> {
        let before: Vec<Change> = changes.iter().map(|change| table.set(*change)).collect();
        let error = match self.install(table) {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => error,
            result => return result,
        };
        match changes {
            [] | [(_, None)] => Err(error),
            [(id, Some(refused))] => {
                let Route { source, message } = refused;
                warn_limited!(
                    "interrupt route {id}: the hypervisor does not accept a message of {source} \
                     to {:#x}, which is left out",
                    message.address
                );
                table.set((*id, None));
                table.refused.insert(*id, *refused);
                left_out.insert(*id);
                // The hypervisor still has the old table.
                self.install(table)
            }
            _ => {
                for change in before.into_iter().rev() {
                    table.set(change);
                }
                let (one, other) = changes.split_at(changes.len() / 2);
                self.apply(table, one, left_out)?;
                self.apply(table, other, left_out)
            }
        }
    }

    /// Gives the hypervisor the table.
    fn install(&self, table: &mut Table) -> io::Result<()> {
        self.updates.fetch_add(1, Ordering::Relaxed);
        let result = self.routing.set(&table.routes);
        table.stale = result.is_err();
        result
    }

    /// How often the hypervisor was given a table.
    pub fn updates(&self) -> u64 {
        self.updates.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for RouteTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(&self.table.lock().routes).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Recorder;
    use super::*;
    use crate::spec::pci::Bdf;
    use crate::viommu::MsiMessage;

    const ONE: Route = Route {
        source: Bdf::from_raw(8),
        message: MsiMessage { address: 0xfee0_0000, data: 0x41 },
    };

    /// A table with the numbers from 24 to 99, and its hypervisor.
    fn table() -> (Arc<Recorder>, RouteTable) {
        let recorder = Arc::new(Recorder::default());
        (recorder.clone(), RouteTable::new(recorder, 24..100))
    }

    fn update(table: &RouteTable, changes: &[(u32, Option<Route>)]) -> io::Result<BTreeSet<u32>> {
        let changes = changes.iter().map(|(id, route)| (RouteId(*id), *route));
        Ok(table.update(changes)?.into_iter().map(|RouteId(id)| id).collect())
    }

    #[test]
    fn several_changes_are_one_call_and_none_is_none() {
        let (recorder, table) = table();
        let update = |changes: &[_]| update(&table, changes).unwrap();
        update(&[(24, None)]);
        assert!(recorder.calls().is_empty());
        update(&[(30, Some(ONE)), (2, Some(ONE))]);
        assert_eq!(recorder.calls(), [[2, 30]]);
        update(&[(30, Some(ONE)), (2, Some(ONE))]);
        assert!(recorder.calls().is_empty());
        update(&[(2, Some(Route { source: Bdf::from_raw(16), ..ONE }))]);
        update(&[(2, None)]);
        assert_eq!(recorder.calls(), [vec![2, 30], vec![30]]);
    }

    #[test]
    fn a_change_that_was_refused_is_tried_again() {
        let (recorder, table) = table();
        recorder.refuse(true);
        assert!(update(&table, &[(24, Some(ONE))]).is_err());
        recorder.refuse(false);
        update(&table, &[(25, None)]).unwrap();
        update(&table, &[(24, Some(ONE))]).unwrap();
        assert_eq!((recorder.calls(), table.updates()), (vec![vec![24], vec![24]], 2));
        assert_eq!(recorder.in_use(), [24]);
    }

    fn to(address: u64) -> Option<Route> {
        Some(Route { message: MsiMessage { address, data: 0x41 }, ..ONE })
    }

    #[test]
    fn a_message_that_is_refused_is_left_out_and_no_other() {
        let (recorder, table) = table();
        let (good, bad) = (to(0xfee0_0000), to(0x1_fee0_0000));
        update(&table, &[(24, good), (25, good)]).unwrap();
        // The old route is removed: it is not what it was.
        assert_eq!(update(&table, &[(24, bad)]).unwrap(), BTreeSet::from([24]));
        assert_eq!(recorder.in_use(), [25]);
        // Setting it again costs nothing.
        let updates = table.updates();
        assert_eq!(update(&table, &[(24, bad), (25, good)]).unwrap(), BTreeSet::from([24]));
        assert_eq!(table.updates(), updates);
        let changes: Vec<_> =
            (24..40).map(|id| (id, if id % 5 == 0 { bad } else { good })).collect();
        let refused = BTreeSet::from([25, 30, 35]);
        assert_eq!(update(&table, &changes).unwrap(), refused);
        assert_eq!(recorder.in_use(), (24..40).filter(|id| id % 5 != 0).collect::<Vec<_>>());
        assert_eq!(update(&table, &changes).unwrap(), refused);
        // Valid from now on.
        assert_eq!(update(&table, &[(25, good)]).unwrap(), BTreeSet::new());
        assert!(recorder.in_use().contains(&25));
        table.release(RouteId(25));
        assert!(!recorder.in_use().contains(&25));
    }

    #[test]
    fn numbers_are_allocated_in_their_range_and_given_back() {
        let (_, table) = table();
        let next = || table.allocate().unwrap().0;
        assert_eq!((next(), next()), (24, 25));
        table.release(RouteId(24));
        assert_eq!((next(), next()), (24, 26));
        assert_eq!(std::iter::from_fn(|| table.allocate()).last(), Some(RouteId(99)));
        table.release(RouteId(50));
        assert_eq!((table.allocate(), table.allocate()), (Some(RouteId(50)), None));
    }
}
