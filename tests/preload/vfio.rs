// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `twostage run --vfio` with `libtwostage_iommufd.so`: a guest's virtual VT-d nested by an
//! apparent kernel iommufd, with an `edu` assigned like a device of this machine.
//!
//! The small test guest drives the unit and the device, and reports the results: all of them except
//! fault records, which no kernel reports for VT-d. The program under test is this one, started
//! again. Without KVM the test fails, unless `TWOSTAGE_KVM=off` skips it.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use twostage::skips::not_tested;

/// A guest that hangs is killed after so many seconds, which are more than its own limits.
const LIMIT: &str = "300";

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some("run") {
        return twostage_vmm::cli::main();
    }
    if std::env::var_os("TWOSTAGE_KVM").is_some_and(|value| value == "off") {
        not_tested("TWOSTAGE_KVM=off, the guest with an assigned device");
        return ExitCode::SUCCESS;
    }
    behind_a_virtual_vtd();
    without_caching_mode();
    with_all_memory();
    both_kinds_in_one_machine();
    emulated_and_assigned_behind_one_unit();
    eprintln!("a guest with an assigned device: ok");
    ExitCode::SUCCESS
}

/// The small test guest, built if necessary.
fn kernel() -> PathBuf {
    let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest-images");
    let built = Command::new("make").arg("-s").arg("-C").arg(images.join("vtd-check")).status();
    assert!(built.is_ok_and(|status| status.success()), "make cannot build the guest");
    images.join("build/vtd-check.elf")
}

/// What the guest wrote to its serial port, and the report, of a run with `arguments`.
fn run(arguments: &[&str]) -> (String, serde_json::Value) {
    let program = std::env::current_exe().expect("the test's own path");
    let library = program.with_file_name("libtwostage_iommufd.so");
    assert!(library.exists(), "no {}", library.display());
    let directory = tempfile::tempdir().expect("a directory");
    let (serial, report) = (directory.path().join("serial"), directory.path().join("report"));
    let mut command = Command::new("timeout");
    command.arg(LIMIT).arg(program).arg("run").arg("--kernel").arg(kernel());
    // The library makes calls of its own, which the jail would refuse.
    command.args(["--memory", "size=256M", "--jail", "off"]).args(arguments);
    command.arg("--serial").arg(format!("file={}", serial.display()));
    command.arg("--report").arg(format!("json,file={}", report.display()));
    command.env("LD_PRELOAD", library).env_remove("TWOSTAGE_IOMMUFD").env("RUST_LOG", "error");
    let output = command.output().expect("timeout(1) runs");
    let text = std::fs::read_to_string(&serial).unwrap_or_default();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}:\n{text}\n{errors}", output.status);
    assert!(
        text.trim_end().lines().last().is_some_and(|line| line.contains(" 0 failed")),
        "{text}"
    );
    let report = std::fs::read_to_string(&report).expect("a report");
    (text, serde_json::from_str(&report).expect("JSON"))
}

/// Whether the check `name` passed.
fn holds(text: &str, name: &str) -> bool {
    text.lines().any(|line| line.starts_with("ok ") && line.ends_with(name))
}

/// The number of calls of `verb` according to `report`.
fn calls(report: &serde_json::Value, verb: &str) -> u64 {
    report["host"]["calls"][verb]["calls"].as_u64().unwrap_or_else(|| panic!("{report:#}"))
}

/// In caching mode the guest invalidates interrupt entries that become present, so KVM has the
/// device's remapped messages. PASIDs, ATS and PRI are offered as host and device have them.
fn behind_a_virtual_vtd() {
    let (text, report) = run(&[
        "--cmdline",
        "assigned=1",
        "--iommu",
        "vtd,host=/dev/iommu,ats=on,pri=on",
        "--vfio",
        "path=/dev/vfio/devices/vfio0",
    ]);
    // Some checks that involve everything: DMA by nested tables, stale until they are invalidated,
    // and MSIs from VFIO's eventfd through the guest's remapping.
    for name in [
        "edu: MSI arrives once",
        "edu: MSI-X arrives once, by the vector of its cause",
        "edu: memory in BAR 2 keeps what is written",
        "edu: DMA completion interrupt",
        "edu: INTx arrives through the I/O APIC",
        "interrupt_remapping: INTx through the I/O APIC, remapped",
        "interrupt_range: a blocked device's MSI arrives",
        "interrupt_remapping: a message goes by its table entry",
        "interrupt_remapping: entry stale until the invalidation of its index",
        "pasid: two PASIDs and none, three tables",
        "ats: a device with PASID follows both invalidations",
        "page_requests: a page that is not there is asked for and brought (7.4.1.1, 7.6.1)",
    ] {
        assert!(holds(&text, name), "'{name}' does not hold:\n{text}");
    }
    let calls = |verb| calls(&report, verb);
    assert!(calls("HWPT_ALLOC") > 1 && calls("HWPT_INVALIDATE") > 1, "{report:#}");
    assert_eq!(calls("IOAS_MAP"), 1, "{report:#}");
    assert_eq!(report["devices"][0]["model"], "vfio");
    assert!(report["interrupts"]["route_updates"].as_u64() > Some(0), "{report:#}");
    // Those of the pin, which this process's I/O APIC sends; messages are in KVM.
    let remapped = report["iommus"][0]["viommu"]["interrupts_remapped"].as_u64();
    assert!(matches!(remapped, Some(3..=6)), "{report:#}");
}

/// No kernel reports the requests that it blocks, which are needed to read the tables again.
fn without_caching_mode() {
    let program = std::env::current_exe().expect("the test's own path");
    let mut command = Command::new(program);
    command.arg("run").arg("--kernel").arg(kernel());
    command.args(["--iommu", "vtd,host=/dev/iommu,caching-mode=off"]);
    let output = command.output().expect("the program runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("caching-mode=off needs host=emulated"), "{errors}");
    assert_eq!(output.status.code(), Some(64), "{errors}");
}

fn with_all_memory() {
    let (text, report) =
        run(&["--cmdline", "vtd=0", "--vfio", "path=/dev/vfio/devices/vfio1,id=edu,iommu=off"]);
    for name in ["edu: MSI arrives once", "edu: DMA of the whole buffer"] {
        assert!(holds(&text, name), "'{name}' does not hold:\n{text}");
    }
    assert_eq!(["IOAS_ALLOC", "IOAS_MAP"].map(|verb| calls(&report, verb)), [1, 1]);
}

/// One device behind the virtual VT-d, which the guest does not enable, and one outside of it:
/// memory is pinned once for both.
fn both_kinds_in_one_machine() {
    let (text, report) = run(&[
        "--cmdline",
        "vtd=0",
        "--iommu",
        "vtd,host=/dev/iommu",
        "--vfio",
        "path=/dev/vfio/devices/vfio0",
        "--vfio",
        "path=/dev/vfio/devices/vfio1,id=edu,iommu=off",
    ]);
    assert!(holds(&text, "edu: DMA of the whole buffer"), "{text}");
    let verbs = ["DEVICE_BIND", "IOAS_ALLOC", "IOAS_MAP"];
    assert_eq!(verbs.map(|verb| calls(&report, verb)), [2, 1, 1], "{report:#}");
}

/// An edu and a disk of this process and an assigned edu behind one virtual VT-d. The guest uses
/// the emulated edu as it does alone, shares tables between both, and invalidates once for both.
fn emulated_and_assigned_behind_one_unit() {
    let directory = tempfile::tempdir().expect("a directory");
    let disk = directory.path().join("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).expect("an image");
    let disk = format!("path={},format=raw", disk.display());
    let (text, report) = run(&[
        "--cmdline",
        "assigned=2",
        "--iommu",
        "vtd,host=/dev/iommu",
        "--disk",
        &disk,
        "--device",
        "edu",
        "--vfio",
        "path=/dev/vfio/devices/vfio0",
    ]);
    for name in [
        "blocked: a device beside an attached one",
        "stale_first_stage: two devices, two tables, two domains",
        "fault_log: records keep the order of the faults",
        "shared: two devices, one table: one invalidation serves both",
        "last: every device on one table, translation left on",
    ] {
        assert!(holds(&text, name), "'{name}' does not hold:\n{text}");
    }
    let of = |host: &str, verb: &str| report[host]["calls"][verb]["calls"].as_u64().unwrap_or(0);
    for (host, devices) in [("host", 1), ("emulated_host", 2)] {
        let verbs = ["DEVICE_BIND", "IOAS_ALLOC", "IOAS_MAP"].map(|verb| of(host, verb));
        assert_eq!(verbs, [devices, 1, 1], "{host}: {report:#}");
        assert!(of(host, "HWPT_INVALIDATE") > 1, "{host}: {report:#}");
    }
    let nesting = ["nesting", "nesting_beside"].map(|part| &report["iommus"][0][part]);
    let seen = nesting.map(|counters| counters["invalidations_in"].as_u64());
    assert!(seen[0] > Some(0) && seen[0] == seen[1], "{report:#}");
    // Of the emulated one it is known what is left: nothing.
    let left = report["emulated_host"]["left"]["objects"].as_array().map(Vec::len);
    assert_eq!((left, report["host"]["left"].is_null()), (Some(0), true), "{report:#}");
}
