// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Command lines, of words that are often options of the command; and ([`machine`]) descriptions of
//! the preload library's machine.
//!
//! A command line is refused with a message that names what is wrong, or is a machine whose own
//! command line ([`print`]) makes it again. A machine that is made without one ([`made`]) is what
//! its command line makes, or is refused; a simple one is not.

mod machine;
mod made;
mod print;

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use twostage_vmm::inside::parsed;

use crate::input::Input;

/// Maximum number of options of one execution.
const MAX_OPTIONS: usize = 8;

/// Options, words that their values may begin with, and keys of pairs in these.
const OPTIONS: [(&str, &[&str], &[&str]); 22] = [
    ("--kernel", &["k"], &[]),
    ("--initramfs", &["i"], &[]),
    ("--module", &[], &["path", "cmdline"]),
    ("--cmdline", &["c"], &[]),
    ("--cpus", &[], &["boot"]),
    ("--memory", &[], &["size"]),
    ("--iommu", &["vtd", "smmuv3"], &IOMMU_KEYS),
    ("--root-port", &[], &["id"]),
    ("--pci-bridge", &[], &["id", "bus"]),
    ("--pci-ports", &["on", "off"], &[]),
    ("--device", &["edu"], &["iommu", "bus", "pasid", "ats", "pri", "stall", "dma-mask"]),
    ("--disk", &[], &["path", "readonly", "direct", "format", "queues", "iommu", "bus"]),
    ("--net", &[], &["tap", "fd", "mac", "iommu", "bus"]),
    ("--rng", &[], &["src", "iommu", "bus"]),
    ("--vfio", &[], &["path", "id", "iommu", "bus"]),
    ("--serial", &["tty", "null"], &["file"]),
    ("--on-reset", &["exit", "restart"], &[]),
    ("--report", &["none", "text", "json"], &["file"]),
    ("--trace", &["t"], &[]),
    ("--jail", &["on", "off", "log"], &[]),
    ("--uid", &["0", "65534"], &[]),
    ("--gid", &["0", "65534"], &[]),
];
const IOMMU_KEYS: [&str; 22] = [
    "id",
    "addr",
    "host",
    "side-core",
    "side-cpu",
    "aw",
    "pasid-bits",
    "first-stage",
    "second-stage",
    "nest",
    "nesting",
    "shadow-pieces",
    "ats",
    "pri",
    "caching-mode",
    "intremap",
    "sanitize",
    "granules",
    "stall",
    "ril",
    "httu",
    "colour",
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
        0 => exact(&mut input),
        1 | 2 => machine::run(&mut input),
        3 => made::run(&mut input),
        _ => any(&mut input),
    }
}

/// Options with any values: what is taken is the same when it is printed and parsed again, and what
/// is refused is named.
fn any(input: &mut Input<'_>) {
    let mut words: Vec<OsString> = vec!["twostage".into(), "run".into()];
    words.extend(["--kernel".into(), "k".into()].into_iter().filter(|_| !input.one_in(8)));
    for _ in 0..MAX_OPTIONS {
        if input.is_empty() {
            break;
        }
        match input.byte() % 32 {
            0 => words.push(word(input)),
            _ => {
                let (option, bare, keys) = input.pick(&OPTIONS);
                words.push(option.into());
                words.push(value(bare, keys, input));
            }
        }
    }
    match parsed(&words) {
        Ok(config) => {
            let unknown = |word: &OsString| word.to_string_lossy().contains(",colour=");
            assert!(!words.windows(2).any(|pair| pair[0] == "--iommu" && unknown(&pair[1])));
            let again = print::words(&config);
            assert_eq!(parsed(&again).as_ref(), Ok(&config), "{words:?} {again:?}");
        }
        Err(message) => check(&words, &message),
    }
}

/// The message is for a person: it names an option that was given or is missing, or a word that is
/// none; and a value that is none.
fn check(words: &[OsString], message: &str) {
    if message.starts_with("error: invalid UTF-8") {
        return assert!(words.iter().any(|word| word.to_str().is_none()));
    }
    let said: Vec<_> = words.iter().skip(2).map(|word| word.to_string_lossy()).collect();
    let names = |(option, ..): &(&str, &[&str], &[&str])| message.contains(option);
    // Or the value of one that is `--option=value`.
    let values = said.iter().filter_map(|word| Some(word.split_once('=')?.1));
    let mut odd = said.iter().map(|word| &**word).chain(values);
    // Of control characters messages have at most some, and nothing of what an escape begins.
    let plain = |text: &str| text.chars().filter(|it| !it.is_control()).collect::<String>();
    let message_text = plain(message);
    let odd = odd.any(|word| match word.split_once('\u{1b}') {
        Some((head, _)) => message_text.contains(&plain(head)),
        None if plain(word).is_empty() => message_text.contains("''"),
        None => message_text.contains(&plain(word)),
    });
    assert!(OPTIONS.iter().any(names) || odd, "{words:?}: {message}");
    if message.starts_with("error: invalid value") {
        assert!(odd, "{words:?}: {message}");
    }
}

/// Any word.
fn word(input: &mut Input<'_>) -> OsString {
    OsString::from_vec(input.bytes(40))
}

/// One of these words, and pairs of these keys, or others, and values.
fn value(bare: &[&str], keys: &[&str], input: &mut Input<'_>) -> OsString {
    let choice = input.byte();
    if choice.is_multiple_of(32) {
        return word(input);
    }
    let mut text = OsString::new();
    if !bare.is_empty() && choice & 3 != 0 {
        text.push(input.pick(bare));
    }
    for _ in 0..if keys.is_empty() { choice >> 7 } else { choice >> 5 } {
        text.push(if text.is_empty() { "" } else { "," });
        text.push(match input.byte() {
            any @ 0xf0.. => OPTIONS[usize::from(any & 0xf)].2.first().unwrap_or(&"x"),
            number => keys.get(usize::from(number) % keys.len().max(1)).unwrap_or(&"x"),
        });
        match input.byte() % 16 {
            0 => {}
            1 => {
                text.push("=");
                text.push(word(input));
            }
            2 => text.push(format!("={:#x}", input.number())),
            3 => text.push(format!("={}", input.number())),
            _ => {
                text.push("=");
                text.push(input.pick(&VALUES));
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
