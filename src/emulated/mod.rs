// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The emulated host: iommufd's objects and an IOMMU with caches, in this process.
//!
//! Its object half ([`EmulatedHost`]) behaves as Linux's iommufd does: creation rules, reference
//! counts, errno, partial results. Its hardware half walks stage 1 through stage 2 and caches what
//! hardware may cache, so that a forgotten invalidation shows.

mod dma;
mod gate;
mod graph;
mod hardware;
mod host;
mod ioas;
mod objects;
mod port_iommu;
mod refusal;
mod stage2;
pub mod uapi;
mod unmapping;
mod user_space;
mod vtd;

pub use dma::{DmaAccess, DmaAttributes, DmaError, DmaPort, Translated};
pub use graph::{GraphEdge, GraphObject, ObjectGraph};
pub use host::EmulatedHost;
pub use objects::{DeviceConfig, MachineError, ObjectKind, UnitId};
pub use port_iommu::PortIommu;
pub use vtd::{AddressWidth, VtdCounters, VtdUnit, VtdUnitConfig};
