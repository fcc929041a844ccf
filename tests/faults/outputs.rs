// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Console, reports and traces that cannot be written: the guest goes on, and a line says what is
//! lost.

use std::fs::File;
use std::io::{pipe, Read};
use std::process::{Command, Output, Stdio};

use tempfile::NamedTempFile;
use twostage_vmm::exit_code::IO_ERROR;

use crate::child::{kernel, kvm, Running};
use crate::images::multiboot;
use crate::{code, run_after};

/// A guest that prints `blocks` times 4096 bytes, and ends the machine with `value`.
fn chatty(blocks: u32, value: u8) -> NamedTempFile {
    let code = [code::flood(blocks), code::exit(value), code::HALT.to_vec()].concat();
    kernel(&multiboot(&code))
}

/// Runs `command` to its end.
fn end(mut command: Command) -> Output {
    let mut machine = Running::new(&mut command);
    drop(command);
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    if let Some(mut pipe) = machine.0.stdout.take() {
        pipe.read_to_end(&mut stdout).unwrap();
    }
    if let Some(mut pipe) = machine.0.stderr.take() {
        pipe.read_to_end(&mut stderr).unwrap();
    }
    Output { status: machine.end(), stdout, stderr }
}

/// `said` without lines about output that was dropped because of `why`, and how many bytes they
/// have: one at once, and one at the end.
fn dropped(said: &str, of: &str, why: &str) -> (String, usize) {
    let (mut rest, mut bytes) = (String::new(), 0);
    let (before, after) =
        (format!("[WARN ] {of}: "), format!(" bytes of output were dropped: {why}"));
    for line in said.lines() {
        match line.strip_prefix(&before).and_then(|line| line.strip_suffix(&after)) {
            Some(number) => bytes += number.parse::<usize>().unwrap(),
            None => rest = rest + line + "\n",
        }
    }
    (rest, bytes)
}

#[test]
fn a_disk_that_is_full_takes_no_console_report_or_trace_and_the_guest_goes_on() {
    if !kvm() {
        return;
    }
    let full = "No space left on device (os error 28)";
    for (option, value, line, lost) in [
        ("--serial", "file=/dev/full", "".to_owned(), 4096),
        (
            "--report",
            "text,file=/dev/full",
            format!("twostage: error: --report: /dev/full: {full}\n"),
            0,
        ),
        ("--trace", "/dev/full", format!("[WARN ] /dev/full: {full}; the trace ends here\n"), 0),
    ] {
        for end_value in [0, 5] {
            let image = chatty(1, end_value);
            let output = end(run_after("true", image.path(), &[option, value, "--jail", "on"]));
            // What the guest says is more than that something was not written.
            let code = if end_value == 0 { IO_ERROR } else { end_value };
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(code.into()), "{option}: {said}");
            assert_eq!(dropped(&said, "/dev/full", full), (line.clone(), lost), "{option}: {said}");
        }
    }
}

#[test]
fn a_pipe_without_a_reader_takes_no_output_and_the_guest_goes_on() {
    if !kvm() {
        return;
    }
    let image = chatty(4, 9);
    let (reader, writer) = pipe().unwrap();
    drop(reader);
    let mut command = run_after("true", image.path(), &["--jail", "on"]);
    command.stdout(writer);
    let output = end(command);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(9), "{said}");
    let lost = dropped(&said, "standard output", "Broken pipe (os error 32)");
    assert_eq!(lost, (String::new(), 4 * 4096), "{said}");
}

#[test]
fn nobody_to_say_anything_to_is_no_end_of_a_machine() {
    if !kvm() {
        return;
    }
    let image = chatty(4, 9);
    for closed in ["true", "exec 2>&-", "exec >&- 2>&-", "exec <&- >&- 2>&-"] {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let options = ["--jail", "on", "--report", "text", "--trace", "/dev/full"];
        let mut command = run_after(closed, image.path(), &options);
        command.stdout(writer.try_clone().unwrap()).stderr(writer);
        assert_eq!(end(command).status.code(), Some(9), "{closed}");
    }
}

#[test]
fn a_pipe_that_is_closed_while_it_is_written_ends_a_trace_and_nothing_else() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("trace");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let image = chatty(4, 0);
    let options = ["--jail", "on", "--trace", fifo.to_str().unwrap()];
    // Opened for both, as the machine does not wait for a reader.
    let mut reader = File::options().read(true).write(true).open(&fifo).unwrap();
    let reader = std::thread::spawn(move || reader.read_exact(&mut [0; 10]).unwrap());
    let mut command = run_after("true", image.path(), &options);
    command.stdout(Stdio::null());
    let output = end(command);
    reader.join().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let line =
        format!("[WARN ] {}: Broken pipe (os error 32); the trace ends here\n", fifo.display());
    assert_eq!((output.status.code(), &*said), (Some(74), &*line));
}
