// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Translations within one critical section of a port.

use std::ops::RangeInclusive;

use twostage::iommufd::MemorySlice;
use vm_memory::{GuestAddress, Permissions};

use super::{DmaAccess, DmaAttributes};
use crate::dma::error::DmaError;
use crate::units::engine::{
    Blocked, ConfigCache, Engine, Fault, LocalCounters, Missed, Request, RequestKind, Target,
};
use crate::units::gate::ReadGuard;

/// Maximum number of bytes transferred in one critical section.
const MAX_PIECE: usize = 64 << 10;

/// A read-side critical section around any number of translations and the accesses that use them.
/// Invalidations wait until it is dropped, so nothing in it may wait for a page: devices that use
/// sections make no page requests. Faults are reported at the end only, as the sink may invalidate.
#[derive(Debug)]
pub(crate) struct Section<'a> {
    pub(super) rid: u16,
    pub(super) interrupts: &'a Interrupts,
    pub(super) config: &'a mut ConfigCache,
    pub(super) counters: &'a LocalCounters,
    pub(super) engine: ReadGuard<'a, Engine>,
    /// Something was translated, and is valid until the end of the section.
    pub(super) translated: bool,
    /// Dropped, and so reported, after leaving the gate: fields are dropped in order.
    pub(super) faults: Unreported<'a>,
}

impl Section<'_> {
    /// Translates `iova` (bytes) for all that `access` has: the guest's address of the memory, and
    /// how many bytes from there on are contiguous; at least one. `None` if it has nothing.
    ///
    /// # Errors
    /// As [`DmaPort::read`](super::DmaPort::read), but the fault is reported at the end of the
    /// section.
    pub fn translate(
        &mut self,
        attributes: DmaAttributes,
        iova: u64,
        access: Permissions,
    ) -> Result<Option<(GuestAddress, usize)>, DmaError> {
        let directions: &[DmaAccess] = match access {
            Permissions::No => &[],
            Permissions::Read => &[DmaAccess::Read],
            Permissions::Write => &[DmaAccess::Write],
            Permissions::ReadWrite => &[DmaAccess::Read, DmaAccess::Write],
        };
        let mut found = None;
        for &direction in directions {
            let target = self.target(attributes, iova, direction)?;
            let memory = self.engine.common.caches.memory(target.place);
            let memory = memory.ok_or(DmaError::NoMemory { address: iova })?;
            let address = memory.gpa(target.place.offset);
            let address = address.ok_or(DmaError::NoGpa { address: iova })?;
            let length = self.interrupts.piece(attributes, iova, target.length);
            let length = found.map_or(length, |(_, before)| length.min(before));
            found = Some((GuestAddress(address), length));
        }
        Ok(found)
    }

    /// Translates `iova` (bytes): the memory of the next `length` bytes, as far as they are
    /// contiguous; at least one.
    ///
    /// # Errors
    /// As [`Section::translate`].
    pub fn slice(
        &mut self,
        attributes: DmaAttributes,
        iova: u64,
        length: usize,
        access: DmaAccess,
    ) -> Result<MemorySlice<'_>, DmaError> {
        let target = self.target(attributes, iova, access)?;
        let length = length.min(self.interrupts.piece(attributes, iova, target.length));
        let slice = self.engine.common.caches.slice(target.place, length);
        slice.ok_or(DmaError::NoMemory { address: iova })
    }

    /// Whether somebody may record writes to memory.
    pub fn records_writes(&self) -> bool {
        self.engine.common.caches.memories().any_tracked()
    }

    /// Records that `length` bytes were written at `address`, as from [`Section::translate`].
    pub fn mark_dirty(&self, address: u64, length: u64) {
        self.engine.common.caches.memories().mark_dirty(address, length);
    }

    fn target(
        &mut self,
        attributes: DmaAttributes,
        iova: u64,
        access: DmaAccess,
    ) -> Result<Target, DmaError> {
        self.interrupts.check(attributes, iova)?;
        let request = request(self.rid, attributes, iova, access);
        let Self { engine, config, counters, .. } = self;
        let cached = engine.common.cached(config, counters, (request.pasid, iova, request.kind));
        let found = match cached {
            Ok(target) => Ok(target),
            // The earlier translation is valid until the section ends, so the section cannot be
            // left. It need not: the requester has something attached, unless requests differ in
            // PASID.
            Err(missed) if self.translated => {
                engine.own.translate(&engine.common, config, counters, &request, missed)
            }
            Err(missed) => walk(engine, config, counters, &request, missed),
        };
        match found {
            Ok(target) => {
                self.translated = true;
                Ok(target)
            }
            Err(Blocked::Interrupt(address)) => Err(DmaError::Interrupt { address }),
            Err(Blocked::Fault(fault)) => {
                let error = error(&request, &fault);
                self.faults.list.push(fault);
                Err(error)
            }
        }
    }
}

/// Faults of a section that have not been reported.
#[derive(Debug)]
pub(super) struct Unreported<'a> {
    pub counters: &'a LocalCounters,
    pub list: Vec<Fault>,
}

impl Drop for Unreported<'_> {
    fn drop(&mut self) {
        for fault in &self.list {
            report(self.counters, fault);
        }
    }
}

/// Translates `request`, which `missed`, by tables. If nothing is attached for it, asks whoever
/// may attach something, outside of the section, and tries again: only to be called while nothing
/// read in the section is in use.
#[inline]
pub(super) fn walk(
    engine: &mut ReadGuard<'_, Engine>,
    config: &mut ConfigCache,
    counters: &LocalCounters,
    request: &Request,
    missed: Missed,
) -> Result<Target, Blocked> {
    let found = engine.own.translate(&engine.common, config, counters, request, missed);
    match &found {
        Err(blocked) if attached_late(engine, blocked) => {
            engine.own.translate(&engine.common, config, counters, request, Missed::Config)
        }
        _ => found,
    }
}

/// Whether something was attached now because of `blocked`.
#[cold]
fn attached_late(engine: &mut ReadGuard<'_, Engine>, blocked: &Blocked) -> bool {
    match blocked {
        Blocked::Fault(Fault { nothing_attached: true, report: Some(report), .. }) => {
            engine.outside(|| report.attached_late())
        }
        _ => false,
    }
}

/// Counts and reports `fault`. The gate must have been left.
#[cold]
pub(super) fn report(counters: &LocalCounters, fault: &Fault) {
    counters.faults.count();
    if let Some(report) = &fault.report {
        report.deliver();
    }
}

/// `fault` as the device sees it.
pub(super) fn error(request: &Request, fault: &Fault) -> DmaError {
    DmaError::Fault { address: request.address, reason: fault.reason, stage2: fault.stage2 }
}

#[inline]
pub(super) fn request(
    rid: u16,
    attributes: DmaAttributes,
    address: u64,
    access: DmaAccess,
) -> Request {
    Request { rid, pasid: attributes.pasid, address, kind: kind(attributes, access) }
}

/// What a request with `attributes` for `access` is.
#[inline]
pub(super) fn kind(attributes: DmaAttributes, access: DmaAccess) -> RequestKind {
    let DmaAttributes { pasid, privileged, execute } = attributes;
    let (with_pasid, write) = (pasid.is_some(), access == DmaAccess::Write);
    RequestKind::new(write, with_pasid && privileged, with_pasid && execute)
}

/// IOVAs that are interrupt messages regardless of the configuration, in requests without PASID.
#[derive(Debug, Clone)]
pub(super) struct Interrupts(Option<(u64, u64)>);

impl Interrupts {
    /// Those of `range`; none without one.
    pub fn new(range: Option<RangeInclusive<u64>>) -> Self {
        // Every request is compared with both ends.
        Self(range.map(RangeInclusive::into_inner))
    }

    /// Whether a request to `iova` is a memory access and not an interrupt message.
    #[inline]
    pub fn check(&self, attributes: DmaAttributes, iova: u64) -> Result<(), DmaError> {
        match self.0 {
            Some((first, last)) if attributes.pasid.is_none() && first <= iova && iova <= last => {
                Err(DmaError::Interrupt { address: iova })
            }
            _ => Ok(()),
        }
    }

    /// How many bytes from `iova` on one section may access, if `target` bytes are in one page. A
    /// 1 GiB page may contain addresses of interrupt messages.
    #[inline]
    pub fn piece(&self, attributes: DmaAttributes, iova: u64, target: u64) -> usize {
        let length = target.min(MAX_PIECE as u64);
        let length = match self.0 {
            Some((first, _)) if attributes.pasid.is_none() && iova < first => {
                length.min(first - iova)
            }
            _ => length,
        };
        length as usize
    }
}
