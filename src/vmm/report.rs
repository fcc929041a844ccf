// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reports: a machine's activity so far, and the current host objects.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::devices::virtio::QueueReport;
pub use crate::iommu::SideCoreReport;
use twostage::counters::CounterSet;
use twostage::nesting::smmuv3::{SmmuNestingCounters, SmmuObjects};
use twostage::nesting::survey::hexadecimal;
use twostage::nesting::vtd::VtdNestingCounters;
use twostage::spec::pci::Bdf;
use twostage_emulated::{ObjectGraph, SanitizerReport, SmmuV3Counters, VtdCounters};

/// A report, as JSON by `serde` and as text by `Display`.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Where the interrupt controllers are.
    pub interrupt_controllers: String,
    /// Message-signalled interrupts of devices.
    pub interrupts: InterruptReport,
    /// VM exits by kind; unclaimed ones are also counted by kind.
    pub exits: BTreeMap<&'static str, u64>,
    /// Bytes of the guest's console that its file or its reader did not get.
    pub console_lost: u64,
    /// The devices.
    pub devices: Vec<DeviceReport>,
    /// The virtual IOMMUs.
    pub iommus: Vec<IommuReport>,
    /// The side core that serves them, if there is one.
    pub side_core: Option<SideCoreReport>,
    /// The host behind them, if there are any.
    pub host: Option<HostReport>,
    /// The emulated host beside it: that of emulated devices, if the other one is the kernel's and
    /// has devices, too.
    pub emulated_host: Option<HostReport>,
}

impl Report {
    /// The machine released what it had, and `left` is left of an emulated host, if there is one;
    /// `None` if that took too long.
    pub(crate) fn released(&mut self, left: Option<Option<&ObjectGraph>>) {
        let Some(host) = self.emulated_host.as_mut().or(self.host.as_mut()) else { return };
        host.left = left.flatten().cloned();
        for host in [&mut self.host, &mut self.emulated_host].into_iter().flatten() {
            host.release_unfinished = left.is_none();
        }
    }
}

twostage::counters! {
    /// Message-signalled interrupts of devices.
    #[derive(Serialize)]
    pub struct InterruptReport {
        /// Those sent through a route in the kernel.
        routed,
        /// Number of routing updates.
        route_updates,
    }
}

/// One device.
#[derive(Debug, Clone, Serialize)]
pub struct DeviceReport {
    /// Where it is.
    #[serde(serialize_with = "as_text")]
    pub bdf: Bdf,
    /// What it is.
    pub model: &'static str,
    /// Its virtual IOMMU, if any.
    pub iommu: Option<String>,
    /// What of the host serves a disk's requests: `io_uring`, `threads`, or `memory` if the image
    /// is in memory.
    pub served_by: Option<&'static str>,
    /// Completed transfers, if the device counts them: assigned ones do not.
    pub dma_done: Option<u64>,
    /// Refused transfers, likewise.
    pub dma_failed: Option<u64>,
    /// The queues of a virtio device.
    pub queues: Vec<QueueReport>,
}

/// A virtual IOMMU.
#[derive(Debug, Clone, Serialize)]
pub struct IommuReport {
    /// Its name for devices.
    pub id: String,
    /// Its statistics.
    #[serde(flatten)]
    pub of: ModelReport,
}

/// Statistics of a virtual IOMMU, by model.
#[derive(Debug, Clone, Serialize)]
#[serde(untagged)]
#[allow(clippy::large_enum_variant)] // There are few.
pub enum ModelReport {
    /// Intel VT-d.
    Vtd(VtdReport),
    /// Arm SMMUv3.
    SmmuV3(SmmuV3Report),
}

/// A virtual VT-d.
#[derive(Debug, Clone, Default, Serialize)]
pub struct VtdReport {
    /// The capability registers, by name; in JSON each is a hexadecimal string.
    #[serde(serialize_with = "hexadecimal")]
    pub registers: BTreeMap<&'static str, u64>,
    /// Why the guest's tables are mirrored, if they are.
    pub mirrored: Option<String>,
    /// The guest's operations on the virtual IOMMU.
    pub viommu: twostage::viommu::vtd::VtdCounters,
    /// The resulting operations of nesting.
    pub nesting: VtdNestingCounters,
    /// The same on the emulated host beside the kernel's.
    pub nesting_beside: Option<VtdNestingCounters>,
    /// The statistics of the unit behind it, if that is emulated.
    pub hardware: Option<VtdCounters>,
    /// The sanitizer's findings, if it has one.
    pub sanitizer: Option<SanitizerReport>,
}

/// A virtual SMMUv3.
#[derive(Debug, Clone, Serialize)]
pub struct SmmuV3Report {
    /// The identification registers, by name; in JSON each is a hexadecimal string.
    #[serde(serialize_with = "hexadecimal")]
    pub registers: BTreeMap<&'static str, u64>,
    /// The guest's operations on the virtual IOMMU.
    pub viommu: twostage::viommu::smmuv3::SmmuCounters,
    /// The resulting operations of nesting.
    pub nesting: SmmuNestingCounters,
    /// The same on the emulated host beside the kernel's.
    pub nesting_beside: Option<SmmuNestingCounters>,
    /// The host's objects that it uses.
    pub objects: SmmuObjects,
    /// Those that it used the last time a guest disabled translation.
    pub objects_in_use: Option<SmmuObjects>,
    /// The statistics of the unit behind it, if that is emulated.
    pub hardware: Option<SmmuV3Counters>,
    /// The sanitizer's findings, if it has one.
    pub sanitizer: Option<SanitizerReport>,
}

/// The host behind the virtual IOMMUs.
#[derive(Debug, Clone, Serialize)]
pub struct HostReport {
    /// Calls by verb, without those never made.
    pub calls: BTreeMap<&'static str, CallReport>,
    /// Its objects before the guest ran, if the host lists them: the kernel does not.
    pub at_start: Option<ObjectGraph>,
    /// Its objects when a guest disabled translation, at the time with the most of them; not noted
    /// if there are more than 1,000.
    pub in_use: Option<ObjectGraph>,
    /// Its current objects, likewise.
    pub graph: Option<ObjectGraph>,
    /// Those left after the machine released everything, in the final report.
    pub left: Option<ObjectGraph>,
    /// Releasing them took too long and was left to the end of the process, in the final report.
    pub release_unfinished: bool,
}

/// Calls of one verb.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct CallReport {
    /// All of them.
    pub calls: u64,
    /// Those that failed.
    pub failures: u64,
}

fn as_text<T: fmt::Display, S: serde::Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(value)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "interrupt controllers: {}", self.interrupt_controllers)?;
        section(f, "interrupts", &fields(&self.interrupts))?;
        section(f, "exits", &self.exits)?;
        if self.console_lost != 0 {
            writeln!(f, "console: {} bytes were lost", self.console_lost)?;
        }
        for device in &self.devices {
            let way = device.iommu.as_ref().map_or("no IOMMU", |id| id);
            write!(f, "{} {}, behind {way}", device.bdf, device.model)?;
            device.served_by.iter().try_for_each(|by| write!(f, ", served by {by}"))?;
            match (device.dma_done, device.dma_failed) {
                (Some(done), Some(failed)) => writeln!(f, ": DMA {done} done, {failed} refused")?,
                _ => writeln!(f)?,
            }
            for (number, queue) in device.queues.iter().enumerate() {
                section(f, &format!("  queue {number}"), &fields(queue))?;
            }
        }
        self.iommus.iter().try_for_each(|iommu| iommu.fmt(f))?;
        self.side_core.iter().try_for_each(|side_core| side_core.fmt(f))?;
        self.host.iter().try_for_each(|host| host.write(f, "host"))?;
        self.emulated_host.iter().try_for_each(|host| host.write(f, "emulated host"))
    }
}

impl fmt::Display for IommuReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let id = &self.id;
        match &self.of {
            ModelReport::Vtd(of) => {
                registers(f, id, &of.registers)?;
                if let Some(why) = &of.mirrored {
                    writeln!(f, "{id}: the guest's tables are mirrored: {why}")?;
                }
                counters(
                    f,
                    id,
                    &of.viommu,
                    (&of.nesting, of.nesting_beside.as_ref()),
                    &of.hardware,
                )?;
                found(f, id, of.sanitizer.as_ref())
            }
            ModelReport::SmmuV3(of) => {
                registers(f, id, &of.registers)?;
                counters(
                    f,
                    id,
                    &of.viommu,
                    (&of.nesting, of.nesting_beside.as_ref()),
                    &of.hardware,
                )?;
                found(f, id, of.sanitizer.as_ref())
            }
        }
    }
}

/// The capability registers of the virtual IOMMU `id`.
fn registers(
    f: &mut fmt::Formatter<'_>,
    id: &str,
    of: &BTreeMap<&'static str, u64>,
) -> fmt::Result {
    write!(f, "{id}, registers:")?;
    of.iter().try_for_each(|(name, value)| write!(f, " {name} {value:#x}"))?;
    writeln!(f)
}

/// The findings of the sanitizer of `id`, if it has one.
fn found(f: &mut fmt::Formatter<'_>, id: &str, of: Option<&SanitizerReport>) -> fmt::Result {
    of.map_or(Ok(()), |sanitizer| write!(f, "{id}, {sanitizer}"))
}

/// The counters of the virtual IOMMU `id`, from the guest down; of nesting on the host, and on the
/// emulated one beside it.
fn counters<N: CounterSet>(
    f: &mut fmt::Formatter<'_>,
    id: &str,
    viommu: &impl CounterSet,
    (nesting, beside): (&N, Option<&N>),
    hardware: &Option<impl CounterSet>,
) -> fmt::Result {
    section(f, &format!("{id}, virtual IOMMU"), &fields(viommu))?;
    section(f, &format!("{id}, nesting"), &fields(nesting))?;
    if let Some(beside) = beside {
        section(f, &format!("{id}, nesting on the emulated host"), &fields(beside))?;
    }
    match hardware {
        Some(hardware) => section(f, &format!("{id}, emulated IOMMU"), &fields(hardware)),
        None => Ok(()),
    }
}

impl HostReport {
    /// As text, with the host called `name`.
    fn write(&self, f: &mut fmt::Formatter<'_>, name: &str) -> fmt::Result {
        let calls = |(verb, report): (&&'static str, &CallReport)| (*verb, report.calls);
        section(
            f,
            &format!("{name} calls"),
            &self.calls.iter().map(calls).collect::<BTreeMap<_, _>>(),
        )?;
        let failures = |(verb, report): (&&'static str, &CallReport)| (*verb, report.failures);
        section(
            f,
            &format!("{name} calls refused"),
            &self.calls.iter().map(failures).collect::<BTreeMap<_, _>>(),
        )?;
        let (Some(at_start), Some(graph)) = (&self.at_start, &self.graph) else { return Ok(()) };
        objects(f, &format!("{name} objects at the start"), at_start)?;
        if let Some(in_use) = &self.in_use {
            objects(f, &format!("{name} objects before the guest disabled translation"), in_use)?;
        }
        if graph.is_like(at_start) {
            writeln!(f, "{name} objects: as at the start")?;
        } else {
            objects(f, &format!("{name} objects"), graph)?;
        }
        match &self.left {
            Some(left) if left.objects.is_empty() => {
                writeln!(f, "{name} objects left behind: none")
            }
            Some(left) => objects(f, &format!("{name} objects LEFT BEHIND"), left),
            None if self.release_unfinished => {
                writeln!(f, "{name} objects left behind: unknown; the rest is released on exit")
            }
            None => Ok(()),
        }
    }
}

/// Objects as a tree below a title.
fn objects(f: &mut fmt::Formatter<'_>, title: &str, graph: &ObjectGraph) -> fmt::Result {
    writeln!(f, "{title}:")?;
    graph.to_string().lines().try_for_each(|line| writeln!(f, "  {line}"))
}

/// The counters of a structure, by name.
fn fields(counters: &impl CounterSet) -> BTreeMap<&'static str, u64> {
    counters.each().into_iter().collect()
}

/// One line: the non-zero counters.
fn section<K: fmt::Display>(
    f: &mut fmt::Formatter<'_>,
    title: &str,
    counters: &BTreeMap<K, u64>,
) -> fmt::Result {
    let counted: Vec<_> = counters
        .iter()
        .filter(|(_, count)| **count != 0)
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    let counted = if counted.is_empty() { "none".to_owned() } else { counted.join(", ") };
    writeln!(f, "{title}: {counted}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use twostage::iommufd::ObjectId;
    use twostage_emulated::{GraphObject, ObjectKind};

    fn report() -> Report {
        Report {
            interrupt_controllers: "split".to_owned(),
            interrupts: InterruptReport { routed: 7, route_updates: 0 },
            exits: BTreeMap::from([("io-out", 3), ("mmio-read", 0)]),
            devices: vec![DeviceReport {
                bdf: Bdf::from_raw(8),
                model: "edu",
                iommu: Some("vtd0".to_owned()),
                served_by: None,
                dma_done: Some(5),
                dma_failed: Some(2),
                queues: vec![QueueReport { notified: 3, used: 4, interrupts: 0 }],
            }],
            iommus: vec![IommuReport {
                id: "vtd0".to_owned(),
                of: ModelReport::Vtd(VtdReport {
                    registers: BTreeMap::from([("CAP", u64::MAX), ("ECAP", 0x1f)]),
                    mirrored: Some("nesting=off was requested".into()),
                    nesting: merged(4),
                    hardware: Some(Default::default()),
                    sanitizer: Some(SanitizerReport::default()),
                    ..VtdReport::default()
                }),
            }],
            side_core: None,
            console_lost: 0,
            host: Some(HostReport {
                calls: BTreeMap::from([
                    ("HWPT_ALLOC", CallReport { calls: 9, failures: 1 }),
                    ("IOAS_MAP", CallReport { calls: 2, failures: 0 }),
                ]),
                at_start: Some(ObjectGraph { objects: Vec::new(), pinned_bytes: 0x1000 }),
                in_use: None,
                graph: Some(ObjectGraph { objects: Vec::new(), pinned_bytes: 0x2000 }),
                left: None,
                release_unfinished: false,
            }),
            emulated_host: None,
        }
    }

    fn merged(merged: u64) -> VtdNestingCounters {
        let mut counters = VtdNestingCounters::default();
        counters.merged = merged;
        counters
    }

    #[test]
    fn text_names_what_was_counted() {
        let text = report().to_string();
        for line in [
            "interrupt controllers: split",
            "interrupts: routed 7",
            "exits: io-out 3",
            "00:01.0 edu, behind vtd0: DMA 5 done, 2 refused",
            "  queue 0: notified 3, used 4",
            "vtd0, registers: CAP 0xffffffffffffffff ECAP 0x1f",
            "vtd0, virtual IOMMU: none",
            "vtd0: the guest's tables are mirrored: nesting=off was requested",
            "vtd0, nesting: merged 4",
            "host calls: HWPT_ALLOC 9, IOAS_MAP 2",
            "host calls refused: HWPT_ALLOC 1",
            "vtd0, sanitizer: no stale translation was used",
            "  0 objects, 0x1000 bytes pinned",
        ] {
            assert!(text.lines().any(|found| found == line), "'{line}' is not in:\n{text}");
        }
    }

    #[test]
    fn objects_are_compared_with_those_at_the_start_and_at_the_end() {
        let object = GraphObject {
            id: ObjectId(7),
            kind: ObjectKind::Ioas,
            name: String::new(),
            flags: Vec::new(),
            on: Vec::new(),
        };
        let mut report = report();
        let text = report.to_string();
        assert!(text.contains("host objects: as at the start\n"), "{text}");
        assert!(!text.contains("left behind"), "the machine is there yet: {text}");

        let host = report.host.as_mut().unwrap();
        host.left = Some(ObjectGraph { objects: Vec::new(), pinned_bytes: 0 });
        assert!(report.to_string().ends_with("host objects left behind: none\n"));

        let host = report.host.as_mut().unwrap();
        (host.left, host.release_unfinished) = (None, true);
        assert!(report
            .to_string()
            .ends_with("left behind: unknown; the rest is released on exit\n"));

        let graph = ObjectGraph { objects: vec![object], pinned_bytes: 0 };
        let host = report.host.as_mut().unwrap();
        host.in_use = Some(graph.clone());
        (host.graph, host.left) = (Some(graph.clone()), Some(graph));
        let text = report.to_string();
        for title in
            ["before the guest disabled translation", "host objects", "host objects LEFT BEHIND"]
        {
            assert!(text.contains(&format!("{title}:\n  IOAS 7\n")), "'{title}' in {text}");
        }
    }

    #[test]
    fn of_two_hosts_the_emulated_one_tells_what_is_left() {
        let mut report = report();
        let nothing = ObjectGraph { objects: Vec::new(), pinned_bytes: 0 };
        let mut kernel = report.host.clone().unwrap();
        (kernel.at_start, kernel.graph) = (None, None);
        report.emulated_host = report.host.replace(kernel);
        if let ModelReport::Vtd(of) = &mut report.iommus[0].of {
            of.nesting_beside = Some(merged(5));
        }
        report.released(Some(Some(&nothing)));
        let text = report.to_string();
        for line in [
            "vtd0, nesting: merged 4",
            "vtd0, nesting on the emulated host: merged 5",
            "host calls: HWPT_ALLOC 9, IOAS_MAP 2",
            "emulated host calls: HWPT_ALLOC 9, IOAS_MAP 2",
            "emulated host objects left behind: none",
        ] {
            assert!(text.lines().any(|found| found == line), "'{line}' is not in:\n{text}");
        }
        assert!(!text.contains("\nhost objects"), "{text}");
        report.released(None);
        let text = report.to_string();
        assert!(text.ends_with("the rest is released on exit\n"), "{text}");
        report.emulated_host = None;
        report.released(Some(None));
        assert_eq!(report.host.unwrap().left, None, "a kernel does not tell");
    }

    #[test]
    fn json_has_every_number() {
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(json["exits"]["mmio-read"], 0);
        assert_eq!(json["devices"][0]["bdf"], "00:01.0");
        assert_eq!(json["host"]["calls"]["HWPT_ALLOC"]["failures"], 1);
        assert_eq!(json["iommus"][0]["viommu"]["wait"], 0);
        assert_eq!(json["iommus"][0]["registers"]["CAP"], "0xffffffffffffffff");
    }
}
