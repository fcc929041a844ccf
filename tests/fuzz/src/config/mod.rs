// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Command lines, of words that are often options of the command; and ([`machine`]) descriptions of
//! the preload library's machine.
//!
//! A command line is refused with a message, or is a machine that does not contradict itself. What
//! a simple one says is what the machine has.

mod machine;

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use twostage_vmm::inside::parsed;

use crate::input::Input;

/// Maximum number of options of one execution.
const MAX_OPTIONS: usize = 8;

/// Options with a value, and keys of such values.
const OPTIONS: [&str; 22] = [
    "--kernel",
    "--initramfs",
    "--module",
    "--cmdline",
    "--cpus",
    "--memory",
    "--iommu",
    "--root-port",
    "--pci-bridge",
    "--pci-ports",
    "--device",
    "--disk",
    "--net",
    "--rng",
    "--vfio",
    "--serial",
    "--on-reset",
    "--report",
    "--trace",
    "--jail",
    "--uid",
    "--gid",
];
const KEYS: [&str; 44] = [
    "boot",
    "size",
    "path",
    "cmdline",
    "id",
    "bus",
    "aw",
    "pasid-bits",
    "addr",
    "first-stage",
    "second-stage",
    "nest",
    "nesting",
    "shadow-pieces",
    "ats",
    "pri",
    "caching-mode",
    "intremap",
    "host",
    "side-core",
    "side-cpu",
    "sanitize",
    "granules",
    "stall",
    "ril",
    "httu",
    "iommu",
    "pasid",
    "dma-mask",
    "readonly",
    "direct",
    "format",
    "queues",
    "tap",
    "fd",
    "mac",
    "src",
    "file",
    "edu",
    "vtd",
    "smmuv3",
    "text",
    "json",
    "tty",
];
const VALUES: [&str; 40] = [
    "on",
    "off",
    "auto",
    "0",
    "1",
    "2",
    "8",
    "20",
    "48",
    "57",
    "64",
    "4K",
    "16K",
    "4K+64K",
    "512M",
    "2G",
    "1T",
    "0x",
    "0xfed90000",
    "0xffffffffffffffff",
    "18446744073709551616",
    "-1",
    "emulated",
    "/dev/iommu",
    "/dev/zero",
    "/dev/null",
    "vtd0",
    "vtd",
    "smmu0",
    "a",
    "b",
    "rp0",
    "raw",
    "exit",
    "restart",
    "access",
    "dirty",
    "02:00:00:00:00:01",
    "tap0",
    "edu",
];

/// One execution.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    match input.byte() % 8 {
        0 => return exact(&mut input),
        1..=3 => return machine::run(&mut input),
        _ => {}
    }
    let mut words: Vec<OsString> = vec!["twostage".into(), "run".into()];
    words.extend(["--kernel".into(), "k".into()].into_iter().filter(|_| !input.one_in(8)));
    for _ in 0..MAX_OPTIONS {
        if input.is_empty() {
            break;
        }
        match input.byte() % 32 {
            0 => words.push(word(&mut input)),
            _ => {
                words.push(input.pick(&OPTIONS).into());
                words.push(value(&mut input));
            }
        }
    }
    // The message is for a person: it says something.
    if let Err(message) = parsed(&words) {
        assert!(!message.trim().is_empty());
    }
}

/// Any word.
fn word(input: &mut Input<'_>) -> OsString {
    OsString::from_vec(input.bytes(40))
}

/// Pairs of keys and values.
fn value(input: &mut Input<'_>) -> OsString {
    if input.one_in(16) {
        return word(input);
    }
    let mut text = OsString::new();
    for number in 0..input.byte() % 5 {
        text.push(if number == 0 { "" } else { "," });
        text.push(input.pick(&KEYS));
        if !input.one_in(8) {
            text.push("=");
            match input.byte() % 8 {
                0 => text.push(word(input)),
                1 => text.push(format!("{:#x}", input.number())),
                2 => text.push(input.number().to_string()),
                _ => text.push(input.pick(&VALUES)),
            }
        }
    }
    text
}

/// A command line that says some things once, in an order that does not matter.
fn exact(input: &mut Input<'_>) {
    let (vcpus, shift) = (input.byte(), input.pick(&[0, 10, 20, 30, 40]));
    let unit = ["", "K", "M", "G", "T"][shift as usize / 10];
    let number = u64::from(input.half());
    let memory = number << shift;
    let edus = input.byte() % 4;
    let iommu = input.flag();
    let mut pairs = vec![
        ("--kernel".to_owned(), "k".to_owned()),
        ("--cpus".to_owned(), format!("boot={vcpus}")),
        ("--memory".to_owned(), format!("size={number}{unit}")),
    ];
    pairs.extend((0..edus).map(|_| ("--device".to_owned(), "edu".to_owned())));
    if iommu {
        let model = if cfg!(target_arch = "x86_64") { "vtd" } else { "smmuv3" };
        pairs.push(("--iommu".to_owned(), model.to_owned()));
    }
    let turn = input.below(pairs.len());
    pairs.rotate_left(turn);
    let mut words: Vec<OsString> = vec!["twostage".into(), "run".into()];
    words.extend(pairs.into_iter().flat_map(|(option, value)| [option.into(), value.into()]));
    match parsed(&words) {
        Ok(config) => {
            assert_eq!((config.vcpus, config.memory), (vcpus, memory));
            assert_eq!(config.devices.len(), usize::from(edus));
            assert_eq!(config.iommus.len(), usize::from(iommu));
        }
        // No processors, or memory where something else is.
        Err(message) => assert!(vcpus == 0 || memory == 0 || iommu, "{message}"),
    }
}
