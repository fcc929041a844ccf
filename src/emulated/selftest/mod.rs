// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What Linux's iommufd selftests need besides the uAPI: `IOMMU_TEST_CMD`, and a mock IOMMU with
//! mock devices.
//!
//! The kernel has these in `drivers/iommu/iommufd/selftest.c`, for its
//! `tools/testing/selftests/iommu`; ordinary kernels do not contain them, nor do ordinary builds of
//! this crate. The mock IOMMU moves no data. It has small pages and a small aperture, caches that a
//! test can inspect, and failures that a test can request. It uses the same rules for objects as
//! every other driver: nothing here depends on the test.
//!
//! ```text
//! operations (ioas, devices, checks …) ──► objects ──► driver ──► domain, viommu
//!                                                         └─────► devices
//! ```

mod abi;
mod access;
mod checks;
mod devices;
mod domain;
mod driver;
mod operations;
#[cfg(test)]
mod tests;
mod viommu;

pub use crate::host::refusal::{fail_nth, set_fail_nth};

use iommufd_bindings::IOMMUFD_CMD_BASE;

use crate::uapi::{Operation, TestOperations};

/// All of it, for the uAPI.
pub(crate) static OPERATIONS: TestOperations = TestOperations {
    command: Operation {
        number: IOMMUFD_CMD_BASE + abi::COMMAND,
        size: abi::SIZE,
        min_size: abi::MIN_SIZE,
        run: |host, argument, process| operations::run(host, argument, process),
    },
    convert: access::convert_copy,
};
