// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The words of commands: conversion, and the layouts of their 64-bit words (§4).

use twostage_bits::bitfield;

use super::{AddressRange, Command, DecodeError, SyncSignal, Words};
use crate::spec::pci::Pasid;
use crate::spec::smmuv3::StreamId;

impl Command {
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

impl AddressRange {
    fn decode(low: TlbiWord, high: u64) -> Self {
        let high = TlbiAddress::from_bits(high);
        let address = high.address() << ADDRESS_SHIFT;
        let leaf = high.leaf();
        let (num, scale) = (low.num(), low.scale());
        match (high.tg(), high.ttl()) {
            // Without TG the others are reserved.
            (0, _) => Self { leaf, ..Self::at(address) },
            // The 16K granule has no level 1 blocks: the level is reserved, and treated as any.
            (tg @ 2, 1) => Self { address, leaf, tg, ttl: 0, num, scale },
            (tg, ttl) => Self { address, leaf, tg, ttl, num, scale },
        }
    }

    /// `low` with the fields of this range, and the word after it.
    fn encode(self, low: TlbiWord) -> [u64; 2] {
        let high = TlbiAddress::new()
            .with_address(self.address >> ADDRESS_SHIFT)
            .with_leaf(self.leaf)
            .with_tg(self.tg & 3)
            .with_ttl(self.ttl & 3);
        [low.with_num(self.num & 0x1f).with_scale(self.scale & 0x1f).into_bits(), high.into_bits()]
    }
}

/// Binary logarithm of the unit of addresses in commands.
const ADDRESS_SHIFT: u32 = 12;

/// Word 0 of commands with a StreamID.
#[bitfield(u64)]
struct StreamWord {
    pub opcode: u8,
    #[bits(1)]
    __: u8,
    /// G, of CMD_ATC_INV.
    pub global: bool,
    /// SSec: the stream is a Secure one.
    pub ssec: bool,
    /// SSV: the SubstreamID is valid.
    pub ssv: bool,
    #[bits(20)]
    pub substream: u32,
    pub stream: u32,
}

/// Word 0 of CMD_RESUME.
#[bitfield(u64)]
struct ResumeWord {
    pub opcode: u8,
    #[bits(4)]
    __: u8,
    /// Ac, Ab.
    #[bits(2)]
    pub response: u8,
    #[bits(18)]
    __: u32,
    pub stream: u32,
}

/// Word 0 of CMD_TLBI_*.
#[bitfield(u64)]
struct TlbiWord {
    pub opcode: u8,
    #[bits(4)]
    __: u8,
    #[bits(5)]
    pub num: u8,
    #[bits(3)]
    __: u8,
    #[bits(5)]
    pub scale: u8,
    #[bits(7)]
    __: u8,
    pub vmid: u16,
    pub asid: u16,
}

/// Word 1 of CMD_TLBI_* by address.
#[bitfield(u64)]
struct TlbiAddress {
    pub leaf: bool,
    #[bits(7)]
    __: u8,
    #[bits(2)]
    pub ttl: u8,
    #[bits(2)]
    pub tg: u8,
    /// In 4 KiB.
    #[bits(52)]
    pub address: u64,
}

/// Word 1 of CMD_PREFETCH_ADDR.
#[bitfield(u64)]
struct PrefetchWord {
    #[bits(5)]
    pub size: u8,
    #[bits(5)]
    pub stride: u8,
    #[bits(2)]
    __: u8,
    /// In 4 KiB.
    #[bits(52)]
    pub address: u64,
}

/// Word 1 of CMD_CFGI_STE and CMD_CFGI_CD.
#[bitfield(u64)]
struct LeafWord {
    pub leaf: bool,
    #[bits(63)]
    __: u64,
}

/// Word 1 of CMD_CFGI_STE_RANGE.
#[bitfield(u64)]
struct RangeWord {
    #[bits(5)]
    pub range: u8,
    #[bits(59)]
    __: u64,
}

/// Word 1 of CMD_ATC_INV.
#[bitfield(u64)]
struct AtcWord {
    #[bits(6)]
    pub size: u8,
    #[bits(6)]
    __: u8,
    /// In 4 KiB.
    #[bits(52)]
    pub address: u64,
}

/// Word 1 of CMD_PRI_RESP.
#[bitfield(u64)]
struct PriWord {
    #[bits(9)]
    pub group: u16,
    #[bits(3)]
    __: u8,
    #[bits(2)]
    pub response: u8,
    #[bits(50)]
    __: u64,
}

/// Word 1 of CMD_RESUME.
#[bitfield(u64)]
struct StagWord {
    pub stag: u16,
    #[bits(48)]
    __: u64,
}

/// Word 0 of CMD_SYNC.
#[bitfield(u64)]
struct SyncWord {
    pub opcode: u8,
    #[bits(4)]
    __: u8,
    /// CS: completion signal.
    #[bits(2)]
    pub signal: u8,
    #[bits(18)]
    __: u32,
    pub data: u32,
}

/// Word 1 of CMD_SYNC.
#[bitfield(u64)]
struct SyncAddress {
    #[bits(2)]
    __: u8,
    /// In 4 bytes.
    #[bits(50)]
    pub address: u64,
    #[bits(12)]
    __: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_fields_are_not_read() {
        let low = TlbiWord::new().with_num(5).with_scale(3);
        let plain = TlbiAddress::new().with_address(7).with_leaf(true).with_ttl(2);
        let at = AddressRange { leaf: true, ..AddressRange::at(0x7000) };
        assert_eq!(AddressRange::decode(low, plain.into_bits()), at);
        let level =
            |tg| AddressRange::decode(TlbiWord::new(), plain.with_ttl(1).with_tg(tg).into());
        assert!(!level(1).is_reserved() && !level(3).is_reserved());
        assert!(level(2).is_reserved(), "16K granule, level 1");
    }
}
