// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Configuration space of a device, as the guest sees it.
//!
//! Anything that is neither in a visible capability nor in the table below reads as zero and cannot
//! be written.
//!
//! | Register of the header | The guest sees | Because |
//! |---|---|---|
//! | vendor, device, class, revision, subsystem | the device's | its driver is found by them |
//! | command: memory space, bus master, INTx disable | its own, forwarded | it uses them |
//! | command: the rest | its own, zero | no I/O ports; the host's bus is the host's |
//! | status | the device's, read only | errors are the host's to clear |
//! | cache line size | its own | it means nothing to PCI Express |
//! | header type | one function | the others are not assigned with it |
//! | BARs | its own; none for I/O ports | the host's addresses are private to the host |
//! | expansion ROM | none | only firmware would run it, and guests here have none |
//! | capabilities pointer | the list of visible ones | see the tables of `capabilities.rs` |
//! | interrupt line and pin | its own; INTA if the device has INTx | each function is a device |

use std::ops::Range;

use super::bars::DeviceBar;
use super::capabilities::{
    capabilities, extended_capabilities, treatment, why_hidden, Capability, Treatment,
    CAPABILITY_VPD, EXTENDED_RULES, RULES,
};
use super::msix_structures::{MsixStructures, MSIX_LENGTH, MSIX_PENDING, MSIX_TABLE};
use crate::devices::OfferedServices;
use crate::pci::layout::{
    Command, MsiControl, CAPABILITIES_POINTER, COMMAND, CONFIG_SIZE, EXPRESS_CAPABILITIES,
    EXPRESS_DEVICE_CAPABILITIES, EXPRESS_DEVICE_CAPABILITIES_2, EXPRESS_DEVICE_CONTROL,
    EXPRESS_FLR_CAPABLE, EXPRESS_INTEGRATED_ENDPOINT, EXPRESS_ROLE_BASED_ERRORS, EXTENDED_START,
    INTERRUPT_LINE, INTERRUPT_PIN, REVISION_ID, STATUS, STATUS_CAPABILITIES, SUBSYSTEM_VENDOR_ID,
    VENDOR_ID,
};
use crate::pci::{ConfigSpace, MsixControl};

/// Header type.
const HEADER_TYPE: usize = 0x0e;
/// Header type: there are several functions.
const MULTI_FUNCTION: u8 = 0x80;
/// VPD: address and data, after the header.
const VPD_LENGTH: u16 = 8;
/// Cache line size.
const CACHE_LINE_SIZE: u16 = 0x0c;

/// PCI Express, up to link status, which both versions of the capability have; and all of version
/// 2.
const EXPRESS_LENGTH: u16 = 0x14;
const EXPRESS_2_LENGTH: u16 = 0x3c;
/// PCI Express capabilities: the version.
const EXPRESS_VERSION: u16 = 0xf;
/// A serial number (§7.9.3).
const SERIAL_LENGTH: u16 = 12;
/// Device capabilities that involve no link: payload size, extended tags, role-based errors.
const DEVICE_CAPABILITIES: u32 = 0b111 | 1 << 5 | EXPRESS_ROLE_BASED_ERRORS;

/// Power management (PCI PM 1.2 §3.2): capabilities, control and status.
const POWER_CAPABILITIES: u16 = 2;
const POWER_CONTROL: u16 = 4;
const POWER_LENGTH: u16 = 8;
/// The version, and whether the device needs specific initialization. No D1, no D2, no PME.
const POWER_KEPT: u16 = 0b111 | 1 << 5;
const POWER_STATE: u16 = 0b11;
const NO_SOFT_RESET: u16 = 1 << 3;

/// MSI message control: per-vector masking.
pub(super) const MSI_MASKABLE: u16 = 1 << 8;

/// The guest's configuration space.
#[derive(Debug)]
pub struct ConfigImage {
    /// The space, without BARs.
    pub config: ConfigSpace,
    /// Bytes that are read from the device each time.
    pub live: Vec<LiveRange>,
    /// The MSI capability.
    pub msi: Option<u16>,
    /// The device's MSI-X, as the guest sees it, or that it does not see.
    pub msix: Option<MsixStructures>,
    /// How many vectors of it the guest sees.
    pub msix_vectors: Option<u16>,
    /// The capability of PCI Express.
    pub express: Option<u16>,
    /// Device control of PCI Express, which can reset the function.
    pub device_control: Option<u16>,
    /// Where more extended capabilities can go; `None` for a device that has none.
    pub extension: Option<Extension>,
}

/// A place for more extended capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extension {
    /// The capability that is to lead there: the last one that the guest sees, or the empty first
    /// one.
    pub last: u16,
    /// Its start, of [`OfferedServices::LENGTH`] bytes.
    pub start: u16,
    /// Device capabilities 2 of PCI Express.
    pub device_capabilities_2: u16,
}

/// Bytes of configuration space that are read from the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveRange {
    /// The bytes.
    pub bytes: Range<u16>,
    /// Writes of the guest are forwarded to the device.
    pub forwarded: bool,
}

/// What is behind the capabilities that the guest may see.
#[derive(Debug, Clone, Copy, Default)]
pub struct Behind<'a> {
    /// VFIO has the interrupt pin.
    pub intx: bool,
    /// VFIO can reset the device.
    pub reset: bool,
    /// How many vectors of MSI VFIO has.
    pub msi: u32,
    /// How many vectors of MSI-X VFIO has.
    pub msix: u32,
    /// The device's memory.
    pub bars: &'a [DeviceBar],
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
    /// The guest's view of a device whose configuration space is `device`, without capabilities
    /// that nothing is `behind`.
    ///
    /// # Errors
    /// The device cannot be assigned.
    pub fn new(device: &[u8; CONFIG_SIZE], behind: &Behind<'_>) -> Result<Self, ConfigError> {
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
            msix_vectors: None,
            express: None,
            device_control: None,
            extension: None,
        };
        let mut draft = Draft::new(device, behind.intx);
        image.show_capabilities(&mut draft, behind);
        image.show_extended_capabilities(&mut draft);
        image.config = ConfigSpace::of_image(draft.bytes, draft.writable);
        Ok(image)
    }

    fn show_capabilities(&mut self, draft: &mut Draft<'_>, behind: &Behind<'_>) {
        let (mut pointer, mut seen) = (CAPABILITIES_POINTER, Vec::new());
        for capability in capabilities(draft.device) {
            // Of those that are emulated there is one: the first, which is also what the host uses.
            let again = seen.contains(&capability.id);
            if again && treatment(RULES, capability.id) != Treatment::Live {
                log::debug!("capability hidden from the guest: {:#x}, again", capability.id);
                continue;
            }
            seen.push(capability.id);
            if self.show(draft, capability, behind).is_some() {
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
    fn show(
        &mut self,
        draft: &mut Draft<'_>,
        capability: Capability,
        behind: &Behind<'_>,
    ) -> Option<()> {
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
                let control = draft.express(capability, behind.reset)?;
                self.express = Some(offset);
                self.device_control = behind.reset.then_some(control);
                // Device control, followed by device status.
                self.live.push(draft.live(control..control + 4));
            }
            Treatment::Msi => {
                draft.msi(capability, behind.msi)?;
                self.msi = Some(offset);
            }
            Treatment::Msix => {
                // Also those of a capability that the guest does not see.
                let structures = MsixStructures::new(draft.device, offset);
                self.msix = Some(structures);
                let shown = structures.shown(behind.bars)?;
                self.msix_vectors = Some(draft.msix(capability, &shown, behind.msix)?);
                self.msix = Some(shown);
            }
        }
        Some(())
    }

    fn show_extended_capabilities(&mut self, draft: &mut Draft<'_>) {
        let (mut last, mut seen) = (None, Vec::new());
        for Capability { id, offset, room } in extended_capabilities(draft.device) {
            let length = match treatment(EXTENDED_RULES, id) {
                Treatment::Constant => {
                    let length = SERIAL_LENGTH.min(room);
                    draft.copy(offset + 4..offset + length);
                    length
                }
                Treatment::Live if room >= 8 => {
                    // Its length is in the upper bits of the word after the header (§7.9.5,
                    // §7.9.6).
                    let length = (draft.device_u32(offset + 4) >> 20) as u16;
                    let length = length.clamp(8, room);
                    self.live.push(draft.live(offset + 4..offset + length));
                    length
                }
                _ => {
                    let why = why_hidden(EXTENDED_RULES, id);
                    log::debug!("extended capability hidden from the guest: {why}");
                    continue;
                }
            };
            seen.push(offset..offset + length);
            let version = draft.device_u32(offset) & 0xf_0000;
            draft.put(offset, &(version | u32::from(id)).to_le_bytes());
            // The first has a fixed offset: if it is hidden, there is an empty one with ID 0.
            let before = last.unwrap_or(EXTENDED_START);
            if offset != before {
                draft.link_extended(before, offset);
            }
            last = Some(offset);
        }
        let last = last.unwrap_or(EXTENDED_START);
        seen.push(EXTENDED_START..EXTENDED_START + 4);
        self.extension = extension(draft, self.express, last, &seen);
    }
}

/// The highest place for more capabilities beside `seen`: drivers look for the device's own
/// registers where they know them, and the last ones are the least likely. Only a capability of PCI
/// Express at `express` with all of version 2 can say that requests may have PASIDs.
fn extension(
    draft: &Draft<'_>,
    express: Option<u16>,
    last: u16,
    seen: &[Range<u16>],
) -> Option<Extension> {
    let express = express.filter(|express| {
        let version = draft.device_u16(express + EXPRESS_CAPABILITIES) & EXPRESS_VERSION;
        let whole = |it: &Capability| it.offset == *express && it.room >= EXPRESS_2_LENGTH;
        version >= 2 && capabilities(draft.device).iter().any(whole)
    })?;
    let device_capabilities_2 = express + EXPRESS_DEVICE_CAPABILITIES_2;
    let mut end = CONFIG_SIZE as u16;
    // Each turn is below one more of them, so that it is not met again.
    while end >= EXTENDED_START + OfferedServices::LENGTH {
        let start = end - OfferedServices::LENGTH;
        match seen.iter().find(|seen| seen.start < end && seen.end > start) {
            Some(seen) => end = seen.start,
            None => return Some(Extension { last, start, device_capabilities_2 }),
        }
    }
    None
}

/// A guest's configuration space being built: the header and each capability, taken from the
/// device's, without what the guest may not see or change.
///
/// Offsets are those of header registers, and of capabilities with the room that the list gives
/// them: everything is within configuration space, whatever the device says. What does not fit is
/// left out and reads as zero.
struct Draft<'a> {
    /// The device's configuration space.
    device: &'a [u8; CONFIG_SIZE],
    /// What the guest reads.
    bytes: Box<[u8; CONFIG_SIZE]>,
    /// What it may change.
    writable: Box<[u8; CONFIG_SIZE]>,
}

impl<'a> Draft<'a> {
    /// The header of `device`, with INTA if `intx`, without capabilities.
    fn new(device: &'a [u8; CONFIG_SIZE], intx: bool) -> Self {
        let (bytes, writable) = (Box::new([0; CONFIG_SIZE]), Box::new([0; CONFIG_SIZE]));
        let mut draft = Self { device, bytes, writable };
        for register in [VENDOR_ID, REVISION_ID, SUBSYSTEM_VENDOR_ID] {
            draft.copy(register..register + 4);
        }
        let command = Command::new()
            .with_memory_space(true)
            .with_bus_master(true)
            .with_interrupt_disable(true);
        draft.allow(COMMAND, &command.into_bits().to_le_bytes());
        draft.allow(CACHE_LINE_SIZE, &[0xff]);
        draft.allow(INTERRUPT_LINE, &[0xff]);
        draft.put(INTERRUPT_PIN, &[intx.into()]);
        draft
    }

    /// Sets what the guest reads.
    fn put(&mut self, offset: u16, bytes: &[u8]) {
        set(&mut self.bytes, offset, bytes);
    }

    /// Sets what the guest may change.
    fn allow(&mut self, offset: u16, mask: &[u8]) {
        set(&mut self.writable, offset, mask);
    }

    /// The guest reads `bytes` as they are now, and cannot change them.
    fn copy(&mut self, bytes: Range<u16>) {
        let now = self.device.get(usize::from(bytes.start)..usize::from(bytes.end));
        set(&mut self.bytes, bytes.start, now.unwrap_or_default());
    }

    /// `bytes` are read from the device.
    fn live(&mut self, bytes: Range<u16>) -> LiveRange {
        let all = self.writable.get_mut(usize::from(bytes.start)..usize::from(bytes.end));
        all.unwrap_or_default().fill(0xff);
        LiveRange { bytes, forwarded: true }
    }

    fn device_u16(&self, offset: u16) -> u16 {
        let bytes = self.device.get(usize::from(offset)..).and_then(|rest| rest.first_chunk());
        u16::from_le_bytes(bytes.copied().unwrap_or_default())
    }

    /// Four bytes of the device.
    fn device_u32(&self, offset: u16) -> u32 {
        u32::from(self.device_u16(offset)) | u32::from(self.device_u16(offset + 2)) << 16
    }

    /// Makes the extended capability at `before` point to the one at `offset`.
    fn link_extended(&mut self, before: u16, offset: u16) {
        let header =
            self.bytes.get_mut(usize::from(before)..).and_then(|rest| rest.first_chunk_mut());
        let Some(header) = header else { return };
        // The low 20 bits are the ID and the version.
        let kept = u32::from_le_bytes(*header) & 0xf_ffff;
        *header = (kept | u32::from(offset) << 20).to_le_bytes();
    }

    /// Power management of a device that stays in D0; `None` without room for it.
    fn power(&mut self, Capability { offset, room, .. }: Capability) -> Option<()> {
        if room < POWER_LENGTH {
            return None;
        }
        let kept = self.device_u16(offset + POWER_CAPABILITIES) & POWER_KEPT;
        self.put(offset + POWER_CAPABILITIES, &kept.to_le_bytes());
        // The return to D0 loses nothing, as it never left D0.
        self.put(offset + POWER_CONTROL, &NO_SOFT_RESET.to_le_bytes());
        self.allow(offset + POWER_CONTROL, &POWER_STATE.to_le_bytes());
        Some(())
    }

    /// PCI Express of a function on the root bus, which can be reset if `reset`. Returns the offset
    /// of device control, which device status follows.
    fn express(&mut self, Capability { offset, room, .. }: Capability, reset: bool) -> Option<u16> {
        if room < EXPRESS_LENGTH {
            return None;
        }
        let version = self.device_u16(offset + EXPRESS_CAPABILITIES) & EXPRESS_VERSION;
        let capabilities = version | EXPRESS_INTEGRATED_ENDPOINT;
        self.put(offset + EXPRESS_CAPABILITIES, &capabilities.to_le_bytes());
        let kept = DEVICE_CAPABILITIES | if reset { EXPRESS_FLR_CAPABLE } else { 0 };
        let kept = self.device_u32(offset + EXPRESS_DEVICE_CAPABILITIES) & kept;
        self.put(offset + EXPRESS_DEVICE_CAPABILITIES, &kept.to_le_bytes());
        // The link's registers, and what version 2 adds, stay zero: there is no link. (Services
        // need one bit of it, see `services.rs`.)
        Some(offset + EXPRESS_DEVICE_CONTROL)
    }

    /// MSI with at most so many `vectors`, disabled and without a message; `None` without any or
    /// without room for it.
    fn msi(&mut self, Capability { offset, room, .. }: Capability, vectors: u32) -> Option<()> {
        let most = u8::try_from(vectors.checked_ilog2()?).unwrap_or(u8::MAX);
        let control = self.device_u16(offset + 2);
        let kept = MsiControl::from_bits(control);
        let maskable = control & MSI_MASKABLE != 0;
        // At most 2^5 vectors; higher values are reserved.
        let vectors = kept.multiple_message_capable().min(5).min(most);
        let shown = MsiControl::new()
            .with_multiple_message_capable(vectors)
            .with_address_64(kept.address_64())
            .into_bits()
            | control & MSI_MASKABLE;
        let address = if kept.address_64() { 8 } else { 4 };
        // Data; then, with masking, two reserved bytes, the masks and the pending bits.
        let length = 4 + address + if maskable { 2 + 2 + 4 + 4 } else { 2 };
        if room < length {
            return None;
        }
        self.put(offset + 2, &shown.to_le_bytes());
        let changeable = MsiControl::new().with_enable(true).with_multiple_message_enable(7);
        self.allow(offset + 2, &changeable.into_bits().to_le_bytes());
        // The low two bits of the address are zero.
        self.allow(offset + 4, &0xffff_fffc_u32.to_le_bytes());
        if kept.address_64() {
            self.allow(offset + 8, &[0xff; 4]);
        }
        self.allow(offset + 4 + address, &[0xff; 2]);
        if maskable {
            self.allow(offset + 8 + address, &[0xff; 4]);
        }
        Some(())
    }

    /// MSI-X with all vectors of the structures `shown` or those that `there` are, which it
    /// returns, disabled; `None` without any or without room for it.
    fn msix(
        &mut self,
        Capability { offset, room, .. }: Capability,
        shown: &MsixStructures,
        there: u32,
    ) -> Option<u16> {
        let vectors = u16::try_from(there).unwrap_or(u16::MAX).min(shown.vectors);
        let last = vectors.checked_sub(1)?;
        if room < MSIX_LENGTH {
            return None;
        }
        let control = MsixControl::new().with_table_size(last);
        self.put(offset + 2, &control.into_bits().to_le_bytes());
        let changeable = MsixControl::new().with_function_mask(true).with_enable(true);
        self.allow(offset + 2, &changeable.into_bits().to_le_bytes());
        self.copy(offset + MSIX_TABLE..offset + MSIX_PENDING);
        self.put(offset + MSIX_PENDING, &shown.pending_register().to_le_bytes());
        Some(vectors)
    }
}

/// Writes `values` at `offset` of `space`, if they fit.
fn set(space: &mut [u8; CONFIG_SIZE], offset: u16, values: &[u8]) {
    let start = usize::from(offset);
    if let Some(bytes) = space.get_mut(start..start + values.len()) {
        bytes.copy_from_slice(values);
    }
}

#[cfg(test)]
mod tests;
