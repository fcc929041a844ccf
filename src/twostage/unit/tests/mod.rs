// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Virtual IOMMUs with their host sides, on a host that records its calls.

mod mixed;
mod smmuv3;
mod vtd;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{mpsc, Arc, Weak};
use std::thread;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::iommufd::fake::RecordingHost;
use crate::iommufd::{HwCapabilities, HwInfo, HwInfoData, ObjectId};
use crate::nesting::{GuestIoas, NestingError};
use crate::spec::pci::Bdf;
use crate::sync::Mutex;
use crate::unit::{AddError, Names, NewDevice};
use crate::viommu::InterruptListener;

/// The guest's devices.
const A: Bdf = Bdf::from_raw(0x20);
const B: Bdf = Bdf::from_raw(0x28);
/// One that is never added.
const C: Bdf = Bdf::from_raw(0x30);

fn guest_memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap()
}

fn write(memory: &GuestMemoryMmap, address: u64, words: &[u64]) {
    for (index, word) in (0..).zip(words) {
        memory.write_obj(*word, GuestAddress(address + 8 * index)).unwrap();
    }
}

fn hw_info(data: HwInfoData, max_pasid_log2: u8) -> HwInfo {
    HwInfo { data, capabilities: HwCapabilities::new(), max_pasid_log2 }
}

/// How often it was told that interrupts changed.
#[derive(Default)]
struct Listener(AtomicUsize);

impl InterruptListener for Listener {
    fn interrupts_changed(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Checks that a listener is told once when `add` adds it, as what it has may be from before.
#[track_caller]
fn is_told_at_once(add: impl FnOnce(Weak<dyn InterruptListener>)) {
    let listener = Arc::<Listener>::default();
    let weak: Weak<Listener> = Arc::downgrade(&listener);
    add(weak);
    assert_eq!(listener.0.load(Ordering::Relaxed), 1);
}

/// Checks that `work` waits while a device is being added.
#[track_caller]
fn waits_for_devices(names: &Names, work: impl FnOnce() + Send) {
    let (done, is_done) = mpsc::channel();
    thread::scope(|scope| {
        let add = |_: &NewDevice| {
            scope.spawn(move || {
                work();
                done.send(()).unwrap();
            });
            let early = is_done.recv_timeout(Duration::from_millis(20));
            assert_eq!(early, Err(mpsc::RecvTimeoutError::Timeout), "it saw half of a device");
            Err(AddError::WrongIommu { device: "nic2".to_owned(), a_model: "such an IOMMU" })
        };
        let device = NewDevice::new(None, C, ObjectId(1), "nic2");
        names.add(device, add, |_| Ok(())).unwrap_err();
        is_done.recv().unwrap();
    });
}

/// A host with two bound devices behind one IOMMU, and the guest's memory on it.
struct Host {
    recording: Arc<RecordingHost>,
    a: ObjectId,
    b: ObjectId,
    ioas: Arc<GuestIoas>,
}

impl Host {
    fn of(recording: Arc<RecordingHost>, info: HwInfo) -> Self {
        let (a, b) = (recording.add_device(0, info), recording.add_device(0, info));
        let ioas = GuestIoas::new(recording.clone()).unwrap();
        recording.take_log();
        Self { recording, a, b, ioas }
    }

    /// Where DMA of both devices goes.
    fn reaches(&self) -> [Option<ObjectId>; 2] {
        [self.a, self.b].map(|dev| self.recording.reaches(dev, None))
    }

    /// Checks that there is nothing but devices, blocked, and guest memory.
    #[track_caller]
    fn is_empty(&self) {
        assert_eq!(self.recording.live_objects(), [self.ioas.id()]);
        assert_eq!(self.reaches(), [None, None]);
    }
}

#[test]
fn what_is_left_of_a_device_that_is_not_added_is_said() {
    let names = Names(Mutex::default());
    let failed = |released: Result<(), NestingError>| {
        let device = NewDevice::new(None, A, ObjectId(1), "nic0");
        let wrong = AddError::WrongIommu { device: "nic0".to_owned(), a_model: "a VT-d" };
        names.add(device, |_| Err(wrong), |_| released).unwrap_err().to_string()
    };
    let why = "nic0 is not behind a VT-d, which a virtual one needs: leave it out";
    assert_eq!(failed(Ok(())), why);
    assert_eq!(failed(Err(NestingError::NoDevice(A))), why);
    assert_eq!(
        failed(Err(NestingError::NoVtd(A))),
        format!(
            "{why}; it is left on the host, remove it from 00:04.0 to try again: {}",
            NestingError::NoVtd(A)
        )
    );
}
