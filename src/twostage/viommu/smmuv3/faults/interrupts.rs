// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The interrupts of a virtual SMMUv3 itself: messages, or wires if it has no messages (§3.18).

use crate::spec::smmuv3::regs::{Gerror, IrqCfg0};
use crate::viommu::register_slot::pair;

/// An interrupt of an SMMU, by purpose, named as in device trees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SmmuInterrupt {
    /// `eventq`: the event queue is no longer empty, or has lost events.
    EventQueue,
    /// `gerror`: a global error is active.
    GlobalError,
    /// `cmdq-sync`: a CMD_SYNC that requests an interrupt is complete.
    CommandSync,
}

/// The sink of an SMMU's interrupts. It must not block, and must not call the SMMU.
pub trait SmmuInterrupts: Send + Sync {
    /// Writes the message `data` to `address`, outside guest memory. Returns `false` if nothing
    /// accepts it: the guest then sees a global error.
    fn message(&self, address: u64, data: u32) -> bool;

    /// Raises an edge on a wire. Used only by an SMMU that offers no messages, or whose guest has
    /// not set them up.
    fn wire(&self, interrupt: SmmuInterrupt);
}

/// The registers of one interrupt: `*_IRQ_CFG0` to `*_IRQ_CFG2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct InterruptConfig {
    /// CFG0: the address of the message.
    pub address: IrqCfg0,
    /// CFG1: its data.
    pub data: u32,
    /// CFG2: memory attributes of the message, without effect.
    pub attributes: u32,
}

impl InterruptConfig {
    /// The writable bits of CFG2: SH, MemAttr.
    pub(in crate::viommu::smmuv3) const ATTRIBUTES: u32 = 0x3f;

    /// CFG1 and CFG2 as one 64-bit value.
    pub(in crate::viommu::smmuv3) fn message_words(self) -> u64 {
        pair(self.data, self.attributes)
    }

    /// The signal for `interrupt`; `msi` says whether messages are offered.
    pub(in crate::viommu::smmuv3) fn signal(self, interrupt: SmmuInterrupt, msi: bool) -> Signal {
        Signal::new(interrupt, self.address.address().filter(|_| msi), self.data)
    }
}

/// An interrupt on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::viommu::smmuv3) struct Signal {
    pub interrupt: SmmuInterrupt,
    /// Address and data of a message; `None` for a wire.
    pub message: Option<(u64, u32)>,
}

impl Signal {
    /// `interrupt` as a message with `data`, if there is an address.
    pub fn new(interrupt: SmmuInterrupt, address: Option<u64>, data: u32) -> Self {
        Self { interrupt, message: address.map(|address| (address, data)) }
    }

    /// The global error of a message that could not be written.
    pub const fn abort_error(self) -> Gerror {
        let none = Gerror::new();
        match self.interrupt {
            SmmuInterrupt::EventQueue => none.with_msi_eventq_abt_err(true),
            SmmuInterrupt::GlobalError => none.with_msi_gerror_abt_err(true),
            SmmuInterrupt::CommandSync => none.with_msi_cmdq_abt_err(true),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_needs_an_address_and_the_feature() {
        let config =
            InterruptConfig { address: IrqCfg0::from_bits(0x808_0040), data: 3, attributes: 0 };
        let of =
            |config: InterruptConfig, msi| config.signal(SmmuInterrupt::EventQueue, msi).message;
        assert_eq!(of(config, true), Some((0x808_0040, 3)));
        assert_eq!(of(config, false), None);
        assert_eq!(of(InterruptConfig::default(), true), None);
    }
}
