// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The DMA of the educational device: between memory and its buffer.

use std::sync::Arc;

use crate::devices::{DmaError, DmaMaster, NotNow, RequestGate};
use twostage::spec::pci::Pasid;

/// Where the buffer is among the device's own addresses.
pub(super) const BUFFER_START: u64 = 0x4_0000;
/// Length of the buffer, in bytes.
pub(super) const BUFFER_SIZE: usize = 4096;
/// No request crosses a boundary of this many bytes (PCIe 6.0 §2.2.7).
const REQUEST_BOUNDARY: u64 = 4096;

/// A transfer as software asked for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Transfer {
    pub source: u64,
    pub destination: u64,
    /// In bytes.
    pub count: u64,
    /// From the buffer to memory; the other way otherwise.
    pub to_memory: bool,
    pub pasid: Option<Pasid>,
}

/// Why a transfer was not done, or not all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Failure {
    /// The function may not make requests, or not any more; those before are done.
    #[error(transparent)]
    NotNow(#[from] NotNow),
    /// It does not lie in the buffer.
    #[error("DMA of {count:#x} bytes at device address {address:#x} does not lie in the buffer")]
    Bounds { address: u64, count: u64 },
    /// A request was refused; those before it are done.
    #[error(transparent)]
    Refused(#[from] DmaError),
}

/// Does the transfers.
pub(super) struct Engine {
    memory: Box<dyn DmaMaster>,
    gate: Arc<RequestGate>,
    mask: u64,
    buffer: Box<[u8; BUFFER_SIZE]>,
}

impl Engine {
    /// An engine that reaches `memory` with the address bits set in `mask`, through `gate`.
    pub fn new(memory: Box<dyn DmaMaster>, mask: u64, gate: Arc<RequestGate>) -> Self {
        Self { memory, gate, mask, buffer: Box::new([0; BUFFER_SIZE]) }
    }

    /// Does `transfer`, request by request, until one is refused or not allowed.
    pub fn run(&mut self, transfer: &Transfer) -> Result<(), Failure> {
        let (device, memory) = match transfer.to_memory {
            true => (transfer.source, transfer.destination),
            false => (transfer.destination, transfer.source),
        };
        let buffer = buffer_range(device, transfer.count)
            .and_then(|range| self.buffer.get_mut(range))
            .ok_or(Failure::Bounds { address: device, count: transfer.count })?;
        let start = memory & self.mask;
        let mut offset = 0;
        while offset < buffer.len() {
            let iova = start.wrapping_add(offset as u64) & self.mask;
            // At most 4096, so it fits.
            let length = (REQUEST_BOUNDARY - iova % REQUEST_BOUNDARY) as usize;
            let end = buffer.len().min(offset + length);
            let part = &mut buffer[offset..end];
            let _permit = self.gate.enter()?;
            if transfer.to_memory {
                self.memory.write(transfer.pasid, iova, part)?;
            } else {
                // What a refused read leaves behind must not show.
                let mut data = [0; BUFFER_SIZE];
                let data = &mut data[..part.len()];
                self.memory.read(transfer.pasid, iova, data)?;
                part.copy_from_slice(data);
            }
            offset = end;
        }
        Ok(())
    }
}

/// The bytes of the buffer that `count` bytes from device address `address` on are.
fn buffer_range(address: u64, count: u64) -> Option<std::ops::Range<usize>> {
    let start = address.checked_sub(BUFFER_START)?;
    let end = start.checked_add(count)?;
    (end <= BUFFER_SIZE as u64).then_some(start as usize..end as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use twostage::patience::wait_until;
    use twostage::sync::Mutex;

    /// Records requests, and refuses those to one page.
    #[derive(Clone, Default)]
    struct Recorder {
        requests: Arc<Mutex<Vec<(bool, u64, usize)>>>,
        refused: Option<u64>,
    }

    impl Recorder {
        fn request(&self, write: bool, iova: u64, length: usize) -> Result<(), DmaError> {
            self.requests.lock().push((write, iova, length));
            match self.refused {
                Some(page) if page == iova & !0xfff => Err(DmaError { address: iova }),
                _ => Ok(()),
            }
        }
    }

    impl DmaMaster for Recorder {
        fn read(&mut self, _: Option<Pasid>, iova: u64, data: &mut [u8]) -> Result<(), DmaError> {
            data.fill(0xaa);
            self.request(false, iova, data.len())
        }

        fn write(&mut self, _: Option<Pasid>, iova: u64, data: &[u8]) -> Result<(), DmaError> {
            self.request(true, iova, data.len())
        }
    }

    fn engine(memory: &(impl DmaMaster + Clone + 'static), mask: u64) -> Engine {
        let gate = Arc::new(RequestGate::default());
        gate.set_bus_master(true);
        gate.start();
        Engine::new(Box::new(memory.clone()), mask, gate)
    }

    fn transfer(memory: u64, device: u64, count: u64, to_memory: bool) -> Transfer {
        let (source, destination) = if to_memory { (device, memory) } else { (memory, device) };
        Transfer { source, destination, count, to_memory, pasid: None }
    }

    #[test]
    fn requests_stay_in_their_page() {
        let memory = Recorder::default();
        let mut engine = engine(&memory, u64::MAX);
        engine.run(&transfer(0x1ff0, BUFFER_START, 0x1000, true)).unwrap();
        assert_eq!(*memory.requests.lock(), [(true, 0x1ff0, 0x10), (true, 0x2000, 0xff0)]);
    }

    #[test]
    fn a_refused_read_leaves_the_buffer_as_it_was() {
        let memory = Recorder { refused: Some(0x2000), ..Recorder::default() };
        let mut engine = engine(&memory, u64::MAX);
        let refused = engine.run(&transfer(0x1ff0, BUFFER_START + 0x10, 0x20, false));
        assert_eq!(refused, Err(Failure::Refused(DmaError { address: 0x2000 })));
        assert_eq!(engine.buffer[..0x10], [0; 0x10]);
        assert_eq!(engine.buffer[0x10..0x20], [0xaa; 0x10]);
        assert_eq!(engine.buffer[0x20..0x40], [0; 0x20]);
    }

    #[test]
    fn transfers_outside_the_buffer_reach_nothing() {
        let memory = Recorder::default();
        let mut engine = engine(&memory, u64::MAX);
        for (address, count) in [
            (0, 1),
            (BUFFER_START - 1, 1),
            (BUFFER_START, 0x1001),
            (BUFFER_START + 0xfff, 2),
            (BUFFER_START, u64::MAX),
            (u64::MAX, 1),
        ] {
            let failure = engine.run(&transfer(0x1000, address, count, true));
            assert_eq!(failure, Err(Failure::Bounds { address, count }));
        }
        assert!(memory.requests.lock().is_empty());
        engine.run(&transfer(0x1000, BUFFER_START + 0x1000, 0, true)).unwrap();
    }

    #[test]
    fn addresses_are_cut_to_the_mask() {
        let memory = Recorder::default();
        let mut engine = engine(&memory, (1 << 28) - 1);
        engine.run(&transfer(0x1_2345_6000, BUFFER_START, 8, true)).unwrap();
        engine.run(&transfer(0x0fff_fffc, BUFFER_START, 8, true)).unwrap();
        assert_eq!(
            *memory.requests.lock(),
            [(true, 0x0345_6000, 8), (true, 0x0fff_fffc, 4), (true, 0, 4)]
        );
    }

    /// While its first request is made, somebody takes the right away.
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
                    // An error says that the other end is gone.
                    revoked.recv().unwrap_err();
                    gate.set_bus_master(false);
                }
            });
            let requests = Arc::<Mutex<Vec<u64>>>::default();
            let (seen, revoke) = (requests.clone(), Some(revoke));
            let memory = Revoked { requests, gate: gate.clone(), revoke };
            let mut engine = Engine::new(Box::new(memory), u64::MAX, gate);
            let result = engine.run(&transfer(0x1ff0, BUFFER_START, 0x20, to_memory));
            assert_eq!(result, Err(Failure::NotNow(NotNow)));
            assert_eq!(*seen.lock(), [0x1ff0]);
            revoker.join().unwrap();
        }
    }
}
