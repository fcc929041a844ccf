// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The registers that software writes (§6.3): CR0, CR0ACK, CR1, CR2, GBPA; the address of the
//! stream table; interrupts and global errors (§3.18, §7.5).

use twostage_bits::bitfield;

/// Control register 0, and CR0ACK.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Cr0 {
    /// SMMUEN: translation by the stream table.
    pub smmuen: bool,
    /// PRIQEN: the PRI queue is written.
    pub priqen: bool,
    /// EVENTQEN: the event queue is written.
    pub eventqen: bool,
    /// CMDQEN: the command queue is read.
    pub cmdqen: bool,
    /// ATSCHK: translated transactions of ATS are checked.
    pub atschk: bool,
    #[bits(1)]
    __: u8,
    /// VMW: how many low bits of a VMID are ignored.
    #[bits(3)]
    pub vmw: u8,
    #[bits(23)]
    __: u32,
}

/// Control register 1.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Cr1 {
    /// QUEUE_IC, QUEUE_OC, QUEUE_SH: memory attributes of queues.
    #[bits(6)]
    pub queue: u8,
    /// TABLE_IC, TABLE_OC, TABLE_SH: memory attributes of tables.
    #[bits(6)]
    pub table: u8,
    #[bits(20)]
    __: u32,
}

/// Control register 2.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Cr2 {
    /// E2H: EL2 contexts are EL2-E2H.
    pub e2h: bool,
    /// RECINVSID: transactions with StreamIDs beyond the stream table are recorded
    /// (C_BAD_STREAMID).
    pub recinvsid: bool,
    /// PTM: does not take part in broadcast TLB maintenance.
    pub ptm: bool,
    #[bits(29)]
    __: u32,
}

/// Global bypass attribute register: treatment of transactions while SMMUEN is 0.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Gbpa {
    /// MemAttr: memory type, if MTCFG is set.
    #[bits(4)]
    pub memattr: u8,
    /// MTCFG: the memory type is replaced.
    pub mtcfg: bool,
    #[bits(3)]
    __: u8,
    /// ALLOCCFG: allocation hints.
    #[bits(4)]
    pub alloccfg: u8,
    /// SHCFG: shareability; 1 is that of the transaction.
    #[bits(2)]
    pub shcfg: u8,
    #[bits(2)]
    __: u8,
    /// PRIVCFG: privilege.
    #[bits(2)]
    pub privcfg: u8,
    /// INSTCFG: instruction or data.
    #[bits(2)]
    pub instcfg: u8,
    /// ABORT: all transactions are terminated.
    pub abort: bool,
    #[bits(10)]
    __: u16,
    /// Update: written as 1 with the new values; reads as 1 until they have taken effect.
    pub update: bool,
}

/// Stream table base register.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct StrtabBase {
    #[bits(6)]
    __: u8,
    /// ADDR, in 64 bytes.
    #[bits(46)]
    pub addr: u64,
    #[bits(10)]
    __: u16,
    /// RA: read-allocate hint.
    pub ra: bool,
    #[bits(1)]
    __: u8,
}

impl StrtabBase {
    /// Bits that software can write.
    pub const WRITABLE: u64 = 0x400f_ffff_ffff_ffc0;

    /// The address, in bytes. Bits below the size of the table are ignored.
    pub const fn address(self) -> u64 {
        self.addr() << 6
    }
}

/// The format of the stream table ([`StrtabBaseCfg::fmt`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StrtabFormat {
    /// 0: one table of entries.
    Linear,
    /// 1: a table of descriptors of tables of `2^split` entries.
    TwoLevel,
    /// 2, 3.
    Reserved,
}

/// Stream table base configuration register.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct StrtabBaseCfg {
    /// LOG2SIZE: binary logarithm of the number of StreamIDs that the table covers.
    #[bits(6)]
    pub log2size: u8,
    /// SPLIT: bits of a StreamID that index the second level: 6, 8 or 10.
    #[bits(5)]
    pub split: u8,
    #[bits(5)]
    __: u8,
    /// FMT; see [`StrtabBaseCfg::format`].
    #[bits(2)]
    pub fmt: u8,
    #[bits(14)]
    __: u16,
}

impl StrtabBaseCfg {
    /// Bits that software can write.
    pub const WRITABLE: u32 = 0x3_07ff;

    /// Decodes FMT.
    pub const fn format(self) -> StrtabFormat {
        match self.fmt() {
            0 => StrtabFormat::Linear,
            1 => StrtabFormat::TwoLevel,
            _ => StrtabFormat::Reserved,
        }
    }

    /// The effective SPLIT: reserved values behave as 6.
    pub const fn effective_split(self) -> u8 {
        match self.split() {
            split @ (8 | 10) => split,
            _ => 6,
        }
    }
}

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

/// LO, of PRIQ_IRQ_CFG2: the interrupt of the PRI queue is for requests that are the last of their
/// group, not for a queue that is no longer empty (§6.3.36).
pub const PRIQ_LAST_ONLY: u32 = 1 << 31;

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

    mod control {
        use super::*;

        #[test]
        fn fields_stand_where_the_specification_puts_them() {
            assert_eq!(Cr0::new().with_smmuen(true).with_eventqen(true).into_bits(), 0b101);
            assert_eq!(Cr0::new().with_cmdqen(true).with_priqen(true).into_bits(), 0b1010);
            assert_eq!(Cr0::new().with_atschk(true).with_vmw(7).into_bits(), 1 << 4 | 7 << 6);
            assert_eq!(Cr1::new().with_queue(0x3f).into_bits(), 0x3f);
            assert_eq!(Cr1::new().with_table(0x3f).into_bits(), 0x3f << 6);
            assert_eq!(Cr2::new().with_ptm(true).with_recinvsid(true).into_bits(), 0b110);
            assert_eq!(
                Gbpa::new().with_abort(true).with_update(true).into_bits(),
                1 << 31 | 1 << 20
            );
            assert_eq!(Gbpa::new().with_shcfg(1).with_alloccfg(1).into_bits(), 1 << 12 | 1 << 8);
            assert_eq!(Gbpa::new().with_instcfg(3).with_privcfg(3).into_bits(), 0xf << 16);
        }
    }

    mod tables {
        use super::*;

        #[test]
        fn fields_stand_where_the_specification_puts_them() {
            let all = StrtabBase::new().with_addr((1 << 46) - 1).with_ra(true);
            assert_eq!(all.into_bits(), StrtabBase::WRITABLE);
            assert_eq!(StrtabBase::from_bits(u64::MAX).address(), 0x000f_ffff_ffff_ffc0);
            let all = StrtabBaseCfg::new().with_log2size(63).with_split(31).with_fmt(3);
            assert_eq!(all.into_bits(), StrtabBaseCfg::WRITABLE);
            let linux = StrtabBaseCfg::from_bits(1 << 16 | 8 << 6 | 16);
            assert_eq!((linux.format(), linux.effective_split()), (StrtabFormat::TwoLevel, 8));
            assert_eq!(linux.log2size(), 16);
            assert_eq!(StrtabBaseCfg::new().with_split(7).effective_split(), 6);
            assert_eq!(StrtabBaseCfg::new().with_fmt(2).format(), StrtabFormat::Reserved);
        }
    }

    mod interrupt {
        use super::*;

        #[test]
        fn fields_stand_where_the_specification_puts_them() {
            assert_eq!(
                IrqCtrl::new().with_eventq_irqen(true).with_gerror_irqen(true).into_bits(),
                5
            );
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
}
