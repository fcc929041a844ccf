// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! MSI of an assigned device (PCIe 6.0 §7.7.1): the guest's capability as vectors.

use super::vectors::Vectors;
use crate::pci::layout::MsiControl;
use crate::pci::ConfigSpace;
use twostage::viommu::MsiMessage;

/// Message control: per-vector masking.
const MASKABLE: u16 = 1 << 8;

/// The capability of a device, at `offset` of the guest's configuration space.
#[derive(Debug)]
pub struct Msi {
    /// Where it is.
    pub offset: u16,
    /// Its vectors.
    pub vectors: Vectors,
}

/// The guest's settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Setup {
    /// Number of vectors it may use; a power of two.
    count: usize,
    /// Of the first.
    message: MsiMessage,
    /// One bit for each masked vector.
    masked: u32,
}

impl Msi {
    /// Whether the guest has enabled it.
    pub fn is_enabled(&self, config: &ConfigSpace) -> bool {
        MsiControl::from_bits(config.u16(self.offset + 2)).enable()
    }

    /// Enables it, or applies what the guest wrote.
    pub fn enable(&self, config: &ConfigSpace) {
        let setup = self.setup(config);
        self.vectors.enable(setup.count);
        for (number, bit) in (0..setup.count).zip(0..u32::BITS) {
            // The low bits of the data are the vector's number (§7.7.1.4).
            let data = setup.message.data & !(setup.count as u32 - 1) | number as u32;
            let masked = setup.masked & 1 << bit != 0;
            let message = MsiMessage { data, ..setup.message };
            self.vectors.update(number, (!masked).then_some(message));
        }
    }

    /// Disables it.
    pub fn disable(&self) {
        for number in 0..32 {
            self.vectors.update(number, None);
        }
        self.vectors.disable();
    }

    /// Writes the pending bits into `config`.
    pub fn show_pending(&self, config: &mut ConfigSpace) {
        let control = config.u16(self.offset + 2);
        if control & MASKABLE == 0 {
            return;
        }
        let pending = (0..32).filter(|number| self.vectors.is_pending(*number));
        let bits = pending.fold(0, |bits, number| bits | 1 << number);
        config.set_u32(self.offset + self.masks(control) + 4, bits);
    }

    /// Offset of the masks from the start of the capability, if there are any.
    fn masks(&self, control: u16) -> u16 {
        if MsiControl::from_bits(control).address_64() {
            16
        } else {
            12
        }
    }

    fn setup(&self, config: &ConfigSpace) -> Setup {
        let bits = config.u16(self.offset + 2);
        let control = MsiControl::from_bits(bits);
        let (high, data) = match control.address_64() {
            true => (config.u32(self.offset + 8), config.u16(self.offset + 12)),
            false => (0, config.u16(self.offset + 8)),
        };
        let address = u64::from(high) << 32 | u64::from(config.u32(self.offset + 4));
        // The guest must not grant more than requested.
        let vectors = control.multiple_message_enable().min(control.multiple_message_capable());
        let masked = match bits & MASKABLE {
            0 => 0,
            _ => config.u32(self.offset + self.masks(bits)),
        };
        let message = MsiMessage { address, data: data.into() };
        Setup { count: 1 << vectors.min(5), message, masked }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::host_device::{Irq, IrqInfo};
    use super::super::testing::{FakeDevice, FakeVectors};
    use super::*;
    use crate::pci::layout::CONFIG_SIZE;

    /// A capability at 0x50 with `control`, and a message of 0x1_2345_6780 and data 0x4e.
    fn config(control: u16) -> ConfigSpace {
        let mut bytes = Box::new([0; CONFIG_SIZE]);
        bytes[0x52..0x54].copy_from_slice(&control.to_le_bytes());
        bytes[0x54..0x58].copy_from_slice(&0x2345_6780u32.to_le_bytes());
        let data = if control & 1 << 7 != 0 {
            bytes[0x58] = 1;
            0x5c
        } else {
            0x58
        };
        bytes[data] = 0x4e;
        ConfigSpace::of_image(bytes, Box::new([0; CONFIG_SIZE]))
    }

    fn msi() -> (Arc<FakeDevice>, Arc<FakeVectors>, Msi) {
        let (host, made) = (Arc::new(FakeDevice::default()), Arc::new(FakeVectors::default()));
        let info = IrqInfo { count: 8, fixed: true };
        let vectors = Vectors::new(host.clone(), Irq::Msi, info, 32, made.maker());
        (host, made, Msi { offset: 0x50, vectors })
    }

    #[test]
    fn one_vector_and_a_wide_address() {
        let (host, made, msi) = msi();
        let config = config(1 | 1 << 7);
        assert!(msi.is_enabled(&config));
        msi.enable(&config);
        assert_eq!(host.take_calls(), ["Msi 0: [off]", "Msi 0: [on]"]);
        assert_eq!(made.take_updates(), ["123456780/78"]);
        msi.enable(&config);
        assert!(host.take_calls().is_empty());
        msi.disable();
        assert_eq!(
            (host.take_calls(), made.take_updates().pop()),
            (vec!["Msi off".into()], Some("none".into()))
        );
    }

    #[test]
    fn several_vectors_differ_in_the_low_bits_of_the_data() {
        let (_, made, msi) = msi();
        // Four requested, eight granted: four.
        msi.enable(&config(1 | 2 << 1 | 3 << 4));
        assert_eq!(
            made.take_updates(),
            ["23456780/76", "23456780/77", "23456780/78", "23456780/79"]
        );
    }

    #[test]
    fn masked_vectors_have_no_message_and_say_that_they_are_pending() {
        let (_, made, msi) = msi();
        let mut config = config(1 | 1 << 1 | 1 << 4 | 1 << 8);
        msi.enable(&config);
        made.take_updates();
        config.set_u32(0x50 + 12, 2);
        msi.enable(&config);
        assert_eq!(made.take_updates().pop(), Some("none".into()));
        made.event(1).write(1).unwrap();
        msi.show_pending(&mut config);
        assert_eq!(config.u32(0x50 + 16), 2);
    }
}
