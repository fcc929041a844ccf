// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DMA of devices in this process, through an emulated IOMMU.
//!
//! A translation and the access that it serves are one critical section: an invalidation, an unmap
//! or a detach returns only when no access that goes by the old translation is under way. A
//! transfer is cut into pieces of at most 64 KiB, each a section of its own, so that nobody waits
//! long.
#![forbid(unsafe_code)]

use std::sync::Arc;

use vm_memory::{GuestAddress, VolatileSlice};

use super::gate::{ReadGuard, Reader};
use super::vtd::{Engine, Fault, LocalCounters, PasidCache, Request, RequestKind, Target, VtdUnit};
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::interrupt::INTERRUPT_RANGE;

/// Bytes that one critical section transfers at most.
const MAX_PIECE: usize = 64 << 10;

/// What a DMA request says of itself beside address and data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DmaAttributes {
    /// PASID, when the request carries one.
    pub pasid: Option<u32>,
    /// Privileged mode requested; nothing without a PASID.
    pub privileged: bool,
    /// Execute requested; nothing without a PASID.
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

/// A DMA request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DmaError {
    /// The IOMMU blocked it, and reported the fault.
    #[error("DMA to {address:#x} blocked: {reason}{}", if *.stage2 { ", by stage 2" } else { "" })]
    Fault {
        /// IOVA, in bytes, of the first byte that could not be reached.
        address: u64,
        /// Why.
        reason: FaultReason,
        /// The host's stage 2 refused, not the guest's own tables.
        stage2: bool,
    },
    /// A request without PASID to 0xFEE0_0000–0xFEEF_FFFF is an interrupt message and no memory
    /// access (§3.14); whoever made it must send it to the interrupt controller, or drop it.
    #[error("DMA to {address:#x} is an interrupt message")]
    Interrupt {
        /// IOVA in bytes.
        address: u64,
    },
    /// The request goes past the end of the address space. Nothing was transferred.
    #[error("DMA of {length:#x} bytes to {address:#x} goes past the end of the address space")]
    PastEnd {
        /// IOVA in bytes.
        address: u64,
        /// Length in bytes.
        length: usize,
    },
}

/// Where a device's DMA enters its IOMMU. Each thread of a device has its own, a clone.
#[derive(Debug)]
pub struct DmaPort {
    unit: Arc<VtdUnit>,
    rid: u16,
    reader: Reader<Engine>,
    pasid_cache: PasidCache,
    counters: Arc<LocalCounters>,
}

impl VtdUnit {
    /// A port for DMA by requester id `rid`.
    pub fn port(self: &Arc<Self>, rid: u16) -> DmaPort {
        DmaPort {
            unit: Arc::clone(self),
            rid,
            reader: self.gate().reader(),
            pasid_cache: PasidCache::default(),
            counters: self.counters_share(),
        }
    }
}

impl Clone for DmaPort {
    /// Another port of the same requester, for another thread.
    fn clone(&self) -> Self {
        self.unit.port(self.rid)
    }
}

impl DmaPort {
    /// Reads memory at `iova` (bytes) into `bytes`.
    ///
    /// # Errors
    /// [`DmaError`]; bytes before the failing address may have been read. A fault has been
    /// delivered to the sink of the requester when this returns.
    pub fn read(
        &mut self,
        attributes: DmaAttributes,
        iova: u64,
        bytes: &mut [u8],
    ) -> Result<(), DmaError> {
        check_end(iova, bytes.len())?;
        let mut done = 0;
        while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let address = iova + done as u64;
            let piece = self.translate(attributes, address, rest.len(), DmaAccess::Read)?;
            match piece.slice().copy_to(rest) {
                0 => return Err(no_memory(address)),
                copied => done += copied,
            }
        }
        Ok(())
    }

    /// Writes `bytes` to memory at `iova` (bytes).
    ///
    /// # Errors
    /// As [`DmaPort::read`]; bytes before the failing address may have been written.
    pub fn write(
        &mut self,
        attributes: DmaAttributes,
        iova: u64,
        bytes: &[u8],
    ) -> Result<(), DmaError> {
        check_end(iova, bytes.len())?;
        let mut done = 0;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            let address = iova + done as u64;
            let piece = self.translate(attributes, address, rest.len(), DmaAccess::Write)?;
            let slice = piece.slice();
            slice.copy_from(rest);
            match slice.len() {
                0 => return Err(no_memory(address)),
                copied => done += copied,
            }
        }
        Ok(())
    }

    /// Translates `iova` (bytes) for an access to some of the next `length` bytes, and starts the
    /// critical section: invalidations wait until the result is dropped. Access the slice and drop
    /// it; do not wait for anything in between, and never for an invalidation.
    ///
    /// # Errors
    /// As [`DmaPort::read`].
    #[inline]
    pub fn translate(
        &mut self,
        attributes: DmaAttributes,
        iova: u64,
        length: usize,
        access: DmaAccess,
    ) -> Result<Translated<'_>, DmaError> {
        check_memory(attributes, iova)?;
        let request = request(self.rid, attributes, iova, access);
        let engine = self.reader.enter();
        // On its own, and first: it is what nearly every request needs, and no more.
        if let Some(target) = engine.cached(&self.pasid_cache, &self.counters, &request) {
            let length = length.min(piece(attributes, iova, target.length));
            return Ok(Translated { engine, target, length });
        }
        match engine.translate(&mut self.pasid_cache, &self.counters, &request) {
            Ok(target) => {
                let length = length.min(piece(attributes, iova, target.length));
                Ok(Translated { engine, target, length })
            }
            Err(fault) => {
                drop(engine);
                Err(blocked(&self.unit, &self.counters, &request, fault))
            }
        }
    }
}

impl DmaPort {
    /// Starts a critical section for several accesses: see [`Section`].
    pub(super) fn enter(&mut self) -> Section<'_> {
        let (unit, counters) = (&*self.unit, &*self.counters);
        Section {
            rid: self.rid,
            pasid_cache: &mut self.pasid_cache,
            counters,
            engine: self.reader.enter(),
            faults: Unreported { unit, counters, list: Vec::new() },
        }
    }
}

/// A read-side critical section around any number of translations and the accesses that they
/// serve. Invalidations wait until it is dropped. Faults are reported then, and not before: whoever
/// is told may invalidate.
#[derive(Debug)]
pub(super) struct Section<'a> {
    rid: u16,
    pasid_cache: &'a mut PasidCache,
    counters: &'a LocalCounters,
    engine: ReadGuard<'a, Engine>,
    /// Dropped, and with that reported, after the gate has been left: fields are dropped in order.
    faults: Unreported<'a>,
}

impl Section<'_> {
    /// Translates `iova` (bytes): where the regions that were mapped say that the memory is, and
    /// how many bytes from there on are in one piece; at least one.
    ///
    /// # Errors
    /// As [`DmaPort::read`], but that the fault is reported at the end of the section.
    pub fn translate(
        &mut self,
        attributes: DmaAttributes,
        iova: u64,
        access: DmaAccess,
    ) -> Result<(GuestAddress, usize), DmaError> {
        check_memory(attributes, iova)?;
        let request = request(self.rid, attributes, iova, access);
        let cached = self.engine.cached(self.pasid_cache, self.counters, &request);
        let target = match cached {
            Some(target) => target,
            None => {
                let target = self.engine.translate(self.pasid_cache, self.counters, &request);
                target.map_err(|fault| {
                    self.faults.list.push((request, fault));
                    fault_error(&request, fault)
                })?
            }
        };
        let address = self.engine.guest_address(&target).ok_or_else(|| no_memory(iova))?;
        Ok((address, piece(attributes, iova, target.length)))
    }
}

/// Faults of a section that nobody has been told of.
#[derive(Debug)]
struct Unreported<'a> {
    unit: &'a VtdUnit,
    counters: &'a LocalCounters,
    list: Vec<(Request, Fault)>,
}

impl Drop for Unreported<'_> {
    fn drop(&mut self) {
        for (request, fault) in self.list.drain(..) {
            blocked(self.unit, self.counters, &request, fault);
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
    /// The memory: it starts with the byte at the address asked for, and has as many of the bytes
    /// asked for as are in one page, at most 64 KiB; at least one, if one was asked for.
    #[inline]
    pub fn slice(&self) -> VolatileSlice<'_> {
        // A mapping lies in its memory ([`crate::iommufd::UserMemory`]), so there always is one.
        self.engine.slice(&self.target, self.length).unwrap_or_else(|| (&mut [][..]).into())
    }
}

/// Whether a request to `iova` is one to memory, and no interrupt message.
#[inline]
fn check_memory(attributes: DmaAttributes, iova: u64) -> Result<(), DmaError> {
    if attributes.pasid.is_none() && INTERRUPT_RANGE.contains(&iova) {
        return Err(DmaError::Interrupt { address: iova });
    }
    Ok(())
}

/// How many bytes from `iova` on one section may access, when `target` bytes are in one page. A
/// page of 1 GiB may hold addresses that are interrupt messages.
#[inline]
fn piece(attributes: DmaAttributes, iova: u64, target: u64) -> usize {
    let mut length = target.min(MAX_PIECE as u64);
    if attributes.pasid.is_none() && iova < *INTERRUPT_RANGE.start() {
        length = length.min(*INTERRUPT_RANGE.start() - iova);
    }
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

/// Counts and reports a fault. The gate must have been left.
#[cold]
fn blocked(unit: &VtdUnit, counters: &LocalCounters, request: &Request, fault: Fault) -> DmaError {
    counters.faults.count();
    unit.report(request, fault);
    fault_error(request, fault)
}

fn fault_error(request: &Request, fault: Fault) -> DmaError {
    let Fault { reason, stage2 } = fault;
    DmaError::Fault { address: request.address, reason, stage2 }
}

/// What to say when a mapping is longer than its memory: never, but a transfer must end.
#[cold]
fn no_memory(address: u64) -> DmaError {
    DmaError::Fault { address, reason: FaultReason::SecondStageDenied, stage2: true }
}

/// Whether `length` bytes at `address` end within the address space.
fn check_end(address: u64, length: usize) -> Result<(), DmaError> {
    let room = u64::MAX - address;
    if length as u64 > 1 && length as u64 - 1 > room {
        return Err(DmaError::PastEnd { address, length });
    }
    Ok(())
}
