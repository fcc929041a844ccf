// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Programs under `libtwostage_iommufd.so`.

mod express;

use std::path::PathBuf;
use std::process::{Command, Output};

const PROGRAM: &str = env!("CARGO_BIN_EXE_raw-ioctls");

/// The library, which cargo builds before its package's tests.
fn library() -> PathBuf {
    let library = PathBuf::from(PROGRAM).with_file_name("deps/libtwostage_iommufd.so");
    assert!(library.exists(), "no {}", library.display());
    library
}

fn preloaded(program: &str, arguments: &[&str]) -> Command {
    // A run that hangs fails instead of blocking.
    let mut command = Command::new("timeout");
    command.arg("300").arg(program).args(arguments);
    command.env("LD_PRELOAD", library()).env_remove("TWOSTAGE_IOMMUFD");
    command.env("TWOSTAGE_IOMMUFD_LOG", "warn");
    command
}

fn output(command: &mut Command) -> Output {
    command.output().expect("the program starts")
}

/// The output of `command`, which must succeed without complaints.
fn log(command: &mut Command) -> Vec<String> {
    let output = output(command);
    let (out, error) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{out}\n{error}", output.status);
    assert_eq!(error, "", "{out}");
    out.lines().map(str::to_owned).collect()
}

fn expect(arguments: &[&str], lines: &[&str]) {
    assert_eq!(log(&mut preloaded(PROGRAM, arguments)), lines);
}

/// The output on Linux's iommufd is the same: `scripts/nested/x86-host`.
#[test]
fn the_nested_flow() {
    let expected: Vec<_> = include_str!("vtd-flow.txt").lines().collect();
    expect(&["flow", "/dev/vfio/devices/vfio0"], &expected);
    let untracked: Vec<_> = expected.into_iter().filter(|line| !line.contains("dirty")).collect();
    expect(&["flow-without-dirty", "/dev/vfio/devices/vfio0"], &untracked);
}

/// The output on Linux's iommufd is the same.
#[test]
fn pasids_and_their_page_requests() {
    for (flow, expected) in [
        ("pasids", include_str!("pasid-flow.txt")),
        ("asking", include_str!("page-request-flow.txt")),
    ] {
        let expected: Vec<_> = expected.lines().collect();
        expect(&[flow, "/dev/vfio/devices/vfio0"], &expected);
    }
}

#[test]
fn every_call_is_traced_with_its_fields() {
    let mut command = preloaded(PROGRAM, &["flow", "/dev/vfio/devices/vfio0"]);
    let output = output(command.env("TWOSTAGE_IOMMUFD_LOG", "trace"));
    let error = String::from_utf8_lossy(&output.stderr);
    for line in [
        "IOMMU_IOAS_ALLOC(flags=0x0, out_ioas_id=0x0) = 0, out_ioas_id=0x",
        "IOMMU_HWPT_ALLOC(flags=0x3, dev_id=0x",
        "IOMMU_DESTROY(id=0x",
        ") = -1 EBUSY",
        "VFIO_DEVICE_BIND_IOMMUFD(argsz=0x",
        "write(0x8, offset=0x80) = 8",
    ] {
        assert!(error.contains(line), "no '{line}' in\n{error}");
    }
    assert!(!error.contains("ioctl("), "an ioctl without a name:\n{error}");
}

/// The output on Linux's iommufd is the same: `scripts/check/smmu-flow-arm64`.
#[test]
fn the_nested_flow_on_an_smmu() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let text = "[[iommu]]\nname = 'smmu'\nmodel = 'smmuv3'\n\
                [[device]]\nvfio = 1\niommu = 'smmu'\naddress = '00:03.0'\n";
    std::fs::write(file.path(), text).expect("written");
    let mut command = preloaded(PROGRAM, &["smmu", "/dev/vfio/devices/vfio1"]);
    let lines = log(command.env("TWOSTAGE_IOMMUFD", file.path()));
    let expected: Vec<_> = include_str!("smmu-flow.txt").lines().collect();
    assert_eq!(lines, expected);
}

#[test]
fn a_device_asks_for_pages() {
    expect(
        &["page-requests", "/dev/vfio/devices/vfio0"],
        &[
            "attach: ok",
            "readable false",
            "readable true, busy true, (5, 0)",
            "asked: 0x2 0 0 0x2 0x1234568000 0 1",
            "readable false, busy true",
            "moved 0x0",
            "respond: ok",
            "moved 0x1111",
            "busy false, (0, 0)",
            "respond again: errno 22",
            "asked: 0x1234569000",
            "asked: 0x1234569000",
            "asked: 0x1234569000",
            "busy false, (1, 1234569000), false",
            "busy true",
            "detach: ok",
            "busy false, (1, 1234569000)",
            "nothing to read: true",
            "busy false, (0, 0)",
            "respond too late: errno 22",
            "destroy nested: ok",
        ],
    );
}

#[test]
fn memory_of_a_device_stays_its_memory() {
    expect(
        &["memory", "/dev/vfio/devices/vfio1"],
        &[
            "map: ok",
            "map: ok",
            "map what is not there: errno 14",
            "map code to be written: errno 14",
            "pinned: 32 kB",
            "unmap shared: 0",
            "fetch true, store true",
            "the file has 7, the other memory 0",
            "unmap private: 0",
            "store true",
            "a new mapping is elsewhere: true",
            "fetch true, store true",
            "pinned: 32 kB",
            "unmap: 0x8000",
            "store false",
            "private memory is still there: false",
            "pinned: 0 kB",
        ],
    );
}

#[test]
fn a_container_as_it_was_before_iommufd() {
    expect(
        &["container", "/dev/vfio/0", "0000:00:04.0", "/dev/vfio/devices/vfio0"],
        &[
            "version Some(0), type1v2 Some(1)",
            "type1v2 without a group: errno 19",
            "group: flags 1",
            "device without a container: errno 22",
            "no container: errno 77",
            "container: ok",
            "another: errno 22",
            "group: flags 3",
            "type1v2: ok",
            "no such device: errno 19",
            "another descriptor: true",
            "in a child: ok",
            "map: ok",
            "fetch true, store false",
            "unmap: ok, 0x2000",
            "fetch false",
            "map: ok",
            "the other descriptor: fetch true",
            "bind beside the group: errno 16",
            "no container any more: ok",
            "none: errno 22",
            "bind beside the open group: errno 16",
            "bind: ok",
            "the group beside: errno 16",
            "the group: ok",
        ],
    );
}

/// For each, what a kernel would have done is printed on standard error.
#[test]
fn a_device_reaches_memory_whatever_the_program_may() {
    let mut command = preloaded(PROGRAM, &["protected", "/dev/vfio/devices/vfio1"]);
    let output = output(command.env_remove("TWOSTAGE_IOMMUFD_LOG"));
    let (out, error) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{error}");
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(
        lines,
        [
            "not even readable: fetch true",
            "read-only: store true, fetch true",
            "the program sees 0x5a",
            "discarded: fetch true",
            "a hole: fetch true",
            "truncated: fetch false",
        ]
    );
    let said = |what| error.lines().filter(|line| line.contains(what)).count();
    let all = ["now protected", "discarded", "hole is punched"].map(said);
    assert_eq!(all, [2, 1, 2], "{error}");
}

#[test]
fn files_that_are_memory_and_accesses_of_any_length() {
    expect(
        &["files", "/dev/vfio/devices/vfio1"],
        &[
            "memory: ok (true, true)",
            "opened read-only: ok (true, true)",
            "on disk: errno 22 (false, false)",
            "closed before it is used: fetch true, store true",
            "another's descriptor: true",
            "configuration space: Ok(256)",
            "past its end: Err(14)",
            "an odd piece: Ok(7)",
            "registers: Ok(64)",
            "the end of the BAR: Ok(16)",
            "past it: Err(22)",
            "written: 24, [1, 2, 3]",
        ],
    );
}

#[test]
fn nobody_waits_for_a_descriptor_that_is_closed() {
    expect(&["closing"], &["rounds: 3000"]);
}

#[test]
fn descriptors_are_real() {
    expect(
        &["descriptors"],
        &[
            "/dev/iommu: true 20666",
            "/dev/vfio/vfio: true 20666",
            "/dev/vfio/devices/vfio0: true 20666",
            "vfio9: false",
            "closed on exec: true",
            "a duplicate is not: 0",
            "close: 0",
            "closed: errno 9 -1",
            "destroy through true: ok",
            "over a duplicate: true",
            "no iommufd: errno 25",
            "the last: ok",
            "read -1 22",
            "close all: 0",
            "3: IOAS 1",
            "no pointer: errno 14",
        ],
    );
}

#[test]
fn a_range_is_closed_where_the_kernel_closes_it() {
    expect(
        &["ranges"],
        &[
            "a flag that is none: -1 errno 22, 22",
            "a thread alone: 0, 9",
            "again: -1 9",
            "the others: 22",
            "all: 0, 9",
            "a child: ok",
        ],
    );
}

#[test]
fn a_child_works_on_the_objects_of_its_parent() {
    expect(
        &["fork"],
        &[
            "map in the child: ok",
            "bad pointer: errno 2",
            "allocate in the child: ok",
            "of its own: IOAS 1",
            "unmap in the parent: 0x1000",
            "next: IOAS 3",
            "the parent has closed: ok",
            "the owner is gone: errno 19",
        ],
    );
}

#[test]
fn a_child_of_vfork_leaves_its_parent_alone() {
    expect(
        &["vfork"],
        &["the child: 7", "destroy: ok", "duplicate: ok", "close: 0 0", "closed: errno 9"],
    );
}

#[test]
fn a_descriptor_survives_exec() {
    expect(&["exec"], &["IOAS 1", "inherited: IOAS 2", "next: IOAS 3"]);
}

#[test]
fn many_threads() {
    expect(&["threads"], &["destroy: ok"]);
}

#[test]
fn a_machine_from_a_file() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let text = "[[iommu]]\nname = 'a'\nmodel = 'vtd'\n\
                [[device]]\nvfio = 5\niommu = 'a'\naddress = '01:00.0'\n";
    std::fs::write(file.path(), text).expect("written");
    let mut with_file = preloaded("ls", &["/dev/iommu", "/dev/vfio/devices/vfio5"]);
    let lines = log(with_file.env("TWOSTAGE_IOMMUFD", file.path()));
    assert_eq!(lines, ["/dev/iommu", "/dev/vfio/devices/vfio5"]);

    std::fs::write(file.path(), text.replace("vtd", "smmuv4")).expect("written");
    let mut with_file = preloaded("cat", &["/dev/iommu"]);
    let output = output(with_file.env("TWOSTAGE_IOMMUFD", file.path()));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(error.contains("unknown variant"), "{error}");
}

/// How QEMU and DPDK find devices.
#[test]
fn devices_are_in_sysfs() {
    let device = "/sys/devices/pci0000:00/";
    let (of_processes, lines): (Vec<_>, Vec<_>) = log(&mut preloaded(PROGRAM, &["sysfs"]))
        .into_iter()
        .partition(|line| line.starts_with("pid "));
    assert_eq!(
        lines,
        [
            "on the bus: [\"0000:00:04.0\", \"0000:00:05.0\"]",
            "a link: ../../../devices/pci0000:00/0000:00:04.0",
            &format!("really: {device}0000:00:04.0"),
            "0x1234 0x11e8 0x00ff00",
            "0x00000000fe000000 0x00000000fe0fffff 0x0000000000040200",
            "driver: vfio-pci",
            "group: 0, of [\"0000:00:04.0\"]",
            "IOMMU: dmar0",
            "cdev: [\"vfio0\"], 511:0, st_rdev 511:0",
            "groups: [\"0\", \"1\"]",
            "the configuration space: 4096, 34 12 e8 11",
            "in /dev/vfio: [\"0\", \"1\", \"devices\", \"vfio\"]",
            "in /dev/vfio/devices: [\"vfio0\", \"vfio1\"]",
            "vfio1 in the open folder: character device true, bind ok",
            "./vfio1 in the open folder: character device true, bind ok",
            "../devices//vfio1 in the open folder: character device true, bind ok",
            "not the shortest path: st_rdev 511",
            "really: /dev/vfio/vfio Err(20)",
            "back to the kernel's: true true true",
            "devices in lists: true",
            "a new one, a folder: errno [17, 20]",
            "fstatat of a descriptor: 0 20666",
            "what there is room for: 9 /dev/vfio",
            "no room: -1 14",
            "a folder is one: true",
            "what is not there: errno 2 2 2 2",
            "the rest of /sys: true",
            "/dev/iommu is no link: errno 22, really /dev/iommu",
            "in a child: 2 devices",
        ],
    );
    assert_eq!(of_processes.len(), 2);
    let gone = |folder: std::fs::DirEntry| {
        let name = folder.file_name().into_string().unwrap_or_default();
        let of = |line: &String| line.replace("pid ", ".twostage-iommufd.") + ".";
        !of_processes.iter().any(|line| name.starts_with(&of(line)))
    };
    for folder in [PathBuf::from("/dev/shm"), std::env::temp_dir()] {
        let entries = std::fs::read_dir(folder).expect("a folder");
        assert!(entries.flatten().all(gone), "the folders are removed at exit");
    }
}

/// With attributes, which `ls -l` asks for.
#[test]
fn ls_has_nothing_to_complain_about() {
    let lines = log(&mut preloaded("ls", &["-l", "/dev/vfio", "/sys/bus/pci/devices"]));
    let has = |start: char, end: &str| {
        lines.iter().any(|line| line.starts_with(start) && line.ends_with(end))
    };
    assert!(has('c', " vfio") && has('d', " devices"), "{lines:?}");
    assert!(has('l', "-> ../../../devices/pci0000:00/0000:00:04.0"), "{lines:?}");
}

/// What QEMU calls, as a distribution builds it.
#[test]
fn fortified_calls() {
    expect(
        &["fortified", "/dev/vfio/devices/vfio1"],
        &[
            "__open64_2, __openat_2: true true",
            "__pread64_chk: 256, 34 12 e8 11",
            "__pread_chk: 7",
            "preadv64: 128, MSI at 0x40",
            "pwritev64: 2, 2: 06 04",
            "__read_chk: errno 22",
            "__readlink_chk: ../../../kernel/iommu_groups/1",
            "__readlinkat_chk: 30",
            "__realpath_chk: /sys/devices/pci0000:00/0000:00:05.0",
            "__poll_chk: 1, __ppoll_chk: 1",
        ],
    );
}

/// Programs that do not use devices behave as without the library.
#[test]
fn other_programs_are_left_alone() {
    let script = "exec 3</etc/passwd; read line <&3; exec 3<&-; echo \"$line\" | cat; \
                  (echo a; echo b) | sort -r | tr '\\n' ' '; test -e /etc/passwd && echo yes";
    let with = log(&mut preloaded("sh", &["-c", script]));
    let without = log(Command::new("sh").args(["-c", script]));
    assert_eq!(with, without);
}
