// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--disk`, `--net` and `--rng`.

use std::path::PathBuf;
use std::str::FromStr;

use super::options::{iommu, on_off, Pairs};
use crate::config::{DiskConfig, NetConfig, RngConfig, TapConfig};
use crate::devices::virtio::DiskAccess;

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
        let config = Self { tap, mac, iommu: iommu(&mut pairs)? };
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
        };
        pairs.finish()?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::super::options::testing::refused;
    use super::*;
    use crate::config::IommuChoice;
    use crate::devices::virtio::MacAddress;

    #[test]
    fn options_are_understood() {
        assert_eq!(
            "path=/a=b.img".parse(),
            Ok(DiskConfig {
                path: "/a=b.img".into(),
                access: DiskAccess::default(),
                iommu: IommuChoice::Unsaid,
            })
        );
        assert_eq!(
            "direct=on,path=disk,readonly=on,format=raw,iommu=off".parse(),
            Ok(DiskConfig {
                path: "disk".into(),
                access: DiskAccess { read_only: true, direct: true, raw: true },
                iommu: IommuChoice::Off,
            })
        );
        let (tap, mac) = (TapConfig::Name("tap0".into()), Some(MacAddress::local(9)));
        assert_eq!(
            "tap=tap0,mac=02:74:73:00:00:09,iommu=on".parse(),
            Ok(NetConfig { tap, mac, iommu: IommuChoice::First })
        );
        let tap = TapConfig::Fd(3);
        assert_eq!("fd=3".parse(), Ok(NetConfig { tap, mac: None, iommu: IommuChoice::Unsaid }));
        let (source, iommu) = ("/dev/urandom".into(), IommuChoice::Named("b".into()));
        assert_eq!("src=/dev/urandom,iommu=b".parse(), Ok(RngConfig { source, iommu }));
    }

    #[test]
    fn mistakes_are_named() {
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
    }
}
