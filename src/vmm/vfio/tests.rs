// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A whole assigned device, from the guest's side and the host's.

use std::sync::Arc;
use twostage::sync::Mutex;

use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use super::config_image::{Behind, ConfigImage};
use super::host_device::Irq;
use super::testing::{FakeDevice, FakeLender, FakeVectors, Meanwhile};
use super::*;
use crate::devices::{HostServices, Services};
use crate::pci::layout::CONFIG_SIZE;
use crate::pci::{Bridge, BusNumbers, EventLine, PciBus, PciFunction};
use twostage::spec::pci::Bdf;
use twostage::viommu::bridges::BridgeKind;

const CONFIG: u32 = 7;
const BDF: Bdf = Bdf::from_raw(8);
/// A root port, and the function behind it.
const PORT: Bdf = Bdf::from_raw(0x10);
const BEHIND_PORT: Bdf = Bdf::from_raw(0x100);
/// Where the capabilities of [`nvme`] are.
const POWER: u16 = 0x40;
const MSI: u16 = 0x50;
const EXPRESS: u16 = 0x80;
const MSIX: u16 = 0xb0;
const VENDOR: u16 = 0xc0;

/// Something like an NVMe drive: 16 KiB of registers with MSI-X at 0x2000 and 0x3000 (16 vectors),
/// every visible capability, and some hidden ones.
fn nvme() -> FakeDevice {
    let mut device = FakeDevice::default();
    device.add_region(0, 0x4000, true);
    device.add_region(CONFIG, CONFIG_SIZE as u64, false);
    device.add_irq(Irq::Intx, 1);
    device.add_irq(Irq::Msi, 1);
    device.add_irq(Irq::Msix, 16);
    for (offset, bytes) in [
        (0x00, &[0x36, 0x1b, 0x10, 0x00, 0x07, 0x01, 0x18, 0xf9][..]),
        (0x08, &[0x02, 0x02, 0x08, 0x01, 0x10, 0x20, 0x80, 0x00]),
        (0x10, &[0x04, 0x00, 0xd0, 0xfe, 0x01]),
        (0x2c, &[0xf4, 0x1a, 0x00, 0x11]),
        (0x30, &[0x01, 0x00, 0xe0, 0xfe]),
        (0x34, &[POWER as u8]),
        (0x3c, &[0x0b, 0x02]),
        (POWER, &[0x01, MSI as u8, 0xfb, 0xff, 0x00, 0x01, 0x00, 0x00]),
        (MSI, &[0x05, 0x70, 0x80, 0x01]),
        // Advanced features: hidden, and skipped.
        (0x70, &[0x13, EXPRESS as u8, 0x06, 0x03]),
        (EXPRESS, &[0x10, MSIX as u8, 0x02, 0x01, 0x25, 0x85, 0x00, 0x10, 0x10, 0x28]),
        (EXPRESS + 0x0c, &[0x43, 0xfc, 0x03]),
        (EXPRESS + 0x24, &[0x1f, 0x08]),
        (MSIX, &[0x11, VENDOR as u8, 0x0f, 0x80, 0x00, 0x20, 0x00, 0x00, 0x00, 0x30]),
        (VENDOR, &[0x09, 0x00, 0x08, 0x5a, 0x11, 0x22, 0x33, 0x44]),
        // SR-IOV, then a serial number, then ATS.
        (0x100, &[0x10, 0x00, 0x01, 0x20]),
        (0x200, &[0x03, 0x00, 0x01, 0x30, 1, 2, 3, 4, 5, 6, 7, 8]),
        (0x300, &[0x0f, 0x00, 0x01, 0x00]),
    ] {
        device.put(CONFIG, offset.into(), bytes);
    }
    device
}

struct Line {
    events: [EventFd; 2],
    released: Arc<Mutex<u32>>,
}

impl EventLine for Line {
    fn assert_event(&self) -> &EventFd {
        &self.events[0]
    }

    fn end_event(&self) -> &EventFd {
        &self.events[1]
    }

    fn release(&self) {
        *self.released.lock() += 1;
    }
}

struct Machine {
    device: Arc<FakeDevice>,
    lender: Arc<FakeLender>,
    vectors: Arc<FakeVectors>,
    released: Arc<Mutex<u32>>,
    enabled: Arc<Mutex<Services>>,
    bus: PciBus,
    bdf: Bdf,
}

/// On the root bus.
fn machine(device: FakeDevice) -> Machine {
    machine_behind(device, None)
}

/// On the root bus, or behind a root port there.
fn machine_behind(device: FakeDevice, port: Option<&Arc<Bridge>>) -> Machine {
    machine_with(device, port, HostServices::default())
}

fn machine_with(device: FakeDevice, port: Option<&Arc<Bridge>>, services: HostServices) -> Machine {
    let enabled = Arc::<Mutex<Services>>::default();
    let told = enabled.clone();
    let (device, lender) = (Arc::new(device), Arc::new(FakeLender::default()));
    let (vectors, released) = (Arc::new(FakeVectors::default()), Arc::default());
    let mut next = 0xe000_0000;
    let function = VfioPci::new(
        "0000:01:00.0".into(),
        device.clone(),
        Surroundings {
            way: port.map(|port| port.way().clone()),
            place: &mut |size| {
                let at = u64::next_multiple_of(next, size);
                next = at + size;
                Ok(at)
            },
            lender: lender.clone(),
            vectors: vectors.maker(),
            line: &mut || {
                let events = [(); 2].map(|()| EventFd::new(EFD_NONBLOCK).unwrap());
                Ok((10, Box::new(Line { events, released: Arc::clone(&released) })))
            },
            services,
            enabled: Arc::new(move |services| *told.lock() = services),
            page: 0x1000,
            answers: |bar| bar.start >= 0xe000_0000 && bar.last < 0xfec0_0000,
        },
    );
    let mut bus = PciBus::default();
    let bdf = if port.is_some() { BEHIND_PORT } else { BDF };
    if let Some(port) = port {
        bus.insert_bridge(PORT, port.clone());
    }
    bus.insert(bdf, Arc::new(function.unwrap()));
    Machine { device, lender, vectors, released, enabled, bus, bdf }
}

impl Machine {
    fn read(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.bus.read_config(self.bdf, offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u16, data: &[u8]) {
        self.bus.write_config(self.bdf, offset, data);
    }

    fn function(&self) -> Arc<dyn PciFunction> {
        self.bus.function(self.bdf).unwrap()
    }

    /// The device's command register.
    fn command(&self) -> u8 {
        self.device.get(CONFIG, 4, 1)[0]
    }
}

#[test]
fn the_header_is_the_devices_and_the_rest_is_not() {
    let machine = machine(nvme());
    assert_eq!(machine.read(0x00), 0x0010_1b36);
    assert_eq!(machine.read(0x08), 0x0108_0202);
    assert_eq!(machine.read(0x0c), 0, "one function, no BIST");
    assert_eq!(machine.read(0x2c), 0x1100_1af4);
    assert_eq!(machine.read(0x30), 0, "no ROM");
    assert_eq!(machine.read(0x3c), 0x010a, "INTA, and the machine's line");
    // Sizing.
    assert_eq!((machine.read(0x10), machine.read(0x14)), (0xe000_0004, 0));
    machine.write(0x10, &[0xff; 4]);
    machine.write(0x14, &[0xff; 4]);
    assert_eq!((machine.read(0x10), machine.read(0x14)), (0xffff_c004, u32::MAX));
    assert_eq!(machine.read(0x18), 0);
    assert_eq!(
        machine.device.get(CONFIG, 0x10, 5),
        [4, 0, 0xd0, 0xfe, 1],
        "nothing of it is forwarded"
    );
}

#[test]
fn the_list_has_what_works() {
    let machine = machine(nvme());
    let next = |at: u16| machine.read(at) as u16;
    assert_eq!(machine.read(0x34), u32::from(POWER));
    assert_eq!(next(POWER), MSI << 8 | 0x01);
    assert_eq!(next(MSI), EXPRESS << 8 | 0x05);
    assert_eq!(machine.read(0x70), 0);
    assert_eq!(next(EXPRESS), MSIX << 8 | 0x10);
    assert_eq!(next(MSIX), VENDOR << 8 | 0x11);
    assert_eq!(next(VENDOR), 0x09);
    // No D1, D2, PME; no soft reset; an emulated state.
    assert_eq!(machine.read(POWER) >> 16, 0x23);
    machine.write(POWER + 4, &[0xff; 4]);
    assert_eq!(machine.read(POWER + 4), 0xb);
    // An integrated endpoint, version 2, without a link; FLR, as VFIO can reset it.
    assert_eq!(machine.read(EXPRESS) >> 16, 0x92);
    assert_eq!(machine.read(EXPRESS + 4), 0x1000_8025);
    assert_eq!((machine.read(EXPRESS + 0xc), machine.read(EXPRESS + 0x24)), (0, 0));
    // MSI-X disabled, though the device had it enabled.
    assert_eq!(machine.read(MSIX) >> 16, 0x0f);
    assert_eq!((machine.read(MSIX + 4), machine.read(MSIX + 8)), (0x2000, 0x3000));
    // An empty capability, then the serial number, which is the last.
    assert_eq!((machine.read(0x100), machine.read(0x200)), (0x2000_0000, 0x0001_0003));
    assert_eq!((machine.read(0x204), machine.read(0x300)), (0x0403_0201, 0));
}

#[test]
fn live_registers_are_the_devices() {
    let machine = machine(nvme());
    // Status: errors, and a list.
    assert_eq!(machine.read(4) >> 16, 0xf918);
    machine.device.put(CONFIG, 6, &[0x08, 0x00]);
    assert_eq!(machine.read(4) >> 16, 0x0018, "with the list that the guest has");
    machine.write(6, &[0xff, 0xff]);
    assert_eq!(machine.device.get(CONFIG, 6, 2), [0x08, 0x00]);
    // Vendor-specific.
    machine.write(VENDOR + 4, &[0xaa, 0xbb]);
    assert_eq!(machine.device.get(CONFIG, (VENDOR + 4).into(), 4), [0xaa, 0xbb, 0x33, 0x44]);
    machine.device.put(CONFIG, (VENDOR + 6).into(), &[0x77]);
    assert_eq!(machine.read(VENDOR + 4), 0x4477_bbaa);
    // Device control.
    machine.write(EXPRESS + 8, &[0x1f, 0x20]);
    assert_eq!(machine.device.get(CONFIG, (EXPRESS + 8).into(), 2), [0x1f, 0x20]);
    // Others are not.
    machine.write(0xf0, &[0xff; 4]);
    assert_eq!((machine.read(0xf0), machine.device.get(CONFIG, 0xf0, 4)), (0, vec![0; 4]));
}

#[test]
fn memory_is_lent_while_the_bar_answers() {
    let machine = machine(nvme());
    let lent = vec![(0xe000_0000, 0x2000)];
    assert_eq!((machine.lender.lent(), machine.command() & 7), (lent, 2), "from the start");
    machine.write(4, &[0, 0]);
    assert_eq!((machine.lender.lent(), machine.command() & 7), (vec![], 0));
    machine.write(4, &[6, 0]);
    assert_eq!(machine.lender.lent(), [(0xe000_0000, 0x2000)], "without the pages of MSI-X");
    assert_eq!(machine.command(), 6);
    // Sizing does not map it at the end of the address space.
    machine.write(0x10, &[0xff; 4]);
    assert_eq!(machine.lender.lent(), []);
    machine.write(0x10, &0xe080_0000u32.to_le_bytes());
    assert_eq!(machine.lender.lent(), [(0xe080_0000, 0x2000)]);
    machine.write(4, &[4, 0]);
    assert_eq!((machine.lender.lent(), machine.command()), (vec![], 4));
}

#[test]
fn behind_a_root_port_the_device_does_what_the_port_lets_through() {
    let numbers = BusNumbers { primary: 0, secondary: 1, subordinate: 1 };
    let port = Arc::new(Bridge::new("rp0", BridgeKind::Port, numbers, None));
    let machine = machine_behind(nvme(), Some(&port));
    let program = |offset, data: &[u8]| machine.bus.write_config(PORT, offset, data);
    // An endpoint with a link, not one of the root complex.
    assert_eq!(machine.read(EXPRESS), 0x0002_b010);
    assert_eq!(machine.read(EXPRESS + 0x0c), 0x11);
    assert_eq!(machine.lender.lent(), [], "the port's window is closed");
    let lent = [(0xe000_0000, 0x2000)];
    port.open(&(0xe000_0000..=0xe00f_ffff));
    machine.bus.reprogrammed(&port);
    assert_eq!(machine.lender.lent(), lent);
    machine.write(4, &[6, 0]);
    assert_eq!(machine.command(), 6);
    // Without bus mastering of the port, or under another bus number than the IOMMU knows.
    for (offset, value, back) in [(4, 2, 6), (0x19, 0, 1)] {
        program(offset, &[value]);
        assert_eq!((machine.command(), machine.lender.lent()), (2, lent.to_vec()), "{offset:#x}");
        program(offset, &[back]);
        assert_eq!((machine.command(), machine.read(4) & 7), (6, 6));
    }
    program(4, &[4, 0]);
    assert_eq!(machine.lender.lent(), [], "the port forwards no memory requests");
    program(4, &[6, 0]);
    assert_eq!(machine.lender.lent(), lent);
    program(0x3e, &[0x40]);
    assert_eq!((machine.read(4) & 7, machine.lender.lent()), (0, vec![]), "it was reset");
}

#[test]
fn behind_a_port_a_device_without_pci_express_does_what_that_lets_through_too() {
    let numbers = BusNumbers { primary: 0, secondary: 1, subordinate: 1 };
    let port = Arc::new(Bridge::new("rp0", BridgeKind::Port, numbers, None));
    let device = nvme();
    device.put(CONFIG, 0x71, &[MSIX as u8]);
    let machine = machine_behind(device, Some(&port));
    assert_eq!(machine.lender.lent(), [], "the port's window is closed");
    port.open(&(0xe000_0000..=0xe00f_ffff));
    machine.bus.reprogrammed(&port);
    assert_eq!(machine.lender.lent(), [(0xe000_0000, 0x2000)]);
}

#[test]
fn what_is_not_lent_is_trapped() {
    let machine = machine(nvme());
    let function = machine.function();
    machine.device.put(0, 0x1004, &[1, 2, 3, 4]);
    let mut data = [0; 4];
    function.read_bar(0, 0x1004, &mut data);
    assert_eq!(data, [1, 2, 3, 4]);
    function.write_bar(0, 0x2100, &[5, 6]);
    assert_eq!(machine.device.get(0, 0x2100, 2), [5, 6], "behind the table");
    // The table is emulated.
    function.write_bar(0, 0x2000, &[0xf0; 4]);
    function.read_bar(0, 0x2000, &mut data);
    assert_eq!((data, machine.device.get(0, 0x2000, 4)), ([0xf0; 4], vec![0; 4]));
    function.write_bar(0, 0x3000, &[0xff; 4]);
    assert_eq!(machine.device.get(0, 0x3000, 4), [0; 4]);
    // A BAR that does not exist.
    function.read_bar(4, 0, &mut data);
    assert_eq!(data, [0xff; 4]);
}

#[test]
fn one_kind_of_interrupt_is_on_at_a_time() {
    let machine = machine(nvme());
    assert_eq!(machine.device.take_calls(), ["reset", "Intx 0: [on]", "Intx unmask"]);
    machine.write(MSIX + 2, &[0x0f, 0xc0]);
    assert_eq!(machine.device.take_calls(), ["Intx off", "Msix 0: [off]"]);
    assert_eq!(*machine.released.lock(), 1);
    let function = machine.function();
    // Vector 1: address, data, unmasked; then all of them unmasked.
    for (offset, value) in [(0x10, 0xfee0_0000u32), (0x18, 0x41), (0x1c, 0)] {
        function.write_bar(0, 0x2000 + offset, &value.to_le_bytes());
    }
    assert!(machine.device.take_calls().is_empty());
    machine.write(MSIX + 2, &[0x0f, 0x80]);
    assert_eq!(machine.device.take_calls(), ["Msix 1: [on]"]);
    assert_eq!(machine.vectors.take_updates(), ["fee00000/65"]);
    // Masked: interrupts become pending, and VFIO is not called.
    function.write_bar(0, 0x201c, &[1, 0, 0, 0]);
    machine.vectors.event(0).write(1).unwrap();
    let mut pending = [0];
    function.read_bar(0, 0x3000, &mut pending);
    assert_eq!((pending, machine.vectors.take_updates()), ([2], vec!["none".to_owned()]));
    machine.write(MSI + 2, &[1, 0]);
    assert!(machine.device.take_calls().is_empty(), "MSI-X goes before MSI");
    machine.write(MSIX + 2, &[0, 0]);
    assert_eq!(machine.device.take_calls(), ["Msix off", "Msi 0: [off]", "Msi 0: [on]"]);
    machine.write(MSI + 2, &[0, 0]);
    assert_eq!(machine.device.take_calls(), ["Msi off", "Intx 0: [on]", "Intx unmask"]);
}

#[test]
fn the_virtual_iommu_is_told_what_the_guest_enables() {
    let mut device = FakeDevice::default();
    device.add_region(CONFIG, CONFIG_SIZE as u64, false);
    for (offset, bytes) in [
        (0x00, &[0x36, 0x1b, 0x10, 0x00, 0x07, 0x01, 0x18, 0xf9][..]),
        (0x34, &[EXPRESS as u8]),
        (EXPRESS, &[0x10, 0, 0x02, 0, 0, 0, 0, 0x10]),
        (0x100, &[0x0f, 0x00, 0x01, 0x11, 0x60, 0, 0, 0x80]),
        (0x110, &[0x13, 0x00, 0x01, 0x00, 1, 0, 0, 0x81, 1]),
    ] {
        device.put(CONFIG, offset.into(), bytes);
    }
    let services = HostServices { pasid: None, ats: true, pri: true };
    let machine = machine_with(device, None, services);
    let told = || *machine.enabled.lock();
    assert_eq!(told(), Services::default());
    // ATS is the first of those that were made, then PRI: its allocation and its control.
    machine.write(0xfe6, &[0, 0x80]);
    assert_eq!(told(), Services { ats: true, ..Services::default() });
    machine.write(0xff4, &[1, 0, 0, 0]);
    machine.write(0xfec, &[1, 0]);
    assert_eq!(told(), Services { ats: true, pri: true, pasid: false });
    assert_eq!(machine.device.get(CONFIG, 0x106, 2), [0, 0x80], "the host's is as it was");
    machine.write(EXPRESS + 9, &[0x80]);
    assert_eq!((told(), machine.read(0xfe4)), (Services::default(), 0x60));
}

#[test]
fn the_guest_can_reset_the_function() {
    let machine = machine(nvme());
    machine.write(4, &[6, 0]);
    machine.write(MSIX + 2, &[0, 0x80]);
    machine.write(0x10, &0xe080_0000u32.to_le_bytes());
    // A vector that is not masked.
    let function = machine.function();
    function.write_bar(0, 0x2000, &0xfee0_0000_u64.to_le_bytes());
    function.write_bar(0, 0x2008, &0x41_u64.to_le_bytes());
    machine.device.take_calls();
    machine.write(EXPRESS + 8, &[0x10, 0xa8]);
    assert_eq!(machine.device.take_calls(), ["Msix off", "reset", "Intx 0: [on]", "Intx unmask"]);
    assert_eq!((machine.read(4) & 0xffff, machine.command()), (0, 0));
    assert_eq!((machine.read(0x10), machine.read(MSIX) >> 31), (0xe000_0004, 0));
    assert_eq!(machine.lender.lent(), []);
    assert_eq!(machine.read(EXPRESS + 8) & 0x8000, 0);
    let mut control = [0; 4];
    function.read_bar(0, 0x200c, &mut control);
    assert_eq!(control, [1, 0, 0, 0], "each vector is masked");
}

/// Another vCPU goes on while one resets the function.
#[test]
fn a_vector_that_is_unmasked_during_a_reset_is_masked_after_it() {
    let machine = machine(nvme());
    machine.write(MSIX + 2, &[0, 0x80]);
    let function = machine.function();
    let meanwhile = move || {
        function.write_bar(0, 0x2000, &0xfee0_0000_u64.to_le_bytes());
        function.write_bar(0, 0x2008, &0x41_u64.to_le_bytes());
    };
    *machine.device.meanwhile.lock() = Some(Meanwhile(Box::new(meanwhile)));
    machine.write(EXPRESS + 8, &[0x10, 0xa8]);
    assert!(machine.device.meanwhile.lock().is_none(), "it did");
    let mut control = [0; 4];
    machine.function().read_bar(0, 0x200c, &mut control);
    assert_eq!(control, [1, 0, 0, 0]);
}

#[test]
fn a_device_that_is_let_go_is_quiet() {
    let Machine { device, lender, bus, .. } = machine(nvme());
    bus.write_config(BDF, 4, &[6, 0]);
    device.take_calls();
    drop(bus);
    assert_eq!(device.take_calls(), ["Intx off", "reset"]);
    assert_eq!((device.get(CONFIG, 4, 1), lender.lent()), (vec![0], vec![]));
}

#[test]
fn a_device_that_cannot_be_reset_has_no_flr() {
    let mut device = nvme();
    device.cannot_reset = true;
    let machine = machine(device);
    assert_eq!(machine.read(EXPRESS + 4), 0x8025);
    assert!(!machine.device.take_calls().contains(&"reset".to_owned()));
}

#[test]
fn what_is_no_endpoint_is_refused() {
    let mut space = [0xff; CONFIG_SIZE];
    let behind = Behind { intx: true, reset: true, ..Behind::default() };
    let refused = |space: &[u8; CONFIG_SIZE]| ConfigImage::new(space, &behind).unwrap_err();
    assert!(refused(&space).to_string().contains("does not answer"));
    space = [0; CONFIG_SIZE];
    space[0x0e] = 0x81;
    assert!(refused(&space).to_string().contains("a bridge"));
}

mod msix;

mod random {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever a device reports and a guest writes, nothing panics, and nothing outside of the
        /// BAR is mapped.
        #[test]
        fn any_device_and_any_guest(
            head in prop::collection::vec(any::<u8>(), 256),
            tail in prop::collection::vec(any::<u8>(), 64),
            writes in prop::collection::vec((0u16..0x1000, any::<u32>(), 1usize..5), 0..32),
            accesses in prop::collection::vec((0usize..7, any::<u64>(), 1usize..9), 0..16),
        ) {
            let device = nvme();
            device.put(CONFIG, 0, &head);
            device.put(CONFIG, 0x100, &tail);
            // An endpoint with a list and a memory BAR.
            device.put(CONFIG, 0, &[0x36, 0x1b]);
            device.put(CONFIG, 6, &[0x10]);
            device.put(CONFIG, 0x0e, &[0]);
            device.put(CONFIG, 0x10, &[4]);
            let machine = machine(device);
            for (offset, value, length) in writes {
                let offset = offset.min(0x1000 - length as u16);
                machine.write(offset, &value.to_le_bytes()[..length]);
                machine.read(offset & 0xffc);
            }
            let function = machine.function();
            for (bar, offset, length) in accesses {
                let offset = offset % (0x4000 - length as u64);
                let mut data = [0; 8];
                function.read_bar(bar, offset, &mut data[..length]);
                function.write_bar(bar, offset, &data[..length]);
            }
            for (address, length) in machine.lender.lent() {
                prop_assert!((0xe000_0000..0xfec0_0000).contains(&address) && length <= 0x4000);
            }
        }
    }
}
