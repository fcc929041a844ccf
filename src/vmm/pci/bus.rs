// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Bus 0: its functions, the places of their BARs, the windows for accesses, and the host bridge.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use twostage::sync::{Mutex, RwLock};

use super::layout::CONFIG_SIZE;
use super::{BarPlacement, ConfigSpace, Identity};
use crate::arch::layout::{PCI_MMIO_LAST, PCI_MMIO_START};
use crate::bus::BusDevice;
use twostage::spec::pci::Bdf;

/// A PCI function. Any vCPU thread may call it at any time.
pub trait PciFunction: Send + Sync {
    /// Its configuration space.
    fn config(&self) -> &Mutex<ConfigSpace>;

    /// Called before software reads `length` bytes at `offset` of configuration space, which is not
    /// locked.
    fn config_reading(&self, _offset: u16, _length: usize) {}

    /// Called after software wrote `length` bytes at `offset` of configuration space, which is not
    /// locked. Returns whether it reset the function, and BARs with it.
    fn config_written(&self, _offset: u16, _length: usize) -> bool {
        false
    }

    /// Software reads `data.len()` bytes at `offset` of memory BAR `bar`.
    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]);

    /// Software writes `data` at `offset` of memory BAR `bar`.
    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]);
}

/// A BAR of a function on the bus.
struct Decoder {
    placement: BarPlacement,
    function: Arc<dyn PciFunction>,
}

/// The root bus. Functions are added while the machine is built.
#[derive(Default)]
pub struct PciBus {
    functions: BTreeMap<Bdf, Arc<dyn PciFunction>>,
    /// Every decoding BAR, according to configuration space.
    decoders: RwLock<Vec<Decoder>>,
}

impl PciBus {
    /// Adds `function` at `bdf`, replacing what was there.
    pub fn insert(&mut self, bdf: Bdf, function: Arc<dyn PciFunction>) {
        self.functions.insert(bdf, function);
        self.update_decoders();
    }

    /// The function at `bdf`.
    #[cfg(test)]
    pub(crate) fn function(&self, bdf: Bdf) -> Option<Arc<dyn PciFunction>> {
        self.functions.get(&bdf).cloned()
    }

    /// Software reads configuration space; a missing function reads as ones.
    pub fn read_config(&self, bdf: Bdf, offset: u16, data: &mut [u8]) {
        match self.functions.get(&bdf) {
            Some(function) => {
                function.config_reading(offset, data.len());
                lock(function.config()).read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// Software writes configuration space.
    pub fn write_config(&self, bdf: Bdf, offset: u16, data: &[u8]) {
        let Some(function) = self.functions.get(&bdf) else { return };
        let moved = {
            let mut config = lock(function.config());
            let before = config.bar_placements();
            config.write(offset, data);
            config.bar_placements() != before
        };
        if moved {
            self.update_decoders();
        }
        if function.config_written(offset, data.len()) {
            self.update_decoders();
        }
    }

    /// Updates the decoders. BARs outside of the PCI memory window do not decode.
    fn update_decoders(&self) {
        // Held throughout, so that of two concurrent updates the later sees the newer BARs.
        let mut decoders = self.decoders.write();
        decoders.clear();
        for function in self.functions.values() {
            let placements = lock(function.config()).bar_placements();
            decoders.extend(
                placements
                    .into_iter()
                    .filter(|bar| bar.start >= PCI_MMIO_START && bar.last <= PCI_MMIO_LAST)
                    .map(|placement| Decoder { placement, function: function.clone() }),
            );
        }
    }

    /// The function whose BAR contains all of an access, the BAR and the offset in it.
    fn decode(&self, address: u64, length: usize) -> Option<(Arc<dyn PciFunction>, usize, u64)> {
        let decoders = self.decoders.read();
        decoders.iter().find_map(|decoder| {
            let offset = decoder.placement.offset(address, length)?;
            Some((decoder.function.clone(), decoder.placement.index, offset))
        })
    }
}

impl fmt::Debug for PciBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.functions.keys()).finish()
    }
}

fn lock(config: &Mutex<ConfigSpace>) -> std::sync::MutexGuard<'_, ConfigSpace> {
    config.lock()
}

/// The PCI memory window, from [`PCI_MMIO_START`] on.
#[derive(Debug)]
pub struct PciMemory(pub Arc<PciBus>);

impl BusDevice for PciMemory {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.0.decode(PCI_MMIO_START + offset, data.len()) {
            Some((function, bar, offset)) => function.read_bar(bar, offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((function, bar, offset)) = self.0.decode(PCI_MMIO_START + offset, data.len()) {
            function.write_bar(bar, offset, data);
        }
    }
}

/// Configuration space as memory: 4 KiB a function (ECAM, §7.2.2).
#[derive(Debug)]
pub struct Ecam(pub Arc<PciBus>);

/// The function and the register at `offset` of the window.
fn ecam_target(offset: u64) -> (Bdf, u16) {
    // At most 256 buses of 1 MiB: bits 27:12 are the function, so both casts are lossless.
    let bdf = Bdf::from_raw((offset / CONFIG_SIZE as u64) as u16);
    (bdf, (offset % CONFIG_SIZE as u64) as u16)
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (bdf, register) = ecam_target(offset);
        self.0.read_config(bdf, register, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (bdf, register) = ecam_target(offset);
        self.0.write_config(bdf, register, data);
    }
}

/// An Intel virtual PCI Express host bridge.
const HOST_BRIDGE: Identity =
    Identity { vendor: 0x8086, device: 0x0d57, class: 0x06_0000, revision: 0 };

/// The host bridge, 00:00.0, without any function.
#[derive(Debug)]
pub struct HostBridge {
    config: Mutex<ConfigSpace>,
}

impl HostBridge {
    /// A host bridge.
    pub fn new() -> Self {
        Self { config: Mutex::new(ConfigSpace::new(HOST_BRIDGE)) }
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl PciFunction for HostBridge {
    fn config(&self) -> &Mutex<ConfigSpace> {
        &self.config
    }

    fn read_bar(&self, _bar: usize, _offset: u64, data: &mut [u8]) {
        // It has no BAR.
        data.fill(0xff);
    }

    fn write_bar(&self, _bar: usize, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::ExpressCapability;

    struct Echo(Mutex<ConfigSpace>, ExpressCapability);

    impl PciFunction for Echo {
        fn config(&self) -> &Mutex<ConfigSpace> {
            &self.0
        }

        fn config_written(&self, _: u16, _: usize) -> bool {
            let mut config = self.0.lock();
            let reset = self.1.reset_initiated(&config);
            if reset {
                config.reset();
            }
            reset
        }

        fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]) {
            data.fill(bar as u8 | offset as u8);
        }

        fn write_bar(&self, _: usize, _: u64, _: &[u8]) {}
    }

    fn bus() -> Arc<PciBus> {
        let identity = Identity { vendor: 0x1234, device: 0x5678, class: 0, revision: 0 };
        let mut config = ConfigSpace::new(identity);
        config.add_bar(1, 0x1000, PCI_MMIO_START as u32);
        let express = ExpressCapability::add(&mut config);
        let mut bus = PciBus::default();
        bus.insert(Bdf::new(0, 3, 0).unwrap(), Arc::new(Echo(Mutex::new(config), express)));
        Arc::new(bus)
    }

    fn read(memory: &PciMemory, offset: u64) -> u8 {
        let mut byte = [0];
        memory.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn a_bar_answers_where_software_put_it() {
        let bus = bus();
        let bdf = Bdf::new(0, 3, 0).unwrap();
        let memory = PciMemory(bus.clone());
        assert_eq!(read(&memory, 0x10), 0x11, "from the start");
        bus.write_config(bdf, 4, &[0, 0]);
        assert_eq!(read(&memory, 0x10), 0xff);
        bus.write_config(bdf, 4, &[2, 0]);
        assert_eq!(read(&memory, 0x10), 0x11);
        bus.write_config(bdf, 0x14, &0xe100_0000u32.to_le_bytes());
        assert_eq!(read(&memory, 0x10), 0xff);
        assert_eq!(read(&memory, 0x100_0010), 0x11);
        // Outside of the window nothing decodes: RAM and the IOMMU's registers cannot be covered.
        bus.write_config(bdf, 0x14, &0x0010_0000u32.to_le_bytes());
        assert_eq!(read(&memory, 0x100_0010), 0xff);
        assert!(bus.decode(0x10_0000, 4).is_none());
    }

    #[test]
    fn a_bar_does_not_answer_after_a_reset_until_software_places_it() {
        let bus = bus();
        let bdf = Bdf::new(0, 3, 0).unwrap();
        let memory = PciMemory(bus.clone());
        bus.write_config(bdf, 0x48, &[0, 0x80]);
        assert_eq!(read(&memory, 0x10), 0xff);
        bus.write_config(bdf, 4, &[2, 0]);
        assert_eq!(read(&memory, 0x10), 0xff, "it is at address 0");
        bus.write_config(bdf, 0x14, &(PCI_MMIO_START as u32).to_le_bytes());
        assert_eq!(read(&memory, 0x10), 0x11);
    }

    #[test]
    fn a_function_that_is_not_there_reads_as_ones() {
        let bus = bus();
        let mut data = [0; 4];
        bus.read_config(Bdf::new(0, 3, 0).unwrap(), 0, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x5678_1234);
        bus.read_config(Bdf::new(0, 3, 1).unwrap(), 0, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.write_config(Bdf::new(1, 3, 0).unwrap(), 4, &[2, 0]);
    }

    #[test]
    fn the_address_names_function_and_register() {
        assert_eq!(ecam_target(0x0000_8104), (Bdf::new(0, 1, 0).unwrap(), 0x104));
        assert_eq!(ecam_target(0x0fff_fffc), (Bdf::new(0xff, 0x1f, 7).unwrap(), 0xffc));
    }
}
