// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a device says of itself: what it was made with.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use super::backend::{Kind, SECTORS};
use super::driver::Driver;

/// Where its configuration is.
const CONFIG: u64 = 0x2000;

/// The ID of a disk in `file`: which file it is, in all bytes that an ID has.
pub fn disk_id(file: &File) -> [u8; 20] {
    let metadata = file.metadata().expect("it is open");
    let text = format!("{:x}-{:x}", metadata.dev(), metadata.ino());
    let mut id = [0; 20];
    id.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
    id
}

impl Driver {
    /// The capacity of a disk and the number of its queues, or the address of a network.
    pub(super) fn check_identity(&self) {
        let config = [0, 8, 16, 24, 32].map(|at| self.read(CONFIG + at, 8));
        match &self.kind {
            Kind::Blk { .. } => {
                assert_eq!(config[0], SECTORS, "the capacity");
                // Behind them are others.
                assert_eq!(config[4] >> 16 & 0xffff, self.read(0x12, 2), "how many queues");
            }
            Kind::Net(wire) => assert_eq!(config[0].to_le_bytes()[..6], wire.mac),
            Kind::Rng => assert_eq!(config, [0; 5], "it has none"),
        }
    }
}
