// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Messages of assigned devices that do not arrive, because the guest's stage 1 does not lead to where
//! the host has put the doorbell of its interrupt controller.
//!
//! On arm64 a message is a write that the SMMU translates like every other. Linux puts the doorbell at
//! an address of its own (`MSI_IOVA_BASE` in its SMMU driver), tells the device that one, and
//! maps it in stage 2. So the guest has to map the same address to itself in stage 1, as it is told:
//! by reserved memory of the device tree, or an RMR node of the IORT. One that does not gets a
//! translation fault for each message, and its driver waits forever.
#![forbid(unsafe_code)]

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use crate::spec::smmuv3::event::{EventId, EventRecord};
use crate::viommu::smmuv3::{EventRecordWords, EventTarget};

/// Where Linux has the doorbells, in the address spaces of all devices.
pub const MSI_WINDOW: RangeInclusive<u64> = 0x800_0000..=0x80f_ffff;

/// Brings events to a virtual SMMUv3, and says once when a message of an assigned device is among them.
pub struct DoorbellWatch {
    target: Arc<dyn EventTarget>,
    told: AtomicBool,
}

impl DoorbellWatch {
    /// A way to `target`.
    pub fn new(target: Arc<dyn EventTarget>) -> Self {
        Self { target, told: AtomicBool::new(false) }
    }
}

impl EventTarget for DoorbellWatch {
    fn event(&self, record: EventRecordWords) {
        if is_lost_message(record) && !self.told.swap(true, Ordering::Relaxed) {
            let EventRecord { input_address, .. } = EventRecord::from_words(record);
            let stream = EventRecord::from_words(record).stream();
            log::warn!(
                "an interrupt of the assigned device with {stream} is lost: it is a write to \
                 {input_address:#x}, which the guest does not map. It has to map {:#x}..={:#x} to \
                 itself for the device, as the device tree tells (iommu-addresses); more such \
                 interrupts are not told",
                MSI_WINDOW.start(),
                MSI_WINDOW.end()
            );
        }
        self.target.event(record);
    }

    fn events_lost(&self) {
        self.target.events_lost();
    }
}

impl fmt::Debug for DoorbellWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DoorbellWatch").field("told", &self.told).finish_non_exhaustive()
    }
}

/// Whether the event is of a write to the window that leads nowhere, or must not be written.
fn is_lost_message(record: EventRecordWords) -> bool {
    let record = EventRecord::from_words(record);
    let refused = matches!(
        record.id(),
        Some(EventId::Translation | EventId::Permission | EventId::AddressSize | EventId::Access)
    );
    refused && !record.qw1.rnw() && MSI_WINDOW.contains(&record.input_address)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::spec::smmuv3::StreamId;

    #[derive(Default)]
    struct Target(Mutex<Vec<EventRecordWords>>);

    impl EventTarget for Target {
        fn event(&self, record: EventRecordWords) {
            self.0.lock().unwrap().push(record);
        }

        fn events_lost(&self) {
            self.0.lock().unwrap().push([0; 4]);
        }
    }

    fn event(id: EventId, address: u64, read: bool) -> EventRecordWords {
        let mut record = EventRecord::new(id, StreamId(8), None);
        record.input_address = address;
        record.qw1 = record.qw1.with_rnw(read);
        record.to_words()
    }

    #[test]
    fn a_refused_write_to_the_doorbell_is_a_lost_message() {
        assert!(is_lost_message(event(EventId::Translation, 0x800_0040, false)));
        assert!(is_lost_message(event(EventId::Permission, 0x80f_ffff, false)));
        assert!(!is_lost_message(event(EventId::Translation, 0x800_0040, true)), "a read");
        assert!(!is_lost_message(event(EventId::Translation, 0x810_0000, false)), "beyond");
        assert!(!is_lost_message([u64::MAX; 4]));
    }

    #[test]
    fn every_event_is_passed_on_and_the_first_lost_message_is_told() {
        let target = Arc::new(Target::default());
        let watch = DoorbellWatch::new(target.clone());
        let lost = event(EventId::Translation, 0x800_0040, false);
        watch.event(event(EventId::Translation, 0x1000, false));
        assert!(!watch.told.load(Ordering::Relaxed));
        watch.event(lost);
        assert!(watch.told.load(Ordering::Relaxed));
        watch.event(lost);
        watch.events_lost();
        assert_eq!(target.0.lock().unwrap()[1..], [lost, lost, [0; 4]]);
    }
}
