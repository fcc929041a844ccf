// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupts and global errors: IRQ_CTRL, GERROR, *_IRQ_CFG0 (§3.18, §6.3, §7.5).

use bitfield_struct::bitfield;

/// Interrupt control register, and IRQ_CTRLACK.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct IrqCtrl {
    /// GERROR_IRQEN: of global errors.
    pub gerror_irqen: bool,
    /// PRIQ_IRQEN: of the PRI queue.
    pub priq_irqen: bool,
    /// EVENTQ_IRQEN: of the event queue.
    pub eventq_irqen: bool,
    #[bits(29)]
    __: u32,
}

/// Global error register, and GERRORN. An error is active while its bits in the two differ: the
/// SMMU toggles it in GERROR, software in GERRORN.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Gerror {
    /// CMDQ_ERR: the command queue stopped; CMDQ_CONS.ERR says why.
    pub cmdq_err: bool,
    #[bits(1)]
    __: u8,
    /// EVENTQ_ABT_ERR: a record could not be written; events are lost.
    pub eventq_abt_err: bool,
    /// PRIQ_ABT_ERR: a page request could not be written.
    pub priq_abt_err: bool,
    /// MSI_CMDQ_ABT_ERR: the message of a CMD_SYNC could not be written.
    pub msi_cmdq_abt_err: bool,
    /// MSI_EVENTQ_ABT_ERR: the message for events could not be written.
    pub msi_eventq_abt_err: bool,
    /// MSI_PRIQ_ABT_ERR: the message for page requests could not be written.
    pub msi_priq_abt_err: bool,
    /// MSI_GERROR_ABT_ERR: the message for global errors could not be written.
    pub msi_gerror_abt_err: bool,
    /// SFM_ERR: service failure mode.
    pub sfm_err: bool,
    #[bits(23)]
    __: u32,
}

impl Gerror {
    /// All errors.
    pub const ALL: Self = Self::from_bits(0x1fd);
}

/// GERROR_IRQ_CFG0, EVENTQ_IRQ_CFG0, PRIQ_IRQ_CFG0: the address of an MSI.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct IrqCfg0 {
    #[bits(2)]
    __: u8,
    /// ADDR, in 4 bytes.
    #[bits(50)]
    pub addr: u64,
    #[bits(12)]
    __: u16,
}

impl IrqCfg0 {
    /// Bits that software can write.
    pub const WRITABLE: u64 = 0x000f_ffff_ffff_fffc;

    /// The address in bytes; `None` if it is 0: no MSI is sent, the interrupt is wired.
    pub const fn address(self) -> Option<u64> {
        match self.addr() {
            0 => None,
            addr => Some(addr << 2),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        assert_eq!(IrqCtrl::new().with_eventq_irqen(true).with_gerror_irqen(true).into_bits(), 5);
        assert_eq!(Gerror::new().with_cmdq_err(true).with_eventq_abt_err(true).into_bits(), 5);
        assert_eq!(Gerror::new().with_msi_cmdq_abt_err(true).into_bits(), 1 << 4);
        assert_eq!(Gerror::new().with_msi_gerror_abt_err(true).into_bits(), 1 << 7);
        assert_eq!(Gerror::new().with_sfm_err(true).into_bits(), 1 << 8);
        let all = IrqCfg0::new().with_addr((1 << 50) - 1);
        assert_eq!(all.into_bits(), IrqCfg0::WRITABLE);
        assert_eq!(IrqCfg0::from_bits(0x808_0043).address(), Some(0x808_0040));
        assert_eq!(IrqCfg0::from_bits(3).address(), None);
    }
}
