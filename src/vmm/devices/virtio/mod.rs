// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Virtio devices (OASIS Virtio 1.3): block, network and entropy, over PCI.
//!
//! vCPU threads work on the transport ([`VirtioPci`]); from DRIVER_OK to the reset, a worker thread
//! owns the device's [`Backend`] and queues. A device accesses memory only through its
//! [`DeviceMemory`]: rings and buffers in sections, which are bounded pieces of work that do not
//! wait, each permitted by the device's [`RequestGate`](super::RequestGate). So an invalidation of
//! the IOMMU returns when no copy by an older translation is under way, clearing bus mastering or a
//! reset stops the device in the middle of a request, and none of them waits for a disk or a
//! network.
//!
//! Mistakes of the driver in registers are ignored; mistakes in queues make the device need a
//! reset.

mod backend;
mod blk;
mod chain;
#[cfg(test)]
mod interrupted_tests;
mod link;
mod memory;
mod net;
mod pci;
mod queue;
mod rng;
#[cfg(test)]
mod testing;
mod worker;

pub use backend::Backend;
#[cfg(feature = "test-support")]
pub use backend::Features;
pub use blk::{Block, Disk, DiskAccess, DiskError, MAX_QUEUES};
#[cfg(feature = "test-support")]
pub use blk::{Faults, Outcome};
pub use link::{QueueCounters, QueueReport};
pub use memory::DeviceMemory;
#[cfg(feature = "test-support")]
pub use net::FrameLink;
pub use net::{MacAddress, Net, Tap, TapError};
pub use pci::{Doorbells, KvmDoorbells, VirtioPci, BAR_SIZE};
pub use rng::Rng;
pub use worker::none_is_left_behind;
