// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Option values of the form `name,key=value,…`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::str::FromStr;

use super::size::{parse_number, parse_size};
use crate::config::{
    DeviceConfig, EduConfig, HostChoice, IommuChoice, IommuConfig, IommuModel, SerialConfig,
    SmmuV3Options, VfioConfig, VtdOptions, DEV_IOMMU,
};
use twostage::spec::smmuv3::translation::Granule;
use twostage::spec::vtd::HOST_ADDRESS_WIDTH;

/// `key=value` pairs, each taken at most once.
#[derive(Default)]
pub(super) struct Pairs<'a> {
    pairs: BTreeMap<&'a str, &'a str>,
    /// Keys that were queried: all valid ones.
    known: BTreeSet<&'static str>,
}

impl<'a> Pairs<'a> {
    pub(super) fn parse(text: &'a str) -> Result<Self, String> {
        let mut pairs = BTreeMap::new();
        for pair in text.split(',') {
            let (key, value) = pair
                .split_once('=')
                .filter(|(key, value)| !key.is_empty() && !value.is_empty())
                .ok_or_else(|| format!("'{pair}' is not of the form key=value"))?;
            if pairs.insert(key, value).is_some() {
                return Err(format!("'{key}' is given twice"));
            }
        }
        Ok(Self { pairs, ..Self::default() })
    }

    /// Takes the value of `key`, parsed by `parse`, or `default` if not given.
    pub(super) fn take<T>(
        &mut self,
        key: &'static str,
        default: T,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<T, String> {
        self.known.insert(key);
        match self.pairs.remove(key) {
            Some(value) => parse(value).map_err(|error| format!("{key}: {error}")),
            None => Ok(default),
        }
    }

    /// Every key must have been used.
    pub(super) fn finish(self) -> Result<(), String> {
        let known = || self.known.iter().copied().collect::<Vec<_>>().join(", ");
        match self.pairs.keys().next() {
            Some(key) => Err(format!("unknown key '{key}'; known: {}", known())),
            None => Ok(()),
        }
    }
}

pub(super) fn on_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("'{text}' is neither on nor off")),
    }
}

fn small(text: &str) -> Result<u8, String> {
    parse_number(text)?.try_into().map_err(|_| format!("'{text}' is more than 255"))
}

/// `--cpus boot=N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpusOption {
    /// Number of vCPUs.
    pub boot: u8,
}

impl FromStr for CpusOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut pairs = Pairs::parse(text)?;
        let boot = pairs.take("boot", 1, small)?;
        pairs.finish()?;
        Ok(Self { boot })
    }
}

/// `--memory size=SIZE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryOption {
    /// RAM in bytes.
    pub size: u64,
}

impl MemoryOption {
    /// Default RAM size.
    pub const DEFAULT_SIZE: u64 = 512 << 20;
}

impl FromStr for MemoryOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut pairs = Pairs::parse(text)?;
        let size = pairs.take("size", Self::DEFAULT_SIZE, parse_size)?;
        pairs.finish()?;
        Ok(Self { size })
    }
}

/// The name before the pairs, and the pairs.
fn named(text: &str) -> Result<(&str, Pairs<'_>), String> {
    match text.split_once(',') {
        Some((name, pairs)) => Ok((name, Pairs::parse(pairs)?)),
        None => Ok((text, Pairs::default())),
    }
}

impl FromStr for IommuConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (model, mut pairs) = named(text)?;
        let id = pairs.take("id", None, |text| id(text).map(Some))?;
        let address = pairs.take("addr", None, |text| register_page(text).map(Some))?;
        let host = pairs.take("host", HostChoice::default(), host)?;
        let model = match model {
            "vtd" => IommuModel::Vtd(vtd(&mut pairs, host == HostChoice::Emulated)?),
            "smmuv3" => IommuModel::SmmuV3(smmuv3(&mut pairs, host == HostChoice::Emulated)?),
            _ => return Err(format!("unknown IOMMU '{model}'; known: smmuv3, vtd")),
        };
        pairs.finish()?;
        Ok(Self { id, address, host, model })
    }
}

fn vtd(pairs: &mut Pairs<'_>, emulated: bool) -> Result<VtdOptions, String> {
    let default = VtdOptions::default();
    let options = VtdOptions {
        address_width: pairs.take("aw", default.address_width, |text| match text {
            "48" => Ok(48),
            "57" => Ok(57),
            _ => Err(format!("'{text}' is neither 48 nor 57")),
        })?,
        pasid_bits: pairs
            .take("pasid-bits", default.pasid_bits, |text| pasid_bits(text).map(Some))?,
        // Kernels do not nest on guest-owned second-stage tables.
        second_stage: pairs.take("second-stage", emulated, on_off)?,
        ats: pairs.take("ats", default.ats, on_off)?,
        caching_mode: caching_mode(pairs, default.caching_mode, emulated)?,
        interrupt_remapping: pairs
            .take("intremap", default.interrupt_remapping, |text| on_off(text).map(Some))?,
        sanitize: sanitize(pairs, emulated)?,
    };
    Ok(options)
}

fn caching_mode(pairs: &mut Pairs<'_>, default: bool, emulated: bool) -> Result<bool, String> {
    let on = pairs.take("caching-mode", default, on_off)?;
    if !on && !emulated {
        // Nesting refuses it, too; here before any device is touched.
        return Err("caching-mode=off needs host=emulated: a kernel does not report DMA that it \
                    blocks, so that tables that start to serve a device would never be read; say \
                    caching-mode=on"
            .into());
    }
    Ok(on)
}

fn sanitize(pairs: &mut Pairs<'_>, emulated: bool) -> Result<bool, String> {
    let on = pairs.take("sanitize", false, on_off)?;
    if on && !emulated {
        return Err("sanitize=on needs host=emulated, whose caches it inspects".into());
    }
    Ok(on)
}

fn smmuv3(pairs: &mut Pairs<'_>, emulated: bool) -> Result<SmmuV3Options, String> {
    let default = SmmuV3Options::default();
    let options = SmmuV3Options {
        address_width: pairs.take("aw", default.address_width, |text| match text {
            "48" => Ok(48),
            "52" => Ok(52),
            _ => Err(format!("'{text}' is neither 48 nor 52")),
        })?,
        granules: pairs.take("granules", default.granules, |text| granules(text).map(Some))?,
        range_invalidation: pairs
            .take("ril", default.range_invalidation, |text| on_off(text).map(Some))?,
        substream_bits: pairs
            .take("pasid-bits", default.substream_bits, |text| pasid_bits(text).map(Some))?,
        ats: pairs.take("ats", default.ats, on_off)?,
        sanitize: sanitize(pairs, emulated)?,
    };
    let narrow = options.granules.as_ref().is_some_and(|some| !some.contains(&Granule::K64));
    if options.address_width == 52 && narrow {
        return Err("aw=52 needs the granule of 64 KiB: add 64K to granules=, or say aw=48".into());
    }
    Ok(options)
}

/// Granules by their sizes, such as `4K+64K`.
fn granules(text: &str) -> Result<Vec<Granule>, String> {
    let granule = |size| match size {
        "4K" => Ok(Granule::K4),
        "16K" => Ok(Granule::K16),
        "64K" => Ok(Granule::K64),
        _ => Err(format!("'{size}' is none of 4K, 16K, 64K; join several with +")),
    };
    text.split('+').map(granule).collect()
}

fn pasid_bits(text: &str) -> Result<u8, String> {
    match small(text)? {
        bits @ 0..=20 => Ok(bits),
        bits => Err(format!("{bits} is more than the 20 bits a PASID has")),
    }
}

/// `emulated`, or the path of the kernel's iommufd.
fn host(text: &str) -> Result<HostChoice, String> {
    match text {
        "emulated" => Ok(HostChoice::Emulated),
        path if path.starts_with('/') => Ok(HostChoice::Kernel(path.into())),
        _ => Err(format!("'{text}' is neither emulated nor a path such as {DEV_IOMMU}")),
    }
}

/// A name that differs from the other values of a device's `iommu=`.
fn id(text: &str) -> Result<String, String> {
    match text {
        "on" | "off" => Err(format!("'{text}' is not a name: iommu={text} means something else")),
        _ => Ok(text.to_owned()),
    }
}

/// Takes `iommu=on|off|ID`.
pub(super) fn iommu(pairs: &mut Pairs<'_>) -> Result<IommuChoice, String> {
    pairs.take("iommu", IommuChoice::Unsaid, |text| {
        Ok(match text {
            "on" => IommuChoice::First,
            "off" => IommuChoice::Off,
            id => IommuChoice::Named(id.to_owned()),
        })
    })
}

fn register_page(text: &str) -> Result<u64, String> {
    let address = parse_number(text)?;
    if address % 4096 != 0 {
        return Err(format!("'{text}' is not a multiple of 4096"));
    }
    if address >> HOST_ADDRESS_WIDTH != 0 {
        return Err(format!("'{text}' has more than {HOST_ADDRESS_WIDTH} bits"));
    }
    Ok(address)
}

impl FromStr for DeviceConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (model, mut pairs) = named(text)?;
        if model != "edu" {
            return Err(format!("unknown device '{model}'; known: edu"));
        }
        let default = EduConfig::default();
        let config = EduConfig {
            iommu: iommu(&mut pairs)?,
            pasid: pairs.take("pasid", default.pasid, on_off)?,
            dma_mask: pairs.take("dma-mask", default.dma_mask, parse_number)?,
        };
        pairs.finish()?;
        Ok(Self::Edu(config))
    }
}

impl FromStr for VfioConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut pairs = Pairs::parse(text)?;
        let path = pairs.take("path", None, |text| Ok(Some(PathBuf::from(text))))?;
        let config = Self {
            path: path.ok_or("path=/sys/bus/pci/devices/ADDRESS is missing")?,
            id: pairs.take("id", None, |text| Ok(Some(text.to_owned())))?,
            iommu: iommu(&mut pairs)?,
        };
        pairs.finish()?;
        Ok(config)
    }
}

impl FromStr for SerialConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            None if text == "tty" => Ok(Self::Tty),
            None if text == "null" => Ok(Self::Null),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(PathBuf::from(path))),
            _ => Err(format!("'{text}' is none of tty, null, file=PATH")),
        }
    }
}

#[cfg(test)]
pub(super) mod testing {
    use std::str::FromStr;

    /// `text` is refused with an error that contains `hint`.
    pub fn refused<T: FromStr<Err = String>>(text: &str, hint: &str) {
        match text.parse::<T>() {
            Ok(_) => panic!("'{text}' was taken"),
            Err(error) => assert!(error.contains(hint), "'{text}': {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::refused;
    use super::*;

    #[test]
    fn options_are_understood() {
        assert_eq!("boot=4".parse(), Ok(CpusOption { boot: 4 }));
        assert_eq!("size=1G".parse(), Ok(MemoryOption { size: 1 << 30 }));
        assert_eq!("vtd".parse(), Ok(IommuConfig::default()));
        assert_eq!(
            "vtd,id=a,aw=57,pasid-bits=16,addr=0xfed00000,second-stage=off,ats=on,\
             caching-mode=off,intremap=on,sanitize=on"
                .parse(),
            Ok(IommuConfig {
                id: Some("a".to_owned()),
                address: Some(0xfed0_0000),
                host: HostChoice::Emulated,
                model: IommuModel::Vtd(VtdOptions {
                    address_width: 57,
                    pasid_bits: Some(16),
                    second_stage: false,
                    ats: true,
                    caching_mode: false,
                    interrupt_remapping: Some(true),
                    sanitize: true,
                }),
            })
        );
        assert_eq!("edu".parse(), Ok(DeviceConfig::Edu(EduConfig::default())));
        assert_eq!(
            "edu,iommu=off,dma-mask=0xffffffff".parse(),
            Ok(DeviceConfig::Edu(EduConfig {
                iommu: IommuChoice::Off,
                pasid: false,
                dma_mask: 0xffff_ffff
            }))
        );
        let kernel = "vtd,host=/dev/iommu".parse::<IommuConfig>().unwrap();
        assert_eq!(kernel.host, HostChoice::Kernel(DEV_IOMMU.into()));
        assert!(!kernel.model.vtd().unwrap().second_stage);
        assert_eq!("smmuv3".parse(), Ok(IommuConfig::from(SmmuV3Options::default())));
        let sanitize = SmmuV3Options { sanitize: true, ..SmmuV3Options::default() };
        assert_eq!("smmuv3,sanitize=on".parse(), Ok(IommuConfig::from(sanitize)));
        assert_eq!(
            "smmuv3,id=s,addr=0xa000000,host=/dev/iommu,ats=on,pasid-bits=4,aw=52,\
             granules=4K+64K,ril=off"
                .parse(),
            Ok(IommuConfig {
                id: Some("s".to_owned()),
                address: Some(0xa00_0000),
                host: HostChoice::Kernel(DEV_IOMMU.into()),
                model: IommuModel::SmmuV3(SmmuV3Options {
                    address_width: 52,
                    granules: Some(vec![Granule::K4, Granule::K64]),
                    range_invalidation: Some(false),
                    substream_bits: Some(4),
                    ats: true,
                    sanitize: false,
                }),
            })
        );
        assert_eq!(
            "path=/sys/bus/pci/devices/0000:01:00.0,id=nvme,iommu=b".parse(),
            Ok(VfioConfig {
                path: "/sys/bus/pci/devices/0000:01:00.0".into(),
                id: Some("nvme".to_owned()),
                iommu: IommuChoice::Named("b".to_owned()),
            })
        );
        assert_eq!("tty".parse(), Ok(SerialConfig::Tty));
        assert_eq!("null".parse(), Ok(SerialConfig::Null));
        assert_eq!("file=/tmp/x".parse(), Ok(SerialConfig::File("/tmp/x".into())));
    }

    #[test]
    fn mistakes_are_named() {
        refused::<CpusOption>("4", "'4'");
        refused::<CpusOption>("boot=300", "boot: '300'");
        refused::<CpusOption>("boot=1,boot=2", "twice");
        refused::<CpusOption>("boot=1,max=2", "unknown key 'max'");
        refused::<CpusOption>("boot=", "'boot='");
        refused::<MemoryOption>("size=lots", "size: 'lots'");
        refused::<IommuConfig>("smmu", "unknown IOMMU 'smmu'");
        refused::<IommuConfig>("smmuv3,caching-mode=on", "unknown key 'caching-mode'");
        refused::<IommuConfig>("vtd,host=/dev/iommu,caching-mode=off", "say caching-mode=on");
        refused::<IommuConfig>("smmuv3,aw=57", "aw: '57' is neither 48 nor 52");
        refused::<IommuConfig>("smmuv3,granules=4K+8K", "granules: '8K' is none of 4K, 16K, 64K");
        refused::<IommuConfig>("smmuv3,granules=4K,aw=52", "add 64K to granules=");
        refused::<IommuConfig>("smmuv3,ril=auto", "ril: 'auto'");
        refused::<IommuConfig>("vtd,aw=39", "aw: '39'");
        refused::<IommuConfig>("vtd,pasid-bits=21", "21 is more");
        refused::<IommuConfig>("vtd,addr=0xfed90001", "multiple of 4096");
        refused::<IommuConfig>("vtd,addr=0x10000000000000", "more than 52 bits");
        refused::<IommuConfig>("vtd,ats=maybe", "ats: 'maybe'");
        refused::<IommuConfig>("vtd,intremap=auto", "intremap: 'auto'");
        refused::<IommuConfig>("vtd,", "key=value");
        refused::<IommuConfig>("vtd,id=on", "id: 'on'");
        refused::<IommuConfig>("vtd,host=kernel", "neither emulated nor a path");
        refused::<IommuConfig>("vtd,host=/dev/iommu,sanitize=on", "sanitize=on needs");
        refused::<IommuConfig>("smmuv3,sanitize=on,host=/dev/iommu", "sanitize=on needs");
        refused::<VfioConfig>("iommu=off", "path=/sys/bus/pci/devices");
        refused::<VfioConfig>("path=/a,host=/b", "unknown key 'host'");
        refused::<DeviceConfig>("nvme", "unknown device 'nvme'");
        refused::<DeviceConfig>("edu,mask=1", "unknown key 'mask'");
        refused::<SerialConfig>("file=", "'file='");
        refused::<SerialConfig>("pty", "'pty'");
    }
}
