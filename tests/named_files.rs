// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Invalid named files: each is refused in one line, without blocking.

#[path = "../src/vmm/arch/x86_64/boot/test_images.rs"]
mod images;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use twostage::skips::not_tested;
use twostage_vmm::exit_code::{IO_ERROR, NO_INPUT};

const TWOSTAGE: &str = env!("CARGO_BIN_EXE_twostage");

/// Sufficient on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// Writes `h` to the serial port, and ends the machine with 7.
const GUEST: [u8; 14] =
    [0x66, 0xba, 0xf8, 0x03, 0xb0, b'h', 0xee, 0x66, 0xba, 0xf4, 0x00, 0xb0, 7, 0xee];

/// A folder with a kernel, and a FIFO that nobody has open.
struct Files {
    directory: TempDir,
}

impl Files {
    /// None if guests cannot run.
    fn new() -> Option<Self> {
        if kvm_ioctls::Kvm::new().is_err() {
            not_tested("no /dev/kvm");
            return None;
        }
        let files = Self { directory: TempDir::new().unwrap() };
        std::fs::write(files.path("kernel"), images::multiboot(&GUEST)).unwrap();
        assert!(Command::new("mkfifo").arg(files.path("fifo")).status().unwrap().success());
        Some(files)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Runs the command in the folder, until it ends.
    fn run(&self, args: &[&str]) -> Output {
        let mut child = Command::new(TWOSTAGE)
            .args(["run", "--cmdline", "e"])
            .args(args)
            .current_dir(&self.directory)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let started = Instant::now();
        while child.try_wait().unwrap().is_none() {
            if started.elapsed() > LIMIT {
                child.kill().unwrap();
                panic!("{args:?} does not end");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        child.wait_with_output().unwrap()
    }

    /// The command exits with `code`, and prints one line that contains `hint`.
    fn refuse(&self, args: &[&str], code: u8, hint: &str) {
        let output = self.run(args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code.into()), "{args:?}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
        assert!(stderr.contains(hint), "{args:?}: '{stderr}' does not say '{hint}'");
    }
}

const KERNEL: [&str; 4] = ["--report", "none", "--kernel", "kernel"];

fn with_kernel<'a>(args: &[&'a str]) -> Vec<&'a str> {
    [&KERNEL[..], args].concat()
}

#[test]
fn a_fifo_is_not_waited_for() {
    let Some(files) = Files::new() else { return };
    files.refuse(&["--kernel", "fifo"], NO_INPUT, "not a regular file");
    for (args, code, hint) in [
        (["--initramfs", "fifo"], NO_INPUT, "not a regular file"),
        (["--disk", "path=fifo"], NO_INPUT, "neither a file nor a block device"),
        (["--disk", "path=fifo,readonly=on"], NO_INPUT, "neither a file nor a block device"),
        (["--rng", "src=fifo"], NO_INPUT, "neither a file nor a character device"),
        (["--serial", "file=fifo"], IO_ERROR, "--serial file=fifo: a FIFO that nobody reads"),
        (["--trace", "fifo"], IO_ERROR, "--trace fifo: a FIFO that nobody reads"),
    ] {
        files.refuse(&with_kernel(&args), code, hint);
    }
    let report = ["--kernel", "kernel", "--report", "json,file=fifo"];
    files.refuse(&report, IO_ERROR, "fifo: a FIFO that nobody reads");
}

#[test]
fn a_fifo_that_is_read_can_be_written() {
    let Some(files) = Files::new() else { return };
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_NONBLOCK);
    let mut reader = options.open(files.path("fifo")).unwrap();
    let output = files.run(&with_kernel(&["--serial", "file=fifo"]));
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "h");
}

#[test]
fn what_is_no_file_is_said() {
    let Some(files) = Files::new() else { return };
    for path in ["/", "/dev/zero", "/dev/null"] {
        files.refuse(&["--kernel", path], NO_INPUT, "not a regular file");
        files.refuse(&with_kernel(&["--initramfs", path]), NO_INPUT, "not a regular file");
    }
    let neither = "neither a file nor a block device";
    for (disk, hint) in [
        ("path=/", "Is a directory"),
        ("path=/,readonly=on", neither),
        ("path=/dev/zero", neither),
        ("path=/dev/null,readonly=on", neither),
    ] {
        files.refuse(&with_kernel(&["--disk", disk]), NO_INPUT, hint);
    }
}

#[test]
fn a_disk_of_another_format_is_said() {
    let Some(files) = Files::new() else { return };
    let mut image = vec![0; 196_608];
    for (mark, format) in [(&b"QFI\xfb"[..], "qcow2"), (b"vhdxfile", "vhdx"), (b"KDMV", "vmdk")] {
        image[..mark.len()].copy_from_slice(mark);
        std::fs::write(files.path("image"), &image).unwrap();
        for options in ["", ",readonly=on", ",direct=on"] {
            if options == ",direct=on" && !has_direct_io(&files.path("image")) {
                continue;
            }
            let disk = format!("path=image{options}");
            let hint = format!("of format {format}, and disks are raw; convert it with: qemu-img");
            files.refuse(&with_kernel(&["--disk", &disk]), NO_INPUT, &hint);
            // A guest may write that to a disk, and the disk must still be accepted next time.
            let output = files.run(&with_kernel(&["--disk", &format!("{disk},format=raw")]));
            assert_eq!(output.status.code(), Some(7), "{output:?}");
        }
    }
}

/// Not supported by every file system.
fn has_direct_io(path: &Path) -> bool {
    File::options().read(true).custom_flags(libc::O_DIRECT).open(path).is_ok()
}

#[test]
fn two_machines_have_a_disk_if_nobody_writes_it() {
    let Some(files) = Files::new() else { return };
    std::fs::write(files.path("disk"), [0; 4096]).unwrap();
    let in_use = "the image is in use";
    let twice = |first, second| with_kernel(&["--disk", first, "--disk", second]);
    files.refuse(&twice("path=disk", "path=disk"), NO_INPUT, in_use);
    files.refuse(&twice("path=disk", "path=disk,readonly=on"), NO_INPUT, in_use);
    files.refuse(&twice("path=disk,readonly=on", "path=disk"), NO_INPUT, in_use);
    let output = files.run(&twice("path=disk,readonly=on", "path=disk,readonly=on"));
    assert_eq!(output.status.code(), Some(7), "{output:?}");
}
