// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Small guests: output and exit; and a guest that waits: signals, reports, traces, the terminal.

use super::*;

fn run_guest(image: &[u8], more: &[&str]) -> Output {
    let image = kernel(image);
    twostage(&[&["run", "--report", "none", "--kernel", text(&image)], more].concat())
}

#[test]
fn a_guest_prints_and_chooses_the_exit_code() {
    if !kvm() {
        return;
    }
    for (image, value) in [(multiboot as fn(&[u8]) -> Vec<u8>, 42), (pvh, 255), (pvh, 0)] {
        let guest = [code::print("hello\n"), code::exit(value), code::HALT.to_vec()].concat();
        let output = run_guest(&image(&guest), &["--memory", "size=16M"]);
        assert_eq!(output.status.code(), Some(value.into()));
        assert_eq!(output.stdout, b"hello\n");
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn the_serial_port_leads_where_it_is_told() {
    if !kvm() {
        return;
    }
    let guest = multiboot(&[code::print("quiet"), code::exit(0), code::HALT.to_vec()].concat());
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("serial");
    let output = run_guest(&guest, &["--serial", &format!("file={}", file.display())]);
    assert!(output.status.success() && output.stdout.is_empty());
    assert_eq!(std::fs::read(file).unwrap(), b"quiet");
    let output = run_guest(&guest, &["--serial", "null"]);
    assert!(output.status.success() && output.stdout.is_empty());
    let output = run_guest(&guest, &["--serial", "file=/nonexistent/serial"]);
    assert_refused(&output, twostage_vmm::exit_code::IO_ERROR, "/nonexistent/serial");
}

#[test]
fn what_is_typed_reaches_the_guest() {
    if !kvm() {
        return;
    }
    // mov $0x3fd, %dx; wait: in (%dx), %al; test $1, %al; jz wait; mov $0x3f8, %dx; in (%dx), %al;
    // out %al, $0xf4
    let echo = [
        0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb, 0x66, 0xba, 0xf8, 0x03, 0xec, 0xe6,
        0xf4, 0xf4,
    ];
    let image = kernel(&multiboot(&echo));
    let mut child = spawn(
        with_default_signals(TWOSTAGE)
            .args(["run", "--report", "none", "--kernel", text(&image)])
            .stdin(Stdio::piped()),
    );
    child.stdin.take().unwrap().write_all(b"*").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(b'*'.into()));
}

#[test]
fn a_guest_that_resets_itself_ends_the_machine() {
    if !kvm() {
        return;
    }
    let keyboard = [code::out(0x64, 0xfe), code::HALT.to_vec()].concat();
    let output = run_guest(&multiboot(&keyboard), &[]);
    assert_refused(&output, GUEST_RESET, "keyboard controller");
    let output = run_guest(&multiboot(&code::triple_fault()), &[]);
    assert_refused(&output, GUEST_RESET, "triple fault");
    let output = run_guest(&multiboot(&code::jump_to_nowhere()), &[]);
    assert_refused(&output, GUEST_STUCK, "went to RIP 0x40000000");
}

#[test]
fn a_reset_can_start_the_machine_again() {
    if kvm() {
        lives("vtd", &[]);
    }
}

/// The reports of a machine that is reset three times or more, one for each life.
pub(super) fn lives(iommu: &str, more: &[&str]) -> Vec<serde_json::Value> {
    let guest = [code::print("up."), code::out(0xcf9, 0x06), code::HALT.to_vec()].concat();
    let image = kernel(&multiboot(&guest));
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("serial");
    let serial = format!("file={}", file.display());
    let disk = kernel(&[0; 512]);
    let (report, trace) = (dir.path().join("report"), dir.path().join("trace"));
    let mut child = spawn(
        with_default_signals(TWOSTAGE)
            .args(["run", "--on-reset", "restart", "--serial", &serial])
            .args(["--report", &format!("json,file={}", report.display())])
            .args(["--trace", trace.to_str().unwrap(), "--iommu", iommu])
            .args(["--kernel", text(&image), "--memory", "size=16M"])
            // Each life has it exclusively.
            .args(["--disk", &format!("path={},iommu=off", text(&disk))])
            .args(more),
    );
    // Every life appends to the file.
    wait_until("three lives of the guest", || {
        assert_eq!(child.try_wait().unwrap(), None, "it ended by itself");
        std::fs::metadata(&file).is_ok_and(|file| file.len() >= "up.up.up.".len() as u64)
    });
    signal(&child, "TERM");
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
    assert!(std::fs::read(&file).unwrap().starts_with(b"up.up.up."));
    let reports = std::fs::read(&report).unwrap();
    let reports: Vec<serde_json::Value> =
        serde_json::Deserializer::from_slice(&reports).into_iter().map(Result::unwrap).collect();
    assert!(reports.len() >= 3, "{reports:#?}");
    assert!(reports.iter().all(|report| report["iommus"][0]["id"] == "vtd0"), "{reports:#?}");
    let events: Vec<serde_json::Value> =
        serde_json::from_slice(&std::fs::read(&trace).unwrap()).unwrap();
    let maps = events.iter().filter(|event| event["name"] == "IOAS_MAP");
    let lives: Vec<_> = maps.map(|event| event["pid"].as_u64().unwrap()).collect();
    assert!(lives.len() >= 3, "{lives:?}");
    assert!(lives.iter().copied().eq(1..=lives.len() as u64), "{lives:?}");
    // What it prints, byte by byte.
    let printed = |event: &&serde_json::Value| {
        event["name"] == "io-out" && event["args"]["address"] == "0x3f8"
    };
    assert!(events.iter().filter(printed).count() >= 9, "no exits in the trace");
    reports
}

#[test]
fn the_guest_switches_the_machine_off() {
    if !kvm() {
        return;
    }
    // SLP_TYP 5 and SLP_EN in the upper byte of PM1 control.
    let guest = [code::print("bye"), code::out(0x605, 5 << 2 | 1 << 5), code::HALT.to_vec()];
    let output = run_guest(&multiboot(&guest.concat()), &[]);
    assert!(output.status.success());
    assert_eq!(output.stdout, b"bye");
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn an_instruction_that_kvm_cannot_run_is_named() {
    if !kvm() {
        return;
    }
    // nop; int3. A triple fault, as there is no interrupt table.
    let output = run_guest(&multiboot(&[0x90, 0xcc]), &[]);
    match output.status.code() {
        Some(code) if code == i32::from(GUEST_STUCK) => {
            assert_refused(&output, GUEST_STUCK, "RIP 0x100001 (bytes cc");
        }
        _ => assert_refused(&output, GUEST_RESET, "triple fault"),
    }
}

#[test]
fn a_second_vcpu_waits_for_its_startup_message() {
    if !kvm() {
        return;
    }
    // mov dword [register], value
    let store = |register: u32, value: u32| {
        [&[0xc7, 0x05][..], &register.to_le_bytes(), &value.to_le_bytes()].concat()
    };
    const LAPIC: u32 = 0xfee0_0000;
    let guest = [
        // At 0x8000, for 16-bit real mode: mov $3, %al; out %al, $0xf4; hlt.
        store(0x8000, 0xf4e6_03b0),
        store(0x8004, 0xf4),
        // LAPIC: enabled; INIT, then SIPI with vector 8, to LAPIC 1.
        store(LAPIC + 0xf0, 0x1ff),
        store(LAPIC + 0x310, 1 << 24),
        store(LAPIC + 0x300, 0x4500),
        store(LAPIC + 0x300, 0x4608),
        code::HALT.to_vec(),
    ]
    .concat();
    let output = run_guest(&pvh(&guest), &["--cpus", "boot=2"]);
    assert_eq!(output.status.code(), Some(3));
}

#[test]
fn a_flood_of_faults_is_counted_and_hardly_logged() {
    if !kvm() {
        return;
    }
    const FAULTS: u32 = 5000;
    let ecam = 0xb000_0000 + (1 << 15);
    let (unit, edu) = (0xfed9_0000, 0xe000_0000);
    let flood = [
        // The function at 00:01.0: its BAR; memory space and bus mastering.
        code::store(ecam + 0x10, edu),
        code::store(ecam + 0x04, 0b110),
        // An empty root table at 2 MiB, in scalable mode; SRTP; TE.
        code::store(unit + 0x20, 0x20_0000 | 1 << 10),
        code::store(unit + 0x18, 1 << 30),
        code::store(unit + 0x18, 1 << 31),
        // From 0x3000 to the device's buffer, 4 bytes; repeatedly.
        code::store(edu + 0x80, 0x3000),
        code::store(edu + 0x88, 0x4_0000),
        code::store(edu + 0x90, 4),
        code::repeat(FAULTS, &[code::store(edu + 0x98, 1), code::wait_for_zero(edu + 0x98, 1)]),
        code::exit(0),
        code::HALT.to_vec(),
    ]
    .concat();
    let image = kernel(&multiboot(&flood));
    let report = NamedTempFile::new().unwrap();
    let output = twostage(&[
        "run",
        "--kernel",
        text(&image),
        "--iommu",
        "vtd",
        "--device",
        "edu",
        "--report",
        &format!("json,file={}", text(&report)),
    ]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert!(stderr.lines().count() < 20, "{stderr}");
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(report.path()).unwrap()).unwrap();
    assert_eq!(report["devices"][0]["dma_failed"], FAULTS);
    let counters = &report["iommus"][0]["viommu"];
    let count = |name: &str| counters[name].as_u64().unwrap();
    // A fault that the guest does not clear is not recorded again.
    let all = count("faults_recorded") + count("faults_lost") + count("faults_suppressed");
    assert!(all >= 1 && all <= FAULTS.into(), "{counters:#}");
    assert_ne!(count("faults_recorded"), 0);
}

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
            not_tested("no script(1)");
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
