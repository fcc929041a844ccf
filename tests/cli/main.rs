// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The `twostage` command from outside: bad input, small guests, signals.
//!
//! Guests are assembled here. Tests that need `/dev/kvm` print that, and pass, without it.

#[path = "../common/child.rs"]
mod child;
#[path = "../common/code.rs"]
mod code;
#[path = "../../src/vmm/arch/x86_64/boot/test_images.rs"]
mod images;

mod guests;
mod jail;
mod offers;
mod options;

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use child::{kernel, kvm, signal, spawn, with_default_signals, TWOSTAGE};
use images::{bzimage, multiboot, pvh};
use tempfile::{NamedTempFile, TempDir};
use twostage::patience::wait_until;
use twostage::skips::not_tested;
use twostage_vmm::exit_code::{
    GUEST_RESET, GUEST_STUCK, IO_ERROR, NO_INPUT, OS_ERROR, UNAVAILABLE, USAGE,
};

fn twostage(args: &[&str]) -> Output {
    with_default_signals(TWOSTAGE).args(args).stdin(Stdio::null()).output().unwrap()
}

fn text(path: &NamedTempFile) -> &str {
    path.path().to_str().unwrap()
}

/// The command failed with `code` and one line that contains `hint`.
fn assert_refused(output: &Output, code: u8, hint: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code.into()), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with("twostage: error: "), "{stderr}");
    assert!(stderr.contains(hint), "'{stderr}' does not say '{hint}'");
    assert!(output.stdout.is_empty());
}
