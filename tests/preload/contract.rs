// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The contract of hosts, of the kernel's host over `libtwostage_iommufd.so`: every ioctl that it
//! makes meets an iommufd.

#[path = "../host_contract/contract/mod.rs"]
mod contract;

use std::path::PathBuf;
use std::process::Command;

/// The last of the tests here again, under the library and with a device.
fn under_the_library(device: &str) {
    let program = std::env::current_exe().expect("the test's own path");
    let library: PathBuf = program.with_file_name("libtwostage_iommufd.so");
    assert!(library.exists(), "no {}", library.display());
    // A run that hangs is a failure, not a wait.
    let mut command = Command::new("timeout");
    command.arg("60").arg(program).args(["--exact", "kernel", "--nocapture"]);
    command.env("LD_PRELOAD", library).env_remove("TWOSTAGE_IOMMUFD");
    let output = command.env("TWOSTAGE_CONTRACT_DEVICE", device).output().expect("a process");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("contract: nesting on VT-d"),
        "{}\n{text}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn a_device_with_pasids() {
    under_the_library("/dev/vfio/devices/vfio0");
}

#[test]
fn a_device_without_pasids() {
    under_the_library("/dev/vfio/devices/vfio1");
}

#[test]
fn kernel() {
    contract::kernel::check_named();
}
