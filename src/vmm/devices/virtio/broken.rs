// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors that stop a device.

use crate::devices::NotNow;

/// Why a device cannot continue: its driver has to reset it.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// A ring cannot be accessed, or its contents are inconsistent.
    #[error("virtqueue: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// The available ring cannot be read.
    #[error("virtqueue: the available ring cannot be read")]
    Available,
    /// The queue's areas cannot be accessed.
    #[error("virtqueue {0}: its areas are not memory that the device can reach")]
    Areas(usize),
    /// A descriptor chain is malformed.
    #[error("descriptor chain: {0}")]
    Chain(&'static str),
    /// A request has no status byte, or it cannot be accessed.
    #[error("the status of a request cannot be written")]
    Status,
    /// The device itself cannot start or continue.
    #[error("{0}")]
    Device(String),
}

/// Why serving a queue stopped.
#[derive(Debug, thiserror::Error)]
pub enum Unserved {
    /// The device may make no requests now. What was popped and not returned is popped again later.
    #[error(transparent)]
    NotNow(#[from] NotNow),
    /// The device cannot continue.
    #[error(transparent)]
    Broken(#[from] Broken),
}

impl From<virtio_queue::Error> for Unserved {
    fn from(error: virtio_queue::Error) -> Self {
        Self::Broken(error.into())
    }
}
