// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The emulated host: iommufd's objects and an IOMMU with caches, in this process.
//!
//! A [`Machine`] has IOMMUs and devices; any number of iommufds ([`EmulatedHost`]) can be opened on
//! it. Their objects behave like Linux's: creation rules, reference counts, errno, partial results.
//! As in Linux, architecture-specific parts are in drivers. The hardware half walks stage 1 through
//! stage 2 and caches what hardware may cache, so that a forgotten invalidation shows.
//!
//! A complete test of nesting: a user's page table on top of an IOAS, a DMA through both stages,
//! and a changed entry, which has no effect before the invalidation.
//!
//! ```
//! use std::sync::Arc;
//! use twostage_emulated::{DeviceConfig, DmaAttributes, EmulatedHost, VtdUnit, VtdUnitConfig};
//! use twostage::iommufd::*;
//! use twostage::spec::pci::Bdf;
//! use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress};
//!
//! let host = EmulatedHost::new();
//! let unit = host.add_unit(VtdUnit::new(VtdUnitConfig::default()));
//! host.add_device("nic", unit, Bdf::new(0, 4, 0).expect("an address"), DeviceConfig::default())?;
//! let memory = Arc::new(GuestRegionMmap::<()>::from_range(GuestAddress(0), 0x10000, None)?);
//! let store = |address, value: u64| memory.write_obj(value, MemoryRegionAddress(address));
//!
//! // Stage 2: the guest's memory at 0. Stage 1: four levels of tables, IOVA 0x1000 to page 0x8000.
//! let (dev, ioas) = (host.device_bind("nic")?, host.ioas_alloc()?);
//! let whole = UserMemory::whole(memory.clone());
//! host.ioas_map(ioas, &whole, MapTarget::Fixed(0), Protection::READ_WRITE)?;
//! for table in [0x1000, 0x2000, 0x3000] {
//!     store(table, (table + 0x1000) | 7)?;
//! }
//! let entry = 0x4008;
//! store(entry, 0x8000 | 7)?;
//! let (flags, fault) = (HwptFlags::new().with_nest_parent(true), None);
//! let parent = HwptAlloc { flags, dev, pt: ioas, data: HwptData::None, fault };
//! let pt = host.hwpt_alloc(&parent)?;
//! let tables = iommu_hwpt_vtd_s1 { pgtbl_addr: 0x1000, addr_width: 48, ..Default::default() };
//! let data = HwptData::VtdS1(tables);
//! let nested = host.hwpt_alloc(&HwptAlloc { flags: HwptFlags::new(), dev, pt, data, fault })?;
//! host.device_attach(dev, None, nested)?;
//!
//! let mut port = host.dma_port("nic").expect("the device");
//! let mut write = |value| port.write(DmaAttributes::default(), 0x1000, &[value]);
//! let load = |address| memory.read_obj::<u8>(MemoryRegionAddress(address));
//! write(1)?;
//! assert_eq!(load(0x8000)?, 1);
//! store(entry, 0x9000 | 7)?;
//! write(2)?; // stale
//! assert_eq!((load(0x8000)?, load(0x9000)?), (2, 0));
//! let page = [iommu_hwpt_vtd_s1_invalidate { addr: 0x1000, npages: 1, ..Default::default() }];
//! host.hwpt_invalidate(nested, InvalidateData::VtdS1(&page))?;
//! write(3)?;
//! assert_eq!((load(0x8000)?, load(0x9000)?), (2, 3));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Features
//!
//! None is on by default.
//!
//! * `serde`: `Serialize` for the counters and graphs that reports carry, and the feature of the
//!   same name of `twostage`.
//! * `selftest`: the mock driver and the test operations that Linux's own iommufd selftests drive.
//!   It is not for ordinary builds, and may change in any version.
//! * `test-kit`: guest drivers of the virtual IOMMUs, for tests. It may change in any version.
//!
//! # Versions
//!
//! As in [`twostage`]: a configuration is, for example, `DeviceConfig::default().with_ats(true)`.
#![cfg_attr(docsrs, feature(doc_cfg))]
#![deny(missing_docs)]
#![warn(missing_debug_implementations)]

mod dma;
mod drivers;
pub mod edu;
mod host;
mod ioas;
#[cfg(feature = "test-kit")]
pub mod kit;
pub mod maps;
#[cfg(feature = "selftest")]
pub mod selftest;
pub mod uapi;
mod units;

/// Whole programs, which `make test` runs: a VMM of a page, with its guest and a device.
#[cfg(all(doc, not(doctest)))]
pub mod examples {
    #![doc = concat!("# `vtd`\n\n```\n", include_str!("examples/vtd.rs"), "```\n")]
    #![doc = concat!("# `smmuv3`\n\n```\n", include_str!("examples/smmuv3.rs"), "```\n")]
    #![doc = concat!("# `virtqueue`\n\n```\n", include_str!("examples/virtqueue.rs"), "```\n")]
    #![doc = concat!("# `restore`\n\n```\n", include_str!("examples/restore.rs"), "```\n")]
}

/// The test ioctl of Linux's selftests, which ordinary builds do not have.
#[cfg(feature = "selftest")]
const TEST_OPERATIONS: Option<&uapi::TestOperations> = Some(&selftest::OPERATIONS);
#[cfg(not(feature = "selftest"))]
const TEST_OPERATIONS: Option<&uapi::TestOperations> = None;

pub use dma::control::{DeviceControl, DmaServices};
pub use dma::error::{DmaError, DmaFaultReason};
pub use dma::memory::{DmaMemory, DmaSection};
pub use dma::port_iommu::PortIommu;
pub use dma::{DmaAccess, DmaAttributes, DmaPort, PageTries, Translated};
pub use host::access::{Access, AccessError};
pub use host::context::{MappedPages, MmapRequest};
pub use host::device::DeviceConfig;
pub use host::dma_buf::DmaBuf;
pub use host::emulated_host::EmulatedHost;
pub use host::event_file::EventFile;
pub use host::graph::{GraphEdge, GraphObject, ObjectGraph};
pub use host::machine::{EmulatedUnit, Machine, MachineError, UnitId};
pub use host::objects::{AccessUnmap, ObjectKind};
pub use units::engine::{
    ContextInvalidation, ContextTables, DmaWay, InvalidatedPages, SanitizerReport, StaleContext,
    StaleUse, TlbInvalidation,
};
pub use units::smmuv3::{SmmuV3Counters, SmmuV3Unit, SmmuV3UnitConfig};
pub use units::vtd::{AddressWidth, VtdCounters, VtdUnit, VtdUnitConfig};
