// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The educational device ([`twostage_emulated::edu`]) behind VFIO.
//!
//! A DMA completes within the write that starts it, unless it waits for a page that the device has
//! requested (PRI): then register 0x98 reads as busy, and the DMA continues, and its interrupt is
//! sent, in the call that responds. Two registers are added: 0xA8 has the result of the last DMA,
//! and 0xB0 the address where it was blocked. Interrupts are messages, or asserted by the pin.

use std::sync::Arc;

use twostage::spec::pci::Pasid;
use twostage_emulated::edu::registers::DMA_COMMAND;
use twostage_emulated::edu::{Effect, Engine, Failure, Registers, Requests, Transfer};
use twostage_emulated::{DmaAccess, DmaAttributes, DmaError, DmaPort, PageTries};

use crate::callers::process::Process;
use crate::memory::pins::Pins;
use crate::sys;

const DMA_RESULT: u64 = 0xa8;
const DMA_REFUSED_AT: u64 = 0xb0;

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

/// Why a request failed.
enum Stop {
    /// It waits for the response to the page request group.
    Asked(u16),
    Refused,
    NoMemory,
}

/// A DMA that waits for the page at `iova`.
#[derive(Debug)]
struct Waiting {
    transfer: Transfer,
    tries: PageTries,
    iova: u64,
    group: u16,
}

/// The device.
#[derive(Debug)]
pub struct Edu {
    registers: Registers,
    engine: Engine,
    memory: Memory,
    outcome: Outcome,
    refused_at: u64,
    waiting: Option<Waiting>,
}

impl Edu {
    /// A device with the DMA port `port`.
    pub fn new(port: DmaPort, pins: Arc<Pins>) -> Self {
        Self {
            registers: Registers::default(),
            engine: Engine::new(u64::MAX),
            memory: Memory { port, pins },
            outcome: Outcome::Done,
            refused_at: 0,
            waiting: None,
        }
    }

    /// Puts it in the state in which it was opened: a DMA that waits is given up.
    pub fn reset(&mut self) {
        self.registers = Registers::default();
        self.engine = Engine::new(u64::MAX);
        (self.outcome, self.refused_at, self.waiting) = (Outcome::Done, 0, None);
    }

    /// Reads a register of BAR 0. Undefined ones, and unsupported widths, read as all ones.
    pub fn read(&self, offset: u64, width: usize) -> u64 {
        match offset {
            // All bits are cleared at the end.
            DMA_COMMAND if matches!(width, 4 | 8) && !self.waits() => 0,
            DMA_RESULT if matches!(width, 4 | 8) => self.outcome as u64,
            DMA_REFUSED_AT if matches!(width, 4 | 8) => self.refused_at,
            _ => self.registers.read(offset, width, true),
        }
    }

    /// Writes a register. `bus_master`: bus mastering is enabled. Returns the causes that were
    /// added if an interrupt is to be sent.
    pub fn write(
        &mut self,
        offset: u64,
        width: usize,
        value: u64,
        bus_master: bool,
    ) -> Option<u32> {
        match self.registers.write(offset, width, value, true) {
            Effect::None => None,
            Effect::Interrupt { raised, causes } => raised.then_some(causes),
            Effect::Transfer(transfer) => {
                self.refused_at = 0;
                self.run(transfer, PageTries::default(), bus_master)
            }
        }
    }

    /// Whether it asserts its pin, if that is enabled.
    pub fn interrupt_pending(&self) -> bool {
        self.registers.interrupt_pending()
    }

    /// Whether a DMA waits for a page.
    pub fn waits(&self) -> bool {
        self.waiting.is_some()
    }

    /// Continues a DMA whose page requests are answered. Returns as [`Self::write`].
    pub fn resume(&mut self, bus_master: bool) -> Option<u32> {
        let mut waiting = self.waiting.take()?;
        let Some(response) = self.memory.port.page_response(waiting.group) else {
            self.waiting = Some(waiting);
            return None;
        };
        match waiting.tries.answered(waiting.iova, response) {
            Err(_) if bus_master => self.refused(waiting.iova, Outcome::Refused),
            _ => self.run(waiting.transfer, waiting.tries, bus_master),
        }
    }

    /// Runs `transfer` to its end, or until it waits for a page. Returns as [`Self::write`].
    fn run(&mut self, mut transfer: Transfer, tries: PageTries, bus_master: bool) -> Option<u32> {
        if !bus_master {
            return self.end(Outcome::NotBusMaster);
        }
        let Err(failure) = self.engine.run(&mut transfer, &mut self.memory) else {
            return self.end(Outcome::Done);
        };
        match failure {
            Failure::Bounds { .. } => self.end(Outcome::OutOfBuffer),
            Failure::Stopped { iova, stop: Stop::Refused } => self.refused(iova, Outcome::Refused),
            Failure::Stopped { iova, stop: Stop::NoMemory } => {
                self.refused(iova, Outcome::NoMemory)
            }
            Failure::Stopped { iova, stop: Stop::Asked(group) } => {
                self.outcome = Outcome::Waiting;
                self.waiting = Some(Waiting { transfer, tries, iova, group });
                None
            }
        }
    }

    fn refused(&mut self, iova: u64, outcome: Outcome) -> Option<u32> {
        self.refused_at = iova;
        self.end(outcome)
    }

    /// A DMA has ended. Returns as [`Self::write`].
    fn end(&mut self, outcome: Outcome) -> Option<u32> {
        self.outcome = outcome;
        match self.registers.transfer_ended() {
            Effect::Interrupt { raised: true, causes } => Some(causes),
            _ => None,
        }
    }
}

/// The memory behind the IOMMU.
#[derive(Debug)]
struct Memory {
    port: DmaPort,
    pins: Arc<Pins>,
}

impl Memory {
    /// Translates up to `length` bytes at `iova`: `copy` gets the address and length of as many as
    /// are contiguous.
    fn piece(
        &mut self,
        pasid: Option<Pasid>,
        iova: u64,
        length: usize,
        access: DmaAccess,
        copy: impl FnOnce(&Pins, u64, usize) -> bool,
    ) -> Result<usize, Stop> {
        let attributes = DmaAttributes { pasid: pasid.map(Pasid::raw), ..DmaAttributes::default() };
        match self.port.translate(attributes, iova, length, access) {
            Ok(piece) => {
                let memory = piece.slice();
                let guard = memory.ptr_guard_mut();
                let copied = copy(&self.pins, guard.as_ptr() as u64, memory.len());
                copied.then_some(memory.len()).ok_or(Stop::NoMemory)
            }
            Err(DmaError::PageRequested { group, .. }) => Err(Stop::Asked(group)),
            Err(_) => Err(Stop::Refused),
        }
    }
}

/// The kernel copies, so that missing memory is an error. The rest may be in a mapping that the
/// program has protected since.
impl Requests for Memory {
    type Stop = Stop;

    fn read(&mut self, pasid: Option<Pasid>, iova: u64, data: &mut [u8]) -> Result<usize, Stop> {
        self.piece(pasid, iova, data.len(), DmaAccess::Read, |pins, address, length| {
            let part = data.get_mut(..length).unwrap_or_default();
            let done = sys::read_memory(sys::process_id(), address, part).unwrap_or(0);
            let (at, rest) = (address + done as u64, part.get_mut(done..).unwrap_or_default());
            rest.is_empty() || pins.is_held(at, rest.len() as u64) && sys::read_anyway(at, rest)
        })
    }

    fn write(&mut self, pasid: Option<Pasid>, iova: u64, data: &[u8]) -> Result<usize, Stop> {
        self.piece(pasid, iova, data.len(), DmaAccess::Write, |pins, address, length| {
            let part = data.get(..length).unwrap_or_default();
            let done = Process::own().write_some(address, part);
            let (at, rest) = (address + done as u64, part.get(done..).unwrap_or_default());
            rest.is_empty() || pins.is_held(at, rest.len() as u64) && sys::write_anyway(at, rest)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use twostage::iommufd::{
        FaultQueue, HostIommu, HwptAlloc, HwptData, HwptFlags, MapTarget, ObjectId,
        PageResponseCode, Protection, UserMemory,
    };
    use twostage::spec::pci::Bdf;
    use twostage_emulated::edu::registers::*;
    use twostage_emulated::edu::BUFFER_START;
    use twostage_emulated::{DeviceConfig, EmulatedHost, VtdUnit, VtdUnitConfig};
    use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress};

    fn edu() -> (Edu, Arc<GuestRegionMmap>, Arc<EmulatedHost>) {
        let host = EmulatedHost::new();
        let config = VtdUnitConfig::default().with_device_tlb(true).with_page_requests(true);
        let unit = host.add_unit(VtdUnit::new(config));
        let rid = Bdf::new(0, 4, 0).unwrap();
        let config = DeviceConfig::default().with_ats(true).with_pri(true);
        host.add_device("edu", unit, rid, config).unwrap();
        let (dev, ioas) = (host.device_bind("edu").unwrap(), host.ioas_alloc().unwrap());
        let region = GuestRegionMmap::<()>::from_range(GuestAddress(0), 0x2000, None).unwrap();
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
        assert_eq!(edu.resume(true), None, "there is no answer");
        edu.write(DMA_SOURCE, 8, 0, true);
        assert_eq!(edu.read(DMA_SOURCE, 8), 0x1_1ff8, "the registers are the DMA's");
        answer(&edu, &*queue, PageResponseCode::Success);
        assert_eq!(edu.resume(true), None, "it asks again");
        let (written, memory) = (region.clone(), UserMemory::whole(region));
        let target = MapTarget::Fixed(0x1_2000);
        host.ioas_map(ioas, &memory, target, Protection::READ_WRITE).unwrap();
        answer(&edu, &*queue, PageResponseCode::Success);
        assert_eq!(edu.resume(true), Some(CAUSE_DMA), "an interrupt is to be sent");
        assert_eq!(edu.read(INTERRUPT_STATUS, 4), u64::from(CAUSE_DMA));
        assert_eq!((edu.read(DMA_COMMAND, 8), edu.read(DMA_RESULT, 8)), (0, 0));
        let (count, back) = (8, COMMAND_START | COMMAND_TO_MEMORY);
        assert_eq!(dma(&mut edu, BUFFER_START, 0x1_0000, count, back), 0);
        let mut bytes = [0; 8];
        written.read_slice(&mut bytes, MemoryRegionAddress(0)).unwrap();
        assert_eq!(&bytes, b"12345678");

        host.ioas_unmap(ioas, 0x1_2000, 0x2000).unwrap();
        for (code, bus_master, outcome) in
            [(PageResponseCode::Invalid, true, 1), (PageResponseCode::Success, false, 3)]
        {
            start(&mut edu);
            answer(&edu, &*queue, code);
            assert_eq!(edu.resume(bus_master), Some(CAUSE_DMA));
            assert_eq!((edu.read(DMA_COMMAND, 8), edu.read(DMA_RESULT, 8)), (0, outcome));
        }
        assert_eq!(edu.resume(true), None, "there is nothing to go on with");
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
        edu.write(DMA_PASID, 4, u64::from(PASID_VALID) | 5, true);
        assert_eq!(dma(&mut edu, 0x1_0000, BUFFER_START, 1, COMMAND_START), 1, "no such PASID");
    }

    #[test]
    fn registers() {
        let (mut edu, _region, _host) = edu();
        assert_eq!(edu.read(ID, 4), 0x0100_00ed);
        assert_eq!(edu.read(ID, 8), u64::MAX, "4 bytes only");
        edu.write(LIVENESS, 4, 0x1234, true);
        assert_eq!(edu.read(LIVENESS, 4), 0xffff_edcb);
        edu.write(FACTORIAL, 4, 5, true);
        assert_eq!(edu.read(FACTORIAL, 4), 120);
        assert_eq!(edu.write(INTERRUPT_RAISE, 4, 0, true), None);
        assert_eq!(edu.write(INTERRUPT_RAISE, 4, 6, true), Some(6));
        assert_eq!(edu.write(INTERRUPT_ACKNOWLEDGE, 4, 2, true), None);
        assert_eq!(edu.read(INTERRUPT_STATUS, 4), 4);
    }
}
