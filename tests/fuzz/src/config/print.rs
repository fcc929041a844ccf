// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line of a machine: every option, said in full.

use std::ffi::OsString;
use std::path::Path;

use twostage::nesting::vtd::Nesting;
use twostage::spec::smmuv3::regs::Httu;
use twostage::spec::smmuv3::translation::Granule;
use twostage_vmm::inside::config::{
    DeviceConfig, HostChoice, IommuChoice, IommuConfig, IommuModel, SerialConfig, SideCoreChoice,
    TapConfig,
};
use twostage_vmm::inside::MachineConfig;

/// Words that make `config`.
pub fn words(config: &MachineConfig) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec!["twostage".into(), "run".into()];
    let mut say = |option: &str, value: OsString| {
        let mut word = OsString::from(format!("--{option}="));
        word.push(value);
        words.push(word);
    };
    let payload = &config.payload;
    say("kernel", payload.kernel.clone().into());
    payload.initramfs.iter().for_each(|path| say("initramfs", path.clone().into()));
    for module in &payload.modules {
        say("module", format!("path={},cmdline={}", path(&module.path), module.cmdline).into());
    }
    say("cmdline", payload.cmdline.clone().into());
    say("cpus", format!("boot={}", config.vcpus).into());
    say("memory", format!("size={}", config.memory).into());
    config.iommus.iter().for_each(|it| say("iommu", iommu(it).into()));
    config.root_ports.iter().for_each(|port| say("root-port", format!("id={}", port.id).into()));
    for bridge in &config.pci_bridges {
        say("pci-bridge", format!("id={},bus={}", bridge.id, bridge.bus).into());
    }
    if cfg!(target_arch = "x86_64") {
        say("pci-ports", on(config.pci_ports).into());
    }
    for it in &config.devices {
        let (option, value) = device(it);
        say(option, value.into());
    }
    match &config.serial {
        SerialConfig::Tty => say("serial", "tty".into()),
        SerialConfig::Null => say("serial", "null".into()),
        SerialConfig::File(path) | SerialConfig::Append(path) => {
            let mut value = OsString::from("file=");
            value.push(path);
            say("serial", value);
        }
    }
    config.trace.iter().for_each(|path| say("trace", path.clone().into()));
    words
}

fn on(value: bool) -> &'static str {
    if value {
        "on"
    } else {
        "off"
    }
}

/// A path in a value with keys, which is text.
fn path(path: &Path) -> &str {
    path.to_str().expect("text")
}

/// Key and value, if there is one.
fn maybe<T: ToString>(key: &str, value: Option<T>) -> String {
    value.map_or_else(String::new, |value| format!(",{key}={}", value.to_string()))
}

fn iommu(config: &IommuConfig) -> String {
    let mut text = config.model.name().to_owned();
    text += &maybe("id", config.id.as_ref());
    text += &maybe("addr", config.address.map(|address| format!("{address:#x}")));
    text += match &config.host {
        HostChoice::Emulated => ",host=emulated",
        HostChoice::Kernel(_) => ",host=",
    };
    if let HostChoice::Kernel(kernel) = &config.host {
        text += path(kernel);
    }
    text += match config.side_core.choice {
        SideCoreChoice::Off => ",side-core=off",
        SideCoreChoice::On => ",side-core=on",
        SideCoreChoice::Auto => ",side-core=auto",
    };
    text += &maybe("side-cpu", config.side_core.cpu);
    match &config.model {
        IommuModel::Vtd(vtd) => {
            text += &format!(",aw={}", vtd.address_width);
            text += &maybe("pasid-bits", vtd.pasid_bits);
            text += &maybe("first-stage", vtd.first_stage.map(on));
            text += &maybe("second-stage", vtd.second_stage.map(on));
            let (nesting, pieces) = match vtd.nesting {
                Nesting::On => ("on", None),
                Nesting::Auto { pieces } => ("auto", Some(pieces)),
                Nesting::Off { pieces } => ("off", Some(pieces)),
            };
            text += &format!(",nesting={nesting}{}", maybe("shadow-pieces", pieces));
            text += &maybe("intremap", vtd.interrupt_remapping.map(on));
            for (key, value) in [
                ("nest", vtd.nest),
                ("ats", vtd.ats),
                ("pri", vtd.pri),
                ("caching-mode", vtd.caching_mode),
                ("sanitize", vtd.sanitize),
            ] {
                text += &format!(",{key}={}", on(value));
            }
        }
        IommuModel::SmmuV3(smmu) => {
            text += &format!(",aw={}", smmu.address_width);
            text += &maybe("pasid-bits", smmu.substream_bits);
            let size = |granule: &Granule| match granule {
                Granule::K4 => "4K",
                Granule::K16 => "16K",
                Granule::K64 => "64K",
            };
            let granules = smmu.granules.as_ref();
            let granules = granules.map(|all| all.iter().map(size).collect::<Vec<_>>().join("+"));
            text += &maybe("granules", granules);
            text += &maybe("ril", smmu.range_invalidation.map(on));
            let httu = smmu.httu.map(|httu| match httu {
                Httu::None => "off",
                Httu::Access => "access",
                Httu::Dirty => "dirty",
            });
            text += &maybe("httu", httu);
            for (key, value) in [
                ("ats", smmu.ats),
                ("pri", smmu.pri),
                ("stall", smmu.stall),
                ("sanitize", smmu.sanitize),
            ] {
                text += &format!(",{key}={}", on(value));
            }
        }
    }
    text
}

/// The option, and its value.
fn device(config: &DeviceConfig) -> (&'static str, String) {
    let iommu = match config.iommu() {
        IommuChoice::Unsaid => String::new(),
        IommuChoice::First => ",iommu=on".to_owned(),
        IommuChoice::Off => ",iommu=off".to_owned(),
        IommuChoice::Named(id) => format!(",iommu={id}"),
    };
    let place = iommu + &maybe("bus", config.bus());
    match config {
        DeviceConfig::Edu(edu) => {
            let mut text = format!("edu{place},pasid={},", edu.pasid_bits);
            for (key, value) in [("ats", edu.ats), ("pri", edu.pri), ("stall", edu.stall)] {
                text += &format!("{key}={},", on(value));
            }
            ("device", text + &format!("dma-mask={:#x}", edu.dma_mask))
        }
        DeviceConfig::Disk(disk) => {
            let mut text = format!("path={},queues={}", path(&disk.path), disk.queues);
            text += &format!(",readonly={}", on(disk.access.read_only));
            text += &format!(",direct={}", on(disk.access.direct));
            text += if disk.access.raw { ",format=raw" } else { "" };
            ("disk", text + &place)
        }
        DeviceConfig::Net(net) => {
            let tap = match &net.tap {
                TapConfig::Name(name) => format!("tap={name}"),
                TapConfig::Fd(number) => format!("fd={number}"),
            };
            ("net", tap + &maybe("mac", net.mac) + &place)
        }
        DeviceConfig::Rng(rng) => ("rng", format!("src={}{place}", path(&rng.source))),
        DeviceConfig::Vfio(vfio) => {
            let id = maybe("id", vfio.id.as_ref());
            ("vfio", format!("path={}{id}{place}", path(&vfio.path)))
        }
    }
}
