// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Configuration space of a device, as the guest sees it.
//!
//! Anything that is neither in a visible capability nor in the table below reads as zero and cannot
//! be written.
//!
//! | Register of the header | The guest sees | Because |
//! |---|---|---|
//! | vendor, device, class, revision, subsystem | the device's | its driver is found by them |
//! | command | its own; memory space, bus master and INTx disable are forwarded | I/O ports are not supported, and the rest concerns the host's bus |
//! | status | the device's, read only | errors are the host's to clear |
//! | cache line size | its own | it means nothing to PCI Express |
//! | header type | one function | the others are not assigned with it |
//! | BARs | its own; none for I/O ports | the host's addresses are private to the host |
//! | expansion ROM | none | only firmware would run it, and guests here have none |
//! | capabilities pointer | the list of visible ones | see the tables of `capabilities.rs` |
//! | interrupt line and pin | its own; INTA if the device has INTx | each function here is a device of its own |

use super::capabilities::{
    capabilities, extended_capabilities, treatment, why_hidden, Capability, Treatment,
    CAPABILITY_VPD, EXTENDED_RULES, RULES,
};
use super::config_draft::{Draft, LiveRange, MsixStructures};
use crate::pci::layout::{
    CAPABILITIES_POINTER, CONFIG_SIZE, EXTENDED_START, STATUS, STATUS_CAPABILITIES,
};
use crate::pci::ConfigSpace;

/// Header type.
const HEADER_TYPE: usize = 0x0e;
/// Header type: there are several functions.
const MULTI_FUNCTION: u8 = 0x80;
/// VPD: address and data, after the header.
const VPD_LENGTH: u16 = 8;

/// The guest's configuration space.
#[derive(Debug)]
pub struct ConfigImage {
    /// The space, without BARs.
    pub config: ConfigSpace,
    /// Bytes that are read from the device each time.
    pub live: Vec<LiveRange>,
    /// The MSI capability.
    pub msi: Option<u16>,
    /// The MSI-X capability.
    pub msix: Option<MsixStructures>,
    /// Device control of PCI Express, which can reset the function.
    pub device_control: Option<u16>,
}

/// Why a device cannot be assigned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Nothing answers.
    #[error("its configuration space reads as ones: the device does not answer")]
    NoAnswer,
    /// A bridge.
    #[error("it is a bridge (header type {0:#x}); only endpoints can be assigned")]
    Bridge(u8),
}

impl ConfigImage {
    /// The guest's view of a device whose configuration space is `device`. It has the interrupt pin
    /// if `intx`, and can be reset if `reset`.
    ///
    /// # Errors
    /// The device cannot be assigned.
    pub fn new(device: &[u8; CONFIG_SIZE], intx: bool, reset: bool) -> Result<Self, ConfigError> {
        if device.starts_with(&[0xff; 4]) {
            return Err(ConfigError::NoAnswer);
        }
        // The header is the first 64 bytes of every configuration space.
        match device[HEADER_TYPE] & !MULTI_FUNCTION {
            0 => {}
            header_type => return Err(ConfigError::Bridge(header_type)),
        }
        let status = LiveRange { bytes: STATUS..STATUS + 2, forwarded: false };
        let mut image = Self {
            config: ConfigSpace::of_image(Box::new([0; CONFIG_SIZE]), Box::new([0; CONFIG_SIZE])),
            live: vec![status],
            msi: None,
            msix: None,
            device_control: None,
        };
        let mut draft = Draft::new(device, intx);
        image.show_capabilities(&mut draft, reset);
        image.show_extended_capabilities(&mut draft);
        image.config = ConfigSpace::of_image(draft.bytes, draft.writable);
        Ok(image)
    }

    fn show_capabilities(&mut self, draft: &mut Draft<'_>, reset: bool) {
        let mut pointer = CAPABILITIES_POINTER;
        for capability in capabilities(draft.device) {
            if self.show(draft, capability, reset).is_some() {
                // Those of this list are in the first 256 bytes, with one-byte IDs.
                let (offset, id) = (capability.offset, capability.id);
                draft.put(pointer, &[offset as u8]);
                draft.put(offset, &[id as u8, 0]);
                draft.put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
                pointer = offset + 1;
            }
        }
    }

    /// Adds the body of `capability` to `draft`; `None` if the guest does not see it.
    fn show(&mut self, draft: &mut Draft<'_>, capability: Capability, reset: bool) -> Option<()> {
        let Capability { id, offset, room } = capability;
        match treatment(RULES, id) {
            Treatment::Hidden => {
                log::debug!("capability hidden from the guest: {}", why_hidden(RULES, id));
                return None;
            }
            Treatment::Constant => draft.copy(offset + 2..offset + room),
            Treatment::Live => {
                let length = match id == u16::from(CAPABILITY_VPD) {
                    true => VPD_LENGTH,
                    // A vendor-specific one has its length after its header.
                    false => (draft.device_u32(offset) >> 16 & 0xff) as u16,
                };
                let length = length.clamp(4, room);
                self.live.push(draft.live(offset + 2..offset + length));
            }
            Treatment::Power => draft.power(capability)?,
            Treatment::Express => {
                let control = draft.express(capability, reset)?;
                self.device_control = reset.then_some(control);
                // Device control, followed by device status.
                self.live.push(draft.live(control..control + 4));
            }
            Treatment::Msi => {
                draft.msi(capability)?;
                self.msi = Some(offset);
            }
            Treatment::Msix => self.msix = Some(draft.msix(capability)?),
        }
        Some(())
    }

    fn show_extended_capabilities(&mut self, draft: &mut Draft<'_>) {
        let mut last = None;
        for Capability { id, offset, room } in extended_capabilities(draft.device) {
            match treatment(EXTENDED_RULES, id) {
                Treatment::Constant => draft.copy(offset + 4..offset + room),
                Treatment::Live if room >= 8 => {
                    // Its length is in the upper bits of the word after the header (§7.9.5,
                    // §7.9.6).
                    let length = (draft.device_u32(offset + 4) >> 20) as u16;
                    let length = length.clamp(8, room);
                    self.live.push(draft.live(offset + 4..offset + length));
                }
                _ => {
                    let why = why_hidden(EXTENDED_RULES, id);
                    log::debug!("extended capability hidden from the guest: {why}");
                    continue;
                }
            }
            let version = draft.device_u32(offset) & 0xf_0000;
            draft.put(offset, &(version | u32::from(id)).to_le_bytes());
            // The first has a fixed offset: if it is hidden, there is an empty one with ID 0.
            let before = last.unwrap_or(EXTENDED_START);
            if offset != before {
                draft.link_extended(before, offset);
            }
            last = Some(offset);
        }
    }
}
