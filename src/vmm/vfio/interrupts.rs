// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The interrupts of an assigned device: its pin, MSI or MSI-X, according to the guest's
//! capabilities; VFIO has only one kind enabled at a time.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use twostage::sync::Mutex;

use super::config_image::MSI_MASKABLE;
use super::host_device::{HostDevice, Irq};
use super::vectors::Vectors;
use crate::pci::layout::MsiControl;
use crate::pci::{ConfigSpace, EventLine, Msix, MsixCapability, MsixControl};
use twostage::ratelimit::RateLimit;
use twostage::viommu::MsiMessage;

/// MSI-X of a device.
#[derive(Debug)]
pub struct DeviceMsix {
    /// The capability.
    pub capability: MsixCapability,
    /// The table and the pending bits that the guest sees.
    pub table: Msix,
    /// The destinations of the table's vectors.
    pub vectors: Arc<Vectors>,
}

/// The interrupts of one device: those that it has, one kind of which is enabled.
#[derive(Debug)]
pub struct DeviceInterrupts {
    /// The pin.
    pub intx: Option<Intx>,
    /// MSI.
    pub msi: Option<Msi>,
    /// MSI-X, which has precedence.
    pub msix: Option<DeviceMsix>,
    on: Mutex<Kind>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    None,
    Intx,
    Msi,
    Msix,
}

impl DeviceInterrupts {
    /// Interrupts, all disabled.
    pub fn new(intx: Option<Intx>, msi: Option<Msi>, msix: Option<DeviceMsix>) -> Self {
        Self { intx, msi, msix, on: Mutex::new(Kind::None) }
    }

    /// The guest may have written a capability in `config`.
    pub fn update(&self, config: &ConfigSpace) {
        let mut on = self.on.lock();
        let wanted = self.wanted(config);
        if *on != wanted {
            self.switch_off(*on);
        }
        match wanted {
            Kind::Msix => {
                if let Some(msix) = &self.msix {
                    msix.vectors.enable(msix.table.len());
                    msix.table.set_control(msix.capability.control(config));
                }
            }
            Kind::Msi => self.msi.iter().for_each(|msi| msi.enable(config)),
            Kind::Intx if *on != Kind::Intx => self.intx.iter().for_each(Intx::enable),
            Kind::Intx | Kind::None => {}
        }
        *on = wanted;
    }

    /// The function has been reset, and all of them are disabled: MSI-X has no messages, and every
    /// vector is masked.
    pub fn forget_messages(&self) {
        if let Some(msix) = &self.msix {
            msix.table.reset();
        }
    }

    /// Disables all of them.
    pub fn disable(&self) {
        let mut on = self.on.lock();
        self.switch_off(*on);
        *on = Kind::None;
    }

    fn wanted(&self, config: &ConfigSpace) -> Kind {
        if self.msix.as_ref().is_some_and(|msix| msix.capability.control(config).enable()) {
            Kind::Msix
        } else if self.msi.as_ref().is_some_and(|msi| msi.is_enabled(config)) {
            Kind::Msi
        } else if self.intx.is_some() {
            Kind::Intx
        } else {
            Kind::None
        }
    }

    fn switch_off(&self, kind: Kind) {
        match kind {
            Kind::Msix => {
                if let Some(msix) = &self.msix {
                    msix.table.set_control(MsixControl::new());
                    msix.vectors.disable();
                }
            }
            Kind::Msi => self.msi.iter().for_each(Msi::disable),
            Kind::Intx => self.intx.iter().for_each(Intx::disable),
            Kind::None => {}
        }
    }
}

/// INTx of a device: a level made of two eventfds.
///
/// VFIO writes the first when the device asserts its pin, and masks the pin. The line's owner
/// asserts the line, deasserts it at the guest's end of interrupt, and writes the second, which
/// unmasks the pin: if the device still asserts it, everything starts again.
pub struct Intx {
    host: Arc<dyn HostDevice>,
    line: Box<dyn EventLine>,
    complaints: RateLimit,
}

impl Intx {
    /// The pin of `host`, disabled, connected to `line`.
    pub fn new(host: Arc<dyn HostDevice>, line: Box<dyn EventLine>) -> Self {
        Self { host, line, complaints: RateLimit::default() }
    }

    /// Enables it.
    pub fn enable(&self) {
        let assert = [Some(self.line.assert_event())];
        let result = self
            .host
            .set_triggers(Irq::Intx, 0, &assert)
            .and_then(|()| self.host.set_intx_unmask(self.line.end_event()));
        if let Err(error) = result {
            self.complaints.warn(format_args!("INTx: switching on: {error}"));
        }
    }

    /// Disables it.
    pub fn disable(&self) {
        if let Err(error) = self.host.disable_irq(Irq::Intx) {
            self.complaints.warn(format_args!("INTx: switching off: {error}"));
        }
        self.line.release();
    }
}

impl fmt::Debug for Intx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Intx").field("host", &self.host).finish_non_exhaustive()
    }
}

/// MSI of a device (PCIe 6.0 §7.7.1): the guest's capability as vectors. It is at `offset` of the
/// guest's configuration space.
#[derive(Debug)]
pub struct Msi {
    /// Where it is.
    pub offset: u16,
    /// Its vectors.
    pub vectors: Vectors,
}

/// The guest's settings of MSI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct MsiSetup {
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

    /// Writes the pending bits into `config`, if any of the bytes `read` is of them.
    pub fn show_pending(&self, config: &mut ConfigSpace, read: &Range<u16>) {
        let control = config.u16(self.offset + 2);
        let at = self.offset + self.masks(control) + 4;
        if control & MSI_MASKABLE == 0 || read.end <= at || at + 4 <= read.start {
            return;
        }
        let pending = (0..32).filter(|number| self.vectors.is_pending(*number));
        let bits = pending.fold(0, |bits, number| bits | 1 << number);
        config.set_u32(at, bits);
    }

    /// Offset of the masks from the start of the capability, if there are any.
    fn masks(&self, control: u16) -> u16 {
        if MsiControl::from_bits(control).address_64() {
            16
        } else {
            12
        }
    }

    fn setup(&self, config: &ConfigSpace) -> MsiSetup {
        let bits = config.u16(self.offset + 2);
        let control = MsiControl::from_bits(bits);
        let (high, data) = match control.address_64() {
            true => (config.u32(self.offset + 8), config.u16(self.offset + 12)),
            false => (0, config.u16(self.offset + 8)),
        };
        let address = u64::from(high) << 32 | u64::from(config.u32(self.offset + 4));
        // The guest must not grant more than requested.
        let vectors = control.multiple_message_enable().min(control.multiple_message_capable());
        let masked = match bits & MSI_MASKABLE {
            0 => 0,
            _ => config.u32(self.offset + self.masks(bits)),
        };
        let message = MsiMessage { address, data: data.into() };
        MsiSetup { count: 1 << vectors.min(5), message, masked }
    }
}

#[cfg(test)]
mod tests {
    use super::super::host_device::IrqInfo;
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
        // Whoever reads any of their four bytes sees them, and nobody else asks for them.
        for (read, bits) in [(0x54..0x60, 0), (0x64..0x68, 0), (0x63..0x64, 2), (0x5e..0x62, 2)] {
            config.set_u32(0x50 + 16, 0);
            msi.show_pending(&mut config, &read);
            assert_eq!(config.u32(0x50 + 16), bits, "{read:x?}");
        }
    }
}
