// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices of `vfio-ioctls`: the VMM's, one that a host takes over, and what they lack.
//!
//! A test of a lack fails when upstream has what is missing: the workaround can go then, and its
//! entry in `docs/upstream.md`.
#![allow(unsafe_code)]

use std::error::Error;
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::{Duration, Instant};

use twostage::iommufd::{
    Errno, HostIommu, KernelHost, MapTarget, ObjectId, Protection, UserMemory,
};
use twostage_vmm::{AssignedDevice, HostDevice, Irq, IrqInfo, Region};
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_BAR0_REGION_INDEX as BAR0, VFIO_PCI_CONFIG_REGION_INDEX as CONFIG,
};
use vfio_ioctls::{Result, VfioDevice, VfioIommufd};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::contract::uapi;
use crate::passed::{memory_file, moves, region, IOVA};

const DEVICE: &str = "/dev/vfio/devices/vfio0";
/// The id of edu.
const EDU: [u8; 4] = [0x34, 0x12, 0xe8, 0x11];
/// Raises an interrupt.
const RAISE: u64 = 0x60;
/// The interrupts that are raised.
const PENDING: u64 = 0x24;
/// Takes interrupts back.
const ACKNOWLEDGE: u64 = 0x64;

/// Runs the tests of this file that need the library.
#[test]
fn under_the_library() {
    for name in [
        "the_vmm_s_device",
        "dropping_the_vmm_s_device_detaches_it",
        "a_device_that_cannot_be_detached_ends_nothing",
        "a_host_takes_over_a_device",
        "accesses_and_resets_have_no_result",
        "vectors_start_at_zero_and_have_no_errno",
        "its_flags_are_private",
        "an_attachment_hides_the_hwpt",
        "an_ioas_is_allocated_in_any_case",
        "dropping_panics",
    ] {
        super::under_the_library(&format!("vfio_ioctls::{name}"), |_| {});
    }
}

/// A device that a host bound, as the VMM's host does.
struct Bound {
    host: KernelHost,
    dev: ObjectId,
    file: Arc<File>,
    iommufd: Arc<VfioIommufd>,
}

impl Bound {
    /// None in a run without the library.
    fn new() -> Option<Self> {
        std::env::var_os("LD_PRELOAD")?;
        let host = KernelHost::open(Path::new("/dev/iommu")).expect("/dev/iommu");
        let dev = host.device_bind(DEVICE).expect("it is free");
        let file = host.device_file(dev).expect("it is bound");
        let iommufd = VfioIommufd::new(host.iommufd().clone(), None, None).expect("an IOAS");
        Some(Self { host, dev, file, iommufd: Arc::new(iommufd) })
    }

    fn of_the_vmm(&self) -> AssignedDevice {
        AssignedDevice::new(self.file.clone(), self.iommufd.clone()).expect("a PCI device")
    }

    fn of_the_crate(&self) -> VfioDevice {
        let file = self.file.try_clone().expect("a descriptor");
        VfioDevice::new_from_bound_fd(file, self.iommufd.clone(), false).expect("a device")
    }
}

/// Makes descriptor `fd` one of /dev/null, for which every ioctl of VFIO fails.
fn spoil(fd: RawFd) {
    let null = File::open("/dev/null").expect("/dev/null");
    // SAFETY: both are open; `fd` stays its owner's, as a descriptor of another file.
    assert_eq!(unsafe { libc::dup2(null.as_raw_fd(), fd) }, fd);
}

/// Log lines of this process.
struct Lines(Mutex<Vec<String>>);

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        self.0.lock().expect("no panic").push(format!("{}: {}", record.level(), record.args()));
    }

    fn flush(&self) {}
}

static LINES: Lines = Lines(Mutex::new(Vec::new()));

/// Those from now on.
fn lines() -> &'static Mutex<Vec<String>> {
    log::set_logger(&LINES).expect("the only one");
    log::set_max_level(log::LevelFilter::Warn);
    &LINES.0
}

#[test]
#[ignore = "started under the library"]
fn the_vmm_s_device() {
    let Some(bound) = Bound::new() else { return };
    let device = bound.of_the_vmm();
    let [bar, config] = [BAR0, CONFIG].map(|index| device.region(index).expect("a region"));
    assert_eq!((bar.size, config.size), (1 << 20, 4096));
    assert!(bar.mappable.is_empty());
    assert_eq!(device.region(3).expect("it is empty").size, 0);
    let memory = device.region(2).expect("memory");
    assert_eq!(memory.mappable.first(), Some(&(0..memory.size)));
    let mapping = device.map(&memory, 0x2000, 0x1000).expect("a page");
    device.write(&memory, 0x2008, b"mapped").expect("memory");
    // SAFETY: it is mapped, and nobody writes it meanwhile.
    let bytes = unsafe { std::slice::from_raw_parts((mapping.address() + 8) as *const u8, 6) };
    assert_eq!(bytes, b"mapped");
    drop(mapping);
    let mut id = [0; 4];
    device.read(&config, 0, &mut id).expect("its id");
    assert_eq!(id, EDU);
    device.write(&config, 4, &[0b110]).expect("its command");
    let error = device.read(&config, 4094, &mut id).expect_err("past the end");
    assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    // The kernel's, where its ROM would be.
    let nothing = Region { index: 6, size: 4, offset: 6 << 40, mappable: Vec::new() };
    let error = device.read(&nothing, 0, &mut id).expect_err("it has no ROM");
    assert_eq!(error.raw_os_error(), Some(libc::EINVAL));

    assert_eq!(device.irq(Irq::Msi).expect("MSI"), IrqInfo { count: 1, fixed: true });
    assert_eq!(device.irq(Irq::Intx).expect("its pin"), IrqInfo { count: 1, fixed: false });
    let event = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let raise = || device.write(&bar, RAISE, &1u32.to_le_bytes()).expect("a register");
    device.set_triggers(Irq::Msi, 0, &[None]).expect("the host has one vector");
    raise();
    device.set_triggers(Irq::Msi, 0, &[Some(&event)]).expect("it is on");
    assert_eq!(event.read().expect_err("nothing was wired").kind(), ErrorKind::WouldBlock);
    raise();
    assert_eq!(event.read().expect("the interrupt"), 1);
    let error = device.set_triggers(Irq::Msi, 1, &[Some(&event)]).expect_err("there is one");
    assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    // INTx goes through the crate, which has no errno: the kernel is asked again.
    for error in [
        device.set_triggers(Irq::Intx, 0, &[Some(&event)]),
        device.set_intx_unmask(&event),
        device.disable_irq(Irq::Intx),
    ] {
        let error = error.expect_err("MSI is on");
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
    device.disable_irq(Irq::Msi).expect("it is on");
    raise();
    assert_eq!(event.read().expect_err("it is off").kind(), ErrorKind::WouldBlock);

    // MSI-X: causes in the second byte have the second vector, which is set up on its own.
    assert_eq!(device.irq(Irq::Msix).expect("MSI-X"), IrqInfo { count: 4, fixed: false });
    device.set_triggers(Irq::Msix, 0, &[None]).expect("no other is on");
    device.set_triggers(Irq::Msix, 1, &[Some(&event)]).expect("it is on");
    raise();
    assert_eq!(event.read().expect_err("another vector").kind(), ErrorKind::WouldBlock);
    device.write(&bar, RAISE, &0x100u32.to_le_bytes()).expect("a register");
    assert_eq!(event.read().expect("the interrupt"), 1);
    device.disable_irq(Irq::Msix).expect("it is on");

    // The pin, which those assert.
    let end = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    device.set_triggers(Irq::Intx, 0, &[Some(&event)]).expect("no other is on");
    device.set_intx_unmask(&end).expect("it is on");
    assert_eq!(event.read().expect("the interrupt"), 1);
    device.write(&bar, ACKNOWLEDGE, &u32::MAX.to_le_bytes()).expect("a register");
    raise();
    assert_eq!(event.read().expect_err("it is masked").kind(), ErrorKind::WouldBlock);
    end.write(1).expect("an eventfd");
    let until = Instant::now() + Duration::from_secs(60);
    while event.read().is_err() {
        assert!(Instant::now() < until, "it is unmasked, and asserted");
        sleep(Duration::from_millis(1));
    }
    assert_eq!(end.read().expect_err("it was taken").kind(), ErrorKind::WouldBlock);
    device.disable_irq(Irq::Intx).expect("it is on");

    assert!(device.can_reset());
    let pending = || {
        let mut causes = [0; 4];
        device.read(&bar, PENDING, &mut causes).expect("a register");
        u32::from_le_bytes(causes)
    };
    assert_eq!(pending(), 1);
    device.reset().expect("a reset");
    assert_eq!(pending(), 0);
    let mut command = [0xff];
    device.read(&config, 4, &mut command).expect("its command");
    assert_eq!(command, [0b110], "restored, as by Linux");

    // It keeps the device bound, and does nothing to it but that.
    let Bound { host, dev, file, iommufd } = bound;
    drop((file, iommufd));
    assert_eq!(host.device_unbind(dev).expect_err("it is in use").errno, Errno::EBUSY);
    drop(device);
    host.device_unbind(dev).expect("nobody uses it");
}

#[test]
#[ignore = "started under the library"]
fn dropping_the_vmm_s_device_detaches_it() {
    let Some(bound) = Bound::new() else { return };
    let memory = memory_file();
    let whole = UserMemory::whole(Arc::new(region(memory.try_clone().expect("a descriptor"))));
    let ioas = bound.host.ioas_alloc().expect("IOAS_ALLOC");
    let at = MapTarget::Fixed(IOVA);
    bound.host.ioas_map(ioas, &whole, at, Protection::READ_WRITE).expect("IOAS_MAP");
    let attach = || bound.host.device_attach(bound.dev, None, ioas).expect("DEVICE_ATTACH");
    attach();
    let device = bound.of_the_vmm();
    // Only from now on: the crate warns that a conventional device reports no errors.
    let lines = lines();
    let mut edu = uapi::Device::from(bound.file.try_clone().expect("a descriptor"));
    edu.start().expect("its registers");
    assert!(moves(&edu, &memory, IOVA), "it stays attached");
    drop(device);
    assert!(!moves(&edu, &memory, IOVA), "it is blocked");
    assert_eq!(*lines.lock().expect("no panic"), [] as [String; 0]);
    // Its host can still do either.
    attach();
    assert!(moves(&edu, &memory, IOVA));
    drop(bound.of_the_vmm());
    bound.host.device_detach(bound.dev, None).expect("it is detached");
}

#[test]
#[ignore = "started under the library"]
fn a_device_that_cannot_be_detached_ends_nothing() {
    let Some(bound) = Bound::new() else { return };
    // The next descriptor is the crate's.
    let next = File::open("/dev/null").expect("/dev/null").as_raw_fd();
    let device = bound.of_the_vmm();
    let lines = lines();
    spoil(next);
    drop(device);
    let lines = lines.lock().expect("no panic");
    let [line] = &lines[..] else { panic!("{lines:?}") };
    assert!(line.starts_with("ERROR: an assigned device stays bound until"), "{line}");
    assert!(line.contains("Inappropriate ioctl"), "{line}");
    // It is not closed: nobody else may get its number.
    assert_ne!(File::open("/dev/null").expect("/dev/null").as_raw_fd(), next);
}

#[test]
#[ignore = "started under the library"]
fn a_host_takes_over_a_device() {
    let Some(Bound { host, dev, file, iommufd }) = Bound::new() else { return };
    let other = VfioDevice::new_from_bound_fd(
        file.try_clone().expect("a descriptor"),
        iommufd.clone(),
        false,
    );
    let other = other.expect("a device");
    let error = host.adopt_vfio(&other, "nic").expect_err("it did not bind it");
    assert_eq!(error.errno, Errno::EINVAL);
    assert!(error.to_string().contains("nic: it was bound before this VfioDevice"), "{error}");
    drop((other, file));
    host.device_unbind(dev).expect("nobody uses it");

    let cdev = File::options().read(true).write(true).open(DEVICE).expect(DEVICE);
    let mut edu = uapi::Device::from(cdev.try_clone().expect("a descriptor"));
    let device = VfioDevice::new_from_fd(cdev, iommufd, true).expect("it is free");
    edu.start().expect("its registers");
    let memory = memory_file();
    let whole = UserMemory::whole(Arc::new(region(memory.try_clone().expect("a descriptor"))));
    let ioas = host.ioas_alloc().expect("IOAS_ALLOC");
    let at = MapTarget::Fixed(IOVA);
    host.ioas_map(ioas, &whole, at, Protection::READ_WRITE).expect("IOAS_MAP");

    let dev = host.adopt_vfio(&device, "nic").expect("it is bound to this iommufd");
    assert_eq!(Some(dev.0), device.iommufd_dev_id());
    let error = host.adopt_vfio(&device, "nic").expect_err("once is enough");
    assert!(error.errno == Errno::EBUSY && error.to_string().contains("here already"), "{error}");
    assert!(!moves(&edu, &memory, IOVA));
    host.device_attach(dev, None, ioas).expect("DEVICE_ATTACH");
    assert!(moves(&edu, &memory, IOVA));
    let mut id = [0; 4];
    device.region_read(CONFIG, &mut id, 0);
    assert_eq!(id, EDU, "it keeps its regions");

    let file = host.device_file(dev).expect("it is bound");
    assert_eq!(host.release(dev).expect_err("it is in use").errno, Errno::EBUSY);
    drop(file);
    let back = host.release(dev).expect("nobody uses it");
    assert!(!moves(&edu, &memory, IOVA), "it is blocked");
    assert_eq!(host.release(dev).expect_err("it is gone").errno, Errno::ENOENT);
    // It is still bound, and may come back.
    assert_eq!(host.adopt(back, dev, "nic").expect("it is bound"), dev);
    host.device_unbind(dev).expect("nobody uses it");
    drop(device);
}

/// `region_read`, `region_write` and `reset` return nothing.
#[test]
#[ignore = "started under the library"]
fn accesses_and_resets_have_no_result() {
    let Some(bound) = Bound::new() else { return };
    let (ours, theirs) = (bound.of_the_vmm(), bound.of_the_crate());
    let config = ours.region(CONFIG).expect("configuration space");
    spoil(bound.file.as_raw_fd());
    spoil(theirs.as_raw_fd());
    let _: fn(&VfioDevice, u32, &mut [u8], u64) = VfioDevice::region_read;
    let _: fn(&VfioDevice, u32, &[u8], u64) = VfioDevice::region_write;
    let _: fn(&VfioDevice) = VfioDevice::reset;
    let mut id = [0x5a; 4];
    theirs.region_read(CONFIG, &mut id, 0);
    theirs.region_write(CONFIG, &[0], 4);
    theirs.reset();
    assert_eq!(id, [0x5a; 4], "as it was");
    ours.read(&config, 0, &mut id).expect_err("no device");
    ours.write(&config, 4, &[0]).expect_err("it is open for reading only");
    let error = ours.reset().expect_err("no device");
    assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
    // As this cannot be dropped.
    std::mem::forget(theirs);
}

/// `enable_irq` sets all vectors from 0 on, and tells neither how many there are (a result above
/// zero, `vfio_ioctls.rs:211`) nor why it fails.
#[test]
#[ignore = "started under the library"]
fn vectors_start_at_zero_and_have_no_errno() {
    let Some(bound) = Bound::new() else { return };
    let (ours, theirs) = (bound.of_the_vmm(), bound.of_the_crate());
    spoil(bound.file.as_raw_fd());
    spoil(theirs.as_raw_fd());
    let _: fn(&VfioDevice, u32, Vec<&EventFd>) -> Result<()> = VfioDevice::enable_irq;
    let event = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let error = theirs.enable_irq(Irq::Msi as u32, vec![&event]).expect_err("no device");
    assert!(error.source().is_none(), "{error}");
    let error = ours.set_triggers(Irq::Msi, 0, &[Some(&event)]).expect_err("no device");
    assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
    std::mem::forget(theirs);
}

/// `VFIO_DEVICE_FLAGS_RESET` and `VFIO_DEVICE_FLAGS_PCI` are in a private field.
#[test]
#[ignore = "started under the library"]
fn its_flags_are_private() {
    struct Private;
    trait Flags {
        fn flags(&self) -> Private;
    }
    impl Flags for VfioDevice {
        fn flags(&self) -> Private {
            Private
        }
    }
    let Some(bound) = Bound::new() else { return };
    // A method of the type itself would have another result.
    let Private = bound.of_the_crate().flags();
}

/// `attach_hwpt` does not return the HWPT, which the kernel chooses for an IOAS.
#[test]
#[ignore = "started under the library"]
fn an_attachment_hides_the_hwpt() {
    let Some(bound) = Bound::new() else { return };
    let _: fn(&VfioDevice, u32) -> Result<()> = VfioDevice::attach_hwpt;
    let _: fn(&VfioDevice, u32, u32) -> Result<()> = VfioDevice::attach_iommufd_pt_pasid;
    let ioas = bound.host.ioas_alloc().expect("IOAS_ALLOC");
    bound.of_the_crate().attach_hwpt(ioas.0).expect("an IOAS");
    let hwpt = bound.host.device_attach(bound.dev, None, ioas).expect("DEVICE_ATTACH");
    assert_ne!(hwpt, ioas);
}

/// An `IommufdIoas` is always a new one.
#[test]
#[ignore = "started under the library"]
fn an_ioas_is_allocated_in_any_case() {
    let Some(Bound { host, iommufd, .. }) = Bound::new() else { return };
    let ioas = ObjectId(iommufd.ioas().id());
    host.ioas_iova_ranges(ioas).expect("it exists");
    drop(iommufd);
    let error = host.ioas_iova_ranges(ioas).expect_err("it goes with its owner");
    assert_eq!(error.errno, Errno::ENOENT);
}

/// `VfioDevice::drop` unwraps the result of detaching (`vfio_device.rs:2259` of 0.10.0).
#[test]
#[ignore = "started under the library"]
fn dropping_panics() {
    let Some(bound) = Bound::new() else { return };
    let device = bound.of_the_crate();
    spoil(device.as_raw_fd());
    catch_unwind(AssertUnwindSafe(move || drop(device))).expect_err("it unwraps an error");
}
