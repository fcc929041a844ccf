// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Commands of the command queue (§4).
//!
//! [`Command::decode`] accepts what any SMMU could: whether this one supports the command (its
//! stages, its features) is up to the caller. Reserved fields are ignored, and are 0 in the result
//! of [`Command::encode`].

mod encoding;

use super::StreamId;
use crate::spec::pci::Pasid;

/// The words of a command, in host order.
pub type Words = [u64; 2];

/// CMD_CFGI_STE_RANGE with this Range is CMD_CFGI_ALL: every stream.
pub const RANGE_ALL: u8 = 31;

/// From this Size on, CMD_ATC_INV covers all addresses.
pub const ATC_SIZE_ALL: u8 = 52;

/// What no SMMU accepts: CERROR_ILL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// No command has this opcode.
    #[error("opcode {0:#x} is reserved")]
    Opcode(u8),
    /// SSec is set: Secure streams have a separate queue.
    #[error("opcode {0:#x} for a Secure stream")]
    Secure(u8),
    /// CS of a CMD_SYNC is reserved.
    #[error("the completion signal of CMD_SYNC is reserved")]
    Signal,
}

/// How a CMD_SYNC signals its completion (CS).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SyncSignal {
    /// 0, SIG_NONE: by CMDQ_CONS only.
    None,
    /// 1, SIG_IRQ: by an MSI; by a wired interrupt if its address is 0.
    Interrupt {
        /// MSIAddress, in bytes, 4-byte aligned.
        address: u64,
        /// MSIData.
        data: u32,
    },
    /// 2, SIG_SEV: by an event that wakes processors.
    Event,
}

/// A command of the command queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Command {
    /// 0x01: the configuration of a stream will be needed.
    PrefetchConfig {
        /// StreamID.
        stream: StreamId,
        /// SubstreamID, where SSV.
        substream: Option<Pasid>,
    },
    /// 0x02: a translation will be needed.
    PrefetchAddr {
        /// StreamID.
        stream: StreamId,
        /// SubstreamID, where SSV.
        substream: Option<Pasid>,
        /// Address, 4 KiB aligned.
        address: u64,
        /// Size.
        size: u8,
        /// Stride.
        stride: u8,
    },
    /// 0x03: a stream table entry changed.
    CfgiSte {
        /// StreamID.
        stream: StreamId,
        /// Leaf: only the entry, not the descriptor of its table.
        leaf: bool,
    },
    /// 0x04: `2^(range + 1)` stream table entries changed; CMD_CFGI_ALL with [`RANGE_ALL`].
    CfgiSteRange {
        /// StreamID; its low `range + 1` bits are ignored.
        stream: StreamId,
        /// Range.
        range: u8,
    },
    /// 0x05: a context descriptor changed.
    CfgiCd {
        /// StreamID.
        stream: StreamId,
        /// SubstreamID.
        substream: Pasid,
        /// Leaf: only the entry, not the descriptor of its table.
        leaf: bool,
    },
    /// 0x06: any context descriptor of a stream changed.
    CfgiCdAll {
        /// StreamID.
        stream: StreamId,
    },
    /// 0x10: all stage-1 translations of a VMID.
    TlbiNhAll {
        /// VMID.
        vmid: u16,
    },
    /// 0x11: those of an ASID, except global ones.
    TlbiNhAsid {
        /// VMID.
        vmid: u16,
        /// ASID.
        asid: u16,
    },
    /// 0x12: those of an ASID by address, with global ones.
    TlbiNhVa {
        /// VMID.
        vmid: u16,
        /// ASID.
        asid: u16,
        /// Virtual addresses.
        range: AddressRange,
    },
    /// 0x13: those of every ASID by address.
    TlbiNhVaa {
        /// VMID.
        vmid: u16,
        /// Virtual addresses.
        range: AddressRange,
    },
    /// 0x20: all translations of EL2.
    TlbiEl2All,
    /// 0x21: those of an ASID of EL2.
    TlbiEl2Asid {
        /// ASID.
        asid: u16,
    },
    /// 0x22: those of an ASID of EL2 by address.
    TlbiEl2Va {
        /// ASID.
        asid: u16,
        /// Virtual addresses.
        range: AddressRange,
    },
    /// 0x23: those of every ASID of EL2 by address.
    TlbiEl2Vaa {
        /// Virtual addresses.
        range: AddressRange,
    },
    /// 0x28: all translations of a VMID, of both stages.
    TlbiS12Vmall {
        /// VMID.
        vmid: u16,
    },
    /// 0x2a: stage-2 translations of a VMID by address.
    TlbiS2Ipa {
        /// VMID.
        vmid: u16,
        /// Intermediate physical addresses.
        range: AddressRange,
    },
    /// 0x30: all translations except those of EL2.
    TlbiNsnhAll,
    /// 0x40: translations in a device's ATC.
    AtcInv {
        /// StreamID.
        stream: StreamId,
        /// SubstreamID, where SSV.
        substream: Option<Pasid>,
        /// G: of every SubstreamID.
        global: bool,
        /// Address, 4 KiB aligned; bits below the size are ignored.
        address: u64,
        /// Size: binary logarithm of the number of 4 KiB pages; see [`ATC_SIZE_ALL`].
        size: u8,
    },
    /// 0x41: the response to a page request.
    PriResp {
        /// StreamID.
        stream: StreamId,
        /// SubstreamID, where SSV.
        substream: Option<Pasid>,
        /// PRGIndex, 9 bits.
        group: u16,
        /// Resp: 0 deny, 1 fail, 2 success.
        response: u8,
    },
    /// 0x44: the response to a stalled transaction.
    Resume {
        /// StreamID.
        stream: StreamId,
        /// STAG: which transaction.
        stag: u16,
        /// Ac (bit 0): it is retried; without it, Ab (bit 1): it ends with an abort.
        response: u8,
    },
    /// 0x45: stalled transactions of a stream are terminated.
    StallTerm {
        /// StreamID.
        stream: StreamId,
    },
    /// 0x46: completes when all commands before it have.
    Sync {
        /// How it signals that.
        signal: SyncSignal,
    },
}

impl Command {
    /// The opcode.
    pub const fn opcode(&self) -> u8 {
        self.description().0
    }

    /// The specification's name, for traces.
    pub const fn name(&self) -> &'static str {
        self.description().1
    }

    const fn description(&self) -> (u8, &'static str) {
        match self {
            Self::PrefetchConfig { .. } => (0x01, "CMD_PREFETCH_CONFIG"),
            Self::PrefetchAddr { .. } => (0x02, "CMD_PREFETCH_ADDR"),
            Self::CfgiSte { .. } => (0x03, "CMD_CFGI_STE"),
            Self::CfgiSteRange { range: RANGE_ALL, .. } => (0x04, "CMD_CFGI_ALL"),
            Self::CfgiSteRange { .. } => (0x04, "CMD_CFGI_STE_RANGE"),
            Self::CfgiCd { .. } => (0x05, "CMD_CFGI_CD"),
            Self::CfgiCdAll { .. } => (0x06, "CMD_CFGI_CD_ALL"),
            Self::TlbiNhAll { .. } => (0x10, "CMD_TLBI_NH_ALL"),
            Self::TlbiNhAsid { .. } => (0x11, "CMD_TLBI_NH_ASID"),
            Self::TlbiNhVa { .. } => (0x12, "CMD_TLBI_NH_VA"),
            Self::TlbiNhVaa { .. } => (0x13, "CMD_TLBI_NH_VAA"),
            Self::TlbiEl2All => (0x20, "CMD_TLBI_EL2_ALL"),
            Self::TlbiEl2Asid { .. } => (0x21, "CMD_TLBI_EL2_ASID"),
            Self::TlbiEl2Va { .. } => (0x22, "CMD_TLBI_EL2_VA"),
            Self::TlbiEl2Vaa { .. } => (0x23, "CMD_TLBI_EL2_VAA"),
            Self::TlbiS12Vmall { .. } => (0x28, "CMD_TLBI_S12_VMALL"),
            Self::TlbiS2Ipa { .. } => (0x2a, "CMD_TLBI_S2_IPA"),
            Self::TlbiNsnhAll => (0x30, "CMD_TLBI_NSNH_ALL"),
            Self::AtcInv { .. } => (0x40, "CMD_ATC_INV"),
            Self::PriResp { .. } => (0x41, "CMD_PRI_RESP"),
            Self::Resume { .. } => (0x44, "CMD_RESUME"),
            Self::StallTerm { .. } => (0x45, "CMD_STALL_TERM"),
            Self::Sync { .. } => (0x46, "CMD_SYNC"),
        }
    }
}

/// The addresses of a CMD_TLBI_* by address: one, or a range with a hint of the level (§4.4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AddressRange {
    /// Address: of the first byte, 4 KiB aligned.
    pub address: u64,
    /// Leaf: only entries of the last level changed.
    pub leaf: bool,
    /// TG: 0 for an entry of any size at the address; 1, 2, 3 for a range in 4 KiB, 16 KiB, 64 KiB.
    pub tg: u8,
    /// TTL: level of the leaf entries, 1 to 3; 0 for any.
    pub ttl: u8,
    /// NUM: see [`AddressRange::bytes`].
    pub num: u8,
    /// SCALE: see [`AddressRange::bytes`].
    pub scale: u8,
}

impl AddressRange {
    /// The entries that translate `address`, whatever their size.
    pub const fn at(address: u64) -> Self {
        Self { address, leaf: false, tg: 0, ttl: 0, num: 0, scale: 0 }
    }

    /// Binary logarithm of the granule of TG; `None` without a range.
    pub const fn granule_shift(self) -> Option<u32> {
        match self.tg {
            1 => Some(12),
            2 => Some(14),
            3 => Some(16),
            _ => None,
        }
    }

    /// Length of the range in bytes, `(NUM + 1) * 2^SCALE` granules, which is below 2^53; `None`
    /// without a range.
    pub const fn bytes(self) -> Option<u64> {
        match self.granule_shift() {
            Some(granule) => Some((self.num as u64 + 1) << (self.scale as u32 + granule)),
            None => None,
        }
    }

    /// Whether this is the range that the specification reserves: one granule without a level,
    /// which would look like an invalidation without range.
    pub const fn is_reserved(self) -> bool {
        self.tg != 0 && self.ttl == 0 && self.num == 0 && self.scale == 0
    }

    /// Whether it uses the fields that need IDR3.RIL.
    pub const fn needs_ril(self) -> bool {
        self.tg != 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STREAM: StreamId = StreamId(0x1_0008);
    const SID: u64 = 0x1_0008 << 32;

    fn substream(value: u32) -> Option<Pasid> {
        Pasid::new(value)
    }

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        let range =
            AddressRange { address: 0x1234_5000, leaf: true, tg: 1, ttl: 3, num: 31, scale: 18 };
        let five = substream(5);
        let message = SyncSignal::Interrupt { address: 0x808_0040, data: 7 };
        let cases: &[(Command, Words)] = &[
            (Command::PrefetchConfig { stream: STREAM, substream: None }, [SID | 0x01, 0]),
            (
                Command::PrefetchAddr {
                    stream: STREAM,
                    substream: five,
                    address: 0x7000,
                    size: 1,
                    stride: 2,
                },
                [SID | 5 << 12 | 1 << 11 | 0x02, 0x7041],
            ),
            (Command::CfgiSte { stream: STREAM, leaf: true }, [SID | 0x03, 1]),
            (Command::CfgiSteRange { stream: StreamId(0), range: 31 }, [0x04, 31]),
            (
                Command::CfgiCd { stream: STREAM, substream: five.unwrap(), leaf: true },
                [SID | 5 << 12 | 0x05, 1],
            ),
            (Command::CfgiCdAll { stream: STREAM }, [SID | 0x06, 0]),
            (Command::TlbiNhAll { vmid: 2 }, [2 << 32 | 0x10, 0]),
            (Command::TlbiNhAsid { vmid: 2, asid: 3 }, [3 << 48 | 2 << 32 | 0x11, 0]),
            (
                Command::TlbiNhVa { vmid: 2, asid: 3, range },
                [3 << 48 | 2 << 32 | 18 << 20 | 31 << 12 | 0x12, 0x1234_5701],
            ),
            (
                Command::TlbiNhVaa { vmid: 2, range: AddressRange::at(0x5000) },
                [2 << 32 | 0x13, 0x5000],
            ),
            (Command::TlbiEl2All, [0x20, 0]),
            (Command::TlbiEl2Asid { asid: 3 }, [3 << 48 | 0x21, 0]),
            (Command::TlbiEl2Va { asid: 3, range: AddressRange::at(0) }, [3 << 48 | 0x22, 0]),
            (Command::TlbiEl2Vaa { range: AddressRange::at(0x5000) }, [0x23, 0x5000]),
            (Command::TlbiS12Vmall { vmid: 2 }, [2 << 32 | 0x28, 0]),
            (
                Command::TlbiS2Ipa { vmid: 2, range: AddressRange::at(0x5000) },
                [2 << 32 | 0x2a, 0x5000],
            ),
            (Command::TlbiNsnhAll, [0x30, 0]),
            (
                Command::AtcInv {
                    stream: STREAM,
                    substream: five,
                    global: true,
                    address: 0x7000,
                    size: 52,
                },
                [SID | 5 << 12 | 1 << 11 | 1 << 9 | 0x40, 0x7034],
            ),
            (
                Command::PriResp { stream: STREAM, substream: five, group: 0x1ff, response: 2 },
                [SID | 5 << 12 | 1 << 11 | 0x41, 2 << 12 | 0x1ff],
            ),
            (
                Command::Resume { stream: STREAM, stag: 0x1234, response: 1 },
                [SID | 1 << 12 | 0x44, 0x1234],
            ),
            (Command::StallTerm { stream: STREAM }, [SID | 0x45, 0]),
            (Command::Sync { signal: SyncSignal::None }, [0x46, 0]),
            (Command::Sync { signal: message }, [7 << 32 | 1 << 12 | 0x46, 0x808_0040]),
            (Command::Sync { signal: SyncSignal::Event }, [2 << 12 | 0x46, 0]),
        ];
        for (command, words) in cases {
            assert_eq!(command.encode(), *words, "{}", command.name());
            assert_eq!(Command::decode(*words), Ok(*command), "{}", command.name());
            assert_eq!(u64::from(command.opcode()), words[0] & 0xff);
        }
    }

    #[test]
    fn memory_attributes_and_reserved_fields_do_not_count() {
        // As Linux writes it: MSH, MSIAttr, SIG_SEV.
        let linux = [0x46 | 2 << 12 | 3 << 22 | 0xf << 24, 0];
        assert_eq!(Command::decode(linux), Ok(Command::Sync { signal: SyncSignal::Event }));
        assert_eq!(Command::decode([0x30 | 1 << 63, !0]), Ok(Command::TlbiNsnhAll));
    }

    #[test]
    fn the_command_for_all_streams_has_a_name_of_its_own() {
        let of = |range| Command::CfgiSteRange { stream: STREAM, range }.name();
        assert_eq!((of(31), of(30)), ("CMD_CFGI_ALL", "CMD_CFGI_STE_RANGE"));
    }

    #[test]
    fn what_no_smmu_takes() {
        for opcode in [0, 0x07, 0x0f, 0x14, 0x18, 0x31, 0x42, 0x47, 0xff] {
            assert_eq!(Command::decode([opcode.into(), 0]), Err(DecodeError::Opcode(opcode)));
        }
        for opcode in [0x01, 0x03, 0x06, 0x40, 0x44] {
            let secure = [u64::from(opcode) | 1 << 10, 0];
            assert_eq!(Command::decode(secure), Err(DecodeError::Secure(opcode)));
        }
        assert_eq!(Command::decode([0x46 | 3 << 12, 0]), Err(DecodeError::Signal));
    }

    proptest! {
        #[test]
        fn what_is_decoded_is_encoded_as_the_same(opcode in 0..0x50u64, low: u64, high: u64) {
            if let Ok(command) = Command::decode([low & !0xff | opcode, high]) {
                prop_assert_eq!(Command::decode(command.encode()), Ok(command));
                prop_assert_eq!(u64::from(command.opcode()), opcode);
                // No bit is set that the guest did not set.
                let [canonical_low, canonical_high] = command.encode();
                prop_assert_eq!(canonical_low & !(low & !0xff | opcode), 0);
                prop_assert_eq!(canonical_high & !high, 0);
            }
        }
    }

    #[test]
    fn lengths_are_in_granules() {
        let of = |tg, num, scale| AddressRange { tg, num, scale, ..AddressRange::at(0) }.bytes();
        assert_eq!(of(0, 31, 31), None);
        assert_eq!(of(1, 0, 0), Some(0x1000));
        assert_eq!(of(2, 2, 1), Some(3 * 2 * 0x4000));
        assert_eq!(of(3, 31, 31), Some(1 << 52));
    }

    #[test]
    fn one_granule_without_a_level_is_reserved() {
        let granule = AddressRange { tg: 1, ..AddressRange::at(0) };
        assert!(granule.is_reserved() && granule.needs_ril());
        assert!(!AddressRange { ttl: 3, ..granule }.is_reserved());
        assert!(!AddressRange { num: 1, ..granule }.is_reserved());
        assert!(!AddressRange::at(!0).is_reserved() && !AddressRange::at(!0).needs_ril());
    }
}
