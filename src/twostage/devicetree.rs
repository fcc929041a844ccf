// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a device tree says of virtual SMMUs: their nodes, the functions behind each, and the
//! addresses that stage 1 must map 1:1. It is written with [`FdtWriter`]; the VMM writes the rest.
//!
//! Addresses and sizes have two cells each in the tree's root; nodes for messages refer to an
//! `arm,gic-v3-its`, and interrupts are those of an `arm,gic-v3`, of three cells.
//!
//! Source: Linux, `Documentation/devicetree/bindings`: `iommu/arm,smmu-v3.yaml`,
//! `pci/pci-iommu.txt`, `reserved-memory/reserved-memory.yaml`; IEEE 1275 PCI bus binding 2.1.
//!
//! ```
//! use twostage::devicetree::*;
//! use twostage::spec::pci::Bdf;
//!
//! let mut fdt = FdtWriter::new()?;
//! let root = fdt.begin_node("")?;
//! fdt.property_u32("#address-cells", 2)?;
//! fdt.property_u32("#size-cells", 2)?;
//! let registers = Span { start: 0x0905_0000, length: 0x2_0000 };
//! smmu(&mut fdt, &Smmu { registers, spis: Some([74, 77, 76, 75]), messages: None, phandle: 1 })?;
//! // In the node of the host bridge: everything is behind that SMMU.
//! let bridge = fdt.begin_node("pcie@10000000")?;
//! iommu_map(&mut fdt, [Behind { first: Bdf::from_raw(0), count: 0x1_0000, smmu: 1 }])?;
//! fdt.end_node(bridge)?;
//! fdt.end_node(root)?;
//! assert_eq!(fdt.finish()?[..4], [0xd0, 0x0d, 0xfe, 0xed]);
//! # Ok::<(), Error>(())
//! ```

use std::collections::BTreeMap;

use vm_fdt::FdtWriterNode;
pub use vm_fdt::{Error, FdtWriter};

use crate::spec::pci::Bdf;

/// Guest-physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The first one.
    pub start: u64,
    /// How many there are.
    pub length: u64,
}

impl Span {
    /// As the property `reg` has it.
    pub fn cells(self) -> [u64; 2] {
        [self.start, self.length]
    }
}

/// A virtual SMMUv3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Smmu {
    /// Its registers.
    pub registers: Span,
    /// Shared peripheral interrupts, edge-triggered: for the event queue, global errors, CMD_SYNC,
    /// and the PRI queue. Without, it uses MSIs only.
    pub spis: Option<[u32; 4]>,
    /// Where its own MSIs go, if it has any.
    pub messages: Option<Messages>,
    /// Its phandle.
    pub phandle: u32,
}

/// Where a device's MSIs go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Messages {
    /// Phandle of the interrupt translation service.
    pub its: u32,
    /// The device ID there.
    pub device_id: u32,
}

/// Writes the node of a virtual SMMU, whose walks are coherent: `arm,smmu-v3`.
///
/// # Errors
/// The phandle is taken, or no node is open.
pub fn smmu(fdt: &mut FdtWriter, smmu: &Smmu) -> Result<(), Error> {
    /// The first and the last of an interrupt's three cells.
    const SHARED: u32 = 0;
    const EDGE_RISING: u32 = 1;
    let node = fdt.begin_node(&format!("iommu@{:x}", smmu.registers.start))?;
    fdt.property_string("compatible", "arm,smmu-v3")?;
    fdt.property_array_u64("reg", &smmu.registers.cells())?;
    if let Some(spis) = smmu.spis {
        fdt.property_array_u32("interrupts", &spis.map(|spi| [SHARED, spi, EDGE_RISING]).concat())?;
        let names = ["eventq", "gerror", "cmdq-sync", "priq"].map(str::to_owned);
        fdt.property_string_list("interrupt-names", names.into())?;
    }
    if let Some(Messages { its, device_id }) = smmu.messages {
        fdt.property_array_u32("msi-parent", &[its, device_id])?;
    }
    fdt.property_null("dma-coherent")?;
    fdt.property_u32("#iommu-cells", 1)?;
    fdt.property_phandle(smmu.phandle)?;
    fdt.end_node(node)
}

/// Functions behind an SMMU, by requester ID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Behind {
    /// The first one.
    pub first: Bdf,
    /// How many there are.
    pub count: u32,
    /// Phandle of the SMMU.
    pub smmu: u32,
}

/// Writes the property of a PCI host bridge that says which SMMU each function is behind:
/// `iommu-map`, unless there is nothing to say. A function's StreamID is its requester ID.
///
/// # Errors
/// No node is open.
pub fn iommu_map(
    fdt: &mut FdtWriter,
    functions: impl IntoIterator<Item = Behind>,
) -> Result<(), Error> {
    let mut map = Vec::new();
    for Behind { first, count, smmu } in functions {
        let rid = u32::from(first.raw());
        map.extend([rid, smmu, rid, count]);
    }
    if map.is_empty() {
        return Ok(());
    }
    fdt.property_array_u32("iommu-map", &map)
}

/// An assigned device of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Assigned {
    /// Its address, with the number that its bus has when the guest starts.
    pub bdf: Bdf,
    /// The root port that it is behind, if it is not on the root bus.
    pub port: Option<Bdf>,
    /// The range that its IOMMU must always map 1:1: the host's MSI window.
    pub identity: Span,
}

/// Phandles for assigned devices and for what is reserved for them. Each counts up from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AssignedPhandles {
    /// Of the devices, as many as there are.
    pub devices: u32,
    /// Of the ranges, at most as many.
    pub ranges: u32,
}

/// The first of the three cells of a PCI device's address: memory below 4 GiB, not prefetchable
/// (IEEE 1275's PCI binding, 2.2.1.1).
const PCI_MEMORY: u32 = 0x0200_0000;

/// Each range of memory, with the phandles of its devices.
fn pieces(assigned: &[Assigned], first: u32) -> BTreeMap<(u64, u64), Vec<u32>> {
    let mut pieces = BTreeMap::<_, Vec<_>>::new();
    for (handle, device) in (first..).zip(assigned) {
        let Span { start, length } = device.identity;
        pieces.entry((start, length)).or_default().push(handle);
    }
    pieces
}

fn halves(value: u64) -> [u32; 2] {
    [(value >> 32) as u32, value as u32]
}

/// Writes `reserved-memory` to the root: the addresses that the IOMMUs of `assigned` must always
/// map 1:1, if any.
///
/// The host maps the MSIs of assigned devices to addresses of its own choice. If the hardware walks
/// the guest's tables first, these must map them 1:1, or MSIs are lost. The devices that
/// `iommu-addresses` refers to are written by [`assigned_functions`], with the same arguments.
///
/// # Errors
/// A phandle is taken, or no node is open.
pub fn reserved_memory(
    fdt: &mut FdtWriter,
    assigned: &[Assigned],
    phandles: AssignedPhandles,
) -> Result<(), Error> {
    if assigned.is_empty() {
        return Ok(());
    }
    let node = fdt.begin_node("reserved-memory")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_null("ranges")?;
    let pieces = pieces(assigned, phandles.devices);
    for (handle, ((start, length), devices)) in (phandles.ranges..).zip(pieces) {
        let piece = fdt.begin_node(&format!("messages@{start:x}"))?;
        // The same addresses on both sides: without `reg` they would be reserved, but not mapped.
        fdt.property_array_u64("reg", &[start, length])?;
        let addresses: Vec<_> = devices
            .into_iter()
            // In the cells of the device's bus.
            .flat_map(|device| {
                [&[device, PCI_MEMORY][..], &halves(start), &halves(length)].concat()
            })
            .collect();
        fdt.property_array_u32("iommu-addresses", &addresses)?;
        fdt.property_phandle(handle)?;
        fdt.end_node(piece)?;
    }
    fdt.end_node(node)
}

/// Writes to a PCI host bridge the nodes of the functions that [`reserved_memory`] refers to, and
/// of root ports on the way; a guest finds the functions by these nodes. Those behind one port come
/// one after the other. The nodes of ports say nothing of interrupts: a guest turns pins by the
/// device number (PCI-to-PCI Bridge Architecture 1.2, §9.1).
///
/// # Errors
/// A phandle is taken, or no node is open.
pub fn assigned_functions(
    fdt: &mut FdtWriter,
    assigned: &[Assigned],
    phandles: AssignedPhandles,
) -> Result<(), Error> {
    let pieces = pieces(assigned, phandles.devices);
    let mut handle = phandles.devices;
    for devices in assigned.chunk_by(|one, next| one.port.is_some() && one.port == next.port) {
        let port = devices.first().and_then(|device| device.port);
        let port = port.map(|port| root_port(fdt, port)).transpose()?;
        for Assigned { bdf, .. } in devices {
            let node = function(fdt, "device", *bdf)?;
            let reserved = (phandles.ranges..).zip(pieces.values());
            let reserved = reserved.filter(|(_, devices)| devices.contains(&handle));
            let reserved: Vec<_> = reserved.map(|(reserved, _)| reserved).collect();
            fdt.property_array_u32("memory-region", &reserved)?;
            fdt.property_phandle(handle)?;
            fdt.end_node(node)?;
            handle += 1;
        }
        if let Some(port) = port {
            fdt.end_node(port)?;
        }
    }
    Ok(())
}

/// A function that an SMMU can stall.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stalled {
    /// Its address, with the number that its bus has when the guest starts.
    pub bdf: Bdf,
    /// The root port that it is behind, if it is not on the root bus.
    pub port: Option<Bdf>,
}

/// Writes to a PCI host bridge the nodes of functions that an SMMU can stall (`dma-can-stall`), and
/// of the root ports that they are behind, none of which has another node.
///
/// # Errors
/// No node is open.
pub fn stalled_functions(fdt: &mut FdtWriter, functions: &[Stalled]) -> Result<(), Error> {
    for Stalled { bdf, port } in functions {
        let port = port.map(|port| root_port(fdt, port)).transpose()?;
        let node = function(fdt, "device", *bdf)?;
        fdt.property_null("dma-can-stall")?;
        fdt.end_node(node)?;
        if let Some(port) = port {
            fdt.end_node(port)?;
        }
    }
    Ok(())
}

/// Begins the node of the function at `bdf`.
fn function(fdt: &mut FdtWriter, name: &str, bdf: Bdf) -> Result<FdtWriterNode, Error> {
    let node = fdt.begin_node(&format!("{name}@{:x},{:x}", bdf.device(), bdf.function()))?;
    // Its configuration space, by bus, device and function in bits 23:8.
    fdt.property_array_u32("reg", &[u32::from(bdf.raw()) << 8, 0, 0, 0, 0])?;
    Ok(node)
}

/// Begins the node of the root port at `bdf`.
fn root_port(fdt: &mut FdtWriter, bdf: Bdf) -> Result<FdtWriterNode, Error> {
    let node = function(fdt, "pci", bdf)?;
    fdt.property_string("device_type", "pci")?;
    fdt.property_u32("#address-cells", 3)?;
    fdt.property_u32("#size-cells", 2)?;
    // The same addresses on both sides.
    fdt.property_null("ranges")?;
    Ok(node)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Span = Span { start: 0x800_0000, length: 0x10_0000 };
    const PHANDLES: AssignedPhandles = AssignedPhandles { devices: 0x10, ranges: 0x20 };

    /// The structure block of the root that `write` writes to (Devicetree Specification, §5.4).
    fn written(write: impl FnOnce(&mut FdtWriter) -> Result<(), Error>) -> Vec<u8> {
        let mut fdt = FdtWriter::new().unwrap();
        let root = fdt.begin_node("").unwrap();
        write(&mut fdt).unwrap();
        fdt.end_node(root).unwrap();
        let blob = fdt.finish().unwrap();
        let word = |at: usize| u32::from_be_bytes(blob[at..at + 4].try_into().unwrap()) as usize;
        blob[word(8)..word(8) + word(36)].to_vec()
    }

    fn has(block: &[u8], cells: &[u32]) -> bool {
        let words = block.chunks_exact(4).map(|word| u32::from_be_bytes(word.try_into().unwrap()));
        words.collect::<Vec<_>>().windows(cells.len()).any(|window| window == cells)
    }

    #[test]
    fn an_smmu_says_only_what_it_has() {
        let bare = Smmu { registers: WINDOW, spis: None, messages: None, phandle: 0x55 };
        let full = Smmu {
            spis: Some([8, 9, 10, 11]),
            messages: Some(Messages { its: 2, device_id: 0xff00 }),
            ..bare
        };
        let [bare, full] = [bare, full].map(|node| written(|fdt| smmu(fdt, &node)));
        for block in [&bare, &full] {
            assert!(block.windows(14).any(|text| text == b"iommu@8000000\0"));
            assert!(block.windows(12).any(|text| text == b"arm,smmu-v3\0"));
            assert!(has(block, &[0, 0x800_0000, 0, 0x10_0000]) && has(block, &[0x55]));
        }
        let interrupts = [0, 8, 1, 0, 9, 1, 0, 10, 1, 0, 11, 1];
        assert!(has(&full, &interrupts) && has(&full, &[2, 0xff00]));
        // Three properties fewer, of 12 bytes each and their values.
        assert_eq!(full.len() - bare.len(), (12 + 48) + (12 + 29 + 3) + (12 + 8));
    }

    #[test]
    fn nothing_is_written_of_nothing() {
        let empty = written(|_| Ok(()));
        assert_eq!(written(|fdt| iommu_map(fdt, [])), empty);
        assert_eq!(written(|fdt| reserved_memory(fdt, &[], PHANDLES)), empty);
        assert_eq!(written(|fdt| assigned_functions(fdt, &[], PHANDLES)), empty);
        assert_eq!(written(|fdt| stalled_functions(fdt, &[])), empty);
    }

    #[test]
    fn functions_that_can_be_stalled_say_so() {
        let of = |rid, port| Stalled { bdf: Bdf::from_raw(rid), port };
        let functions = [of(0x18, None), of(0x100, Some(Bdf::from_raw(0x20)))];
        let block = written(|fdt| stalled_functions(fdt, &functions));
        for name in ["device@3,0\0", "pci@4,0\0", "device@0,0\0"] {
            assert!(block.windows(name.len()).any(|text| text == name.as_bytes()), "{name}");
        }
        assert!(has(&block, &[0x1800, 0, 0, 0, 0]) && has(&block, &[0x1_0000, 0, 0, 0, 0]));
    }

    #[test]
    fn functions_are_mapped_in_ranges() {
        let behind = |first, count, smmu| Behind { first: Bdf::from_raw(first), count, smmu };
        let map = [behind(0, 0x100, 7), behind(0x100, 1, 8)];
        let block = written(|fdt| iommu_map(fdt, map));
        assert!(has(&block, &[0, 7, 0, 0x100, 0x100, 8, 0x100, 1]));
    }

    #[test]
    fn devices_and_what_is_reserved_for_them_refer_to_each_other() {
        let other = Span { start: 0x20_0000_0000, length: 0x1_0000 };
        let device = |(rid, identity): (u16, Span)| Assigned {
            bdf: Bdf::from_raw(rid),
            port: None,
            identity,
        };
        let assigned = [(8, WINDOW), (0x11, other), (0x18, WINDOW)].map(device);
        let block = written(|fdt| reserved_memory(fdt, &assigned, PHANDLES));
        let window = [0x200_0000, 0, 0x800_0000, 0, 0x10_0000];
        assert!(has(&block, &[&[0x10], &window[..], &[0x12], &window].concat()));
        assert!(has(&block, &[0x11, 0x200_0000, 0x20, 0, 0, 0x1_0000]));
        // Devices in their order: configuration space, and the range's phandle.
        let block = written(|fdt| assigned_functions(fdt, &assigned, PHANDLES));
        for (at, range) in [(0x800, 0x20), (0x1100, 0x21), (0x1800, 0x20)] {
            assert!(has(&block, &[at, 0, 0, 0, 0]) && has(&block, &[range]), "{at:#x}");
        }
    }

    #[test]
    fn a_device_behind_a_root_port_is_in_the_port_s_node() {
        let bdf = |raw: u16| Bdf::from_raw(raw);
        let device = |rid, port: Option<u16>| Assigned {
            bdf: bdf(rid),
            port: port.map(bdf),
            identity: WINDOW,
        };
        let assigned = [device(0x100, Some(0x18)), device(0x101, Some(0x18)), device(0x20, None)];
        let block = written(|fdt| assigned_functions(fdt, &assigned, PHANDLES));
        // FDT_BEGIN_NODE and a name, FDT_END_NODE.
        let count = |text: &[u8]| block.windows(text.len()).filter(|at| *at == text).count();
        let names = ["pci@3,0\0", "device@0,0\0", "device@0,1\0", "device@4,0\0"];
        let at = names.map(|name| block.windows(name.len()).position(|at| at == name.as_bytes()));
        assert!(at.iter().all(Option::is_some) && at.is_sorted(), "{at:?}");
        assert_eq!(count(b"pci@3,0\0"), 1);
        assert!(has(&block, &[0x1800, 0, 0, 0, 0]) && has(&block, &[0x1_0100, 0, 0, 0, 0]));
        // Two ends before the device on the root bus: of the last function, and of the port.
        assert!(has(&block[..at[3].unwrap()], &[2, 2, 1]));
        for handle in [0x10, 0x11, 0x12] {
            assert!(has(&block, &[handle]), "{handle:#x}");
        }
    }

    #[test]
    fn a_phandle_is_given_once() {
        let mut fdt = FdtWriter::new().unwrap();
        fdt.begin_node("").unwrap();
        let node = Smmu { registers: WINDOW, spis: None, messages: None, phandle: 1 };
        smmu(&mut fdt, &node).unwrap();
        assert_eq!(smmu(&mut fdt, &node), Err(Error::DuplicatePhandle));
    }
}
