// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Enables and settings: CR0, CR0ACK, CR1, CR2, GBPA (§6.3).

use bitfield_struct::bitfield;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        assert_eq!(Cr0::new().with_smmuen(true).with_eventqen(true).into_bits(), 0b101);
        assert_eq!(Cr0::new().with_cmdqen(true).with_priqen(true).into_bits(), 0b1010);
        assert_eq!(Cr0::new().with_atschk(true).with_vmw(7).into_bits(), 1 << 4 | 7 << 6);
        assert_eq!(Cr1::new().with_queue(0x3f).into_bits(), 0x3f);
        assert_eq!(Cr1::new().with_table(0x3f).into_bits(), 0x3f << 6);
        assert_eq!(Cr2::new().with_ptm(true).with_recinvsid(true).into_bits(), 0b110);
        assert_eq!(Gbpa::new().with_abort(true).with_update(true).into_bits(), 1 << 31 | 1 << 20);
        assert_eq!(Gbpa::new().with_shcfg(1).with_alloccfg(1).into_bits(), 1 << 12 | 1 << 8);
        assert_eq!(Gbpa::new().with_instcfg(3).with_privcfg(3).into_bits(), 0xf << 16);
    }
}
