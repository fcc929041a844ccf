// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How emulated devices make requests: memory and messages, and the gate that decides whether a
//! function may make any.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLockReadGuard};
use twostage::sync::RwLock;

use vm_memory::{Bytes, GuestAddress};

use crate::arch::layout::MESSAGE_RANGE;
use crate::memory::MachineMemory;
use twostage::spec::pci::Pasid;
use twostage::viommu::InterruptSink;
use twostage_emulated::{DeviceControl, PageTries};

/// A refused request: the IOMMU blocked and reported it, or nothing answers at the address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("DMA at {address:#x} was refused")]
pub struct DmaError {
    /// The IOVA of the request, in bytes.
    pub address: u64,
    /// The page request group that the function has made for it: after the response
    /// ([`ServiceControl::wait`]) it may try again.
    pub group: Option<u16>,
}

impl DmaError {
    /// The refusal of a request to `address`, for good.
    pub fn at(address: u64) -> Self {
        Self { address, group: None }
    }
}

/// What software has enabled of a function, besides bus mastering.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Services {
    /// Requests may carry a PASID.
    pub pasid: bool,
    /// It may cache translations (ATS).
    pub ats: bool,
    /// It requests pages that are not present (PRI).
    pub pri: bool,
}

/// The services of one function, apart from its requests.
pub trait ServiceControl: Send + Sync {
    /// Software has enabled `services`. What it has not enabled is forgotten: translations without
    /// ATS.
    fn enabled(&self, services: Services);

    /// Waits for the response to the page requests of `group`.
    ///
    /// # Errors
    /// The page at `address` cannot be had, or there was a reset.
    fn wait(&self, group: u16, address: u64, tries: &mut PageTries) -> Result<(), DmaError>;

    /// How many groups of page requests have no response.
    fn outstanding(&self) -> usize;

    /// Forgets them: waits end, and responses that come later are ignored.
    fn reset(&self);
}

impl ServiceControl for DeviceControl {
    fn enabled(&self, services: Services) {
        self.set_device_tlb(services.ats);
    }

    fn wait(&self, group: u16, address: u64, tries: &mut PageTries) -> Result<(), DmaError> {
        self.wait_to_retry(group, address, tries).map_err(|_| DmaError::at(address))
    }

    fn outstanding(&self) -> usize {
        self.outstanding_page_requests()
    }

    fn reset(&self) {
        self.reset_page_requests();
    }
}

/// Makes memory requests on behalf of one function.
///
/// A request lies in one 4 KiB page, as on PCI Express (PCIe 6.0 §2.2.7), and is done completely or
/// not at all.
pub trait DmaMaster: Send {
    /// Fills `data` from `iova`, with `pasid` on the request if given.
    ///
    /// # Errors
    /// The request was refused; the contents of `data` are unspecified.
    fn read(&mut self, pasid: Option<Pasid>, iova: u64, data: &mut [u8]) -> Result<(), DmaError>;

    /// Writes `data` to `iova`, with `pasid` on the request if given.
    ///
    /// # Errors
    /// The request was refused; memory is unchanged.
    fn write(&mut self, pasid: Option<Pasid>, iova: u64, data: &[u8]) -> Result<(), DmaError>;

    /// From now on requests use `services`. By default there are none.
    fn set_services(&mut self, _services: Services) {}

    /// The services of the function; `None` if it has none.
    fn service_control(&self) -> Option<Arc<dyn ServiceControl>> {
        None
    }
}

/// Guest memory without an IOMMU in between: the IOVA is the GPA.
#[derive(Debug)]
pub struct DirectMemory(pub MachineMemory);

impl DirectMemory {
    fn check(&self, pasid: Option<Pasid>, iova: u64, length: usize) -> Result<(), DmaError> {
        // Without an IOMMU, a PASID has no meaning.
        if pasid.is_some() || !self.0.contains(iova, length as u64) {
            return Err(DmaError::at(iova));
        }
        Ok(())
    }
}

impl DmaMaster for DirectMemory {
    fn read(&mut self, pasid: Option<Pasid>, iova: u64, data: &mut [u8]) -> Result<(), DmaError> {
        self.check(pasid, iova, data.len())?;
        self.0.map().read_slice(data, GuestAddress(iova)).map_err(|_| DmaError::at(iova))
    }

    fn write(&mut self, pasid: Option<Pasid>, iova: u64, data: &[u8]) -> Result<(), DmaError> {
        self.check(pasid, iova, data.len())?;
        self.0.map().write_slice(data, GuestAddress(iova)).map_err(|_| DmaError::at(iova))
    }
}

/// Memory access with the interrupt range in front: a dword write there is sent as a message, any
/// other access there is refused.
pub struct MessageWrites {
    memory: Box<dyn DmaMaster>,
    messages: Arc<dyn InterruptSink>,
}

impl MessageWrites {
    /// `memory`, with the interrupt range routed to `messages`.
    pub fn new(memory: Box<dyn DmaMaster>, messages: Arc<dyn InterruptSink>) -> Self {
        Self { memory, messages }
    }
}

impl fmt::Debug for MessageWrites {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MessageWrites").finish_non_exhaustive()
    }
}

fn is_interrupt(pasid: Option<Pasid>, iova: u64) -> bool {
    pasid.is_none() && MESSAGE_RANGE.contains(&iova)
}

impl DmaMaster for MessageWrites {
    fn read(&mut self, pasid: Option<Pasid>, iova: u64, data: &mut [u8]) -> Result<(), DmaError> {
        if is_interrupt(pasid, iova) {
            return Err(DmaError::at(iova));
        }
        self.memory.read(pasid, iova, data)
    }

    fn write(&mut self, pasid: Option<Pasid>, iova: u64, data: &[u8]) -> Result<(), DmaError> {
        if !is_interrupt(pasid, iova) {
            return self.memory.write(pasid, iova, data);
        }
        match <[u8; 4]>::try_from(data) {
            Ok(message) if iova.is_multiple_of(4) => {
                self.messages.send_msi(iova, u32::from_le_bytes(message));
                Ok(())
            }
            _ => Err(DmaError::at(iova)),
        }
    }

    fn set_services(&mut self, services: Services) {
        self.memory.set_services(services);
    }

    fn service_control(&self) -> Option<Arc<dyn ServiceControl>> {
        self.memory.service_control()
    }
}

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

    /// Waits for the request under way, if there is one.
    pub fn wait_for_request(&self) {
        drop(self.under_way.write());
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use twostage::sync::Mutex;

    use super::*;

    #[test]
    fn what_is_no_memory_is_refused_as_a_whole() {
        let mut memory = DirectMemory(MachineMemory::new(0x2000).unwrap());
        memory.write(None, 0x1000, &[1, 2, 3, 4]).unwrap();
        let mut data = [0; 4];
        memory.read(None, 0x1000, &mut data).unwrap();
        assert_eq!(data, [1, 2, 3, 4]);
        let error = memory.write(None, 0x1ffe, &[9; 4]).unwrap_err();
        assert_eq!(error, DmaError::at(0x1ffe));
        memory.read(None, 0x1ffc, &mut data).unwrap();
        assert_eq!(data, [0; 4]);
        assert!(memory.read(Pasid::new(1), 0x1000, &mut data).is_err());
        assert!(memory.read(None, u64::MAX, &mut data).is_err());
    }

    /// Takes every request.
    struct Everything;

    impl DmaMaster for Everything {
        fn read(&mut self, _: Option<Pasid>, _: u64, _: &mut [u8]) -> Result<(), DmaError> {
            Ok(())
        }

        fn write(&mut self, _: Option<Pasid>, _: u64, _: &[u8]) -> Result<(), DmaError> {
            Ok(())
        }
    }

    #[derive(Default)]
    struct Messages(Mutex<Vec<(u64, u32)>>);

    impl InterruptSink for Messages {
        fn send_msi(&self, address: u64, data: u32) {
            self.0.lock().push((address, data));
        }
    }

    #[test]
    fn a_dword_to_the_interrupt_range_is_a_message_and_nothing_else_there_is_done() {
        let messages = Arc::new(Messages::default());
        let mut dma = MessageWrites::new(Box::new(Everything), messages.clone());
        dma.write(None, 0xfee0_1000, &[0x21, 0, 0, 0]).unwrap();
        assert_eq!(*messages.0.lock(), [(0xfee0_1000, 0x21)]);

        assert!(dma.write(None, 0xfee0_0000, &[0; 8]).is_err());
        assert!(dma.write(None, 0xfee0_0002, &[0; 4]).is_err());
        assert!(dma.read(None, 0xfeef_fffc, &mut [0; 4]).is_err());
        dma.write(Pasid::new(1), 0xfee0_0000, &[0; 4]).unwrap();
        dma.write(None, 0xfedf_fffc, &[0; 4]).unwrap();
        dma.write(None, 0xfef0_0000, &[0; 4]).unwrap();
        assert_eq!(messages.0.lock().len(), 1);
    }

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
