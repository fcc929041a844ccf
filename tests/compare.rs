// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `scripts/bench/compare-with-qemu` when a run hangs: the others continue, and missing figures are
//! listed. With shell scripts as VMMs. And its tables of what mirrors take, and of a side core.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// The output of a successful run, which is checked before the run ends.
const RUNS: &str = "\
echo '# Linux is up'
for figure in write-4k read-4k write-1m read-1m invalidation-us invalidations-per-write; do
    echo \"figure $figure 7\"
done
echo 'mark done'
sleep 1
";

/// In lazy mode: half a line, and then a hang. A child keeps the console open when this one is
/// killed, like a process stuck in the kernel.
const HANGS: &str = "\
case \"$*\" in *iommu.strict*) ;; *sm_on*) printf 'figure wri'; sleep 300 & wait ;; esac
";

fn program(path: &Path, body: &str) -> String {
    std::fs::write(path, format!("#!/bin/sh\n{body}")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path.display().to_string()
}

/// Two maps and their unmaps of each VMM, and what is missing.
#[test]
fn what_a_map_takes_is_counted_for_each() {
    let of = |vmm: &str, copies: u32, ioctl: u32| {
        format!(
            "figure {vmm} mirrors calls-4k 2\r
figure {vmm} mirrors map-4k {}\r
figure {vmm} mirrors 4k.ioctl.{ioctl} {copies}
figure {vmm} mirrors 4k.ioctl-us.{ioctl} {copies}0
figure {vmm} mirrors 4k.ioctl.15238 2
figure {vmm} mirrors 4k.ioctl-us.15238 10
figure {vmm} mirrors 4k.ioctl.44672 9
figure {vmm} mirrors 4k.ioctl-us.44672 9000
figure {vmm} mirrors 4k.kvm_userspace_exit.6 4
figure {vmm} mirrors 4k.kvm_userspace_exit.2 1
figure {vmm} mirrors 4k.vmm.6 4
figure {vmm} mirrors 4k.vmm-us.6 110
figure {vmm} mirrors 4k.vmm-us.2 99
",
            100 * copies
        )
    };
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("log");
    // IOAS_COPY, and IOAS_MAP.
    let figures = format!("plan 1 mirrors\n{}{}", of("twostage", 2, 15235), of("qemu", 6, 15237));
    std::fs::write(&file, figures).unwrap();
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
    let tables = Command::new(format!("{root}/scripts/bench/compare-with-qemu"))
        .args(["--mirrors", "--from", file.to_str().unwrap()])
        .output()
        .unwrap();
    let tables = String::from_utf8(tables.stdout).unwrap();
    for line in [
        "| map of 4 KiB | 0.20 ms | 0.60 ms | 3.00 |",
        "| unmap of 4 KiB | no figure | no figure | |",
        "| 4 KiB: IOAS_MAP or IOAS_COPY | 1.0 | 3.0 | 3.00 |",
        "| ... IOAS_UNMAP | 1.0 | 1.0 | 1.00 |",
        "| ... exits to user space for MMIO | 2.0 | 2.0 | 1.00 |",
        "| ... in the host's IOAS_MAP or IOAS_COPY, µs | 10 | 30 | 3.00 |",
        "| ... in its IOAS_UNMAP, µs | 5 | 5 | 1.00 |",
        "| ... in the VMM besides, of these exits, µs | 40 | 20 | 0.50 |",
        "LACKING of qemu, 2 MiB: times counters",
    ] {
        assert!(tables.contains(line), "no '{line}' in\n{tables}");
    }
    assert!(!tables.contains("LACKING of qemu, 4 KiB:"), "{tables}");
}

/// QEMU has no side core: its strict figures stand beside.
#[test]
fn a_side_core_is_compared_with_exits() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("log");
    let mut figures = "plan 1 count-strict count-side strict side\n".to_owned();
    for (of, exits, us) in
        [("twostage side", 100, 9), ("twostage strict", 40000, 72), ("qemu strict", 50000, 90)]
    {
        figures += &format!(
            "figure {of} invalidation-us {us}\r
figure {of} write-4k.kvm_userspace_exit.6 {exits}
figure {of} boot.kvm_exit.1 3
"
        );
        let waits = if of == "qemu strict" { "descriptors.wait" } else { "virtual-IOMMU.wait" };
        figures += &format!("figure {of} write-4k.{waits} 40000\n");
    }
    std::fs::write(&file, figures).unwrap();
    let tables =
        Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/bench/compare-with-qemu"))
            .args(["--from", file.to_str().unwrap()])
            .output()
            .unwrap();
    let tables = String::from_utf8(tables.stdout).unwrap();
    for line in [
        "| one strict unmap | 72.0 µs | 90.0 µs | 1.25 |",
        "| one strict unmap, a side core | 9.0 µs | 90.0 µs | 10.00 |",
        "| ... to user space | 0 |  | 100 |  |",
        "| ... to user space | 0.00 | 1.00 | 1.25 |",
    ] {
        assert!(tables.contains(line), "no '{line}' in\n{tables}");
    }
    assert!(!tables.contains("LACKING of qemu, side"), "{tables}");
}

#[test]
#[ignore = "half a minute, in which nothing happens"]
fn a_run_that_hangs_is_said_and_the_next_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let twostage = program(&path("twostage"), RUNS);
    let qemu = program(&path("qemu"), &format!("{HANGS}{RUNS}"));
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
    let log = std::fs::File::create(path("log")).unwrap();
    let status = Command::new(format!("{root}/guest-images/nested-host/compare"))
        .args([&twostage, &qemu, "kernel", "initramfs", "1", "off", "lazy", "strict"])
        .env("COMPARE_LIMIT_S", "20")
        .env("COMPARE_SCRATCH", directory.path())
        .stdin(Stdio::null())
        .stdout(log)
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(1));
    let log = std::fs::read_to_string(path("log")).unwrap();
    assert!(log.contains("qemu lazy: NOT ENDED AS IT SHOULD"), "{log}");
    assert_eq!(log.matches("NOT ENDED").count(), 1, "{log}");

    let tables = Command::new(format!("{root}/scripts/bench/compare-with-qemu"))
        .args(["--from", path("log").to_str().unwrap()])
        .output()
        .unwrap();
    let tables = String::from_utf8(tables.stdout).unwrap();
    for line in [
        "| 4 KiB writes, off | 7/s | 7/s | 1.00 |",
        "| 4 KiB writes, lazy | 7/s | no figure | |",
        "| 4 KiB writes, strict | 7/s | 7/s | 1.00 |",
    ] {
        assert!(tables.contains(line), "no '{line}' in\n{tables}");
    }
    let lacking: Vec<&str> = tables.lines().filter(|line| line.contains("LACKING")).collect();
    let all = "boot-s (0 of 1), own-kib (0 of 1), resident-kib (0 of 1), write-4k (0 of 1), \
               read-4k (0 of 1), write-1m (0 of 1), read-1m (0 of 1)";
    assert_eq!(lacking, [format!("LACKING of qemu, lazy: {all}")]);
}
