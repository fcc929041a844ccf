// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A fake device and its surroundings, for tests.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::Arc;
use twostage::sync::Mutex;

use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use super::host_device::{HostDevice, Irq, IrqInfo, Region};
use super::mapping::{Lender, Loan, Mapping};
use super::vectors::MakeVector;
use crate::pci::{EventVector, InterruptVector};
use twostage::viommu::MsiMessage;

/// Something to do once.
pub struct Meanwhile(pub Box<dyn FnOnce() + Send>);

impl fmt::Debug for Meanwhile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Meanwhile")
    }
}

/// A device whose regions are bytes, and which records what is done to its interrupts.
#[derive(Debug, Default)]
pub struct FakeDevice {
    regions: BTreeMap<u32, (Region, Mutex<Vec<u8>>)>,
    irqs: BTreeMap<Irq, IrqInfo>,
    calls: Mutex<Vec<String>>,
    refusal: Mutex<Option<i32>>,
    pub cannot_reset: bool,
    /// What somebody else does while it is reset.
    pub meanwhile: Mutex<Option<Meanwhile>>,
    /// Kinds of interrupts that are answered by an error.
    pub irq_errors: Vec<(Irq, i32)>,
}

impl FakeDevice {
    /// Adds a region that is entirely mappable or not at all.
    pub fn add_region(&mut self, index: u32, size: u64, mappable: bool) {
        let mappable = std::iter::once(0..size).filter(|_| mappable).collect();
        let region = Region { index, size, offset: u64::from(index) << 40, mappable };
        let bytes = Mutex::new(vec![0; size as usize]);
        self.regions.insert(index, (region, bytes));
    }

    pub fn add_irq(&mut self, irq: Irq, count: u32) {
        self.irqs.insert(irq, IrqInfo { count, fixed: false });
    }

    /// Makes calls for interrupts and resets fail from now on.
    pub fn refuse(&self, errno: i32) {
        *self.refusal.lock() = Some(errno);
    }

    pub fn put(&self, region: u32, offset: usize, bytes: &[u8]) {
        self.regions[&region].1.lock()[offset..][..bytes.len()].copy_from_slice(bytes);
    }

    pub fn get(&self, region: u32, offset: usize, length: usize) -> Vec<u8> {
        self.regions[&region].1.lock()[offset..][..length].to_vec()
    }

    /// The calls since the last time.
    pub fn take_calls(&self) -> Vec<String> {
        std::mem::take(&mut self.calls.lock())
    }

    fn call(&self, call: String) -> io::Result<()> {
        self.calls.lock().push(call);
        match *self.refusal.lock() {
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => Ok(()),
        }
    }
}

impl HostDevice for FakeDevice {
    fn region(&self, index: u32) -> io::Result<Region> {
        let empty = Region { index, ..Region::default() };
        Ok(self.regions.get(&index).map_or(empty, |(region, _)| region.clone()))
    }

    fn read(&self, region: &Region, offset: u64, data: &mut [u8]) -> io::Result<()> {
        assert!(region.contains(offset, data.len()));
        data.copy_from_slice(&self.get(region.index, offset as usize, data.len()));
        Ok(())
    }

    fn write(&self, region: &Region, offset: u64, data: &[u8]) -> io::Result<()> {
        assert!(region.contains(offset, data.len()));
        self.put(region.index, offset as usize, data);
        Ok(())
    }

    fn map(&self, region: &Region, offset: u64, length: u64) -> io::Result<Mapping> {
        assert!(offset + length <= region.size);
        let file = tempfile::tempfile()?;
        file.set_len(length)?;
        Mapping::new(&file, 0, length)
    }

    fn irq(&self, irq: Irq) -> io::Result<IrqInfo> {
        if let Some((_, error)) = self.irq_errors.iter().find(|(of, _)| *of == irq) {
            return Err(io::Error::from_raw_os_error(*error));
        }
        Ok(self.irqs.get(&irq).copied().unwrap_or_default())
    }

    fn set_triggers(&self, irq: Irq, start: u32, events: &[Option<&EventFd>]) -> io::Result<()> {
        let events = events.iter().map(|event| if event.is_some() { "on" } else { "off" });
        let events = events.collect::<Vec<_>>().join(", ");
        self.call(format!("{irq:?} {start}: [{events}]"))
    }

    fn set_intx_unmask(&self, _: &EventFd) -> io::Result<()> {
        self.call("Intx unmask".into())
    }

    fn disable_irq(&self, irq: Irq) -> io::Result<()> {
        self.call(format!("{irq:?} off"))
    }

    fn can_reset(&self) -> bool {
        !self.cannot_reset
    }

    fn reset(&self) -> io::Result<()> {
        let meanwhile = self.meanwhile.lock().take();
        if let Some(Meanwhile(meanwhile)) = meanwhile {
            meanwhile();
        }
        self.call("reset".into())
    }
}

/// Vectors that record their messages.
#[derive(Debug, Default)]
pub struct FakeVectors {
    events: Mutex<Vec<EventFd>>,
    updates: Arc<Mutex<Vec<String>>>,
}

struct FakeVector {
    event: EventFd,
    updates: Arc<Mutex<Vec<String>>>,
}

impl FakeVectors {
    pub fn maker(self: &Arc<Self>) -> Arc<MakeVector> {
        let all = self.clone();
        Arc::new(move || {
            let event = EventFd::new(EFD_NONBLOCK).unwrap();
            all.events.lock().push(event.try_clone().unwrap());
            Ok(Arc::new(FakeVector { event, updates: all.updates.clone() }))
        })
    }

    pub fn count(&self) -> usize {
        self.events.lock().len()
    }

    pub fn event(&self, number: usize) -> EventFd {
        self.events.lock()[number].try_clone().unwrap()
    }

    pub fn take_updates(&self) -> Vec<String> {
        std::mem::take(&mut self.updates.lock())
    }
}

impl InterruptVector for FakeVector {
    fn update(&self, message: Option<MsiMessage>) {
        self.updates.lock().push(match message {
            Some(MsiMessage { address: 0, data }) => data.to_string(),
            Some(MsiMessage { address, data }) => format!("{address:x}/{data}"),
            None => "none".into(),
        });
    }

    fn trigger(&self) {}

    fn is_pending(&self) -> bool {
        let Ok(count) = self.event.read() else { return false };
        self.event.write(count).unwrap();
        true
    }
}

impl EventVector for FakeVector {
    fn event(&self) -> &EventFd {
        &self.event
    }
}

/// A message to address 0.
pub fn message(data: u32) -> Option<MsiMessage> {
    Some(MsiMessage { address: 0, data })
}

/// Records what is mapped.
#[derive(Debug, Default)]
pub struct FakeLender {
    lent: Arc<Mutex<Vec<(u64, u64)>>>,
    calls: Mutex<usize>,
}

struct FakeLoan(Arc<Mutex<Vec<(u64, u64)>>>, (u64, u64));

impl FakeLender {
    /// What is currently mapped: address, length.
    pub fn lent(&self) -> Vec<(u64, u64)> {
        self.lent.lock().clone()
    }

    pub fn calls(&self) -> usize {
        *self.calls.lock()
    }
}

impl Lender for FakeLender {
    fn lend(&self, address: u64, mapping: Arc<Mapping>) -> io::Result<Box<dyn Loan>> {
        let piece = (address, mapping.length());
        *self.calls.lock() += 1;
        self.lent.lock().push(piece);
        Ok(Box::new(FakeLoan(self.lent.clone(), piece)))
    }
}

impl Loan for FakeLoan {}

impl Drop for FakeLoan {
    fn drop(&mut self) {
        self.0.lock().retain(|piece| *piece != self.1);
    }
}
