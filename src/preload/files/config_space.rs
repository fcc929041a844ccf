// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configuration space of a device after reset (PCIe 6.0 §7.5, §7.7), and its BARs.
//!
//! A conventional function has MSI and BAR 0. One of PCI Express has MSI-X, too, with the table and
//! the pending bits in a BAR of their own; a BAR of memory, which can be mapped; and function-level
//! reset.

use twostage_emulated::edu;

/// What a function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A conventional PCI function.
    Conventional,
    /// A PCI Express function of the root bus, where nothing else can be.
    Integrated,
    /// A PCI Express function of another bus: there is a port above it.
    Endpoint,
}

/// The numbers of BARs.
pub const BARS: usize = 6;
/// BAR 0 has the registers, if there is an engine.
pub const REGISTERS: u32 = 0;
/// BAR 1 has MSI-X.
pub const MESSAGES: u32 = 1;
/// BAR 2 has memory.
pub const MEMORY: u32 = 2;
const MESSAGES_SIZE: u64 = 0x1000;
/// Length of the table at the start of BAR 1, in bytes.
pub const TABLE_SIZE: u64 = 16 * edu::VECTORS as u64;
/// Offset of the pending bits in it.
const PENDING_BITS: u32 = 0x800;

const CONVENTIONAL_SIZE: usize = 256;
const EXPRESS_SIZE: usize = 4096;

/// The writable bits of the command register's bytes: memory space and bus master; the pin is not
/// asserted.
pub const COMMAND: usize = 0x04;
pub const COMMAND_BITS: u8 = 0b110;
pub const MEMORY_SPACE: u8 = 0b10;
pub const BUS_MASTER: u8 = 0b100;
pub const INTERRUPT_DISABLE: u8 = 1 << 2;
/// Status: an interrupt is pending.
pub const STATUS: usize = 0x06;
pub const STATUS_INTERRUPT: u8 = 1 << 3;
/// It answers at once after a reset.
const STATUS_READINESS: u8 = 1;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CAPABILITIES_POINTER: usize = 0x34;
/// 1: INTA.
const INTERRUPT_PIN: usize = 0x3d;

const MSI: usize = 0x40;
const MSIX: usize = 0x50;
const EXPRESS: usize = 0x60;
/// Where extended capabilities start.
const EXTENDED: usize = 0x100;
/// The upper byte of device control, and its bit that resets the function.
pub const DEVICE_CONTROL: usize = EXPRESS + 9;
pub const INITIATE_RESET: u8 = 1 << 7;

/// The services of a PCI Express function, each an extended capability (§7.8.9, §10.5). Linux's
/// IOMMU driver has enabled what does not depend on an attachment; user space cannot change them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Services {
    /// Width of PASIDs, in bits; 0 for none.
    pub pasid_bits: u8,
    /// A device TLB.
    pub ats: bool,
    /// Page requests.
    pub pri: bool,
}

impl Services {
    /// As vfio-pci shows them: it hides PASID.
    pub fn of_vfio(self) -> Self {
        Self { pasid_bits: 0, ..self }
    }

    /// The capabilities, by their IDs.
    fn capabilities(self) -> impl Iterator<Item = (u8, Vec<u8>)> {
        // The width, enabled. Page-aligned, global invalidations, enabled. Stopped, responses have
        // PASIDs; one request.
        let pasid = (self.pasid_bits > 0).then(|| (0x1b, vec![0, self.pasid_bits, 1, 0]));
        let ats = self.ats.then(|| (0x0f, vec![0x60, 0, 0, 1 << 7]));
        let pri = self.pri.then(|| (0x13, vec![0, 0, 0, 0x81, 1, 0, 0, 0, 0, 0, 0, 0]));
        [ats, pri, pasid].into_iter().flatten()
    }
}

impl Kind {
    /// Whether it is of PCI Express.
    pub fn is_express(self) -> bool {
        self != Self::Conventional
    }

    /// The lengths of its BARs, in bytes; 0 for none.
    pub fn bars(self, has_engine: bool) -> [u64; BARS] {
        let registers = if has_engine { edu::BAR_SIZE.into() } else { 0 };
        match self.is_express() {
            true => [registers, MESSAGES_SIZE, edu::MEMORY_SIZE as u64, 0, 0, 0],
            false => [registers, 0, 0, 0, 0, 0],
        }
    }

    /// Its configuration space after reset, with the capabilities of `services`: all of it.
    pub fn config_space(self, services: Services) -> Vec<u8> {
        let size = if self.is_express() { EXPRESS_SIZE } else { CONVENTIONAL_SIZE };
        let mut space = vec![0; size];
        let mut put = |offset: usize, bytes: &[u8]| {
            let places = space.iter_mut().skip(offset);
            places.zip(bytes).for_each(|(to, from)| *to = *from);
        };
        // Vendor and device, command and status, revision and class.
        put(0, &[0x34, 0x12, 0xe8, 0x11, 0, 0, STATUS_CAPABILITIES, 0, 0x10, 0, 0xff, 0]);
        put(CAPABILITIES_POINTER, &[MSI as u8]);
        put(INTERRUPT_PIN, &[1]);
        // MSI (§7.7.1): one vector, a 64-bit address. The message itself is up to the host.
        put(MSI, &[5, 0, 1 << 7]);
        let express = match self {
            Self::Conventional => return space,
            Self::Integrated => 0x92,
            Self::Endpoint => 0x02,
        };
        put(STATUS, &[STATUS_CAPABILITIES | STATUS_READINESS]);
        put(MSI + 1, &[MSIX as u8]);
        // MSI-X (§7.7.2): the number of vectors less one; both structures in BAR 1.
        put(MSIX, &[0x11, EXPRESS as u8, edu::VECTORS as u8 - 1]);
        put(MSIX + 4, &MESSAGES.to_le_bytes());
        put(MSIX + 8, &(PENDING_BITS | MESSAGES).to_le_bytes());
        // PCI Express (§7.5.3): version 2, and the type.
        put(EXPRESS, &[0x10, 0, express]);
        // Role-based errors, function-level reset; the prefixes of requests with a PASID.
        put(EXPRESS + 4, &(1u32 << 15 | 1 << 28).to_le_bytes());
        put(EXPRESS + 0x24, &(1u32 << 21).to_le_bytes());
        if self == Self::Endpoint {
            // The link: one lane, 2.5 GT/s, as it can and as it is.
            put(EXPRESS + 0x0c, &[0x11]);
            put(EXPRESS + 0x12, &[0x11]);
        }
        let (mut at, mut last) = (EXTENDED, None);
        for (id, body) in services.capabilities() {
            // The place of the next one is in the upper 12 bits of a header.
            if let Some((last, id)) = last {
                put(last, &(u32::from(id) | 1 << 16 | (at as u32) << 20).to_le_bytes());
            }
            put(at, &[id, 0, 1, 0]);
            put(at + 4, &body);
            last = Some((at, id));
            at += 4 + body.len();
        }
        space
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The capabilities of `space`, by ID and offset.
    fn capabilities(space: &[u8]) -> Vec<(u8, usize)> {
        let next = |offset: u8| Some(offset).filter(|offset| *offset != 0);
        let offsets = std::iter::successors(next(space[CAPABILITIES_POINTER]), |offset| {
            next(space[usize::from(*offset) + 1])
        });
        offsets.map(|offset| (space[usize::from(offset)], usize::from(offset))).collect()
    }

    #[test]
    fn what_each_kind_has() {
        let [conventional, integrated, endpoint] =
            [Kind::Conventional, Kind::Integrated, Kind::Endpoint]
                .map(|kind| kind.config_space(Services::default()));
        assert_eq!((conventional.len(), integrated.len(), endpoint.len()), (256, 4096, 4096));
        assert_eq!(capabilities(&conventional), [(5, MSI)]);
        for space in [&integrated, &endpoint] {
            assert_eq!(capabilities(space), [(5, MSI), (0x11, MSIX), (0x10, EXPRESS)]);
        }
        assert_eq!([integrated[EXPRESS + 2], endpoint[EXPRESS + 2]], [0x92, 2]);
        assert_eq!(integrated[EXPRESS + 4..EXPRESS + 8], 0x1000_8000u32.to_le_bytes());
        assert_eq!(integrated[MSIX + 2..MSIX + 12], [3, 0, 1, 0, 0, 0, 1, 8, 0, 0]);
    }

    #[test]
    fn services_are_extended_capabilities() {
        let all = Services { pasid_bits: 20, ats: true, pri: true };
        let words = |services: Services, ats: [usize; 8]| {
            let space = Kind::Integrated.config_space(services);
            ats.map(|at| u32::from_le_bytes(space[at..at + 4].try_into().unwrap()))
        };
        let places = [0x100, 0x104, 0x108, 0x10c, 0x110, 0x118, 0x11c, 0x120];
        let common = [0x1081_000f, 0x8000_0060];
        let pasid = [0x0001_001b, 0x0001_1400];
        assert_eq!(
            words(all, places),
            [common[0], common[1], 0x1181_0013, 0x8100_0000, 1, pasid[0], pasid[1], 0]
        );
        let shown = words(all.of_vfio(), places);
        assert_eq!(shown, [common[0], common[1], 0x0001_0013, 0x8100_0000, 1, 0, 0, 0]);
        assert_eq!(words(Services::default(), places), [0; 8]);
        assert_eq!(Kind::Conventional.config_space(all).len(), CONVENTIONAL_SIZE);
    }

    #[test]
    fn structures_are_within_their_bar() {
        let [registers, messages, memory, ..] = Kind::Integrated.bars(true);
        assert!(TABLE_SIZE <= PENDING_BITS.into() && u64::from(PENDING_BITS) < messages);
        assert!([registers, messages, memory].iter().all(|size| size.is_power_of_two()));
        assert_eq!(Kind::Conventional.bars(false), [0; BARS]);
    }
}
