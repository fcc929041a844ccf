// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest-visible state of a virtual SMMUv3, as plain data.

use super::faults::log::FaultLog;
use super::requesters::TableRegisters;
use crate::spec::smmuv3::queue::{CmdqCons, CmdqProd, QueueBase};
use crate::spec::smmuv3::regs::{Cr0, Cr1, Cr2, Gbpa, StrtabBase, StrtabBaseCfg};
use crate::spec::smmuv3::StreamId;

/// Registers except those of events, errors and interrupts, which have a lock of their own.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Registers {
    /// CR0, as written.
    pub cr0: Cr0,
    /// CR0ACK: the part of it in effect.
    pub cr0ack: Cr0,
    /// CR1.
    pub cr1: Cr1,
    /// CR2.
    pub cr2: Cr2,
    /// GBPA. Update stays set while the host has failed.
    pub gbpa: Gbpa,
    /// STRTAB_BASE.
    pub strtab_base: StrtabBase,
    /// STRTAB_BASE_CFG.
    pub strtab_base_cfg: StrtabBaseCfg,
    /// CMDQ_BASE.
    pub cmdq_base: QueueBase,
    /// CMDQ_PROD.
    pub cmdq_prod: CmdqProd,
    /// CMDQ_CONS: everything before it is complete.
    pub cmdq_cons: CmdqCons,
}

impl Default for Registers {
    /// The state after reset: everything is disabled, transactions pass with their own attributes.
    fn default() -> Self {
        Self {
            cr0: Cr0::new(),
            cr0ack: Cr0::new(),
            cr1: Cr1::new(),
            cr2: Cr2::new(),
            gbpa: Gbpa::new().with_shcfg(1),
            strtab_base: StrtabBase::new(),
            strtab_base_cfg: StrtabBaseCfg::new(),
            cmdq_base: QueueBase::new(),
            cmdq_prod: CmdqProd::new(),
            cmdq_cons: CmdqCons::new(),
        }
    }
}

impl Registers {
    /// Whether translation is enabled, or is being enabled or disabled: registers that it depends
    /// on are then fixed.
    pub(super) fn smmu_in_use(&self) -> bool {
        self.cr0.smmuen() || self.cr0ack.smmuen()
    }

    /// The location of the stream table.
    pub(super) fn table_registers(&self) -> TableRegisters {
        TableRegisters { base: self.strtab_base, cfg: self.strtab_base_cfg }
    }
}

/// The guest-visible state: a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct SmmuState {
    /// Registers except those of events, errors and interrupts.
    pub registers: Registers,
    /// The registers of events, errors and interrupts.
    pub faults: FaultLog,
    /// The streams behind the SMMU, ascending.
    pub streams: Vec<StreamId>,
}
