// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The emulated host: iommufd's objects and an IOMMU with caches, in this process.
//!
//! A [`Machine`] has IOMMUs and devices; any number of iommufds ([`EmulatedHost`]) are opened on
//! it. Their objects behave as Linux's do: creation rules, reference counts, errno, partial
//! results. What is an architecture's own is behind a driver, as in Linux. The hardware half walks
//! stage 1 through stage 2 and caches what hardware may cache, so that a forgotten invalidation
//! shows.

mod access;
mod bitmap;
mod context;
mod device;
mod dirty;
mod dma;
mod dma_buf;
mod driver;
mod event_file;
mod events;
mod gate;
mod graph;
mod hardware;
mod host;
mod ioas;
mod machine;
mod mapped_pages;
mod mmaps;
mod objects;
mod port_iommu;
mod process;
mod refusal;
#[cfg(feature = "selftest")]
mod selftest;
mod stage2;
pub mod uapi;
mod unmapping;
mod user_space;
mod vtd;

pub use access::{Access, AccessError};
pub use device::DeviceConfig;
pub use dma::{DmaAccess, DmaAttributes, DmaError, DmaPort, Translated};
pub use dma_buf::DmaBuf;
pub use event_file::EventFile;
pub use graph::{GraphEdge, GraphObject, ObjectGraph};
pub use host::EmulatedHost;
pub use machine::{Machine, MachineError, UnitId};
pub use mapped_pages::{MappedPages, MmapRequest};
pub use objects::{AccessUnmap, ObjectKind};
pub use port_iommu::PortIommu;
pub use vtd::{
    AddressWidth, ContextTables, DmaWay, InvalidatedPages, SanitizerReport, StaleContext, StaleUse,
    VtdCounters, VtdUnit, VtdUnitConfig,
};
