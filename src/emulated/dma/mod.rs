// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DMA of devices in this process, through an emulated IOMMU.
//!
//! A translation and the access that uses it are one critical section: an invalidation, an unmap or
//! a detach returns only when no access by the old translation is in progress. A transfer is split
//! into pieces of at most 64 KiB, each a section of its own, so that nobody waits long.

pub(crate) mod control;
pub(crate) mod error;
pub(crate) mod memory;
pub(crate) mod port_iommu;
mod section;

use std::ops::RangeInclusive;
use std::sync::Arc;

use vm_memory::Bytes;

use control::{DeviceControl, DmaServices, Stopped};
use section::{error, kind, report, request, walk, Interrupts, Section, Unreported};

use crate::dma::error::DmaError;
use crate::units::engine::{
    Blocked, ConfigCache, Counters, Engine, Fault, LocalCounters, Missed, Request, Target,
};
use crate::units::gate::{Gate, ReadGuard, Reader};
use crate::units::page_requests::PageRequests;
use twostage::iommufd::{MemoryMap, MemorySlice, PageResponseCode};

/// Attributes of a DMA request besides address and data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DmaAttributes {
    /// PASID, if the request has one.
    pub pasid: Option<u32>,
    /// Privileged mode requested; ignored without a PASID.
    pub privileged: bool,
    /// Execute requested; ignored without a PASID.
    pub execute: bool,
}

/// Direction of a DMA request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DmaAccess {
    /// The device reads memory.
    Read,
    /// The device writes memory.
    Write,
}

/// A device's access point to its IOMMU. Each thread of a device uses its own clone.
///
/// ```
/// use twostage_emulated::{DmaAccess, DmaAttributes, DmaError};
/// # use vm_memory::GuestAddress;
/// # use std::sync::Arc;
/// # use twostage::iommufd::{HostIommu, MapTarget, Protection, UserMemory};
/// # use twostage::spec::pci::Bdf;
/// # use twostage_emulated::{DeviceConfig, EmulatedHost, VtdUnit, VtdUnitConfig};
/// # let host = EmulatedHost::new();
/// # let unit = host.add_unit(VtdUnit::new(VtdUnitConfig::default()));
/// # host.add_device("disk", unit, Bdf::new(0, 4, 0).ok_or("no slot")?, DeviceConfig::default())?;
/// # let (dev, ioas) = (host.device_bind("disk")?, host.ioas_alloc()?);
/// # let region = vm_memory::GuestRegionMmap::<()>::from_range(GuestAddress(0), 0x1000, None)?;
/// # let region = Arc::new(region);
/// # let whole = UserMemory::whole(region.clone());
/// # host.ioas_map(ioas, &whole, MapTarget::Fixed(0x8000), Protection::READ_WRITE)?;
/// # host.device_attach(dev, None, ioas)?;
///
/// // The device "disk" is attached to an IOAS with a page at 0x8000: see `EmulatedHost`.
/// let mut port = host.dma_port("disk").ok_or("no such device")?;
/// let attributes = DmaAttributes::default();
/// port.write(attributes, 0x8000, b"hello")?;
/// let mut read = [0; 5];
/// port.read(attributes, 0x8000, &mut read)?;
/// assert_eq!(&read, b"hello");
///
/// // Without a copy: an invalidation waits until `page` is dropped.
/// let page = port.translate(attributes, 0x8000, 5, DmaAccess::Read)?;
/// assert_eq!(page.slice().len(), 5);
/// drop(page);
///
/// let error = port.read(attributes, 0x9000, &mut read).unwrap_err();
/// assert!(matches!(error, DmaError::Fault { address: 0x9000, .. }));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct DmaPort {
    rid: u16,
    reader: Reader<Engine>,
    config: ConfigCache,
    counters: Arc<LocalCounters>,
    interrupts: Interrupts,
    /// Those of the unit, for a share of them per port.
    all_counters: Arc<Counters>,
    control: DeviceControl,
    services: DmaServices,
}

impl Clone for DmaPort {
    fn clone(&self) -> Self {
        Self {
            rid: self.rid,
            reader: self.reader.clone(),
            config: ConfigCache::default(),
            counters: self.all_counters.share(),
            interrupts: self.interrupts.clone(),
            all_counters: Arc::clone(&self.all_counters),
            control: self.control.clone(),
            services: self.services,
        }
    }
}

impl DmaPort {
    /// A port for DMA by requester id `rid` through the unit whose engine is behind `gate`.
    /// `interrupts` are the IOVAs that are interrupt messages regardless of the configuration, in
    /// requests without PASID.
    pub(crate) fn new(
        rid: u16,
        gate: Arc<Gate<Engine>>,
        counters: Arc<Counters>,
        page_requests: Arc<PageRequests>,
        interrupts: Option<RangeInclusive<u64>>,
    ) -> Self {
        Self {
            rid,
            reader: gate.reader(),
            config: ConfigCache::default(),
            counters: counters.share(),
            interrupts: Interrupts::new(interrupts),
            all_counters: counters,
            control: DeviceControl::new(rid, page_requests, gate),
            services: DmaServices::default(),
        }
    }

    /// From now on requests use `services`.
    pub fn set_services(&mut self, services: DmaServices) {
        self.services = services;
    }

    /// What is the device's, of all its ports.
    pub fn control(&self) -> DeviceControl {
        self.control.clone()
    }

    /// Reads memory at `iova` (bytes) into `bytes`.
    ///
    /// A device that sends page requests ([`DeviceConfig::pri`](crate::DeviceConfig::pri)) waits
    /// here for the responses, so the fault queue must be served on another thread. No lock is held
    /// meanwhile. See [`DmaServices`] for other ways.
    ///
    /// # Errors
    /// [`DmaError`]; bytes before the failing address may have been read. When this returns, a
    /// fault has been delivered to the requester's sink.
    pub fn read(
        &mut self,
        attributes: DmaAttributes,
        iova: u64,
        bytes: &mut [u8],
    ) -> Result<(), DmaError> {
        self.transfer(attributes, iova, bytes.len(), DmaAccess::Read, |slice, done| {
            bytes.get_mut(done..).map_or(0, |rest| slice.copy_to(rest))
        })
    }

    /// Writes `bytes` to memory at `iova` (bytes). Waits as [`DmaPort::read`] does.
    ///
    /// # Errors
    /// As [`DmaPort::read`]; bytes before the failing address may have been written.
    pub fn write(
        &mut self,
        attributes: DmaAttributes,
        iova: u64,
        bytes: &[u8],
    ) -> Result<(), DmaError> {
        self.transfer(attributes, iova, bytes.len(), DmaAccess::Write, |slice, done| {
            slice.copy_from(bytes.get(done..).unwrap_or_default());
            slice.len()
        })
    }

    /// Transfers the `length` bytes at `iova` piece by piece: `copy` gets the memory of each piece,
    /// no longer than what is left, and the number of bytes done; it returns how many it copied.
    fn transfer(
        &mut self,
        attributes: DmaAttributes,
        iova: u64,
        length: usize,
        access: DmaAccess,
        mut copy: impl FnMut(MemorySlice<'_>, usize) -> usize,
    ) -> Result<(), DmaError> {
        check_end(iova, length)?;
        let (mut done, mut tries) = (0, PageTries::default());
        while done < length {
            let address = iova + done as u64;
            let copied = self
                .translate(attributes, address, length - done, access)
                .map(|piece| copy(piece.slice(), done));
            match copied {
                Ok(0) => return Err(DmaError::NoMemory { address }),
                Ok(copied) => done += copied,
                Err(error) => self.wait_or_fail(error, &mut tries)?,
            }
        }
        Ok(())
    }

    /// Writes the doubleword `data` to `iova` (bytes, a multiple of 4), as a device sends an
    /// interrupt message: to memory, or, if the request is a [`DmaError::Interrupt`], by `deliver`,
    /// which gets the message's address. Either happens within the critical section that decides
    /// it, so no message is on its way by an old translation when an invalidation returns;
    /// `deliver` must not block.
    ///
    /// # Errors
    /// As [`DmaPort::read`], but without page requests: a missing page is a fault, whatever the
    /// device. Also [`DmaError::NoMemory`] if the bytes are not in one page, which they are if
    /// `iova` is aligned.
    pub fn write_message(
        &mut self,
        attributes: DmaAttributes,
        iova: u64,
        data: u32,
        deliver: impl FnOnce(u64),
    ) -> Result<(), DmaError> {
        let mut section = self.enter();
        match section.slice(attributes, iova, size_of_val(&data), DmaAccess::Write) {
            Err(DmaError::Interrupt { address }) => {
                deliver(address);
                Ok(())
            }
            Err(error) => Err(error),
            Ok(slice) => slice
                .write_obj(data.to_le_bytes(), 0)
                .map_err(|_| DmaError::NoMemory { address: iova }),
        }
    }

    /// Translates `iova` (bytes) for an access to some of the next `length` bytes and starts the
    /// critical section: invalidations wait until the result is dropped. Access the slice and drop
    /// it; do not block in between, and never wait for an invalidation.
    ///
    /// # Errors
    /// As [`DmaPort::read`]; [`DmaError::PageRequested`] if the device has requested the page: this
    /// does not wait for the response. A page request takes the iommufd's lock, whose holder may be
    /// waiting for sections to end: hold no [`Translated`] of another port of the unit meanwhile.
    #[inline]
    pub fn translate(
        &mut self,
        attributes: DmaAttributes,
        iova: u64,
        length: usize,
        access: DmaAccess,
    ) -> Result<Translated<'_>, DmaError> {
        self.interrupts.check(attributes, iova)?;
        let mut engine = self.reader.enter();
        // Separate and first, as it is all that most requests need.
        let cached = match engine.common.caches.device_tlbs.has(self.rid) {
            true => Err(None),
            false => {
                let request = (attributes.pasid, iova, kind(attributes, access));
                engine.common.cached(&self.config, &self.counters, request).map_err(Some)
            }
        };
        let target = match cached {
            Ok(target) => target,
            Err(missed) => {
                let Self { rid, config, counters, .. } = self;
                let of = (*rid, attributes, access);
                match not_cached(&mut engine, config, counters, of, iova, missed) {
                    Ok(target) => target,
                    Err(Blocked::Interrupt(address)) => {
                        return Err(DmaError::Interrupt { address })
                    }
                    Err(Blocked::Fault(fault)) => {
                        drop(engine);
                        let request = request(self.rid, attributes, iova, access);
                        let Self { control, services, counters, .. } = self;
                        return Err(stopped(control, *services, counters, &request, &fault));
                    }
                }
            }
        };
        let length = length.min(self.interrupts.piece(attributes, iova, target.length));
        Ok(Translated { engine, target, length })
    }

    /// Takes the response to the page requests of `group` ([`DmaError::PageRequested`]), once;
    /// `None` until there is one, which is when the attachment ends at the latest.
    pub fn page_response(&self, group: u16) -> Option<PageResponseCode> {
        self.control.page_requests().take_answer(self.rid, group)
    }

    /// The same, but blocks until there is one.
    pub fn wait_for_page(&self, group: u16) -> PageResponseCode {
        self.control.wait_for_page(group)
    }

    /// Waits if `error` says that a page was requested.
    ///
    /// # Errors
    /// `error`, or the refusal of the page.
    #[cold]
    fn wait_or_fail(&self, error: DmaError, tries: &mut PageTries) -> Result<(), DmaError> {
        match error {
            DmaError::PageRequested { address, group } if self.services.wait_for_pages => {
                self.control.wait_to_retry(group, address, tries)
            }
            error => Err(error),
        }
    }

    /// Starts a critical section for several accesses: see [`Section`].
    pub(crate) fn enter(&mut self) -> Section<'_> {
        let counters = &*self.counters;
        Section {
            rid: self.rid,
            interrupts: &self.interrupts,
            config: &mut self.config,
            counters,
            engine: self.reader.enter(),
            translated: false,
            faults: Unreported { counters, list: Vec::new() },
        }
    }
}

/// A read-side critical section around one translation.
#[derive(Debug)]
pub struct Translated<'a> {
    engine: ReadGuard<'a, Engine>,
    target: Target,
    length: usize,
}

impl Translated<'_> {
    /// The memory: starts at the requested address, and has as many of the requested bytes as are
    /// in one page, at most 64 KiB; at least one, if one was requested.
    #[inline]
    pub fn slice(&self) -> MemorySlice<'_> {
        // A mapping lies within its memory ([`twostage::iommufd::UserMemory`]), so this never
        // fails.
        let slice = self.engine.common.caches.slice(self.target.place, self.length);
        slice.unwrap_or_else(MemoryMap::empty_slice)
    }
}

/// Translates `iova` for a request that `missed`; nothing, if its device's ATS is enabled.
#[inline(never)]
fn not_cached(
    engine: &mut ReadGuard<'_, Engine>,
    config: &mut ConfigCache,
    counters: &LocalCounters,
    (rid, attributes, access): (u16, DmaAttributes, DmaAccess),
    iova: u64,
    missed: Option<Missed>,
) -> Result<Target, Blocked> {
    let request = request(rid, attributes, iova, access);
    match missed {
        Some(missed) => walk(engine, config, counters, &request, missed),
        None => by_device(engine, config, counters, &request),
    }
}

/// Translates `request` of a device whose ATS is enabled: by its TLB, or by a translation request.
/// The answer to that is no fault where software could mend the tables, as it need not be what the
/// device needs in the end: it gives no permission, and the device may request the page (PCIe 6.0
/// §10.2.3; VT-d §7.1.3). If there is no answer but Unsupported Request, the device makes an
/// untranslated request instead, as one without ATS. Never inlined, to keep [`DmaPort::translate`]
/// small.
#[cold]
#[inline(never)]
fn by_device(
    engine: &mut ReadGuard<'_, Engine>,
    config: &mut ConfigCache,
    counters: &LocalCounters,
    request: &Request,
) -> Result<Target, Blocked> {
    if let Some(target) = engine.device_translation(config, counters, request) {
        return Ok(target);
    }
    let found = walk(engine, config, counters, request, Missed::Config);
    // Only now, as something else may have been attached meanwhile.
    if !engine.own.answers_translation_requests(request.rid) {
        return found;
    }
    match found {
        Ok(target) => {
            engine.fill_device_tlb(config, counters, request);
            Ok(target)
        }
        Err(Blocked::Fault(fault)) if fault.asks_for_page => {
            Err(Blocked::Fault(Fault { report: None, ..fault }))
        }
        Err(blocked) => Err(blocked),
    }
}

/// Requests the page if that can help and somebody serves requests, or stalls the request where
/// that is so; otherwise it faults.
/// The gate must have been left. Never inlined, to keep [`DmaPort::translate`] small.
#[cold]
#[inline(never)]
fn stopped(
    control: &DeviceControl,
    services: DmaServices,
    counters: &LocalCounters,
    request: &Request,
    fault: &Fault,
) -> DmaError {
    match control.request_page(services, request, fault) {
        Stopped::Waits(group) => DmaError::PageRequested { address: request.address, group },
        Stopped::Aborts => {
            counters.faults.count();
            error(request, fault)
        }
        Stopped::Faults => {
            report(counters, fault);
            error(request, fault)
        }
    }
}

/// Whether `length` bytes at `address` end within the address space.
fn check_end(address: u64, length: usize) -> Result<(), DmaError> {
    let room = u64::MAX - address;
    if length as u64 > 1 && length as u64 - 1 > room {
        return Err(DmaError::PastEnd { address, length });
    }
    Ok(())
}

/// How often a transfer requests the page at the same address.
const MAX_TRIES: u32 = 16;

/// The page requests of one transfer: it fails when a page is refused, or when responses repeatedly
/// claim success for a page that stays missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PageTries {
    /// The last requested address, and how often.
    address: u64,
    count: u32,
}

impl PageTries {
    /// The request for the page at `address` got `response`. The transfer is to be retried from
    /// there.
    ///
    /// # Errors
    /// [`DmaError::PageRefused`]: it is not.
    pub fn answered(&mut self, address: u64, response: PageResponseCode) -> Result<(), DmaError> {
        let count = if address == self.address { self.count } else { 0 };
        *self = Self { address, count: count + 1 };
        if response == PageResponseCode::Success && self.count < MAX_TRIES {
            return Ok(());
        }
        Err(DmaError::PageRefused { address, response })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_gives_up_on_a_page_and_not_on_a_transfer() {
        let mut tries = PageTries::default();
        let response = PageResponseCode::Success;
        for address in 0..100 {
            for _ in 1..MAX_TRIES {
                assert_eq!(tries.answered(address, response), Ok(()));
            }
        }
        assert_eq!(
            tries.answered(99, response),
            Err(DmaError::PageRefused { address: 99, response })
        );
        let response = PageResponseCode::Invalid;
        let refused = PageTries::default().answered(0, response);
        assert_eq!(refused, Err(DmaError::PageRefused { address: 0, response }));
    }
}
