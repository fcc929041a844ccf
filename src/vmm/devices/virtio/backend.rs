// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a device does, independent of its transport.

use std::os::fd::RawFd;

use virtio_bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::chain::{Broken, Unserved};
use super::memory::DeviceMemory;
use super::queue::Virtqueue;

/// Feature bits, of a device or of a driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features(pub u64);

impl Features {
    /// Union with `other`.
    #[must_use]
    pub const fn with(self, number: u32) -> Self {
        Self(self.0 | 1 << number)
    }

    /// Whether the feature with this number is set.
    pub const fn has(self, number: u32) -> bool {
        self.0 >> number & 1 != 0
    }

    /// What every device offers (virtio 1.3 §6): version 1, indirect descriptors, event indices,
    /// and behind an IOMMU, ACCESS_PLATFORM.
    pub const fn of_transport(behind_iommu: bool) -> Self {
        let features = Self(0)
            .with(VIRTIO_F_VERSION_1)
            .with(VIRTIO_RING_F_INDIRECT_DESC)
            .with(VIRTIO_RING_F_EVENT_IDX);
        match behind_iommu {
            true => features.with(VIRTIO_F_ACCESS_PLATFORM),
            false => features,
        }
    }
}

/// The properties of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    /// Its name in log lines and reports.
    pub name: &'static str,
    /// Device type (§5).
    pub device_type: u16,
    /// PCI base class, sub-class and programming interface, from bit 23 down.
    pub class: u32,
    /// Features offered in addition to [`Features::of_transport`].
    pub features: Features,
    /// Maximum size of each queue: powers of two.
    pub queue_sizes: &'static [u16],
    /// Its configuration space, which does not change.
    pub config: Vec<u8>,
}

/// The device function. It runs on a thread of its own.
pub trait Backend: Send {
    /// The properties of the device; always the same.
    fn model(&self) -> Model;

    /// What of the host serves its requests, for reports.
    fn served_by(&self) -> Option<&'static str> {
        None
    }

    /// What of the host it uses, by its name there, for messages.
    fn host(&self) -> String;

    /// The driver is ready and accepted `features`.
    ///
    /// # Errors
    /// The device cannot do that; it then needs a reset.
    fn start(&mut self, features: Features) -> Result<(), Broken>;

    /// What becomes readable when there is external input. Queried once after each start. It is
    /// edge-triggered, so all input is read until there is no more.
    fn input(&self) -> Option<RawFd> {
        None
    }

    /// Serves a bounded part of queue `number`. Returns whether there may be more.
    ///
    /// # Errors
    /// The device needs a reset, or may not make requests now: it is then called again when it may,
    /// and buffers that were popped, and neither kept nor returned, are back in the queue.
    fn serve(
        &mut self,
        number: usize,
        queues: &mut [Virtqueue],
        memory: &mut DeviceMemory,
    ) -> Result<bool, Unserved>;

    /// The queue that is served when there is input.
    fn input_queue(&self) -> usize {
        0
    }

    /// The device stops, for now. When this returns, nothing that it was asked for is under way at
    /// the host, which this waits for.
    fn stop(&mut self) {}
}
