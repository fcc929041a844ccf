// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel's host, with an educational device of QEMU's.

use std::env;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use twostage::iommufd::KernelHost;

use super::{check, Engine, Subject};

#[allow(dead_code)] // shared with programs that use more of it
#[path = "../../preload/program/uapi.rs"]
mod uapi;

/// The device, and what keeps it bound.
struct Edu {
    device: uapi::Device,
    _bound: Arc<File>,
}

impl Engine for Edu {
    fn load(&mut self, iova: u64) {
        self.device.fetch(iova, 8);
    }

    fn store(&mut self, iova: u64) {
        self.device.store(iova, 8);
    }
}

/// Checks `/dev/iommu` with the device `TWOSTAGE_CONTRACT_DEVICE`.
pub fn check_named() {
    let Ok(device) = env::var("TWOSTAGE_CONTRACT_DEVICE") else {
        let text = "skipped: TWOSTAGE_CONTRACT_DEVICE names no edu behind vfio-pci";
        // Bypasses the harness, which only shows the output of failed tests.
        writeln!(std::io::stderr(), "{text}").expect("standard error");
        return;
    };
    let host = KernelHost::open(Path::new("/dev/iommu")).expect("/dev/iommu");
    let host = Arc::new(host);
    let of_device = host.clone();
    let engine = move |dev| -> Box<dyn Engine> {
        let file = of_device.device_file(dev).expect("it is bound");
        let mut device = uapi::Device::from(file.try_clone().expect("a descriptor"));
        device.start().expect("its registers");
        Box::new(Edu { device, _bound: file })
    };
    check(&Subject { host, device, engine: Box::new(engine) });
}
