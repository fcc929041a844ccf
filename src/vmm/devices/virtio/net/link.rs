// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a network device is connected to.

use std::io;
use std::os::fd::AsRawFd;

use super::Tap;

/// Where frames come from and go to, each with a virtio-net header in front. Nothing waits; the
/// file descriptor is readable when there is a frame.
pub trait FrameLink: AsRawFd + Send {
    /// Receives a frame.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    fn receive(&mut self, data: &mut [u8]) -> io::Result<usize>;

    /// Sends a frame.
    ///
    /// # Errors
    /// What the system says; the frame is lost.
    fn send(&mut self, frame: &[u8]) -> io::Result<()>;

    /// Whether frames may come in whose checksums are not complete.
    ///
    /// # Errors
    /// What the system says.
    fn set_partial_checksums(&mut self, partial: bool) -> io::Result<()>;
}

impl FrameLink for Tap {
    fn receive(&mut self, data: &mut [u8]) -> io::Result<usize> {
        Tap::receive(self, data)
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        Tap::send(self, frame)
    }

    fn set_partial_checksums(&mut self, partial: bool) -> io::Result<()> {
        self.set_offload(if partial { libc::TUN_F_CSUM } else { 0 })
    }
}
