// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The files behind emulated descriptors: iommufds, VFIO devices and groups, event queues.

pub mod config_space;
pub mod device;
pub mod edu;
#[cfg(feature = "selftest")]
pub mod fail_nth;
pub mod features;
pub mod file;
pub mod function;
pub mod group;
pub mod info;
pub mod iommufd;
pub mod irqs;
pub mod users;
