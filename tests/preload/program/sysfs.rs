// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Finding devices in `/sys` as QEMU and DPDK do, and calls as programs make them that are built
//! with `_FORTIFY_SOURCE`.
#![allow(unsafe_code)]

use crate::descriptors::child;
use crate::uapi::*;
use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::fs;
use std::io::{Error, ErrorKind};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

const BUS: &str = "/sys/bus/pci/devices";

fn names(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{folder}: {error}"));
    let name = |entry: std::io::Result<fs::DirEntry>| entry.expect("an entry").file_name();
    let mut names: Vec<_> =
        entries.map(|entry| name(entry).into_string().expect("a name")).collect();
    names.sort();
    names
}

fn text(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    text.trim_end().to_owned()
}

/// The last part of what the link at `path` leads to.
fn end(path: &str) -> String {
    let link = fs::read_link(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    link.file_name().expect("a name").to_str().expect("text").to_owned()
}

fn hexadecimal(bytes: &[u8]) -> String {
    let bytes: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(" ")
}

fn errno(error: &Error) -> i32 {
    error.raw_os_error().unwrap_or(0)
}

/// Looks for the devices.
pub fn run() {
    let found = names(BUS);
    println!("on the bus: {found:?}");
    let device = format!("{BUS}/{}", found[0]);
    println!("a link: {}", fs::read_link(&device).expect("a link").display());
    println!("really: {}", fs::canonicalize(&device).expect("a folder").display());
    let [vendor, id, class] = ["vendor", "device", "class"].map(|f| text(&format!("{device}/{f}")));
    println!("{vendor} {id} {class}");
    println!("{}", text(&format!("{device}/resource")).lines().next().expect("a BAR"));
    println!("driver: {}", end(&format!("{device}/driver")));
    let group = end(&format!("{device}/iommu_group"));
    println!("group: {group}, of {:?}", names(&format!("{device}/iommu_group/devices")));
    println!("IOMMU: {}", end(&format!("{device}/iommu")));
    let cdevs = names(&format!("{device}/vfio-dev"));
    let number = text(&format!("{device}/vfio-dev/{}/dev", cdevs[0]));
    let status = fs::metadata(format!("/dev/vfio/devices/{}", cdevs[0])).expect("a device");
    let (major, minor) = (libc::major(status.rdev()), libc::minor(status.rdev()));
    println!("cdev: {cdevs:?}, {number}, st_rdev {major}:{minor}");
    println!("groups: {:?}", names("/sys/kernel/iommu_groups"));
    let config = fs::read(format!("{device}/config")).expect("configuration space");
    println!("the configuration space: {}, {}", config.len(), hexadecimal(&config[..4]));
    for folder in ["/dev/vfio", "/dev/vfio/devices"] {
        println!("in {folder}: {:?}", names(folder));
    }
    for name in [c"vfio1", c"./vfio1", c"../devices//vfio1"] {
        in_a_folder(name);
    }
    detours();
    println!("a folder is one: {}", fs::metadata("/sys/bus/pci/drivers").expect("it").is_dir());
    let gone = format!("{BUS}/0000:00:1f.7");
    let missing = [
        fs::read_link(&gone).err(),
        fs::canonicalize(&gone).err(),
        fs::metadata(&gone).err(),
        fs::read_dir(&gone).err(),
    ]
    .map(|error| error.map_or(0, |error| errno(&error)).to_string());
    println!("what is not there: errno {}", missing.join(" "));
    println!("the rest of /sys: {}", fs::metadata("/sys/kernel").is_ok());
    let link = fs::read_link("/dev/iommu").expect_err("a device");
    let real = fs::canonicalize("/dev/iommu").expect("a device");
    println!("/dev/iommu is no link: errno {}, really {}", errno(&link), real.display());
    println!("pid {}", std::process::id());
    child(|| {
        println!("in a child: {} devices", names(BUS).len());
        println!("pid {}", std::process::id());
        // Unlike `_exit`, removes the child's folder.
        std::process::exit(0);
    });
}

/// Paths that are not the shortest, and calls that are not the usual ones.
fn detours() {
    let status = fs::metadata("//dev/./vfio/devices/../devices//vfio0").expect("a device");
    println!("not the shortest path: st_rdev {}", libc::major(status.rdev()));
    let real = fs::canonicalize("/dev//vfio/./vfio/").map_err(|error| errno(&error));
    let plain = fs::canonicalize("/dev//vfio/./vfio").expect("a device");
    println!("really: {} {real:?}", plain.display());
    let null = fs::metadata("/dev/vfio/../null").expect("the kernel's").file_type();
    let has_null = names("/dev/vfio/..").contains(&"null".to_owned());
    let cpus = fs::read("/sys/bus/pci/../../devices/system/cpu/online").is_ok();
    println!("back to the kernel's: {} {has_null} {cpus}", null.is_char_device());
    let folder = "/dev/vfio/devices";
    let mut entries = fs::read_dir(folder).expect("a folder");
    let is_device = |entry: fs::DirEntry| entry.file_type().expect("it").is_char_device();
    println!("devices in lists: {}", entries.all(|entry| is_device(entry.expect("an entry"))));

    let device = c"/dev/vfio/devices/vfio0".as_ptr();
    let refused = [libc::O_CREAT | libc::O_EXCL, libc::O_DIRECTORY].map(|flags| {
        // SAFETY: the path is a C string.
        let fd = unsafe { libc::open(device, flags | libc::O_RDWR | libc::O_CLOEXEC, 0) };
        if fd < 0 {
            errno(&Error::last_os_error())
        } else {
            0
        }
    });
    println!("a new one, a folder: errno {refused:?}");
    let file = fs::File::open("/dev/vfio/devices/vfio0").expect("a device");
    // SAFETY: all zeroes are a valid status.
    let mut status: libc::stat = unsafe { std::mem::zeroed() };
    let empty = c"".as_ptr();
    // SAFETY: there is room for the status, and the path is a C string.
    let of_descriptor =
        unsafe { libc::fstatat(file.as_raw_fd(), empty, &mut status, libc::AT_EMPTY_PATH) };
    println!("fstatat of a descriptor: {of_descriptor} {:o}", status.st_mode);

    let open = fs::File::open(folder).expect("a folder");
    let link = CString::new(format!("/proc/self/fd/{}", open.as_raw_fd())).expect("no zero");
    let mut room = [0u8; 9];
    // SAFETY: there is so much room.
    let length = unsafe { libc::readlink(link.as_ptr(), room.as_mut_ptr().cast(), room.len()) };
    println!("what there is room for: {length} {}", String::from_utf8_lossy(&room));
    // SAFETY: the kernel, or who stands for it, checks the address.
    let length = unsafe { libc::readlink(link.as_ptr(), 8 as *mut c_char, 9) };
    println!("no room: {length} {}", errno(&Error::last_os_error()));
}

/// Opens a device by its name in an open folder.
fn in_a_folder(name: &CStr) {
    let folder = fs::File::open("/dev/vfio/devices").expect("a folder");
    // SAFETY: the name is a C string; the number is new.
    let device = unsafe {
        let fd = libc::openat(folder.as_raw_fd(), name.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
        assert!(fd >= 0, "{}", Error::last_os_error());
        fs::File::from_raw_fd(fd)
    };
    let is_device = device.metadata().expect("its status").file_type().is_char_device();
    let bound = Device::from(device).bind(open("/dev/iommu"));
    let name = name.to_str().expect("text");
    println!("{name} in the open folder: character device {is_device}, bind {}", outcome(bound));
}

extern "C" {
    fn __open64_2(path: *const c_char, flags: c_int) -> c_int;
    fn __openat_2(folder: c_int, path: *const c_char, flags: c_int) -> c_int;
    fn __pread64_chk(fd: c_int, to: *mut c_void, count: usize, at: i64, room: usize) -> isize;
    fn __pread_chk(fd: c_int, to: *mut c_void, count: usize, at: i64, room: usize) -> isize;
    fn __read_chk(fd: c_int, to: *mut c_void, count: usize, room: usize) -> isize;
    fn __readlink_chk(path: *const c_char, to: *mut c_char, count: usize, room: usize) -> isize;
    fn __readlinkat_chk(
        folder: c_int,
        path: *const c_char,
        to: *mut c_char,
        count: usize,
        room: usize,
    ) -> isize;
    fn __realpath_chk(path: *const c_char, to: *mut c_char, room: usize) -> *mut c_char;
    fn __poll_chk(fds: *mut libc::pollfd, count: u64, timeout: c_int, room: usize) -> c_int;
    fn __ppoll_chk(
        fds: *mut libc::pollfd,
        count: u64,
        timeout: *const libc::timespec,
        signals: *const libc::sigset_t,
        room: usize,
    ) -> c_int;
}

/// Memory, bus master, no pin.
static COMMAND: [u8; 2] = [6, 4];

/// Calls what `_FORTIFY_SOURCE` makes of calls, and some with several pieces, with the device at
/// `path`.
pub fn fortified(path: &str) {
    const ROOM: usize = 4096;
    let c_path = CString::new(path).expect("no zero");
    let flags = libc::O_RDWR | libc::O_CLOEXEC;
    let mut bytes = [0u8; ROOM];
    let to: *mut c_void = bytes.as_mut_ptr().cast();
    // SAFETY: the path is a C string.
    let opened = unsafe {
        [__open64_2(c_path.as_ptr(), flags), __openat_2(libc::AT_FDCWD, c_path.as_ptr(), flags)]
    };
    println!("__open64_2, __openat_2: {} {}", opened[0] >= 0, opened[1] >= 0);
    let fd = opened[0];
    // SAFETY: the number is new; it stays open until the end.
    let file = unsafe { fs::File::from_raw_fd(fd) };
    let mut device = Device::from(file.try_clone().expect("a duplicate"));
    device.bind(open("/dev/iommu")).expect("bind");
    let config = 7i64 << 40;
    // SAFETY: there is room.
    let read = unsafe { __pread64_chk(fd, to, 256, config, ROOM) };
    println!("__pread64_chk: {read}, {}", hexadecimal(&bytes[..4]));
    // SAFETY: as above.
    let read = unsafe { __pread_chk(fd, to, 7, config + 1, ROOM) };
    println!("__pread_chk: {read}");
    let (first, second) = bytes.split_at_mut(64);
    let vectors = [first, second].map(|part: &mut [u8]| libc::iovec {
        iov_base: part.as_mut_ptr().cast(),
        iov_len: part.len().min(64),
    });
    // SAFETY: there is room.
    let read = unsafe { libc::preadv64(fd, vectors.as_ptr(), 2, config) };
    println!("preadv64: {read}, MSI at {:#x}", bytes[0x34]);
    let command = libc::iovec { iov_base: (&raw const COMMAND) as *mut c_void, iov_len: 2 };
    // SAFETY: as above.
    let written = unsafe { libc::pwritev64(fd, &command, 1, config + 4) };
    // SAFETY: as above.
    let read = unsafe { __pread64_chk(fd, to, 2, config + 4, ROOM) };
    println!("pwritev64: {written}, {read}: {}", hexadecimal(&bytes[..2]));
    // SAFETY: as above. At offset 0, without a position, is nothing to be read at once.
    let read = unsafe { __read_chk(opened[1], to, 8, ROOM) };
    assert_eq!(read, -1);
    println!("__read_chk: errno {}", errno(&Error::last_os_error()));

    let link = CString::new(format!("{BUS}/0000:00:05.0/iommu_group")).expect("no zero");
    // SAFETY: as above.
    let length = unsafe { __readlink_chk(link.as_ptr(), to.cast(), ROOM, ROOM) };
    println!("__readlink_chk: {}", String::from_utf8_lossy(&bytes[..length as usize]));
    let folder = fs::File::open(format!("{BUS}/0000:00:05.0")).expect("a folder");
    let name = c"iommu_group".as_ptr();
    // SAFETY: as above.
    let length = unsafe { __readlinkat_chk(folder.as_raw_fd(), name, to.cast(), ROOM, ROOM) };
    println!("__readlinkat_chk: {length}");
    let device = CString::new(format!("{BUS}/0000:00:05.0")).expect("no zero");
    // SAFETY: as above.
    let real = unsafe { __realpath_chk(device.as_ptr(), to.cast(), ROOM) };
    assert!(!real.is_null(), "{}", Error::from(ErrorKind::NotFound));
    // SAFETY: it is a C string.
    println!("__realpath_chk: {}", unsafe { CStr::from_ptr(real) }.to_string_lossy());

    let mut poll = libc::pollfd { fd, events: libc::POLLOUT, revents: 0 };
    let size = size_of_val(&poll);
    // SAFETY: one structure.
    let polled = unsafe { __poll_chk(&mut poll, 1, 0, size) };
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: as above.
    let again = unsafe { __ppoll_chk(&mut poll, 1, &now, std::ptr::null(), size) };
    println!("__poll_chk: {polled}, __ppoll_chk: {again}");
}
