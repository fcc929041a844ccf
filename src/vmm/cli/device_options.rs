// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The options that add virtual IOMMUs and devices: `--iommu`, `--device`, `--vfio`, `--disk`,
//! `--net` and `--rng`.

use std::path::PathBuf;
use std::str::FromStr;

use super::options::{named, on_off, parse_number, small, Pairs};
use crate::config::{
    DeviceConfig, DiskConfig, EduConfig, HostChoice, IommuChoice, IommuConfig, IommuModel,
    NetConfig, PciBridgeConfig, RngConfig, RootPortConfig, SmmuV3Options, TapConfig, VfioConfig,
    VtdOptions, DEV_IOMMU,
};
use crate::devices::virtio::DiskAccess;
use twostage::spec::pci::Pasid;
use twostage::spec::smmuv3::translation::Granule;
use twostage::spec::vtd::HOST_ADDRESS_WIDTH;

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
    // Kernels do not nest on guest-owned second-stage tables.
    let second_stage = pairs.take("second-stage", emulated, on_off)?;
    let options = VtdOptions {
        address_width: pairs.take("aw", default.address_width, |text| match text {
            "48" => Ok(48),
            "57" => Ok(57),
            _ => Err(format!("'{text}' is neither 48 nor 57")),
        })?,
        pasid_bits: pairs
            .take("pasid-bits", default.pasid_bits, |text| pasid_bits(text).map(Some))?,
        second_stage,
        nest: nest(pairs, emulated, second_stage)?,
        ats: pairs.take("ats", default.ats, on_off)?,
        caching_mode: caching_mode(pairs, default.caching_mode, emulated)?,
        interrupt_remapping: pairs
            .take("intremap", default.interrupt_remapping, |text| on_off(text).map(Some))?,
        sanitize: sanitize(pairs, emulated)?,
    };
    Ok(options)
}

fn nest(pairs: &mut Pairs<'_>, emulated: bool, second_stage: bool) -> Result<bool, String> {
    let on = pairs.take("nest", false, on_off)?;
    if on && !emulated {
        // Nesting refuses it, too; here before any device is touched.
        return Err("nest=on needs host=emulated: no hardware nests two stages of a guest on its \
                    host's; say nest=off"
            .into());
    }
    if on && !second_stage {
        return Err("nest=on needs second-stage=on, the lower one of the two stages".into());
    }
    Ok(on)
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

/// Takes `on`, `off` or a width: that of a device's PASIDs.
fn device_pasid_bits(text: &str) -> Result<u8, String> {
    match text {
        "on" => Ok(Pasid::BITS as u8),
        "off" => Ok(0),
        bits => pasid_bits(bits).map_err(|error| format!("{error}; or on, or off")),
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
fn iommu(pairs: &mut Pairs<'_>) -> Result<IommuChoice, String> {
    pairs.take("iommu", IommuChoice::Unsaid, |text| {
        Ok(match text {
            "on" => IommuChoice::First,
            "off" => IommuChoice::Off,
            id => IommuChoice::Named(id.to_owned()),
        })
    })
}

/// Takes `bus=ID`.
fn bus(pairs: &mut Pairs<'_>) -> Result<Option<String>, String> {
    pairs.take("bus", None, |text| Ok(Some(text.to_owned())))
}

impl FromStr for RootPortConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut pairs = Pairs::parse(text)?;
        let id = pairs.take("id", None, |text| Ok(Some(text.to_owned())))?;
        pairs.finish()?;
        Ok(Self { id: id.ok_or("id=NAME is missing")? })
    }
}

impl FromStr for PciBridgeConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut pairs = Pairs::parse(text)?;
        let id = pairs.take("id", None, |text| Ok(Some(text.to_owned())))?;
        let bus = bus(&mut pairs)?;
        pairs.finish()?;
        Ok(Self {
            id: id.ok_or("id=NAME is missing")?,
            bus: bus.ok_or("bus=ID of a --root-port is missing")?,
        })
    }
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
            bus: bus(&mut pairs)?,
            pasid_bits: pairs.take("pasid", default.pasid_bits, device_pasid_bits)?,
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
        let path = path(&mut pairs, "path")?;
        let config = Self {
            path: path.ok_or("path=/sys/bus/pci/devices/ADDRESS is missing")?,
            id: pairs.take("id", None, |text| Ok(Some(text.to_owned())))?,
            iommu: iommu(&mut pairs)?,
            bus: bus(&mut pairs)?,
        };
        pairs.finish()?;
        Ok(config)
    }
}

/// Takes `key`, whose value is a path.
fn path(pairs: &mut Pairs<'_>, key: &'static str) -> Result<Option<PathBuf>, String> {
    pairs.take(key, None, |text| Ok(Some(PathBuf::from(text))))
}

/// Parses the image format; only raw is supported.
fn is_raw(text: &str) -> Result<bool, String> {
    match text {
        "raw" => Ok(true),
        _ => Err(format!("'{text}': disks are raw; qemu-img convert -O raw makes one")),
    }
}

impl FromStr for DiskConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut pairs = Pairs::parse(text)?;
        let path = path(&mut pairs, "path")?;
        let config = Self {
            path: path.ok_or("path=FILE is missing")?,
            access: DiskAccess {
                read_only: pairs.take("readonly", false, on_off)?,
                direct: pairs.take("direct", false, on_off)?,
                raw: pairs.take("format", false, is_raw)?,
            },
            iommu: iommu(&mut pairs)?,
            bus: bus(&mut pairs)?,
        };
        pairs.finish()?;
        Ok(config)
    }
}

impl FromStr for NetConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut pairs = Pairs::parse(text)?;
        let name = pairs.take("tap", None, |text| Ok(Some(TapConfig::Name(text.to_owned()))))?;
        let fd = pairs.take("fd", None, |text| match text.parse() {
            Ok(fd @ 0..) => Ok(Some(TapConfig::Fd(fd))),
            _ => Err(format!("'{text}' is not a file descriptor")),
        })?;
        let tap = match (name, fd) {
            (Some(tap), None) | (None, Some(tap)) => tap,
            (None, None) => return Err("tap=NAME or fd=NUMBER is missing".into()),
            (Some(_), Some(_)) => return Err("tap and fd are both given".into()),
        };
        let mac = pairs.take("mac", None, |text| {
            text.parse().map(Some).map_err(|error| format!("'{text}': {error}"))
        })?;
        let config = Self { tap, mac, iommu: iommu(&mut pairs)?, bus: bus(&mut pairs)? };
        pairs.finish()?;
        Ok(config)
    }
}

impl FromStr for RngConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut pairs = Pairs::parse(text)?;
        let source = path(&mut pairs, "src")?;
        let config = Self {
            source: source.ok_or("src=FILE is missing, such as src=/dev/urandom")?,
            iommu: iommu(&mut pairs)?,
            bus: bus(&mut pairs)?,
        };
        pairs.finish()?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::super::options::testing::refused;
    use super::*;
    use crate::devices::virtio::MacAddress;

    #[test]
    fn options_are_understood() {
        assert_eq!("vtd".parse(), Ok(IommuConfig::default()));
        assert_eq!(
            "vtd,id=a,aw=57,pasid-bits=16,addr=0xfed00000,second-stage=off,nest=off,ats=on,\
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
                    nest: false,
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
                bus: None,
                pasid_bits: 0,
                dma_mask: 0xffff_ffff
            }))
        );
        for (pasid, pasid_bits) in [("on", 20), ("off", 0), ("6", 6), ("0", 0)] {
            let edu = EduConfig { pasid_bits, ..EduConfig::default() };
            assert_eq!(format!("edu,pasid={pasid}").parse(), Ok(DeviceConfig::Edu(edu)));
        }
        let nest = VtdOptions { nest: true, ..VtdOptions::default() };
        assert_eq!("vtd,nest=on".parse(), Ok(IommuConfig::from(nest)));
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
            "path=/sys/bus/pci/devices/0000:01:00.0,id=nvme,iommu=b,bus=rp0".parse(),
            Ok(VfioConfig {
                path: "/sys/bus/pci/devices/0000:01:00.0".into(),
                id: Some("nvme".to_owned()),
                iommu: IommuChoice::Named("b".to_owned()),
                bus: Some("rp0".to_owned()),
            })
        );
        assert_eq!(
            "path=/a=b.img".parse(),
            Ok(DiskConfig {
                path: "/a=b.img".into(),
                access: DiskAccess::default(),
                iommu: IommuChoice::Unsaid,
                bus: None,
            })
        );
        assert_eq!(
            "direct=on,path=disk,readonly=on,format=raw,iommu=off".parse(),
            Ok(DiskConfig {
                path: "disk".into(),
                access: DiskAccess { read_only: true, direct: true, raw: true },
                iommu: IommuChoice::Off,
                bus: None,
            })
        );
        let (tap, mac) = (TapConfig::Name("tap0".into()), Some(MacAddress::local(9)));
        assert_eq!(
            "tap=tap0,mac=02:74:73:00:00:09,iommu=on".parse(),
            Ok(NetConfig { tap, mac, iommu: IommuChoice::First, bus: None })
        );
        let tap = TapConfig::Fd(3);
        let (mac, bus) = (None, None);
        assert_eq!("fd=3".parse(), Ok(NetConfig { tap, mac, iommu: IommuChoice::Unsaid, bus }));
        let (source, iommu) = ("/dev/urandom".into(), IommuChoice::Named("b".into()));
        let bus = Some("br0".to_owned());
        assert_eq!(
            "src=/dev/urandom,iommu=b,bus=br0".parse(),
            Ok(RngConfig { source, iommu, bus })
        );
        assert_eq!("id=rp0".parse(), Ok(RootPortConfig { id: "rp0".into() }));
        let bridge = PciBridgeConfig { id: "br0".into(), bus: "rp0".into() };
        assert_eq!("bus=rp0,id=br0".parse(), Ok(bridge));
    }

    #[test]
    fn mistakes_are_named() {
        refused::<IommuConfig>("smmu", "unknown IOMMU 'smmu'");
        refused::<IommuConfig>("smmuv3,caching-mode=on", "unknown key 'caching-mode'");
        refused::<IommuConfig>("vtd,host=/dev/iommu,caching-mode=off", "say caching-mode=on");
        refused::<IommuConfig>("vtd,host=/dev/iommu,nest=on", "nest=on needs host=emulated");
        refused::<IommuConfig>("vtd,second-stage=off,nest=on", "nest=on needs second-stage=on");
        refused::<IommuConfig>("smmuv3,nest=on", "unknown key 'nest'");
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
        refused::<DeviceConfig>("edu,pasid=21", "pasid: 21 is more than the 20 bits a PASID has");
        refused::<DeviceConfig>("edu,pasid=yes", "or on, or off");
        refused::<DeviceConfig>("edu,mask=1", "unknown key 'mask'");
        refused::<DiskConfig>("disk.img", "'disk.img'");
        refused::<DiskConfig>("readonly=on", "path=FILE is missing");
        refused::<DiskConfig>("path=a,readonly=yes", "readonly: 'yes'");
        refused::<DiskConfig>("path=a,format=qcow2", "format: 'qcow2': disks are raw");
        refused::<DiskConfig>("path=a,size=1", "unknown key 'size'");
        refused::<NetConfig>("mac=02:00:00:00:00:01", "tap=NAME or fd=NUMBER");
        refused::<NetConfig>("tap=a,fd=3", "both");
        refused::<NetConfig>("fd=-1", "'-1'");
        refused::<NetConfig>("tap=a,mac=02:00", "mac: '02:00'");
        refused::<RngConfig>("iommu=off", "src=FILE is missing");
        refused::<RootPortConfig>("id=a,bus=b", "unknown key 'bus'");
        refused::<RootPortConfig>("id=", "'id=' is not of the form key=value");
        refused::<PciBridgeConfig>("bus=rp0", "id=NAME is missing");
        refused::<PciBridgeConfig>("id=br0", "bus=ID of a --root-port is missing");
    }
}
