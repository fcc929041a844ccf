// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Descriptions of the preload library's machine, in TOML.
//!
//! One is refused with a message, or makes sense: names and numbers are unique, devices are behind
//! IOMMUs that there are, and have addresses.

use std::collections::BTreeSet;
use std::fmt::Write;

use self::preload::Config;
use crate::input::Input;

// The library replaces functions of libc where it is linked: this is its source.
#[allow(dead_code, reason = "what reads files")]
#[path = "../../../../src/preload/config.rs"]
mod preload;

/// Maximum number of tables.
const MAX_TABLES: u8 = 8;
const KEYS: [&str; 18] = [
    "name",
    "model",
    "address-width",
    "pasid-bits",
    "nesting",
    "ats",
    "pri",
    "erratum-772415",
    "s2fwb",
    "vfio",
    "iommu",
    "address",
    "dma",
    "express",
    "group",
    "reserved",
    "capabilities",
    "colour",
];
const VALUES: [&str; 28] = [
    "'a'",
    "'b'",
    "''",
    "'vtd'",
    "'smmuv3'",
    "'edu'",
    "'none'",
    "true",
    "false",
    "0",
    "1",
    "2",
    "20",
    "32",
    "39",
    "48",
    "52",
    "57",
    "255",
    "-1",
    "18446744073709551615",
    "'00:04.0'",
    "'00:05.0'",
    "'ff:1f.7'",
    "'00:04.9'",
    "[[1, 2]]",
    "[[2, 1], [0, 1, 2]]",
    "['ipc-lock']",
];

/// One execution.
pub fn run(input: &mut Input<'_>) {
    let mut text = String::new();
    for _ in 0..input.byte() % MAX_TABLES {
        match input.byte() % 8 {
            0 => text.push_str(&String::from_utf8_lossy(&input.bytes(30))),
            kind => table(&mut text, kind, input),
        }
    }
    match Config::parse(&text) {
        Ok(config) => check(&config),
        Err(error) => assert!(!error.to_string().trim().is_empty()),
    }
}

/// A table with what it needs, and some more.
fn table(text: &mut String, kind: u8, input: &mut Input<'_>) {
    let number = input.byte() % 4;
    // Writing to a string does not fail.
    let _ = match kind {
        1..=3 => writeln!(
            text,
            "[[iommu]]\nname = 'm{number}'\nmodel = '{}'",
            input.pick(&["vtd", "smmuv3"])
        ),
        _ => writeln!(
            text,
            "[[device]]\nvfio = {}\niommu = 'm{number}'\naddress = '00:0{number}.{}'",
            input.byte() % 4,
            input.byte() % 9
        ),
    };
    for _ in 0..input.byte() % 5 {
        let _ = writeln!(text, "{} = {}", input.pick(&KEYS), input.pick(&VALUES));
    }
}

fn check(config: &Config) {
    let names: BTreeSet<_> = config.iommu.iter().map(|iommu| &iommu.name).collect();
    assert_eq!(names.len(), config.iommu.len());
    let numbers: BTreeSet<_> = config.device.iter().map(|device| device.vfio).collect();
    assert_eq!(numbers.len(), config.device.len());
    assert!(config.iommu.iter().all(|iommu| iommu.pasid_bits <= 20 && iommu.address_width <= 57));
    for device in &config.device {
        assert!(names.contains(&device.iommu));
        assert!(device.rid().is_ok());
        assert!(device.reserved().iter().all(|range| !range.is_empty()));
    }
}
