// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The console of `twostage run`: input, a terminal, and output that is read late or never.
//!
//! Guests are assembled here. Tests that need `/dev/kvm` print that, and pass, without it.

#[path = "common/child.rs"]
mod child;
#[path = "common/code.rs"]
mod code;
#[path = "../src/vmm/arch/x86_64/boot/test_images.rs"]
mod images;

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use child::{kernel, kvm, with_default_signals, Running, TWOSTAGE};
use images::multiboot;
use rustix::pipe::fcntl_setpipe_size;
use rustix::pty::{grantpt, openpt, ptsname, unlockpt, OpenptFlags};
use rustix::termios::{
    tcgetattr, tcsetattr, LocalModes, OptionalActions, SpecialCodeIndex, Termios,
};
use tempfile::NamedTempFile;
use twostage::patience::{wait_until, PATIENCE};

/// A guest that prints a line, and then idles.
fn idle() -> NamedTempFile {
    kernel(&multiboot(&[code::print("."), code::HALT.to_vec()].concat()))
}

/// A guest that writes so many blocks, and ends the machine with 9.
fn flood(blocks: u32) -> (NamedTempFile, Vec<u8>) {
    let code = [code::flood(blocks), code::exit(9), code::HALT.to_vec()].concat();
    let mut block = code.clone();
    block.resize(4096, 0);
    (kernel(&multiboot(&code)), block.repeat(blocks as usize))
}

fn run(kernel: &NamedTempFile) -> Command {
    let mut command = with_default_signals(TWOSTAGE);
    command.args(["run", "--report", "none", "--memory", "size=16M", "--kernel"]);
    command.arg(kernel.path()).stdin(Stdio::null());
    command
}

/// A pseudo-terminal: the user's side, and the programs' side.
struct Pty {
    user: File,
    programs: File,
}

impl Pty {
    fn new() -> Self {
        let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&user).unwrap();
        unlockpt(&user).unwrap();
        let path = ptsname(&user, Vec::new()).unwrap().into_bytes();
        let mut options = File::options();
        let programs = options.read(true).write(true).open(std::ffi::OsString::from_vec(path));
        Self { user: user.into(), programs: programs.unwrap() }
    }

    fn stdio(&self) -> Stdio {
        self.programs.try_clone().unwrap().into()
    }

    fn modes(&self) -> Termios {
        tcgetattr(&self.programs).unwrap()
    }

    fn wait_until_raw(&self) {
        wait_until("a raw terminal", || !self.modes().local_modes.contains(LocalModes::ICANON));
    }

    fn types(&self, keys: &[u8]) {
        (&self.user).write_all(keys).unwrap();
    }
}

fn assert_same(now: &Termios, before: &Termios, how: &str) {
    let modes = |modes: &Termios| {
        let codes = [SpecialCodeIndex::VMIN, SpecialCodeIndex::VTIME, SpecialCodeIndex::VINTR]
            .map(|index| modes.special_codes[index]);
        let Termios { input_modes, output_modes, control_modes, local_modes, .. } = modes;
        (*input_modes, *output_modes, *control_modes, *local_modes, codes)
    };
    assert_eq!(modes(now), modes(before), "{how}");
}

/// Reads as many bytes as `expected` has.
fn read_as_much(mut from: impl Read, expected: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; expected.len()];
    from.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn input_that_the_guest_does_not_read_costs_no_time() {
    if !kvm() {
        return;
    }
    let image = idle();
    let (mut writer, reader) = UnixStream::pair().unwrap();
    // More than the port holds, without end of file.
    writer.write_all(&[b'x'; 200]).unwrap();
    drop(writer);
    let mut command = run(&image);
    let command = command.stdin(OwnedFd::from(reader)).stdout(Stdio::piped());
    let mut machine = Running::new(command);
    assert_eq!(read_as_much(machine.0.stdout.take().unwrap(), b"."), b".");
    std::thread::sleep(Duration::from_millis(500));
    let before = machine.ticks();
    std::thread::sleep(Duration::from_secs(2));
    let used = machine.ticks() - before;
    assert!(used < 20, "{used} ticks of 200");
    machine.signal("TERM");
    assert_eq!(machine.end().code(), Some(143));
}

#[test]
fn all_of_a_file_and_of_a_pipe_that_ended_reaches_the_guest() {
    if !kvm() {
        return;
    }
    let image = kernel(&multiboot(&code::ECHO));
    let text: Vec<u8> = (0..5000u32).map(|number| b'a' + (number % 23) as u8).collect();
    let file = kernel(&text);
    let (mut writer, reader) = UnixStream::pair().unwrap();
    writer.write_all(&text).unwrap();
    drop(writer);
    for input in [Stdio::from(File::open(file.path()).unwrap()), OwnedFd::from(reader).into()] {
        let mut machine = Running::new(run(&image).stdin(input).stdout(Stdio::piped()));
        let echoed = read_as_much(machine.0.stdout.take().unwrap(), &text);
        assert!(echoed == text);
        machine.signal("TERM");
        assert_eq!(machine.end().code(), Some(143));
    }
}

#[test]
fn every_key_is_the_guests_but_those_behind_ctrl_a() {
    if !kvm() {
        return;
    }
    let (image, pty) = (kernel(&multiboot(&code::ECHO)), Pty::new());
    let before = pty.modes();
    let mut command = run(&image);
    command.stdin(pty.stdio()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut machine = Running::new(&mut command);
    pty.wait_until_raw();
    assert_eq!(pty.modes().output_modes, before.output_modes);
    pty.types(b"\r\n\x03\x1a\x04\x13\x11\x16\x0f\x1c\x7f\xff\x01\x01\x01a\x01qx");
    let expected = b"\r\n\x03\x1a\x04\x13\x11\x16\x0f\x1c\x7f\xff\x01\x01x";
    let mut output = machine.0.stdout.take().unwrap();
    assert_eq!(read_as_much(&mut output, expected), expected);
    pty.types(b"\x01h\x01x");
    assert_eq!(machine.end().code(), Some(0));
    let mut rest = String::new();
    output.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("Ctrl-A x  end the machine\r\n"), "{rest}");
    let mut said = String::new();
    machine.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said, "twostage: Ctrl-A x ends the machine, Ctrl-A h shows help\n");
    assert_same(&pty.modes(), &before, "Ctrl-A x");
}

#[test]
fn the_escape_ends_a_guest_that_reads_nothing() {
    if !kvm() {
        return;
    }
    let (image, pty) = (idle(), Pty::new());
    let mut machine = Running::new(run(&image).stdin(pty.stdio()).stdout(Stdio::null()));
    pty.wait_until_raw();
    // Far more than the port and the terminal hold.
    for _ in 0..100 {
        pty.types(&[b'x'; 1000]);
    }
    pty.types(b"\x01x");
    assert_eq!(machine.end().code(), Some(0));
}

#[test]
fn the_escape_is_one_also_if_the_guest_resets_between_its_keys() {
    if !kvm() {
        return;
    }
    // mov dx, 0x3fd; in al, dx; test al, 1; jz -5: until a key comes.
    let wait = [0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 1, 0x74, 0xfb];
    let code = [code::print("."), wait.to_vec(), code::triple_fault()].concat();
    let (pty, image) = (Pty::new(), kernel(&multiboot(&code)));
    let mut command = run(&image);
    command.args(["--on-reset", "restart"]);
    let command = command.stdin(pty.stdio()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut machine = Running::new(command);
    let mut output = machine.0.stdout.take().unwrap();
    assert_eq!(read_as_much(&mut output, b"."), b".");
    pty.types(b"q\x01");
    assert_eq!(read_as_much(&mut output, b"."), b".");
    pty.types(b"x");
    assert_eq!(machine.end().code(), Some(0));
}

#[test]
fn the_terminal_is_what_it_was_however_the_machine_ends() {
    if !kvm() {
        return;
    }
    let image = idle();
    let quiet = LocalModes::ECHO;
    let raw = LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG;
    for (signal, number, off) in [
        ("TERM", None, quiet),
        ("HUP", None, LocalModes::empty()),
        ("XCPU", None, raw),
        ("ABRT", Some(6), quiet),
        ("SEGV", Some(11), LocalModes::empty()),
        ("FPE", Some(8), LocalModes::empty()),
    ] {
        let pty = Pty::new();
        let mut modes = pty.modes();
        modes.local_modes -= off;
        tcsetattr(&pty.programs, OptionalActions::Now, &modes).unwrap();
        let mut command = run(&image);
        command.stdin(pty.stdio()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut machine = Running::new(&mut command);
        assert_eq!(read_as_much(machine.0.stdout.take().unwrap(), b"."), b".");
        wait_until("a raw terminal", || !pty.modes().local_modes.contains(LocalModes::IEXTEN));
        machine.signal(signal);
        let status = machine.end();
        assert_eq!(status.signal(), number, "{signal}: {status}");
        assert_same(&pty.modes(), &modes, signal);
    }
}

#[test]
fn the_background_leaves_the_terminal_alone_and_the_foreground_takes_it() {
    if !kvm() {
        return;
    }
    let (image, pty) = (idle(), Pty::new());
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let before = pty.modes();
    // A shell with jobs, whose terminal this is.
    let script = format!(
        "'{TWOSTAGE}' run --report none --memory size=16M --kernel '{}' >'{out}' & pid=$!
         until [ -s '{out}' ]; do
           read -r line </proc/$pid/stat
           case $line in *') T '*) echo stopped; kill -KILL $pid; exit 1;; esac
           sleep 0.05
         done
         echo runs >'{runs}'
         fg >/dev/null
         echo code $? >'{code}'",
        image.path().display(),
        out = path("out"),
        runs = path("runs"),
        code = path("code")
    );
    let mut command = with_default_signals("setsid");
    command.args(["--ctty", "--wait", "sh", "-mc", &script]).stdin(pty.stdio());
    let mut shell = Running::new(command.stdout(Stdio::null()).stderr(Stdio::null()));
    wait_until("a machine in the background", || {
        assert_eq!(shell.0.try_wait().unwrap(), None, "it was stopped");
        std::path::Path::new(&path("runs")).exists()
    });
    pty.wait_until_raw();
    pty.types(b"\x01x");
    assert_eq!(shell.end().code(), Some(0));
    assert_eq!(std::fs::read_to_string(path("code")).unwrap(), "code 0\n");
    assert_same(&pty.modes(), &before, "after fg");
}

#[test]
fn a_background_machine_that_ends_changes_no_terminal() {
    if !kvm() {
        return;
    }
    let (image, pty) = (idle(), Pty::new());
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out").display().to_string();
    // Raw, as editors and shells set it while a job of theirs is in the background.
    let mut modes = pty.modes();
    modes.make_raw();
    tcsetattr(&pty.programs, OptionalActions::Now, &modes).unwrap();
    let script = format!(
        "'{TWOSTAGE}' run --report none --memory size=16M --kernel '{}' >'{out}' & pid=$!
         until [ -s '{out}' ]; do
           read -r line </proc/$pid/stat
           case $line in *') T '*) kill -KILL $pid; exit 1;; esac
           sleep 0.05
         done
         kill -TERM $pid; wait $pid; [ $? = 143 ]",
        image.path().display(),
    );
    let mut command = with_default_signals("setsid");
    command.args(["--ctty", "--wait", "sh", "-mc", &script]).stdin(pty.stdio());
    let mut shell = Running::new(command.stdout(Stdio::null()).stderr(Stdio::null()));
    assert_eq!(shell.end().code(), Some(0));
    assert_same(&pty.modes(), &modes, "in the background");
}

/// A pipe with the capacity of a page: its reader and writer.
fn small_pipe() -> (PipeReader, PipeWriter) {
    let (reader, writer) = std::io::pipe().unwrap();
    fcntl_setpipe_size(&writer, 4096).unwrap();
    (reader, writer)
}

#[test]
fn no_guest_waits_for_who_reads_and_what_is_lost_is_said() {
    if !kvm() {
        return;
    }
    // More than is buffered for a late reader.
    let (image, all) = flood(72);
    let (mut reader, writer) = small_pipe();
    let mut command = run(&image);
    command.stdout(writer).stderr(Stdio::piped());
    let mut machine = Running::new(&mut command);
    drop(command);
    // Nobody reads yet.
    assert_eq!(machine.end().code(), Some(9));
    let mut said = String::new();
    machine.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    let line = said.trim_start_matches("[WARN ] standard output: ");
    assert_eq!(said.lines().count(), 1, "{said}");
    let dropped: usize = line.split(' ').next().unwrap().parse().unwrap();
    let mut got = Vec::new();
    reader.read_to_end(&mut got).unwrap();
    assert!(all.starts_with(&got) && !got.is_empty());
    assert_eq!(dropped, all.len() - got.len(), "{said}");
}

/// A machine whose guest has written so much to `writer`, which nobody reads, and then idles; and
/// the expected output.
fn flooded(blocks: u32, writer: PipeWriter) -> (Running, Vec<u8>) {
    let code = [code::flood(blocks), code::HALT.to_vec()].concat();
    let mut all = code.clone();
    all.resize(4096, 0);
    let all = all.repeat(blocks as usize);
    let (image, report) = (kernel(&multiboot(&code)), NamedTempFile::new().unwrap());
    let mut command = with_default_signals(TWOSTAGE);
    command.args(["run", "--memory", "size=16M", "--kernel"]).arg(image.path());
    command.arg("--report").arg(format!("json,file={}", report.path().display()));
    command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped());
    let mut machine = Running::new(&mut command);
    machine.wait_until_reports_can_be_had();
    wait_until("output", || {
        assert_eq!(machine.0.try_wait().unwrap(), None);
        machine.signal("USR1");
        let report = std::fs::read(report.path()).unwrap();
        let report: serde_json::Value = serde_json::from_slice(&report).unwrap_or_default();
        report["exits"]["io-out"].as_u64().is_some_and(|exits| exits >= all.len() as u64)
    });
    (machine, all)
}

#[test]
fn output_that_does_not_wait_loses_nothing() {
    if !kvm() {
        return;
    }
    let (mut reader, writer) = small_pipe();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    let (mut machine, all) = flooded(16, writer);
    let got = read_as_much(&mut reader, &all);
    assert!(got == all);
    machine.signal("TERM");
    assert_eq!(machine.end().code(), Some(143));
    let mut said = String::new();
    machine.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said, "");
}

#[test]
fn standard_error_that_nobody_reads_holds_nothing_up() {
    if !kvm() {
        return;
    }
    let (image, _) = flood(2);
    // Both of one pipe, as with 2>&1, and full.
    let (_reader, mut writer) = small_pipe();
    writer.write_all(&[0; 4096]).unwrap();
    let mut command = with_default_signals(TWOSTAGE);
    command.args(["run", "--memory", "size=16M", "--kernel"]).arg(image.path());
    command.stdin(Stdio::null()).stdout(writer.try_clone().unwrap()).stderr(writer);
    // The report, too, cannot be written.
    assert_eq!(Running::new(&mut command).end().code(), Some(9));
}

#[test]
fn a_slow_reader_does_not_hold_up_the_end() {
    if !kvm() {
        return;
    }
    let (mut reader, writer) = small_pipe();
    // About as much as is buffered for a late reader.
    let (mut machine, _) = flooded(60, writer);
    machine.signal("TERM");
    // Reads a piece each time; all of it would be more than 60 pieces.
    let mut pieces = 0;
    let status = loop {
        if let Some(status) = machine.0.try_wait().unwrap() {
            break status;
        }
        std::thread::sleep(Duration::from_millis(250));
        let _ = reader.read(&mut [0; 4096]).unwrap();
        pieces += 1;
    };
    assert_eq!(status.code(), Some(143));
    // Those of a second, and more on a busy machine.
    assert!(pieces <= 50, "{pieces} pieces");
}

#[test]
fn reports_that_nobody_reads_do_not_keep_the_guest_from_its_input() {
    if !kvm() {
        return;
    }
    let image = kernel(&multiboot(&code::ECHO));
    let (_reader, mut full) = small_pipe();
    full.write_all(&[0; 4096]).unwrap();
    let mut command = with_default_signals(TWOSTAGE);
    command.args(["run", "--memory", "size=16M", "--kernel"]).arg(image.path());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(full);
    let mut machine = Running::new(&mut command);
    let (mut input, mut output) =
        (machine.0.stdin.take().unwrap(), machine.0.stdout.take().unwrap());
    input.write_all(b".").unwrap();
    read_as_much(&mut output, b".");
    let started = Instant::now();
    for _ in 0..120 {
        machine.signal("USR1");
        input.write_all(b"x").unwrap();
        assert_eq!(read_as_much(&mut output, b"x"), b"x");
    }
    // If waited for, each would have taken a second.
    assert!(started.elapsed() < PATIENCE, "{:?}", started.elapsed());
    machine.signal("TERM");
    assert_eq!(machine.end().code(), Some(143));
}
