// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Configuration space through two ports (PCI 3.0 §3.2.2.3.2): address at 0xCF8, data at 0xCFC.

use std::sync::Arc;
use twostage::sync::Mutex;

use bitfield_struct::bitfield;

use crate::bus::BusDevice;
use crate::pci::PciBus;
use twostage::spec::pci::Bdf;

/// CONFIG_ADDRESS.
#[bitfield(u32)]
struct Address {
    /// Always zero; the low bits of the data port select the byte.
    #[bits(2)]
    __: u8,
    #[bits(6)]
    register: u16,
    bdf: u16,
    #[bits(7)]
    __: u8,
    enable: bool,
}

/// Ports 0xCF8 to 0xCFF.
#[derive(Debug)]
pub struct ConfigPorts {
    bus: Arc<PciBus>,
    address: Mutex<Address>,
}

/// The data port, from the first of the ports.
const DATA: u64 = 4;

impl ConfigPorts {
    /// First I/O port.
    pub const FIRST_PORT: u64 = 0xcf8;
    /// Last I/O port.
    pub const LAST_PORT: u64 = 0xcff;

    /// Ports to access `bus`.
    pub fn new(bus: Arc<PciBus>) -> Self {
        Self { bus, address: Mutex::new(Address::new()) }
    }

    fn address(&self) -> std::sync::MutexGuard<'_, Address> {
        self.address.lock()
    }

    /// Function and register of an access to the data port, if the address is enabled.
    fn target(&self, offset: u64) -> Option<(Bdf, u16)> {
        let address = *self.address();
        let byte = offset.checked_sub(DATA)?;
        // Four data ports.
        address
            .enable()
            .then(|| (Bdf::from_raw(address.bdf()), (address.register() << 2) + byte as u16))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((bdf, register)) = self.target(offset) {
            self.bus.read_config(bdf, register, data);
        } else if let (0, Ok(bytes)) = (offset, <&mut [u8; 4]>::try_from(data)) {
            *bytes = self.address().into_bits().to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((bdf, register)) = self.target(offset) {
            self.bus.write_config(bdf, register, data);
        } else if let (0, Ok(bytes)) = (offset, <[u8; 4]>::try_from(data)) {
            // Only a doubleword access is to the address register; smaller ones belong to other
            // devices.
            *self.address() = Address::from_bits(u32::from_le_bytes(bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::HostBridge;

    #[test]
    fn the_address_port_chooses_what_the_data_port_shows() {
        let mut bus = PciBus::default();
        bus.insert(Bdf::from_raw(0), Arc::new(HostBridge::new()));
        let ports = ConfigPorts::new(Arc::new(bus));
        let read = |offset| {
            let mut data = [0; 2];
            ports.read(offset, &mut data);
            u16::from_le_bytes(data)
        };
        assert_eq!(read(4), 0xffff);
        ports.write(0, &0x8000_0000u32.to_le_bytes());
        assert_eq!(read(4), 0x8086);
        assert_ne!(read(6), 0xffff);
        let mut address = [0; 4];
        ports.read(0, &mut address);
        assert_eq!(u32::from_le_bytes(address), 0x8000_0000);
        // A byte is not an address; a missing function reads as ones.
        ports.write(0, &[0]);
        assert_eq!(read(4), 0x8086);
        ports.write(0, &0x8000_0800u32.to_le_bytes());
        assert_eq!(read(4), 0xffff);
        ports.write(0, &0u32.to_le_bytes());
        assert_eq!(read(4), 0xffff);
    }
}
