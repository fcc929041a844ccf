// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why a request was blocked: the fault reasons of DMA and interrupt remapping (§7.1.3).

use std::fmt;

macro_rules! fault_reasons {
    ($(
        $(#[$doc:meta])* $variant:ident = $code:literal, $condition:literal, $qualified:literal;
    )*) => {
        /// Reason of an unrecoverable fault, as in a fault record's FR field (§7.1.3).
        ///
        /// [`FaultReason::condition`] is the specification's short name of the condition;
        /// documentation search finds variants by it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
        pub enum FaultReason {
            $($(#[$doc])* #[doc(alias = $condition)] $variant,)*
        }

        impl FaultReason {
            /// Every reason, by ascending code.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The eight bits of FR.
            pub const fn code(self) -> u8 {
                match self {
                    $(Self::$variant => $code,)*
                }
            }

            /// Decodes `code`; `None` for a reserved code.
            pub const fn from_code(code: u8) -> Option<Self> {
                match code {
                    $($code => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// The specification's short name of the condition, such as `"SFS.1"`; the code
            /// itself, such as `"21h"`, for interrupt remapping.
            pub const fn condition(self) -> &'static str {
                match self {
                    $(Self::$variant => $condition,)*
                }
            }

            /// Whether the fault is qualified: not recorded if FPD is set.
            const fn is_qualified(self) -> bool {
                match self {
                    $(Self::$variant => $qualified,)*
                }
            }
        }
    };
}

fault_reasons! {
    /// Legacy mode: the root entry is not present.
    LegacyRootNotPresent = 0x01, "LRT.2", false;
    /// Legacy mode: the context entry is not present.
    LegacyContextNotPresent = 0x02, "LCT.2", true;
    /// Legacy mode: the context entry is programmed incorrectly (AW, TT, table address).
    LegacyContextInvalid = 0x03, "LCT.4", true;
    /// Legacy mode: the address is beyond the width of the tables or of the unit.
    LegacyAddressBeyond = 0x04, "LGN.1", true;
    /// Legacy mode: a write that the tables do not allow.
    LegacyWriteDenied = 0x05, "LGN.2", true;
    /// Legacy mode: a read that the tables do not allow.
    LegacyReadDenied = 0x06, "LGN.3", true;
    /// Legacy mode: a second-stage entry could not be read.
    LegacySecondStageAccess = 0x07, "LSS.1", true;
    /// Legacy mode: the root entry could not be read.
    LegacyRootAccess = 0x08, "LRT.1", false;
    /// Legacy mode: the context entry could not be read.
    LegacyContextAccess = 0x09, "LCT.1", false;
    /// Legacy mode: a reserved field of the root entry is set.
    LegacyRootReserved = 0x0a, "LRT.3", false;
    /// Legacy mode: a reserved field of the context entry is set.
    LegacyContextReserved = 0x0b, "LCT.3", true;
    /// Legacy mode: a reserved field of a second-stage entry is set.
    LegacySecondStageReserved = 0x0c, "LSS.2", true;
    /// Legacy mode: a translated or translation request that the context entry blocks.
    LegacyAddressTypeBlocked = 0x0d, "LCT.5", true;
    /// Legacy mode: the output address is in the interrupt address range.
    LegacyOutputInterruptRange = 0x0e, "LGN.4", true;
    /// Interrupt: a reserved field of the request is set.
    InterruptRequestReserved = 0x20, "20h", false;
    /// Interrupt: the index is beyond the table.
    InterruptIndexBeyond = 0x21, "21h", false;
    /// Interrupt: the table entry is not present.
    InterruptEntryNotPresent = 0x22, "22h", true;
    /// Interrupt: the table entry could not be read.
    InterruptEntryAccess = 0x23, "23h", false;
    /// Interrupt: a reserved field of the table entry is set.
    InterruptEntryReserved = 0x24, "24h", true;
    /// Interrupt: a compatibility-format request is blocked.
    InterruptCompatibilityBlocked = 0x25, "25h", false;
    /// Interrupt: the source is not the one the table entry expects.
    InterruptSourceMismatch = 0x26, "26h", true;
    /// Interrupt: the posted-interrupt descriptor could not be reached.
    InterruptPostedAccess = 0x27, "27h", true;
    /// Interrupt: a reserved field of the posted-interrupt descriptor is set.
    InterruptPostedReserved = 0x28, "28h", true;
    /// RTADDR is programmed incorrectly: the translation table mode or the address.
    RootTableAddressInvalid = 0x30, "RTA.1", false;
    /// A request with PASID while the translation table mode is legacy.
    PasidInLegacyMode = 0x31, "RTA.2", false;
    /// A page request while the translation table mode is legacy.
    PageRequestInLegacyMode = 0x32, "RTA.3", false;
    /// A request while the translation table mode is abort-DMA.
    AbortDmaMode = 0x33, "RTA.4", false;
    /// Scalable mode: the root entry could not be read.
    RootAccess = 0x38, "SRT.1", false;
    /// Scalable mode: the half of the root entry is not present.
    RootNotPresent = 0x39, "SRT.2", false;
    /// Scalable mode: a reserved field of the root entry is set.
    RootReserved = 0x3a, "SRT.3", false;
    /// Scalable mode: the context entry could not be read.
    ContextAccess = 0x40, "SCT.1", false;
    /// Scalable mode: the context entry is not present.
    ContextNotPresent = 0x41, "SCT.2", true;
    /// Scalable mode: a reserved field of the context entry is set.
    ContextReserved = 0x42, "SCT.3", true;
    /// Scalable mode: the context entry is programmed incorrectly.
    ContextInvalid = 0x43, "SCT.4", true;
    /// Scalable mode: a translated or translation request, and DTE is clear.
    DeviceTlbDisabled = 0x44, "SCT.5", true;
    /// Scalable mode: a request with PASID, and PASIDE is clear.
    PasidDisabled = 0x45, "SCT.6", true;
    /// Scalable mode: the PASID is beyond the PASID directory.
    PasidBeyondDirectory = 0x46, "SCT.7", true;
    /// Scalable mode: a page request, and PRE is clear.
    PageRequestDisabled = 0x47, "SCT.8", true;
    /// Scalable mode: RID_PASID is beyond the PASID directory.
    RidPasidBeyondDirectory = 0x48, "SCT.9", true;
    /// The PASID directory entry could not be read.
    PasidDirectoryAccess = 0x50, "SPD.1", false;
    /// The PASID directory entry is not present.
    PasidDirectoryNotPresent = 0x51, "SPD.2", true;
    /// A reserved field of the PASID directory entry is set.
    PasidDirectoryReserved = 0x52, "SPD.3", true;
    /// The PASID table entry could not be read.
    PasidTableAccess = 0x58, "SPT.1", false;
    /// The PASID table entry is not present.
    PasidEntryNotPresent = 0x59, "SPT.2", true;
    /// A reserved field of the PASID table entry is set.
    PasidEntryReserved = 0x5a, "SPT.3", true;
    /// The PASID table entry is programmed incorrectly: PGTT, AW or FSPM is reserved or not
    /// supported.
    PasidEntryInvalid = 0x5b, "SPT.4", true;
    /// An execute request, and ERE is clear.
    ExecuteDisabled = 0x5c, "SPT.5", true;
    /// A supervisor request, and SRE is clear.
    SupervisorDisabled = 0x5d, "SPT.6", true;
    /// A first-stage entry below the top table could not be read.
    FirstStageAccess = 0x70, "SFS.1", true;
    /// A first-stage entry is not present.
    FirstStageNotPresent = 0x71, "SFS.2", true;
    /// A reserved field of a first-stage entry is set.
    FirstStageReserved = 0x72, "SFS.3", true;
    /// The top first-stage table (FSPTPTR) could not be read.
    FirstStageTopAccess = 0x73, "SFS.4", true;
    /// Nested: a first-stage pointer is beyond the second stage.
    FirstStagePointerBeyond = 0x74, "SFS.5", true;
    /// Nested: the second stage does not allow reading the top first-stage table.
    FirstStageTopSecondStageDenied = 0x75, "SFS.6", true;
    /// Nested: the second stage does not allow reading a first-stage table.
    FirstStageSecondStageDenied = 0x76, "SFS.7", true;
    /// Nested: the second stage does not allow writing accessed and dirty flags.
    FirstStageFlagsSecondStageDenied = 0x77, "SFS.8", true;
    /// A second-stage entry below the top table could not be read.
    SecondStageAccess = 0x78, "SSS.1", true;
    /// A second-stage entry is not present or does not allow the request.
    SecondStageDenied = 0x79, "SSS.2", true;
    /// A reserved field of a second-stage entry is set.
    SecondStageReserved = 0x7a, "SSS.3", true;
    /// The top second-stage table (SSPTPTR) could not be read.
    SecondStageTopAccess = 0x7b, "SSS.4", true;
    /// Second-stage accessed and dirty flags cannot be written: page walks do not snoop.
    SecondStageFlagsNoSnoop = 0x7c, "SSS.5", true;
    /// The atomic update of second-stage accessed and dirty flags failed.
    SecondStageFlagsUpdate = 0x7d, "SSS.6", true;
    /// The address is not canonical.
    NotCanonical = 0x80, "SGN.1", true;
    /// A user request to a supervisor-only page.
    UserDenied = 0x81, "SGN.2", true;
    /// An execute request that the tables do not allow.
    ExecuteDenied = 0x82, "SGN.3", true;
    /// The address is beyond the host address width.
    AddressBeyondHost = 0x83, "SGN.4", true;
    /// The address is beyond the width of the second-stage tables or of the unit.
    AddressBeyondGuest = 0x84, "SGN.5", true;
    /// A write that the tables do not allow.
    WriteDenied = 0x85, "SGN.6", true;
    /// A read that the tables do not allow.
    ReadDenied = 0x86, "SGN.7", true;
    /// The output address is in the interrupt address range.
    OutputInterruptRange = 0x87, "SGN.8", true;
    /// First-stage accessed and dirty flags cannot be written: page walks do not snoop.
    FirstStageFlagsNoSnoop = 0x90, "SFS.9", true;
    /// The atomic update of first-stage accessed and dirty flags failed.
    FirstStageFlagsUpdate = 0x91, "SFS.10", true;
}

impl FaultReason {
    /// Whether the fault is recorded, given FPD of the entries on the way.
    pub const fn is_recorded(self, fault_disabled: bool) -> bool {
        !(fault_disabled && self.is_qualified())
    }
}

impl fmt::Display for FaultReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#04x} {} ({self:?})", self.code(), self.condition())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_round_trip_and_ascend() {
        for reason in FaultReason::ALL {
            assert_eq!(FaultReason::from_code(reason.code()), Some(*reason));
        }
        assert!(FaultReason::ALL.windows(2).all(|pair| pair[0].code() < pair[1].code()));
        let known = (0..=u8::MAX).filter(|&code| FaultReason::from_code(code).is_some()).count();
        assert_eq!(known, FaultReason::ALL.len());
    }

    #[test]
    fn conditions_are_named_once() {
        let names: std::collections::BTreeSet<_> =
            FaultReason::ALL.iter().map(|reason| reason.condition()).collect();
        assert_eq!(names.len(), FaultReason::ALL.len());
    }

    #[test]
    fn fpd_suppresses_qualified_faults_only() {
        for (reason, qualified) in
            [(FaultReason::ContextNotPresent, true), (FaultReason::ContextAccess, false)]
        {
            assert!(reason.is_recorded(false));
            assert_eq!(reason.is_recorded(true), !qualified);
        }
    }

    #[test]
    fn a_reason_prints_code_and_condition() {
        assert_eq!(
            FaultReason::FirstStageNotPresent.to_string(),
            "0x71 SFS.2 (FirstStageNotPresent)"
        );
    }
}
