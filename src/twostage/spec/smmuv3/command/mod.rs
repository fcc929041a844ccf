// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Commands of the command queue (§4).
//!
//! [`Command::decode`] accepts what any SMMU could: whether this one supports the command (its
//! stages, its features) is up to the caller. Reserved fields are ignored, and are 0 in the result
//! of [`Command::encode`].

mod range;
#[cfg(test)]
mod tests;
mod words;

pub use range::AddressRange;

use super::StreamId;
use crate::spec::pci::Pasid;
use range::ADDRESS_SHIFT;
use words::{
    AtcWord, LeafWord, PrefetchWord, PriWord, RangeWord, ResumeWord, StagWord, StreamWord,
    SyncAddress, SyncWord, TlbiWord,
};

/// The words of a command, in host order.
pub type Words = [u64; 2];

/// CMD_CFGI_STE_RANGE with this Range is CMD_CFGI_ALL: every stream.
pub const RANGE_ALL: u8 = 31;

/// From this Size on, CMD_ATC_INV covers all addresses.
pub const ATC_SIZE_ALL: u8 = 52;

/// What no SMMU accepts: CERROR_ILL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
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

    /// Decodes `words`.
    ///
    /// # Errors
    /// No SMMU accepts it.
    pub fn decode(words: Words) -> Result<Self, DecodeError> {
        let [low, high] = words;
        let opcode = StreamWord::from_bits(low).opcode();
        match opcode {
            0x10..=0x30 => decode_tlbi(opcode, low, high),
            0x46 => decode_sync(low, high),
            _ => decode_of_stream(opcode, low, high),
        }
    }

    /// Whether every bit set in `words`, which it was decoded from, belongs to a field that it has:
    /// the SubstreamID of a CMD_ATC_INV without SSV is ignored, not reserved.
    pub fn is_all_of(&self, words: Words) -> bool {
        let [low, high] = words;
        let low = match self {
            Self::AtcInv { substream: None, .. } => {
                StreamWord::from_bits(low).with_substream(0).into()
            }
            _ => low,
        };
        self.encode() == [low, high]
    }

    /// The words of the command, which [`Command::decode`] decodes to the same.
    pub fn encode(&self) -> Words {
        let of =
            |stream: StreamId| StreamWord::new().with_opcode(self.opcode()).with_stream(stream.0);
        let with = |stream, substream: Option<Pasid>| {
            of(stream).with_ssv(substream.is_some()).with_substream(substream.map_or(0, Pasid::raw))
        };
        let tlbi = TlbiWord::new().with_opcode(self.opcode());
        match *self {
            Self::PrefetchConfig { stream, substream } => [with(stream, substream).into_bits(), 0],
            Self::PrefetchAddr { stream, substream, address, size, stride } => {
                let high = PrefetchWord::new()
                    .with_address(address >> ADDRESS_SHIFT)
                    .with_size(size & 0x1f)
                    .with_stride(stride & 0x1f);
                [with(stream, substream).into_bits(), high.into_bits()]
            }
            Self::CfgiSte { stream, leaf } => {
                [of(stream).into_bits(), LeafWord::new().with_leaf(leaf).into_bits()]
            }
            Self::CfgiSteRange { stream, range } => {
                [of(stream).into_bits(), RangeWord::new().with_range(range & 0x1f).into_bits()]
            }
            Self::CfgiCd { stream, substream, leaf } => [
                of(stream).with_substream(substream.raw()).into_bits(),
                LeafWord::new().with_leaf(leaf).into_bits(),
            ],
            Self::CfgiCdAll { stream } | Self::StallTerm { stream } => [of(stream).into_bits(), 0],
            Self::TlbiNhAll { vmid } | Self::TlbiS12Vmall { vmid } => {
                [tlbi.with_vmid(vmid).into_bits(), 0]
            }
            Self::TlbiNhAsid { vmid, asid } => {
                [tlbi.with_vmid(vmid).with_asid(asid).into_bits(), 0]
            }
            Self::TlbiNhVa { vmid, asid, range } => {
                range.encode(tlbi.with_vmid(vmid).with_asid(asid))
            }
            Self::TlbiNhVaa { vmid, range } | Self::TlbiS2Ipa { vmid, range } => {
                range.encode(tlbi.with_vmid(vmid))
            }
            Self::TlbiEl2Asid { asid } => [tlbi.with_asid(asid).into_bits(), 0],
            Self::TlbiEl2Va { asid, range } => range.encode(tlbi.with_asid(asid)),
            Self::TlbiEl2Vaa { range } => range.encode(tlbi),
            Self::TlbiEl2All | Self::TlbiNsnhAll => [tlbi.into_bits(), 0],
            Self::AtcInv { stream, substream, global, address, size } => {
                let high =
                    AtcWord::new().with_address(address >> ADDRESS_SHIFT).with_size(size & 0x3f);
                [with(stream, substream).with_global(global).into_bits(), high.into_bits()]
            }
            Self::PriResp { stream, substream, group, response } => {
                let high = PriWord::new().with_group(group & 0x1ff).with_response(response & 3);
                [with(stream, substream).into_bits(), high.into_bits()]
            }
            Self::Resume { stream, stag, response } => {
                let low = ResumeWord::new()
                    .with_opcode(self.opcode())
                    .with_response(response & 3)
                    .with_stream(stream.0);
                [low.into_bits(), StagWord::new().with_stag(stag).into_bits()]
            }
            Self::Sync { signal } => encode_sync(self.opcode(), signal),
        }
    }
}

fn decode_of_stream(opcode: u8, low: u64, high: u64) -> Result<Command, DecodeError> {
    let word = StreamWord::from_bits(low);
    let stream = StreamId(word.stream());
    // 20 bits are always a PASID.
    let id = Pasid::new(word.substream());
    let substream = id.filter(|_| word.ssv());
    let command = match opcode {
        0x01 => Command::PrefetchConfig { stream, substream },
        0x02 => {
            let high = PrefetchWord::from_bits(high);
            Command::PrefetchAddr {
                stream,
                substream,
                address: high.address() << ADDRESS_SHIFT,
                size: high.size(),
                stride: high.stride(),
            }
        }
        0x03 => Command::CfgiSte { stream, leaf: LeafWord::from_bits(high).leaf() },
        0x04 => Command::CfgiSteRange { stream, range: RangeWord::from_bits(high).range() },
        0x05 => {
            let substream = id.ok_or(DecodeError::Opcode(opcode))?;
            Command::CfgiCd { stream, substream, leaf: LeafWord::from_bits(high).leaf() }
        }
        0x06 => Command::CfgiCdAll { stream },
        0x40 => {
            let high = AtcWord::from_bits(high);
            Command::AtcInv {
                stream,
                substream,
                global: word.global(),
                address: high.address() << ADDRESS_SHIFT,
                size: high.size(),
            }
        }
        0x41 => {
            let high = PriWord::from_bits(high);
            Command::PriResp { stream, substream, group: high.group(), response: high.response() }
        }
        0x44 => Command::Resume {
            stream,
            stag: StagWord::from_bits(high).stag(),
            response: ResumeWord::from_bits(low).response(),
        },
        0x45 => Command::StallTerm { stream },
        _ => return Err(DecodeError::Opcode(opcode)),
    };
    if word.ssec() {
        return Err(DecodeError::Secure(opcode));
    }
    Ok(command)
}

fn decode_tlbi(opcode: u8, low: u64, high: u64) -> Result<Command, DecodeError> {
    let low = TlbiWord::from_bits(low);
    let (vmid, asid) = (low.vmid(), low.asid());
    let range = AddressRange::decode(low, high);
    Ok(match opcode {
        0x10 => Command::TlbiNhAll { vmid },
        0x11 => Command::TlbiNhAsid { vmid, asid },
        0x12 => Command::TlbiNhVa { vmid, asid, range },
        0x13 => Command::TlbiNhVaa { vmid, range },
        0x20 => Command::TlbiEl2All,
        0x21 => Command::TlbiEl2Asid { asid },
        0x22 => Command::TlbiEl2Va { asid, range },
        0x23 => Command::TlbiEl2Vaa { range },
        0x28 => Command::TlbiS12Vmall { vmid },
        0x2a => Command::TlbiS2Ipa { vmid, range },
        0x30 => Command::TlbiNsnhAll,
        _ => return Err(DecodeError::Opcode(opcode)),
    })
}

fn decode_sync(low: u64, high: u64) -> Result<Command, DecodeError> {
    let low = SyncWord::from_bits(low);
    let signal = match low.signal() {
        0 => SyncSignal::None,
        1 => SyncSignal::Interrupt {
            address: SyncAddress::from_bits(high).address() << 2,
            data: low.data(),
        },
        2 => SyncSignal::Event,
        _ => return Err(DecodeError::Signal),
    };
    Ok(Command::Sync { signal })
}

fn encode_sync(opcode: u8, signal: SyncSignal) -> Words {
    let low = SyncWord::new().with_opcode(opcode);
    match signal {
        SyncSignal::None => [low.into_bits(), 0],
        SyncSignal::Interrupt { address, data } => {
            let high = SyncAddress::new().with_address(address >> 2 & ((1 << 50) - 1));
            [low.with_signal(1).with_data(data).into_bits(), high.into_bits()]
        }
        SyncSignal::Event => [low.with_signal(2).into_bits(), 0],
    }
}
