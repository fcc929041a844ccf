// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Checks of a configuration that involve several parts.

use std::collections::BTreeMap;

use super::error::ConfigError;
use super::{
    DeviceConfig, HostChoice, IommuChoice, IommuModel, MachineConfig, Place, SideCoreChoice,
    DEV_IOMMU,
};
use crate::arch;
use crate::memory;
use twostage::viommu::bridges::conventional;

impl MachineConfig {
    /// Checks what the parts cannot check separately. Devices are counted from 1, as in the errors.
    ///
    /// # Errors
    /// The first contradiction.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.vcpus == 0 {
            return Err(ConfigError::NoVcpus);
        }
        let places = self.places()?;
        self.validate_iommus()?;
        self.validate_devices()?;
        self.validate_requesters(&places)
    }

    fn validate_iommus(&self) -> Result<(), ConfigError> {
        for (number, iommu) in self.iommus.iter().enumerate() {
            let (id, address) = (self.iommu_id(number), self.iommu_address(number));
            if iommu.model.name() != arch::IOMMU {
                return Err(ConfigError::OtherArchitecture(iommu.model.name()));
            }
            let length = iommu.model.registers();
            let page = iommu.model.page();
            if address % page != 0 {
                return Err(ConfigError::Unaligned(address, page));
            }
            if let Some(occupant) = memory::occupant(self.memory, address) {
                return Err(ConfigError::RegisterPage(address, occupant));
            }
            for other in 0..number {
                if self.iommu_id(other) == id {
                    return Err(ConfigError::SameIommu(id));
                }
                if self.iommu_address(other).abs_diff(address) < length {
                    return Err(ConfigError::SameRegisterPage(address, self.iommu_id(other)));
                }
            }
            if self.iommus.iter().any(|other| other.host != iommu.host) {
                return Err(ConfigError::SeveralHosts);
            }
            let remapping = iommu.model.vtd().and_then(|vtd| vtd.interrupt_remapping);
            if remapping.is_some() && remapping != self.interrupt_remapping() {
                return Err(ConfigError::SomeInterruptsRemapped);
            }
        }
        self.validate_side_core()
    }

    fn validate_side_core(&self) -> Result<(), ConfigError> {
        let all = self.iommus.iter().map(|iommu| iommu.side_core);
        let mut served = all.filter(|side_core| side_core.choice != SideCoreChoice::Off);
        let Some(first) = served.next() else { return Ok(()) };
        for other in served {
            if other.choice != first.choice {
                return Err(ConfigError::SeveralSideCores("side-core="));
            }
            if other.cpu != first.cpu {
                return Err(ConfigError::SeveralSideCores("side-cpu="));
            }
        }
        Ok(())
    }

    fn validate_devices(&self) -> Result<(), ConfigError> {
        for (number, device) in (1..).zip(&self.devices) {
            self.validate_host(device)?;
            let (choice, option) = (device.iommu(), device.option());
            let iommu = self.iommu_of(choice).and_then(|number| self.iommus.get(number));
            match (choice, iommu) {
                (IommuChoice::First, None) => return Err(ConfigError::NoIommu(option, number)),
                (IommuChoice::Named(id), None) => {
                    return Err(ConfigError::UnknownIommu(
                        option,
                        number,
                        id.clone(),
                        self.iommu_ids(),
                    ));
                }
                (_, None) if device.pasid() => return Err(ConfigError::PasidWithoutIommu(number)),
                (_, Some(iommu)) if device.pasid() && iommu.model.pasid_bits() == Some(0) => {
                    return Err(ConfigError::NoPasidBits(number));
                }
                _ => {}
            }
            let offers = |has: fn(&IommuModel) -> bool| iommu.is_some_and(|it| has(&it.model));
            if device.ats() && !offers(IommuModel::ats) {
                return Err(ConfigError::NotOffered(number, "ats"));
            }
            if device.pri() && !offers(IommuModel::page_requests) {
                return Err(ConfigError::NotOffered(number, "pri"));
            }
            if device.stall() && !offers(IommuModel::stalls) {
                return Err(ConfigError::NotOffered(number, "stall"));
            }
        }
        Ok(())
    }

    /// Checks what is behind bridges to conventional PCI.
    fn validate_requesters(&self, places: &[Place]) -> Result<(), ConfigError> {
        let mut iommus = BTreeMap::new();
        for (number, (device, place)) in (1..).zip(self.devices.iter().zip(places)) {
            let (Some(bus), Some(_)) = (device.bus(), conventional(&place.bridges)) else {
                continue;
            };
            let (option, bus) = (device.option(), bus.to_owned());
            if matches!(device, DeviceConfig::Vfio(_)) {
                return Err(ConfigError::NotConventional(option, number, bus, "assigned devices"));
            }
            let conventional_has_none =
                [(device.pasid(), "PASIDs"), (device.ats(), "ATS"), (device.stall(), "stalls")];
            if let Some((_, what)) = conventional_has_none.into_iter().find(|(has, _)| *has) {
                return Err(ConfigError::NotConventional(option, number, bus, what));
            }
            let iommu = self.iommu_of(device.iommu());
            if *iommus.entry(place.rid()).or_insert(iommu) != iommu {
                return Err(ConfigError::SharedRequester(option, number, bus));
            }
        }
        Ok(())
    }

    /// Checks that the virtual IOMMU of `device` has the right host for it.
    fn validate_host(&self, device: &DeviceConfig) -> Result<(), ConfigError> {
        if let DeviceConfig::Vfio(vfio) = device {
            let paths = self.devices.iter().filter_map(|device| match device {
                DeviceConfig::Vfio(vfio) => Some(&vfio.path),
                _ => None,
            });
            if paths.filter(|path| **path == vfio.path).count() > 1 {
                return Err(ConfigError::SameDevice(vfio.path.display().to_string()));
            }
        }
        let Some(iommu) = self.iommu_of(device.iommu()) else { return Ok(()) };
        match (device, self.iommus.get(iommu).map(|iommu| &iommu.host)) {
            (DeviceConfig::Vfio(vfio), Some(HostChoice::Emulated)) => {
                let (name, id) = (vfio.name(), self.iommu_id(iommu));
                Err(ConfigError::WrongHost(format!(
                    "--vfio {name}: {id} translates for devices of this process only; --iommu with \
                     host={DEV_IOMMU} takes devices of this machine, too (or --vfio with iommu=off)"
                )))
            }
            _ => Ok(()),
        }
    }

    /// The names of the virtual IOMMUs, for an error.
    fn iommu_ids(&self) -> String {
        let ids: Vec<_> = (0..self.iommus.len()).map(|number| self.iommu_id(number)).collect();
        if ids.is_empty() {
            return "no --iommu at all".to_owned();
        }
        ids.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::layout::IOMMU_REGISTERS;
    use crate::config::{
        testing, EduConfig, IommuConfig, RngConfig, SmmuV3Options, VfioConfig, VtdOptions,
    };
    use twostage::viommu::vtd::MMIO_SIZE;

    fn machine(iommus: &[IommuConfig], edu: EduConfig) -> MachineConfig {
        let devices = vec![DeviceConfig::Edu(EduConfig::default()), DeviceConfig::Edu(edu)];
        MachineConfig { iommus: iommus.to_vec(), devices, ..testing::machine() }
    }

    #[test]
    fn ats_and_page_requests_need_an_iommu_that_offers_them() {
        let with = |iommu_ats, ats, pri| {
            let vtd = VtdOptions { ats: iommu_ats, ..VtdOptions::default() };
            machine(&[vtd.into()], EduConfig { ats, pri, ..EduConfig::default() }).validate()
        };
        assert_eq!(with(true, true, false), Ok(()));
        assert_eq!(with(false, true, false), Err(ConfigError::NotOffered(2, "ats")));
        assert_eq!(with(true, true, true), Err(ConfigError::NotOffered(2, "pri")));
        let both = VtdOptions { ats: true, pri: true, ..VtdOptions::default() };
        let edu = EduConfig { ats: true, pri: true, ..EduConfig::default() };
        assert_eq!(machine(&[both.into()], edu).validate(), Ok(()));
        let bare = machine(&[], EduConfig { ats: true, ..EduConfig::default() });
        assert_eq!(bare.validate(), Err(ConfigError::NotOffered(2, "ats")));
        let stalled = EduConfig { stall: true, ..EduConfig::default() };
        let stall = machine(&[VtdOptions::default().into()], stalled);
        assert_eq!(stall.validate(), Err(ConfigError::NotOffered(2, "stall")));
    }

    fn edu(iommu: IommuChoice, pasid: bool) -> EduConfig {
        EduConfig { iommu, pasid_bits: u8::from(pasid), ..EduConfig::default() }
    }

    fn named(id: &str) -> IommuConfig {
        IommuConfig { id: Some(id.to_owned()), ..IommuConfig::default() }
    }

    #[test]
    fn contradictions_are_named() {
        use IommuChoice::{First, Named, Off, Unsaid};
        let vtd = [IommuConfig::default()];
        let no_pasid = [VtdOptions { pasid_bits: Some(0), ..VtdOptions::default() }.into()];
        let no_such = |ids: &str| {
            ConfigError::UnknownIommu("--device", 2, "other".to_owned(), ids.to_owned())
        };
        for (iommus, edu, error) in [
            (&[][..], edu(First, false), ConfigError::NoIommu("--device", 2)),
            (&[], edu(Unsaid, true), ConfigError::PasidWithoutIommu(2)),
            (&[], edu(Named("other".into()), true), no_such("no --iommu at all")),
            (&vtd, edu(Named("other".into()), false), no_such("vtd0")),
            (&vtd, edu(Off, true), ConfigError::PasidWithoutIommu(2)),
            (&no_pasid, edu(Unsaid, true), ConfigError::NoPasidBits(2)),
        ] {
            assert_eq!(machine(iommus, edu).validate(), Err(error));
        }
        for (iommus, edu) in [
            (&[][..], edu(Unsaid, false)),
            (&[], edu(Off, false)),
            (&vtd, edu(Unsaid, true)),
            (&vtd, edu(Named("vtd0".into()), true)),
            (&vtd, edu(Off, false)),
            (&no_pasid, edu(First, false)),
        ] {
            assert_eq!(machine(iommus, edu).validate(), Ok(()));
        }
    }

    #[test]
    fn a_device_is_behind_an_iommu_whose_host_can_have_it() {
        let kernel = HostChoice::Kernel(DEV_IOMMU.into());
        let kernel = IommuConfig { host: kernel, ..IommuConfig::default() };
        let vfio = |path: &str, iommu| {
            let (path, id, bus) = (path.into(), None, None);
            DeviceConfig::Vfio(VfioConfig { path, id, iommu, bus })
        };
        let (off, unsaid) = (IommuChoice::Off, IommuChoice::Unsaid);
        let edu = |iommu| DeviceConfig::Edu(edu(iommu, false));
        for (iommus, devices, hint) in [
            (vec![IommuConfig::default()], vec![vfio("/a", unsaid.clone())], "host=/dev/iommu"),
            (vec![], vec![vfio("/a", off.clone()), vfio("/a", off.clone())], "/a is given twice"),
            (vec![kernel.clone(), IommuConfig::default()], vec![], "the same for all"),
        ] {
            let config = MachineConfig { iommus, devices, ..testing::machine() };
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(hint), "{error}");
        }
        for (iommus, devices, host) in [
            (vec![kernel.clone()], vec![vfio("/a", unsaid.clone()), edu(off.clone())], true),
            (vec![kernel], vec![vfio("/a", unsaid.clone()), edu(unsaid.clone())], true),
            (vec![IommuConfig::default()], vec![vfio("/a", off.clone()), edu(unsaid)], true),
            (vec![], vec![vfio("/a", off)], true),
            (vec![IommuConfig::default()], vec![], false),
        ] {
            let config = MachineConfig { iommus, devices, ..testing::machine() };
            assert_eq!(config.validate(), Ok(()));
            assert_eq!(config.kernel_host(), host.then(|| DEV_IOMMU.into()));
        }
    }

    #[test]
    fn the_register_page_needs_a_place_of_its_own() {
        let at = |address| {
            let iommu = IommuConfig { address: Some(address), ..IommuConfig::default() };
            machine(&[iommu, IommuConfig::default()], EduConfig::default()).validate()
        };
        assert_eq!(at(IOMMU_REGISTERS), Ok(()));
        assert_eq!(at(0x1000), Err(ConfigError::RegisterPage(0x1000, "RAM")));
        assert_eq!(at(0xe000_0000), Err(ConfigError::RegisterPage(0xe000_0000, "PCI memory")));
        let second = IOMMU_REGISTERS + MMIO_SIZE;
        assert_eq!(at(second), Err(ConfigError::SameRegisterPage(second, "vtd0".into())));
    }

    #[test]
    fn each_of_several_iommus_has_a_name_and_a_place() {
        let config = machine(&[named("first"), IommuConfig::default()], EduConfig::default());
        assert_eq!(config.validate(), Ok(()));
        assert_eq!((config.iommu_id(0), config.iommu_id(1)), ("first".into(), "vtd1".into()));
        let places = (config.iommu_address(0), config.iommu_address(1));
        assert_eq!(places, (IOMMU_REGISTERS, IOMMU_REGISTERS + MMIO_SIZE));
        for (choice, number) in [
            (IommuChoice::Unsaid, Some(0)),
            (IommuChoice::First, Some(0)),
            (IommuChoice::Named("first".into()), Some(0)),
            (IommuChoice::Named("vtd1".into()), Some(1)),
            (IommuChoice::Named("vtd0".into()), None),
            (IommuChoice::Off, None),
        ] {
            assert_eq!(config.iommu_of(&choice), number, "{choice:?}");
        }
        // A name that the other one has by default.
        let config = machine(&[named("vtd1"), IommuConfig::default()], EduConfig::default());
        assert_eq!(config.validate(), Err(ConfigError::SameIommu("vtd1".into())));
    }

    #[test]
    fn a_virtio_device_outside_has_its_interrupts_remapped() {
        let vtd = IommuConfig::default();
        let config = machine(&[vtd.clone(), vtd], EduConfig::default());
        let rng =
            |iommu| DeviceConfig::Rng(RngConfig { source: "source".into(), iommu, bus: None });
        let second = || IommuChoice::Named("vtd1".into());
        for (device, unit) in [
            (rng(IommuChoice::Off), Some(0)),
            (rng(second()), Some(1)),
            (DeviceConfig::Edu(edu(IommuChoice::Off, false)), None),
            (DeviceConfig::Edu(edu(second(), false)), Some(1)),
        ] {
            assert_eq!(config.interrupt_iommu_of(&device), unit, "{device:?}");
        }
        let bare = machine(&[], EduConfig::default());
        assert_eq!(bare.interrupt_iommu_of(&rng(IommuChoice::Off)), None);
        let smmu = machine(&[SmmuV3Options::default().into()], EduConfig::default());
        assert_eq!(smmu.interrupt_iommu_of(&rng(IommuChoice::Off)), None);
        assert_eq!(smmu.interrupt_iommu_of(&rng(IommuChoice::Unsaid)), Some(0));
    }

    #[test]
    fn a_guest_is_told_of_its_architecture_s_iommu_alone() {
        let smmu = machine(&[SmmuV3Options::default().into()], EduConfig::default());
        let error = smmu.validate().unwrap_err();
        assert_eq!(error, ConfigError::OtherArchitecture("smmuv3"));
        assert!(error.to_string().contains("has vtd only"), "{error}");
    }

    #[test]
    fn interrupts_are_remapped_for_all_or_for_none() {
        let remapping = |interrupt_remapping| {
            VtdOptions { interrupt_remapping, ..VtdOptions::default() }.into()
        };
        let both = |first, second| {
            let config = machine(&[remapping(first), remapping(second)], EduConfig::default());
            config.validate().map(|()| config.interrupt_remapping())
        };
        assert_eq!(both(None, None), Ok(None));
        assert_eq!(both(None, Some(false)), Ok(Some(false)));
        assert_eq!(both(Some(true), None), Ok(Some(true)));
        assert_eq!(both(Some(true), Some(false)), Err(ConfigError::SomeInterruptsRemapped));
    }

    #[test]
    fn a_machine_has_vcpus_and_a_bus_of_limited_length() {
        let mut config = machine(&[], EduConfig::default());
        config.vcpus = 0;
        assert_eq!(config.validate(), Err(ConfigError::NoVcpus));
        config.vcpus = 1;
        config.devices = vec![DeviceConfig::Edu(EduConfig::default()); 32];
        assert_eq!(config.validate(), Err(ConfigError::TooManyDevices(32)));
    }
}
