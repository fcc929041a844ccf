// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The register page (§11.4): offsets, names and layouts.

mod capability;
mod command;
mod fault;
mod queue;

pub use capability::{Cap, Ecap};
pub use command::{
    Ccmd, ContextGranularity, Gcmd, Gsts, IotlbGranularity, IotlbReg, Irta, Iva, Pmen, Rtaddr,
    TranslationTableMode,
};
pub use fault::{EventControl, FaultRecord, FaultRecordHigh, FaultRecordLow, Fsts};
pub use queue::{Ics, IqErrorInfo, Iqa, Iqercd, Pqa, Prs, QueuePointer};

macro_rules! registers {
    ($($(#[$doc:meta])* $name:ident = $offset:literal, $size:literal;)*) => {
        $($(#[$doc])* pub const $name: u64 = $offset;)*

        /// The registers that stand at a fixed offset: offset, size in bytes, name.
        const FIXED: &[(u64, u64, &str)] = &[$(($offset, $size, stringify!($name)),)*];
    };
}

registers! {
    /// Version (§11.4.1).
    VER = 0x00, 4;
    /// Capability (§11.4.2).
    CAP = 0x08, 8;
    /// Extended capability (§11.4.3).
    ECAP = 0x10, 8;
    /// Global command (§11.4.4).
    GCMD = 0x18, 4;
    /// Global status (§11.4.4).
    GSTS = 0x1c, 4;
    /// Root table address (§11.4.5).
    RTADDR = 0x20, 8;
    /// Context command (§11.4.6).
    CCMD = 0x28, 8;
    /// Fault status (§11.4.7).
    FSTS = 0x34, 4;
    /// Fault event control (§11.4.7).
    FECTL = 0x38, 4;
    /// Fault event data (§11.4.7).
    FEDATA = 0x3c, 4;
    /// Fault event address (§11.4.7).
    FEADDR = 0x40, 4;
    /// Fault event upper address (§11.4.7).
    FEUADDR = 0x44, 4;
    /// Advanced fault log (§11.4.7).
    AFLOG = 0x58, 8;
    /// Protected memory enable (§11.4.8).
    PMEN = 0x64, 4;
    /// Protected low memory base (§11.4.8).
    PLMBASE = 0x68, 4;
    /// Protected low memory limit (§11.4.8).
    PLMLIMIT = 0x6c, 4;
    /// Protected high memory base (§11.4.8).
    PHMBASE = 0x70, 8;
    /// Protected high memory limit (§11.4.8).
    PHMLIMIT = 0x78, 8;
    /// Invalidation queue head (§11.4.9).
    IQH = 0x80, 8;
    /// Invalidation queue tail (§11.4.9).
    IQT = 0x88, 8;
    /// Invalidation queue address (§11.4.9).
    IQA = 0x90, 8;
    /// Invalidation completion status (§11.4.9).
    ICS = 0x9c, 4;
    /// Invalidation event control (§11.4.9).
    IECTL = 0xa0, 4;
    /// Invalidation event data (§11.4.9).
    IEDATA = 0xa4, 4;
    /// Invalidation event address (§11.4.9).
    IEADDR = 0xa8, 4;
    /// Invalidation event upper address (§11.4.9).
    IEUADDR = 0xac, 4;
    /// Invalidation queue error record (§11.4.9).
    IQERCD = 0xb0, 8;
    /// Interrupt remapping table address (§11.4.10).
    IRTA = 0xb8, 8;
    /// Page request queue head (§11.4.11).
    PQH = 0xc0, 8;
    /// Page request queue tail (§11.4.11).
    PQT = 0xc8, 8;
    /// Page request queue address (§11.4.11).
    PQA = 0xd0, 8;
    /// Page request status (§11.4.11).
    PRS = 0xdc, 4;
    /// Page request event control (§11.4.11).
    PECTL = 0xe0, 4;
    /// Page request event data (§11.4.11).
    PEDATA = 0xe4, 4;
    /// Page request event address (§11.4.11).
    PEADDR = 0xe8, 4;
    /// Page request event upper address (§11.4.11).
    PEUADDR = 0xec, 4;
}

/// Size of one fault recording register, in bytes.
pub const FRCD_SIZE: u64 = 16;
/// Unit of [`Cap::fro`] and [`Ecap::iro`], in bytes.
pub const OFFSET_UNIT: u64 = 16;
/// Offset of the invalidate address register (IVA) from [`Ecap::iotlb_offset`].
pub const IVA: u64 = 0;
/// Offset of the IOTLB invalidate register from [`Ecap::iotlb_offset`].
pub const IOTLB: u64 = 8;

/// The name of the register that holds byte `offset`, for traces. The registers that move with
/// [`Cap::fro`] and [`Ecap::iro`] are found by `cap` and `ecap`; `"reserved"` where there is none.
pub fn name(offset: u64, cap: Cap, ecap: Ecap) -> &'static str {
    let within = |start: u64, size: u64| (start..start + size).contains(&offset);
    let fixed = FIXED.iter().find(|&&(start, size, _)| within(start, size));
    if let Some(&(_, _, name)) = fixed {
        name
    } else if within(ecap.iotlb_offset() + IVA, 8) {
        "IVA"
    } else if within(ecap.iotlb_offset() + IOTLB, 8) {
        "IOTLB"
    } else if within(cap.fault_record_offset(), cap.fault_records() * FRCD_SIZE) {
        "FRCD"
    } else {
        "reserved"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_of_a_register_has_its_name() {
        let cap = Cap::new().with_fro(0x22).with_nfr(1);
        let ecap = Ecap::new().with_iro(0x10);
        let of = |offset| name(offset, cap, ecap);
        assert_eq!((of(0), of(3), of(4)), ("VER", "VER", "reserved"));
        assert_eq!((of(0x1c), of(0x20), of(0x24)), ("GSTS", "RTADDR", "RTADDR"));
        assert_eq!((of(0x100), of(0x108), of(0x110)), ("IVA", "IOTLB", "reserved"));
        assert_eq!((of(0x220), of(0x23f), of(0x240)), ("FRCD", "FRCD", "reserved"));
        assert_eq!(of(u64::MAX), "reserved");
    }

    #[test]
    fn registers_do_not_overlap() {
        for pair in FIXED.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
    }
}
