// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The firmware tables that describe an IOMMU to a guest with ACPI, in the form of [`acpi_tables`],
//! which has neither: [`dmar`] for VT-d, [`iort`] for SMMUv3. The VMM writes them to memory, and
//! lists them in its XSDT.
//!
//! An arm64 machine with an assigned device, whose MSIs go to the host's window:
//!
//! ```
//! use twostage::acpi::iort::*;
//! use twostage::acpi::Aml;
//!
//! let mut iort = IORT::new(*b"VENDOR", *b"MACHINE ", 1);
//! let its = iort.add_its_group(&[0])?;
//! let gsivs = Gsivs { event: 106, gerror: 109, ..Gsivs::default() };
//! let mut smmu = Smmuv3::new(0x0905_0000).interrupts(gsivs);
//! smmu.add_mapping(IdMapping::to_its(0..=0xffff, 0, its));
//! let smmu = iort.add_smmuv3(&smmu)?;
//! let mut root_complex = RootComplex::new(0);
//! root_complex.add_mapping(IdMapping::to_smmu(0..=0xffff, 0, smmu));
//! iort.add_root_complex(&root_complex)?;
//! // The function 00:01.0.
//! let mut window = ReservedMemory::new(MemoryAttributes::Device);
//! window.add_range(0x0800_0000, 0x10_0000);
//! window.add_stream(0x0008, smmu);
//! iort.add_reserved_memory(&window)?;
//!
//! let mut bytes = Vec::new();
//! iort.to_aml_bytes(&mut bytes);
//! assert_eq!(bytes[..4], *b"IORT");
//! # Ok::<(), IortError>(())
//! ```

pub mod dmar;
pub mod iort;

pub use acpi_tables::{Aml, AmlSink};
