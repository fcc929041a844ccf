// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The machine: two `edu`s, one behind two bridges, and a virtio device.

use std::collections::BTreeMap;
use std::sync::Arc;
use twostage::sync::Mutex;

use twostage::spec::pci::Bdf;
use twostage::viommu::bridges::BridgeKind;
use twostage_vmm::inside::edu::Edu;
use twostage_vmm::inside::pci::{
    Bridge, BusNumbers, Ecam, HostBridge, InterruptVector, IntxRouter, Location, PciBus,
    PciFunction, PciMemory,
};
use twostage_vmm::inside::threadless::without_threads;
use twostage_vmm::inside::virtio::{DeviceMemory, Rng, VirtioPci};
use twostage_vmm::inside::{
    BusDevice, DirectMemory, DmaMaster, EduConfig, MachineMemory, MessageWrites, Services,
    PCI_MMIO_LAST, PCI_MMIO_START,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::around::{Control, Counted, Counts, Lender, Memory, NoDoorbells, Pages, MEMORY};
use super::edu::Watched;
use super::fixed::{check_written, fixed, Fixed};
use super::naive;
use super::transfers::fresh_memory;
use crate::input::Input;
use crate::models::msix::{Sent, Vector};

/// Their number: the host bridge, `edu`, virtio, the port, the bridge to PCI, `edu` behind it.
pub const FUNCTIONS: usize = 6;
/// Where they are at the start.
const PLACES: [u16; FUNCTIONS] = [0, 0x08, 0x10, 0x18, 0x100, 0x218];
const EDU: usize = 1;
const VIRTIO: usize = 2;
const PORT: usize = 3;
const TO_PCI: usize = 4;
const BEHIND: usize = 5;
/// What an `edu` says to be.
const EDU_ID: [u8; 4] = [0xed, 0, 0, 1];
/// What is behind bridges is in the second half of these.
const WINDOW: u64 = 16 << 20;
/// Where ECAM is, of no importance here.
const ECAM: u64 = 0xb000_0000;
/// Reads the memory of DMA.
type Look = Box<dyn Fn() -> Vec<u8> + Send + Sync>;

/// The machine.
pub struct Machine {
    bus: Arc<PciBus>,
    pub functions: [Arc<dyn PciFunction>; FUNCTIONS],
    edus: [Arc<Watched>; 2],
    virtio: Arc<VirtioPci>,
    counts: Arc<Counts>,
    /// The level of each GSI.
    lines: Arc<Mutex<BTreeMap<u32, bool>>>,
    pins: [&'static [u32]; 2],
    pages: Pages,
    /// What no write changes, of each function.
    fixed: [Fixed; FUNCTIONS],
    #[cfg(target_arch = "x86_64")]
    ports: twostage_vmm::inside::ConfigPorts,
}

impl Machine {
    pub fn new(input: &mut Input<'_>) -> Self {
        without_threads(true);
        let choice = input.byte();
        let counts = Arc::<Counts>::default();
        let lines = Arc::<Mutex<BTreeMap<u32, bool>>>::default();
        let driven = lines.clone();
        let router = IntxRouter::new(Arc::new(move |gsi, level| {
            driven.lock().insert(gsi, level);
        }));
        let start = PCI_MMIO_START as u32;
        let numbers = BusNumbers { primary: 0, secondary: 1, subordinate: 2 };
        let port = Arc::new(Bridge::new("port", BridgeKind::Port, numbers, None));
        let numbers = BusNumbers { primary: 1, secondary: 2, subordinate: 2 };
        let way = Some(port.way().clone());
        let kind = if choice & 8 == 0 { BridgeKind::ExpressToPci } else { BridgeKind::Port };
        let to_pci = Arc::new(Bridge::new("to-pci", kind, numbers, way));
        let mut pins = [&[][..]; 2];
        let mut edu = |number: usize, config: &EduConfig, location, bars| {
            let bdf = Bdf::from_raw(PLACES[[EDU, BEHIND][number]]);
            let pin = router.pin(bdf, [0, 3].into_iter().filter(|_| number == 1));
            pins[number] = pin.gsis();
            let control = config.ats.then(Arc::<Control>::default);
            let services = Services::default();
            let bytes = Arc::new(Mutex::new(fresh_memory()));
            let memory = Memory { counts: counts.clone(), bytes: bytes.clone(), services, control };
            let messages = [(); 3].map(|()| Arc::<Sent>::default());
            let [by_vectors, by_msi, by_dma] = messages.clone();
            let vector = || -> Result<Arc<dyn InterruptVector>, _> {
                Ok(Arc::new(Vector::new(by_vectors.clone())))
            };
            let (memory, look): (Box<dyn DmaMaster>, Look) = match number {
                0 => (Box::new(memory), Box::new(move || bytes.lock().clone())),
                _ => {
                    let memory = MachineMemory::new(MEMORY as u64).expect("memory");
                    let map = memory.map().clone();
                    map.write_slice(&fresh_memory(), GuestAddress(0)).expect("memory");
                    let look = move || {
                        let mut bytes = vec![0; MEMORY];
                        map.read_slice(&mut bytes, GuestAddress(0)).expect("memory");
                        bytes
                    };
                    let memory = DirectMemory(memory);
                    (Box::new(Counted(counts.clone(), Box::new(memory))), Box::new(look))
                }
            };
            let memory = Box::new(MessageWrites::new(memory, by_dma));
            let edu = Edu::new(config, location, bars, pin, by_msi, &vector, memory);
            let behind: [super::edu::Way; 2] = [(to_pci.clone(), 2), (port.clone(), 1)];
            let ways = behind.into_iter().filter(|_| number == 1).collect();
            Arc::new(Watched::new(edu.expect("no thread"), ways, messages, config.dma_mask, look))
        };
        let (ats, pri) = (choice & 1 != 0, choice & 2 != 0);
        let pasid_bits = if choice & 4 != 0 { 20 } else { 0 };
        let config = EduConfig { ats, pri, pasid_bits, dma_mask: u64::MAX, ..EduConfig::default() };
        let location = Location { way: None, bar: start + 0x10_0000 };
        let first = edu(0, &config, location, [start, start + 0x4000]);
        let far = start + WINDOW as u32;
        let location = Location { way: Some(to_pci.way().clone()), bar: far };
        let more = [far + 0x10_0000, far + 0x10_4000];
        let behind = edu(1, &EduConfig::default(), location, more);
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("memory");
        let backend = Box::new(Rng::open("/dev/zero".as_ref()).expect("zeroes"));
        let location = Location { way: None, bar: start + 0x8000 };
        let reach = DeviceMemory::direct(memory);
        let doorbells = Arc::new(NoDoorbells);
        let unheard = Arc::<Sent>::default();
        let vector = || -> Result<Arc<dyn InterruptVector>, _> {
            Ok(Arc::new(Vector::new(unheard.clone())))
        };
        let virtio =
            VirtioPci::new("rng".into(), backend, reach, location, &vector, doorbells, None);
        let virtio = Arc::new(virtio.expect("descriptors"));
        let host = Arc::new(HostBridge::new());
        let bdf = |function: usize| Bdf::from_raw(PLACES[function]);
        let mut bus = PciBus::default();
        bus.insert(bdf(0), host.clone());
        bus.insert(bdf(EDU), first.clone());
        bus.insert(bdf(2), virtio.clone());
        bus.insert_bridge(bdf(PORT), port.clone());
        bus.insert_bridge(bdf(TO_PCI), to_pci.clone());
        bus.insert(bdf(BEHIND), behind.clone());
        for bridge in [&port, &to_pci] {
            bridge.open(&(PCI_MMIO_START + WINDOW..=PCI_MMIO_START + 2 * WINDOW - 1));
            bus.reprogrammed(bridge);
        }
        let pages = Pages::default();
        bus.lend_config(ECAM, &Lender(pages.clone())).expect("memory");
        let bus = Arc::new(bus);
        let edus = [first.clone(), behind.clone()];
        let functions: [Arc<dyn PciFunction>; FUNCTIONS] =
            [host, first, virtio.clone(), port, to_pci, behind];
        let fixed = std::array::from_fn(|number| fixed(&*functions[number]));
        Self {
            #[cfg(target_arch = "x86_64")]
            ports: twostage_vmm::inside::ConfigPorts::new(bus.clone()),
            bus,
            functions,
            edus,
            virtio,
            counts,
            lines,
            pins,
            pages,
            fixed,
        }
    }

    /// Writes a register, through ports or memory.
    pub fn write_config(&self, function: usize, register: u16, data: &[u8], ports: bool) {
        self.write_at(PLACES[function], register, data, ports);
        // Which no bridge hides.
        if [EDU, VIRTIO].contains(&function) {
            check_written(&*self.functions[function], register, data);
        }
    }

    /// What no write changes is what it was.
    pub fn check_fixed(&self) {
        for (number, function) in self.functions.iter().enumerate() {
            assert_eq!(fixed(&**function), self.fixed[number], "function {number} is another");
        }
    }

    fn write_at(&self, bdf: u16, register: u16, data: &[u8], ports: bool) {
        #[cfg(target_arch = "x86_64")]
        if ports && register < 0x100 {
            let address = 1 << 31 | u32::from(bdf) << 8 | u32::from(register & 0xfc);
            self.ports.write(0, &address.to_le_bytes());
            self.ports.read(0, &mut [0; 4]);
            return self.ports.write(4 + u64::from(register & 3), data);
        }
        let _ = ports;
        let offset = u64::from(bdf) << 12 | u64::from(register);
        Ecam(self.bus.clone()).write(offset, data);
    }

    /// Reads a register by memory and, if there are, by ports: they agree.
    pub fn read_config(&self, function: usize, register: u16, size: usize, ports: bool) {
        let (bdf, mut data) = (PLACES[function], [0; 4]);
        let offset = u64::from(bdf) << 12 | u64::from(register);
        Ecam(self.bus.clone()).read(offset, &mut data[..size]);
        #[cfg(target_arch = "x86_64")]
        if ports && register < 0x100 {
            let mut other = [0; 4];
            let address = 1 << 31 | u32::from(bdf) << 8 | u32::from(register & 0xfc);
            self.ports.write(0, &address.to_le_bytes());
            self.ports.read(4 + u64::from(register & 3), &mut other[..size]);
            // The window to a virtio device's registers may show its interrupt status, once.
            assert!(function == VIRTIO || data == other, "{bdf:#x} {register:#x}");
        }
        let _ = ports;
    }

    /// Writes or reads anywhere.
    pub fn any_config(&self, bdf: u16, register: u16, value: u64, write: bool) {
        match write {
            true => self.write_at(bdf, register, &value.to_le_bytes()[..4], value & 1 != 0),
            false => {
                Ecam(self.bus.clone()).read(u64::from(bdf) << 12 | u64::from(register), &mut [0; 8])
            }
        }
    }

    /// Resets a function, or what is behind a bridge.
    pub fn reset(&self, function: usize) {
        match function {
            PORT | TO_PCI => self.write_config(function, 0x3e, &[0x40, 0], false),
            _ => {
                let config = &self.functions[function];
                if let Some(express) = naive::capability(&**config, 0x10) {
                    self.write_config(function, express + 8, &[0, 0x80], false);
                    let control = config.config().lock().u16(express + 8);
                    assert_eq!(control & 0x8000, 0, "a reset is over");
                }
            }
        }
    }

    /// Writes a register of the capability number `which`.
    pub fn capability(&self, function: usize, which: u8, offset: u8, value: u64) {
        let all = naive::capabilities(&*self.functions[function]);
        if let Some((_, at)) = all.get(usize::from(which) % all.len().max(1)) {
            let register = at + u16::from(offset % 24);
            self.write_config(function, register, &value.to_le_bytes()[..2], false);
        }
    }

    /// Whether bars answer where they are, and only there.
    pub fn look(&self, function: usize, bar: usize) {
        let (device, ways) = (&self.functions[function], self.ways(function));
        let Some((start, size)) = naive::bar(&**device, bar) else { return };
        if start < PCI_MMIO_START || start + size - 1 > PCI_MMIO_LAST {
            return;
        }
        let decodes = naive::decodes(&**device, start, size, &ways);
        let others = (0..FUNCTIONS).flat_map(|f| (0..3).map(move |bar| (f, bar)));
        let shared = others.filter(|other| *other != (function, bar)).any(|(f, bar)| {
            naive::bar(&*self.functions[f], bar)
                .is_some_and(|(at, length)| at < start + size && start < at + length)
        });
        if shared {
            return;
        }
        // An edu's identity, its vectors and its memory; how many queues a virtio device has.
        let offset = if function == VIRTIO { 0x10 } else { 0 };
        let (mut data, mut direct) = ([0; 4], [0; 4]);
        device.read_bar(bar, offset, &mut direct);
        PciMemory(self.bus.clone()).read(start + offset - PCI_MMIO_START, &mut data);
        let expected = if decodes { direct } else { [0xff; 4] };
        assert_eq!(data, expected, "BAR {bar} of {function} at {start:#x}");
        assert!(function == VIRTIO || bar > 0 || direct == EDU_ID, "no edu but {direct:x?}");
    }

    /// The bridges that a function is behind.
    fn ways(&self, function: usize) -> Vec<&dyn PciFunction> {
        match function {
            BEHIND => vec![&*self.functions[TO_PCI], &*self.functions[PORT]],
            TO_PCI => vec![&*self.functions[PORT]],
            _ => Vec::new(),
        }
    }

    /// Accesses a BAR where it is.
    pub fn access(&self, function: usize, bar: usize, offset: u64, data: &mut [u8], write: bool) {
        if let Some((start, _)) = naive::bar(&*self.functions[function], bar) {
            self.memory_at(start.wrapping_sub(PCI_MMIO_START).wrapping_add(offset), data, write);
        }
        self.virtio.turn(true);
    }

    /// Accesses memory anywhere in the window.
    pub fn memory(&self, address: u64, size: usize, write: bool) {
        self.memory_at(address, &mut address.to_le_bytes()[..size], write);
    }

    fn memory_at(&self, offset: u64, data: &mut [u8], write: bool) {
        let memory = PciMemory(self.bus.clone());
        // The window is where the bus finds it.
        if offset <= PCI_MMIO_LAST - PCI_MMIO_START {
            match write {
                true => memory.write(offset, data),
                false => memory.read(offset, data),
            }
        }
    }

    /// Raises interrupts of an `edu`, or acknowledges them. Who may make no requests sends nothing.
    pub fn raise(&self, function: usize, causes: u32, acknowledge: bool) {
        let register = if acknowledge { 0x64 } else { 0x60 };
        self.quiet(function, |device| device.write_bar(0, register, &causes.to_le_bytes()));
    }

    /// A DMA of an `edu`, or a factorial. Who may make requests makes some, who may not makes none.
    pub fn transfer(&self, function: usize, input: &mut Input<'_>) {
        let choice = input.byte();
        let memory = match choice >> 5 {
            0 => 0xfee0_0000 + u64::from(input.byte()),
            1 => input.number(),
            _ => u64::from(input.half()) % 0x6000,
        };
        let (count, pasid) = (u64::from(input.half() % 0x1100), u32::from(input.byte()));
        let ends = [memory, 0x4_0000 + u64::from(input.byte())];
        let ends = if choice & 2 == 0 { ends } else { [ends[1], ends[0]] };
        let whole = (1..0x1000 - 0xff).contains(&count) && memory < MEMORY as u64;
        let before = self.counts.requests();
        let may = self.quiet(function, |device| {
            for (offset, value) in [(0x80, ends[0]), (0x88, ends[1]), (0x90, count)] {
                device.write_bar(0, offset, &value.to_le_bytes());
            }
            device.write_bar(0, 0xa0, &(u32::from(choice & 8) << 28 | pasid).to_le_bytes());
            device.write_bar(0, 0x20, &[choice & 0x80, 0, 0, 0]);
            device.write_bar(0, 0x08, &u32::from(choice).to_le_bytes());
            device.write_bar(0, 0x98, &u64::from(choice & 7 | 1).to_le_bytes());
            let mut command = [0; 8];
            device.read_bar(0, 0x98, &mut command);
            assert_eq!(command[0] & 1, 0, "the transfer is over");
            // What it has read is seen when it is written somewhere else.
            if choice & 2 == 0 {
                for (offset, value) in [(0x80, ends[1]), (0x88, 0x2000), (0x98, 3)] {
                    device.write_bar(0, offset, &u64::to_le_bytes(value));
                }
            }
        });
        if may && whole && choice & 8 == 0 {
            assert!(self.counts.requests() > before, "a transfer without requests");
        }
    }

    /// Whether an `edu` may make requests: if not, it makes none in `act`.
    fn quiet(&self, function: usize, act: impl FnOnce(&dyn PciFunction)) -> bool {
        let device = match function {
            EDU => &self.edus[0],
            BEHIND => &self.edus[1],
            _ => return false,
        };
        let before = self.counts.requests();
        act(&**device);
        let may = device.may_request();
        if !may {
            assert_eq!(self.counts.requests(), before, "a request of who may make none");
        }
        may
    }

    /// Enables MSI-X or masks it, and writes one of the first vectors.
    pub fn enable_msix(&self, function: usize, choice: u8) {
        let device = &self.functions[function];
        let Some(msix) = naive::capability(&**device, 0x11) else { return };
        self.write_config(function, msix + 2, &[0, choice & 0xc0], false);
        let (bar, table) = if function == VIRTIO { (0, 0x4000) } else { (1, 0) };
        let entry = table + 16 * u64::from(choice >> 1 & 1);
        let address = 0xfee0_0000 | u64::from(choice & 0x3c) << 30;
        let control = [choice ^ 0x80, 0, 0, 0, choice & 1, 0, 0, 0];
        device.write_bar(bar, entry, &address.to_le_bytes());
        device.write_bar(bar, entry + 8, &control);
        let mut data = [0; 8];
        device.read_bar(bar, entry + 8, &mut data);
        assert_eq!(data, control);
        device.read_bar(bar, if bar == 0 { 0x5000 } else { 0x1000 }, &mut data);
    }

    /// Each line is the OR of the pins of its functions.
    pub fn check_lines(&self) {
        let lines = self.lines.lock();
        let asserted = [EDU, BEHIND].map(|function| naive::pin(&*self.functions[function]));
        for (gsis, pin) in self.pins.iter().zip(asserted) {
            for gsi in *gsis {
                let shared = self.pins[0] == self.pins[1] && asserted.contains(&true);
                let level = lines.get(gsi).copied().unwrap_or_default();
                assert_eq!(level, pin || shared, "GSI {gsi}");
            }
        }
    }

    /// The pages that the guest has show what it would read.
    pub fn check_pages(&self) {
        for (address, page) in self.pages.lock().iter() {
            let mut read = [0; 0x1000];
            Ecam(self.bus.clone()).read(address - ECAM, &mut read);
            assert!(page.shown()[..] == read[..], "{address:#x} shows something else");
        }
    }
}
