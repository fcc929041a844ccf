// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The file of a disk image: its lock, what the kernel reports of it, and transfers between it and
//! the guest's memory.
//!
//! The lock is for one writer or several readers. Two protocols are followed at once. Both use
//! advisory locks owned by the open file rather than the process, so that one process cannot open
//! an image twice either.
//!
//! QEMU has one byte for each permission that a user takes, and one for each that it denies to
//! others; all locks are shared. After taking its own, a user checks whether anybody has locked the
//! opposite bytes: of two racing users, one or both notice. Source: QEMU's `block/file-posix.c`,
//! and the locks that QEMU 10.0 takes.
//!
//! cloud-hypervisor locks the whole image: exclusively to write, shared to read. Here that covers
//! everything but QEMU's bytes, where a lock would mean something else.
//!
//! Source for block devices and file systems: Linux `include/uapi/linux/fs.h`,
//! `include/uapi/linux/magic.h`, and `Documentation/ABI/stable/sysfs-block`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use vm_memory::bitmap::BitmapSlice;
use vm_memory::VolatileSlice;

/// QEMU: the user has this permission ...
const DOES: i64 = 100;
/// ... or denies it to others.
const DENIES: i64 = 200;
/// Permissions: to read consistent data,
const READ: i64 = 0;
/// or to write.
const WRITE: i64 = 1;
/// The first byte after QEMU's.
const REST: i64 = 300;

/// Locks the image `file` until it is closed: exclusively, which needs a file open for writing, or
/// shared with other readers.
///
/// # Errors
/// `EAGAIN`: somebody else has it; otherwise the system's error, for a file without locks.
pub(super) fn lock(file: &File, writes: bool) -> io::Result<()> {
    let kind = if writes { libc::F_WRLCK } else { libc::F_RDLCK };
    // To the end of the file, wherever that will be.
    set(file, kind, REST, 0)?;
    lock_shared(file, writes)
}

/// Like [`lock`], but only with locks that work on a file open for reading: QEMU's.
///
/// # Errors
/// As for [`lock`].
pub(super) fn lock_shared(file: &File, writes: bool) -> io::Result<()> {
    set(file, libc::F_RDLCK, DOES + READ, 1)?;
    if writes {
        set(file, libc::F_RDLCK, DOES + WRITE, 1)?;
    }
    set(file, libc::F_RDLCK, DENIES + WRITE, 1)?;

    let read_by_us = is_locked(file, DENIES + READ)?;
    let written_by_us = writes && is_locked(file, DENIES + WRITE)?;
    match read_by_us || written_by_us || is_locked(file, DOES + WRITE)? {
        true => Err(io::ErrorKind::WouldBlock.into()),
        false => Ok(()),
    }
}

fn set(file: &File, kind: libc::c_int, start: i64, length: i64) -> io::Result<()> {
    call(file, libc::F_OFD_SETLK, &mut range(kind, start, length))
}

/// Whether somebody else has locked QEMU's byte `at` with QEMU's meaning.
fn is_locked(file: &File, at: i64) -> io::Result<bool> {
    let mut lock = range(libc::F_WRLCK, at, 1);
    call(file, libc::F_OFD_GETLK, &mut lock)?;
    // A shared lock of more than QEMU's bytes is a reader's lock of the whole image. QEMU would
    // refuse.
    let whole = lock.l_len == 0 || lock.l_start.saturating_add(lock.l_len) > REST;
    let kind = libc::c_int::from(lock.l_type);
    Ok(kind == libc::F_WRLCK || (kind == libc::F_RDLCK && !whole))
}

fn range(kind: libc::c_int, start: i64, length: i64) -> libc::flock {
    libc::flock {
        // The three kinds and SEEK_SET are small.
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: length,
        // Not owned by a process.
        l_pid: 0,
    }
}

fn call(file: &File, command: libc::c_int, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: the descriptor is open while `file` is borrowed; both commands that are used here
    // read one `flock`, and one writes it, which lives until the call returns.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Queries whether a block device is read-only; `_IO(0x12, 94)`.
const BLKROGET: libc::c_ulong = 0x125e;

/// Whether the block device `file` is read-only; the kernel lets it be opened for writing all the
/// same.
///
/// # Errors
/// The system's error.
pub(super) fn is_read_only(file: &File) -> io::Result<bool> {
    Ok(ask(file, BLKROGET)? != 0)
}

/// Sector size of the block device `file`, in bytes: the granularity of direct I/O.
///
/// # Errors
/// The system's error.
pub(super) fn sector_size(file: &File) -> io::Result<u32> {
    // Never negative.
    Ok(ask(file, libc::BLKSSZGET as libc::c_ulong)? as u32)
}

/// A file that is the same for all device nodes of the block device `file`: each node has its own
/// locks.
///
/// # Errors
/// The system's error, for example when there is no sysfs.
pub(super) fn common_file(file: &File) -> io::Result<File> {
    let device = file.metadata()?.rdev();
    let (major, minor) = (libc::major(device), libc::minor(device));
    File::open(format!("/sys/dev/block/{major}:{minor}/dev"))
}

/// File systems whose files are memory.
const RAMFS_MAGIC: u64 = 0x8584_58f6;
const TMPFS_MAGIC: u64 = 0x0102_1994;
const FUSE_SUPER_MAGIC: u64 = 0x6573_5546;

/// Whether the contents of `file` are memory, and no disk is behind it. What a device has is no
/// contents of the file system that its node is on, which often is memory.
///
/// # Errors
/// The system's error.
pub(super) fn is_memory(file: &File) -> io::Result<bool> {
    if !file.metadata()?.is_file() {
        return Ok(false);
    }
    let kind = rustix::fs::fstatfs(file)?.f_type as u64;
    Ok(matches!(kind, RAMFS_MAGIC | TMPFS_MAGIC))
}

/// Whether `file` is served by a process (FUSE), or by the host of a virtual machine (virtiofs).
pub(super) fn is_of_fuse(file: &File) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|of| of.f_type as u64 == FUSE_SUPER_MAGIC)
}

/// The kernel takes no more pieces at once (`UIO_MAXIOV`).
const MOST_PIECES: usize = 1024;

/// Reads the bytes of `file` at `offset` into `slices`, which the guest may access meanwhile.
/// Returns how many were read: perhaps not all.
///
/// # Errors
/// The system's error.
pub(super) fn read_into<B: BitmapSlice>(
    file: &File,
    offset: u64,
    slices: &[VolatileSlice<'_, B>],
) -> io::Result<usize> {
    let pieces = merged(slices);
    // SAFETY: the descriptor is open while `file` is borrowed; the pieces are those of slices,
    // which can be written while they are borrowed, and no reference to what is in them exists.
    let read = unsafe {
        libc::preadv(file.as_raw_fd(), pieces.as_ptr(), pieces.len() as i32, offset as i64)
    };
    let read = count(read)?;
    let mut left = read;
    for slice in slices {
        let length = left.min(slice.len());
        slice.bitmap().mark_dirty(0, length);
        left -= length;
    }
    Ok(read)
}

/// Writes `slices` to `file` at `offset`, likewise.
///
/// # Errors
/// The system's error.
pub(super) fn write_from<B: BitmapSlice>(
    file: &File,
    offset: u64,
    slices: &[VolatileSlice<'_, B>],
) -> io::Result<usize> {
    let pieces = merged(slices);
    // SAFETY: as above, and they can be read.
    count(unsafe {
        libc::pwritev(file.as_raw_fd(), pieces.as_ptr(), pieces.len() as i32, offset as i64)
    })
}

/// The memory of `slices`: adjacent ones are one piece. At most [`MOST_PIECES`].
fn merged<B: BitmapSlice>(slices: &[VolatileSlice<'_, B>]) -> Vec<libc::iovec> {
    let mut pieces: Vec<libc::iovec> = Vec::with_capacity(slices.len().min(MOST_PIECES));
    for slice in slices {
        let start = slice.ptr_guard_mut().as_ptr();
        let count = pieces.len();
        match pieces.last_mut() {
            Some(last) if last.iov_base as usize + last.iov_len == start as usize => {
                last.iov_len += slice.len();
            }
            _ if count == MOST_PIECES => break,
            _ => pieces.push(libc::iovec { iov_base: start.cast(), iov_len: slice.len() }),
        }
    }
    pieces
}

/// What a transfer returned.
fn count(returned: isize) -> io::Result<usize> {
    usize::try_from(returned).map_err(|_| io::Error::last_os_error())
}

/// Issues a request that returns an `int`.
fn ask(file: &File, request: libc::c_ulong) -> io::Result<libc::c_int> {
    let mut answer: libc::c_int = 0;
    // SAFETY: the descriptor is open while `file` is borrowed, and both requests that are used here
    // write one `int`, which lives until the call returns.
    match unsafe { libc::ioctl(file.as_raw_fd(), request as _, &mut answer) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(answer),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, OpenOptions};
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use twostage::skips::not_tested;
    use vm_memory::Bytes;

    use super::super::disk::reopen;
    use super::super::{Disk, DiskAccess, DiskError};
    use super::*;

    #[test]
    fn a_file_is_read_and_written_in_pieces_and_adjacent_ones_are_one() {
        let file = tempfile::tempfile().unwrap();
        let mut memory = [0u8; 64];
        memory.iter_mut().zip(1..).for_each(|(byte, number)| *byte = number);
        let all = VolatileSlice::from(&mut memory[..]);
        let slices = [(8, 4), (12, 4), (0, 4), (40, 8), (48, 1)];
        let slices = slices.map(|(at, length)| all.subslice(at, length).unwrap());
        let lengths = |slices: &[VolatileSlice<'_>]| -> Vec<usize> {
            merged(slices).iter().map(|piece| piece.iov_len).collect()
        };
        assert_eq!(lengths(&slices), [8, 4, 9]);
        assert_eq!(write_from(&file, 3, &slices).unwrap(), 21);
        let mut written = vec![0; 24];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut written, 0).unwrap();
        let bytes = [9..17, 1..5, 41..50].into_iter().flatten();
        assert_eq!(written, [0, 0, 0].into_iter().chain(bytes).collect::<Vec<u8>>());

        let bytes = || -> Vec<u8> { (0..64).map(|at| all.read_obj(at).unwrap()).collect() };
        let other = [(60, 4), (20, 16)].map(|(at, length)| all.subslice(at, length).unwrap());
        // The file has no more.
        assert_eq!(read_into(&file, 5, &other).unwrap(), 19);
        assert_eq!(bytes()[60..], [11, 12, 13, 14]);
        assert_eq!(bytes()[20..36], [15, 16, 1, 2, 3, 4, 41, 42, 43, 44, 45, 46, 47, 48, 49, 36]);
        assert_eq!(bytes()[..8], [1, 2, 3, 4, 5, 6, 7, 8]);

        let mut many = vec![0u8; 2 * MOST_PIECES + 2];
        let all = VolatileSlice::from(&mut many[..]);
        let scattered: Vec<_> =
            (0..=MOST_PIECES).map(|n| all.subslice(2 * n, 1).unwrap()).collect();
        assert_eq!(write_from(&file, 0, &scattered).unwrap(), MOST_PIECES);
        let read_only = File::open("/proc/self/exe").unwrap();
        assert!(write_from(&read_only, 0, &slices).is_err());
    }

    #[test]
    fn a_file_in_memory_is_told_from_one_on_a_disk() {
        let memory = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        assert!(is_memory(&memory.into()).unwrap());
        assert!(!is_memory(&File::open("/proc/self/exe").unwrap()).unwrap());
    }

    #[test]
    fn a_device_is_not_in_memory_because_its_node_is() {
        // Any node does: here one that is always there.
        let node = File::open("/dev/null").unwrap();
        let kind = rustix::fs::fstatfs(&node).unwrap().f_type as u64;
        assert!(matches!(kind, RAMFS_MAGIC | TMPFS_MAGIC), "nodes are in memory");
        assert!(!is_memory(&node).unwrap());
        let Some(device) = Loop::new(&[]) else { return };
        assert!(!open(&device.path, false).unwrap().is_in_memory());
    }

    /// How another program uses an image.
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum User {
        Ours,
        /// Locks its bytes, then checks those of others.
        Qemu,
        /// Locks the whole image.
        CloudHypervisor,
    }

    fn take_as(user: User, file: &File, writes: bool) -> bool {
        let others = |at| {
            let mut lock = range(libc::F_WRLCK, at, 1);
            call(file, libc::F_OFD_GETLK, &mut lock).unwrap();
            libc::c_int::from(lock.l_type) != libc::F_UNLCK
        };
        match user {
            User::Ours => lock(file, writes).is_ok(),
            User::Qemu => {
                for at in [100, 201].into_iter().chain(writes.then_some(101)) {
                    set(file, libc::F_RDLCK, at, 1).unwrap();
                }
                !(others(101) || others(200) || (writes && others(201)))
            }
            User::CloudHypervisor => {
                set(file, if writes { libc::F_WRLCK } else { libc::F_RDLCK }, 0, 0).is_ok()
            }
        }
    }

    /// A new image, opened twice, for writing or not. (A process that another test starts keeps the
    /// locks of images that are closed until it executes its program.)
    fn opened(writes: bool, other_writes: bool) -> (File, File) {
        let image = tempfile::NamedTempFile::new().unwrap();
        let open = |writes| File::options().read(true).write(writes).open(image.path()).unwrap();
        (open(writes), open(other_writes))
    }

    #[test]
    fn who_writes_is_alone_and_readers_are_together() {
        for other in [User::Ours, User::Qemu, User::CloudHypervisor] {
            for (writes, other_writes) in
                [(false, false), (false, true), (true, false), (true, true)]
            {
                let may = !writes && !other_writes;
                let (file, their) = opened(writes, other_writes);
                assert!(take_as(User::Ours, &file, writes));
                let got = take_as(other, &their, other_writes);
                assert_eq!(got, may, "ours {writes}, then {other:?} {other_writes}");
                let (file, their) = opened(writes, other_writes);
                assert!(take_as(other, &their, other_writes));
                let got = take_as(User::Ours, &file, writes);
                assert_eq!(got, may, "{other:?} {other_writes}, then ours {writes}");
            }
        }
    }

    #[test]
    fn what_is_taken_is_what_qemu_takes() {
        for (writes, bytes) in [(false, &[100, 201][..]), (true, &[100, 101, 201])] {
            let (file, other) = opened(true, true);
            lock_shared(&file, writes).unwrap();
            let locked: Vec<i64> = (0..REST).filter(|at| is_locked(&other, *at).unwrap()).collect();
            assert_eq!(locked, bytes, "{writes}");
        }
    }

    #[test]
    fn what_somebody_denies_is_not_done() {
        for (at, writes, may) in [(200, false, false), (201, false, true), (203, true, true)] {
            let (file, other) = opened(true, true);
            set(&other, libc::F_RDLCK, at, 1).unwrap();
            assert_eq!(lock(&file, writes).is_ok(), may, "{at}");
        }
    }

    /// A loop device over a file of 1 MiB.
    struct Loop {
        path: PathBuf,
        directory: tempfile::TempDir,
    }

    impl Loop {
        fn new(options: &[&str]) -> Option<Self> {
            let directory = tempfile::tempdir().unwrap();
            let image = directory.path().join("image");
            File::create(&image).unwrap().set_len(1 << 20).unwrap();
            let made =
                Command::new("losetup").args(["--show", "-f"]).args(options).arg(&image).output();
            match made {
                Ok(made) if made.status.success() => {
                    let path = String::from_utf8(made.stdout).unwrap();
                    Some(Self { path: path.trim().into(), directory })
                }
                made => {
                    not_tested(format!("no loop device is to be had ({made:?})"));
                    None
                }
            }
        }

        /// Another device node for it.
        fn node(&self, name: &str) -> PathBuf {
            let device = fs::metadata(&self.path).unwrap().rdev();
            let (major, minor) = (libc::major(device), libc::minor(device));
            let node = self.directory.path().join(name);
            let made = Command::new("mknod")
                .arg(&node)
                .args(["b", &major.to_string(), &minor.to_string()])
                .status();
            assert!(made.unwrap().success());
            node
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            let detached = Command::new("losetup").arg("-d").arg(&self.path).status();
            assert!(detached.unwrap().success());
        }
    }

    fn access(read_only: bool) -> DiskAccess {
        DiskAccess { read_only, ..DiskAccess::default() }
    }

    fn open(path: &Path, read_only: bool) -> Result<Disk, DiskError> {
        Disk::open(path, access(read_only))
    }

    #[test]
    fn what_the_kernel_lets_nobody_write_is_no_disk_to_write() {
        let Some(device) = Loop::new(&["--read-only"]) else { return };
        let error = open(&device.path, false).unwrap_err();
        assert!(matches!(error, DiskError::ReadOnlyDevice(_)), "{error}");
        assert!(error.to_string().contains("readonly=on"), "{error}");
        assert!(open(&device.path, true).unwrap().is_read_only());
    }

    #[test]
    fn blocks_are_the_device_s_sectors_without_the_page_cache() {
        for (sector, size) in [("512", 512), ("4096", 4096)] {
            let Some(device) = Loop::new(&["--sector-size", sector]) else { return };
            let disk =
                Disk::open(&device.path, DiskAccess { direct: true, ..DiskAccess::default() })
                    .unwrap();
            assert_eq!((disk.block_size(), disk.size()), (size, 1 << 20));
            drop(disk);
            assert_eq!(reopen(&device.path, access(false)).unwrap().block_size(), 512);
        }
    }

    #[test]
    fn all_nodes_of_a_device_are_one_disk() {
        let Some(device) = Loop::new(&[]) else { return };
        let (one, other) = (device.node("one"), device.node("other"));
        for (first, second, may) in
            [(true, true, true), (true, false, false), (false, true, false), (false, false, false)]
        {
            let _first = reopen(&one, access(first)).unwrap();
            match open(&other, second) {
                Ok(_) => assert!(may, "readonly {first}, then {second}"),
                Err(DiskError::InUse(_) | DiskError::Claimed(_)) => {
                    assert!(!may, "readonly {first}, then {second}");
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    #[test]
    fn what_the_kernel_gave_to_somebody_is_not_written() {
        let Some(device) = Loop::new(&[]) else { return };
        // As a mount does.
        let claim = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(&device.path);
        let error = open(&device.path, false).unwrap_err();
        assert!(matches!(error, DiskError::Claimed(_)), "{error}");
        assert!(open(&device.path, true).is_ok());
        drop(claim);
        let _disk = reopen(&device.path, access(false)).unwrap();
        let claim = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(&device.path);
        assert_eq!(claim.unwrap_err().raw_os_error(), Some(libc::EBUSY));
    }
}
