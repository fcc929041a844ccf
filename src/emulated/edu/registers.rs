// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The registers.

use super::dma::Transfer;
use twostage::spec::pci::Pasid;

/// Identification, read-only: 0xRRrr00ed, of major version RR and minor version rr.
pub const ID: u64 = 0x00;
/// Reads as the inverse of what was written.
pub const LIVENESS: u64 = 0x04;
/// Reads as the factorial of what was written.
pub const FACTORIAL: u64 = 0x08;
/// [`STATUS_INTERRUPT`].
pub const STATUS: u64 = 0x20;
/// The causes of the interrupt, read-only.
pub const INTERRUPT_STATUS: u64 = 0x24;
/// Adds causes.
pub const INTERRUPT_RAISE: u64 = 0x60;
/// Clears causes.
pub const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
/// The address that a DMA reads: of memory, or of the buffer.
pub const DMA_SOURCE: u64 = 0x80;
/// The address that a DMA writes.
pub const DMA_DESTINATION: u64 = 0x88;
/// Length of a DMA, in bytes.
pub const DMA_COUNT: u64 = 0x90;
/// [`COMMAND_START`] and the other bits.
pub const DMA_COMMAND: u64 = 0x98;
/// Twostage's: the PASID of DMA.
pub const DMA_PASID: u64 = 0xa0;

/// Status: interrupt after a factorial.
pub const STATUS_INTERRUPT: u32 = 0x80;
/// Command: start; reads as 1 until the transfer is over.
pub const COMMAND_START: u64 = 1 << 0;
/// Command: from the device to memory.
pub const COMMAND_TO_MEMORY: u64 = 1 << 1;
/// Command: interrupt at the end.
pub const COMMAND_INTERRUPT: u64 = 1 << 2;
/// PASID register: the DMA carries the PASID.
pub const PASID_VALID: u32 = 1 << 31;
/// Interrupt cause: factorial done.
pub const CAUSE_FACTORIAL: u32 = 0x001;
/// Interrupt cause: transfer done.
pub const CAUSE_DMA: u32 = 0x100;

const IDENTIFICATION: u32 = 0x0100_00ed;
const COMMAND_BITS: u64 = COMMAND_START | COMMAND_TO_MEMORY | COMMAND_INTERRUPT;
const PASID_BITS: u32 = PASID_VALID | ((1 << Pasid::BITS) - 1);
/// Registers below this offset take 4-byte accesses only, others also 8-byte ones.
const WIDE_START: u64 = 0x80;
/// From this number on a factorial is a multiple of 2^32.
const FACTORIAL_ZERO: u32 = 34;

/// The register state that software sees.
#[derive(Debug, Clone, Default)]
pub struct Registers {
    liveness: u32,
    factorial: u32,
    status: u32,
    interrupt_status: u32,
    source: u64,
    destination: u64,
    count: u64,
    command: u64,
    pasid: u32,
}

/// What a register access causes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// The interrupt may have changed.
    Interrupt {
        /// Some were pending when causes were written: an MSI is to be sent.
        raised: bool,
        /// Those written: with MSI-X, the messages of their [`vectors`](super::vectors).
        causes: u32,
    },
    /// A transfer starts.
    Transfer(Transfer),
}

impl Registers {
    /// Software reads `size` bytes at `offset`; unknown registers and unsupported accesses read as
    /// ones. `pasid`: the PASID register exists.
    pub fn read(&self, offset: u64, size: usize, pasid: bool) -> u64 {
        if !access_fits(offset, size) {
            return u64::MAX;
        }
        match offset {
            ID => IDENTIFICATION.into(),
            LIVENESS => self.liveness.into(),
            FACTORIAL => self.factorial.into(),
            STATUS => self.status.into(),
            INTERRUPT_STATUS => self.interrupt_status.into(),
            DMA_SOURCE => self.source,
            DMA_DESTINATION => self.destination,
            DMA_COUNT => self.count,
            DMA_COMMAND => self.command,
            DMA_PASID if pasid => self.pasid.into(),
            DMA_PASID => 0,
            _ => u64::MAX,
        }
    }

    /// Software writes `size` bytes at `offset`.
    pub fn write(&mut self, offset: u64, size: usize, value: u64, pasid: bool) -> Effect {
        if !access_fits(offset, size) {
            return Effect::None;
        }
        let low = value as u32;
        match offset {
            LIVENESS => self.liveness = !low,
            FACTORIAL => {
                self.factorial = factorial(low);
                // Computed at once, so software never sees the "computing" bit.
                if self.status & STATUS_INTERRUPT != 0 {
                    return self.raise(CAUSE_FACTORIAL);
                }
            }
            STATUS => self.status = low & STATUS_INTERRUPT,
            INTERRUPT_RAISE => return self.raise(low),
            INTERRUPT_ACKNOWLEDGE => {
                self.interrupt_status &= !low;
                return Effect::Interrupt { raised: false, causes: 0 };
            }
            // Parameters of a running transfer cannot be changed.
            _ if self.command & COMMAND_START != 0 => {}
            DMA_SOURCE => self.source = value,
            DMA_DESTINATION => self.destination = value,
            DMA_COUNT => self.count = value,
            DMA_COMMAND if value & COMMAND_START != 0 => {
                self.command = value & COMMAND_BITS;
                return Effect::Transfer(self.transfer(pasid));
            }
            DMA_PASID if pasid => self.pasid = low & PASID_BITS,
            _ => {}
        }
        Effect::None
    }

    /// The transfer has ended, successfully or not.
    pub fn transfer_ended(&mut self) -> Effect {
        self.command &= !COMMAND_START;
        if self.command & COMMAND_INTERRUPT != 0 {
            return self.raise(CAUSE_DMA);
        }
        Effect::None
    }

    /// Whether the device requests an interrupt.
    pub fn interrupt_pending(&self) -> bool {
        self.interrupt_status != 0
    }

    fn raise(&mut self, causes: u32) -> Effect {
        self.interrupt_status |= causes;
        Effect::Interrupt { raised: self.interrupt_pending(), causes }
    }

    fn transfer(&self, pasid_enabled: bool) -> Transfer {
        let pasid = Some(self.pasid)
            .filter(|register| pasid_enabled && register & PASID_VALID != 0)
            .and_then(|register| Pasid::new(register & !PASID_VALID));
        Transfer {
            source: self.source,
            destination: self.destination,
            count: self.count,
            to_memory: self.command & COMMAND_TO_MEMORY != 0,
            pasid,
            done: 0,
        }
    }
}

/// Whether the device supports an access: aligned, and of a size allowed at this offset.
fn access_fits(offset: u64, size: usize) -> bool {
    let sized = size == 4 || size == 8 && offset >= WIDE_START;
    sized && offset.is_multiple_of(size as u64)
}

/// `number!` modulo 2^32.
fn factorial(number: u32) -> u32 {
    if number >= FACTORIAL_ZERO {
        return 0;
    }
    (1..=number).fold(1, u32::wrapping_mul)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(registers: &mut Registers, offset: u64, value: u64) -> Effect {
        registers.write(offset, if offset < WIDE_START { 4 } else { 8 }, value, false)
    }

    #[test]
    fn it_is_alive_and_computes() {
        let mut registers = Registers::default();
        assert_eq!(registers.read(ID, 4, false), 0x0100_00ed);
        write(&mut registers, LIVENESS, 0x1234_5678);
        assert_eq!(registers.read(LIVENESS, 4, false), u64::from(!0x1234_5678u32));
        assert_eq!(write(&mut registers, FACTORIAL, 5), Effect::None);
        assert_eq!(registers.read(FACTORIAL, 4, false), 120);
        write(&mut registers, STATUS, 0xffff_ffff);
        assert_eq!(registers.read(STATUS, 4, false), 0x80);
        let raised = |causes| Effect::Interrupt { raised: true, causes };
        assert_eq!(write(&mut registers, FACTORIAL, 0), raised(CAUSE_FACTORIAL));
        assert_eq!(registers.read(FACTORIAL, 4, false), 1);
        assert_eq!(registers.read(INTERRUPT_STATUS, 4, false), 1);
    }

    #[test]
    fn large_factorials_vanish_modulo_2_32() {
        let naive = |number: u32| (1..=number).fold(1u32, u32::wrapping_mul);
        for number in 0..100 {
            assert_eq!(factorial(number), naive(number), "{number}!");
        }
        assert_ne!(naive(FACTORIAL_ZERO - 1), 0);
        assert_eq!(factorial(u32::MAX), 0);
    }

    #[test]
    fn access_sizes_are_as_documented() {
        let mut registers = Registers::default();
        for (offset, size) in [(ID, 1), (ID, 2), (ID, 8), (DMA_SOURCE, 2), (0x82, 4), (0x84, 8)] {
            assert_eq!(registers.read(offset, size, true), u64::MAX, "{size} at {offset:#x}");
        }
        registers.write(LIVENESS, 2, 0, false);
        registers.write(LIVENESS, 8, 0, false);
        assert_eq!(registers.read(LIVENESS, 4, false), 0);
        registers.write(DMA_SOURCE, 8, u64::MAX, false);
        assert_eq!(registers.read(DMA_SOURCE, 8, false), u64::MAX);
        registers.write(DMA_SOURCE, 4, 7, false);
        assert_eq!(registers.read(DMA_SOURCE, 8, false), 7);
        assert_eq!(registers.read(0x1000, 4, false), u64::MAX);
    }

    #[test]
    fn causes_add_up_until_acknowledged() {
        let mut registers = Registers::default();
        assert_eq!(
            write(&mut registers, INTERRUPT_RAISE, 0x12),
            Effect::Interrupt { raised: true, causes: 0x12 }
        );
        write(&mut registers, INTERRUPT_RAISE, 0x21);
        assert_eq!(registers.read(INTERRUPT_STATUS, 4, false), 0x33);
        write(&mut registers, INTERRUPT_ACKNOWLEDGE, 0x13);
        assert!(registers.interrupt_pending());
        write(&mut registers, INTERRUPT_ACKNOWLEDGE, 0x20);
        assert!(!registers.interrupt_pending());
        let nothing = Effect::Interrupt { raised: false, causes: 0 };
        assert_eq!(write(&mut registers, INTERRUPT_RAISE, 0), nothing);
    }

    #[test]
    fn a_transfer_is_busy_until_it_ends() {
        let mut registers = Registers::default();
        write(&mut registers, DMA_SOURCE, 0x1000);
        write(&mut registers, DMA_DESTINATION, 0x4_0000);
        write(&mut registers, DMA_COUNT, 16);
        // Without the start bit nothing happens.
        assert_eq!(write(&mut registers, DMA_COMMAND, COMMAND_TO_MEMORY), Effect::None);
        let transfer = Transfer {
            source: 0x1000,
            destination: 0x4_0000,
            count: 16,
            to_memory: false,
            pasid: None,
            done: 0,
        };
        let command = COMMAND_START | COMMAND_INTERRUPT;
        assert_eq!(write(&mut registers, DMA_COMMAND, command), Effect::Transfer(transfer));
        // Busy: neither changed nor started again.
        write(&mut registers, DMA_SOURCE, 0x2000);
        assert_eq!(write(&mut registers, DMA_COMMAND, command), Effect::None);
        assert_eq!(registers.read(DMA_SOURCE, 8, false), 0x1000);
        assert_eq!(registers.read(DMA_COMMAND, 8, false), command);
        let ended = Effect::Interrupt { raised: true, causes: CAUSE_DMA };
        assert_eq!(registers.transfer_ended(), ended);
        assert_eq!(registers.read(DMA_COMMAND, 8, false), COMMAND_INTERRUPT);
        assert_eq!(registers.read(INTERRUPT_STATUS, 4, false), 0x100);
    }

    #[test]
    fn the_pasid_register_hides_without_the_capability() {
        let mut registers = Registers::default();
        registers.write(DMA_PASID, 4, 0x8000_0007, false);
        assert_eq!(registers.read(DMA_PASID, 4, true), 0);
        registers.write(DMA_PASID, 4, 0xffff_ffff, true);
        assert_eq!(registers.read(DMA_PASID, 4, true), 0x800f_ffff);
        assert_eq!(registers.read(DMA_PASID, 4, false), 0);
        let pasid_of = |registers: &mut Registers, enabled| {
            let effect = registers.write(DMA_COMMAND, 8, COMMAND_START, enabled);
            registers.transfer_ended();
            match effect {
                Effect::Transfer(transfer) => transfer.pasid,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(pasid_of(&mut registers, true), Pasid::new(0xf_ffff));
        assert_eq!(pasid_of(&mut registers, false), None);
        registers.write(DMA_PASID, 4, 7, true);
        assert_eq!(pasid_of(&mut registers, true), None);
    }
}
