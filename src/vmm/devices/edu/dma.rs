// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory access of the educational device.

use std::sync::Arc;

use crate::devices::{DmaError, DmaMaster, NotNow, RequestGate};
use twostage::spec::pci::Pasid;
use twostage_emulated::edu::Requests;

/// Memory behind a gate: each request needs its permission.
pub(super) struct GatedMemory {
    pub memory: Box<dyn DmaMaster>,
    pub gate: Arc<RequestGate>,
}

/// Why a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Stop {
    /// The function may not make requests.
    #[error(transparent)]
    NotNow(#[from] NotNow),
    /// The IOMMU blocked it, or there is no memory.
    #[error(transparent)]
    Refused(#[from] DmaError),
}

impl Requests for GatedMemory {
    type Stop = Stop;

    fn read(&mut self, pasid: Option<Pasid>, iova: u64, data: &mut [u8]) -> Result<usize, Stop> {
        let _permit = self.gate.enter()?;
        self.memory.read(pasid, iova, data)?;
        Ok(data.len())
    }

    fn write(&mut self, pasid: Option<Pasid>, iova: u64, data: &[u8]) -> Result<usize, Stop> {
        let _permit = self.gate.enter()?;
        self.memory.write(pasid, iova, data)?;
        Ok(data.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use twostage::patience::wait_until;
    use twostage::sync::Mutex;
    use twostage_emulated::edu::{Engine, Failure, Transfer, BUFFER_START};

    /// Loses its permission while its first request is made.
    struct Revoked {
        requests: Arc<Mutex<Vec<u64>>>,
        gate: Arc<RequestGate>,
        revoke: Option<std::sync::mpsc::Sender<()>>,
    }

    impl DmaMaster for Revoked {
        fn read(&mut self, _: Option<Pasid>, iova: u64, _: &mut [u8]) -> Result<(), DmaError> {
            self.write(None, iova, &[])
        }

        fn write(&mut self, _: Option<Pasid>, iova: u64, _: &[u8]) -> Result<(), DmaError> {
            self.requests.lock().push(iova);
            drop(self.revoke.take());
            wait_until("the loss of the right", || !self.gate.is_open());
            Ok(())
        }
    }

    #[test]
    fn the_right_is_asked_for_each_request() {
        for to_memory in [false, true] {
            let gate = Arc::new(RequestGate::default());
            gate.set_bus_master(true);
            gate.start();
            let (revoke, revoked) = std::sync::mpsc::channel();
            let revoker = std::thread::spawn({
                let gate = gate.clone();
                move || {
                    // An error means that the other end is gone.
                    revoked.recv().unwrap_err();
                    gate.set_bus_master(false);
                }
            });
            let requests = Arc::<Mutex<Vec<u64>>>::default();
            let (seen, revoke) = (requests.clone(), Some(revoke));
            let memory = Revoked { requests, gate: gate.clone(), revoke };
            let mut memory = GatedMemory { memory: Box::new(memory), gate };
            let (source, destination) =
                if to_memory { (BUFFER_START, 0x1ff0) } else { (0x1ff0, BUFFER_START) };
            let (count, pasid, done) = (0x20, None, 0);
            let mut transfer = Transfer { source, destination, count, to_memory, pasid, done };
            let result = Engine::new(u64::MAX).run(&mut transfer, &mut memory);
            assert_eq!(result, Err(Failure::Stopped { iova: 0x2000, stop: NotNow.into() }));
            assert_eq!(*seen.lock(), [0x1ff0]);
            revoker.join().unwrap();
        }
    }
}
