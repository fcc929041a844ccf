// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs the bare-metal test guest under the `twostage` command on `/dev/kvm`; every check of the
//! guest must pass. The images are built here if necessary. Without KVM these tests fail, unless
//! `TWOSTAGE_KVM=off` skips them.

#[path = "common/built.rs"]
mod built;
#[path = "common/child.rs"]
mod child;
#[path = "guest/devices.rs"]
mod devices;
#[path = "guest/side_core.rs"]
mod side_core;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use built::images;
use serde_json::{json, Value};
use twostage::skips::not_tested;

/// A guest that hangs is killed after so many seconds. Its own waits, which print what they wait
/// for, take 60.
const LIMIT: &str = "300";

const WIDE_EDU: &str = "edu,dma-mask=0xffffffffffffffff";
const WIDE_EDU_WITH_PASID: &str = "edu,pasid=on,dma-mask=0xffffffffffffffff";
const WIDE_EDU_WITH_ATS: &str = "edu,pasid=on,ats=on,dma-mask=0xffffffffffffffff";

/// Whether there is a KVM to run the guest; panics without one, unless skipped.
fn kvm() -> bool {
    if std::env::var_os("TWOSTAGE_KVM").is_some_and(|value| value == "off") {
        not_tested("TWOSTAGE_KVM=off, the guest");
        return false;
    }
    let opened = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    if let Err(error) = opened {
        panic!("/dev/kvm: {error}; TWOSTAGE_KVM=off leaves the guest out");
    }
    true
}

/// The configuration of a machine, besides the image.
struct Machine<'a> {
    image: &'a str,
    cmdline: &'a str,
    iommus: &'a [&'a str],
    devices: &'a [&'a str],
    /// Options with their values.
    options: &'a [&'a str],
    vcpus: u8,
    trace: Option<&'a Path>,
}

const MACHINE: Machine = Machine {
    image: "vtd-check.elf",
    cmdline: "",
    iommus: &["vtd,aw=57,pasid-bits=20"],
    devices: &[WIDE_EDU_WITH_PASID, WIDE_EDU],
    options: &[],
    vcpus: 1,
    trace: None,
};

/// A unit for each of two devices.
const TWO_UNITS: Machine = Machine {
    cmdline: "vtd2=0xfed91000",
    iommus: &["vtd,id=a,aw=57,pasid-bits=20", "vtd,id=b,pasid-bits=20"],
    devices: &[
        "edu,pasid=on,dma-mask=0xffffffffffffffff",
        "edu,iommu=b,pasid=on,dma-mask=0xffffffffffffffff",
    ],
    ..MACHINE
};

/// The result of a run.
struct Outcome {
    /// Groups, the part of a check's line between its number and the first colon, with a skipped
    /// check.
    skipped: BTreeSet<String>,
    passed: usize,
    report: Value,
}

impl Machine<'_> {
    /// Runs the machine; panics if a check failed or the guest did not finish.
    fn run(&self) -> Outcome {
        let directory = tempfile::tempdir().unwrap();
        let (serial, report) = (directory.path().join("serial"), directory.path().join("report"));
        let mut command = Command::new("timeout");
        command.arg(LIMIT).arg(env!("CARGO_BIN_EXE_twostage")).arg("run");
        command.arg("--kernel").arg(images().join(self.image));
        command.args(["--cmdline", self.cmdline, "--memory", "size=256M"]);
        command.args(["--cpus", &format!("boot={}", self.vcpus)]);
        command.arg("--serial").arg(format!("file={}", serial.display()));
        command.arg("--report").arg(format!("json,file={}", report.display()));
        for iommu in self.iommus {
            command.args(["--iommu", iommu]);
        }
        for device in self.devices {
            command.args(["--device", device]);
        }
        command.args(self.options);
        if let Some(trace) = self.trace {
            command.arg("--trace").arg(trace);
        }
        let output = command.output().expect("timeout(1) and the binary run");
        let text = std::fs::read_to_string(&serial).unwrap_or_default();
        let context = || format!("{text}\n{}", String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{}:\n{}", output.status, context());

        let lines = |kind: &str| -> Vec<&str> {
            text.lines().filter(|line| line.split(' ').next() == Some(kind)).collect()
        };
        let (passed, skipped) = (lines("ok"), lines("skip"));
        let summary = format!("{} passed, 0 failed, {} skipped", passed.len(), skipped.len());
        assert_eq!(text.lines().last(), Some(summary.as_str()), "{}", context());
        let report = std::fs::read_to_string(&report).unwrap();
        Outcome {
            skipped: skipped.iter().filter_map(|line| group_of(line)).collect(),
            passed: passed.len(),
            report: serde_json::from_str(&report).unwrap(),
        }
    }
}

/// The group in a line such as `ok 12 blocked: a description`.
fn group_of(line: &str) -> Option<String> {
    let (head, _) = line.split_once(':')?;
    head.split(' ').nth(2).map(str::to_owned)
}

/// The number at `path` of `report`, which must exist.
fn number(report: &Value, path: &str) -> u64 {
    report.pointer(path).and_then(Value::as_u64).unwrap_or_else(|| panic!("{path} in {report:#}"))
}

/// The objects of one kind in the report's graph.
fn objects<'a>(report: &'a Value, kind: &str) -> Vec<&'a Value> {
    let objects = report.pointer("/host/graph/objects").and_then(Value::as_array);
    let objects = objects.unwrap_or_else(|| panic!("no objects in {report:#}"));
    objects.iter().filter(|object| object["kind"] == kind).collect()
}

/// The IDs of the objects that `object` depends on.
fn stands_on(object: &Value) -> Vec<&Value> {
    object["on"].as_array().into_iter().flatten().map(|edge| &edge["to"]).collect()
}

/// The final state: all devices of each unit are on one nested table over the unit's nesting
/// parent, and this is no accident.
fn assert_nested(outcome: &Outcome, units: usize, devices: usize) {
    let report = &outcome.report;
    let parents = objects(report, "HWPT_PAGING");
    assert_eq!(parents.len(), units, "{report:#}");
    for parent in &parents {
        let flags = parent["flags"].as_array().unwrap();
        assert!(flags.iter().any(|flag| flag == "NEST_PARENT"), "{parent:#}");
    }
    let nested = objects(report, "HWPT_NESTED");
    let below: BTreeSet<_> = nested.iter().flat_map(|hwpt| ids(stands_on(hwpt))).collect();
    assert_eq!((nested.len(), below), (units, ids(parents.iter().map(|it| &it["id"]))));
    let attached: Vec<_> = objects(report, "DEVICE").into_iter().map(stands_on).collect();
    assert_eq!(attached.len(), devices, "{report:#}");
    let below: BTreeSet<_> = attached.into_iter().flat_map(ids).collect();
    assert_eq!(below, ids(nested.iter().map(|it| &it["id"])), "{report:#}");

    assert_ne!(number(report, "/host/calls/HWPT_INVALIDATE/calls"), 0);
    for unit in 0..units {
        for counter in [
            "nesting/invalidations_in",
            "nesting/entries_out",
            "nesting/replaces",
            "viommu/faults_recorded",
            "viommu/queue_errors",
            "hardware/iotlb_hits",
        ] {
            assert_ne!(number(report, &format!("/iommus/{unit}/{counter}")), 0, "{counter}");
        }
    }
    assert_eq!(report["host"]["left"]["objects"].as_array().map(Vec::len), Some(0), "{report:#}");
    for (verb, calls) in report.pointer("/host/calls").unwrap().as_object().unwrap() {
        assert_eq!(calls["failures"], 0, "{verb}");
    }
}

fn ids<'a>(ids: impl IntoIterator<Item = &'a Value>) -> BTreeSet<u64> {
    ids.into_iter().map(|id| id.as_u64().unwrap()).collect()
}

fn groups(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// Skipped without interrupt remapping.
const REMAPPING: &str = "interrupt_remapping";

/// Groups with a check for each of two capabilities of which a unit has one.
const EITHER_OR: [&str; 3] = ["first_stage", "legacy_second_stage", "second_stage"];

#[test]
fn every_check_holds_with_five_levels_and_two_devices() {
    if !kvm() {
        return;
    }
    let outcome = MACHINE.run();
    let skipped = groups(&EITHER_OR);
    assert_eq!(outcome.skipped, &skipped | &groups(&["malformed_tables"]));
    assert!(outcome.passed > 160, "{} checks", outcome.passed);
    assert_nested(&outcome, 1, 2);
}

/// Two checks are left out, which only a walk by hardware can pass: "accessed and dirty flags" (of
/// `first_stage`), and "newly mapped page needs no invalidation" (of `stale_first_stage`).
#[test]
fn every_check_holds_where_the_guests_tables_are_mirrored() {
    if !kvm() {
        return;
    }
    // The guest invalidates what becomes present in a first stage, too, but for that check.
    let iommus = &["vtd,aw=57,pasid-bits=20,nesting=off,first-stage=on,second-stage=on"][..];
    let outcome = Machine { cmdline: "mirrored=1", iommus, ..MACHINE }.run();
    let skipped = &groups(&EITHER_OR) | &groups(&["malformed_tables", "stale_first_stage"]);
    assert_eq!(outcome.skipped, skipped);
    assert!(outcome.passed > 185, "{} checks", outcome.passed);
    assert_eq!(objects(&outcome.report, "HWPT_NESTED"), [&Value::Null; 0]);
    assert_ne!(number(&outcome.report, "/iommus/0/nesting/mirrors"), 0);
    let left = &outcome.report["host"]["left"]["objects"];
    assert_eq!(left.as_array().map(Vec::len), Some(0), "{left:#}");
}

#[test]
fn every_check_holds_when_started_by_multiboot() {
    if !kvm() {
        return;
    }
    let pvh = MACHINE.run();
    let outcome = Machine { image: "vtd-check.multiboot", ..MACHINE }.run();
    assert_eq!(outcome.passed, pvh.passed);
    assert_nested(&outcome, 1, 2);
}

#[test]
fn every_check_holds_with_four_levels_and_without_caching_mode() {
    if !kvm() {
        return;
    }
    let outcome = Machine {
        iommus: &["vtd,aw=48,pasid-bits=20,caching-mode=off,ats=on"],
        devices: &[WIDE_EDU_WITH_ATS, WIDE_EDU],
        ..MACHINE
    }
    .run();
    assert_eq!(outcome.skipped, groups(&EITHER_OR));
    assert_ne!(number(&outcome.report, "/iommus/0/hardware/device_tlb_hits"), 0);
    assert_nested(&outcome, 1, 2);
    assert_remapped(&outcome);
}

/// Interrupts were remapped, including those of the IOAPIC.
fn assert_remapped(outcome: &Outcome) {
    let report = &outcome.report;
    let controllers = report["interrupt_controllers"].as_str();
    assert!(controllers.is_some_and(|chip| chip.starts_with("split")), "{controllers:?}");
    for counter in [
        "/exits/ioapic-eoi",
        "/iommus/0/viommu/interrupt_entry_cache",
        "/iommus/0/viommu/interrupts_remapped",
        "/iommus/0/viommu/interrupts_blocked",
    ] {
        assert_ne!(number(report, counter), 0, "{counter}");
    }
}

#[test]
fn every_check_holds_with_interrupts_remapped() {
    if !kvm() {
        return;
    }
    // The default, which users can also require.
    for iommu in ["vtd,aw=48,pasid-bits=20", "vtd,aw=48,pasid-bits=20,intremap=on"] {
        let outcome = Machine { iommus: &[iommu], ..MACHINE }.run();
        assert_eq!(outcome.skipped, groups(&EITHER_OR));
        assert_nested(&outcome, 1, 2);
        assert_remapped(&outcome);
    }
}

#[test]
fn every_check_holds_without_interrupts_remapped() {
    if !kvm() {
        return;
    }
    let outcome = Machine { iommus: &["vtd,aw=57,pasid-bits=20,intremap=off"], ..MACHINE }.run();
    let skipped = &groups(&EITHER_OR) | &groups(&["malformed_tables", REMAPPING]);
    assert_eq!(outcome.skipped, skipped);
    assert_nested(&outcome, 1, 2);
    assert_eq!(number(&outcome.report, "/iommus/0/viommu/interrupts_remapped"), 0);
}

#[test]
fn every_check_holds_on_each_of_two_units() {
    if !kvm() {
        return;
    }
    let outcome = TWO_UNITS.run();
    assert!(outcome.passed > 2 * 160, "{} checks", outcome.passed);
    assert_nested(&outcome, 2, 2);
    let report = &outcome.report;
    let id = |unit: usize| &report["iommus"][unit]["id"];
    assert_eq!((id(0), id(1)), (&"a".into(), &"b".into()));
    assert_eq!(report["devices"][1]["iommu"], "b");
    for unit in [0, 1] {
        let remapped = format!("/iommus/{unit}/viommu/interrupts_remapped");
        assert_ne!(number(report, &remapped), 0, "{remapped}");
    }
}

#[test]
fn every_check_holds_behind_root_ports_and_a_bridge_to_pci() {
    if !kvm() {
        return;
    }
    const BEHIND_PORT: &str = "edu,pasid=on,dma-mask=0xffffffffffffffff,bus=rp0";
    const BEHIND_PCI: &str = "edu,dma-mask=0xffffffffffffffff,bus=br0";
    let options =
        &["--root-port", "id=rp0", "--root-port", "id=rp1", "--pci-bridge", "id=br0,bus=rp1"];
    // The guest finds them in the order of buses, and compares the requester in each fault record
    // with the function behind the port, and with device 0 of the bus behind the bridge.
    let outcome = Machine { devices: &[BEHIND_PORT, BEHIND_PCI], options, ..MACHINE }.run();
    assert_eq!(outcome.skipped, &groups(&EITHER_OR) | &groups(&["malformed_tables"]));
    assert_nested(&outcome, 1, 2);
    assert_remapped(&outcome);
    let devices = &outcome.report["devices"];
    assert_eq!((&devices[0]["bdf"], &devices[1]["bdf"]), (&"01:00.0".into(), &"03:00.0".into()));
    // The second of two behind the bridge, which have one Requester ID: to the unit they are one
    // device. It has no function-level reset.
    let devices = &[BEHIND_PCI, BEHIND_PCI];
    let outcome = Machine { cmdline: "first=1", devices, options, ..MACHINE }.run();
    assert!(outcome.skipped.contains("edu") && outcome.passed > 170, "{:?}", outcome.skipped);
    assert_nested(&outcome, 1, 1);
    assert_eq!(outcome.report["devices"][1]["bdf"], "03:01.0");
}

#[test]
fn every_check_holds_without_a_second_stage_of_the_guests_own() {
    if !kvm() {
        return;
    }
    let iommus = &["vtd,aw=48,pasid-bits=6,second-stage=off"];
    let outcome = Machine { iommus, ..MACHINE }.run();
    let stale = ["stale_legacy_by_register", "stale_legacy_by_queue", "stale_second_stage"];
    let skipped = &groups(&EITHER_OR) | &groups(&stale);
    assert_eq!(outcome.skipped, &skipped | &groups(&["pasid"]));
    assert_nested(&outcome, 1, 2);
}

#[test]
fn every_check_holds_where_the_first_stage_is_over_a_second_stage_of_the_guests_own() {
    if !kvm() {
        return;
    }
    for iommu in
        ["vtd,aw=48,pasid-bits=20,nest=on", "vtd,aw=57,pasid-bits=20,nest=on,caching-mode=off"]
    {
        let outcome = Machine { iommus: &[iommu], ..MACHINE }.run();
        assert_eq!(outcome.skipped, &groups(&EITHER_OR) | &groups(&["malformed_tables"]));
        // Without the checks of nested translation there are some 190.
        assert!(outcome.passed > 215, "{} checks", outcome.passed);
        assert_nested(&outcome, 1, 2);
    }
}

#[test]
fn every_check_holds_for_one_device_of_28_address_bits() {
    if !kvm() {
        return;
    }
    let outcome = Machine { iommus: &["vtd"], devices: &["edu"], ..MACHINE }.run();
    assert_nested(&outcome, 1, 1);
}

#[test]
fn every_check_holds_on_a_machine_of_two_vcpus_and_with_page_requests() {
    if !kvm() {
        return;
    }
    let iommus = &["vtd,aw=57,pasid-bits=20,ats=on,pri=on"][..];
    let devices = &["edu,pasid=on,ats=on,pri=on,dma-mask=0xffffffffffffffff"; 2][..];
    let outcome = Machine { vcpus: 2, iommus, devices, ..MACHINE }.run();
    assert_eq!(objects(&outcome.report, "HWPT_NESTED").len(), 1);
    assert_ne!(number(&outcome.report, "/iommus/0/viommu/page_requests"), 0);
}

#[test]
fn a_trace_tells_of_every_part() {
    if !kvm() {
        return;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    let devices = &["edu"];
    let outcome = Machine { trace: Some(file.path()), devices, ..MACHINE }.run();
    let text = std::fs::read_to_string(file.path()).unwrap();
    let events: Vec<Value> = serde_json::from_str(&text).unwrap();
    let of = |category: &str| -> Vec<&Value> {
        events.iter().filter(|event| event["cat"] == category).collect()
    };
    for category in ["register", "descriptor", "policy", "fault", "interrupt fault"] {
        let events = of(category);
        assert!(!events.is_empty(), "{category}");
        assert!(events.iter().all(|event| event["args"]["iommu"] == "vtd0"), "{category}");
    }
    let calls = of("host").len() as u64;
    let attached = of("host").into_iter().find(|event| event["name"] == "DEVICE_ATTACH").unwrap();
    assert_eq!(attached["args"]["objects"].as_array().map(Vec::len), Some(2), "device and table");
    let report = outcome.report.pointer("/host/calls").and_then(Value::as_object).unwrap();
    let counted: u64 = report.values().map(|verb| verb["calls"].as_u64().unwrap()).sum();
    // A few more come when the objects are released.
    assert!(calls >= counted, "{calls} calls traced, {counted} counted");
    for (category, name, argument) in [
        ("interrupt", "00:01.0", "handle"),
        ("interrupt", "IOAPIC", "handle"),
        ("interrupt", "MSI", "vector"),
        ("interrupt fault", "00:01.0", "reason"),
        ("device", "DMA write", "address"),
    ] {
        let found = of(category).into_iter().any(|event| {
            event["name"] == name && event["args"].get(argument).is_some_and(|it| !it.is_null())
        });
        assert!(found, "{category}: {name} with {argument}");
    }
}

#[test]
fn the_device_works_without_an_iommu() {
    if !kvm() {
        return;
    }
    let outcome = Machine { iommus: &[], cmdline: "vtd=0", devices: &["edu"], ..MACHINE }.run();
    assert_eq!(outcome.skipped, groups(&[]));
    assert_eq!(outcome.report["iommus"], Value::Array(vec![]));
    assert_eq!(outcome.report["host"], Value::Null);
}

#[test]
fn a_forgotten_invalidation_is_found_by_the_sanitizer_and_named() {
    if !kvm() {
        return;
    }
    for forget in [false, true] {
        let outcome = Machine {
            iommus: &["vtd,aw=48,sanitize=on"],
            cmdline: if forget { "forget=1" } else { "forget=0" },
            ..MACHINE
        }
        .run();
        assert_eq!((outcome.passed, outcome.skipped), (3, groups(&[])));
        let report = &outcome.report;
        let found = report.pointer("/iommus/0/sanitizer/stale").and_then(Value::as_array).unwrap();
        let contexts = report.pointer("/iommus/0/sanitizer/contexts").and_then(Value::as_array);
        let contexts = contexts.unwrap();
        let stale_uses = number(report, "/iommus/0/hardware/stale_uses");
        assert_eq!(stale_uses, (found.len() + contexts.len()) as u64, "{report:#}");
        if !forget {
            assert_eq!(stale_uses, 0, "{report:#}");
            continue;
        }
        let [context] = contexts.as_slice() else { panic!("one context: {report:#}") };
        assert_eq!((&context["rid"], &context["pasid"]), (&"00:01.0".into(), &Value::Null));
        let table = |way: &str| context[way]["FirstStage"].as_u64().unwrap();
        assert_ne!(table("old"), table("new"));
        let pasids: Vec<_> = found.iter().map(|stale| &stale["pasid"]).collect();
        assert_eq!(pasids, [&Value::Null, &Value::from(5)]);
        for stale in found {
            assert_eq!(stale["rid"], "00:01.0");
            assert_eq!((&stale["level"], &stale["write"]), (&1.into(), &true.into()));
            let page = |value: &Value| value.as_u64().unwrap() >> 12;
            assert_ne!(page(&stale["old"]), page(&stale["new"]), "{stale:#}");
            let range = |entry: &str| stale[entry]["Range"].clone();
            let leaf = |address: u64| json!({ "address": address, "pages": 1, "leaf": true });
            let iova = stale["iova"].as_u64().unwrap();
            assert_eq!(range("needed"), leaf(iova));
            assert_eq!(range("last"), leaf(iova + 0x100_0000));
        }
    }
}
