// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The register page (§11.4): offsets and names, and what the unit can: CAP and ECAP.

mod command;
mod queue;

use twostage_bits::bitfield;

pub use command::{
    Ccmd, ContextGranularity, Gcmd, Gsts, IotlbGranularity, IotlbReg, Irta, Iva, Pmen, Rtaddr,
    TranslationTableMode,
};
pub use queue::{
    EventControl, FaultRecord, FaultRecordHigh, FaultRecordLow, Fsts, Ics, IqErrorInfo, Iqa,
    Iqercd, Pqa, Prs, QueuePointer,
};

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

/// Capability register (§11.4.2).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Cap {
    /// ND: domain ids have `4 + 2 * nd` bits; 7 is reserved.
    #[bits(3)]
    pub nd: u8,
    /// AFL: advanced fault logging.
    pub afl: bool,
    /// RWBF: software must flush the write buffer.
    pub rwbf: bool,
    /// PLMR: protected low memory region.
    pub plmr: bool,
    /// PHMR: protected high memory region.
    pub phmr: bool,
    /// CM: caching mode; entries that are not present or erroneous may be cached.
    pub cm: bool,
    /// SAGAW: second-stage widths; bit 1 is 39 bits, bit 2 is 48, bit 3 is 57.
    #[bits(5)]
    pub sagaw: u8,
    #[bits(3)]
    __: u8,
    /// MGAW: maximum guest address width, minus one.
    #[bits(6)]
    pub mgaw: u8,
    /// ZLR: zero-length reads of write-only pages.
    pub zlr: bool,
    #[bits(1)]
    __: u8,
    /// FRO: offset of the fault recording registers, in 16 bytes.
    #[bits(10)]
    pub fro: u16,
    /// SSLPS: second-stage large pages; bit 0 is 2 MiB, bit 1 is 1 GiB.
    #[bits(4)]
    pub sslps: u8,
    #[bits(1)]
    __: u8,
    /// PSI: page-selective invalidation.
    pub psi: bool,
    /// NFR: number of fault recording registers, minus one.
    #[bits(8)]
    pub nfr: u8,
    /// MAMV: maximum address mask of an invalidation.
    #[bits(6)]
    pub mamv: u8,
    /// DWD: write draining.
    pub dwd: bool,
    /// DRD: read draining.
    pub drd: bool,
    /// FS1GP: first-stage 1 GiB pages.
    pub fs1gp: bool,
    #[bits(2)]
    __: u8,
    /// PI: posted interrupts.
    pub pi: bool,
    /// FS5LP: first-stage 5-level paging.
    pub fs5lp: bool,
    /// ECMDS: enhanced commands.
    pub ecmds: bool,
    /// ESIRTPS: setting the interrupt remapping table pointer invalidates.
    pub esirtps: bool,
    /// ESRTPS: setting the root table pointer invalidates.
    pub esrtps: bool,
}

impl Cap {
    /// Offset of the first fault recording register, in bytes.
    pub const fn fault_record_offset(self) -> u64 {
        self.fro() as u64 * OFFSET_UNIT
    }

    /// Number of fault recording registers.
    pub const fn fault_records(self) -> u64 {
        self.nfr() as u64 + 1
    }

    /// Maximum guest address width, in bits.
    pub const fn guest_address_width(self) -> u8 {
        self.mgaw() + 1
    }
}

/// Extended capability register (§11.4.3).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Ecap {
    /// C: page walks are coherent.
    pub c: bool,
    /// QI: queued invalidation.
    pub qi: bool,
    /// DT: device-TLBs.
    pub dt: bool,
    /// IR: interrupt remapping.
    pub ir: bool,
    /// EIM: extended interrupt mode.
    pub eim: bool,
    #[bits(1)]
    __: u8,
    /// PT: pass-through.
    pub pt: bool,
    /// SC: snoop control.
    pub sc: bool,
    /// IRO: offset of the IOTLB registers, in 16 bytes.
    #[bits(10)]
    pub iro: u16,
    #[bits(2)]
    __: u8,
    /// MHMV: maximum handle mask of an interrupt entry cache invalidation.
    #[bits(4)]
    pub mhmv: u8,
    #[bits(1)]
    __: u8,
    /// MTS: memory types.
    pub mts: bool,
    /// NEST: nested translation.
    pub nest: bool,
    #[bits(2)]
    __: u8,
    /// PRS: page requests.
    pub prs: bool,
    /// ERS: execute requests.
    pub ers: bool,
    /// SRS: supervisor requests.
    pub srs: bool,
    #[bits(1)]
    __: u8,
    /// NWFS: no-write flag.
    pub nwfs: bool,
    /// EAFS: extended accessed flag.
    pub eafs: bool,
    /// PSS: width of a PASID in bits, minus one.
    #[bits(5)]
    pub pss: u8,
    /// PASID: requests with PASID.
    pub pasid: bool,
    /// DIT: device-TLB invalidations can be throttled.
    pub dit: bool,
    /// PDS: page request drain.
    pub pds: bool,
    /// SMTS: scalable mode.
    pub smts: bool,
    /// VCS: virtual commands.
    pub vcs: bool,
    /// SSADS: second-stage accessed and dirty flags.
    pub ssads: bool,
    /// SSTS: second-stage translation in scalable mode.
    pub ssts: bool,
    /// FSTS: first-stage translation.
    pub fsts: bool,
    /// SMPWCS: scalable-mode page walks are coherent.
    pub smpwcs: bool,
    /// RPS: RID_PASID.
    pub rps: bool,
    #[bits(1)]
    __: u8,
    /// PMS: performance monitoring.
    pub pms: bool,
    /// ADMS: abort-DMA mode.
    pub adms: bool,
    /// RPRIVS: RID_PRIV.
    pub rprivs: bool,
    #[bits(4)]
    __: u8,
    /// SMS: stop marker.
    pub sms: bool,
    #[bits(5)]
    __: u8,
}

impl Ecap {
    /// Offset of the IVA and IOTLB registers, in bytes.
    pub const fn iotlb_offset(self) -> u64 {
        self.iro() as u64 * OFFSET_UNIT
    }

    /// Width of a PASID, in bits; 0 when requests with PASID are not supported.
    pub const fn pasid_bits(self) -> u8 {
        if self.pasid() {
            self.pss() + 1
        } else {
            0
        }
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

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        assert_eq!(Cap::new().with_cm(true).into_bits(), 1 << 7);
        assert_eq!(Cap::new().with_sagaw(0x1f).into_bits(), 0x1f << 8);
        assert_eq!(Cap::new().with_mgaw(0x3f).into_bits(), 0x3f << 16);
        assert_eq!(Cap::new().with_fro(0x3ff).into_bits(), 0x3ff << 24);
        assert_eq!(Cap::new().with_sslps(0xf).into_bits(), 0xf << 34);
        assert_eq!(Cap::new().with_psi(true).into_bits(), 1 << 39);
        assert_eq!(Cap::new().with_nfr(0xff).into_bits(), 0xff << 40);
        assert_eq!(Cap::new().with_mamv(0x3f).into_bits(), 0x3f << 48);
        assert_eq!(Cap::new().with_fs1gp(true).into_bits(), 1 << 56);
        assert_eq!(Cap::new().with_fs5lp(true).into_bits(), 1 << 60);
        assert_eq!(Cap::new().with_esrtps(true).into_bits(), 1 << 63);
        assert_eq!(Ecap::new().with_pt(true).into_bits(), 1 << 6);
        assert_eq!(Ecap::new().with_iro(0x3ff).into_bits(), 0x3ff << 8);
        assert_eq!(Ecap::new().with_mhmv(0xf).into_bits(), 0xf << 20);
        assert_eq!(Ecap::new().with_nest(true).into_bits(), 1 << 26);
        assert_eq!(Ecap::new().with_prs(true).into_bits(), 1 << 29);
        assert_eq!(Ecap::new().with_eafs(true).into_bits(), 1 << 34);
        assert_eq!(Ecap::new().with_pss(0x1f).into_bits(), 0x1f << 35);
        assert_eq!(Ecap::new().with_pasid(true).into_bits(), 1 << 40);
        assert_eq!(Ecap::new().with_smts(true).into_bits(), 1 << 43);
        assert_eq!(Ecap::new().with_ssts(true).into_bits(), 1 << 46);
        assert_eq!(Ecap::new().with_fsts(true).into_bits(), 1 << 47);
        assert_eq!(Ecap::new().with_rps(true).into_bits(), 1 << 49);
        assert_eq!(Ecap::new().with_adms(true).into_bits(), 1 << 52);
        assert_eq!(Ecap::new().with_sms(true).into_bits(), 1 << 58);
    }

    #[test]
    fn no_pasid_support_is_no_pasid_bits() {
        assert_eq!(Ecap::new().with_pss(19).pasid_bits(), 0);
        assert_eq!(Ecap::new().with_pss(19).with_pasid(true).pasid_bits(), 20);
    }
}
