// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The iommufd verbs as a trait, in the terms of `linux/iommufd.h`.
//!
//! [`HostIommu`] is implemented by the kernel's `/dev/iommu` and by the emulated host of package
//! `twostage-emulated`. Errors are Linux's errno with the verb and the object.
mod counted;
mod error;
mod fail_nth;
#[cfg(any(test, feature = "test-support"))]
#[doc(hidden)]
pub mod fake;
mod forwarding;
mod host;
#[cfg(feature = "kernel")]
mod kernel;
mod memory;
mod queues;
mod types;

pub use counted::{CountedHost, VerbCounters, VerbObserver};
pub use error::{Errno, HostError, Result, Verb};
pub use fail_nth::FailNth;
pub use host::{FaultSink, HostIommu};
#[cfg(feature = "kernel")]
pub use kernel::{KernelHost, OpenError};
pub use memory::{UserMemory, UserMemoryError};
pub use queues::{EventQueue, FaultQueue, PageRequestGroup, Readiness};
pub use types::*;
