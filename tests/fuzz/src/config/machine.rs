// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Descriptions of the preload library's machine, in TOML.
//!
//! One has what a naive reading of its tables says, with the defaults of what they do not say;
//! otherwise it is refused with a message. If names and numbers are unique, and devices are behind
//! IOMMUs that there are, it is not refused.

use std::fmt::Write;

use toml::{Table, Value};

use self::preload::{Capability, Config, Device, Dma, Iommu, Model};
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
/// How many of the keys, from the first on, an IOMMU has.
const OF_IOMMU: usize = 9;
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
    let expected = text.parse().ok().and_then(|table: Table| read(&table));
    match (Config::parse(&text), expected) {
        (Ok(config), Some(expected)) => assert_eq!(config, expected),
        (Ok(config), None) => panic!("{text}\n{config:?}"),
        (Err(error), Some(expected)) => panic!("{text}\n{error}: {expected:?}"),
        (Err(error), None) => assert!(!error.to_string().trim().is_empty()),
    }
}

/// The machine that a description is of, if it makes sense.
fn read(table: &Table) -> Option<Config> {
    only(table, &["iommu", "device", "capabilities"])?;
    let capability = |value: &Value| match value.as_str()? {
        "ipc-lock" => Some(Capability::IpcLock),
        "sys-rawio" => Some(Capability::SysRawio),
        "sys-resource" => Some(Capability::SysResource),
        _ => None,
    };
    let config = Config {
        iommu: list(table, "iommu", |value| iommu(value.as_table()?))?,
        device: list(table, "device", |value| device(value.as_table()?))?,
        capabilities: list(table, "capabilities", capability)?,
    };
    for (number, iommu) in config.iommu.iter().enumerate() {
        let others = &config.iommu[..number];
        others.iter().all(|other| other.name != iommu.name).then_some(())?;
    }
    for (number, device) in config.device.iter().enumerate() {
        config.iommu.iter().find(|iommu| iommu.name == device.iommu)?;
        let others = &config.device[..number];
        let apart = |other: &Device| {
            let same = other.group.is_some() && other.group == device.group;
            other.vfio != device.vfio && (!same || other.iommu == device.iommu)
        };
        others.iter().all(apart).then_some(())?;
    }
    Some(config)
}

/// No other keys are there.
fn only(table: &Table, keys: &[&str]) -> Option<()> {
    table.keys().all(|key| keys.contains(&key.as_str())).then_some(())
}

/// The elements of a list, if it is one.
fn list<T>(table: &Table, key: &str, read: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
    match table.get(key) {
        Some(value) => value.as_array()?.iter().map(read).collect(),
        None => Some(Vec::new()),
    }
}

/// A value, or if it is not there this one.
fn or<T>(table: &Table, key: &str, default: T, read: impl Fn(&Value) -> Option<T>) -> Option<T> {
    table.get(key).map_or(Some(default), read)
}

fn number<T: TryFrom<i64>>(value: &Value) -> Option<T> {
    value.as_integer()?.try_into().ok()
}

fn text(value: &Value) -> Option<String> {
    Some(value.as_str()?.to_owned())
}

fn iommu(table: &Table) -> Option<Iommu> {
    only(table, &KEYS[..OF_IOMMU])?;
    let model = match table.get("model")?.as_str()? {
        "vtd" => Model::Vtd,
        "smmuv3" => Model::Smmuv3,
        _ => return None,
    };
    let flag = |key, default| or(table, key, default, Value::as_bool);
    let address_width = or(table, "address-width", 48, number)?;
    let pasid_bits = or(table, "pasid-bits", 20, number)?;
    let has_width = match model {
        Model::Vtd => matches!(address_width, 39 | 48 | 57),
        Model::Smmuv3 => matches!(address_width, 32 | 36 | 40 | 42 | 44 | 48 | 52),
    };
    (has_width && pasid_bits <= 20).then_some(())?;
    Some(Iommu {
        name: text(table.get("name")?)?,
        model,
        address_width,
        pasid_bits,
        nesting: flag("nesting", true)?,
        ats: flag("ats", false)?,
        pri: flag("pri", false)?,
        erratum_772415: flag("erratum-772415", true)?,
        s2fwb: flag("s2fwb", true)?,
    })
}

fn device(table: &Table) -> Option<Device> {
    const KEYS: [&str; 10] = [
        "vfio",
        "iommu",
        "address",
        "pasid-bits",
        "ats",
        "pri",
        "dma",
        "express",
        "group",
        "reserved",
    ];
    only(table, &KEYS)?;
    let flag = |key| or(table, key, false, Value::as_bool);
    let dma = or(table, "dma", Dma::Edu, |value| match value.as_str()? {
        "edu" => Some(Dma::Edu),
        "none" => Some(Dma::None),
        _ => None,
    })?;
    let reserved = list(table, "reserved", |value| match &value.as_array()?[..] {
        [first, last] => Some([number(first)?, number(last)?]),
        _ => None,
    })?;
    reserved.iter().all(|[first, last]: &[u64; 2]| first <= last).then_some(())?;
    Some(Device {
        vfio: number(table.get("vfio")?)?,
        iommu: text(table.get("iommu")?)?,
        address: text(table.get("address")?).filter(|address| is_address(address))?,
        pasid_bits: or(table, "pasid-bits", 0, number)?,
        ats: flag("ats")?,
        pri: flag("pri")?,
        dma,
        express: flag("express")?,
        group: or(table, "group", None, |value| number(value).map(Some))?,
        reserved,
    })
}

/// Whether a text is an address: bus, device and function.
fn is_address(text: &str) -> bool {
    let number = |text: &str, most: u8| {
        u8::from_str_radix(text, 16).is_ok_and(|number| number <= most)
            && text.bytes().all(|byte| byte.is_ascii_hexdigit())
    };
    let parts = text.split_once(':').and_then(|(bus, rest)| Some((bus, rest.split_once('.')?)));
    parts.is_some_and(|(bus, (device, function))| {
        number(bus, 0xff) && number(device, 0x1f) && number(function, 7)
    })
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
    if kind > 3 {
        let (how, first, last) = (input.byte(), input.byte() % 4, input.byte() % 4);
        let _ = match how % 4 {
            0 => writeln!(text, "group = {first}"),
            1 => writeln!(text, "reserved = [[{first}, {last}]]"),
            _ => Ok(()),
        };
    }
    for _ in 0..input.byte() % 5 {
        let _ = writeln!(text, "{} = {}", input.pick(&KEYS), input.pick(&VALUES));
    }
}
