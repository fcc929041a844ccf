// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The contract of hosts, for the kernel's host with `libtwostage_iommufd.so`, which must support
//! every ioctl that it makes.

#[path = "../host_contract/contract/mod.rs"]
mod contract;
mod passed;
mod vfio_ioctls;

use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs the test `name` of this program under the library; returns its output.
fn under_the_library(name: &str, set_up: impl FnOnce(&mut Command)) -> String {
    let program = std::env::current_exe().expect("the test's own path");
    let library: PathBuf = program.with_file_name("libtwostage_iommufd.so");
    assert!(library.exists(), "no {}", library.display());
    // A run that hangs fails instead of blocking.
    let mut command = Command::new("timeout");
    command.arg("300").arg(program).args(["--exact", name, "--nocapture", "--include-ignored"]);
    command.env("LD_PRELOAD", library).env_remove("TWOSTAGE_IOMMUFD");
    set_up(&mut command);
    let output = command.output().expect("a process");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{}\n{text}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text.into_owned()
}

/// Checks the contract with a device of the machine that a file describes, or of the default one;
/// that must reach the check called `expected`.
fn check(device: &str, machine: Option<&Path>, expected: &str) {
    let text = under_the_library("kernel", |command| {
        command.env("TWOSTAGE_CONTRACT_DEVICE", device);
        command.envs(machine.map(|file| ("TWOSTAGE_IOMMUFD", file)));
    });
    assert!(text.contains(expected), "{text}");
}

#[test]
fn a_device_with_pasids() {
    check("/dev/vfio/devices/vfio0", None, "contract: nesting on VT-d");
}

#[test]
fn a_device_without_pasids() {
    check("/dev/vfio/devices/vfio1", None, "contract: nesting on VT-d");
}

#[test]
fn a_device_behind_an_smmu() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let text = "[[iommu]]\nname = 'smmu'\nmodel = 'smmuv3'\n\
                [[device]]\nvfio = 3\niommu = 'smmu'\naddress = '00:04.0'\n";
    std::fs::write(file.path(), text).expect("written");
    let device = "/dev/vfio/devices/vfio3";
    check(device, Some(file.path()), "contract: nesting on SMMUv3");
}

#[test]
fn kernel() {
    contract::check_kernel();
}
