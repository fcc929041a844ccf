// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The option that adds virtual IOMMUs: `--iommu`.

use std::str::FromStr;

use super::options::{named, on_off, parse_number, small, Pairs};
use crate::config::{
    HostChoice, IommuConfig, IommuModel, SideCoreChoice, SideCoreConfig, SmmuV3Options, VtdOptions,
    DEV_IOMMU,
};
use twostage::nesting::vtd::Nesting;
use twostage::spec::smmuv3::regs::Httu;
use twostage::spec::smmuv3::translation::Granule;
use twostage::spec::vtd::HOST_ADDRESS_WIDTH;

impl FromStr for IommuConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (model, mut pairs) = named(text)?;
        let id = pairs.take("id", None, |text| id(text).map(Some))?;
        let address = pairs.take("addr", None, |text| register_page(text).map(Some))?;
        let host = pairs.take("host", HostChoice::default(), host)?;
        let side_core = side_core(&mut pairs)?;
        let model = match model {
            "vtd" => IommuModel::Vtd(vtd(&mut pairs, host == HostChoice::Emulated)?),
            "smmuv3" => IommuModel::SmmuV3(smmuv3(&mut pairs, host == HostChoice::Emulated)?),
            _ => return Err(format!("unknown IOMMU '{model}'; known: smmuv3, vtd")),
        };
        pairs.finish()?;
        Ok(Self { id, address, host, model, side_core })
    }
}

fn side_core(pairs: &mut Pairs<'_>) -> Result<SideCoreConfig, String> {
    let choice = pairs.take("side-core", SideCoreChoice::Off, |text| match text {
        "off" => Ok(SideCoreChoice::Off),
        "on" => Ok(SideCoreChoice::On),
        "auto" => Ok(SideCoreChoice::Auto),
        _ => Err(format!("'{text}' is none of off, on, auto")),
    })?;
    let number = |text: &str| usize::try_from(parse_number(text)?).map_err(|e| e.to_string());
    let cpu = pairs.take("side-cpu", None, |text| number(text).map(Some))?;
    match (choice, cpu) {
        (SideCoreChoice::Off, Some(_)) => {
            Err("side-cpu= is for the side core: say side-core=on or auto".into())
        }
        _ => Ok(SideCoreConfig { choice, cpu }),
    }
}

const PRI_ALONE: &str = "pri=on needs ats=on: devices without a device TLB make no page requests";

fn vtd(pairs: &mut Pairs<'_>, emulated: bool) -> Result<VtdOptions, String> {
    let default = VtdOptions::default();
    let second_stage = pairs.take("second-stage", None, |text| on_off(text).map(Some))?;
    let first_stage = pairs.take("first-stage", None, |text| on_off(text).map(Some))?;
    let nesting = nesting(pairs)?;
    if matches!(nesting, Nesting::Off { .. })
        && second_stage == Some(false)
        && first_stage != Some(true)
    {
        return Err(
            "second-stage=off leaves no tables that can be mirrored; say second-stage=on".into()
        );
    }
    let options = VtdOptions {
        address_width: pairs.take("aw", default.address_width, |text| match text {
            "48" => Ok(48),
            "57" => Ok(57),
            _ => Err(format!("'{text}' is neither 48 nor 57")),
        })?,
        pasid_bits: pairs
            .take("pasid-bits", default.pasid_bits, |text| pasid_bits(text).map(Some))?,
        first_stage,
        second_stage,
        nest: nest(pairs, emulated, second_stage != Some(false))?,
        nesting,
        ats: pairs.take("ats", default.ats, on_off)?,
        pri: pairs.take("pri", default.pri, on_off)?,
        caching_mode: caching_mode(pairs, default.caching_mode, emulated)?,
        interrupt_remapping: pairs
            .take("intremap", default.interrupt_remapping, |text| on_off(text).map(Some))?,
        sanitize: sanitize(pairs, emulated)?,
    };
    if options.pri && !options.ats {
        return Err(PRI_ALONE.into());
    }
    if options.sanitize && matches!(nesting, Nesting::Off { .. }) {
        return Err("sanitize=on needs nesting=auto or on: no cache has entries of the guest's \
                    tables when they are mirrored"
            .into());
    }
    Ok(options)
}

fn nesting(pairs: &mut Pairs<'_>) -> Result<Nesting, String> {
    let pieces = pairs.take("shadow-pieces", None, |text| match parse_number(text)? {
        0 => Err("0 mappings serve no table; say nesting=on to have no mirrors".into()),
        pieces => Ok(Some(pieces)),
    })?;
    let wanted = pieces.unwrap_or(Nesting::PIECES);
    let nesting = pairs.take("nesting", Nesting::Auto { pieces: wanted }, |text| match text {
        "auto" => Ok(Nesting::Auto { pieces: wanted }),
        "on" => Ok(Nesting::On),
        "off" => Ok(Nesting::Off { pieces: wanted }),
        _ => Err(format!("'{text}' is none of auto, on, off")),
    })?;
    match (nesting, pieces) {
        (Nesting::On, Some(_)) => {
            Err("shadow-pieces= is for mirrored tables: say nesting=auto or off".into())
        }
        _ => Ok(nesting),
    }
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
        httu: pairs.take("httu", default.httu, |text| httu(text).map(Some))?,
        ats: pairs.take("ats", default.ats, on_off)?,
        pri: of_emulated(pairs, "pri", emulated)?,
        stall: of_emulated(pairs, "stall", emulated)?,
        sanitize: sanitize(pairs, emulated)?,
    };
    if options.pri && !options.ats {
        return Err(PRI_ALONE.into());
    }
    let narrow = options.granules.as_ref().is_some_and(|some| !some.contains(&Granule::K64));
    if options.address_width == 52 && narrow {
        return Err("aw=52 needs the granule of 64 KiB: add 64K to granules=, or say aw=48".into());
    }
    Ok(options)
}

/// Takes what a kernel does not have for the guest of an SMMUv3.
fn of_emulated(pairs: &mut Pairs<'_>, key: &'static str, emulated: bool) -> Result<bool, String> {
    let on = pairs.take(key, false, on_off)?;
    if on && !emulated {
        // Nesting refuses it, too; here before any device is touched.
        return Err(format!(
            "{key}=on needs host=emulated: a kernel gives neither page requests nor stalled \
             transactions of an SMMUv3 to a guest; say {key}=off"
        ));
    }
    Ok(on)
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

/// Flags that are updated in the guest's tables.
fn httu(text: &str) -> Result<Httu, String> {
    let known = [Httu::None, Httu::Access, Httu::Dirty];
    let found = known.into_iter().find(|httu| httu.to_string() == text);
    found.ok_or_else(|| format!("'{text}' is none of off, access, dirty"))
}

/// Width of PASIDs.
pub(super) fn pasid_bits(text: &str) -> Result<u8, String> {
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

#[cfg(test)]
mod tests {
    use super::super::options::testing::refused;
    use super::*;

    #[test]
    fn options_are_understood() {
        assert_eq!("vtd".parse(), Ok(IommuConfig::default()));
        assert_eq!(
            "vtd,id=a,aw=57,pasid-bits=16,addr=0xfed00000,first-stage=on,second-stage=off,nest=off,\
             ats=on,pri=on,nesting=on,caching-mode=off,intremap=on,sanitize=on"
                .parse(),
            Ok(IommuConfig {
                id: Some("a".to_owned()),
                address: Some(0xfed0_0000),
                host: HostChoice::Emulated,
                model: IommuModel::Vtd(VtdOptions {
                    address_width: 57,
                    pasid_bits: Some(16),
                    first_stage: Some(true),
                    second_stage: Some(false),
                    nest: false,
                    nesting: Nesting::On,
                    ats: true,
                    pri: true,
                    caching_mode: false,
                    interrupt_remapping: Some(true),
                    sanitize: true,
                }),
                side_core: SideCoreConfig::default(),
            })
        );
        let nest = VtdOptions { nest: true, ..VtdOptions::default() };
        assert_eq!("vtd,nest=on".parse(), Ok(IommuConfig::from(nest)));
        let kernel = "vtd,host=/dev/iommu".parse::<IommuConfig>().unwrap();
        assert_eq!(kernel.host, HostChoice::Kernel(DEV_IOMMU.into()));
        assert_eq!(kernel.model, IommuModel::Vtd(VtdOptions::default()));
        for (text, nesting) in [
            ("vtd,nesting=off", Nesting::Off { pieces: 1 << 20 }),
            ("vtd,shadow-pieces=77,nesting=off", Nesting::Off { pieces: 77 }),
            ("vtd,shadow-pieces=0x10", Nesting::Auto { pieces: 16 }),
        ] {
            let options = VtdOptions { nesting, ..VtdOptions::default() };
            assert_eq!(text.parse(), Ok(IommuConfig::from(options)));
        }
        assert_eq!("smmuv3".parse(), Ok(IommuConfig::from(SmmuV3Options::default())));
        let sanitize = SmmuV3Options { sanitize: true, ..SmmuV3Options::default() };
        assert_eq!("smmuv3,sanitize=on".parse(), Ok(IommuConfig::from(sanitize)));
        let faults = SmmuV3Options { ats: true, pri: true, stall: true, ..Default::default() };
        assert_eq!("smmuv3,ats=on,pri=on,stall=on".parse(), Ok(IommuConfig::from(faults)));
        assert_eq!(
            "smmuv3,id=s,addr=0xa000000,host=/dev/iommu,ats=on,pasid-bits=4,aw=52,\
             granules=4K+64K,ril=off,httu=access,side-core=auto,side-cpu=1"
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
                    httu: Some(Httu::Access),
                    ats: true,
                    pri: false,
                    stall: false,
                    sanitize: false,
                }),
                side_core: SideCoreConfig { choice: SideCoreChoice::Auto, cpu: Some(1) },
            })
        );
    }

    #[test]
    fn mistakes_are_named() {
        refused::<IommuConfig>("smmu", "unknown IOMMU 'smmu'");
        refused::<IommuConfig>("smmuv3,caching-mode=on", "unknown key 'caching-mode'");
        refused::<IommuConfig>("vtd,host=/dev/iommu,caching-mode=off", "say caching-mode=on");
        refused::<IommuConfig>("vtd,nesting=off,second-stage=off", "say second-stage=on");
        refused::<IommuConfig>("vtd,nesting=maybe", "none of auto, on, off");
        refused::<IommuConfig>("vtd,shadow-pieces=0", "0 mappings");
        refused::<IommuConfig>("vtd,nesting=on,shadow-pieces=5", "say nesting=auto or off");
        refused::<IommuConfig>("vtd,nesting=off,sanitize=on", "sanitize=on needs nesting=auto");
        refused::<IommuConfig>("vtd,host=/dev/iommu,nest=on", "nest=on needs host=emulated");
        refused::<IommuConfig>("vtd,second-stage=off,nest=on", "nest=on needs second-stage=on");
        refused::<IommuConfig>("smmuv3,nest=on", "unknown key 'nest'");
        refused::<IommuConfig>("smmuv3,aw=57", "aw: '57' is neither 48 nor 52");
        refused::<IommuConfig>("smmuv3,granules=4K+8K", "granules: '8K' is none of 4K, 16K, 64K");
        refused::<IommuConfig>("smmuv3,granules=4K,aw=52", "add 64K to granules=");
        refused::<IommuConfig>("smmuv3,ril=auto", "ril: 'auto'");
        refused::<IommuConfig>("smmuv3,httu=on", "httu: 'on' is none of off, access, dirty");
        refused::<IommuConfig>("vtd,aw=39", "aw: '39'");
        refused::<IommuConfig>("vtd,pasid-bits=21", "21 is more");
        refused::<IommuConfig>("vtd,addr=0xfed90001", "multiple of 4096");
        refused::<IommuConfig>("vtd,addr=0x10000000000000", "more than 52 bits");
        refused::<IommuConfig>("vtd,ats=maybe", "ats: 'maybe'");
        refused::<IommuConfig>("vtd,pri=on", "pri=on needs ats=on");
        refused::<IommuConfig>("smmuv3,pri=on", "pri=on needs ats=on");
        let kernel = "stall=on needs host=emulated";
        refused::<IommuConfig>("smmuv3,stall=on,host=/dev/iommu", kernel);
        refused::<IommuConfig>("vtd,intremap=auto", "intremap: 'auto'");
        refused::<IommuConfig>("vtd,side-core=yes", "'yes' is none of off, on, auto");
        refused::<IommuConfig>("vtd,side-cpu=1", "say side-core=on or auto");
        refused::<IommuConfig>("vtd,", "key=value");
        refused::<IommuConfig>("vtd,id=on", "id: 'on'");
        refused::<IommuConfig>("vtd,host=kernel", "neither emulated nor a path");
        refused::<IommuConfig>("vtd,host=/dev/iommu,sanitize=on", "sanitize=on needs");
        refused::<IommuConfig>("smmuv3,sanitize=on,host=/dev/iommu", "sanitize=on needs");
    }
}
