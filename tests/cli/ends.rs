// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that waits: signals, reports, traces, the terminal.

use super::*;

/// A guest that prints a line and then waits forever.
fn waiting_guest(more: &[&str]) -> (Child, NamedTempFile) {
    let image = kernel(&multiboot(&[code::print("."), code::HALT.to_vec()].concat()));
    let mut child = spawn(
        with_default_signals(TWOSTAGE)
            .args(["run", "--cpus", "boot=2", "--kernel", text(&image)])
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped()),
    );
    let mut byte = [0];
    child.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
    (child, image)
}

#[test]
fn signals_end_the_machine_in_order() {
    if !kvm() {
        return;
    }
    for (name, number) in [("TERM", 15), ("INT", 2), ("HUP", 1), ("QUIT", 3)] {
        let dir = TempDir::new().unwrap();
        let (report, trace) = (dir.path().join("report"), dir.path().join("trace"));
        let (child, _image) = waiting_guest(&[
            "--iommu",
            "vtd",
            "--device",
            "edu",
            "--report",
            &format!("json,file={}", report.display()),
            "--trace",
            trace.to_str().unwrap(),
        ]);
        signal(&child, name);
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(128 + number), "{stderr}");
        assert!(stderr.is_empty(), "{stderr}");
        let json = |path| -> serde_json::Value {
            serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
        };
        assert_eq!(json(&report)["devices"][0]["bdf"], "00:01.0");
        assert!(json(&trace).as_array().unwrap().iter().any(|event| event["name"] == "IOAS_MAP"));
    }
}

#[test]
fn a_trace_that_is_cut_off_ends_with_a_whole_event() {
    if !kvm() {
        return;
    }
    // Reads of the version register, more than any buffer holds.
    let read = vec![0xa1, 0, 0, 0xd9, 0xfe];
    let image = kernel(&multiboot(
        &[code::repeat(2000, &[read]), code::print("."), code::HALT.to_vec()].concat(),
    ));
    let trace = NamedTempFile::new().unwrap();
    let mut child = spawn(
        with_default_signals(TWOSTAGE)
            .args(["run", "--iommu", "vtd", "--trace", text(&trace), "--kernel", text(&image)])
            .stdin(Stdio::null())
            .stdout(Stdio::piped()),
    );
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let written = std::fs::read_to_string(trace.path()).unwrap();
    let events: Vec<serde_json::Value> = serde_json::from_str(&(written + "]")).unwrap();
    assert!(events.iter().any(|event| event["name"] == "read VER"));
}

#[test]
fn a_report_can_be_had_while_the_guest_runs() {
    if !kvm() {
        return;
    }
    let (mut child, _image) = waiting_guest(&["--iommu", "vtd", "--device", "edu"]);
    signal(&child, "USR1");
    let mut stderr = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut report = String::new();
    while !report.contains("objects,") {
        let read = std::io::BufRead::read_line(&mut stderr, &mut report).unwrap();
        assert_ne!(read, 0, "{report}");
    }
    assert!(report.contains("io-out"), "{report}");
    assert!(report.contains("NEST_PARENT"), "{report}");
    assert!(child.try_wait().unwrap().is_none());
    signal(&child, "TERM");
    assert_eq!(child.wait().unwrap().code(), Some(143));
}

#[test]
fn the_terminal_is_left_as_it_was() {
    if !kvm() {
        return;
    }
    let waits = kernel(&multiboot(&[code::print("."), code::HALT.to_vec()].concat()));
    let resets = kernel(&multiboot(&code::triple_fault()));
    let stuck = kernel(&multiboot(&code::jump_to_nowhere()));
    // A pseudo-terminal; `timeout` ends the machine, and `stty` prints the final settings.
    let ended_by = |signal| format!("timeout --foreground --preserve-status -s {signal} 1");
    for (kernel, how, code) in [
        (&waits, ended_by("TERM"), 143),
        (&waits, ended_by("INT"), 130),
        (&waits, ended_by("HUP"), 129),
        (&waits, ended_by("QUIT"), 131),
        (&resets, String::new(), GUEST_RESET),
        (&stuck, String::new(), GUEST_STUCK),
    ] {
        let script = format!(
            "{how} '{TWOSTAGE}' run --report none --kernel '{}'; echo code $?; stty -a",
            text(kernel)
        );
        let output = with_default_signals("script")
            .args(["-q", "-e", "-c", &script, "/dev/null"])
            .stdin(Stdio::null())
            .output();
        let Ok(output) = output else {
            eprintln!("no script(1): NOT tested");
            return;
        };
        let shown = String::from_utf8_lossy(&output.stdout);
        assert!(shown.contains(&format!("code {code}\r\n")), "{shown}");
        for flag in [" icanon", " echo ", "isig "] {
            assert!(shown.contains(flag), "{shown}");
        }
    }
}

#[test]
fn a_guest_that_hangs_is_ended_when_its_time_is_over() {
    if !kvm() {
        return;
    }
    let image = kernel(&multiboot(&code::HALT));
    let log = TempDir::new().unwrap();
    let output =
        with_default_signals(concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/nested/here"))
            .args(["--timeout", "1", "--binary", TWOSTAGE, "--log"])
            .arg(log.path())
            .args(["--", "run", "--report", "none", "--kernel", text(&image)])
            .stdin(Stdio::null())
            .output()
            .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(124), "{stderr}");
    assert!(stderr.contains("NOT ENDED within 1 s"), "{stderr}");
    assert!(output.stdout.is_empty(), "nothing but the guest's console");
}
