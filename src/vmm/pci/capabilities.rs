// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The capabilities of emulated functions and ports: MSI, PCI Express, ACS, PASID.

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

/// The PCI Express capability (§7.5.3) of an endpoint with function-level reset: one with a link if
/// it is behind a port, and otherwise integrated in the root complex. Without it software looks for
/// no extended capabilities. A function of conventional PCI has none.
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

/// A PASID extended capability without execute or privileged requests.
#[derive(Debug, Clone, Copy)]
pub struct PasidCapability {
    offset: u16,
}

impl PasidCapability {
    /// Adds the capability to `config`, for PASIDs of `bits` bits, at most 20.
    pub fn add(config: &mut ConfigSpace, bits: u8) -> Self {
        let capabilities = PasidCapabilities::new().with_max_width(bits).into_bits();
        let control = PasidControl::new().with_enable(true).into_bits();
        let [c0, c1] = capabilities.to_le_bytes();
        let [w0, w1] = control.to_le_bytes();
        let offset = config.add_extended_capability(
            EXTENDED_CAPABILITY_PASID,
            1,
            &[c0, c1, 0, 0],
            &[0, 0, w0, w1],
        );
        Self { offset }
    }

    /// Whether requests may carry a PASID.
    pub fn enabled(&self, config: &ConfigSpace) -> bool {
        PasidControl::from_bits(config.u16(self.offset + 6)).enable()
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
        let pasid = PasidCapability::add(&mut config, 20);
        assert_eq!(config.u32(0x100), 0x0001_001b);
        assert_eq!(config.u32(0x104), 20 << 8);
        assert!(!pasid.enabled(&config));
        config.write(0x104, &[0xff; 4]);
        assert_eq!(config.u32(0x104), 1 << 16 | 20 << 8);
        assert!(pasid.enabled(&config));
    }
}
