// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Disks that fail: the guest gets an error for the request that it concerns, the machine goes on,
//! and a line names the disk, the place and the error.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use fuser::Errno;
use rustix::mount::{mount, unmount, MountFlags, UnmountFlags};
use serde_json::Value;
use tempfile::{NamedTempFile, TempDir};
use twostage::skips::not_tested;

use crate::child::{kernel, kvm, with_default_signals, TWOSTAGE};
use crate::fuse::{FaultyDisk, SIZE};
use crate::guest::{after, Guest};
use crate::world::{alone, folders};

/// A disk of 1 MiB in `folder`, and its path.
fn disk(folder: &TempDir) -> (NamedTempFile, String) {
    let file = NamedTempFile::new_in(folder).unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let path = file.path().display().to_string();
    (file, path)
}

#[test]
fn disks_are_served_by_what_is_meant_to_be_tested() {
    let folders = folders();
    if !kvm() || folders.len() < 2 {
        return;
    }
    let disks: Vec<_> = folders.iter().map(disk).collect();
    let [one, other] = [0, 1].map(|at| format!("path={}", disks[at].1));
    let report = NamedTempFile::new().unwrap();
    let to = format!("json,file={}", report.path().display());
    Guest::start(&["--disk", &one, "--disk", &other, "--report", &to]).stop();
    let report: Value = serde_json::from_reader(report.as_file()).unwrap();
    let served: Vec<_> = report["devices"].as_array().unwrap().iter().collect();
    let served: Vec<_> = served.iter().map(|device| device["served_by"].as_str()).collect();
    if served == [Some("memory"), Some("threads")] {
        return not_tested("io_uring is forbidden here, disks that it serves");
    }
    assert_eq!(served, [Some("memory"), Some("io_uring")]);
}

#[test]
fn an_image_that_becomes_shorter_fails_where_it_is_missing_and_nowhere_else() {
    if !kvm() {
        return;
    }
    for folder in folders() {
        let (file, path) = disk(&folder);
        let mut guest = Guest::start(&["--disk", &format!("path={path}")]);
        assert_eq!(guest.ask("w 0 1000 1 77"), "w 0 1000 ok");
        file.as_file().set_len(4096).unwrap();
        assert_eq!(guest.ask("r 0 7 1"), "r 0 7 ok 0");
        // Its second half.
        assert_eq!(guest.ask("r 0 4 8"), "r 0 4 error 1");
        let line = format!(
            "[WARN ] blk: {path}: a read of 2048 bytes at offset 4096 fails: the image has become \
             shorter\n"
        );
        assert_eq!(guest.ask("p on"), "p on");
        // A write makes it longer again.
        assert_eq!(guest.ask("w 0 2047 1 5"), "w 0 2047 ok");
        assert_eq!(guest.ask("r 0 4 8"), "r 0 4 ok 0");
        assert_eq!(guest.stop(), line);
        let mut bytes = [0; 8];
        File::open(file.path()).unwrap().read_exact_at(&mut bytes, 2047 * 512).unwrap();
        assert_eq!(u64::from_le_bytes(bytes), 5);
    }
}

#[test]
fn a_file_system_that_is_full_fails_writes_that_need_room_and_no_others() {
    if !kvm() || !alone() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let size = c"size=64k";
    mount("tmpfs", folder.path(), "tmpfs", MountFlags::empty(), Some(size)).unwrap();
    let (file, path) = disk(&folder);
    let mut guest = Guest::start(&["--disk", &format!("path={path}")]);
    // Half of it fits.
    assert_eq!(guest.ask("w 0 0 256 7"), "w 0 0 error 1");
    assert_eq!(guest.ask("r 0 100 1"), "r 0 100 ok 7");
    assert_eq!(guest.ask("w 0 0 8 8"), "w 0 0 ok");
    assert_eq!(guest.ask("w 0 1024 8 8"), "w 0 1024 error 1");
    assert_eq!(guest.ask("p on"), "p on");
    let full = "fails: No space left on device (os error 28)\n";
    let lines = format!(
        "[WARN ] blk: {path}: a write of 65536 bytes at offset 65536 {full}\
         [WARN ] blk: {path}: a write of 4096 bytes at offset 524288 {full}"
    );
    assert_eq!(guest.stop(), lines);
    drop(file);
    unmount(folder.path(), UnmountFlags::DETACH).unwrap();
}

#[test]
fn a_file_that_may_not_grow_fails_the_write_that_would_make_it() {
    if !kvm() {
        return;
    }
    for folder in folders() {
        let (_file, path) = disk(&folder);
        let mut shell = with_default_signals("sh");
        shell.args(["-c", "ulimit -f 256; exec \"$0\" \"$@\"", TWOSTAGE]);
        let mut guest = Guest::of(after(shell, &["--disk", &format!("path={path}")]));
        assert_eq!(guest.ask("w 0 0 1 1"), "w 0 0 ok");
        assert_eq!(guest.ask("w 0 248 16 2"), "w 0 248 error 1");
        assert_eq!(guest.ask("r 0 248 1"), "r 0 248 ok 2");
        assert_eq!(guest.ask("f 0"), "f 0 0 ok");
        let line = format!(
            "[WARN ] blk: {path}: a write of 4096 bytes at offset 131072 fails: File too large (os \
             error 27)\n"
        );
        assert_eq!(guest.stop(), line);
    }
}

/// The two lives of a machine on `disk`, in each of which `check` is done.
fn in_each_life(disk: &FaultyDisk, mut check: impl FnMut(&mut Guest)) -> String {
    let mut guest = Guest::start(&["--on-reset", "restart", "--disk", &disk.option()]);
    check(&mut guest);
    assert_eq!(guest.ask("z"), "ready: 1 disks");
    check(&mut guest);
    guest.stop()
}

#[test]
fn errors_of_a_disk_are_told_with_their_place() {
    if !kvm() || !alone() {
        return;
    }
    let disk = FaultyDisk::new(true);
    let path = disk.path().display().to_string();
    let said = in_each_life(&disk, |guest| {
        disk.fail_flushes(None);
        disk.fail(8192..12288, Errno::EIO);
        assert_eq!(guest.ask("w 0 0 16 3"), "w 0 0 ok");
        assert_eq!(guest.ask("r 0 0 64"), "r 0 0 error 1");
        assert_eq!(guest.ask("r 0 24 64"), "r 0 24 ok 0");
        disk.fail(8192..12288, Errno::ENOSPC);
        assert_eq!(guest.ask("w 0 0 64 4"), "w 0 0 error 1");
        assert_eq!(guest.ask("r 0 0 1"), "r 0 0 ok 4");
        assert_eq!(guest.ask("f 0"), "f 0 0 ok");
        disk.fail_flushes(Some(Errno::EIO));
        assert_eq!(guest.ask("f 0"), "f 0 0 error 1");
        // The system tells of it once: from then on no flush promises anything.
        disk.fail_flushes(None);
        assert_eq!(guest.ask("f 0"), "f 0 0 error 1");
        assert_eq!(guest.ask("p on"), "p on");
    });
    for line in [
        "a read of 24576 bytes at offset 8192 fails: Input/output error (os error 5)",
        "a write of 24576 bytes at offset 8192 fails: No space left on device (os error 28)",
        "a flush fails: Input/output error (os error 5)\n",
    ] {
        let lines = said.matches(&format!("[WARN ] blk: {path}: {line}")).count();
        assert!(lines == 2 || (line.contains("flush") && lines == 4), "{lines}: {said}");
    }
    let lost = format!(
        "[ERROR] {path}: a flush fails: Input/output error (os error 5); what was written may be \
         lost, and all flushes fail until the image is opened again\n"
    );
    assert_eq!(said.matches(&lost).count(), 2, "{said}");
}

#[test]
fn a_disk_that_fails_always_is_told_of_a_few_times() {
    if !kvm() || !alone() {
        return;
    }
    let disk = FaultyDisk::new(true);
    let mut guest = Guest::start(&["--disk", &disk.option()]);
    disk.fail(0..SIZE, Errno::EIO);
    let start = Instant::now();
    for n in 0..200 {
        assert_eq!(guest.ask(&format!("r 0 {n} 1")), format!("r 0 {n} error 1"));
    }
    // Ten times in five seconds.
    let most = 10 * (start.elapsed().as_secs() as usize / 5 + 1);
    let said = guest.stop();
    assert!(said.lines().count() <= most, "{said}");
    assert!(said.contains("a read of 512 bytes at offset 0 fails"), "{said}");
}

#[test]
fn a_source_of_entropy_that_fails_needs_a_reset_of_its_device_alone() {
    if !kvm() || !alone() {
        return;
    }
    let source = FaultyDisk::new(true);
    let path = source.path().display().to_string();
    let mut guest = Guest::start(&["--rng", &format!("src={path}")]);
    assert_eq!(guest.ask("g"), "g 4096");
    source.fail(0..SIZE, Errno::EIO);
    guest.order("g");
    let line = format!("[WARN ] 00:01.0 rng: its source {path}: Input/output error (os error 5)\n");
    guest.wait_for(&line);
    // DEVICE_NEEDS_RESET.
    assert_eq!(guest.ask("s"), "s 79");
    assert_eq!(guest.stop(), line);
}

/// A loop device of this test's.
struct Loop(String);

impl Loop {
    fn new(image: &Path) -> Option<Self> {
        let made = Command::new("losetup").args(["--show", "-f"]).arg(image).output();
        match made {
            Ok(made) if made.status.success() => {
                Some(Self(String::from_utf8(made.stdout).unwrap().trim().to_owned()))
            }
            made => {
                not_tested(format!("no loop device is to be had ({made:?}; is this root?)"));
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        assert!(Command::new("losetup").args(["-d", &self.0]).status().unwrap().success());
    }
}

/// In the jail, as another user than root, and opened again there.
#[test]
fn a_block_device_is_read_and_written_in_both_lives_of_a_machine() {
    if !kvm() {
        return;
    }
    const SECTOR: usize = 512;
    for direct in ["off", "on"] {
        let mut expected: Vec<u8> =
            (0..2048u64).flat_map(|n| n.to_le_bytes().repeat(SECTOR / 8)).collect();
        let image = kernel(&expected);
        let Some(device) = Loop::new(image.path()) else { return };
        let option = format!("path={},direct={direct}", device.0);
        let mut guest = Guest::start(&["--disk", &option, "--on-reset", "restart"]);
        for life in 0..2 {
            assert_eq!(guest.ask("r 0 2047 1"), "r 0 2047 ok 2047");
            let (at, value) = (100 + life, 77 + life);
            assert_eq!(guest.ask(&format!("w 0 {at} 8 {value}")), format!("w 0 {at} ok"));
            assert_eq!(guest.ask(&format!("r 0 {at} 1")), format!("r 0 {at} ok {value}"));
            assert_eq!(guest.ask("f 0"), "f 0 0 ok");
            let (start, length) = (at as usize * SECTOR, 8 * SECTOR);
            let written = u64::to_le_bytes(value).repeat(length / 8);
            expected[start..start + length].copy_from_slice(&written);
            if life == 0 {
                assert_eq!(guest.ask("z"), "ready: 1 disks");
            }
        }
        let said = guest.stop();
        assert!(said.lines().all(|line| line.contains("the guest reset the machine")), "{said}");
        drop(device);
        assert!(fs::read(image.path()).unwrap() == expected, "direct={direct}");
    }
}
