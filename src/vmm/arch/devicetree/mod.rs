// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device tree, which describes the machine to a guest without ACPI.
//!
//! Source: Devicetree Specification 0.4; Linux, `Documentation/devicetree/bindings`, by the names
//! in `compatible`.

mod nodes;

use std::ops::RangeInclusive;

use crate::boot::Module;
use twostage::devicetree::{self, AssignedPhandles, Error, FdtWriter, Messages};

pub use twostage::devicetree::{Assigned, Span, Stalled};

/// Cells of an address, and of a size, of 32 bits each.
const ADDRESS_CELLS: u32 = 2;
const SIZE_CELLS: u32 = 2;

/// Phandles. Those of node types with several instances count up from here.
const GIC: u32 = 1;
const ITS: u32 = 2;
const BUS_CLOCK: u32 = 3;
const FIRST_SMMU: u32 = 0x100;
/// Those of reserved memory follow those of devices, of which bus 0 has fewer.
const ASSIGNED: AssignedPhandles = AssignedPhandles { devices: 0x1000, ranges: 0x2000 };

/// What the tree describes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform<'a> {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// RAM.
    pub memory: Vec<Span>,
    /// The kernel's command line, without a zero byte.
    pub cmdline: &'a str,
    /// The initramfs.
    pub initramfs: Option<Module>,
    /// The interrupt controller.
    pub gic: Gic,
    /// The serial port.
    pub serial: Serial,
    /// Registers of a PL031 real-time clock.
    pub clock: Span,
    /// The PCI host bridge.
    pub pci: Pci,
    /// The virtual SMMUs.
    pub smmus: Vec<Smmu>,
    /// Assigned devices of the host.
    pub assigned: Vec<Assigned>,
    /// Functions that an SMMU can stall.
    pub stalled: Vec<Stalled>,
}

/// A GICv3 with one interrupt translation service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gic {
    /// Registers of the distributor.
    pub distributor: Span,
    /// Registers of the redistributors, one after the other.
    pub redistributors: Span,
    /// Registers of the interrupt translation service.
    pub its: Span,
}

/// A 16550.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Serial {
    /// Its registers, of a byte each.
    pub registers: Span,
    /// Its shared peripheral interrupt, edge-triggered.
    pub spi: u32,
}

/// A PCI host bridge with one root bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pci {
    /// Configuration space.
    pub ecam: Span,
    /// The last bus.
    pub last_bus: u8,
    /// Where memory BARs are.
    pub mmio: Span,
    /// The shared peripheral interrupts for the pins of the devices, round-robin: a power of two of
    /// them. Only INTA is wired, except behind bridges.
    pub intx: Vec<u32>,
}

/// A virtual SMMUv3.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Smmu {
    /// Its registers.
    pub registers: Span,
    /// Shared peripheral interrupts, edge-triggered: for the event queue, global errors, and
    /// CMD_SYNC. Without, it uses MSIs only.
    pub spis: Option<[u32; 4]>,
    /// Its device ID at the interrupt translation service.
    pub device_id: u32,
    /// The requester IDs behind it, which are also StreamIDs.
    pub requesters: Vec<RangeInclusive<u16>>,
}

/// The flattened tree of `platform`.
///
/// # Errors
/// A string contains a zero byte, or the tree is too large.
pub fn tree(platform: &Platform<'_>) -> Result<Vec<u8>, Error> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_string("compatible", "linux,dummy-virt")?;
    fdt.property_string("model", "twostage")?;
    fdt.property_u32("#address-cells", ADDRESS_CELLS)?;
    fdt.property_u32("#size-cells", SIZE_CELLS)?;
    fdt.property_u32("interrupt-parent", GIC)?;
    nodes::chosen(&mut fdt, platform)?;
    for span in &platform.memory {
        let node = fdt.begin_node(&format!("memory@{:x}", span.start))?;
        fdt.property_string("device_type", "memory")?;
        fdt.property_array_u64("reg", &span.cells())?;
        fdt.end_node(node)?;
    }
    devicetree::reserved_memory(&mut fdt, &platform.assigned, ASSIGNED)?;
    nodes::processors(&mut fdt, platform.vcpus)?;
    nodes::gic(&mut fdt, &platform.gic)?;
    nodes::serial(&mut fdt, &platform.serial)?;
    nodes::clock(&mut fdt, platform.clock)?;
    for (phandle, smmu) in (FIRST_SMMU..).zip(&platform.smmus) {
        let Smmu { registers, spis, device_id, .. } = *smmu;
        let messages = Some(Messages { its: ITS, device_id });
        devicetree::smmu(&mut fdt, &devicetree::Smmu { registers, spis, messages, phandle })?;
    }
    nodes::host_bridge(&mut fdt, platform)?;
    fdt.end_node(root)?;
    fdt.finish()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use twostage::spec::pci::Bdf;

    fn span(start: u64, length: u64) -> Span {
        Span { start, length }
    }

    fn platform() -> Platform<'static> {
        Platform {
            vcpus: 2,
            memory: vec![span(0x4000_0000, 0x2000_0000)],
            cmdline: "console=ttyS0",
            initramfs: None,
            gic: Gic {
                distributor: span(0xc00_0000, 0x1_0000),
                redistributors: span(0xd00_0000, 0x4_0000),
                its: span(0xc10_0000, 0x2_0000),
            },
            serial: Serial { registers: span(0x900_0000, 0x1000), spi: 1 },
            clock: span(0x902_0000, 0x1000),
            pci: Pci {
                ecam: span(0xf00_0000, 0x10_0000),
                last_bus: 0,
                mmio: span(0x1000_0000, 0x3000_0000),
                intx: vec![4, 5, 6, 7],
            },
            smmus: Vec::new(),
            assigned: Vec::new(),
            stalled: Vec::new(),
        }
    }

    fn smmu(functions: &[u16]) -> Smmu {
        let requesters = functions.iter().map(|function| *function..=*function).collect();
        let registers = span(0xa00_0000, 0x2_0000);
        Smmu { registers, spis: Some([8, 9, 10, 11]), device_id: 0xff00, requesters }
    }

    /// A tree, by the paths of its nodes.
    struct Tree(BTreeMap<String, BTreeMap<String, Vec<u8>>>);

    impl Tree {
        /// Parses the tree of `platform` (Devicetree Specification 0.4, chapter 5).
        fn of(platform: &Platform<'_>) -> Self {
            let blob = tree(platform).unwrap();
            let word = |at: usize| u32::from_be_bytes(blob[at..at + 4].try_into().unwrap());
            let text = |at: usize| {
                let end = at + blob[at..].iter().position(|byte| *byte == 0).unwrap();
                String::from_utf8(blob[at..end].to_vec()).unwrap()
            };
            assert_eq!((word(0), word(4) as usize), (0xd00d_feed, blob.len()));
            let strings = word(12) as usize;
            let (mut at, mut path, mut nodes) = (word(8) as usize, Vec::new(), BTreeMap::new());
            loop {
                let token = word(at);
                at += 4;
                match token {
                    1 => {
                        path.push(text(at));
                        at = (at + text(at).len() + 1).next_multiple_of(4);
                        nodes.insert(path.join("/"), BTreeMap::new());
                    }
                    2 => drop(path.pop().unwrap()),
                    3 => {
                        let (length, name) =
                            (word(at) as usize, text(strings + word(at + 4) as usize));
                        let value = blob[at + 8..at + 8 + length].to_vec();
                        nodes.get_mut(&path.join("/")).unwrap().insert(name, value);
                        at = (at + 8 + length).next_multiple_of(4);
                    }
                    9 => break,
                    token => panic!("token {token} at {at:#x}"),
                }
            }
            Self(nodes)
        }

        fn cells(&self, node: &str, property: &str) -> Vec<u32> {
            let cell = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
            self.0[node][property].chunks_exact(4).map(cell).collect()
        }

        fn text(&self, node: &str, property: &str) -> &str {
            std::str::from_utf8(&self.0[node][property]).unwrap().trim_end_matches('\0')
        }

        /// Number of nodes and properties whose name ends with this.
        fn count(&self, name: &str) -> usize {
            let properties = self.0.values().flat_map(BTreeMap::keys);
            self.0.keys().chain(properties).filter(|key| key.ends_with(name)).count()
        }
    }

    #[test]
    fn a_small_machine_is_described() {
        let tree = Tree::of(&platform());
        assert_eq!(tree.text("/chosen", "bootargs"), "console=ttyS0");
        assert_eq!(tree.text("/chosen", "stdout-path"), "/serial@9000000");
        assert_eq!(tree.cells("/memory@40000000", "reg"), [0, 0x4000_0000, 0, 0x2000_0000]);
        assert_eq!((tree.cells("/cpus/cpu@1", "reg"), tree.count("cpu@2")), (vec![1], 0));
        assert_eq!(tree.text("/psci", "method"), "hvc");
        assert_eq!(tree.cells("/timer", "interrupts").len(), 4 * 3);
        assert_eq!(tree.cells("/serial@9000000", "interrupts"), [0, 1, 1]);
        let clock = "/rtc@9020000";
        assert_eq!(tree.text(clock, "compatible"), "arm,pl031\0arm,primecell");
        assert_eq!(tree.cells(clock, "reg"), [0, 0x902_0000, 0, 0x1000]);
        assert_eq!(tree.cells(clock, "clocks"), tree.cells("/apb-pclk", "phandle"));
        let gic = "/interrupt-controller@c000000";
        assert_eq!(
            tree.cells(gic, "reg"),
            [0, 0xc00_0000, 0, 0x1_0000, 0, 0xd00_0000, 0, 0x4_0000]
        );
        let its = format!("{gic}/msi-controller@c100000");
        assert_eq!(tree.text(&its, "compatible"), "arm,gic-v3-its");
        // References point to existing nodes.
        assert_eq!(tree.cells("", "interrupt-parent"), tree.cells(gic, "phandle"));
        assert_eq!(tree.cells("/pcie@f000000", "msi-map")[1..2], tree.cells(&its, "phandle"));
        for name in ["iommu-map", "reserved-memory", "linux,initrd-start"] {
            assert_eq!(tree.count(name), 0, "{name}");
        }
    }

    #[test]
    fn an_initramfs_is_told_by_both_its_ends() {
        let initramfs = Some(Module { start: 0x5000_0000, length: 0x1234 });
        let tree = Tree::of(&Platform { initramfs, ..platform() });
        assert_eq!(tree.cells("/chosen", "linux,initrd-start"), [0, 0x5000_0000]);
        assert_eq!(tree.cells("/chosen", "linux,initrd-end"), [0, 0x5000_1234]);
    }

    #[test]
    fn a_cmdline_with_a_zero_byte_is_an_error() {
        assert!(tree(&Platform { cmdline: "a\0b", ..platform() }).is_err());
    }

    #[test]
    fn every_pin_leads_to_a_line() {
        let tree = Tree::of(&platform());
        let map = tree.cells("/pcie@f000000", "interrupt-map");
        // A child's address and pin, the parent, its address and its three cells.
        let entries: Vec<_> = map.chunks_exact(3 + 1 + 1 + 2 + 3).collect();
        assert_eq!(entries.len(), 4);
        assert_eq!(entries[2], [2 << 11, 0, 0, 1, GIC, 0, 0, 0, 6, 4]);
        assert_eq!(tree.cells("/pcie@f000000", "interrupt-map-mask"), [3 << 11, 0, 0, 7]);
    }

    #[test]
    fn with_bridges_every_pin_and_a_whole_bus_are_led_on() {
        let pci = Pci { last_bus: 2, ..platform().pci };
        let requesters = vec![0x100..=0x100, 0x200..=0x2ff];
        let smmus = vec![Smmu { requesters, ..smmu(&[]) }];
        let tree = Tree::of(&Platform { pci, smmus, ..platform() });
        assert_eq!(tree.cells("/pcie@f000000", "bus-range"), [0, 2]);
        let map = tree.cells("/pcie@f000000", "interrupt-map");
        let entries: Vec<_> = map.chunks_exact(3 + 1 + 1 + 2 + 3).collect();
        assert_eq!(entries.len(), 16);
        // INTC of device 3.
        assert_eq!(entries[14], [3 << 11, 0, 0, 3, GIC, 0, 0, 0, 5, 4]);
        let behind = [0x100, FIRST_SMMU, 0x100, 1, 0x200, FIRST_SMMU, 0x200, 0x100];
        assert_eq!(tree.cells("/pcie@f000000", "iommu-map"), behind);
    }

    #[test]
    fn the_memory_window_has_the_same_addresses_on_both_sides() {
        let window = Tree::of(&platform()).cells("/pcie@f000000", "ranges");
        assert_eq!(window, [0x0200_0000, 0, 0x1000_0000, 0, 0x1000_0000, 0, 0x3000_0000]);
    }

    #[test]
    fn functions_are_behind_the_smmu_that_says_so() {
        let other = Smmu { registers: span(0xa02_0000, 0x2_0000), ..smmu(&[0x18]) };
        let tree = Tree::of(&Platform { smmus: vec![smmu(&[8, 0x10]), other], ..platform() });
        let (first, second) = ("/iommu@a000000", "/iommu@a020000");
        let [first_handle, second_handle] =
            [first, second].map(|node| tree.cells(node, "phandle")[0]);
        assert_ne!(first_handle, second_handle);
        assert_eq!(
            tree.cells("/pcie@f000000", "iommu-map"),
            [8, first_handle, 8, 1, 0x10, first_handle, 0x10, 1, 0x18, second_handle, 0x18, 1]
        );
        assert_eq!(tree.cells(first, "interrupts"), [0, 8, 1, 0, 9, 1, 0, 10, 1, 0, 11, 1]);
        assert_eq!(tree.text(first, "interrupt-names"), "eventq\0gerror\0cmdq-sync\0priq");
        assert_eq!(tree.cells(first, "msi-parent"), [ITS, 0xff00]);
    }

    /// The whole tree, by its length and its FNV-1a sum: no guest is told anything else because
    /// code moves. Whoever changes what the machine tells its guests changes the numbers.
    #[test]
    fn a_full_machine_is_described_byte_for_byte_as_before() {
        let other = Smmu { registers: span(0xa02_0000, 0x2_0000), spis: None, ..smmu(&[0x18]) };
        let windows = [span(0x800_0000, 0x10_0000), span(0x20_0000_0000, 0x1_0000)];
        let device = |(rid, window): (u16, usize)| Assigned {
            bdf: Bdf::from_raw(rid),
            port: None,
            identity: windows[window],
        };
        let tree = tree(&Platform {
            vcpus: 17,
            initramfs: Some(Module { start: 0x5000_0000, length: 0x1234 }),
            smmus: vec![smmu(&[8, 0x10]), other],
            assigned: [(8, 0), (0x11, 1), (0x18, 0)].map(device).to_vec(),
            ..platform()
        })
        .unwrap();
        let sum = tree.iter().fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
            (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
        });
        assert_eq!((tree.len(), sum), (4747, 0xe34c_512a_145c_9976), "{sum:#x}");
    }

    #[test]
    fn assigned_devices_have_their_messages_led_to_the_same_addresses() {
        let messages = span(0x800_0000, 0x10_0000);
        let (port, identity) = (None, messages);
        let device = |rid| Assigned { bdf: Bdf::from_raw(rid), port, identity };
        let tree = Tree::of(&Platform { assigned: vec![device(8), device(0x11)], ..platform() });
        let (one, two) = ("/pcie@f000000/device@1,0", "/pcie@f000000/device@2,1");
        assert_eq!(tree.cells(two, "reg"), [0x1100, 0, 0, 0, 0]);
        let piece = "/reserved-memory/messages@8000000";
        assert_eq!(tree.cells(piece, "reg"), [0, 0x800_0000, 0, 0x10_0000]);
        let handles = [one, two].map(|node| tree.cells(node, "phandle")[0]);
        let led = handles.map(|handle| [handle, 0x200_0000, 0, 0x800_0000, 0, 0x10_0000]).concat();
        assert_eq!(tree.cells(piece, "iommu-addresses"), led);
        for node in [one, two] {
            assert_eq!(tree.cells(node, "memory-region"), tree.cells(piece, "phandle"));
        }
    }
}
