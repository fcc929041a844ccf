// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a PCI Express device has, and its resets; and an IOMMU with narrow addresses.

use super::{expect, log, preloaded, PROGRAM};

#[test]
fn a_pci_express_device_has_messages_errors_and_memory() {
    expect(
        &["express", "/dev/vfio/devices/vfio0"],
        &[
            "unbound: errno 22",
            "region 0: flags 3, 0x100000",
            "region 1: flags 3, 0x1000",
            "region 2: flags 7, 0x4000",
            "region 3: flags 0, 0x0",
            "region 7: flags 3, 0x1000",
            "interrupts 0: ok, flags 7, 1",
            "interrupts 1: ok, flags 9, 1",
            "interrupts 2: ok, flags 1, 4",
            "interrupts 3: ok, flags 9, 1",
            "interrupts 4: ok, flags 9, 1",
            "interrupts 5: errno 22, flags 9, 1",
            "map registers: errno 22",
            "map the table: errno 22",
            "map a copy: errno 22",
            "map past the end: errno 22",
            "map too much: errno 22",
            "map all: ok",
            "written to the page: 0x1234",
            "the page has: 0x5678",
            "the table: 0xffffffffffffffff",
            "more than there are: errno 22",
            "MSI-X: ok",
            "raised: [1, 0, 0], [0, 1, 1]",
            "by the program: ok",
            "MSI beside: errno 22",
            "raised: [1, 1, 0]",
            "off: ok",
            "raised: [0, 0, 0]",
            "index 3: ok, ok, 1",
            "index 4: ok, ok, 1",
            "no migration: errno 25",
            "is it there: ok",
            "of what is no memory: errno 95",
            "of no BAR: errno 19",
            "half a page of it: errno 19",
            "half a page: errno 22",
            "too much: errno 22",
            "past 2^64: errno 75",
            "neither read nor set: errno 22",
            "memory space is off: errno 19",
            "on: ok",
            "fetch true, store true",
            "moved: 7",
            "off: read errno 5",
            "it stays lost: fetch false",
            "unmap: ok",
            "again: ok",
            "fetch true, reset 0, fetch false",
            "command: 0x406",
            "unmap: ok",
            "after the reset: ok, fetch true",
            "unmap: ok",
            "another's descriptor: true",
            "reset: 0, the page has 0x0",
            "hot reset: errno 19",
            "bind again: errno 22",
            "unmapped: ok",
        ],
    );
}

/// In Linux a port above the device resets the bus.
#[test]
fn the_bus_of_a_device_is_reset() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let text = "[[iommu]]\nname = 'a'\nmodel = 'vtd'\n[[device]]\nvfio = 5\niommu = 'a'\n\
                address = '01:00.1'\ngroup = 3\nexpress = true\n";
    std::fs::write(file.path(), text).expect("written");
    let arguments = ["hot-reset", "/dev/vfio/devices/vfio5", "/dev/vfio/3", "0000:01:00.1"];
    let lines = log(preloaded(PROGRAM, &arguments).env("TWOSTAGE_IOMMUFD", file.path()));
    assert_eq!(
        lines,
        [
            "info: errno 22, flags 7, 7 devices, at 0x0",
            "info: errno 28, flags 0, 1 devices, at 0x0",
            "info: ok, flags 3, 1 devices, at 0x1010000",
            "its own: true",
            "by a group: errno 22",
            "reset: ok, 0x0",
            "info: ok, flags 0, 1 devices, at 0x1010000",
            "in group 3",
            "by 0 others: errno 22",
            "by 1 others: errno 9",
            "by 1 others: errno 22",
            "by 2 others: errno 22",
            "command: 0x2",
            "reset: ok, 0x0",
            "command: 0x2",
        ]
    );
}

/// As in desktops: the second stage has three levels. A first stage has four all the same, but only
/// half of 39 bits, as addresses are sign-extended; a nested walk goes through both.
#[test]
fn a_vtd_of_39_bits() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let text = "[[iommu]]\nname = 'a'\nmodel = 'vtd'\naddress-width = 39\n\
                [[device]]\nvfio = 5\niommu = 'a'\naddress = '00:04.0'\n";
    std::fs::write(file.path(), text).expect("written");
    let run = |program| {
        let mut command = preloaded(PROGRAM, &[program, "/dev/vfio/devices/vfio5"]);
        log(command.env("TWOSTAGE_IOMMUFD", file.path()))
    };
    assert_eq!(run("flow"), include_str!("vtd-flow.txt").lines().collect::<Vec<_>>());
    assert_eq!(
        run("addresses"),
        [
            "CAP.MGAW 39, CAP.SAGAW 0x2",
            "from 0x0 to 0xfedfffff",
            "from 0xfef00000 to 0x3fffffffff",
            "map the last page: ok",
            "past it: errno 22",
            "fetch true, past it false",
            "store true",
            "moved 0x1111",
            "second stage: to 0x7fffffffff, past it: errno 22",
            "tables that lead past it: fetch false",
            "within: fetch true",
        ]
    );
    let mut wider = preloaded(PROGRAM, &["addresses", "/dev/vfio/devices/vfio0"]);
    let wider = log(wider.env_remove("TWOSTAGE_IOMMUFD"));
    assert_eq!(wider[0], "CAP.MGAW 48, CAP.SAGAW 0x6");
}
