// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Common configuration (virtio 1.3 §4.1.4.3): feature negotiation, status, and queue setup.
//!
//! Registers only: nothing here waits or touches memory. Out-of-order or out-of-range accesses by
//! the driver are a [`Mistake`] and change nothing.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1,
};

use crate::devices::virtio::backend::Features;
use crate::devices::virtio::link::Link;
use crate::devices::virtio::queue::QueueSetup;

/// Size of the structure, without the fields of features that are not offered.
pub(super) const COMMON_SIZE: u32 = 0x38;

// Status bits are the low byte of the u32 values in the bindings.
const ACKNOWLEDGE: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
const DRIVER: u8 = VIRTIO_CONFIG_S_DRIVER as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;

/// A field of the structure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    DeviceFeatureSelect,
    DeviceFeature,
    DriverFeatureSelect,
    DriverFeature,
    ConfigMsixVector,
    NumQueues,
    DeviceStatus,
    ConfigGeneration,
    QueueSelect,
    QueueSize,
    QueueMsixVector,
    QueueEnable,
    QueueNotifyOff,
    /// One of the three addresses of a queue, or one half of it.
    Address(Area, Part),
}

/// What a queue address points to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Area {
    Descriptors,
    Available,
    Used,
}

/// The part of an address that is accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Low,
    High,
    All,
}

impl Field {
    /// The field that an access of `length` bytes at `offset` selects. Drivers access each field
    /// with its own width, and 64-bit fields also by halves (§4.1.3.1).
    fn at(offset: u64, length: usize) -> Option<Self> {
        Some(match (offset, length) {
            (0x00, 4) => Self::DeviceFeatureSelect,
            (0x04, 4) => Self::DeviceFeature,
            (0x08, 4) => Self::DriverFeatureSelect,
            (0x0c, 4) => Self::DriverFeature,
            (0x10, 2) => Self::ConfigMsixVector,
            (0x12, 2) => Self::NumQueues,
            (0x14, 1) => Self::DeviceStatus,
            (0x15, 1) => Self::ConfigGeneration,
            (0x16, 2) => Self::QueueSelect,
            (0x18, 2) => Self::QueueSize,
            (0x1a, 2) => Self::QueueMsixVector,
            (0x1c, 2) => Self::QueueEnable,
            (0x1e, 2) => Self::QueueNotifyOff,
            (0x20..=0x37, 4 | 8) => {
                let area = match offset & !7 {
                    0x20 => Area::Descriptors,
                    0x28 => Area::Available,
                    _ => Area::Used,
                };
                let part = match (offset & 7, length) {
                    (0, 8) => Part::All,
                    (0, _) => Part::Low,
                    (4, 4) => Part::High,
                    _ => return None,
                };
                Self::Address(area, part)
            }
            _ => return None,
        })
    }
}

/// A mistake of the driver, which was ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Mistake {
    #[error("no field of the common configuration has {length} bytes at {offset:#x}")]
    Field { offset: u64, length: usize },
    #[error("a read-only field was written")]
    ReadOnly,
    #[error("features were chosen after FEATURES_OK")]
    LateFeatures,
    #[error("features {0:#x} were chosen, which are not all offered or lack what is needed")]
    Features(u64),
    #[error("status {to:#x} does not follow status {from:#x}")]
    Status { from: u8, to: u8 },
    #[error("queue {0} does not exist")]
    NoQueue(u16),
    #[error("queue {0} was set up before FEATURES_OK, or after it was enabled")]
    QueueOrder(u16),
    #[error("queue {0} cannot have {1} descriptors")]
    QueueSize(u16, u16),
    #[error("queue {0} was enabled by a value other than 1")]
    QueueEnable(u16),
    #[error("queue {0}: an address is not aligned")]
    QueueAlignment(u16),
}

/// What a write triggers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing beyond the registers.
    None,
    /// The driver is ready: start.
    Start,
    /// Reset the device.
    Reset,
}

/// The register state set by the driver. Vectors are in [`Link`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct CommonConfig {
    offered: Features,
    device_feature_select: u32,
    driver_feature_select: u32,
    accepted: Features,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueSetup>,
}

impl CommonConfig {
    /// The registers of a device after reset.
    pub fn new(offered: Features, queue_sizes: &[u16]) -> Self {
        let queue = |max_size: &u16| QueueSetup {
            max_size: *max_size,
            size: *max_size,
            enabled: false,
            descriptors: 0,
            available: 0,
            used: 0,
        };
        Self {
            offered,
            device_feature_select: 0,
            driver_feature_select: 0,
            accepted: Features::default(),
            status: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(queue).collect(),
        }
    }

    /// The features that the driver accepted.
    pub fn accepted(&self) -> Features {
        self.accepted
    }

    /// The queues as the driver set them up.
    pub fn queues(&self) -> &[QueueSetup] {
        &self.queues
    }

    /// Resets it to its initial state.
    pub fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max_size).collect();
        *self = Self::new(self.offered, &sizes);
    }

    /// Whether `data`, written at `offset`, resets the device.
    pub fn is_reset(offset: u64, data: &[u8]) -> bool {
        Field::at(offset, data.len()) == Some(Field::DeviceStatus) && data == [0]
    }

    /// The driver reads `length` bytes at `offset`.
    pub fn read(&self, offset: u64, length: usize, link: &Link) -> Result<u64, Mistake> {
        let field = Field::at(offset, length).ok_or(Mistake::Field { offset, length })?;
        let queue = self.queues.get(usize::from(self.queue_select));
        Ok(match field {
            Field::DeviceFeatureSelect => self.device_feature_select.into(),
            Field::DeviceFeature => word(self.offered, self.device_feature_select).into(),
            Field::DriverFeatureSelect => self.driver_feature_select.into(),
            Field::DriverFeature => word(self.accepted, self.driver_feature_select).into(),
            Field::ConfigMsixVector => link.config_vector().into(),
            // A device has few queues.
            Field::NumQueues => self.queues.len() as u64,
            Field::DeviceStatus => {
                let needs_reset = if link.needs_reset() { NEEDS_RESET } else { 0 };
                (self.status | needs_reset).into()
            }
            // The configurations here never change.
            Field::ConfigGeneration => 0,
            Field::QueueSelect => self.queue_select.into(),
            // Size 0 means that there is no such queue.
            Field::QueueSize => queue.map_or(0, |queue| queue.size).into(),
            Field::QueueMsixVector => link.queue_vector(self.queue_select.into()).into(),
            Field::QueueEnable => queue.is_some_and(|queue| queue.enabled).into(),
            Field::QueueNotifyOff => self.queue_select.into(),
            Field::Address(area, part) => {
                let address = queue.map_or(0, |queue| match area {
                    Area::Descriptors => queue.descriptors,
                    Area::Available => queue.available,
                    Area::Used => queue.used,
                });
                match part {
                    Part::All => address,
                    Part::Low => address & u64::from(u32::MAX),
                    Part::High => address >> 32,
                }
            }
        })
    }

    /// The driver writes `length` bytes of `value` at `offset`.
    pub fn write(
        &mut self,
        offset: u64,
        length: usize,
        value: u64,
        link: &Link,
    ) -> Result<Effect, Mistake> {
        let field = Field::at(offset, length).ok_or(Mistake::Field { offset, length })?;
        match field {
            // Values have as many bits as their fields, whose lengths were checked.
            Field::DeviceFeatureSelect => self.device_feature_select = value as u32,
            Field::DriverFeatureSelect => self.driver_feature_select = value as u32,
            Field::DriverFeature => self.accept(value as u32)?,
            Field::ConfigMsixVector => link.set_config_vector(value as u16),
            Field::DeviceStatus => return self.set_status(value as u8, link),
            Field::QueueSelect => self.queue_select = value as u16,
            Field::QueueMsixVector => {
                if self.queues.get(usize::from(self.queue_select)).is_none() {
                    return Err(Mistake::NoQueue(self.queue_select));
                }
                link.set_queue_vector(self.queue_select.into(), value as u16);
            }
            Field::QueueSize => {
                let number = self.queue_select;
                let queue = self.queue_to_set_up()?;
                let size = value as u16;
                if !size.is_power_of_two() || size > queue.max_size {
                    return Err(Mistake::QueueSize(number, size));
                }
                queue.size = size;
            }
            Field::Address(area, part) => {
                let queue = self.queue_to_set_up()?;
                let address = match area {
                    Area::Descriptors => &mut queue.descriptors,
                    Area::Available => &mut queue.available,
                    Area::Used => &mut queue.used,
                };
                *address = match part {
                    Part::All => value,
                    Part::Low => *address >> 32 << 32 | value,
                    Part::High => *address & u64::from(u32::MAX) | value << 32,
                };
            }
            Field::QueueEnable => self.enable_queue(value)?,
            Field::DeviceFeature
            | Field::NumQueues
            | Field::ConfigGeneration
            | Field::QueueNotifyOff => return Err(Mistake::ReadOnly),
        }
        Ok(Effect::None)
    }

    fn accept(&mut self, value: u32) -> Result<(), Mistake> {
        if self.status & FEATURES_OK != 0 {
            return Err(Mistake::LateFeatures);
        }
        let value = u64::from(value);
        self.accepted.0 = match self.driver_feature_select {
            0 => self.accepted.0 >> 32 << 32 | value,
            1 => self.accepted.0 & u64::from(u32::MAX) | value << 32,
            // No features beyond these words; accepting none of them is fine.
            _ if value == 0 => self.accepted.0,
            _ => return Err(Mistake::Features(value)),
        };
        Ok(())
    }

    /// The driver may advance by one or more steps, and go back only to the start (§3.1.1).
    fn set_status(&mut self, to: u8, link: &Link) -> Result<Effect, Mistake> {
        if to == 0 {
            return Ok(Effect::Reset);
        }
        let from = self.status;
        let refused = Err(Mistake::Status { from, to });
        // Drivers write back what they read: NEEDS_RESET is the device's own.
        let to = to & !NEEDS_RESET;
        let known = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
        if from & !to != 0 || to & !known != 0 {
            return refused;
        }
        let new = to & !from;
        self.status |= new & (ACKNOWLEDGE | DRIVER | FAILED);
        if new & FEATURES_OK != 0 {
            if self.status & DRIVER == 0 {
                return refused;
            }
            if !self.acceptable() {
                // FEATURES_OK stays clear: the driver reads it back.
                return Err(Mistake::Features(self.accepted.0));
            }
            self.status |= FEATURES_OK;
        }
        if new & DRIVER_OK != 0 {
            if self.status & FEATURES_OK == 0 {
                return refused;
            }
            self.status |= DRIVER_OK;
            link.set_driver_ok(true);
            return Ok(Effect::Start);
        }
        Ok(Effect::None)
    }

    /// Whether the device supports what the driver accepted: nothing that was not offered, no
    /// legacy driver, and none that would pass GPAs where IOVAs are needed (§6.2).
    fn acceptable(&self) -> bool {
        let needed = [VIRTIO_F_VERSION_1, VIRTIO_F_ACCESS_PLATFORM];
        self.accepted.0 & !self.offered.0 == 0
            && needed.iter().all(|&bit| !self.offered.has(bit) || self.accepted.has(bit))
    }

    /// The selected queue, if it may be set up now.
    fn queue_to_set_up(&mut self) -> Result<&mut QueueSetup, Mistake> {
        let number = self.queue_select;
        let ready = self.status & FEATURES_OK != 0 && self.status & DRIVER_OK == 0;
        let queue = self.queues.get_mut(usize::from(number)).ok_or(Mistake::NoQueue(number))?;
        match ready && !queue.enabled {
            true => Ok(queue),
            false => Err(Mistake::QueueOrder(number)),
        }
    }

    fn enable_queue(&mut self, value: u64) -> Result<(), Mistake> {
        let number = self.queue_select;
        let queue = self.queue_to_set_up()?;
        if value != 1 {
            return Err(Mistake::QueueEnable(number));
        }
        // §2.7.
        let aligned =
            queue.descriptors % 16 == 0 && queue.available % 2 == 0 && queue.used % 4 == 0;
        if !aligned {
            return Err(Mistake::QueueAlignment(number));
        }
        queue.enabled = true;
        Ok(())
    }
}

/// A feature word; there is nothing beyond the second.
fn word(features: Features, select: u32) -> u32 {
    match select {
        0 => features.0 as u32,
        1 => (features.0 >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests;
