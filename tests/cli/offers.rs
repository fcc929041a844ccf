// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the machine, its user and its devices provide: KVM, taps, probe and info.

use super::*;

/// Runs the command in new mount and network namespaces, after `prepare`; none if the system does
/// not allow that.
fn in_namespace(prepare: &str, command: &str) -> Option<Output> {
    let unshare = |script: &str| {
        let unshare = ["--mount", "--net", "sh", "-c", script];
        Command::new("unshare").args(unshare).stdin(Stdio::null()).output()
    };
    if !unshare(prepare).is_ok_and(|output| output.status.success()) {
        not_tested(format!("'{prepare}' in a namespace is not allowed"));
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

/// Prefix to run as an unprivileged user.
const NOBODY: &str = "setpriv --reuid=65534 --clear-groups";

/// Copies of the command and of a kernel that another user can run and read.
struct OtherUser {
    /// Prepares this, and checks it.
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
    // A /dev in which everybody may open KVM, and TUN with these permissions.
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
