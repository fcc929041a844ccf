// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest-visible state of a virtual VT-d, as plain data.

use super::faults::interrupts::EventRegisters;
use super::faults::log::FaultLog;
use crate::spec::pci::Bdf;
use crate::spec::vtd::regs::{
    Ccmd, Gsts, Ics, IotlbReg, Iqa, Iqercd, Irta, Iva, QueuePointer, Rtaddr,
};

/// Registers except those of faults, which have a lock of their own.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Registers {
    /// GSTS.
    pub gsts: Gsts,
    /// RTADDR, as written.
    pub rtaddr: Rtaddr,
    /// The root table latched by GCMD.SRTP, which is the one in use.
    pub root: Option<Rtaddr>,
    /// CCMD.
    pub ccmd: Ccmd,
    /// IVA.
    pub iva: Iva,
    /// IOTLB.
    pub iotlb: IotlbReg,
    /// IQA.
    pub iqa: Iqa,
    /// IQH: everything before it is complete.
    pub iqh: QueuePointer,
    /// IQT.
    pub iqt: QueuePointer,
    /// A device that did not answer a device-TLB invalidation: the next wait is aborted because of
    /// it.
    pub unanswered: Option<Bdf>,
    /// IQERCD.
    pub iqercd: Iqercd,
    /// ICS.
    pub ics: Ics,
    /// IECTL, IEDATA, IEADDR, IEUADDR.
    pub invalidation_event: EventRegisters,
    /// IRTA, as written.
    pub irta: Irta,
    /// The interrupt remapping table latched by GCMD.SIRTP, which is the one in use.
    pub interrupt_table: Irta,
}

/// The guest-visible state: a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct VtdState {
    /// Registers except those of faults.
    pub registers: Registers,
    /// Fault status and records.
    pub faults: FaultLog,
    /// The functions behind the unit, ascending.
    pub devices: Vec<Bdf>,
}
