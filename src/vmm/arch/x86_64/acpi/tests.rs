// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tables as a guest finds them: from the RSDP, with valid checksums.

use std::collections::BTreeMap;

use super::*;

const RAM: u64 = 0x20_0000;

fn platform() -> Platform {
    Platform {
        vcpus: 2,
        ioapic: Some(IoApic { id: 0, address: 0xfec0_0000, bdf: Bdf::from_raw(0xfff8) }),
        pic: false,
        last_bus: 0,
        iommu: None,
    }
}

fn unit(address: u64, functions: &[Bdf]) -> IommuUnit {
    let scope = |function: &Bdf| dmar::DeviceScope::of_function(*function, &[]);
    IommuUnit { address, scopes: functions.iter().map(scope).collect() }
}

fn iommu() -> IommuPlatform {
    IommuPlatform {
        units: vec![unit(0xfed9_0000, &[Bdf::new(0, 1, 0).unwrap()])],
        all_functions: true,
        interrupt_remapping: false,
        ats: false,
    }
}

fn read(memory: &MachineMemory, address: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    memory.map().read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn long_word(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

/// The table at `address`.
fn table(memory: &MachineMemory, address: u64) -> (String, Vec<u8>) {
    let length = u32::from_le_bytes(read(memory, address + 4, 4).try_into().unwrap());
    let bytes = read(memory, address, length as usize);
    let signature = String::from_utf8(bytes[..4].to_vec()).unwrap();
    assert_eq!(sum(&bytes), 0, "checksum of {signature}");
    (signature, bytes)
}

/// Every table but RSDP and XSDT, by signature.
fn tables(platform: &Platform) -> BTreeMap<String, Vec<u8>> {
    let memory = MachineMemory::new(RAM).unwrap();
    write_tables(&memory, platform).unwrap();
    let rsdp = read(&memory, RSDP_ADDRESS, 36);
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
    let (signature, xsdt) = table(&memory, long_word(&rsdp, 24));
    assert_eq!(signature, "XSDT");
    let mut tables: BTreeMap<_, _> = xsdt[36..]
        .chunks_exact(8)
        .map(|entry| table(&memory, u64::from_le_bytes(entry.try_into().unwrap())))
        .collect();
    let (signature, dsdt) = table(&memory, long_word(&tables["FACP"], 140));
    tables.insert(signature, dsdt);
    tables
}

fn signatures(platform: &Platform) -> Vec<String> {
    tables(platform).into_keys().collect()
}

#[test]
fn there_is_a_dmar_when_there_is_an_iommu() {
    assert_eq!(signatures(&platform()), ["APIC", "DSDT", "FACP", "MCFG"]);
    let platform = Platform { iommu: Some(iommu()), ..platform() };
    assert_eq!(signatures(&platform), ["APIC", "DMAR", "DSDT", "FACP", "MCFG"]);
}

#[test]
fn the_dmar_names_what_is_behind_the_unit() {
    let dmar = |iommu: IommuPlatform| {
        let tables = tables(&Platform { iommu: Some(iommu), ..platform() });
        let (header, rest) = tables["DMAR"].split_at(36);
        // The length and the checksum are checked already.
        assert_eq!((&header[..4], header[8]), (&b"DMAR"[..], 1));
        assert_eq!(header[10..], *b"TWOSTGTWOSTAGE\x01\0\0\0RVAT\0\0\0\x01");
        rest.to_vec()
    };
    let header = |flags: u8| [[HOST_ADDRESS_WIDTH - 1, flags].as_slice(), &[0; 10]].concat();
    let drhd_at = |page: u8, length: u8, flags: u8| {
        [0, 0, length, 0, flags, 0, 0, 0, 0x00, page, 0xd9, 0xfe, 0, 0, 0, 0]
    };
    let drhd = |length, flags| drhd_at(0, length, flags);
    // Everything in one unit.
    assert_eq!(dmar(iommu()), [header(0), drhd(16, 1).to_vec()].concat());
    // Two functions of several; ATS.
    let functions = [Bdf::new(0, 1, 0).unwrap(), Bdf::new(0, 3, 2).unwrap()];
    let units = vec![unit(0xfed9_0000, &functions)];
    let some = IommuPlatform { units, all_functions: false, ats: true, ..iommu() };
    let scopes = [1, 8, 0, 0, 0, 0, 1, 0, 1, 8, 0, 0, 0, 0, 3, 2];
    let atsr = [2, 0, 8, 0, 1, 0, 0, 0];
    assert_eq!(
        dmar(some),
        [header(0), drhd(32, 0).to_vec(), scopes.to_vec(), atsr.to_vec()].concat()
    );
    // Interrupts are remapped, including the IOAPIC's.
    let remapping = IommuPlatform { interrupt_remapping: true, ..iommu() };
    let ioapic = [3, 8, 0, 0, 0, 0xff, 0x1f, 0];
    assert_eq!(dmar(remapping), [header(1), drhd(24, 1).to_vec(), ioapic.to_vec()].concat());
    // Two units: the IOAPIC is behind the first, unlisted functions behind the last.
    let [a, b] = functions.map(|function| [function]);
    let units = vec![unit(0xfed9_0000, &a), unit(0xfed9_1000, &b)];
    let two = IommuPlatform { units, interrupt_remapping: true, ..iommu() };
    let first = [drhd(32, 0).to_vec(), scopes[..8].to_vec(), ioapic.to_vec()].concat();
    let second = drhd_at(0x10, 16, 1).to_vec();
    assert_eq!(dmar(two.clone()), [header(1), first.clone(), second].concat());
    // A third function is behind neither: each lists its functions.
    let two = IommuPlatform { all_functions: false, ..two };
    let second = [drhd_at(0x10, 24, 0).to_vec(), scopes[8..].to_vec()].concat();
    assert_eq!(dmar(two), [header(1), first, second].concat());
}

#[test]
fn the_madt_lists_processors_and_interrupt_controllers() {
    let madt = |platform: Platform| tables(&platform)["APIC"][36..].to_vec();
    let lapics = [0, 8, 0, 0, 1, 0, 0, 0, 0, 8, 1, 1, 1, 0, 0, 0];
    let ioapic = [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0];
    let address = [0, 0, 0xe0, 0xfe];
    // The interval timer, and ACPI's own interrupt: level-triggered, active high.
    let overrides = [2, 10, 0, 0, 2, 0, 0, 0, 0, 0, 2, 10, 0, 9, 9, 0, 0, 0, 13, 0];
    let split = [&address[..], &[0; 4], &lapics, &ioapic, &overrides].concat();
    assert_eq!(madt(platform()), split);
    let in_kernel = [&address[..], &[1, 0, 0, 0], &lapics, &ioapic, &overrides].concat();
    assert_eq!(madt(Platform { pic: true, ..platform() }), in_kernel);
    let bare = [&address[..], &[0; 4], &lapics].concat();
    assert_eq!(madt(Platform { ioapic: None, ..platform() }), bare);
}

#[test]
fn the_mcfg_names_the_buses_there_are() {
    let mcfg = &tables(&platform())["MCFG"];
    // Base address; segment 0; first and last bus.
    assert_eq!(long_word(mcfg, 44), ECAM_START);
    assert_eq!(mcfg[52..56], [0, 0, 0, 0]);
}

#[test]
fn the_fadt_names_the_registers_of_power() {
    let fadt = &tables(&platform())["FACP"];
    let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
    assert_eq!(flags >> 20 & 1, 0, "not hardware-reduced");
    assert_eq!(flags >> 10 & 1, 1, "reset register");
    assert_eq!(flags >> 8 & 1, 1, "all bits of the timer count");
    // System I/O, 8 bits wide, accessed as a byte.
    let port = |number: u16| [&[1, 8, 0, 1][..], &u64::from(number).to_le_bytes()].concat();
    assert_eq!(fadt[116..128], port(0xcf9));
    assert_eq!(fadt[128], 6);
    // PM1: events and control; the SCI; no SMI command, no C2 or C3.
    let word = |at: usize| u32::from_le_bytes(fadt[at..at + 4].try_into().unwrap());
    assert_eq!((word(56), word(64), fadt[88], fadt[89]), (0x600, 0x604, 4, 2));
    assert_eq!(fadt[148..160], [1, 32, 0, 2, 0x00, 0x06, 0, 0, 0, 0, 0, 0]);
    assert_eq!(fadt[172..184], [1, 16, 0, 2, 0x04, 0x06, 0, 0, 0, 0, 0, 0]);
    assert_eq!((fadt[46], word(48)), (9, 0));
    assert_eq!(fadt[96..100], [101, 0, 0xe9, 3]);
}

#[test]
fn there_is_a_facs() {
    let memory = MachineMemory::new(RAM).unwrap();
    write_tables(&memory, &platform()).unwrap();
    let facs = u32::from_le_bytes(tables(&platform())["FACP"][36..40].try_into().unwrap());
    assert_eq!(facs % 64, 0);
    assert_eq!(read(&memory, facs.into(), 8), *b"FACS\x40\0\0\0");
}

#[test]
fn the_fadt_names_clocks() {
    let fadt = &tables(&platform())["FACP"];
    // The power management timer, in both forms.
    assert_eq!((fadt[76..80].to_vec(), fadt[91]), (vec![0x08, 0x06, 0, 0], 4));
    assert_eq!(fadt[208..220], [1, 32, 0, 3, 0x08, 0x06, 0, 0, 0, 0, 0, 0]);
    // A real-time clock with a century and without wake-up.
    let boot = u16::from_le_bytes([fadt[109], fadt[110]]);
    assert_eq!((boot >> 5 & 1, fadt[108]), (0, 0x32));
    assert_eq!(u32::from_le_bytes(fadt[112..116].try_into().unwrap()) >> 6 & 1, 1);
    let dsdt = &tables(&platform())["DSDT"];
    // PNP0B00, compressed.
    assert!(dsdt.windows(4).any(|bytes| bytes == [0x41, 0xd0, 0x0b, 0x00]));
}

#[test]
fn the_largest_machine_fits() {
    let functions: Vec<_> = (0..32).map(|device| Bdf::new(0, device, 0).unwrap()).collect();
    // A unit for each function, and many without any.
    let units =
        (0..112).map(|n| unit(0xfed9_0000 + 4096 * n as u64, functions.get(n..=n).unwrap_or(&[])));
    let (units, ats) = (units.collect(), true);
    let iommu = IommuPlatform { units, all_functions: false, ats, ..iommu() };
    let platform = Platform { vcpus: 255, pic: true, iommu: Some(iommu), ..platform() };
    assert_eq!(tables(&platform)["APIC"].len(), 44 + 255 * 8 + 12 + 20);
    let memory = MachineMemory::new(0xe_0000).unwrap();
    assert!(write_tables(&memory, &platform).is_err(), "tables that end where there is no RAM");
}
