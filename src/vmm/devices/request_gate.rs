// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether a function may make memory requests: asked for each of them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::RwLockReadGuard;
use twostage::sync::RwLock;

/// The function may make no requests just now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the function may make no requests now")]
pub struct NotNow;

/// The gate that the memory requests of one function pass.
///
/// Who takes the right away waits for the request that is being made, and for no other: none is
/// made when they return. So a request, while its [`Permit`] is held, is a bounded piece of work in
/// which nothing is waited for, but for one thing: behind a virtual VT-d without caching mode, a
/// requester that its tables blocked waits for its turn at the unit's registers, before they are
/// read again. Others have those for a fraction of a millisecond at a time, however long their
/// commands are.
#[derive(Debug, Default)]
pub struct RequestGate {
    /// Software lets the function be bus master (PCIe 6.0 §7.5.1.1.3).
    bus_master: AtomicBool,
    /// The function works: it was started, and not told to stop.
    running: AtomicBool,
    /// Held for reading while a request is made. Rights are looked at with it held, and taken away
    /// before it is asked for: that cannot be overtaken by one request after the other.
    under_way: RwLock<()>,
}

/// The right to make one request.
#[derive(Debug)]
pub struct Permit<'a> {
    _under_way: RwLockReadGuard<'a, ()>,
}

impl RequestGate {
    /// The right to make one request now.
    ///
    /// # Errors
    /// The function has not got it.
    pub fn enter(&self) -> Result<Permit<'_>, NotNow> {
        let under_way = self.under_way.read();
        if self.is_open() {
            Ok(Permit { _under_way: under_way })
        } else {
            Err(NotNow)
        }
    }

    /// Whether the function may make requests.
    pub fn is_open(&self) -> bool {
        self.bus_master() && self.running.load(Ordering::SeqCst)
    }

    /// Whether software lets the function be bus master.
    pub fn bus_master(&self) -> bool {
        self.bus_master.load(Ordering::SeqCst)
    }

    /// Software lets the function be bus master, or not any more. Says whether that is a change.
    pub fn set_bus_master(&self, allowed: bool) -> bool {
        let changed = self.bus_master.swap(allowed, Ordering::SeqCst) != allowed;
        if changed && !allowed {
            self.wait_for_request();
        }
        changed
    }

    /// The function starts to work.
    pub fn start(&self) {
        self.running.store(true, Ordering::SeqCst);
    }

    /// The function works no more.
    pub fn stop(&self) {
        self.running.store(false, Ordering::SeqCst);
        self.wait_for_request();
    }

    fn wait_for_request(&self) {
        drop(self.under_way.write());
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn both_rights_are_needed() {
        let gate = RequestGate::default();
        assert!(gate.enter().is_err());
        assert!(gate.set_bus_master(true));
        assert!(!gate.set_bus_master(true));
        assert!(gate.enter().is_err() && !gate.is_open() && gate.bus_master());
        gate.start();
        assert!(gate.enter().is_ok() && gate.is_open());
        gate.set_bus_master(false);
        assert!(gate.enter().is_err());
        gate.set_bus_master(true);
        gate.stop();
        assert!(gate.enter().is_err());
    }

    #[test]
    fn who_takes_the_right_away_waits_for_the_request() {
        let gate = RequestGate::default();
        gate.set_bus_master(true);
        gate.start();
        let over = AtomicBool::new(false);
        let permit = gate.enter().unwrap();
        thread::scope(|scope| {
            let taken = scope.spawn(|| {
                gate.set_bus_master(false);
                assert!(over.load(Ordering::SeqCst), "the request was still being made");
            });
            // Whether the other thread is there yet or not: it cannot be through.
            thread::yield_now();
            over.store(true, Ordering::SeqCst);
            drop(permit);
            taken.join().unwrap();
        });
        assert_eq!(gate.enter().unwrap_err(), NotNow);
    }
}
