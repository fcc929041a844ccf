// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A VMM without rights of its own: another process, its manager, opened `/dev/iommu` and the
//! devices, bound one, mapped memory, and passes the descriptors over a socket.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::Arc;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use twostage::iommufd::{Errno, HostIommu, KernelHost, ObjectId, Protection, Result, UserMemory};
use twostage::nesting::vtd::VtdNesting;
use twostage::nesting::GuestIoas;
use twostage::spec::pci::Bdf;
use twostage::viommu::vtd::{DomainTag, Policy, RequesterConfig, VtdHostSide};
use twostage::viommu::Requester;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionMmap};

use crate::contract::uapi;

/// The manager's memory: a file of this length, at this IOVA.
const LENGTH: u64 = 0x1_0000;
pub const IOVA: u64 = 0x10_0000;
/// Where the VMM maps the same file once more.
const AGAIN: u64 = 0x20_0000;
const BOUND: &str = "/dev/vfio/devices/vfio0";
const UNBOUND: &str = "/dev/vfio/devices/vfio1";

/// The iommufd, the bound device, the unbound one, and the memory's file.
const DESCRIPTORS: usize = 4;

/// The process that a run of this program is to be; none in a run of all tests.
const ROLE: &str = "TWOSTAGE_PASSED_ROLE";

/// What the VMM prints at its end.
const DONE: &str = "nothing is left of the VMM";

fn is_the(role: &str) -> bool {
    std::env::var(ROLE).is_ok_and(|value| value == role)
}

#[test]
fn devices_and_memory_of_another_process() {
    let text = super::under_the_library("passed::vmm", |command| {
        command.env(ROLE, "vmm");
    });
    assert!(text.contains(DONE), "{text}");
}

/// A file of such memory.
pub fn memory_file() -> File {
    let memory = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC);
    let memory = File::from(memory.expect("a file"));
    memory.set_len(LENGTH).expect("its length");
    memory
}

/// The file, as memory of this process.
pub fn region(file: File) -> GuestRegionMmap {
    let file = Some(FileOffset::new(file, 0));
    GuestRegionMmap::from_range(GuestAddress(0), LENGTH as usize, file).expect("memory")
}

/// Whether the device moves a word from the start of the memory at `iova` to its end.
pub fn moves(device: &uapi::Device, memory: &File, iova: u64) -> bool {
    let mut word = [0; 8];
    memory.write_all_at(b"moves it", 0).expect("memory");
    memory.write_all_at(&word, LENGTH - 8).expect("memory");
    device.fetch(iova, 8);
    device.store(iova + LENGTH - 8, 8);
    memory.read_exact_at(&mut word, LENGTH - 8).expect("memory");
    word == *b"moves it"
}

/// The owner of everything. Its standard input is the socket to the VMM.
#[test]
#[ignore = "started by the VMM"]
fn manager() {
    if !is_the("manager") {
        return;
    }
    let socket = std::io::stdin().as_fd().try_clone_to_owned().expect("standard input");
    let mut socket = UnixStream::from(socket);
    let memory = memory_file();
    let mapped = region(memory.try_clone().expect("a descriptor"));
    let address = mapped.get_host_address(vm_memory::MemoryRegionAddress(0)).expect("an address");

    let iommufd = File::options().read(true).write(true).open("/dev/iommu").expect("/dev/iommu");
    let fd = iommufd.as_raw_fd();
    let cdev = File::options().read(true).write(true).open(BOUND).expect(BOUND);
    let unbound = File::options().read(true).write(true).open(UNBOUND).expect(UNBOUND);
    let mut device = uapi::Device::from(cdev.try_clone().expect("a descriptor"));
    let dev = device.bind(fd).expect("BIND_IOMMUFD");
    let ioas = uapi::ioas_alloc(fd).expect("IOAS_ALLOC");
    uapi::ioas_map(fd, ioas, address as u64, LENGTH, IOVA).expect("IOAS_MAP");
    device.attach(ioas).expect("ATTACH_IOMMUFD_PT");
    assert!(moves(&device, &memory, IOVA));

    let passed: [_; DESCRIPTORS] = [iommufd.as_fd(), cdev.as_fd(), unbound.as_fd(), memory.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&passed)));
    let ids = [dev.to_le_bytes(), ioas.to_le_bytes()].concat();
    let sent =
        rustix::net::sendmsg(&socket, &[IoSlice::new(&ids)], &mut control, SendFlags::empty());
    assert_eq!(sent.expect("a message"), ids.len());

    // The VMM is done with them.
    assert_eq!(socket.read(&mut [0]).expect("an answer"), 1);
    assert!(!moves(&device, &memory, IOVA), "it is still attached");
    device.attach(ioas).expect("it is still bound");
    assert!(moves(&device, &memory, IOVA), "its memory is not mapped any more");
    assert!(!moves(&device, &memory, AGAIN), "the VMM's memory is still mapped");
    assert_eq!(uapi::ioas_unmap(fd, ioas, 0, u64::MAX).expect("IOAS_UNMAP"), LENGTH);
    device.detach().expect("DETACH_IOMMUFD_PT");
    uapi::destroy(fd, ioas).expect("nothing of the VMM's uses it");
}

/// Receives the manager's descriptors, and the ids of its device and IOAS.
fn receive(socket: &UnixStream) -> (Vec<OwnedFd>, ObjectId, ObjectId) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let (mut dev, mut ioas) = ([0; 4], [0; 4]);
    let mut ids = [IoSliceMut::new(&mut dev), IoSliceMut::new(&mut ioas)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let message = rustix::net::recvmsg(socket, &mut ids, &mut control, flags).expect("a message");
    assert_eq!(message.bytes, 8, "the manager ended early");
    let rights = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(rights) => Some(rights),
        _ => None,
    });
    let id = |bytes| ObjectId(u32::from_le_bytes(bytes));
    (rights.flatten().collect(), id(dev), id(ioas))
}

/// Ends the process unless `result` is the failure `errno`, explained by `text`.
#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>, errno: Errno, text: &str) {
    let error = result.expect_err(text);
    assert!(error.errno == errno && error.to_string().contains(text), "{error}");
}

#[test]
#[ignore = "started under the library"]
fn vmm() {
    if !is_the("vmm") {
        return;
    }
    let (mut socket, other) = UnixStream::pair().expect("sockets");
    let mut manager = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "passed::manager", "--nocapture", "--ignored"])
        .env(ROLE, "manager")
        .stdin(Stdio::from(OwnedFd::from(other)))
        .spawn()
        .expect("the manager");
    let (descriptors, dev, ioas) = receive(&socket);
    let Ok::<[OwnedFd; DESCRIPTORS], _>([iommufd, cdev, unbound, memory]) = descriptors.try_into()
    else {
        panic!("some descriptors are missing")
    };
    let memory = File::from(memory);
    let copy = |fd: &OwnedFd| fd.try_clone().expect("a descriptor");
    let mut device = uapi::Device::from(File::from(copy(&cdev)));
    device.start().expect("its registers");
    assert!(moves(&device, &memory, IOVA), "the manager attached it");

    let host = Arc::new(KernelHost::from_fd(iommufd).expect("an iommufd"));
    let nobody = ObjectId(999);
    refused(host.adopt(copy(&cdev), nobody, "nic"), Errno::ENOENT, "nic: this iommufd has no such");
    refused(host.adopt(copy(&unbound), dev, "disk"), Errno::EINVAL, "disk: it is not bound");
    refused(host.bind_fd(copy(&cdev), "nic"), Errno::EINVAL, "nic: the device is already open");
    assert!(moves(&device, &memory, IOVA), "nothing was adopted");
    assert_eq!(host.adopt(copy(&cdev), dev, "nic").expect("it is bound"), dev);
    assert!(!moves(&device, &memory, IOVA), "it is blocked");

    // The same device, in every way.
    refused(host.adopt(copy(&cdev), dev, "nic"), Errno::EBUSY, "nic is bound here already");
    refused(host.bind_fd(cdev, "card"), Errno::EBUSY, "card is bound here already, as nic");
    refused(host.device_bind(BOUND), Errno::EBUSY, "is bound here already, as nic");
    refused(host.adopt(copy(&unbound), dev, "disk"), Errno::EBUSY, "disk cannot be device");
    let disk = host.bind_fd(copy(&unbound), "disk").expect("nobody bound it");
    refused(host.bind_fd(unbound, "disk"), Errno::EBUSY, "disk is bound here already");
    refused(host.device_bind(UNBOUND), Errno::EBUSY, "is bound here already, as disk");
    host.device_unbind(disk).expect("nobody uses it");

    assert!(GuestIoas::adopt(host.clone(), nobody, &[]).is_err());
    let adopted = GuestIoas::adopt(host.clone(), ioas, &[]).expect("it is an IOAS");
    let region = Arc::new(region(memory.try_clone().expect("a descriptor")));
    let whole = UserMemory::whole(region.clone());
    adopted.map(AGAIN, &whole, Protection::READ_WRITE).expect("memory of this process");
    drop(whole);
    let nesting = VtdNesting::new(adopted);
    let (rid, tag) = (Bdf::from_raw(8), DomainTag { domain: 0, pasid: 0 });
    nesting.add_device(rid, dev).expect("a policy");
    assert!(!moves(&device, &memory, IOVA), "it is blocked until it is configured");
    let passes = RequesterConfig { policy: Policy::Bypass, tag, fault_disabled: false };
    nesting.configure(Requester::rid(rid), &passes).expect("the parent of its IOMMU");
    assert!(moves(&device, &memory, IOVA), "the manager mapped it");
    assert!(moves(&device, &memory, AGAIN));

    nesting.shutdown().expect("nothing is left");
    drop(nesting);
    assert!(Arc::strong_count(&region) > 1, "it is mapped");
    host.device_unbind(dev).expect("nobody uses its file");
    refused(host.device_unbind(dev), Errno::ENOENT, "no such device");
    assert!(!moves(&device, &memory, IOVA), "it is blocked again");
    drop((host, device));
    assert_eq!(Arc::strong_count(&region), 1);
    socket.write_all(&[1]).expect("an answer");
    assert!(manager.wait().expect("the manager").success());
    println!("{DONE}");
}
