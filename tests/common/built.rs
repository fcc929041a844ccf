// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bare-metal test guest, built here if necessary.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The directory of the guest images, built once.
pub fn images() -> &'static Path {
    static IMAGES: OnceLock<PathBuf> = OnceLock::new();
    IMAGES.get_or_init(|| {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest-images");
        let status = Command::new("make")
            .arg("-C")
            .arg(sources.join("vtd-check"))
            .status()
            .expect("make builds the guest; 'make guest' installs what it needs");
        assert!(status.success(), "the guest does not build");
        sources.join("build")
    })
}
