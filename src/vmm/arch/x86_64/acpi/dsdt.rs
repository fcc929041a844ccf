// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DSDT: the devices that cannot be enumerated, and the sleep states.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, CreateDWordField, Device, EISAName, Else, Equal, If,
    Interrupt, Method, Name, Or, Package, PackageBuilder, Path, ResourceTemplate, Return, Scope,
    Uuid, IO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{Table, HEADER_LENGTH, OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::arch::x86_64::config_ports::ConfigPorts;
use crate::arch::x86_64::layout::{
    INTX_PINS_START, PCI_MMIO_LAST, PCI_MMIO_START, SERIAL_IRQ, SERIAL_PORT,
};
use crate::arch::x86_64::power::SLEEP_TYPE_SOFT_OFF;
use crate::arch::x86_64::timers::{RTC_FIRST_PORT, RTC_LAST_PORT};
use crate::config::MAX_DEVICES;
use crate::console::serial;
use crate::pci::line_of_pin;

/// Revision: integers have 64 bits.
const REVISION: u8 = 2;

/// The DSDT of a machine with buses 0 to `last_bus`.
pub(super) fn dsdt(last_bus: u8) -> Table {
    let mut sdt = Sdt::new(*b"DSDT", HEADER_LENGTH, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut aml = Vec::new();
    host_bridge(&mut aml, last_bus);
    serial_port(&mut aml);
    clock(&mut aml);
    soft_off(&mut aml);
    sdt.append_slice(&aml);
    Table(sdt)
}

/// `\_SB.PCI0`: the root of the PCI hierarchy.
fn host_bridge(aml: &mut Vec<u8>, last_bus: u8) {
    let mut routes = PackageBuilder::new();
    // Device 0 is the host bridge, which has no interrupt.
    for device in 1..=MAX_DEVICES as u8 {
        // All functions of the device. Only INTA is wired, except behind bridges.
        let address = u32::from(device) << 16 | 0xffff;
        let pins = if last_bus == 0 { 1 } else { 4_u8 };
        for pin in 0..pins {
            let interrupt = INTX_PINS_START + line_of_pin(device, pin) as u32;
            routes.add_element(&Package::new(vec![&address, &pin, &0u8, &interrupt]));
        }
    }
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new("PCI0"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
                &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
                &Name::new(Path::new("_UID"), &0u8),
                &Name::new(Path::new("_SEG"), &0u8),
                &Name::new(Path::new("_BBN"), &0u8),
                &Name::new(Path::new("_PRT"), &routes),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![
                        &AddressSpace::new_bus_number(0u16, u16::from(last_bus)),
                        &IO::new(
                            ConfigPorts::FIRST_PORT as u16,
                            ConfigPorts::FIRST_PORT as u16,
                            1,
                            8,
                        ),
                        &AddressSpace::new_memory(
                            AddressSpaceCacheable::NotCacheable,
                            true,
                            PCI_MMIO_START as u32,
                            PCI_MMIO_LAST as u32,
                            None,
                        ),
                    ]),
                ),
                &operating_system_capabilities(),
            ],
        )],
    )
    .to_aml_bytes(aml);
}

/// `_OSC` of the host bridge (PCI Firmware 3.3, §4.5.1): the operating system gets all the control
/// that it requests, as there is no firmware to do any of it.
fn operating_system_capabilities() -> Bytes {
    const PCI_HOST_BRIDGE: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
    /// Returned in the first doubleword: the UUID is unknown.
    const UNRECOGNIZED_UUID: u8 = 1 << 2;
    let (uuid, capabilities) = (Arg(0), Arg(3));
    let status = Path::new("CDW1");
    let mut aml = Vec::new();
    Method::new(
        Path::new("_OSC"),
        4,
        // It makes a name.
        true,
        vec![
            &If::new(
                &Equal::new(&uuid, &Uuid::new(PCI_HOST_BRIDGE)),
                vec![&Return::new(&capabilities)],
            ),
            &Else::new(vec![
                &CreateDWordField::new(&status, &capabilities, &0u8),
                &Or::new(&status, &status, &UNRECOGNIZED_UUID),
                &Return::new(&capabilities),
            ]),
        ],
    )
    .to_aml_bytes(&mut aml);
    Bytes(aml)
}

/// AML that is already encoded.
struct Bytes(Vec<u8>);

impl Aml for Bytes {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// `\_SB.COM1`.
fn serial_port(aml: &mut Vec<u8>) {
    let first = SERIAL_PORT as u16;
    let ports = serial::REGISTERS as u8;
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new("COM1"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                &Name::new(Path::new("_UID"), &0u8),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![
                        &IO::new(first, first, 1, ports),
                        // Consumer, edge-triggered, active high, not shared.
                        &Interrupt::new(true, true, false, false, SERIAL_IRQ),
                    ]),
                ),
            ],
        )],
    )
    .to_aml_bytes(aml);
}

/// `\_SB.RTC0`: the real-time clock. It has no interrupt.
fn clock(aml: &mut Vec<u8>) {
    let (first, ports) = (RTC_FIRST_PORT as u16, (RTC_LAST_PORT - RTC_FIRST_PORT + 1) as u8);
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new("RTC0"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0B00")),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![&IO::new(first, first, 1, ports)]),
                ),
            ],
        )],
    )
    .to_aml_bytes(aml);
}

/// `\_S5`: the only sleep state.
fn soft_off(aml: &mut Vec<u8>) {
    let package = Package::new(vec![&SLEEP_TYPE_SOFT_OFF, &0u8, &0u8, &0u8]);
    Name::new(Path::new("_S5_"), &package).to_aml_bytes(aml);
}
