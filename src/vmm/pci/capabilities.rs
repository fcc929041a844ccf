// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The capabilities of emulated functions and ports: MSI, PCI Express, ACS, PASID, ATS, PRI.

use super::layout::*;
use super::ConfigSpace;
use twostage::viommu::MsiMessage;

/// An MSI capability: one vector, a 64-bit address, no masking.
#[derive(Debug, Clone, Copy)]
pub struct MsiCapability {
    offset: u16,
}

/// Message address, from the start of the capability.
const MSI_ADDRESS: u16 = 4;
const MSI_ADDRESS_HIGH: u16 = 8;
const MSI_DATA: u16 = 12;

impl MsiCapability {
    /// Adds the capability to `config`.
    pub fn add(config: &mut ConfigSpace) -> Self {
        let control = MsiControl::new().with_address_64(true).into_bits().to_le_bytes();
        let changeable =
            MsiControl::new().with_enable(true).with_multiple_message_enable(7).into_bits();
        let mut body = [0; 12];
        body[..2].copy_from_slice(&control);
        let mut writable = [0xff; 12];
        writable[..2].copy_from_slice(&changeable.to_le_bytes());
        // The low two bits of the address are zero.
        writable[2] = 0xfc;
        Self { offset: config.add_capability(CAPABILITY_MSI, &body, &writable) }
    }

    /// The message, if MSI is enabled.
    pub fn message(&self, config: &ConfigSpace) -> Option<MsiMessage> {
        MsiControl::from_bits(config.u16(self.offset + 2)).enable().then(|| MsiMessage {
            address: u64::from(config.u32(self.offset + MSI_ADDRESS))
                | u64::from(config.u32(self.offset + MSI_ADDRESS_HIGH)) << 32,
            data: config.u16(self.offset + MSI_DATA).into(),
        })
    }
}

/// The PCI Express capability (§7.5.3) of an endpoint with function-level reset: one with a link
/// if it is behind a port, and otherwise integrated in the root complex. Without it software looks
/// for no extended capabilities. A function of conventional PCI has none.
#[derive(Debug, Clone, Copy)]
pub struct ExpressCapability {
    offset: Option<u16>,
}

/// Version of the PCI Express capability, and the length that it has.
const EXPRESS_VERSION: u16 = 2;
const EXPRESS_LENGTH: usize = 0x3c;

/// Adds the PCI Express capability of a function of `kind` with these device capabilities, of whose
/// device control software can write `control`. Returns its offset.
pub(super) fn add_express(config: &mut ConfigSpace, kind: u16, device: u32, control: u16) -> u16 {
    let body = [0; EXPRESS_LENGTH - 2];
    // All bytes up to device control, which is the last that software can change.
    let mut writable = [0; EXPRESS_DEVICE_CONTROL as usize];
    writable[EXPRESS_DEVICE_CONTROL as usize - 2..].copy_from_slice(&control.to_le_bytes());
    let offset = config.add_capability(CAPABILITY_EXPRESS, &body, &writable);
    config.set_u16(offset + EXPRESS_CAPABILITIES, EXPRESS_VERSION | kind);
    config.set_u32(offset + EXPRESS_DEVICE_CAPABILITIES, EXPRESS_ROLE_BASED_ERRORS | device);
    if kind != EXPRESS_TO_PCI {
        config.set_u32(offset + EXPRESS_DEVICE_CAPABILITIES_2, EXPRESS_END_END_TLP_PREFIX);
    }
    if kind != EXPRESS_INTEGRATED_ENDPOINT {
        add_link(config, offset);
    }
    config.set_u16(STATUS, config.u16(STATUS) | STATUS_IMMEDIATE_READINESS);
    offset
}

impl ExpressCapability {
    /// Adds the capability to `config`. Only the bit that resets the function can be written.
    pub fn add(config: &mut ConfigSpace) -> Self {
        let kind = match config.way() {
            Some(way) if way.is_conventional() => return Self { offset: None },
            Some(_) => EXPRESS_ENDPOINT,
            None => EXPRESS_INTEGRATED_ENDPOINT,
        };
        let offset = add_express(config, kind, EXPRESS_FLR_CAPABLE, EXPRESS_INITIATE_FLR);
        Self { offset: Some(offset) }
    }

    /// Whether software has initiated a function-level reset, which [`ConfigSpace::reset`] is a
    /// part of and ends.
    pub fn reset_initiated(&self, config: &ConfigSpace) -> bool {
        self.offset.is_some_and(|offset| {
            config.u16(offset + EXPRESS_DEVICE_CONTROL) & EXPRESS_INITIATE_FLR != 0
        })
    }
}

/// Makes the PCI Express capability at `offset` of `config`, of an integrated endpoint, that of one
/// with a link.
pub fn make_endpoint(config: &mut ConfigSpace, offset: u16) {
    let version = config.u16(offset + EXPRESS_CAPABILITIES) & !EXPRESS_KIND;
    config.set_u16(offset + EXPRESS_CAPABILITIES, version | EXPRESS_ENDPOINT);
    add_link(config, offset);
}

/// Gives the PCI Express capability at `offset` of `config` a link, which is up.
fn add_link(config: &mut ConfigSpace, offset: u16) {
    config.set_u32(offset + EXPRESS_LINK_CAPABILITIES, EXPRESS_LINK_2_5_GT_X1.into());
    config.set_u16(offset + EXPRESS_LINK_STATUS, EXPRESS_LINK_2_5_GT_X1);
}

/// Access control services (§7.7.11): source validation, and redirection of requests and
/// completions to the root complex, also of those that would go up. They hold whether software
/// enables them or not: no request reaches another function past the IOMMU.
const ACS: u16 = 0b1_1101;

/// Adds the ACS extended capability of a port to `config`.
pub(super) fn add_access_control(config: &mut ConfigSpace) {
    let [low, high] = ACS.to_le_bytes();
    let (body, writable) = ([low, high, 0, 0], [0, 0, low, high]);
    config.add_extended_capability(EXTENDED_CAPABILITY_ACS, 1, &body, &writable);
}

/// A PASID extended capability.
#[derive(Debug, Clone, Copy)]
pub struct PasidCapability {
    offset: u16,
    /// What software can enable.
    control: PasidControl,
}

impl PasidCapability {
    /// Adds the capability to `config`, with PASIDs of at most 20 bits.
    pub fn add(config: &mut ConfigSpace, capabilities: PasidCapabilities) -> Self {
        let control = PasidControl::new()
            .with_enable(true)
            .with_execute_permission(capabilities.execute_permission())
            .with_privileged_mode(capabilities.privileged_mode());
        let [c0, c1] = capabilities.into_bits().to_le_bytes();
        let [w0, w1] = control.into_bits().to_le_bytes();
        let offset = config.add_extended_capability(
            EXTENDED_CAPABILITY_PASID,
            1,
            &[c0, c1, 0, 0],
            &[0, 0, w0, w1],
        );
        Self { offset, control }
    }

    /// Whether requests may carry a PASID.
    pub fn enabled(&self, config: &ConfigSpace) -> bool {
        PasidControl::from_bits(config.u16(self.offset + 6)).enable()
    }

    /// Whether software may change that: the result is undefined while ATS is enabled (§7.8.9.3);
    /// here it is ignored.
    pub fn lock(&self, config: &mut ConfigSpace, locked: bool) {
        let control = if locked { PasidControl::new() } else { self.control };
        config.allow(self.offset + 6, &control.into_bits().to_le_bytes());
    }
}

/// An ATS extended capability.
#[derive(Debug, Clone, Copy)]
pub struct AtsCapability {
    offset: u16,
}

impl AtsCapability {
    /// Adds the capability to `config`.
    pub fn add(config: &mut ConfigSpace, capabilities: AtsCapabilities) -> Self {
        let [c0, c1] = capabilities.into_bits().to_le_bytes();
        let body = [c0, c1, 0, 0];
        let offset = config.add_extended_capability(EXTENDED_CAPABILITY_ATS, 1, &body, &[0; 4]);
        let capability = Self { offset };
        capability.lock(config, false);
        capability
    }

    /// Whether the device may cache translations.
    pub fn enabled(&self, config: &ConfigSpace) -> bool {
        AtsControl::from_bits(config.u16(self.offset + 6)).enable()
    }

    /// Whether software can change the smallest translation unit: not while ATS is enabled. Its
    /// value does not matter, as every translation is of at least 4096 bytes.
    pub fn lock(&self, config: &mut ConfigSpace, locked: bool) {
        let unit = if locked { 0 } else { 0b1_1111 };
        let control = AtsControl::new().with_smallest_unit(unit).with_enable(true).into_bits();
        config.allow(self.offset + 6, &control.to_le_bytes());
    }
}

/// A PRI extended capability. Response failures and unexpected responses never get to the device:
/// IOMMUs answer it, and only what it has requested. A guest's response failure (code 15) comes as
/// an invalid request (1), as user space of a host has no other: the device may ask again, and RF
/// stays clear.
#[derive(Debug, Clone, Copy)]
pub struct PriCapability {
    offset: u16,
}

/// From the start of the PRI capability.
const PRI_CONTROL: u16 = 4;
const PRI_STATUS: u16 = 6;
const PRI_CAPACITY: u16 = 8;
const PRI_ALLOCATION: u16 = 12;

impl PriCapability {
    /// Adds the capability to `config`, for a device that has at most `capacity` page requests
    /// without a response; `pasid`: it has the PASID capability.
    pub fn add(config: &mut ConfigSpace, capacity: u32, pasid: bool) -> Self {
        let offset = config.add_extended_capability(EXTENDED_CAPABILITY_PRI, 1, &[0; 12], &[0; 12]);
        config.set_u32(offset + PRI_CAPACITY, capacity);
        let (capability, control) = (Self { offset }, PageRequestControl::new());
        let control = control.with_enable(true).with_reset(true).into_bits();
        config.allow(offset + PRI_CONTROL, &control.to_le_bytes());
        capability.lock(config, false);
        let status = PageRequestStatus::new().with_response_pasid_required(pasid);
        config.set_u16(offset + PRI_STATUS, status.with_stopped(true).into_bits());
        capability
    }

    /// Whether the device may make page requests.
    pub fn enabled(&self, config: &ConfigSpace) -> bool {
        self.control(config).enable()
    }

    /// How many page requests may be without a response.
    pub fn allocation(&self, config: &ConfigSpace) -> u32 {
        config.u32(self.offset + PRI_ALLOCATION)
    }

    /// Whether software can change how many: not while the interface is enabled (§10.5.2.5 leaves
    /// that undefined).
    pub fn lock(&self, config: &mut ConfigSpace, locked: bool) {
        let mask = if locked { 0 } else { u32::MAX };
        config.allow(self.offset + PRI_ALLOCATION, &mask.to_le_bytes());
    }

    /// Takes a reset by software, which only counts while the interface is not enabled.
    pub fn take_reset(&self, config: &mut ConfigSpace) -> bool {
        let control = self.control(config);
        config.set_u16(self.offset + PRI_CONTROL, control.with_reset(false).into_bits());
        control.reset() && !control.enable()
    }

    /// Shows whether the interface has stopped.
    pub fn set_stopped(&self, config: &mut ConfigSpace, stopped: bool) {
        let status = PageRequestStatus::from_bits(config.u16(self.offset + PRI_STATUS));
        config.set_u16(self.offset + PRI_STATUS, status.with_stopped(stopped).into_bits());
    }

    fn control(&self, config: &ConfigSpace) -> PageRequestControl {
        PageRequestControl::from_bits(config.u16(self.offset + PRI_CONTROL))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::{Identity, Way};
    use std::sync::Arc;
    use twostage::viommu::bridges::BridgeKind;

    fn config() -> ConfigSpace {
        ConfigSpace::new(Identity { vendor: 1, device: 2, class: 0, revision: 0 })
    }

    #[test]
    fn msi_is_off_until_enabled() {
        let mut config = config();
        let msi = MsiCapability::add(&mut config);
        config.write(msi.offset + MSI_ADDRESS, &0xfee0_0003u32.to_le_bytes());
        config.write(msi.offset + MSI_ADDRESS_HIGH, &1u32.to_le_bytes());
        config.write(msi.offset + MSI_DATA, &0x41u16.to_le_bytes());
        assert_eq!(msi.message(&config), None);
        config.write(msi.offset + 2, &[0xff, 0xff]);
        let control = MsiControl::from_bits(config.u16(msi.offset + 2));
        assert_eq!(control.multiple_message_capable(), 0);
        assert!(control.address_64());
        assert_eq!(msi.message(&config), Some(MsiMessage { address: 0x1_fee0_0000, data: 0x41 }));
    }

    #[test]
    fn the_express_capability_is_that_of_an_integrated_endpoint() {
        let mut config = config();
        let express = ExpressCapability::add(&mut config);
        assert_eq!((config.u32(0x40), config.u32(0x44)), (0x0092_0010, 0x1000_8000));
        assert_eq!(config.u32(0x40 + 0x24), 1 << 21);
        assert_eq!(config.u16(STATUS) & 0x11, 0x11, "there is a list, and it answers at once");
        assert!(!express.reset_initiated(&config));
        // Nothing but the reset can be written.
        config.write(0x40, &[0xff; 0x3c]);
        assert_eq!((config.u32(0x40), config.u32(0x44)), (0x0092_0010, 0x1000_8000));
        assert_eq!((config.u32(0x48), config.u32(0x4c)), (0x8000, 0));
        assert!(express.reset_initiated(&config));
        config.reset();
        assert!(!express.reset_initiated(&config));
        assert_eq!((config.u32(0x44), config.u32(0x48)), (0x1000_8000, 0));
    }

    #[test]
    fn a_function_behind_a_port_is_an_endpoint_with_a_link_and_behind_pci_has_no_express() {
        let behind = |kind| {
            let mut config = config();
            config.behind(Some(Arc::new(Way::new(kind, 1, None))));
            let express = ExpressCapability::add(&mut config);
            (config, express)
        };
        let (mut config, express) = behind(BridgeKind::Port);
        assert_eq!((config.u32(0x40), config.u32(0x44)), (0x0002_0010, 0x1000_8000));
        assert_eq!((config.u32(0x4c), config.u32(0x50)), (0x11, 0x0011_0000));
        config.write(0x49, &[0x80]);
        assert!(express.reset_initiated(&config));
        let (config, express) = behind(BridgeKind::ExpressToPci);
        assert_eq!((config.u32(0x40), config.u16(STATUS)), (0, 0));
        assert!(!express.reset_initiated(&config));
        // An assigned device's, which was made for the root bus.
        let mut config = self::config();
        ExpressCapability::add(&mut config);
        make_endpoint(&mut config, 0x40);
        assert_eq!((config.u32(0x40), config.u32(0x50)), (0x0002_0010, 0x0011_0000));
    }

    #[test]
    fn pasid_is_off_until_enabled() {
        let mut config = config();
        let pasid = PasidCapability::add(&mut config, PasidCapabilities::new().with_max_width(20));
        assert_eq!(config.u32(0x100), 0x0001_001b);
        assert_eq!(config.u32(0x104), 20 << 8);
        assert!(!pasid.enabled(&config));
        config.write(0x104, &[0xff; 4]);
        assert_eq!(config.u32(0x104), 1 << 16 | 20 << 8);
        assert!(pasid.enabled(&config));
    }

    #[test]
    fn a_function_may_have_privileged_pasids() {
        let mut config = config();
        let able = PasidCapabilities::new().with_max_width(8).with_privileged_mode(true);
        let pasid = PasidCapability::add(&mut config, able);
        config.write(0x106, &[0xff; 2]);
        assert_eq!(config.u32(0x104), 0x0005_0804);
        pasid.lock(&mut config, true);
        config.write(0x106, &[0; 2]);
        assert_eq!(config.u16(0x106), 5);
    }

    #[test]
    fn what_matters_while_ats_is_enabled_is_locked_meanwhile() {
        let mut config = config();
        let pasid = PasidCapability::add(&mut config, PasidCapabilities::new().with_max_width(20));
        let ats = AtsCapability::add(&mut config, AtsCapabilities::from_bits(0x60));
        assert_eq!((config.u32(0x100), config.u32(0x108)), (0x1081_001b, 0x0001_000f));
        assert_eq!(config.u32(0x10c), 0x60, "page-aligned, of 32 invalidations, global ones too");
        config.write(0x106, &[1, 0]);
        config.write(0x10e, &[0xff, 0xff]);
        assert_eq!(config.u32(0x10c), 0x801f_0060);
        for (locked, control, unit) in [(true, 1, 0x801f), (false, 0, 0)] {
            pasid.lock(&mut config, locked);
            ats.lock(&mut config, locked);
            config.write(0x106, &[0, 0]);
            config.write(0x10e, &[0, 0x80]);
            let left = if locked { unit } else { 0x8000 };
            assert_eq!((config.u16(0x106), config.u16(0x10e)), (control, left), "{locked}");
        }
        assert!(ats.enabled(&config) && !pasid.enabled(&config));
    }

    #[test]
    fn page_requests_are_off_and_stopped_until_enabled() {
        let mut config = config();
        let pri = PriCapability::add(&mut config, 1, true);
        assert_eq!(config.u32(0x100), 0x0001_0013);
        assert_eq!((config.u32(0x104), config.u32(0x108)), (0x8100_0000, 1));
        config.write(0x10c, &[5, 0, 0, 0]);
        // Reset together with enable does nothing, and reads as zero.
        config.write(0x104, &[3, 0, 0xff, 0xff]);
        assert!(!pri.take_reset(&mut config) && pri.enabled(&config));
        pri.lock(&mut config, true);
        config.write(0x10c, &[6, 0, 0, 0]);
        assert_eq!((pri.allocation(&config), config.u16(0x104)), (5, 1));
        config.write(0x104, &[2, 0]);
        assert!(pri.take_reset(&mut config) && !pri.enabled(&config));
        assert_eq!(config.u16(0x104), 0);
        pri.set_stopped(&mut config, false);
        assert_eq!(config.u16(0x106), 0x8000);
    }
}
