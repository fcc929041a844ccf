// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DMA of one requester through a unit of one architecture.

use std::sync::Arc;

use vm_memory::{Address, GuestAddress, VolatileSlice};

use super::{DmaAccess, DmaAttributes};
use crate::dma::error::DmaError;
use crate::units::engine::{
    Blocked, ConfigCache, Engine, LocalCounters, Request, RequestKind, Target, Unit,
};
use crate::units::gate::{ReadGuard, Reader};
use twostage::iommufd::PageResponseCode;

/// Maximum number of bytes transferred in one critical section.
const MAX_PIECE: usize = 64 << 10;

/// Why the engine of a unit blocks a request.
type FaultOf<U> = <<U as Unit>::Engine as Engine>::Fault;

/// Where a device's DMA enters a unit.
#[derive(Debug)]
pub(super) struct Port<U: Unit> {
    unit: Arc<U>,
    rid: u16,
    reader: Reader<U::Engine>,
    config: ConfigCache,
    counters: Arc<LocalCounters>,
}

impl<U: Unit> Clone for Port<U> {
    fn clone(&self) -> Self {
        Self::new(Arc::clone(&self.unit), self.rid)
    }
}

impl<U: Unit> Port<U> {
    /// A port for DMA by requester id `rid`.
    pub fn new(unit: Arc<U>, rid: u16) -> Self {
        let (reader, counters) = (unit.gate().reader(), unit.counters_share());
        Self { unit, rid, reader, config: ConfigCache::default(), counters }
    }

    /// See [`super::DmaPort::translate`].
    #[inline]
    pub fn translate(
        &mut self,
        attributes: DmaAttributes,
        iova: u64,
        length: usize,
        access: DmaAccess,
    ) -> Result<PortTranslated<'_, U>, DmaError> {
        check_memory::<U>(attributes, iova)?;
        let request = request(self.rid, attributes, iova, access);
        let mut engine = self.reader.enter();
        // Separate and first, as it is all that most requests need.
        if let Some(target) = engine.cached(&self.config, &self.counters, &request) {
            let length = length.min(piece::<U>(attributes, iova, target.length));
            return Ok(PortTranslated { engine, target, length });
        }
        match walk(&*self.unit, &mut engine, &mut self.config, &self.counters, &request) {
            Ok(target) => {
                let length = length.min(piece::<U>(attributes, iova, target.length));
                Ok(PortTranslated { engine, target, length })
            }
            Err(Blocked::Interrupt(address)) => Err(DmaError::Interrupt { address }),
            Err(Blocked::Fault(fault)) => {
                drop(engine);
                Err(stopped(&*self.unit, &self.counters, &request, fault))
            }
        }
    }

    /// See [`super::DmaPort::page_response`].
    pub fn page_response(&self, group: u16) -> Option<PageResponseCode> {
        self.unit.page_requests().take_answer(self.rid, group)
    }

    /// See [`super::DmaPort::wait_for_page`].
    pub fn wait_for_page(&self, group: u16) -> PageResponseCode {
        self.unit.page_requests().wait_for_answer(self.rid, group)
    }

    /// Starts a critical section for several accesses.
    pub fn enter(&mut self) -> PortSection<'_, U> {
        let (unit, counters) = (&*self.unit, &*self.counters);
        PortSection {
            rid: self.rid,
            unit,
            config: &mut self.config,
            counters,
            engine: self.reader.enter(),
            translated: false,
            faults: Unreported { unit, counters, list: Vec::new() },
        }
    }
}

/// See [`super::Section`].
#[derive(Debug)]
pub(super) struct PortSection<'a, U: Unit> {
    rid: u16,
    unit: &'a U,
    config: &'a mut ConfigCache,
    counters: &'a LocalCounters,
    engine: ReadGuard<'a, U::Engine>,
    /// Something was translated, and is valid until the end of the section.
    translated: bool,
    /// Dropped, and so reported, after leaving the gate: fields are dropped in order.
    faults: Unreported<'a, U>,
}

impl<U: Unit> PortSection<'_, U> {
    /// See [`super::Section::translate`].
    pub fn translate(
        &mut self,
        attributes: DmaAttributes,
        iova: u64,
        access: DmaAccess,
    ) -> Result<(GuestAddress, usize), DmaError> {
        let target = self.target(attributes, iova, access)?;
        let memory = self.engine.caches().memory(target.place);
        let address = memory.and_then(|memory| memory.base.checked_add(target.place.offset));
        let address = address.ok_or(DmaError::NoMemory { address: iova })?;
        Ok((address, piece::<U>(attributes, iova, target.length)))
    }

    /// See [`super::Section::slice`].
    pub fn slice(
        &mut self,
        attributes: DmaAttributes,
        iova: u64,
        length: usize,
        access: DmaAccess,
    ) -> Result<VolatileSlice<'_>, DmaError> {
        let target = self.target(attributes, iova, access)?;
        let length = length.min(piece::<U>(attributes, iova, target.length));
        let slice = self.engine.caches().slice(target.place, length);
        slice.ok_or(DmaError::NoMemory { address: iova })
    }

    fn target(
        &mut self,
        attributes: DmaAttributes,
        iova: u64,
        access: DmaAccess,
    ) -> Result<Target, DmaError> {
        check_memory::<U>(attributes, iova)?;
        let request = request(self.rid, attributes, iova, access);
        let found = match self.engine.cached(self.config, self.counters, &request) {
            Some(target) => Ok(target),
            // The earlier translation is valid until the section ends, so the section cannot be
            // left. It need not: the requester has something attached, unless requests differ in
            // PASID.
            None if self.translated => self.engine.translate(self.config, self.counters, &request),
            None => walk(self.unit, &mut self.engine, self.config, self.counters, &request),
        };
        match found {
            Ok(target) => {
                self.translated = true;
                Ok(target)
            }
            Err(Blocked::Interrupt(address)) => Err(DmaError::Interrupt { address }),
            Err(Blocked::Fault(fault)) => {
                self.faults.list.push((request, fault));
                Err(fault_error::<U>(&request, fault))
            }
        }
    }
}

/// Translates `request` by tables, not by the caches. If nothing is attached for it, asks whoever
/// may attach something, outside of the section, and tries again: only to be called while nothing
/// read in the section is in use.
#[cold]
#[inline(never)]
fn walk<U: Unit>(
    unit: &U,
    engine: &mut ReadGuard<'_, U::Engine>,
    config: &mut ConfigCache,
    counters: &LocalCounters,
    request: &Request,
) -> Result<Target, Blocked<FaultOf<U>>> {
    match engine.translate(config, counters, request) {
        Err(Blocked::Fault(fault))
            if U::nothing_attached(fault) && engine.outside(|| unit.attached_late(request)) =>
        {
            engine.translate(config, counters, request)
        }
        translated => translated,
    }
}

/// Faults of a section that have not been reported.
#[derive(Debug)]
struct Unreported<'a, U: Unit> {
    unit: &'a U,
    counters: &'a LocalCounters,
    list: Vec<(Request, FaultOf<U>)>,
}

impl<U: Unit> Drop for Unreported<'_, U> {
    fn drop(&mut self) {
        for (request, fault) in self.list.drain(..) {
            blocked(self.unit, self.counters, &request, fault);
        }
    }
}

/// See [`super::Translated`].
#[derive(Debug)]
pub(super) struct PortTranslated<'a, U: Unit> {
    engine: ReadGuard<'a, U::Engine>,
    target: Target,
    length: usize,
}

impl<U: Unit> PortTranslated<'_, U> {
    /// See [`super::Translated::slice`].
    #[inline]
    pub fn slice(&self) -> VolatileSlice<'_> {
        // A mapping lies within its memory ([`twostage::iommufd::UserMemory`]), so this never
        // fails.
        let slice = self.engine.caches().slice(self.target.place, self.length);
        slice.unwrap_or_else(|| (&mut [][..]).into())
    }
}

/// Whether a request to `iova` is a memory access and not an interrupt message.
#[inline]
fn check_memory<U: Unit>(attributes: DmaAttributes, iova: u64) -> Result<(), DmaError> {
    match U::Engine::INTERRUPTS {
        Some(range) if attributes.pasid.is_none() && range.contains(&iova) => {
            Err(DmaError::Interrupt { address: iova })
        }
        _ => Ok(()),
    }
}

/// How many bytes from `iova` on one section may access, if `target` bytes are in one page. A 1 GiB
/// page may contain addresses of interrupt messages.
#[inline]
fn piece<U: Unit>(attributes: DmaAttributes, iova: u64, target: u64) -> usize {
    let length = target.min(MAX_PIECE as u64);
    let length = match U::Engine::INTERRUPTS {
        Some(range) if attributes.pasid.is_none() && iova < *range.start() => {
            length.min(*range.start() - iova)
        }
        _ => length,
    };
    length as usize
}

#[inline]
fn request(rid: u16, attributes: DmaAttributes, address: u64, access: DmaAccess) -> Request {
    let DmaAttributes { pasid, privileged, execute } = attributes;
    let with_pasid = pasid.is_some();
    let write = access == DmaAccess::Write;
    let kind = RequestKind::new(write, with_pasid && privileged, with_pasid && execute);
    Request { rid, pasid, address, kind }
}

/// Requests the page if that can help and somebody serves requests; otherwise the request faults.
/// The gate must have been left. Never inlined, to keep [`Port::translate`] small.
#[cold]
#[inline(never)]
fn stopped<U: Unit>(
    unit: &U,
    counters: &LocalCounters,
    request: &Request,
    fault: FaultOf<U>,
) -> DmaError {
    let asks = U::asks_for_page(fault, request.kind);
    match asks.then(|| unit.page_requests().ask(request)).flatten() {
        Some(group) => DmaError::PageRequested { address: request.address, group },
        None => blocked(unit, counters, request, fault),
    }
}

/// Counts and reports a fault. The gate must have been left.
#[cold]
fn blocked<U: Unit>(
    unit: &U,
    counters: &LocalCounters,
    request: &Request,
    fault: FaultOf<U>,
) -> DmaError {
    counters.faults.count();
    unit.report(request, fault);
    fault_error::<U>(request, fault)
}

fn fault_error<U: Unit>(request: &Request, fault: FaultOf<U>) -> DmaError {
    let (reason, stage2) = U::reason(fault);
    DmaError::Fault { address: request.address, reason, stage2 }
}
