// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Builds a guest's configuration space: the header and each capability, taken from the device's,
//! without what the guest may not see or change.
//!
//! Offsets are those of header registers, and of capabilities with the room that the list gives
//! them: everything is within configuration space, whatever the device says. What does not fit is
//! left out and reads as zero.

use std::ops::Range;

use super::capabilities::Capability;
use crate::pci::layout::{
    Command, MsiControl, COMMAND, CONFIG_SIZE, INTERRUPT_LINE, INTERRUPT_PIN, REVISION_ID,
    SUBSYSTEM_VENDOR_ID, VENDOR_ID,
};
use crate::pci::MsixControl;

/// Bytes of configuration space that are read from the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveRange {
    /// The bytes.
    pub bytes: Range<u16>,
    /// Writes of the guest are forwarded to the device.
    pub forwarded: bool,
}

/// The MSI-X structures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsixStructures {
    /// The capability.
    pub offset: u16,
    /// Number of vectors: 1 to 2048.
    pub vectors: u16,
    /// BAR of the table, and the offset in it.
    pub table: (usize, u64),
    /// BAR of the pending bits, and the offset in it.
    pub pending: (usize, u64),
}

/// Cache line size.
const CACHE_LINE_SIZE: u16 = 0x0c;

/// PCI Express (§7.5.3), from the start of the capability: capabilities, device capabilities,
/// device control.
const EXPRESS_CAPABILITIES: u16 = 2;
const EXPRESS_DEVICE_CAPABILITIES: u16 = 4;
const EXPRESS_DEVICE_CONTROL: u16 = 8;
/// Up to link status, which both versions of the capability have.
const EXPRESS_LENGTH: u16 = 0x14;
/// PCI Express capabilities: the version.
const EXPRESS_VERSION: u16 = 0xf;
/// PCI Express capabilities: a Root Complex Integrated Endpoint.
const INTEGRATED_ENDPOINT: u16 = 9 << 4;
/// Device capabilities that involve no link: payload size, extended tags, role-based errors.
const DEVICE_CAPABILITIES: u32 = 0b111 | 1 << 5 | 1 << 15;
/// Device capabilities: function-level reset.
const FLR_CAPABLE: u32 = 1 << 28;

/// Power management (PCI PM 1.2 §3.2): capabilities, control and status.
const POWER_CAPABILITIES: u16 = 2;
const POWER_CONTROL: u16 = 4;
const POWER_LENGTH: u16 = 8;
/// The version, and whether the device needs specific initialization. No D1, no D2, no PME.
const POWER_KEPT: u16 = 0b111 | 1 << 5;
const POWER_STATE: u16 = 0b11;
const NO_SOFT_RESET: u16 = 1 << 3;

/// MSI message control: per-vector masking.
const MSI_MASKABLE: u16 = 1 << 8;

/// MSI-X (§7.7.2), from the start of the capability.
const MSIX_TABLE: u16 = 4;
const MSIX_PENDING: u16 = 8;
const MSIX_LENGTH: u16 = 12;
/// Table offset: the BAR.
const MSIX_BAR: u32 = 0b111;

/// See the [module](self).
pub(super) struct Draft<'a> {
    /// The device's configuration space.
    pub device: &'a [u8; CONFIG_SIZE],
    /// What the guest reads.
    pub bytes: Box<[u8; CONFIG_SIZE]>,
    /// What it may change.
    pub writable: Box<[u8; CONFIG_SIZE]>,
}

impl<'a> Draft<'a> {
    /// The header of `device`, with INTA if `intx`, without capabilities.
    pub fn new(device: &'a [u8; CONFIG_SIZE], intx: bool) -> Self {
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
    pub fn put(&mut self, offset: u16, bytes: &[u8]) {
        set(&mut self.bytes, offset, bytes);
    }

    /// Sets what the guest may change.
    fn allow(&mut self, offset: u16, mask: &[u8]) {
        set(&mut self.writable, offset, mask);
    }

    /// The guest reads `bytes` as they are now, and cannot change them.
    pub fn copy(&mut self, bytes: Range<u16>) {
        let now = self.device.get(usize::from(bytes.start)..usize::from(bytes.end));
        set(&mut self.bytes, bytes.start, now.unwrap_or_default());
    }

    /// `bytes` are read from the device.
    pub fn live(&mut self, bytes: Range<u16>) -> LiveRange {
        let all = self.writable.get_mut(usize::from(bytes.start)..usize::from(bytes.end));
        all.unwrap_or_default().fill(0xff);
        LiveRange { bytes, forwarded: true }
    }

    fn device_u16(&self, offset: u16) -> u16 {
        let bytes = self.device.get(usize::from(offset)..).and_then(|rest| rest.first_chunk());
        u16::from_le_bytes(bytes.copied().unwrap_or_default())
    }

    /// Four bytes of the device.
    pub fn device_u32(&self, offset: u16) -> u32 {
        u32::from(self.device_u16(offset)) | u32::from(self.device_u16(offset + 2)) << 16
    }

    /// Makes the extended capability at `before` point to the one at `offset`.
    pub fn link_extended(&mut self, before: u16, offset: u16) {
        let header =
            self.bytes.get_mut(usize::from(before)..).and_then(|rest| rest.first_chunk_mut());
        let Some(header) = header else { return };
        // The low 20 bits are the ID and the version.
        let kept = u32::from_le_bytes(*header) & 0xf_ffff;
        *header = (kept | u32::from(offset) << 20).to_le_bytes();
    }

    /// Power management of a device that stays in D0; `None` without room for it.
    pub fn power(&mut self, Capability { offset, room, .. }: Capability) -> Option<()> {
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
    pub fn express(
        &mut self,
        Capability { offset, room, .. }: Capability,
        reset: bool,
    ) -> Option<u16> {
        if room < EXPRESS_LENGTH {
            return None;
        }
        let version = self.device_u16(offset + EXPRESS_CAPABILITIES) & EXPRESS_VERSION;
        let capabilities = version | INTEGRATED_ENDPOINT;
        self.put(offset + EXPRESS_CAPABILITIES, &capabilities.to_le_bytes());
        let kept = DEVICE_CAPABILITIES | if reset { FLR_CAPABLE } else { 0 };
        let kept = self.device_u32(offset + EXPRESS_DEVICE_CAPABILITIES) & kept;
        self.put(offset + EXPRESS_DEVICE_CAPABILITIES, &kept.to_le_bytes());
        // The link's registers, and what version 2 adds, stay zero: there is no link.
        Some(offset + EXPRESS_DEVICE_CONTROL)
    }

    /// MSI, disabled and without a message; `None` without room for it.
    pub fn msi(&mut self, Capability { offset, room, .. }: Capability) -> Option<()> {
        let control = self.device_u16(offset + 2);
        let kept = MsiControl::from_bits(control);
        let maskable = control & MSI_MASKABLE != 0;
        // At most 2^5 vectors; higher values are reserved.
        let vectors = kept.multiple_message_capable().min(5);
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

    /// MSI-X, disabled; `None` without room for it.
    pub fn msix(&mut self, Capability { offset, room, .. }: Capability) -> Option<MsixStructures> {
        if room < MSIX_LENGTH {
            return None;
        }
        let last = MsixControl::from_bits(self.device_u16(offset + 2)).table_size();
        let shown = MsixControl::new().with_table_size(last);
        self.put(offset + 2, &shown.into_bits().to_le_bytes());
        let changeable = MsixControl::new().with_function_mask(true).with_enable(true);
        self.allow(offset + 2, &changeable.into_bits().to_le_bytes());
        self.copy(offset + MSIX_TABLE..offset + MSIX_LENGTH);
        let place = |value: u32| ((value & MSIX_BAR) as usize, u64::from(value & !MSIX_BAR));
        Some(MsixStructures {
            offset,
            vectors: last + 1,
            table: place(self.device_u32(offset + MSIX_TABLE)),
            pending: place(self.device_u32(offset + MSIX_PENDING)),
        })
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
mod tests {
    use super::*;

    #[test]
    fn what_does_not_lie_in_configuration_space_is_left_out() {
        let device = [0x55; CONFIG_SIZE];
        let mut draft = Draft::new(&device, false);
        let (bytes, writable) = (draft.bytes.clone(), draft.writable.clone());
        for beyond in [CONFIG_SIZE as u16 - 1, CONFIG_SIZE as u16, u16::MAX - 2] {
            draft.put(beyond, &[1, 2]);
            draft.allow(beyond, &[1, 2]);
            draft.copy(beyond..beyond + 2);
            draft.live(beyond..beyond + 2);
            draft.link_extended(beyond, 0x100);
            assert_eq!(draft.device_u16(beyond), 0);
        }
        assert!(draft.bytes == bytes && draft.writable == writable);
        let last = CONFIG_SIZE as u16 - 2;
        draft.put(last, &[1, 2]);
        assert_eq!((draft.bytes[CONFIG_SIZE - 1], draft.device_u16(last)), (2, 0x5555));
    }

    #[test]
    fn a_link_keeps_id_and_version() {
        let device = [0; CONFIG_SIZE];
        let mut draft = Draft::new(&device, false);
        draft.put(0x100, &0x0003_000d_u32.to_le_bytes());
        draft.link_extended(0x100, 0x140);
        draft.link_extended(0x100, 0xffc);
        assert_eq!(draft.bytes[0x100..0x104], 0xffc3_000d_u32.to_le_bytes());
    }
}
