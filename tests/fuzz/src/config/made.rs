// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Machines, and whether their command lines make them.

use std::ffi::OsString;

use twostage::nesting::vtd::Nesting;
use twostage::spec::smmuv3::regs::Httu;
use twostage::spec::smmuv3::translation::Granule;
use twostage_vmm::inside::config::{
    DeviceConfig, DiskConfig, HostChoice, IommuChoice, IommuConfig, IommuModel, NetConfig,
    PciBridgeConfig, RngConfig, RootPortConfig, SerialConfig, SideCoreChoice, SideCoreConfig,
    SmmuV3Options, TapConfig, VfioConfig, VtdOptions,
};
use twostage_vmm::inside::virtio::{DiskAccess, MacAddress};
use twostage_vmm::inside::{parsed, EduConfig, MachineConfig, ModuleConfig, PayloadConfig};

use super::print;
use crate::input::Input;

const NAMES: [&str; 4] = ["a", "b", "vtd0", "smmu0"];

/// Options whose values have keys, all of which are known.
const WITH_KEYS: [&str; 7] =
    ["--iommu=", "--device=", "--disk=", "--net=", "--rng=", "--vfio=", "--root-port="];

/// One execution: a machine that is printed is the same when it is parsed, or refused.
pub fn run(input: &mut Input<'_>) {
    let unknown = input.one_in(8);
    let config = machine(input);
    let mut words = print::words(&config);
    let has_keys = |word: &&mut OsString| {
        let word = word.to_string_lossy();
        WITH_KEYS.iter().any(|option| word.starts_with(option))
    };
    if let Some(word) = words.iter_mut().find(has_keys).filter(|_| unknown) {
        word.push(",colour=red");
        let message = parsed(&words).expect_err("there is no such key");
        return assert!(message.contains("'colour'") || message.contains("="), "{message}");
    }
    match parsed(&words) {
        Ok(again) => assert_eq!(again, config),
        Err(message) => {
            assert!(message.contains("--"), "{message}");
            if let Some((_, id)) = message.split_once("there is no --iommu with id=") {
                let named = NAMES.iter().any(|name| id.starts_with(name));
                assert!(named, "nobody said so: {message}");
            }
        }
    }
}

fn name(input: &mut Input<'_>) -> String {
    input.pick(&NAMES).to_owned()
}

fn maybe<T>(input: &mut Input<'_>, make: impl FnOnce(&mut Input<'_>) -> T) -> Option<T> {
    input.flag().then(|| make(input))
}

fn machine(input: &mut Input<'_>) -> MachineConfig {
    let initramfs = maybe(input, |_| "initramfs".into());
    let modules = 0..if initramfs.is_none() { input.byte() % 3 } else { 0 };
    let module = |number: u8| ModuleConfig {
        path: format!("module{number}").into(),
        cmdline: ["", "a=1,2 b", "cmdline=path="][usize::from(number)].to_owned(),
    };
    let cmdline = input.pick(&["", "-", "--cpus", "a=b,c d", "é"]).to_owned();
    MachineConfig {
        payload: PayloadConfig {
            kernel: input.pick(&["k", "-", "a,b=c", "--kernel"]).into(),
            initramfs,
            modules: modules.map(module).collect(),
            cmdline,
        },
        vcpus: input.byte(),
        memory: 1 << (input.byte() % 42),
        iommus: (0..input.byte() % 3).map(|_| iommu(input)).collect(),
        devices: devices(input),
        root_ports: (0..input.byte() % 3).map(|_| RootPortConfig { id: name(input) }).collect(),
        pci_bridges: (0..input.byte() % 3)
            .map(|_| PciBridgeConfig { id: name(input), bus: name(input) })
            .collect(),
        pci_ports: cfg!(target_arch = "x86_64") && input.flag(),
        serial: match input.byte() % 3 {
            0 => SerialConfig::Tty,
            1 => SerialConfig::Null,
            _ => SerialConfig::File("a,b".into()),
        },
        trace: maybe(input, |_| "trace".into()),
    }
}

fn iommu(input: &mut Input<'_>) -> IommuConfig {
    let choice = input.pick(&[SideCoreChoice::Off, SideCoreChoice::On, SideCoreChoice::Auto]);
    // A thread that is not there is bound to none.
    let cpu = maybe(input, |input| input.byte().into()).filter(|_| choice != SideCoreChoice::Off);
    let address = maybe(input, |input| 0xfed9_0000 + 0x1_0000 * u64::from(input.byte()));
    let host = match input.one_in(4) {
        true => HostChoice::Kernel("/dev/iommu".into()),
        false => HostChoice::Emulated,
    };
    let native = if cfg!(target_arch = "x86_64") { 7 } else { 1 };
    let model = match input.byte() % 8 < native {
        true => IommuModel::Vtd(vtd(input)),
        false => IommuModel::SmmuV3(smmuv3(input)),
    };
    let id = maybe(input, name);
    IommuConfig { id, address, host, model, side_core: SideCoreConfig { choice, cpu } }
}

fn vtd(input: &mut Input<'_>) -> VtdOptions {
    let pieces = input.number().max(1);
    VtdOptions {
        address_width: input.pick(&[48, 57]),
        pasid_bits: maybe(input, |input| input.byte() % 21),
        first_stage: maybe(input, |input| input.flag()),
        second_stage: maybe(input, |input| input.flag()),
        nest: input.flag(),
        nesting: input.pick(&[Nesting::On, Nesting::Auto { pieces }, Nesting::Off { pieces }]),
        ats: input.flag(),
        pri: input.flag(),
        caching_mode: input.flag(),
        interrupt_remapping: maybe(input, |input| input.flag()),
        sanitize: input.flag(),
    }
}

fn smmuv3(input: &mut Input<'_>) -> SmmuV3Options {
    let granules = |input: &mut Input<'_>| {
        let mut all = Granule::ALL.to_vec();
        all.rotate_left(input.below(3));
        all.truncate(input.below(3) + 1);
        all
    };
    SmmuV3Options {
        address_width: input.pick(&[48, 52]),
        granules: maybe(input, granules),
        range_invalidation: maybe(input, |input| input.flag()),
        substream_bits: maybe(input, |input| input.byte() % 21),
        httu: maybe(input, |input| input.pick(&[Httu::None, Httu::Access, Httu::Dirty])),
        ats: input.flag(),
        pri: input.flag(),
        stall: input.flag(),
        sanitize: input.flag(),
    }
}

/// In the order of their options.
fn devices(input: &mut Input<'_>) -> Vec<DeviceConfig> {
    let mut kinds: Vec<u8> = (0..input.byte() % 5).map(|_| input.byte() % 5).collect();
    kinds.sort_unstable();
    kinds.into_iter().map(|kind| device(kind, input)).collect()
}

fn device(kind: u8, input: &mut Input<'_>) -> DeviceConfig {
    let iommu = match input.byte() % 4 {
        0 => IommuChoice::Unsaid,
        1 => IommuChoice::First,
        2 => IommuChoice::Off,
        _ => IommuChoice::Named(name(input)),
    };
    let bus = input.one_in(3).then(|| name(input));
    match kind {
        0 => DeviceConfig::Edu(EduConfig {
            iommu,
            bus,
            pasid_bits: input.byte() % 21,
            ats: input.flag(),
            pri: input.flag(),
            stall: input.flag(),
            dma_mask: input.number(),
        }),
        1 => DeviceConfig::Disk(DiskConfig {
            path: "disk".into(),
            access: DiskAccess { read_only: input.flag(), direct: input.flag(), raw: input.flag() },
            queues: input.byte() % 64 + 1,
            iommu,
            bus,
        }),
        2 => DeviceConfig::Net(NetConfig {
            tap: match input.flag() {
                true => TapConfig::Name("tap0".to_owned()),
                false => TapConfig::Fd(input.byte().into()),
            },
            mac: maybe(input, |input| MacAddress::local(input.byte())),
            iommu,
            bus,
        }),
        3 => DeviceConfig::Rng(RngConfig { source: "/dev/urandom".into(), iommu, bus }),
        _ => DeviceConfig::Vfio(VfioConfig {
            path: format!("/sys/bus/pci/devices/{}", input.byte()).into(),
            id: maybe(input, name),
            iommu,
            bus,
        }),
    }
}
