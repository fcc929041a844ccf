// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is around the functions: memory for their DMA, where their messages go, and the guest.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::Arc;
use twostage::sync::Mutex;

use twostage::spec::pci::Pasid;
use twostage_emulated::PageTries;
use twostage_vmm::inside::pci::{ConfigLender, ConfigPage, PageLoan};
use twostage_vmm::inside::virtio::Doorbells;
use twostage_vmm::inside::{DmaError, DmaMaster, ServiceControl, Services};
use vmm_sys_util::eventfd::EventFd;

/// Bytes of memory for DMA.
pub const MEMORY: usize = 0x4000;

/// Counts DMA requests.
#[derive(Default)]
pub struct Counts(AtomicU64);

impl Counts {
    pub fn requests(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn count(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Memory without an IOMMU, whose first pages are missing until they were requested.
pub struct Memory {
    pub counts: Arc<Counts>,
    pub bytes: Arc<Mutex<Vec<u8>>>,
    pub services: Services,
    pub control: Option<Arc<Control>>,
}

impl Memory {
    fn range(
        &mut self,
        pasid: Option<Pasid>,
        iova: u64,
        length: usize,
    ) -> Result<Range<usize>, DmaError> {
        self.counts.count();
        assert!(pasid.is_none() || self.services.pasid, "a PASID that nobody enabled");
        let (start, pri) = (iova as usize, self.services.pri);
        if iova >= MEMORY as u64 || length > MEMORY - start {
            let group = (pri && iova < 2 * MEMORY as u64).then_some(1);
            return Err(DmaError { address: iova, group });
        }
        Ok(start..start + length)
    }
}

impl DmaMaster for Memory {
    fn read(&mut self, pasid: Option<Pasid>, iova: u64, data: &mut [u8]) -> Result<(), DmaError> {
        let range = self.range(pasid, iova, data.len())?;
        data.copy_from_slice(&self.bytes.lock()[range]);
        Ok(())
    }

    fn write(&mut self, pasid: Option<Pasid>, iova: u64, data: &[u8]) -> Result<(), DmaError> {
        let range = self.range(pasid, iova, data.len())?;
        self.bytes.lock()[range].copy_from_slice(data);
        Ok(())
    }

    fn set_services(&mut self, services: Services) {
        self.services = services;
    }

    fn service_control(&self) -> Option<Arc<dyn ServiceControl>> {
        self.control.clone().map(|control| control as Arc<dyn ServiceControl>)
    }
}

/// Requests that are counted.
pub struct Counted(pub Arc<Counts>, pub Box<dyn DmaMaster>);

impl DmaMaster for Counted {
    fn read(&mut self, pasid: Option<Pasid>, iova: u64, data: &mut [u8]) -> Result<(), DmaError> {
        self.0.count();
        self.1.read(pasid, iova, data)
    }

    fn write(&mut self, pasid: Option<Pasid>, iova: u64, data: &[u8]) -> Result<(), DmaError> {
        self.0.count();
        self.1.write(pasid, iova, data)
    }

    fn set_services(&mut self, services: Services) {
        self.1.set_services(services);
    }

    fn service_control(&self) -> Option<Arc<dyn ServiceControl>> {
        self.1.service_control()
    }
}

/// Page requests are answered after some tries, or not.
#[derive(Default)]
pub struct Control(AtomicUsize);

impl ServiceControl for Control {
    fn enabled(&self, _: Services) {}

    fn wait(&self, _: u16, address: u64, _: &mut PageTries) -> Result<(), DmaError> {
        match self.0.fetch_add(1, Ordering::Relaxed) % 4 {
            3 => Err(DmaError::at(address)),
            _ => Ok(()),
        }
    }

    fn outstanding(&self) -> usize {
        self.0.load(Ordering::Relaxed) % 2
    }

    fn reset(&self) {}
}

pub struct NoDoorbells;

impl Doorbells for NoDoorbells {
    fn attach(&self, address: u64, _: &EventFd) -> bool {
        address & 0x10_0000 == 0
    }

    fn detach(&self, _: u64, _: &EventFd) {}
}

/// The pages that the guest has, by address.
pub type Pages = Arc<Mutex<BTreeMap<u64, Arc<ConfigPage>>>>;

pub struct Lender(pub Pages);

struct Lent(Pages, u64);

impl PageLoan for Lent {}

impl Drop for Lent {
    fn drop(&mut self) {
        self.0.lock().remove(&self.1);
    }
}

impl ConfigLender for Lender {
    fn lend_config(&self, address: u64, page: Arc<ConfigPage>) -> io::Result<Box<dyn PageLoan>> {
        self.0.lock().insert(address, page);
        Ok(Box::new(Lent(self.0.clone(), address)))
    }
}
