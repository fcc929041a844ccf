// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The services that the guest is offered of an assigned device: PASIDs, a device TLB (ATS) and
//! page requests (PRI), where the device, the host and the virtual IOMMU all have them.
//!
//! Linux's vfio-pci shows ATS and PRI, read only, and hides PASID (`pci_ext_cap_length` of its
//! `vfio_pci_config.c`): the host's IOMMU driver has enabled what it uses of them, and user space
//! has no say. So the capabilities that the guest sees are made here, at a free place, and follow
//! the rules of PCI Express by themselves; what a guest enables in them does not get to the device.
//! A request with a PASID that the guest's tables do not allow is blocked by them; the virtual
//! IOMMU is told whether the guest takes page requests; and the host invalidates the device's TLB
//! together with its own IOTLB.

use super::capabilities::extended_capabilities;
use super::config_image::Extension;
use crate::devices::{HostServices, OfferedServices, ServiceCapabilities};
use crate::pci::layout::{
    PageRequestStatus, CONFIG_SIZE, EXPRESS_END_END_TLP_PREFIX, EXTENDED_CAPABILITY_ATS,
    EXTENDED_CAPABILITY_PRI,
};
use crate::pci::{AtsCapabilities, ConfigSpace};

/// The lengths of the capabilities of ATS and PRI (§10.5).
const ATS_LENGTH: u16 = 8;
const PRI_LENGTH: u16 = 16;
/// From the start of either: capabilities of ATS; of PRI the status, and the capacity.
const ATS_CAPABILITIES: u16 = 4;
const PRI_STATUS: u16 = 6;
const PRI_CAPACITY: u16 = 8;

/// Adds to `config`, the guest's view of the device whose own configuration space is `device`, the
/// capabilities of what it has of `host`.
pub(super) fn add(
    config: &mut ConfigSpace,
    extension: Option<Extension>,
    device: &[u8; CONFIG_SIZE],
    host: HostServices,
) -> ServiceCapabilities {
    let offered = match &extension {
        Some(extension) => {
            config.extend_list(extension.last, extension.start);
            offered(device, host)
        }
        None => OfferedServices::default(),
    };
    if let (Some(extension), Some(_)) = (&extension, offered.pasid) {
        // Without it, software takes the way to the device for one on which PASIDs get lost.
        config.set_u32(extension.device_capabilities_2, EXPRESS_END_END_TLP_PREFIX);
    }
    ServiceCapabilities::add(config, offered, None)
}

/// What the device has of `host`, by its own capabilities.
fn offered(device: &[u8; CONFIG_SIZE], host: HostServices) -> OfferedServices {
    let found = |id, length| {
        let mut all = extended_capabilities(device).into_iter();
        all.find(|it| it.id == id && it.room >= length).map(|it| it.offset)
    };
    let word = |offset: u16| {
        let bytes = device.get(usize::from(offset)..).and_then(|rest| rest.first_chunk());
        u16::from_le_bytes(bytes.copied().unwrap_or_default())
    };
    let ats = found(EXTENDED_CAPABILITY_ATS, ATS_LENGTH).filter(|_| host.ats).map(|ats| {
        let device = AtsCapabilities::from_bits(word(ats + ATS_CAPABILITIES));
        AtsCapabilities::new()
            .with_queue_depth(device.queue_depth())
            .with_page_aligned(device.page_aligned())
            .with_global_invalidate(device.global_invalidate())
    });
    let pri = found(EXTENDED_CAPABILITY_PRI, PRI_LENGTH).filter(|_| host.pri && ats.is_some());
    let pri = pri.map(|pri| {
        let status = PageRequestStatus::from_bits(word(pri + PRI_STATUS));
        let (low, high) = (word(pri + PRI_CAPACITY), word(pri + PRI_CAPACITY + 2));
        (u32::from(low) | u32::from(high) << 16, status.response_pasid_required())
    });
    OfferedServices { pasid: host.pasid, ats, pri }
}

#[cfg(test)]
mod tests {
    use super::super::config_image::{Behind, ConfigImage};
    use super::*;
    use crate::pci::layout::EXTENDED_START;
    use crate::pci::PasidCapabilities;

    const EXPRESS: usize = 0x60;
    const DEVICE_CAPABILITIES_2: u16 = EXPRESS as u16 + 0x24;

    /// PCI Express of `version`, and as Linux shows them ATS and PRI, both enabled by the host, and
    /// a vendor's capability of 0x10 bytes at `vendor`, unless that is 0.
    fn device(version: u8, vendor: u16) -> Box<[u8; CONFIG_SIZE]> {
        let mut device = Box::new([0; CONFIG_SIZE]);
        let mut put = |offset: usize, bytes: &[u8]| {
            device[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(0, &[0x34, 0x12, 0xe8, 0x11, 0, 0, 0x10]);
        put(0x34, &[EXPRESS as u8]);
        put(EXPRESS, &[0x10, 0, version]);
        put(0x100, &[0x0f, 0, 1, 0x11, 0x65, 0, 0, 0x80]);
        put(0x110, &(0x0001_0013 | u32::from(vendor) << 20).to_le_bytes());
        put(0x114, &[1, 0, 0, 0x81, 0x20, 0, 0, 0, 0x10]);
        if vendor != 0 {
            put(vendor.into(), &[0x0b, 0, 1, 0, 0, 0, 0, 1]);
        }
        device
    }

    const PASID: PasidCapabilities = PasidCapabilities::new().with_max_width(16);
    const ALL: HostServices = HostServices { pasid: Some(PASID), ats: true, pri: true };

    /// The guest's view, and the IDs and offsets of the extended capabilities in it.
    fn view(
        device: &[u8; CONFIG_SIZE],
        host: HostServices,
    ) -> (ConfigSpace, ServiceCapabilities, Vec<(u16, u16)>) {
        let mut image =
            ConfigImage::new(device, &Behind { reset: true, ..Behind::default() }).unwrap();
        let services = add(&mut image.config, image.extension, device, host);
        let mut bytes = [0; CONFIG_SIZE];
        image.config.read(0, &mut bytes);
        let list = extended_capabilities(&bytes).iter().map(|it| (it.id, it.offset)).collect();
        (image.config, services, list)
    }

    #[test]
    fn what_all_have_is_made_at_the_end() {
        let (mut config, services, list) = view(&device(2, 0x200), ALL);
        let made = [(0x1b, 0xfe0), (0x0f, 0xfe8), (0x13, 0xff0)];
        assert_eq!(list, [&[(0, 0x100), (0x0b, 0x200)], &made[..]].concat());
        assert_eq!(config.u32(DEVICE_CAPABILITIES_2), EXPRESS_END_END_TLP_PREFIX);
        // What the device has, and nothing is enabled.
        assert_eq!((config.u32(0xfe4), config.u32(0xfec)), (16 << 8, 0x65));
        assert_eq!((config.u32(0xff4), config.u32(0xff8)), (0x8100_0000, 0x20));
        // ATS and PASID are enabled, and then PASID cannot be changed.
        config.write(0xfe6, &[1, 0]);
        config.write(0xfee, &[0, 0x80]);
        services.written(&mut config);
        config.write(0xfe6, &[0, 0]);
        assert_eq!((config.u16(0xfe6), config.u16(0xfee)), (1, 0x8000));
        config.write(0xff4, &[1, 0]);
        services.written(&mut config);
        assert_eq!(config.u16(0xff6), 0x8000, "it has not stopped");
        // Behind no other capability, the empty first one leads there.
        let (_, _, list) = view(&device(2, 0), ALL);
        assert_eq!(list, [&[(0, EXTENDED_START)], &made[..]].concat());
    }

    #[test]
    fn what_somebody_lacks_is_not_there() {
        let ids = |device: &[u8; CONFIG_SIZE], host| {
            let (config, _, list) = view(device, host);
            let prefix = config.u32(DEVICE_CAPABILITIES_2) != 0;
            assert_eq!(prefix, list.iter().any(|(id, _)| *id == 0x1b));
            let made = list.into_iter().map(|(id, _)| id).filter(|id| ![0, 0x0b].contains(id));
            made.collect::<Vec<_>>()
        };
        let whole = device(2, 0x200);
        let none: [u16; 0] = [];
        assert_eq!(ids(&whole, HostServices::default()), none);
        assert_eq!(ids(&whole, HostServices { pasid: None, ..ALL }), [0x0f, 0x13]);
        // Page requests are of translations that were asked for.
        assert_eq!(ids(&whole, HostServices { ats: false, ..ALL }), [0x1b]);
        assert_eq!(ids(&whole, HostServices { pri: false, ..ALL }), [0x1b, 0x0f]);
        let mut without = whole.clone();
        without[0x100] = 1;
        assert_eq!(ids(&without, ALL), [0x1b]);
        without[0x110] = 1;
        without[0x100] = 0x0f;
        assert_eq!(ids(&without, ALL), [0x1b, 0x0f]);
        // An old device, and one of conventional PCI.
        let mut conventional = whole.clone();
        conventional[0x34] = 0;
        for device in [device(1, 0x200), conventional] {
            assert_eq!(ids(&device, ALL), none);
        }
    }

    #[test]
    fn nothing_is_made_on_top_of_what_the_guest_sees() {
        let place = |length: u16, vendor| {
            let mut device = device(2, vendor);
            device[usize::from(vendor) + 6..][..2].copy_from_slice(&(length << 4).to_le_bytes());
            view(&device, ALL).2.iter().find(|(id, _)| *id == 0x1b).map(|(_, offset)| *offset)
        };
        assert_eq!(place(0x10, 0x200), Some(0xfe0));
        assert_eq!(place(0x10, 0xff0), Some(0xfd0));
        assert_eq!(place(0xe00, 0x200), Some(0x1e0));
        assert_eq!(place(0xee0, 0x120), None);
    }
}
