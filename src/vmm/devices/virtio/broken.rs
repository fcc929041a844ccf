// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What ends the work of a device.

use crate::devices::NotNow;

/// Why a device cannot go on: its driver has to reset it.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// A ring cannot be reached, or what is in it contradicts itself.
    #[error("virtqueue: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// The available ring cannot be read.
    #[error("virtqueue: the available ring cannot be read")]
    Available,
    /// The queue's areas cannot be reached.
    #[error("virtqueue {0}: its areas are not memory that the device can reach")]
    Areas(usize),
    /// A descriptor chain is malformed.
    #[error("descriptor chain: {0}")]
    Chain(&'static str),
    /// A request has nowhere to put its status, or that place cannot be reached.
    #[error("the status of a request cannot be written")]
    Status,
    /// The device itself cannot start or go on.
    #[error("{0}")]
    Device(String),
}

/// Why a queue is not served further.
#[derive(Debug, thiserror::Error)]
pub enum Unserved {
    /// The device may make no requests now. What was taken and not given back is taken again when
    /// it may.
    #[error(transparent)]
    NotNow(#[from] NotNow),
    /// The device cannot go on.
    #[error(transparent)]
    Broken(#[from] Broken),
}

impl From<virtio_queue::Error> for Unserved {
    fn from(error: virtio_queue::Error) -> Self {
        Self::Broken(error.into())
    }
}
