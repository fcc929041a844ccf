// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The buses: their functions, the places of their BARs, the windows for accesses, and the host
//! bridge.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::Arc;
use twostage::sync::{Mutex, RwLock};

use super::layout::{COMMAND, CONFIG_SIZE};
use super::{BarPlacement, Bridge, ConfigLender, ConfigSpace, Identity, PageLoan, PciFunction};
use crate::arch::layout::{PCI_MMIO_LAST, PCI_MMIO_START};
use crate::bus::BusDevice;
use twostage::spec::pci::Bdf;

/// A BAR of a function on the bus.
struct Decoder {
    placement: BarPlacement,
    function: Arc<dyn PciFunction>,
}

/// A function, and if it is a bridge, this.
type Routed<'a> = (&'a Arc<dyn PciFunction>, Option<&'a Arc<Bridge>>);

/// The functions on one bus.
#[derive(Default)]
struct Segment {
    /// By device and function number.
    functions: BTreeMap<u8, Arc<dyn PciFunction>>,
    /// Those of them that lead to other buses.
    bridges: BTreeMap<u8, Arc<Bridge>>,
}

/// The root bus, and those behind bridges. Functions are added while the machine is built.
#[derive(Default)]
pub struct PciBus {
    /// By the numbers that buses have at the start. Software may give them others.
    segments: BTreeMap<u8, Segment>,
    /// Every decoding BAR, according to configuration space.
    decoders: RwLock<Vec<Decoder>>,
    /// The functions on the root bus whose configuration space the guest has as memory.
    lent: Mutex<BTreeMap<u8, Box<dyn PageLoan>>>,
}

impl PciBus {
    /// Adds `function` at `bdf`, replacing what was there.
    pub fn insert(&mut self, bdf: Bdf, function: Arc<dyn PciFunction>) {
        self.segments.entry(bdf.bus()).or_default().functions.insert(bdf.devfn(), function);
        self.update_decoders();
    }

    /// Adds `bridge` at `bdf`, and the bus behind it.
    pub fn insert_bridge(&mut self, bdf: Bdf, bridge: Arc<Bridge>) {
        let segment = self.segments.entry(bdf.bus()).or_default();
        segment.bridges.insert(bdf.devfn(), bridge.clone());
        self.insert(bdf, bridge);
    }

    /// The function at `bdf`.
    #[cfg(test)]
    pub(crate) fn function(&self, bdf: Bdf) -> Option<Arc<dyn PciFunction>> {
        Some(self.route(bdf)?.0.clone())
    }

    /// Gives the guest the configuration space of the functions on the root bus as memory for
    /// reading, as far as it is; `ecam` is the address of that of 00:00.0. Behind bridges, numbers
    /// of buses may change, and requests go nowhere.
    ///
    /// # Errors
    /// The first error of a function, whose reads exit, as those of all after it.
    pub fn lend_config(&self, ecam: u64, lender: &dyn ConfigLender) -> io::Result<()> {
        let Some(root) = self.segments.get(&0) else { return Ok(()) };
        for (devfn, function) in root.functions.iter().filter(|(_, each)| each.config_is_memory()) {
            let page = lock(function.config()).show()?;
            let address = ecam + u64::from(*devfn) * CONFIG_SIZE as u64;
            self.lent.lock().insert(*devfn, lender.lend_config(address, page)?);
        }
        Ok(())
    }

    /// The function that configuration requests for `bdf` reach, as bridges are programmed.
    fn route(&self, bdf: Bdf) -> Option<Routed<'_>> {
        let (mut number, mut segment) = (0, self.segments.get(&0)?);
        // Each step is one further from the root.
        while number != bdf.bus() {
            let leads_there = |bridge: &&Arc<Bridge>| {
                let (first, last) = bridge.way().buses();
                (first..=last).contains(&bdf.bus())
            };
            let bridge = segment.bridges.values().find(leads_there)?;
            number = bridge.way().buses().0;
            segment = self.segments.get(&bridge.way().known_bus())?;
        }
        let function = segment.functions.get(&bdf.devfn())?;
        Some((function, segment.bridges.get(&bdf.devfn())))
    }

    /// Every function behind `bridge`, bridges before what is behind them.
    fn behind(&self, bridge: &Bridge) -> Vec<&Arc<dyn PciFunction>> {
        let Some(segment) = self.segments.get(&bridge.way().known_bus()) else { return Vec::new() };
        let deeper = segment.bridges.values().flat_map(|bridge| self.behind(bridge));
        segment.functions.values().chain(deeper).collect()
    }

    /// Software reads configuration space; a missing function reads as ones.
    pub fn read_config(&self, bdf: Bdf, offset: u16, data: &mut [u8]) {
        match self.route(bdf) {
            Some((function, _)) => {
                function.config_reading(offset, data.len());
                lock(function.config()).read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// Software writes configuration space.
    pub fn write_config(&self, bdf: Bdf, offset: u16, data: &[u8]) {
        let Some((function, bridge)) = self.route(bdf) else { return };
        let moved = {
            let mut config = lock(function.config());
            let before = config.bar_placements();
            config.write(offset, data);
            config.bar_placements() != before
        };
        if moved {
            self.update_decoders();
        }
        let reset = function.config_written(offset, data.len());
        if bdf.bus() == 0 && !function.config_is_memory() {
            self.lent.lock().remove(&bdf.devfn());
        }
        if reset {
            if let Some(bridge) = bridge {
                self.reprogrammed(bridge);
            }
            self.update_decoders();
        }
    }

    /// `bridge` is programmed in another way: tells the functions behind it, whose BARs and
    /// requests depend on it.
    pub fn reprogrammed(&self, bridge: &Bridge) {
        if bridge.take_reset() {
            self.behind(bridge).into_iter().for_each(|function| function.reset());
        }
        for function in self.behind(bridge) {
            function.config_written(COMMAND, size_of::<u16>());
        }
        self.update_decoders();
    }

    /// Updates the decoders. BARs outside of the PCI memory window do not decode.
    fn update_decoders(&self) {
        // Held throughout, so that of two concurrent updates the later sees the newer BARs.
        let mut decoders = self.decoders.write();
        decoders.clear();
        for function in self.segments.values().flat_map(|segment| segment.functions.values()) {
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
        let functions = self.segments.iter().flat_map(|(bus, segment)| {
            segment
                .functions
                .keys()
                .map(|devfn| Bdf::from_raw(u16::from(*bus) << 8 | *devfn as u16))
        });
        f.debug_set().entries(functions).finish()
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

    fn config_is_memory(&self) -> bool {
        true
    }

    fn reset(&self) {
        lock(&self.config).reset();
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
    use crate::pci::{BusNumbers, ExpressCapability};
    use twostage::viommu::bridges::BridgeKind;

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

        fn reset(&self) {
            self.0.lock().reset();
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

    /// A root port with a bridge to PCI behind it, and a function behind that, with a BAR.
    fn behind_bridges() -> (Arc<PciBus>, Arc<Bridge>) {
        let bdf = |bus: u8| Bdf::from_raw(u16::from(bus) << 8 | 3 << 3);
        let mut bus = PciBus::default();
        let numbers = BusNumbers { primary: 0, secondary: 1, subordinate: 2 };
        let port = Arc::new(Bridge::new("port", BridgeKind::Port, numbers, None));
        let numbers = BusNumbers { primary: 1, secondary: 2, subordinate: 2 };
        let up = Some(port.way().clone());
        let to_pci = Arc::new(Bridge::new("to_pci", BridgeKind::ExpressToPci, numbers, up));
        let identity = Identity { vendor: 0x1234, device: 0x5678, class: 0, revision: 0 };
        let mut config = ConfigSpace::new(identity);
        config.behind(Some(to_pci.way().clone()));
        config.add_bar(1, 0x1000, PCI_MMIO_START as u32);
        let express = ExpressCapability::add(&mut config);
        bus.insert_bridge(bdf(0), port.clone());
        bus.insert_bridge(Bdf::from_raw(0x100), to_pci.clone());
        bus.insert(bdf(2), Arc::new(Echo(Mutex::new(config), express)));
        for bridge in [&port, &to_pci] {
            bridge.open(&(PCI_MMIO_START..=PCI_MMIO_START + 0xf_ffff));
            bus.reprogrammed(bridge);
        }
        (Arc::new(bus), port)
    }

    fn id(bus: &PciBus, bdf: u16) -> u32 {
        let mut data = [0; 4];
        bus.read_config(Bdf::from_raw(bdf), 0, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn bridges_lead_to_the_buses_that_software_says() {
        let (bus, _) = behind_bridges();
        assert_eq!((id(&bus, 0x218), id(&bus, 0x118), id(&bus, 0x318)), (0x5678_1234, !0, !0));
        // Other numbers, from the root on.
        bus.write_config(Bdf::from_raw(0x18), 0x18, &[0, 5, 7]);
        assert_eq!((id(&bus, 0x100), id(&bus, 0x500)), (!0, 0x000e_1b36));
        assert_eq!((id(&bus, 0x218), id(&bus, 0x718)), (!0, !0));
        bus.write_config(Bdf::from_raw(0x500), 0x18, &[5, 7, 7]);
        assert_eq!((id(&bus, 0x218), id(&bus, 0x718)), (!0, 0x5678_1234));
        // Numbers that mean nothing, or those of the bus that the bridge is on.
        bus.write_config(Bdf::from_raw(0x500), 0x18, &[5, 5, 5]);
        bus.write_config(Bdf::from_raw(0x18), 0x18, &[0, 0, 255]);
        for number in [0, 0x18, 0x100, 0x500, 0x718, 0xffff] {
            id(&bus, number);
        }
        bus.write_config(Bdf::from_raw(0x18), 0x18, &[0, 1, 2]);
        bus.write_config(Bdf::from_raw(0x100), 0x18, &[1, 2, 2]);
        assert_eq!(id(&bus, 0x218), 0x5678_1234);
    }

    #[test]
    fn a_bar_answers_through_the_windows_of_all_bridges() {
        let (bus, _) = behind_bridges();
        let memory = PciMemory(bus.clone());
        for bridge in [0x18, 0x100].map(Bdf::from_raw) {
            assert_eq!(read(&memory, 0x10), 0x11);
            let window = (PCI_MMIO_START >> 16) as u16;
            bus.write_config(bridge, 0x20, &(window + 0x10).to_le_bytes());
            assert_eq!(read(&memory, 0x10), 0xff, "{bridge}");
            bus.write_config(bridge, 0x20, &window.to_le_bytes());
            assert_eq!(read(&memory, 0x10), 0x11);
            bus.write_config(bridge, 4, &[4, 0]);
            assert_eq!(read(&memory, 0x10), 0xff, "{bridge}");
            bus.write_config(bridge, 4, &[6, 0]);
        }
    }

    #[test]
    fn a_function_makes_requests_through_bridges_that_forward_them() {
        let (bus, _) = behind_bridges();
        let function = bus.function(Bdf::from_raw(0x218)).unwrap();
        let may_request = || function.config().lock().may_request();
        assert!(!may_request());
        bus.write_config(Bdf::from_raw(0x218), 4, &[6, 0]);
        assert!(may_request());
        bus.write_config(Bdf::from_raw(0x18), 4, &[2, 0]);
        assert!(!may_request());
    }

    #[test]
    fn a_reset_of_a_bus_resets_what_is_behind_it() {
        let (bus, port) = behind_bridges();
        bus.write_config(Bdf::from_raw(0x18), 0x3e, &[0x40, 0]);
        assert_eq!(read(&PciMemory(bus.clone()), 0x10), 0xff);
        let to_pci = bus.behind(&port)[0].config().lock().u32(0x18);
        assert_eq!(to_pci, 0, "it has forgotten its buses");
        assert_eq!(id(&bus, 0x218), !0);
        assert_eq!(port.way().buses(), (1, 2), "but the port has not");
    }
}
