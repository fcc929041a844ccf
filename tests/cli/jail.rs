// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--jail`: what the kernel says of each thread of a machine.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, MetadataExt};

use super::*;
use child::Running;

/// The value of a field of `/proc/PID/status`.
fn field(status: &str, name: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().trim().to_owned()
}

const NAMES: [&str; 6] = ["twostage", "output", "vcpu0", "vcpu1", "edu-dma", "page-requests"];

/// A machine with several kinds of threads, whose guest idles; and the name and status of each.
fn threads(jail: &[&str]) -> Vec<(String, String)> {
    threads_of(with_default_signals(TWOSTAGE), jail)
}

/// The same of `command`, which gets the arguments.
fn threads_of(mut command: Command, jail: &[&str]) -> Vec<(String, String)> {
    let image = kernel(&multiboot(&[code::print("."), code::HALT.to_vec()].concat()));
    let report = NamedTempFile::new().unwrap();
    let disk = kernel(&[0; 4096]);
    command.args(["run", "--memory", "size=16M", "--cpus", "boot=2", "--kernel", text(&image)]);
    command.args(["--iommu", "vtd,ats=on,pri=on", "--device", "edu,pasid=on,ats=on,pri=on"]);
    command.args(["--disk", &format!("path={},iommu=off", text(&disk))]);
    command.args(["--rng", "src=/dev/urandom"]).args(jail);
    command.args(["--report", &format!("json,file={}", text(&report))]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut machine = Running::new(&mut command);
    let mut byte = [0];
    machine.0.stdout.take().unwrap().read_exact(&mut byte).unwrap();
    let read = |task: std::io::Result<fs::DirEntry>| {
        let path = task.unwrap().path();
        let status = fs::read_to_string(path.join("status")).unwrap();
        // That of the process; root, if nobody else may read its memory.
        let owner = fs::metadata(path.join("environ")).unwrap().uid();
        (field(&status, "Name"), format!("{status}Owner:\t{owner}\n"))
    };
    let mut threads = Vec::new();
    wait_until("threads with their names", || {
        let tasks = fs::read_dir(format!("/proc/{}/task", machine.0.id())).unwrap();
        threads = tasks.map(read).collect::<Vec<_>>();
        NAMES.iter().all(|name| threads.iter().any(|(known, _)| known == name))
    });
    // The report's file is open, whoever the process is now.
    machine.signal("USR1");
    wait_until("a report", || fs::read(report.path()).unwrap().ends_with(b"}\n"));
    machine.signal("TERM");
    assert_eq!(machine.end().code(), Some(128 + 15));
    let mut said = String::new();
    machine.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said, "");
    threads
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn every_thread_has_a_filter_and_no_privileges() {
    if !kvm() {
        return;
    }
    for (name, status) in threads(&[]).iter().chain(&threads(&["--jail", "on"])) {
        assert_eq!(field(status, "Seccomp"), "2", "{name}");
        assert_eq!(field(status, "NoNewPrivs"), "1", "{name}");
        assert_eq!(field(status, "Owner"), "0", "{name}");
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(field(status, set), "0".repeat(16), "{name}: {set}");
        }
        if is_root() {
            for set in ["Uid", "Gid"] {
                assert_eq!(field(status, set), ["65534"; 4].join("\t"), "{name}: {set}");
            }
            assert_eq!(field(status, "Groups"), "", "{name}");
        }
    }
}

#[test]
fn the_user_and_the_group_are_those_that_are_named() {
    if !kvm() || !is_root() {
        return not_tested("not root, or no KVM");
    }
    for (name, status) in threads(&["--jail", "on", "--uid", "1234", "--gid", "4321"]) {
        assert_eq!(field(&status, "Uid"), ["1234"; 4].join("\t"), "{name}");
        assert_eq!(field(&status, "Gid"), ["4321"; 4].join("\t"), "{name}");
    }
    for (name, status) in threads(&["--jail", "on", "--uid", "0"]) {
        assert_eq!(field(&status, "Uid"), ["0"; 4].join("\t"), "{name}");
        assert_eq!(field(&status, "CapPrm"), "0".repeat(16), "{name}");
    }
}

/// The root of a user namespace without other users, as `scripts/nested/here` makes one.
#[test]
fn a_root_who_cannot_become_another_stays_and_has_a_jail() {
    let unshare = |program: &str| {
        let mut command = with_default_signals("unshare");
        command.args(["--map-root-user", program]);
        command
    };
    if !kvm() || !unshare("true").status().is_ok_and(|status| status.success()) {
        return not_tested("no user namespaces, or no KVM");
    }
    let own = fs::read_to_string("/proc/self/status").unwrap();
    for (name, status) in threads_of(unshare(TWOSTAGE), &[]) {
        assert_eq!(field(&status, "Seccomp"), "2", "{name}");
        assert_eq!(field(&status, "CapPrm"), "0".repeat(16), "{name}");
        assert_eq!(field(&status, "Uid"), field(&own, "Uid"), "{name}");
    }
}

#[test]
fn a_log_has_filters_only_and_no_jail_has_none() {
    if !kvm() {
        return;
    }
    let own = fs::read_to_string("/proc/self/status").unwrap();
    for (jail, seccomp) in [("log", "2".to_owned()), ("off", field(&own, "Seccomp"))] {
        for (name, status) in threads(&["--jail", jail]) {
            assert_eq!(field(&status, "Seccomp"), seccomp, "{name}");
            assert_eq!(field(&status, "CapPrm"), field(&own, "CapPrm"), "{name}");
            assert_eq!(field(&status, "Uid"), field(&own, "Uid"), "{name}");
        }
    }
}

#[test]
fn a_machine_is_built_again_in_the_jail() {
    if !kvm() {
        return;
    }
    let cpus = rustix::thread::sched_getaffinity(None).unwrap();
    let cpu = (0..rustix::thread::CpuSet::MAX_CPU).find(|cpu| cpus.is_set(*cpu)).unwrap();
    // The side core is started, and bound, in the jail from the second life on.
    let iommu = format!("vtd,side-core=on,side-cpu={cpu}");
    let image = kernel(&[0; 4096]);
    let disk = format!("path={},readonly=on,iommu=off", text(&image));
    let reports = guests::lives(&iommu, &["--jail", "on", "--disk", &disk]);
    for report in &reports[1..] {
        let devices = report["devices"].as_array().unwrap();
        let served: Vec<_> = devices.iter().filter_map(|it| it["served_by"].as_str()).collect();
        assert_eq!(served.len(), 2, "{report:#}");
        assert!(!served.contains(&"io_uring"), "a ring is not made there: {report:#}");
    }
}

#[test]
fn users_and_groups_that_contradict_something_are_refused() {
    let refused = |args: &[&str], hint: &str| {
        assert_refused(&twostage(&[&["run", "--kernel", "k"], args].concat()), USAGE, hint);
    };
    for option in ["--uid", "--gid"] {
        refused(&["--jail", "off", option, "5"], &format!("{option}: say --jail on"));
        refused(&[option, "4294967295"], option);
        let why = match is_root() {
            true => format!("{option}: with --on-reset restart it stays the user"),
            false => format!("{option}: only root"),
        };
        refused(&["--jail", "on", "--on-reset", "restart", option, "5"], &why);
    }
    if is_root() {
        let args = ["--jail", "on", "--uid", "0", "--gid", "5"];
        refused(&args, "--gid: with --uid 0 it stays the user");
    }
}

/// A file that replaces another under its name is one that the jail has no access to; what is
/// written into the old one is seen.
#[test]
fn a_kernel_that_is_replaced_is_not_opened_again_in_the_jail() {
    if !kvm() {
        return;
    }
    let reset = multiboot(&[code::out(0xcf9, 0x06), code::HALT.to_vec()].concat());
    let seven = multiboot(&[code::exit(7), code::HALT.to_vec()].concat());
    assert_eq!(reset.len(), seven.len());
    for (jail, replaced, end) in [("on", true, NO_INPUT), ("off", true, 7), ("on", false, 7)] {
        let folder = TempDir::new().unwrap();
        let [old, new] = ["old", "new"].map(|name| folder.path().join(name));
        fs::write(&old, &reset).unwrap();
        fs::write(&new, &seven).unwrap();
        let mut command = with_default_signals(TWOSTAGE);
        command.args(["run", "--memory", "size=16M", "--report", "none", "--on-reset", "restart"]);
        command.args(["--jail", jail, "--kernel"]).arg(&old);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut machine = Running::new(&mut command);
        let mut errors = BufReader::new(machine.0.stderr.take().unwrap());
        let mut line = String::new();
        errors.read_line(&mut line).unwrap();
        if line.contains("Landlock") {
            return not_tested(line);
        }
        assert!(line.contains("the guest reset the machine after"), "{line}");
        match replaced {
            true => fs::rename(&new, &old).unwrap(),
            false => {
                let file = fs::File::options().write(true).open(&old).unwrap();
                file.write_all_at(&seven, 0).unwrap();
            }
        }
        let mut rest = String::new();
        errors.read_to_string(&mut rest).unwrap();
        assert_eq!(machine.end().code(), Some(end.into()), "{jail}, {replaced}: {rest}");
        if end == NO_INPUT {
            let why =
                "Permission denied (os error 13): the jail opens only the files that were there \
                       at the start, not one that has replaced such a file; --jail off does";
            let said = format!("twostage: error: --kernel {}: {why}", old.display());
            assert_eq!(rest.lines().last(), Some(&*said), "{rest}");
        }
    }
}
