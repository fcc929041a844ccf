// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Faults of the world around `twostage run`: files and pipes that cannot be written, limits of the
//! process, disks that fail or hang, taps that are removed, signals. What goes on is seen from the
//! guest, and each test has the line that the user sees.
//!
//! Guests are assembled here, or are the bare-metal guest, which does what it is told. Tests that
//! need `/dev/kvm` print that, and pass, without it.

#[path = "../common/built.rs"]
mod built;
#[path = "../common/child.rs"]
mod child;
#[path = "../common/code.rs"]
mod code;
#[path = "../../src/vmm/arch/x86_64/boot/test_images.rs"]
mod images;

mod disks;
mod documentation;
mod fuse;
mod guest;
mod hangs;
mod kills;
mod limits;
mod outputs;
mod signals;
mod stops;
mod taps;
mod world;

use std::path::Path;
use std::process::{Command, Stdio};

use child::{with_default_signals, TWOSTAGE};

/// Runs the command after `before` in a shell, with more options.
fn run_after(before: &str, kernel: &Path, more: &[&str]) -> Command {
    let mut command = with_default_signals("sh");
    let script = format!("{before}; exec \"$0\" \"$@\"");
    command.args(["-c", &script, TWOSTAGE, "run", "--kernel"]).arg(kernel);
    for option in [["--report", "none"], ["--memory", "size=16M"]] {
        if !more.contains(&option[0]) {
            command.args(option);
        }
    }
    command.args(more);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}
