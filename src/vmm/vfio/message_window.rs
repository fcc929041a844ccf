// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host's MSI window of an assigned device, and what is lost when the guest does not map it.
//!
//! On arm64 an MSI is a write that the SMMU translates like any other. Linux reserves a window of
//! IOVAs for MSIs, maps the doorbell there in stage 2 and programs the device with it; it reports
//! the window in sysfs (`Documentation/ABI/testing/sysfs-kernel-iommu_groups`, `reserved_regions`).
//! It is a constant of its SMMU driver (`MSI_IOVA_BASE`), but not guaranteed. So the guest must map
//! it 1:1 in stage 1, as told by reserved memory of the device tree, or an RMR node of the IORT.
//! Otherwise each MSI causes a translation fault, and its driver waits forever.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use super::{VfioError, VfioProblem};
use twostage::spec::pci::PageResponse;
use twostage::spec::smmuv3::event::{EventId, EventRecord};
use twostage::spec::smmuv3::page_request::PageRequest;
use twostage::spec::smmuv3::StreamId;
use twostage::viommu::smmuv3::{EventRecordWords, EventTarget, StalledTransaction};
use twostage::viommu::PageTicket;

/// Linux's default window for MSIs in the address spaces of all devices.
const MSI_WINDOW: RangeInclusive<u64> = 0x800_0000..=0x80f_ffff;

/// The MSI window of the device at `path`, in bytes; `name` is for errors. Linux's default window
/// if the host does not report one. `memory` is the guest's, which stage 2 maps at the same
/// addresses: (first address, length).
///
/// # Errors
/// The guest has memory there.
pub fn message_window(
    name: &str,
    path: &Path,
    memory: impl IntoIterator<Item = (u64, u64)>,
) -> Result<RangeInclusive<u64>, VfioError> {
    let regions = fs::read_to_string(sysfs(path).join("iommu_group/reserved_regions"));
    let window = regions.as_deref().ok().and_then(window).unwrap_or(MSI_WINDOW);
    let overlaps = |(start, length): (u64, u64)| {
        length != 0 && start <= *window.end() && start.saturating_add(length - 1) >= *window.start()
    };
    if memory.into_iter().any(overlaps) {
        return Err(VfioError::new(name, VfioProblem::Messages(window)));
    }
    Ok(window)
}

/// The folder in sysfs of the device at `path`, which may be VFIO's character device.
fn sysfs(path: &Path) -> PathBuf {
    match path.strip_prefix("/dev/vfio/devices") {
        Ok(cdev) => Path::new("/sys/class/vfio-dev").join(cdev).join("device"),
        Err(_) => path.to_owned(),
    }
}

/// The MSI window in `regions`: a line each with first address, last address and type.
fn window(regions: &str) -> Option<RangeInclusive<u64>> {
    let address = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    let region = |line: &str| {
        let mut words = line.split_whitespace();
        let (first, last) = (address(words.next()?)?, address(words.next()?)?);
        (words.next() == Some("msi") && first <= last).then_some(first..=last)
    };
    regions.lines().find_map(region)
}

/// Passes events to a virtual SMMUv3, and warns once if an MSI of an assigned device is among them:
/// it is lost because the guest's stage 1 does not map the window.
pub struct DoorbellWatch {
    target: Arc<dyn EventTarget>,
    windows: BTreeMap<StreamId, RangeInclusive<u64>>,
    told: AtomicBool,
}

impl DoorbellWatch {
    /// Passes events to `target`; the MSIs of each assigned device go to its window of `windows`.
    /// Other devices have none.
    pub fn new(
        target: Arc<dyn EventTarget>,
        windows: BTreeMap<StreamId, RangeInclusive<u64>>,
    ) -> Self {
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
        let window = self.windows.get(&record.stream())?;
        let inside = window.contains(&record.input_address);
        (refused && inside && !record.qw1.rnw()).then_some(window)
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

    fn page_requests(&self, requests: &[PageRequest], ticket: PageTicket) -> Option<PageResponse> {
        self.target.page_requests(requests, ticket)
    }

    fn stall_epoch(&self) -> u64 {
        self.target.stall_epoch()
    }

    fn stalled(
        &self,
        transaction: &StalledTransaction,
        ticket: PageTicket,
        epoch: u64,
    ) -> Option<PageResponse> {
        self.target.stalled(transaction, ticket, epoch)
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

    const RAM: (u64, u64) = (0x4000_0000, 0x1000_0000);

    #[test]
    fn the_window_is_what_the_host_tells_of() {
        let regions = "0x0000000000001000 0x0000000000001fff direct\n\
                       0x0000000008000000 0x00000000080fffff msi\n";
        assert_eq!(window(regions), Some(MSI_WINDOW));
        assert_eq!(window("0xa0000000 0xa00fffff msi"), Some(0xa000_0000..=0xa00f_ffff));
        for none in ["", "0x8000000 0x80fffff reserved", "0x2 0x1 msi", "8000000 80fffff msi", "x"]
        {
            assert_eq!(window(none), None, "{none}");
        }
    }

    #[test]
    fn a_character_device_is_found_in_sysfs() {
        let of = |path: &str| sysfs(Path::new(path)).display().to_string();
        assert_eq!(of("/dev/vfio/devices/vfio3"), "/sys/class/vfio-dev/vfio3/device");
        assert_eq!(of("/sys/bus/pci/devices/0000:00:02.0"), "/sys/bus/pci/devices/0000:00:02.0");
    }

    #[test]
    fn a_host_that_does_not_tell_has_the_usual_window() {
        let none = Path::new("/sys/bus/pci/devices/none");
        assert_eq!(message_window("none", none, [RAM]).unwrap(), MSI_WINDOW);
    }

    /// The window of a host that reports `regions`.
    fn told(regions: &str) -> Result<RangeInclusive<u64>, VfioError> {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("iommu_group")).unwrap();
        fs::write(folder.path().join("iommu_group/reserved_regions"), regions).unwrap();
        message_window("0000:00:02.0", folder.path(), [(0, 0), RAM])
    }

    #[test]
    fn a_window_elsewhere_is_taken_where_the_guest_has_no_memory() {
        let window = told("0x00000000a0000000 0x00000000a00fffff msi\n");
        assert_eq!(window.unwrap(), 0xa000_0000..=0xa00f_ffff);
        assert_eq!(
            told("0x0000000048000000 0x00000000480fffff msi\n").unwrap_err().to_string(),
            "--vfio 0000:00:02.0: the host directs its interrupt messages to \
             0x48000000..=0x480fffff, where the guest has memory: none would arrive; reduce \
             --memory so that it ends before, or leave the device out"
        );
        for beside in ["0x3ff00000 0x3fffffff msi", "0x50000000 0x500fffff msi"] {
            told(beside).unwrap();
        }
        for across in ["0x3ff00000 0x40000000 msi", "0x4fffffff 0x500fffff msi"] {
            told(across).unwrap_err();
        }
    }

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
        event_of(8, id, address, read)
    }

    fn event_of(stream: u32, id: EventId, address: u64, read: bool) -> EventRecordWords {
        let mut record = EventRecord::new(id, StreamId(stream), None);
        record.input_address = address;
        record.qw1 = record.qw1.with_rnw(read);
        record.to_words()
    }

    #[test]
    fn a_refused_write_to_the_doorbell_is_a_lost_message() {
        let other = 0xa000_0000..=0xa00f_ffff;
        let windows = BTreeMap::from([(StreamId(8), MSI_WINDOW), (StreamId(16), other.clone())]);
        let watch = DoorbellWatch::new(Arc::new(Target::default()), windows);
        let of = |record| watch.of_lost_message(&EventRecord::from_words(record));
        assert_eq!(of(event(EventId::Translation, 0x800_0040, false)), Some(&MSI_WINDOW));
        assert_eq!(of(event(EventId::Permission, 0x80f_ffff, false)), Some(&MSI_WINDOW));
        let of_other = |address| of(event_of(16, EventId::Translation, address, false));
        assert_eq!(of_other(0xa000_0040), Some(&other));
        assert_eq!(of_other(0x800_0040), None, "another's");
        let emulated = event_of(24, EventId::Translation, 0x800_0040, false);
        assert_eq!(of(emulated), None, "its messages go where stage 1 says");
        assert_eq!(of(event(EventId::Translation, 0x800_0040, true)), None, "a read");
        assert_eq!(of(event(EventId::Translation, 0x810_0000, false)), None, "beyond");
        assert_eq!(of([u64::MAX; 4]), None);
    }

    #[test]
    fn every_event_is_passed_on_and_the_first_lost_message_is_told() {
        let target = Arc::new(Target::default());
        let watch = DoorbellWatch::new(target.clone(), [(StreamId(8), MSI_WINDOW)].into());
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
