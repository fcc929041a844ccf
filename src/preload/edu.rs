// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The educational device, 1234:11e8 (QEMU's `docs/specs/edu`), as far as programs use it here: its
//! registers, and DMA between memory and a buffer of 4 KiB.
//!
//! A DMA is over when the write that starts it returns. Three registers are Twostage's own: 0xA0 puts
//! a PASID on the DMA, 0xA8 says what became of the last one, and 0xB0 where it was refused.
//! Interrupts are messages; there is no line.

use std::ops::Range;

use twostage::emulated::{DmaAccess, DmaAttributes, DmaPort};

use crate::{process::Process, sys};

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
/// Registers below take accesses of 4 bytes only, those from here on of 8 too.
const WIDE_START: u64 = 0x80;

const COMMAND_START: u64 = 1 << 0;
/// From the buffer to memory; the other way otherwise.
const COMMAND_TO_MEMORY: u64 = 1 << 1;
/// Sets the cause when it is over.
const COMMAND_INTERRUPT: u64 = 1 << 2;
const PASID_VALID: u64 = 1 << 31;
const PASID_MASK: u64 = (1 << 20) - 1;
const CAUSE_DMA: u32 = 0x100;

/// Where the buffer is among the device's own addresses.
const BUFFER_START: u64 = 0x4_0000;
const BUFFER_SIZE: usize = 4096;

/// What register 0xA8 says of the last DMA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
enum Outcome {
    /// All of it was done.
    Done = 0,
    /// The IOMMU refused the request at the address in register 0xB0; those before are done.
    Refused = 1,
    /// It does not lie in the buffer.
    OutOfBuffer = 2,
    /// The function may not make requests: bus mastering is off.
    NotBusMaster = 3,
    /// The memory could not be reached although the IOMMU leads there: its file was truncated.
    NoMemory = 4,
}

/// The device.
#[derive(Debug)]
pub struct Edu {
    port: DmaPort,
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
}

impl Edu {
    /// A device whose DMA enters the IOMMU at `port`.
    pub fn new(port: DmaPort) -> Self {
        Self {
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
        }
    }

    /// Reads a register of BAR 0. What is none, or accessed in a width it does not have, is all ones.
    pub fn read(&self, offset: u64, width: usize) -> u64 {
        let value = match offset {
            IDENTIFICATION => 0x0100_00ed,
            LIVENESS => u64::from(self.liveness),
            FACTORIAL => u64::from(self.factorial),
            // A factorial is there as soon as it is asked for.
            STATUS => 0,
            INTERRUPT_STATUS => u64::from(self.interrupt_status),
            DMA_SOURCE => self.source,
            DMA_DESTINATION => self.destination,
            DMA_COUNT => self.count,
            DMA_COMMAND => 0,
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

    /// Writes a register. `bus_master`: the function may make requests. Says whether an interrupt is
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
            DMA_SOURCE => self.source = value,
            DMA_DESTINATION => self.destination = value,
            DMA_COUNT => self.count = value,
            DMA_PASID => self.pasid = value & (PASID_VALID | PASID_MASK),
            DMA_COMMAND if value & COMMAND_START != 0 => {
                self.refused_at = 0;
                let to_memory = value & COMMAND_TO_MEMORY != 0;
                self.outcome =
                    if bus_master { self.transfer(to_memory) } else { Outcome::NotBusMaster };
                if value & COMMAND_INTERRUPT != 0 {
                    self.interrupt_status |= CAUSE_DMA;
                    return true;
                }
            }
            _ => {}
        }
        false
    }

    fn transfer(&mut self, to_memory: bool) -> Outcome {
        let (device, memory) = match to_memory {
            true => (self.source, self.destination),
            false => (self.destination, self.source),
        };
        let Some(mut buffer) =
            buffer_range(device, self.count).and_then(|range| self.buffer.get_mut(range))
        else {
            return Outcome::OutOfBuffer;
        };
        let pasid = (self.pasid & PASID_VALID != 0).then_some((self.pasid & PASID_MASK) as u32);
        let attributes = DmaAttributes { pasid, ..DmaAttributes::default() };
        let access = if to_memory { DmaAccess::Write } else { DmaAccess::Read };
        let mut iova = memory;
        while !buffer.is_empty() {
            let Ok(piece) = self.port.translate(attributes, iova, buffer.len(), access) else {
                self.refused_at = iova;
                return Outcome::Refused;
            };
            let slice = piece.slice();
            let (part, rest) = buffer.split_at_mut(slice.len());
            if part.is_empty() || !copy(&slice, part, to_memory) {
                self.refused_at = iova;
                return Outcome::NoMemory;
            }
            // Cannot go past the end of the address space: the IOMMU refuses what is there.
            iova = iova.wrapping_add(part.len() as u64);
            buffer = rest;
        }
        Outcome::Done
    }
}

/// Copies between `memory` and `part`, which is as long. The kernel does it, and does not mind when
/// there is no memory any more.
fn copy(memory: &vm_memory::VolatileSlice<'_>, part: &mut [u8], to_memory: bool) -> bool {
    let guard = memory.ptr_guard_mut();
    let address = guard.as_ptr() as u64;
    let done = if to_memory {
        Process::own().write_some(address, part)
    } else {
        sys::read_memory(sys::process_id(), address, part).unwrap_or(0)
    };
    done == part.len()
}

fn has_width(offset: u64, width: usize) -> bool {
    width == 4 || (width == 8 && offset >= WIDE_START)
}

/// The bytes of the buffer that `count` bytes from device address `address` on are.
fn buffer_range(address: u64, count: u64) -> Option<Range<usize>> {
    let start = address.checked_sub(BUFFER_START)?;
    let end = start.checked_add(count)?;
    (end <= BUFFER_SIZE as u64).then_some(start as usize..end as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use twostage::emulated::{DeviceConfig, EmulatedHost, VtdUnit, VtdUnitConfig};
    use twostage::iommufd::{HostIommu, MapTarget, Protection, UserMemory};
    use twostage::spec::pci::Bdf;
    use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress};

    fn edu() -> (Edu, Arc<GuestRegionMmap>, Arc<EmulatedHost>) {
        let host = EmulatedHost::new();
        let unit = host.add_unit(VtdUnit::new(VtdUnitConfig::default()));
        let rid = Bdf::new(0, 4, 0).unwrap();
        host.add_device("edu", unit, rid, DeviceConfig::default()).unwrap();
        let (dev, ioas) = (host.device_bind("edu").unwrap(), host.ioas_alloc().unwrap());
        let region = GuestRegionMmap::from_range(GuestAddress(0), 0x2000, None).unwrap();
        let region = Arc::new(region);
        let memory = UserMemory::whole(region.clone());
        let target = MapTarget::Fixed(0x1_0000);
        host.ioas_map(ioas, &memory, target, Protection::READ_WRITE).unwrap();
        host.device_attach(dev, None, ioas).unwrap();
        (Edu::new(host.dma_port("edu").unwrap()), region, host)
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
