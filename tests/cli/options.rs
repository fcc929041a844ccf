// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Options: `--help`, where they are written once: documents quote it, and it names the keys that
//! there are. Invalid options, files and devices: one line each, and the exit code.

use std::collections::BTreeSet;
use std::fs;

use super::*;

fn help(args: &[&str]) -> String {
    let output = twostage(args);
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

/// Each block of `document` that begins with `$ twostage ARGS --help`: the arguments, and what
/// follows.
fn quoted(document: &str) -> impl Iterator<Item = (Vec<&str>, &str)> {
    let blocks = document.split("\n```\n$ twostage ").skip(1);
    blocks.filter_map(|block| {
        let (args, rest) = block.split_once('\n')?;
        let args: Vec<_> = args.split(' ').collect();
        let text = rest.split("\n```").next()?.split("\n\n$ ").next()?;
        args.contains(&"--help").then_some((args, text))
    })
}

#[test]
fn documents_quote_it() {
    for (document, commands) in [
        ("README.md", &["--help"][..]),
        ("docs/command-line.md", &["run --help", "info --help", "probe --help"]),
    ] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(document);
        let text = fs::read_to_string(path).unwrap();
        let quoted: Vec<_> = quoted(&text).collect();
        let found: Vec<_> = quoted.iter().map(|(args, _)| args.join(" ")).collect();
        assert_eq!(found, commands, "{document}");
        for (args, text) in quoted {
            let said = help(&args);
            let said: Vec<_> = said.trim_end().lines().map(str::trim_end).collect();
            let what = format!("{document} is behind `twostage {}`", args.join(" "));
            assert_eq!(text.lines().collect::<Vec<_>>(), said, "{what}");
        }
    }
}

/// The keys in `grammar`: the words before an equals sign.
fn keys(grammar: &str) -> BTreeSet<&str> {
    let word = |part| str::rsplit(part, |c: char| !c.is_ascii_lowercase() && c != '-').next();
    let mut parts: Vec<_> = grammar.split('=').collect();
    parts.pop();
    parts.into_iter().filter_map(word).collect()
}

#[test]
fn it_names_the_keys_that_there_are() {
    let help = help(&["run", "--help"]);
    for (option, value) in [
        ("--cpus", "boot=1"),
        ("--memory", "size=1M"),
        ("--iommu", "vtd"),
        ("--iommu", "smmuv3"),
        ("--device", "edu"),
        ("--disk", "path=disk"),
        ("--net", "tap=tap"),
        ("--rng", "src=source"),
        ("--vfio", "path=device"),
    ] {
        let name = format!("{option} <");
        let grammar = help.split(&name).nth(1).and_then(|rest| rest.split(">\n").next()).unwrap();
        // The model's part, if there are several.
        let model = grammar.split("]|").find(|model| model.starts_with(value)).unwrap_or(grammar);
        let value = format!("{value},no-such-key=1");
        let output = twostage(&["run", "--kernel", "kernel", option, &value]);
        let error = String::from_utf8_lossy(&output.stderr);
        let known =
            error.split("known: ").nth(1).and_then(|known| known.split(" (").next()).unwrap();
        assert!(error.contains("unknown key 'no-such-key'"), "{error}");
        assert_eq!(keys(model), known.split(", ").collect(), "{option} {value}");
    }
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
        (&["--iommu", "vtd,addr=0x1000"], "overlaps RAM"),
        (&["--iommu", "vtd,nest=on,host=/dev/iommu"], "nest=on needs host=emulated"),
        (&["--iommu", "vtd,side-cpu=0"], "say side-core=on or auto"),
        (&["--iommu", "vtd,side-core=on", "--iommu", "vtd,side-core=auto"], "side-core= must be"),
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
    refused(&["--host", "/dev/null"], UNAVAILABLE, "/dev/null is not an iommufd");
    refused(
        &["--host", "emulated", "--vfio", "path=/dev/null"],
        USAGE,
        "the emulated host has its own",
    );
    refused(&["--vfio", "/dev/null"], USAGE, "path=");
    refused(&["--report", "xml"], USAGE, "'xml'");
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
    assert_eq!(fs::read(kernel.path()).unwrap(), image);
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
