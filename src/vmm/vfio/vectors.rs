// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The vectors of MSI or MSI-X of an assigned device: each an eventfd between VFIO, which writes
//! it, and KVM, which turns it into the guest's message.
//!
//! A vector has no resources until the guest first gives it a message: a device may have two
//! thousand, of which a driver uses ten. From then on VFIO writes its eventfd while the device's
//! MSIs are enabled. While the guest masks the vector the eventfd is not read, so that a pending
//! interrupt is sent with the next message.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use super::host_device::{HostDevice, Irq, IrqInfo};
use crate::pci::{EventVector, InterruptVector};
use crate::Result;
use twostage::ratelimit::RateLimit;
use twostage::viommu::MsiMessage;

/// Creates the guest's side of one vector.
pub type MakeVector = dyn Fn() -> Result<Arc<dyn EventVector>> + Send + Sync;

/// The vectors of one kind of message.
pub struct Vectors {
    host: Arc<dyn HostDevice>,
    irq: Irq,
    info: IrqInfo,
    make: Arc<MakeVector>,
    state: Mutex<State>,
    complaints: RateLimit,
}

struct State {
    /// The device's MSIs are enabled.
    enabled: bool,
    vectors: Vec<Option<Arc<dyn EventVector>>>,
    /// Those whose eventfd VFIO has.
    armed: BTreeSet<usize>,
}

impl Vectors {
    /// `count` vectors of `irq`, no more than VFIO has, disabled. Each is created by `make`.
    pub fn new(
        host: Arc<dyn HostDevice>,
        irq: Irq,
        info: IrqInfo,
        count: usize,
        make: Arc<MakeVector>,
    ) -> Self {
        let vectors = vec![None; count.min(info.count as usize)];
        let state = Mutex::new(State { enabled: false, vectors, armed: BTreeSet::new() });
        Self { host, irq, info, make, state, complaints: RateLimit::default() }
    }

    /// Enables the device's MSIs, of which `count` will be used. No vector is armed yet.
    pub fn enable(&self, count: usize) {
        let mut state = self.state();
        if state.enabled {
            return;
        }
        // Without dynamic allocation, all must be armed now.
        let count = if self.info.fixed { count.min(state.vectors.len()) } else { 1 };
        match self.host.set_triggers(self.irq, 0, &vec![None; count]) {
            Ok(()) => {
                state.enabled = true;
                for number in 0..state.vectors.len() {
                    self.arm(&mut state, number);
                }
            }
            Err(error) => self.complain("switching on", &error),
        }
    }

    /// Disables the device's MSIs. Pending ones are discarded.
    pub fn disable(&self) {
        let mut state = self.state();
        if !std::mem::take(&mut state.enabled) {
            return;
        }
        if let Err(error) = self.host.disable_irq(self.irq) {
            self.complain("switching off", &error);
        }
        state.armed.clear();
        for vector in state.vectors.iter().flatten() {
            // Nothing to read is no error.
            let _ = vector.event().read();
        }
    }

    /// Vector `number` has the message `message`, or is masked.
    pub fn update(&self, number: usize, message: Option<MsiMessage>) {
        let mut state = self.state();
        let Some(place) = state.vectors.get_mut(number) else { return };
        match (&*place, message) {
            (Some(vector), _) => vector.update(message),
            (None, None) => return,
            (None, Some(_)) => match (self.make)() {
                Ok(vector) => {
                    vector.update(message);
                    *place = Some(vector);
                }
                Err(error) => {
                    self.complaints.warn(format_args!("{:?} {number}: {error}", self.irq));
                    return;
                }
            },
        }
        if message.is_some() {
            self.arm(&mut state, number);
        }
    }

    /// Whether an interrupt of vector `number` is pending.
    pub fn is_pending(&self, number: usize) -> bool {
        let state = self.state();
        let vector = state.vectors.get(number).and_then(Option::as_ref);
        vector.is_some_and(|vector| vector.is_pending())
    }

    /// Gives VFIO the eventfd of vector `number`, if there is one and MSIs are enabled.
    fn arm(&self, state: &mut State, number: usize) {
        let Some(Some(vector)) = state.vectors.get(number) else { return };
        if !state.enabled || state.armed.contains(&number) {
            return;
        }
        // At most 2048.
        match self.host.set_triggers(self.irq, number as u32, &[Some(vector.event())]) {
            Ok(()) => {
                state.armed.insert(number);
            }
            Err(error) => self.complain("wiring a vector", &error),
        }
    }

    fn complain(&self, what: &str, error: &io::Error) {
        self.complaints.warn(format_args!("{:?}: {what}: {error}", self.irq));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl fmt::Debug for Vectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        f.debug_struct("Vectors")
            .field("irq", &self.irq)
            .field("enabled", &state.enabled)
            .field("armed", &state.armed)
            .finish_non_exhaustive()
    }
}

/// One vector, for an MSI-X table.
#[derive(Debug)]
pub struct TableVector {
    /// All of them.
    pub vectors: Arc<Vectors>,
    /// Its number.
    pub number: usize,
}

impl InterruptVector for TableVector {
    fn update(&self, message: Option<MsiMessage>) {
        self.vectors.update(self.number, message);
    }

    /// Never called: the device triggers it.
    fn trigger(&self) {}

    fn is_pending(&self) -> bool {
        self.vectors.is_pending(self.number)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{message, FakeDevice, FakeVectors};
    use super::*;

    fn vectors(fixed: bool) -> (Arc<FakeDevice>, Arc<FakeVectors>, Vectors) {
        let (host, made) = (Arc::new(FakeDevice::default()), Arc::new(FakeVectors::default()));
        let info = IrqInfo { count: 4, fixed };
        let vectors = Vectors::new(host.clone(), Irq::Msix, info, 2048, made.maker());
        (host, made, vectors)
    }

    #[test]
    fn a_vector_is_made_and_armed_when_it_is_first_used() {
        let (host, made, vectors) = vectors(false);
        vectors.enable(2048);
        assert_eq!(host.take_calls(), ["Msix 0: [off]"]);
        vectors.update(2, None);
        assert_eq!((host.take_calls().len(), made.count()), (0, 0));
        vectors.update(2, message(5));
        assert_eq!((host.take_calls(), made.count()), (vec!["Msix 2: [on]".to_owned()], 1));
        // Masked and unmasked: VFIO is not called.
        vectors.update(2, None);
        vectors.update(2, message(6));
        assert_eq!((host.take_calls().len(), made.count()), (0, 1));
        assert_eq!(made.take_updates(), ["5", "none", "6"]);
        vectors.disable();
        vectors.disable();
        assert_eq!(host.take_calls(), ["Msix off"]);
        // Beyond what VFIO has.
        vectors.update(4, message(1));
        assert_eq!(made.count(), 1);
    }

    #[test]
    fn what_had_a_message_before_is_armed_with_the_others() {
        let (host, _, vectors) = vectors(true);
        vectors.update(1, message(5));
        assert!(host.take_calls().is_empty());
        vectors.enable(3);
        assert_eq!(host.take_calls(), ["Msix 0: [off, off, off]", "Msix 1: [on]"]);
    }

    #[test]
    fn what_comes_while_masked_is_kept_until_messages_are_off() {
        let (host, made, vectors) = vectors(false);
        vectors.enable(1);
        vectors.update(0, message(5));
        vectors.update(0, None);
        assert!(!vectors.is_pending(0) && !vectors.is_pending(9));
        made.event(0).write(1).unwrap();
        assert!(vectors.is_pending(0));
        vectors.disable();
        assert!(!vectors.is_pending(0));
        host.take_calls();
    }

    #[test]
    fn what_the_host_refuses_is_off() {
        let (host, _, vectors) = vectors(false);
        host.refuse(libc::ENOSPC);
        vectors.enable(1);
        vectors.update(0, message(5));
        host.take_calls();
        vectors.disable();
        assert!(host.take_calls().is_empty(), "it never was on");
    }
}
