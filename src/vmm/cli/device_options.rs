// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The options that add devices, and what they are plugged into: `--device`, `--vfio`, `--disk`,
//! `--net`, `--rng`, `--root-port` and `--pci-bridge`.

use std::path::PathBuf;
use std::str::FromStr;

use super::iommu_options::pasid_bits;
use super::options::{named, on_off, parse_number, Pairs};
use crate::config::{
    DeviceConfig, DiskConfig, EduConfig, IommuChoice, NetConfig, PciBridgeConfig, RngConfig,
    RootPortConfig, TapConfig, VfioConfig, MAX_DISK_QUEUES,
};
use crate::devices::virtio::DiskAccess;
use twostage::spec::pci::Pasid;

/// Takes `on`, `off` or a width: that of a device's PASIDs.
fn device_pasid_bits(text: &str) -> Result<u8, String> {
    match text {
        "on" => Ok(Pasid::BITS as u8),
        "off" => Ok(0),
        bits => pasid_bits(bits).map_err(|error| format!("{error}; or on, or off")),
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
            ats: pairs.take("ats", default.ats, on_off)?,
            pri: pairs.take("pri", default.pri, on_off)?,
            stall: pairs.take("stall", default.stall, on_off)?,
            dma_mask: pairs.take("dma-mask", default.dma_mask, parse_number)?,
        };
        pairs.finish()?;
        if config.pri && !config.ats {
            return Err("pri=on needs ats=on: page requests are for a device TLB".into());
        }
        if config.stall && config.ats {
            return Err("stall=on needs ats=off: an SMMU must not stall a device with ATS".into());
        }
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

/// Parses the number of a disk's queues.
fn disk_queues(text: &str) -> Result<u8, String> {
    match text.parse() {
        Ok(queues) if (1..=MAX_DISK_QUEUES).contains(&usize::from(queues)) => Ok(queues),
        _ => Err(format!("'{text}': a disk has 1 to {MAX_DISK_QUEUES} queues")),
    }
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
            queues: pairs.take("queues", 1, disk_queues)?,
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
        assert_eq!("edu".parse(), Ok(DeviceConfig::Edu(EduConfig::default())));
        assert_eq!(
            "edu,iommu=off,dma-mask=0xffffffff".parse(),
            Ok(DeviceConfig::Edu(EduConfig {
                iommu: IommuChoice::Off,
                dma_mask: 0xffff_ffff,
                ..EduConfig::default()
            }))
        );
        for (pasid, pasid_bits) in [("on", 20), ("off", 0), ("6", 6), ("0", 0)] {
            let edu = EduConfig { pasid_bits, ..EduConfig::default() };
            assert_eq!(format!("edu,pasid={pasid}").parse(), Ok(DeviceConfig::Edu(edu)));
        }
        let edu = EduConfig { ats: true, pri: true, ..EduConfig::default() };
        assert_eq!("edu,pri=on,ats=on".parse(), Ok(DeviceConfig::Edu(edu)));
        let edu = EduConfig { stall: true, ..EduConfig::default() };
        assert_eq!("edu,stall=on".parse(), Ok(DeviceConfig::Edu(edu)));
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
                queues: 1,
                iommu: IommuChoice::Unsaid,
                bus: None,
            })
        );
        assert_eq!(
            "direct=on,path=disk,readonly=on,format=raw,queues=64,iommu=off".parse(),
            Ok(DiskConfig {
                path: "disk".into(),
                access: DiskAccess { read_only: true, direct: true, raw: true },
                queues: 64,
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
        refused::<VfioConfig>("iommu=off", "path=/sys/bus/pci/devices");
        refused::<VfioConfig>("path=/a,host=/b", "unknown key 'host'");
        refused::<DeviceConfig>("nvme", "unknown device 'nvme'");
        refused::<DeviceConfig>("edu,pasid=21", "pasid: 21 is more than the 20 bits a PASID has");
        refused::<DeviceConfig>("edu,pasid=yes", "or on, or off");
        refused::<DeviceConfig>("edu,mask=1", "unknown key 'mask'");
        refused::<DeviceConfig>("edu,pri=on", "pri=on needs ats=on");
        refused::<DeviceConfig>("edu,stall=on,ats=on", "stall=on needs ats=off");
        refused::<DiskConfig>("disk.img", "'disk.img'");
        refused::<DiskConfig>("readonly=on", "path=FILE is missing");
        refused::<DiskConfig>("path=a,readonly=yes", "readonly: 'yes'");
        refused::<DiskConfig>("path=a,format=qcow2", "format: 'qcow2': disks are raw");
        refused::<DiskConfig>("path=a,queues=0", "queues: '0': a disk has 1 to 64 queues");
        refused::<DiskConfig>("path=a,queues=65", "'65': a disk has 1 to 64");
        refused::<DiskConfig>("path=a,queues=many", "'many'");
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
