// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The iommufd verbs as a trait, in the terms of `linux/iommufd.h`.
//!
//! [`HostIommu`] is implemented by the kernel's `/dev/iommu` and by the emulated host of package
//! `twostage-emulated`. Errors are Linux's errno with the verb and the object.
mod error;
#[cfg(any(test, feature = "test-support"))]
#[doc(hidden)]
pub mod fake;
mod forwarding;
mod host;
#[cfg(feature = "kernel")]
mod kernel;
mod memory;
mod types;

pub use error::{Errno, HostError, Result, Verb};
pub use forwarding::{CountedHost, FailNth, VerbCounters, VerbObserver};
pub use host::{EventQueue, FaultQueue, FaultSink, HostIommu, PageRequestGroup, Readiness};
#[cfg(feature = "kernel")]
pub use kernel::{KernelHost, OpenError};
pub use memory::{DirtyMark, MemoryMap, MemorySlice, MemoryWord, UserMemory, UserMemoryError};
pub use types::*;
