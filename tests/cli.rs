// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The `twostage` command from outside: bad input, small guests, signals.
//!
//! Guests are made here, byte by byte. What needs `/dev/kvm` says so and passes where there is none.

#[path = "common/code.rs"]
mod code;
#[path = "../src/vmm/arch/x86_64/boot/test_images.rs"]
mod images;

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use images::{bzimage, multiboot, pvh};
use tempfile::{NamedTempFile, TempDir};
use twostage::patience::wait_until;
use twostage_vmm::exit_code::{
    GUEST_RESET, GUEST_STUCK, IO_ERROR, NO_INPUT, OS_ERROR, UNAVAILABLE, USAGE,
};

const TWOSTAGE: &str = env!("CARGO_BIN_EXE_twostage");

fn twostage(args: &[&str]) -> Output {
    Command::new(TWOSTAGE).args(args).stdin(Stdio::null()).output().unwrap()
}

fn kernel(image: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(image).unwrap();
    file
}

fn text(path: &NamedTempFile) -> &str {
    path.path().to_str().unwrap()
}

/// The command failed with `code` and one line that says `hint`.
fn assert_refused(output: &Output, code: u8, hint: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code.into()), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with("twostage: error: "), "{stderr}");
    assert!(stderr.contains(hint), "'{stderr}' does not say '{hint}'");
    assert!(output.stdout.is_empty());
}

/// Whether guests can run here.
fn kvm() -> bool {
    let there = kvm_ioctls::Kvm::new().is_ok();
    if !there {
        eprintln!("no /dev/kvm: not tested");
    }
    there
}

#[test]
fn contradictory_and_impossible_options_are_usage_errors() {
    let image = kernel(&multiboot(&code::exit(0)));
    let run = ["run", "--kernel", text(&image)];
    for (args, hint) in [
        (&["--cpus", "boot=0"][..], "at least one vCPU"),
        (&["--cpus", "boot=many"], "'many'"),
        (&["--memory", "size=0"], "a guest needs memory"),
        (&["--memory", "size=5000"], "not a multiple of 4096"),
        (&["--memory", "size=1024T"], "of memory this host has"),
        (&["--memory", "size=99999999999999T"], "64 bits"),
        (&["--memory", "512M"], "key=value"),
        (&["--iommu", "amd"], "unknown IOMMU 'amd'"),
        (&["--iommu", "vtd,aw=39"], "neither 48 nor 57"),
        (&["--iommu", "vtd,addr=0x1000"], "where RAM is"),
        (&["--device", "edu,iommu=on"], "there is no --iommu"),
        (&["--device", "edu,pasid=on"], "behind an IOMMU"),
        (&["--iommu", "vtd", "--device", "edu,pasid=on,iommu=off"], "behind an IOMMU"),
        (&["--iommu", "vtd,pasid-bits=0", "--device", "edu,pasid=on"], "pasid-bits=0"),
        (&["--device", "floppy"], "unknown device 'floppy'"),
        (&["--serial", "loud"], "'loud'"),
        (&["--report", "xml"], "'xml'"),
        (&["--frobnicate"], "--frobnicate"),
    ] {
        let output = twostage(&[&run, args].concat());
        assert_refused(&output, USAGE, hint);
    }
    assert_refused(&twostage(&["run"]), USAGE, "--kernel");
    assert_refused(&twostage(&["walk"]), USAGE, "'walk'");
}

#[test]
fn help_and_version_are_no_errors() {
    assert!(twostage(&["probe", "--help"]).status.success());
    let output = twostage(&["run", "--help"]);
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("--iommu"));
    assert!(twostage(&["--version"]).status.success());
}

#[test]
fn files_that_are_no_kernels_are_refused() {
    for (path, hint) in [("/nonexistent/kernel", "No such file"), ("/", "not a regular file")] {
        assert_refused(&twostage(&["run", "--kernel", path]), NO_INPUT, hint);
    }
    let mut big_endian = pvh(&code::exit(0));
    big_endian[5] = 2;
    let mut arm = pvh(&code::exit(0));
    arm[18] = 183;
    let mut no_entry = pvh(&code::exit(0));
    // The type of its only note.
    no_entry[images::NOTE + 8] = 17;
    // Linux 2.6.20.
    let mut old = bzimage(&code::exit(0));
    old[0x206..0x208].copy_from_slice(&0x0205u16.to_le_bytes());
    let cut = &bzimage(&[0x90; 4096])[..2048];
    let whole = multiboot(&code::exit(0));
    for (image, hint) in [
        (&b"MZ nonsense"[..], "neither a bzImage nor an ELF image"),
        (&big_endian, "big-endian"),
        (&arm, "machine 183"),
        (&no_entry, "without a PVH entry"),
        (&old, "boot protocol 2.05; it takes at least 2.10"),
        (cut, "truncated: the kernel"),
        (&whole[..whole.len() - 1], "truncated"),
    ] {
        let image = kernel(image);
        assert_refused(&twostage(&["run", "--kernel", text(&image)]), NO_INPUT, hint);
    }
    let image = kernel(&whole);
    let args = ["run", "--kernel", text(&image), "--initramfs", "/nonexistent/initrd"];
    assert_refused(&twostage(&args), NO_INPUT, "--initramfs /nonexistent/initrd");
    let args = ["run", "--kernel", text(&image), "--memory", "size=64K"];
    assert_refused(&twostage(&args), USAGE, "too few to boot");
}

/// Runs the command in a mount and a network namespace of its own, after `prepare`; nothing when the
/// system does not allow that.
fn in_namespace(prepare: &str, command: &str) -> Option<Output> {
    let unshare = |script: &str| {
        let unshare = ["--mount", "--net", "sh", "-c", script];
        Command::new("unshare").args(unshare).stdin(Stdio::null()).output()
    };
    if !unshare(prepare).is_ok_and(|output| output.status.success()) {
        eprintln!("'{prepare}' in a namespace is not allowed: NOT tested");
        return None;
    }
    Some(unshare(&format!("{prepare} && exec {command}")).unwrap())
}

#[test]
fn a_kvm_that_is_not_there_or_not_for_us_is_named() {
    if !kvm() {
        return;
    }
    let image = kernel(&multiboot(&code::exit(0)));
    let command = format!("'{TWOSTAGE}' run --kernel '{}'", text(&image));
    let probe = format!("'{TWOSTAGE}' probe");
    for command in [&command, &probe] {
        if let Some(output) = in_namespace("mount -t tmpfs none /dev", command) {
            assert_refused(&output, UNAVAILABLE, "/dev/kvm: No such file");
        }
    }
    if let Some(output) = in_namespace("mount --bind /dev/null /dev/kvm", &command) {
        assert_refused(&output, UNAVAILABLE, "API version");
    }
    let other = OtherUser::new(&image);
    let prepare = format!("{} && {NOBODY} test ! -w /dev/kvm", other.prepare);
    if let Some(output) = in_namespace(&prepare, &other.run) {
        assert_refused(&output, UNAVAILABLE, "/dev/kvm: Permission denied");
    }
}

/// Runs what follows as a user without rights.
const NOBODY: &str = "setpriv --reuid=65534 --clear-groups";

/// Copies of the command and of a kernel that another user can run and read.
struct OtherUser {
    /// Makes it so, and checks it.
    prepare: String,
    /// Runs the kernel, with options that follow.
    run: String,
    _directory: TempDir,
}

impl OtherUser {
    fn new(image: &NamedTempFile) -> Self {
        let directory = TempDir::new().unwrap();
        let copy = |from: &Path, name: &str| {
            let to = directory.path().join(name);
            std::fs::copy(from, &to).unwrap();
            to.display().to_string()
        };
        let (binary, image) = (copy(Path::new(TWOSTAGE), "twostage"), copy(image.path(), "kernel"));
        let path = directory.path().display();
        Self {
            prepare: format!(
                "chmod 755 '{path}' && chmod 644 '{image}' && {NOBODY} test -x '{binary}'"
            ),
            run: format!("{NOBODY} '{binary}' run --kernel '{image}'"),
            _directory: directory,
        }
    }
}

#[test]
fn a_tap_that_is_not_for_us_is_named() {
    if !kvm() {
        return;
    }
    let other = OtherUser::new(&kernel(&multiboot(&code::exit(0))));
    // A /dev in which everybody may open KVM, and TUN with these rights.
    let devices = |tun| {
        format!(
            "mount -t tmpfs none /dev && mkdir /dev/net && mknod -m 666 /dev/kvm c 10 232 && \
             mknod -m {tun} /dev/net/tun c 10 200 && {}",
            other.prepare
        )
    };
    let run = format!("{} --net tap=tap7", other.run);
    let with_tap = " && ip tuntap add tap7 mode tap user root && ip link set tap7 up";
    for (prepare, hint) in [
        (devices("666"), "tap=tap7: no such interface; make it with: ip tuntap add"),
        (devices("666") + with_tap, "Operation not permitted (os error 1); it must belong"),
        (devices("600") + with_tap, "Permission denied (os error 13); it must belong"),
    ] {
        if let Some(output) = in_namespace(&prepare, &run) {
            assert_refused(&output, OS_ERROR, hint);
        }
    }
}

#[test]
fn a_probe_tells_by_its_exit_code_whether_linux_runs() {
    assert_refused(&twostage(&["probe", "--report", "xml"]), USAGE, "'xml'");
    if !kvm() {
        return;
    }
    let probe = |form| twostage(&["probe", "--report", form]);
    let json = probe("json");
    let found: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    let failed = found["ring0"].as_array().unwrap().iter().any(|trial| {
        let outcome = trial["outcome"].as_str().unwrap();
        assert!(!outcome.contains("no end"), "{found:#}");
        outcome.starts_with("FAILS: ")
    });
    assert_eq!(found["linux"], !failed);
    assert_eq!(json.status.code(), Some(failed.into()));
    let line = probe("line");
    assert_eq!(line.status.code(), json.status.code());
    assert!(line.stdout.starts_with(b"Linux ") && line.stdout.ends_with(b"\n"));
    assert!(probe("text").stdout.ends_with(&line.stdout));
}

/// Runs a guest whose serial port is standard output.
#[test]
fn what_a_device_offers_is_told_in_words_and_in_json() {
    let info = |form| twostage(&["info", "--host", "emulated", "--report", form]);
    let text = info("text");
    assert!(text.status.success() && text.stderr.is_empty());
    let text = String::from_utf8(text.stdout).unwrap();
    for line in [
        "edu: behind VT-d",
        "  PASIDs: 20 bits, allocated by the guest; the VMM attaches each",
        "  reserved: 0xfee00000 to 0xfeefffff: interrupt messages",
        "a virtual VT-d over all of them can offer:",
        "  48 bits of IOVA",
    ] {
        assert!(text.lines().any(|each| each == line), "no '{line}' in\n{text}");
    }
    let report: serde_json::Value = serde_json::from_slice(&info("json").stdout).unwrap();
    let (device, offer) = (&report["devices"][0], &report["offer"]);
    assert_eq!((&device["iommu"], &device["cannot_nest"]), (&"VT-d".into(), &().into()));
    assert_eq!(device["reserved"][0]["kind"], "msi");
    assert_eq!((&offer["kind"], &offer["address_bits"]), (&"vtd".into(), &48.into()));
    assert_eq!(report["no_offer"], serde_json::Value::Null);

    let smmu = ["info", "--host", "emulated", "--iommu", "smmuv3", "--report", "json"];
    let report: serde_json::Value = serde_json::from_slice(&twostage(&smmu).stdout).unwrap();
    assert_eq!(report["devices"][0]["reserved"][0]["kind"], "software_msi");
    assert_eq!(
        (&report["devices"][0]["smmu"], &report["offer"]["kind"]),
        (&0.into(), &"smmuv3".into())
    );
}

#[test]
fn devices_and_hosts_that_are_none_are_named() {
    let refused = |args: &[&str], code, hint| {
        assert_refused(&twostage(&[&["info"], args].concat()), code, hint);
    };
    refused(
        &["--host", "/dev/no-iommu"],
        UNAVAILABLE,
        "there is no /dev/no-iommu: the kernel needs",
    );
    refused(&["--host", "/dev/null"], UNAVAILABLE, "/dev/null is no iommufd");
    refused(&["--host", "emulated", "--vfio", "path=/dev/null"], USAGE, "one of its own");
    refused(&["--vfio", "/dev/null"], USAGE, "path=");
    refused(&["--report", "xml"], USAGE, "'xml'");
}

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
    let mut child = Command::new(TWOSTAGE)
        .args(["run", "--report", "none", "--kernel", text(&image)])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
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
    if !kvm() {
        return;
    }
    let guest = [code::print("up."), code::out(0xcf9, 0x06), code::HALT.to_vec()].concat();
    let image = kernel(&multiboot(&guest));
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("serial");
    let serial = format!("file={}", file.display());
    let disk = kernel(&[0; 512]);
    let (report, trace) = (dir.path().join("report"), dir.path().join("trace"));
    let mut child = Command::new(TWOSTAGE)
        .args(["run", "--on-reset", "restart", "--serial", &serial])
        .args(["--report", &format!("json,file={}", report.display())])
        .args(["--trace", trace.to_str().unwrap(), "--iommu", "vtd"])
        .args(["--kernel", text(&image), "--memory", "size=16M"])
        // Each life has it for itself.
        .args(["--disk", &format!("path={},iommu=off", text(&disk))])
        .spawn()
        .unwrap();
    // Every life adds to the file.
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
    // nop; int3. A processor faults three times over, for there is no interrupt table.
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

/// A guest that says that it runs, and then waits for ever.
fn waiting_guest(more: &[&str]) -> (Child, NamedTempFile) {
    let image = kernel(&multiboot(&[code::print("."), code::HALT.to_vec()].concat()));
    let mut child = Command::new(TWOSTAGE)
        .args(["run", "--cpus", "boot=2", "--kernel", text(&image)])
        .args(more)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut byte = [0];
    child.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
    (child, image)
}

fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args(["-s", name, &child.id().to_string()]).status();
    assert!(status.unwrap().success());
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
    let mut child = Command::new(TWOSTAGE)
        .args(["run", "--iommu", "vtd", "--trace", text(&trace), "--kernel", text(&image)])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
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
    // A terminal of its own; `timeout` ends the machine, and `stty` says what is left.
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
        let output = Command::new("script")
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
    let output = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/here"))
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
        // From 0x3000 to the device's buffer, 4 bytes; over and over.
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
    // What the guest does not clear is not recorded twice.
    let all = count("faults_recorded") + count("faults_lost") + count("faults_suppressed");
    assert!(all >= 1 && all <= FAULTS.into(), "{counters:#}");
    assert_ne!(count("faults_recorded"), 0);
}

#[test]
fn devices_that_cannot_be_are_named() {
    let image = kernel(&pvh(&code::out(0xf4, 0)));
    let unaligned = kernel(&[0; 1000]);
    let (empty, unaligned) = (NamedTempFile::new().unwrap(), text(&unaligned).to_owned());
    let directory = TempDir::new().unwrap();
    let fifo = directory.path().join("fifo").into_os_string().into_string().unwrap();
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let path = |path: &str| format!("path={path}");
    for (option, value, code, hint) in [
        ("--disk", path("/nonexistent/disk"), NO_INPUT, "/nonexistent/disk: No such file"),
        ("--disk", path("/dev/null"), NO_INPUT, "neither a file nor a block device"),
        ("--disk", path(text(&empty)), NO_INPUT, "the image is empty"),
        ("--disk", path(&unaligned), NO_INPUT, "1000 bytes are not a multiple of 512"),
        ("--disk", path(&unaligned) + ",iommu=on", USAGE, "there is no --iommu"),
        ("--disk", "readonly=on".into(), USAGE, "path=FILE is missing"),
        ("--rng", "src=/nonexistent/rng".into(), NO_INPUT, "/nonexistent/rng: No such file"),
        ("--rng", "src=/".into(), NO_INPUT, "/: neither a file nor a character device"),
        ("--rng", format!("src={fifo}"), NO_INPUT, "neither a file nor a character device"),
        ("--net", "tap=twostage-none".into(), OS_ERROR, "no such interface"),
        ("--net", "tap=lo".into(), OS_ERROR, "tap=lo: "),
        ("--net", "fd=77".into(), OS_ERROR, "--net: fd=77: Bad file descriptor"),
    ] {
        if code != USAGE && !kvm() {
            continue;
        }
        let output = twostage(&["run", "--kernel", text(&image), option, &value]);
        assert_refused(&output, code, hint);
    }
}

#[test]
fn what_would_be_written_twice_or_has_no_room_is_named() {
    if !kvm() {
        return;
    }
    let (image, disk) = (kernel(&pvh(&code::out(0xf4, 0))), kernel(&[0; 512]));
    let run = ["run", "--kernel", text(&image)];
    let path = format!("path={}", text(&disk));
    let two = |second: &str| twostage(&[&run[..], &["--disk", &path, "--disk", second]].concat());
    assert_refused(&two(&path), NO_INPUT, "the image is in use");
    assert_refused(&two(&format!("{path},readonly=on")), NO_INPUT, "the image is in use");
    let small = twostage(&[&run[..], &["--memory", "size=1M"]].concat());
    assert_refused(&small, USAGE, "too few to boot");
}

#[test]
fn outputs_overwrite_nothing_that_is_named() {
    let image = pvh(&code::out(0xf4, 0));
    let kernel = kernel(&image);
    let directory = TempDir::new().unwrap();
    let new = directory.path().join("new").into_os_string().into_string().unwrap();
    let run = ["run", "--kernel", text(&kernel), "--report", "none"];
    for (options, hint) in [
        (["--trace", text(&kernel)], "--kernel and --trace name the same file"),
        (["--serial", &format!("file={}", text(&kernel))], "--kernel and --serial"),
    ] {
        assert_refused(&twostage(&[&run[..], &options].concat()), USAGE, hint);
    }
    let report = format!("json,file={new}");
    let run = ["run", "--kernel", text(&kernel), "--report", &report, "--trace", &new];
    assert_refused(&twostage(&run), USAGE, "--trace and --report name the same file");
    assert_eq!(std::fs::read(kernel.path()).unwrap(), image);
}

#[test]
fn a_report_or_a_trace_that_cannot_be_written_is_an_error() {
    let kernel = kernel(&pvh(&code::out(0xf4, 0)));
    let report = |to| twostage(&["run", "--kernel", text(&kernel), "--report", to]);
    assert_refused(
        &report("json,file=/nonexistent/report"),
        IO_ERROR,
        "--report: /nonexistent/report: ",
    );
    if kvm() {
        assert_refused(&report("json,file=/dev/full"), IO_ERROR, "/dev/full: No space left");
        let run = ["run", "--kernel", text(&kernel), "--report", "none", "--trace", "/dev/full"];
        let output = twostage(&run);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(IO_ERROR.into()), "{stderr}");
        assert!(stderr.contains("/dev/full: No space left"), "{stderr}");
    }
}
