// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Processes that run out of descriptors, memory or threads: at whatever it happens, it is one line
//! with what was refused and what to do about it, and an exit code of its own.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use tempfile::{NamedTempFile, TempDir};
use twostage::patience::wait_until;
use twostage::skips::not_tested;
use twostage_vmm::exit_code::{GUEST_STUCK, IO_ERROR, NO_INPUT, OS_ERROR, UNAVAILABLE};

use crate::child::{kernel, kvm, with_default_signals, Running, TWOSTAGE};
use crate::images::multiboot;
use crate::world::IN_MEMORY;
use crate::{code, guest, run_after};

/// What a command line opens.
struct World {
    folder: TempDir,
    disk: NamedTempFile,
    memory: NamedTempFile,
    seven: NamedTempFile,
}

impl World {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            disk: kernel(&[0; 4096]),
            memory: NamedTempFile::new_in(IN_MEMORY).unwrap(),
            seven: kernel(&multiboot(&[code::exit(7), code::HALT.to_vec()].concat())),
        }
    }

    /// Runs a machine with one of each after `before` in a shell.
    fn run(&self, before: &str, more: &[&str]) -> Output {
        self.memory.as_file().set_len(4096).unwrap();
        let path = |name: &str| self.folder.path().join(name).display().to_string();
        let disk = |file: &NamedTempFile| format!("path={}", file.path().display());
        let (one, other) = (disk(&self.disk), disk(&self.memory));
        let (serial, report) =
            (format!("file={}", path("serial")), format!("json,file={}", path("report")));
        let trace = path("trace");
        let options = [
            &["--iommu", "vtd,pri=on,ats=on", "--device", "edu,pasid=on,ats=on,pri=on"][..],
            &["--disk", &one, "--disk", &other, "--rng", "src=/dev/urandom"],
            &["--serial", &serial, "--report", &report, "--trace", &trace],
            &["--cpus", "boot=2"],
            more,
        ];
        run_after(before, self.seven.path(), &options.concat()).output().unwrap()
    }
}

/// The exit code for what could not be had, by the first words of the line.
fn exit_code_for(what: &str) -> u8 {
    let begins = |names: &[&str]| names.iter().any(|name| what.starts_with(name));
    if begins(&["--kernel ", "--disk: ", "--rng: "]) {
        NO_INPUT
    } else if begins(&["--report: ", "--serial ", "--trace "]) {
        IO_ERROR
    } else if begins(&["/dev/kvm: "]) {
        UNAVAILABLE
    } else if begins(&["vCPU 0: KVM_RUN: ", "vCPU 1: KVM_RUN: "]) {
        // KVM starts a thread of its own.
        GUEST_STUCK
    } else {
        // Memory, threads, and descriptors that are of no file.
        OS_ERROR
    }
}

/// Refused with one line, in which there is `advice`, and the exit code for it. Returns that.
fn assert_refused(output: &Output, context: &str, advice: &[&str]) -> u8 {
    let said = String::from_utf8_lossy(&output.stderr);
    let context = format!("{context}: {:?}: {said}", output.status);
    let what = said.strip_prefix("twostage: error: ").unwrap_or_else(|| panic!("{context}"));
    assert_eq!(said.lines().count(), 1, "{context}");
    assert!(advice.iter().any(|advice| said.contains(advice)), "{context}");
    let code = exit_code_for(what);
    assert_eq!(output.status.code(), Some(code.into()), "{context}");
    code
}

#[test]
fn each_descriptor_that_is_not_to_be_had_is_named_with_the_limit() {
    if !kvm() {
        return;
    }
    let world = World::new();
    for jail in ["on", "off"] {
        let (mut refused, mut codes) = (0, BTreeSet::new());
        // The C library's loader needs one.
        let enough = (4..200).find(|limit| {
            let output = world.run(&format!("ulimit -n {limit}"), &["--jail", jail]);
            if output.status.code() == Some(7) {
                return true;
            }
            let advice =
                format!("this process may have {limit} files open: raise it with ulimit -n");
            let context = format!("{limit} files, jail {jail}");
            codes.insert(assert_refused(&output, &context, &[&advice]));
            refused += 1;
            false
        });
        assert!(refused > 20, "{refused} of {enough:?}");
        // Which of them comes first is the C library's and KVM's business; /dev/kvm may do without.
        let rest = codes.iter().filter(|code| **code != UNAVAILABLE).copied();
        assert_eq!(rest.collect::<Vec<_>>(), [NO_INPUT, OS_ERROR, IO_ERROR], "jail {jail}");
    }
}

/// A driver starts its device in a machine that has too few for that: the device needs a reset, and
/// says what to do about it.
#[test]
fn each_descriptor_that_a_driver_needs_is_told_with_the_limit() {
    if !kvm() {
        return;
    }
    let disk = kernel(&[0; 4096]);
    let disk = format!("path={}", disk.path().display());
    let mut told = 0;
    let enough = (20..200).find(|limit| {
        let mut shell = with_default_signals("sh");
        let script = format!("ulimit -n {limit}; exec \"$0\" \"$@\"");
        shell.args(["-c", &script, TWOSTAGE]);
        let mut command = guest::after(shell, &["--disk", &disk, "--rng", "src=/dev/urandom"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut machine = Running::new(&mut command);
        let guests = BufReader::new(machine.0.stdout.take().unwrap());
        // Its devices work or not, or the machine has ended.
        if guests.lines().map_while(Result::ok).any(|line| line.starts_with("ready: ")) {
            machine.signal("TERM");
        }
        let mut said = String::new();
        machine.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        let advice = format!("this process may have {limit} files open: raise it with ulimit -n");
        let lines = said.lines().filter(|line| line.contains("(os error 24)"));
        let lines: Vec<_> = lines.collect();
        machine.end();
        assert!(lines.iter().all(|line| line.contains(&advice)), "{said}");
        let of_device = |line: &&&str| line.contains("[WARN ] 00:0");
        told += lines.iter().filter(of_device).count();
        lines.is_empty()
    });
    assert!(told > 1, "{told} of {enough:?}");
}

/// What became of a machine in so little memory.
enum Outcome {
    /// The loader of the C library had too little for the program, and said so.
    NotLoaded,
    /// It may also end by a signal, as it does not look at all that it is refused.
    LoaderKilled,
    /// It ran, or the C library said why it did not.
    Other,
    Refused,
}

/// Runs a machine in `kib` KiB, which says in one line what it has no memory for.
fn run_without_memory(world: &World, kib: u32, was_loaded: bool) -> Outcome {
    let output = world.run(&format!("ulimit -v {kib}"), &["--jail", "on"]);
    let said = String::from_utf8_lossy(&output.stderr);
    let of_loader = ["loading shared libraries", "cannot allocate TLS"];
    if !was_loaded && of_loader.iter().any(|line| said.contains(line)) {
        return Outcome::NotLoaded;
    }
    if !was_loaded && said.is_empty() && output.status.signal() == Some(libc::SIGSEGV) {
        return Outcome::LoaderKilled;
    }
    // Not even the C library, which tells of it itself; or a thread of which the standard library
    // tells, before any of its work.
    let others = [
        "Fatal glibc error",
        "cannot allocate memory for thread-local data",
        "failed to allocate an alternative stack",
    ];
    if output.status.code() == Some(7) || others.iter().any(|line| said.contains(line)) {
        return Outcome::Other;
    }
    let advice =
        ["see ulimit -v and -l", "no more threads", "there is no memory for", "out of memory"];
    let code = assert_refused(&output, &format!("{kib} KiB"), &advice);
    // Memory, or a file that cannot be mapped or read.
    assert!([OS_ERROR, NO_INPUT].contains(&code), "{kib} KiB: {said}");
    Outcome::Refused
}

#[test]
fn memory_that_is_not_to_be_had_is_one_line() {
    if !kvm() {
        return;
    }
    let world = World::new();
    let loaded = |kib: &u32| {
        matches!(run_without_memory(&world, *kib, false), Outcome::Other | Outcome::Refused)
    };
    let from = (20_000..60_000).step_by(500).find(loaded).expect("the program is loaded");
    // The first pages of a stack are a narrow place, just above what the loader needs; from there
    // up to what suffices, and beyond: what the C library maps differs from run to run.
    let narrow = (from - 500..from + 500).step_by(20);
    let (mut refused, mut killed, mut was_loaded) = (0, 0, false);
    for kib in narrow.chain((from + 500..60_000).step_by(500)) {
        match run_without_memory(&world, kib, was_loaded) {
            Outcome::NotLoaded => continue,
            Outcome::LoaderKilled => {
                killed += 1;
                continue;
            }
            Outcome::Other => {}
            Outcome::Refused => refused += 1,
        }
        was_loaded = true;
    }
    assert!(was_loaded && refused > 10, "{refused}");
    // A place of some 40 KiB, which is not quite the same in each run.
    assert!(killed <= 4, "the loader was killed at {killed} sizes");
}

/// A control group of the controller `name`, of version 1 or 2.
struct Group(PathBuf);

impl Group {
    fn new(name: &str) -> Option<Self> {
        let root = Path::new("/sys/fs/cgroup");
        let folder = [root.join(name), root.to_owned()].into_iter().find(|folder| {
            let controllers = fs::read_to_string(folder.join("cgroup.controllers"));
            let is_second =
                controllers.is_ok_and(|all| all.split_whitespace().any(|it| it == name));
            (folder.ends_with(name) && folder.join("tasks").exists()) || is_second
        });
        let group = folder?.join(format!("twostage-faults-{}-{name}", std::process::id()));
        let made = fs::create_dir(&group);
        if let Err(error) = &made {
            not_tested(format!("no control group is to be had ({error}; is this root?)"));
        }
        made.ok().map(|()| Self(group))
    }

    fn set(&self, names: [&str; 2], value: &str) {
        let file = names.map(|name| self.0.join(name)).into_iter().find(|file| file.exists());
        fs::write(file.expect("a file for the limit"), value).unwrap();
    }

    /// How many processes of it the kernel has killed for want of memory.
    fn kills(&self) -> u64 {
        let files = ["memory.events", "memory.oom_control"].map(|name| self.0.join(name));
        let text = files.into_iter().find_map(|file| fs::read_to_string(file).ok()).unwrap();
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.unwrap().parse().unwrap()
    }

    /// For the shell: the process is in the group from now on.
    fn enter(&self) -> String {
        format!("echo $$ >'{}'", self.0.join("cgroup.procs").display())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Processes have ended, but perhaps not been counted out.
        wait_until("an empty control group", || fs::remove_dir(&self.0).is_ok());
    }
}

#[test]
fn each_thread_that_is_not_to_be_had_is_named_with_the_limit() {
    if !kvm() {
        return;
    }
    let (world, Some(group)) = (World::new(), Group::new("pids")) else { return };
    let mut refused = 0;
    let enough = (1..100).find(|most| {
        group.set(["pids.max"; 2], &most.to_string());
        let output = world.run(&group.enter(), &["--jail", "on"]);
        if output.status.code() == Some(7) {
            return true;
        }
        let advice = ["no more threads: see ulimit -u"];
        let code = assert_refused(&output, &format!("{most} threads"), &advice);
        assert!([OS_ERROR, GUEST_STUCK].contains(&code), "{most} threads: {code}");
        refused += 1;
        false
    });
    // The log's, one of the edu, one of page requests, the console's, vCPUs.
    assert!(refused >= 5, "{refused} of {enough:?}");
}

#[test]
fn a_control_group_without_memory_ends_the_process_and_nothing_hangs() {
    if !kvm() {
        return;
    }
    let (world, Some(group)) = (World::new(), Group::new("memory")) else { return };
    let mut killed = 0;
    for mib in [256].into_iter().chain((1..16).rev()) {
        group.set(["memory.max", "memory.limit_in_bytes"], &format!("{mib}M"));
        let output = world.run(&group.enter(), &["--jail", "on"]);
        match (output.status.code(), output.status.signal()) {
            (Some(7), None) => {}
            // The kernel's choice, of which its log tells: nobody can say a line.
            (None, Some(9)) if mib < 16 => killed += 1,
            _ => {
                let advice = ["there is no memory", "ulimit"];
                assert_eq!(assert_refused(&output, &format!("{mib} MiB"), &advice), OS_ERROR);
            }
        }
    }
    assert_ne!(killed, 0, "no limit was too low");
    assert!(group.kills() >= killed, "{} of {killed}", group.kills());
}
