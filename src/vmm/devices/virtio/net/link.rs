// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a network device is connected to.

use std::io;
use std::os::fd::AsRawFd;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
};

use super::Tap;
use crate::devices::virtio::backend::Features;

/// Features of the driver, and the tap interface's flags for them.
const OFFLOADS: [(u32, u32); 4] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
];

/// Source and sink of frames, each with a virtio-net header in front. Nothing blocks; the file
/// descriptor is readable when there is a frame.
pub trait FrameLink: AsRawFd + Send {
    /// Receives a frame.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    fn receive(&mut self, data: &mut [u8]) -> io::Result<usize>;

    /// Sends a frame.
    ///
    /// # Errors
    /// The system's error; the frame is dropped.
    fn send(&mut self, frame: &[u8]) -> io::Result<()>;

    /// Received frames may be as a driver that accepted `features` takes them: with partial
    /// checksums, or longer than the MTU.
    ///
    /// # Errors
    /// The system's error.
    fn set_offloads(&mut self, features: Features) -> io::Result<()>;
}

impl FrameLink for Tap {
    fn receive(&mut self, data: &mut [u8]) -> io::Result<usize> {
        Tap::receive(self, data)
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        Tap::send(self, frame)
    }

    fn set_offloads(&mut self, features: Features) -> io::Result<()> {
        // The others depend on the first (virtio 1.3 §5.1.3.1).
        let flags = match features.has(VIRTIO_NET_F_GUEST_CSUM) {
            true => {
                OFFLOADS.iter().filter(|(bit, _)| features.has(*bit)).map(|(_, flag)| flag).sum()
            }
            false => 0,
        };
        self.set_offload(flags)
    }
}
