// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The educational device, 1234:11e8 (QEMU's `docs/specs/edu`), as far as programs use it here: its
//! registers, and DMA between memory and a buffer of 4 KiB.
//!
//! A DMA completes within the write that starts it, unless it waits for a page that the device has
//! requested (PRI): then register 0x98 reads as busy, and the DMA continues, and its interrupt is
//! sent, in the call that responds. Three registers are Twostage's: 0xA0 sets the PASID of the DMA,
//! 0xA8 has the result of the last one, and 0xB0 the address where it was blocked. Interrupts are
//! MSIs; there is no INTx.

use std::ops::Range;
use std::sync::Arc;

use twostage_emulated::{DmaAccess, DmaAttributes, DmaError, DmaPort, PageTries};

use crate::callers::process::Process;
use crate::memory::pins::Pins;
use crate::sys;

/// Length of BAR 0, in bytes.
pub const BAR_SIZE: u64 = 1 << 20;

const IDENTIFICATION: u64 = 0x00;
const LIVENESS: u64 = 0x04;
const FACTORIAL: u64 = 0x08;
const STATUS: u64 = 0x20;
const INTERRUPT_STATUS: u64 = 0x24;
const INTERRUPT_RAISE: u64 = 0x60;
const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
const DMA_SOURCE: u64 = 0x80;
const DMA_DESTINATION: u64 = 0x88;
const DMA_COUNT: u64 = 0x90;
const DMA_COMMAND: u64 = 0x98;
const DMA_PASID: u64 = 0xa0;
const DMA_RESULT: u64 = 0xa8;
const DMA_REFUSED_AT: u64 = 0xb0;
/// Registers below only support accesses of 4 bytes, those from here on also of 8.
const WIDE_START: u64 = 0x80;

const COMMAND_START: u64 = 1 << 0;
/// From the buffer to memory; otherwise the reverse.
const COMMAND_TO_MEMORY: u64 = 1 << 1;
/// Raises an interrupt at the end.
const COMMAND_INTERRUPT: u64 = 1 << 2;
const PASID_VALID: u64 = 1 << 31;
const PASID_MASK: u64 = (1 << 20) - 1;
const CAUSE_DMA: u32 = 0x100;

/// The buffer's address in the device's own address space.
const BUFFER_START: u64 = 0x4_0000;
const BUFFER_SIZE: usize = 4096;

/// Values of register 0xA8: the result of the last DMA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
enum Outcome {
    /// Completed.
    Done = 0,
    /// The IOMMU blocked the request at the address in register 0xB0; those before are done.
    Refused = 1,
    /// It is not within the buffer.
    OutOfBuffer = 2,
    /// Bus mastering is disabled.
    NotBusMaster = 3,
    /// The memory could not be accessed although the IOMMU allows it: its file was truncated.
    NoMemory = 4,
    /// It waits for a page.
    Waiting = 5,
}

/// A DMA in progress.
#[derive(Debug)]
struct Transfer {
    /// Its command.
    command: u64,
    attributes: DmaAttributes,
    /// The remaining part of the buffer.
    rest: Range<usize>,
    /// The address for that.
    iova: u64,
    tries: PageTries,
}

/// The progress of a DMA.
enum Progress {
    Ended(Outcome),
    /// It waits for the response to the group.
    Asked(u16),
}

/// The device.
#[derive(Debug)]
pub struct Edu {
    port: DmaPort,
    pins: Arc<Pins>,
    buffer: Box<[u8; BUFFER_SIZE]>,
    liveness: u32,
    factorial: u32,
    interrupt_status: u32,
    source: u64,
    destination: u64,
    count: u64,
    pasid: u64,
    outcome: Outcome,
    refused_at: u64,
    /// The DMA that waits for a page, and its page request group.
    waiting: Option<(Transfer, u16)>,
}

impl Edu {
    /// A device with the DMA port `port`.
    pub fn new(port: DmaPort, pins: Arc<Pins>) -> Self {
        Self {
            pins,
            port,
            buffer: Box::new([0; BUFFER_SIZE]),
            liveness: 0,
            factorial: 0,
            interrupt_status: 0,
            source: 0,
            destination: 0,
            count: 0,
            pasid: 0,
            outcome: Outcome::Done,
            refused_at: 0,
            waiting: None,
        }
    }

    /// Reads a register of BAR 0. Undefined ones, and unsupported widths, read as all ones.
    pub fn read(&self, offset: u64, width: usize) -> u64 {
        let value = match offset {
            IDENTIFICATION => 0x0100_00ed,
            LIVENESS => u64::from(self.liveness),
            FACTORIAL => u64::from(self.factorial),
            // A factorial is computed immediately.
            STATUS => 0,
            INTERRUPT_STATUS => u64::from(self.interrupt_status),
            DMA_SOURCE => self.source,
            DMA_DESTINATION => self.destination,
            DMA_COUNT => self.count,
            DMA_COMMAND => self.waiting.as_ref().map_or(0, |(transfer, _)| transfer.command),
            DMA_PASID => self.pasid,
            DMA_RESULT => self.outcome as u64,
            DMA_REFUSED_AT => self.refused_at,
            _ => u64::MAX,
        };
        if has_width(offset, width) {
            value
        } else {
            u64::MAX
        }
    }

    /// Writes a register. `bus_master`: bus mastering is enabled. Returns whether an interrupt is
    /// to be sent.
    pub fn write(&mut self, offset: u64, width: usize, value: u64, bus_master: bool) -> bool {
        if !has_width(offset, width) {
            return false;
        }
        match offset {
            LIVENESS => self.liveness = !(value as u32),
            FACTORIAL => self.factorial = (1..=value as u32).take(34).fold(1, u32::wrapping_mul),
            INTERRUPT_RAISE => {
                self.interrupt_status |= value as u32;
                return self.interrupt_status != 0;
            }
            INTERRUPT_ACKNOWLEDGE => self.interrupt_status &= !(value as u32),
            // They are in use by the DMA.
            DMA_SOURCE.. if self.waiting.is_some() => {}
            DMA_SOURCE => self.source = value,
            DMA_DESTINATION => self.destination = value,
            DMA_COUNT => self.count = value,
            DMA_PASID => self.pasid = value & (PASID_VALID | PASID_MASK),
            DMA_COMMAND if value & COMMAND_START != 0 => {
                self.refused_at = 0;
                return match self.transfer(value) {
                    _ if !bus_master => self.end(value, Outcome::NotBusMaster),
                    Ok(transfer) => self.run(transfer),
                    Err(outcome) => self.end(value, outcome),
                };
            }
            _ => {}
        }
        false
    }

    /// Whether a DMA waits for a page.
    pub fn waits(&self) -> bool {
        self.waiting.is_some()
    }

    /// Continues a DMA whose page requests are answered. Returns whether an interrupt is to be
    /// sent.
    pub fn resume(&mut self, bus_master: bool) -> bool {
        let Some((mut transfer, group)) = self.waiting.take() else { return false };
        let Some(response) = self.port.page_response(group) else {
            self.waiting = Some((transfer, group));
            return false;
        };
        match transfer.tries.answered(transfer.iova, response) {
            _ if !bus_master => self.end(transfer.command, Outcome::NotBusMaster),
            Ok(()) => self.run(transfer),
            Err(_) => {
                self.refused_at = transfer.iova;
                self.end(transfer.command, Outcome::Refused)
            }
        }
    }

    /// The DMA described by the registers.
    fn transfer(&self, command: u64) -> Result<Transfer, Outcome> {
        let (device, iova) = match command & COMMAND_TO_MEMORY != 0 {
            true => (self.source, self.destination),
            false => (self.destination, self.source),
        };
        let rest = buffer_range(device, self.count).ok_or(Outcome::OutOfBuffer)?;
        let pasid = (self.pasid & PASID_VALID != 0).then_some((self.pasid & PASID_MASK) as u32);
        let attributes = DmaAttributes { pasid, ..DmaAttributes::default() };
        Ok(Transfer { command, attributes, rest, iova, tries: PageTries::default() })
    }

    /// Runs `transfer` to its end, or until it waits for a page. Returns whether an interrupt is to
    /// be sent.
    fn run(&mut self, mut transfer: Transfer) -> bool {
        match self.advance(&mut transfer) {
            Progress::Ended(outcome) => self.end(transfer.command, outcome),
            Progress::Asked(group) => {
                self.outcome = Outcome::Waiting;
                self.waiting = Some((transfer, group));
                false
            }
        }
    }

    /// A DMA has ended. Returns whether an interrupt is to be sent.
    fn end(&mut self, command: u64, outcome: Outcome) -> bool {
        self.outcome = outcome;
        let interrupt = command & COMMAND_INTERRUPT != 0;
        if interrupt {
            self.interrupt_status |= CAUSE_DMA;
        }
        interrupt
    }

    fn advance(&mut self, transfer: &mut Transfer) -> Progress {
        let to_memory = transfer.command & COMMAND_TO_MEMORY != 0;
        let access = if to_memory { DmaAccess::Write } else { DmaAccess::Read };
        let Transfer { attributes, rest, iova, .. } = transfer;
        while rest.start < rest.end {
            let piece = match self.port.translate(*attributes, *iova, rest.len(), access) {
                Ok(piece) => piece,
                Err(DmaError::PageRequested { group, .. }) => return Progress::Asked(group),
                Err(_) => {
                    self.refused_at = *iova;
                    return Progress::Ended(Outcome::Refused);
                }
            };
            let slice = piece.slice();
            let end = rest.start + slice.len();
            // Within the buffer, like the rest.
            let part = self.buffer.get_mut(rest.start..end).unwrap_or_default();
            if part.is_empty() || !copy(&self.pins, &slice, part, to_memory) {
                self.refused_at = *iova;
                return Progress::Ended(Outcome::NoMemory);
            }
            // Cannot pass the end of the address space: the IOMMU blocks that.
            *iova = iova.wrapping_add(slice.len() as u64);
            rest.start = end;
        }
        Progress::Ended(Outcome::Done)
    }
}

/// Copies between `memory` and `part`, of the same length. The kernel does it, so that missing
/// memory is an error.
fn copy(
    pins: &Pins,
    memory: &vm_memory::VolatileSlice<'_>,
    part: &mut [u8],
    to_memory: bool,
) -> bool {
    let guard = memory.ptr_guard_mut();
    let address = guard.as_ptr() as u64;
    let done = if to_memory {
        Process::own().write_some(address, part)
    } else {
        sys::read_memory(sys::process_id(), address, part).unwrap_or(0)
    };
    let rest = part.get_mut(done..).unwrap_or_default();
    let at = address + done as u64;
    // Of a mapping that the program has protected since.
    let is_pinned = || pins.is_held(at, rest.len() as u64);
    rest.is_empty() || is_pinned() && sys::copy_anyway(at, rest, to_memory)
}

fn has_width(offset: u64, width: usize) -> bool {
    width == 4 || (width == 8 && offset >= WIDE_START)
}

/// The buffer range of `count` bytes at device address `address`.
fn buffer_range(address: u64, count: u64) -> Option<Range<usize>> {
    let start = address.checked_sub(BUFFER_START)?;
    let end = start.checked_add(count)?;
    (end <= BUFFER_SIZE as u64).then_some(start as usize..end as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use twostage::iommufd::{
        FaultQueue, HostIommu, HwptAlloc, HwptData, HwptFlags, MapTarget, ObjectId,
        PageResponseCode, Protection, UserMemory,
    };
    use twostage::spec::pci::Bdf;
    use twostage_emulated::{DeviceConfig, EmulatedHost, VtdUnit, VtdUnitConfig};
    use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress};

    fn edu() -> (Edu, Arc<GuestRegionMmap>, Arc<EmulatedHost>) {
        let host = EmulatedHost::new();
        let config = VtdUnitConfig::default();
        let config = VtdUnitConfig { device_tlb: true, page_requests: true, ..config };
        let unit = host.add_unit(VtdUnit::new(config));
        let rid = Bdf::new(0, 4, 0).unwrap();
        let config = DeviceConfig { ats: true, pri: true, ..DeviceConfig::default() };
        host.add_device("edu", unit, rid, config).unwrap();
        let (dev, ioas) = (host.device_bind("edu").unwrap(), host.ioas_alloc().unwrap());
        let region = GuestRegionMmap::from_range(GuestAddress(0), 0x2000, None).unwrap();
        let region = Arc::new(region);
        let memory = UserMemory::whole(region.clone());
        let target = MapTarget::Fixed(0x1_0000);
        host.ioas_map(ioas, &memory, target, Protection::READ_WRITE).unwrap();
        host.device_attach(dev, None, ioas).unwrap();
        (Edu::new(host.dma_port("edu").unwrap(), Arc::default()), region, host)
    }

    fn dma(edu: &mut Edu, source: u64, destination: u64, count: u64, command: u64) -> u64 {
        for (register, value) in
            [(DMA_SOURCE, source), (DMA_DESTINATION, destination), (DMA_COUNT, count)]
        {
            edu.write(register, 8, value, true);
        }
        edu.write(DMA_COMMAND, 8, command, true);
        edu.read(DMA_RESULT, 8)
    }

    #[test]
    fn data_goes_to_the_buffer_and_back() {
        let (mut edu, region, _host) = edu();
        region.write_slice(b"through two pages", MemoryRegionAddress(0xff8)).unwrap();
        assert_eq!(dma(&mut edu, 0x1_0ff8, BUFFER_START, 17, COMMAND_START), 0);
        let back = COMMAND_START | COMMAND_TO_MEMORY | COMMAND_INTERRUPT;
        assert_eq!(dma(&mut edu, BUFFER_START, 0x1_0010, 17, back), 0);
        let mut bytes = [0; 17];
        region.read_slice(&mut bytes, MemoryRegionAddress(0x10)).unwrap();
        assert_eq!(&bytes, b"through two pages");
        assert_eq!(edu.read(INTERRUPT_STATUS, 4), u64::from(CAUSE_DMA));
    }

    /// Makes the device request the page at 0x12000, and responds.
    fn answer(edu: &Edu, queue: &dyn FaultQueue, code: PageResponseCode) {
        assert_eq!((edu.read(DMA_COMMAND, 8) & 1, edu.read(DMA_RESULT, 8)), (1, 5));
        let group = queue.next_group().unwrap().unwrap();
        assert_eq!(group.requests[0].address, 0x1_2000);
        queue.respond(group.cookie, code).unwrap();
    }

    #[test]
    fn a_dma_waits_for_a_page() {
        let (mut edu, region, host) = edu();
        let (dev, ioas) = (ObjectId(1), ObjectId(2));
        let queue = host.fault_queue_alloc().unwrap();
        let (flags, fault) = (HwptFlags::new().with_fault_id_valid(true), Some(queue.object()));
        let args = HwptAlloc { flags, dev, pt: ioas, data: HwptData::None, fault };
        let hwpt = host.hwpt_alloc(&args).unwrap();
        host.device_attach(dev, None, hwpt).unwrap();
        region.write_slice(b"12345678", MemoryRegionAddress(0x1ff8)).unwrap();
        let start = |edu: &mut Edu| {
            assert_eq!(dma(edu, 0x1_1ff8, BUFFER_START, 16, COMMAND_START | COMMAND_INTERRUPT), 5);
        };

        start(&mut edu);
        assert!(!edu.resume(true), "there is no answer");
        edu.write(DMA_SOURCE, 8, 0, true);
        assert_eq!(edu.read(DMA_SOURCE, 8), 0x1_1ff8, "the registers are the DMA's");
        answer(&edu, &*queue, PageResponseCode::Success);
        assert!(!edu.resume(true), "it asks again");
        let memory = UserMemory::whole(region);
        let target = MapTarget::Fixed(0x1_2000);
        host.ioas_map(ioas, &memory, target, Protection::READ_WRITE).unwrap();
        answer(&edu, &*queue, PageResponseCode::Success);
        assert!(edu.resume(true), "an interrupt is to be sent");
        assert_eq!(edu.read(INTERRUPT_STATUS, 4), u64::from(CAUSE_DMA));
        assert_eq!((edu.read(DMA_COMMAND, 8), edu.read(DMA_RESULT, 8)), (0, 0));
        assert_eq!(edu.buffer[..8], *b"12345678");

        host.ioas_unmap(ioas, 0x1_2000, 0x2000).unwrap();
        for (code, bus_master, outcome) in
            [(PageResponseCode::Invalid, true, 1), (PageResponseCode::Success, false, 3)]
        {
            start(&mut edu);
            answer(&edu, &*queue, code);
            assert!(edu.resume(bus_master));
            assert_eq!((edu.read(DMA_COMMAND, 8), edu.read(DMA_RESULT, 8)), (0, outcome));
        }
        assert!(!edu.resume(true), "there is nothing to go on with");
    }

    #[test]
    fn what_a_dma_cannot_do() {
        let (mut edu, _region, _host) = edu();
        assert_eq!(dma(&mut edu, 0x1_1ff0, BUFFER_START, 0x20, COMMAND_START), 1);
        assert_eq!(edu.read(DMA_REFUSED_AT, 8), 0x1_2000);
        assert_eq!(dma(&mut edu, 0x1_0000, BUFFER_START + 0xfff, 2, COMMAND_START), 2);
        assert_eq!(dma(&mut edu, 0x1_0000, 0, 1, COMMAND_START), 2);
        edu.write(DMA_COMMAND, 8, COMMAND_START, false);
        assert_eq!(edu.read(DMA_RESULT, 8), Outcome::NotBusMaster as u64);
        edu.write(DMA_PASID, 4, PASID_VALID | 5, true);
        assert_eq!(dma(&mut edu, 0x1_0000, BUFFER_START, 1, COMMAND_START), 1, "no such PASID");
    }

    #[test]
    fn registers() {
        let (mut edu, _region, _host) = edu();
        assert_eq!(edu.read(IDENTIFICATION, 4), 0x0100_00ed);
        assert_eq!(edu.read(IDENTIFICATION, 8), u64::MAX, "4 bytes only");
        edu.write(LIVENESS, 4, 0x1234, true);
        assert_eq!(edu.read(LIVENESS, 4), 0xffff_edcb);
        edu.write(FACTORIAL, 4, 5, true);
        assert_eq!(edu.read(FACTORIAL, 4), 120);
        assert!(!edu.write(INTERRUPT_RAISE, 4, 0, true));
        assert!(edu.write(INTERRUPT_RAISE, 4, 6, true));
        assert!(!edu.write(INTERRUPT_ACKNOWLEDGE, 4, 2, true));
        assert_eq!(edu.read(INTERRUPT_STATUS, 4), 4);
    }
}
