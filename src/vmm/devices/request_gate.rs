// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The gate that decides whether a function may make memory requests; passed for each request.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::RwLockReadGuard;
use twostage::sync::RwLock;

/// The function may not make requests at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the function may make no requests now")]
pub struct NotNow;

/// The gate for the memory requests of one function.
///
/// Revoking the permission waits for the request under way (if any): when it returns, no request is
/// made. A request, while its [`Permit`] is held, must therefore be a bounded piece of work that
/// does not wait, with one exception: behind a virtual VT-d without caching mode, a requester that
/// was blocked by cached tables waits for the register lock before the tables are read again. That
/// lock is only ever held for a fraction of a millisecond, however long a command takes.
#[derive(Debug, Default)]
pub struct RequestGate {
    /// Software has enabled bus mastering (PCIe 6.0 §7.5.1.1.3).
    bus_master: AtomicBool,
    /// The function is running: started and not stopped.
    running: AtomicBool,
    /// Held for reading during a request. Permissions are checked while it is held, and revoked
    /// before it is taken for writing, so at most one request can race with the revocation.
    under_way: RwLock<()>,
}

/// Permission for one request.
#[derive(Debug)]
pub struct Permit<'a> {
    _under_way: RwLockReadGuard<'a, ()>,
}

impl RequestGate {
    /// Takes permission for one request.
    ///
    /// # Errors
    /// The function has no permission.
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

    /// Whether software has enabled bus mastering.
    pub fn bus_master(&self) -> bool {
        self.bus_master.load(Ordering::SeqCst)
    }

    /// Software enables or disables bus mastering. Returns whether this is a change.
    pub fn set_bus_master(&self, allowed: bool) -> bool {
        let changed = self.bus_master.swap(allowed, Ordering::SeqCst) != allowed;
        if changed && !allowed {
            self.wait_for_request();
        }
        changed
    }

    /// The function starts.
    pub fn start(&self) {
        self.running.store(true, Ordering::SeqCst);
    }

    /// The function stops.
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
            // Whether the other thread is waiting yet or not, it cannot have finished.
            thread::yield_now();
            over.store(true, Ordering::SeqCst);
            drop(permit);
            taken.join().unwrap();
        });
        assert_eq!(gate.enter().unwrap_err(), NotNow);
    }
}
