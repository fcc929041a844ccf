// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The files behind emulated descriptors: iommufds, VFIO devices and groups, event queues.

pub mod device;
pub mod edu;
pub mod events;
#[cfg(feature = "selftest")]
pub mod fail_nth;
pub mod file;
pub mod group;
pub mod groups;
pub mod iommufd;
pub mod msi;
pub mod opener;
pub mod test_file;
pub mod waiting;
