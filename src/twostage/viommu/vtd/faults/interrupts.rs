// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The four registers of an event: control, data, address, upper address (§11.4.7, §11.4.9).

use crate::spec::vtd::regs::EventControl;
use crate::viommu::MsiMessage;

/// Registers of one event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct EventRegisters {
    /// FECTL, IECTL.
    pub control: EventControl,
    /// FEDATA, IEDATA.
    pub data: u32,
    /// FEADDR, IEADDR.
    pub address: u32,
    /// FEUADDR, IEUADDR.
    pub upper_address: u32,
}

impl Default for EventRegisters {
    /// The state after reset: masked.
    fn default() -> Self {
        let control = EventControl::new().with_im(true);
        Self { control, data: 0, address: 0, upper_address: 0 }
    }
}

impl EventRegisters {
    /// The condition of the event became true: returns the message, unless it is masked and so
    /// pending.
    pub(in crate::viommu::vtd) fn raise(&mut self) -> Option<MsiMessage> {
        self.control.set_ip(true);
        self.deliver()
    }

    /// The guest cleared every status bit of the condition.
    pub(in crate::viommu::vtd) fn clear(&mut self) {
        self.control.set_ip(false);
    }

    /// The guest writes the control register, the data register or both; unmasking sends a pending
    /// message, with the data written at the same time.
    pub(in crate::viommu::vtd) fn write_control(
        &mut self,
        control: Option<u32>,
        data: Option<u32>,
    ) -> Option<MsiMessage> {
        self.data = data.unwrap_or(self.data);
        self.control.set_im(EventControl::from_bits(control?).im());
        self.deliver()
    }

    /// The guest writes the address register, the upper address register or both.
    pub(in crate::viommu::vtd) fn write_address(
        &mut self,
        address: Option<u32>,
        upper: Option<u32>,
    ) {
        self.address = address.map_or(self.address, |address| address & !0x3);
        self.upper_address = upper.unwrap_or(self.upper_address);
    }

    fn deliver(&mut self) -> Option<MsiMessage> {
        if self.control.im() || !self.control.ip() {
            return None;
        }
        self.control.set_ip(false);
        let address = u64::from(self.upper_address) << 32 | u64::from(self.address);
        Some(MsiMessage { address, data: self.data })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_masked_event_waits_for_the_unmask() {
        let mut event = EventRegisters::default();
        event.write_address(Some(0xfee0_1003), Some(1));
        assert_eq!(event.raise(), None);
        assert!(event.control.ip());
        assert_eq!(event.write_control(Some(1 << 31), Some(0x40)), None);
        let msi = MsiMessage { address: 0x1_fee0_1000, data: 0x41 };
        assert_eq!(event.write_control(None, None), None);
        assert_eq!(event.write_control(Some(0), Some(0x41)), Some(msi));
        assert!(!event.control.ip());
        assert_eq!(event.write_control(Some(0), None), None);
        assert_eq!(event.raise(), Some(msi));
    }

    #[test]
    fn a_cleared_event_is_not_pending() {
        let mut event = EventRegisters::default();
        assert_eq!(event.raise(), None);
        event.clear();
        assert_eq!(event.write_control(Some(0), None), None);
    }
}
