// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The thread of the side core: parked, or polling.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::kvm::{insist, Mapped};
use super::pace::{Parked, Watch};
use super::processors::{self, Preemptions, Processors};
use super::{Shared, Unit};
use crate::process::jail::Place;
use twostage::viommu::Look;

/// Rounds between two looks at the clock.
const ROUNDS: u32 = 64;

/// How often KVM may refuse a zone before the thread ends.
const REFUSALS: u32 = 3;

impl Shared {
    /// Until the machine stops.
    pub(super) fn run(&self, place: Place) {
        let (processors, mut preemptions) = (Processors::open(), Preemptions::new());
        if let Some(cpu) = self.cpu {
            if let Err(error) = processors::bind(cpu) {
                log::warn!("the side core is not bound to processor {cpu}: {error}");
            }
        }
        place.take();
        let mut refusals = 0;
        while self.wait() {
            let (start, before) = (Instant::now(), self.tails());
            let parked = if self.auto && processors.usable() <= self.vcpus {
                Parked::NoProcessor
            } else {
                match self.poll(&mut preemptions) {
                    Ok(parked) => parked,
                    Err(error) => {
                        refusals += 1;
                        log::warn!("KVM does not coalesce writes: {error}");
                        if refusals >= REFUSALS {
                            return;
                        }
                        Parked::NoProcessor
                    }
                }
            };
            let now = Instant::now();
            let polled = now.saturating_duration_since(start);
            let count = self.parked.get(parked as usize);
            count.into_iter().for_each(|count| _ = count.fetch_add(1, Ordering::Relaxed));
            self.polled_ms.fetch_add(polled.as_millis() as u64, Ordering::Relaxed);
            let mut state = self.state.lock();
            // One that is to poll anyway begins again when there is something to do.
            if self.auto || parked != Parked::Idle {
                state.rest.parked(now, parked, polled, self.tails() - before);
            }
            state.wanted = false;
        }
    }

    /// Tail writes that it has served.
    fn tails(&self) -> u64 {
        self.units.iter().map(Unit::tails).sum()
    }

    /// Parked, until there is something to poll for. Returns `false` when the machine stops.
    fn wait(&self) -> bool {
        let state = self.state.lock();
        let state = self.changed.wait_while(state, |state| !state.wanted && !state.ended);
        !state.ended
    }

    /// Polls until it parks.
    fn poll(&self, preemptions: &mut Preemptions) -> Result<Parked, kvm_ioctls::Error> {
        let result = self.register_zones().map(|()| {
            self.polls.fetch_add(1, Ordering::Relaxed);
            self.polling.store(true, Ordering::Relaxed);
            preemptions.since();
            let mut watch = Watch::new(self.auto, Instant::now(), self.tails());
            loop {
                let mut worked = false;
                for _ in 0..ROUNDS {
                    worked |= self.serve();
                    std::hint::spin_loop();
                }
                if !worked {
                    // Where others wait for this processor, perhaps the guest itself, one of them
                    // gets it, which counts as a preemption.
                    std::thread::yield_now();
                }
                if self.state.lock().ended {
                    return Parked::Idle;
                }
                let parked = watch.park(Instant::now(), self.tails(), || preemptions.since());
                if let Some(parked) = parked {
                    return parked;
                }
            }
        });
        self.polling.store(false, Ordering::Relaxed);
        self.unregister_zones();
        for unit in &self.units {
            unit.take_back(self);
        }
        // From here on, tail writes exit.
        self.empty_ring();
        result
    }

    /// One round. Returns whether there was anything to do.
    fn serve(&self) -> bool {
        let mut worked = self.empty_ring();
        if !self.abilities.lending {
            return worked;
        }
        for unit in &self.units {
            worked |= unit.serve(self);
        }
        worked
    }

    fn register_zones(&self) -> Result<(), kvm_ioctls::Error> {
        self.units.iter().try_for_each(|unit| unit.coalesce(self))
    }

    fn unregister_zones(&self) {
        self.units.iter().for_each(|unit| unit.end_coalescing(self));
    }
}

impl Unit {
    /// From now on KVM puts tail writes into the ring.
    fn coalesce(&self, shared: &Shared) -> Result<(), kvm_ioctls::Error> {
        if !self.coalesces.load(Ordering::Relaxed) {
            let (address, length) = self.zone();
            shared.vm.register_coalesced_mmio(address, length)?;
            self.coalesces.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// From now on tail writes exit; earlier ones may be in the ring.
    fn end_coalescing(&self, shared: &Shared) {
        if !self.coalesces.swap(false, Ordering::Relaxed) {
            return;
        }
        // With the zone there, tail writes would wait in the ring for another access.
        insist(&shared.stopper, "cease to coalesce writes", || {
            let (address, length) = self.zone();
            shared.vm.unregister_coalesced_mmio(address, length)
        });
    }

    /// The page is not lent any more: reads are free, and tail writes go to the ring.
    fn not_lent(&self, shared: &Shared) {
        self.read_only(shared);
        if let Err(error) = self.coalesce(shared) {
            log::warn!("KVM does not coalesce writes: {error}; they exit");
        }
    }

    /// Lends the page if it is time, or looks at it while it is lent.
    fn serve(&self, shared: &Shared) -> bool {
        let mut loan = self.loan.lock();
        let tails = self.tails();
        if let Some(since) = loan.lent_after {
            return match self.registers.look_at_page() {
                Look::Nothing => false,
                Look::Tail => {
                    self.in_memory.fetch_add(1, Ordering::Relaxed);
                    true
                }
                Look::NotLent => {
                    (loan.lent_after, loan.seen) = (None, tails);
                    loan.patience.came_back(tails - since);
                    self.not_lent(shared);
                    true
                }
            };
        }
        if self.disturbed.swap(false, Ordering::Relaxed) {
            loan.patience.disturbed();
        }
        let new = tails - loan.seen;
        loan.seen = tails;
        if new == 0 || !loan.patience.quiet(new) {
            return false;
        }
        // No tail in the ring may be older than one in memory. A processor writes nothing else
        // before a write that exits is done.
        self.end_coalescing(shared);
        shared.empty_ring();
        if self.registers.lend_page(self.slot.clone()) {
            loan.lent_after = Some(tails);
        } else {
            loan.patience.disturbed();
            self.not_lent(shared);
        }
        true
    }

    /// Takes the page back, if it is lent.
    fn take_back(&self, shared: &Shared) {
        let mut loan = self.loan.lock();
        if let Some(since) = loan.lent_after.take() {
            self.registers.take_page_back();
            let tails = self.tails();
            loan.seen = tails;
            loan.patience.came_back(tails - since);
            self.read_only(shared);
        }
    }

    /// Reads are free again, where they can be.
    fn read_only(&self, shared: &Shared) {
        if !shared.abilities.read_only || shared.stopper.reason().is_some() {
            return;
        }
        if let Err(error) = self.slot.map(Some(Mapped::ReadOnly)) {
            log::warn!("KVM does not map registers: {error}; they are read with exits");
        }
    }
}
