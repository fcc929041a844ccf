// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Detects MSIs of assigned devices that are lost because the guest's stage 1 does not map the
//! host's MSI doorbell.
//!
//! On arm64 an MSI is a write that the SMMU translates like any other. Linux maps the doorbell in
//! stage 2 at a fixed IOVA (`MSI_IOVA_BASE` in its SMMU driver) and programs the device with it. So
//! the guest must map that address 1:1 in stage 1, as told by reserved memory of the device tree,
//! or an RMR node of the IORT. Otherwise each MSI causes a translation fault, and its driver waits
//! forever.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use twostage::spec::smmuv3::event::{EventId, EventRecord};
use twostage::viommu::smmuv3::{EventRecordWords, EventTarget};

/// Linux's default window for MSIs in the address spaces of all devices.
pub const MSI_WINDOW: RangeInclusive<u64> = 0x800_0000..=0x80f_ffff;

/// Passes events to a virtual SMMUv3, and warns once if an MSI of an assigned device is among them.
pub struct DoorbellWatch {
    target: Arc<dyn EventTarget>,
    windows: Vec<RangeInclusive<u64>>,
    told: AtomicBool,
}

impl DoorbellWatch {
    /// Passes events to `target`; the MSIs of assigned devices go to `windows`.
    pub fn new(target: Arc<dyn EventTarget>, windows: Vec<RangeInclusive<u64>>) -> Self {
        Self { target, windows, told: AtomicBool::new(false) }
    }

    /// The window of an event's write, if stage 1 does not map it or does not allow writing.
    fn of_lost_message(&self, record: &EventRecord) -> Option<&RangeInclusive<u64>> {
        let refused = matches!(
            record.id(),
            Some(
                EventId::Translation | EventId::Permission | EventId::AddressSize | EventId::Access
            )
        );
        let window = self.windows.iter().find(|window| window.contains(&record.input_address));
        window.filter(|_| refused && !record.qw1.rnw())
    }
}

impl EventTarget for DoorbellWatch {
    fn event(&self, record: EventRecordWords) {
        let event = EventRecord::from_words(record);
        match self.of_lost_message(&event) {
            Some(window) if !self.told.swap(true, Ordering::Relaxed) => log::warn!(
                "an interrupt of the assigned device with StreamID {} is lost: it is a write to \
                 {:#x}, which the guest does not map. It has to map {window:#x?} to itself for the \
                 device, as the device tree says (iommu-addresses); more such interrupts are not \
                 reported",
                event.stream(),
                event.input_address,
            ),
            _ => {}
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

#[cfg(test)]
mod tests {
    use twostage::sync::Mutex;

    use super::*;
    use twostage::spec::smmuv3::StreamId;

    #[derive(Default)]
    struct Target(Mutex<Vec<EventRecordWords>>);

    impl EventTarget for Target {
        fn event(&self, record: EventRecordWords) {
            self.0.lock().push(record);
        }

        fn events_lost(&self) {
            self.0.lock().push([0; 4]);
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
        let other = 0xa000_0000..=0xa00f_ffff;
        let windows = vec![MSI_WINDOW, other.clone()];
        let watch = DoorbellWatch::new(Arc::new(Target::default()), windows);
        let of = |record| watch.of_lost_message(&EventRecord::from_words(record));
        assert_eq!(of(event(EventId::Translation, 0x800_0040, false)), Some(&MSI_WINDOW));
        assert_eq!(of(event(EventId::Permission, 0x80f_ffff, false)), Some(&MSI_WINDOW));
        assert_eq!(of(event(EventId::Translation, 0xa000_0040, false)), Some(&other));
        assert_eq!(of(event(EventId::Translation, 0x800_0040, true)), None, "a read");
        assert_eq!(of(event(EventId::Translation, 0x810_0000, false)), None, "beyond");
        assert_eq!(of([u64::MAX; 4]), None);
    }

    #[test]
    fn every_event_is_passed_on_and_the_first_lost_message_is_told() {
        let target = Arc::new(Target::default());
        let watch = DoorbellWatch::new(target.clone(), vec![MSI_WINDOW]);
        let lost = event(EventId::Translation, 0x800_0040, false);
        watch.event(event(EventId::Translation, 0x1000, false));
        assert!(!watch.told.load(Ordering::Relaxed));
        watch.event(lost);
        assert!(watch.told.load(Ordering::Relaxed));
        watch.event(lost);
        watch.events_lost();
        assert_eq!(target.0.lock()[1..], [lost, lost, [0; 4]]);
    }
}
