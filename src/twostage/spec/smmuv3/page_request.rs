// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! PRI queue entries (§8), and the codes of CMD_PRI_RESP (§4.5.2) and CMD_RESUME (§4.7.1).

use twostage_bits::bitfield;

use super::{StreamId, SubstreamId};
use crate::spec::pci::PageResponse;

/// Size of a PRI queue entry, in bytes.
pub const PAGE_REQUEST_SIZE: u64 = 16;

/// Binary logarithm of the unit of addresses.
const PAGE_SHIFT: u32 = 12;

/// A PRI queue entry: a page request of a device (§8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRequest {
    /// StreamID: the requesting device.
    pub stream: StreamId,
    /// SSV and SubstreamID: the PASID, if the request had one.
    pub substream: Option<SubstreamId>,
    /// PRGIndex: page request group index, 9 bits.
    pub group: u16,
    /// Last: the last one of its group.
    pub last: bool,
    /// Page address, in bytes; the low 12 bits are dropped.
    pub address: u64,
    /// R: read access is requested.
    pub read: bool,
    /// W: write access is requested.
    pub write: bool,
    /// X: execute access is requested.
    pub execute: bool,
    /// Priv: privileged access is requested.
    pub privileged: bool,
}

/// Bits 63:0.
#[bitfield(u64)]
struct Low {
    pub stream: u32,
    #[bits(20)]
    pub substream: u32,
    #[bits(6)]
    __: u8,
    pub privileged: bool,
    pub execute: bool,
    pub read: bool,
    pub write: bool,
    pub last: bool,
    pub ssv: bool,
}

/// Bits 127:64.
#[bitfield(u64)]
struct High {
    #[bits(9)]
    pub group: u16,
    #[bits(3)]
    __: u8,
    #[bits(52)]
    pub address: u64,
}

impl PageRequest {
    /// The words of the entry. Without a SubstreamID, X and Priv are 0.
    pub fn encode(&self) -> [u64; 2] {
        let Self { stream, substream, group, last, address, read, write, execute, privileged } =
            *self;
        let ssv = substream.is_some();
        let low = Low::new()
            .with_stream(stream.raw())
            .with_substream(substream.map_or(0, SubstreamId::raw))
            .with_privileged(privileged && ssv)
            .with_execute(execute && ssv)
            .with_read(read)
            .with_write(write)
            .with_last(last)
            .with_ssv(ssv);
        let high = High::new().with_group(group & 0x1ff).with_address(address >> PAGE_SHIFT);
        [low.into_bits(), high.into_bits()]
    }

    /// The entry that `words` hold.
    pub fn decode(words: [u64; 2]) -> Self {
        let [low, high] = words;
        let (low, high) = (Low::from_bits(low), High::from_bits(high));
        Self {
            stream: StreamId(low.stream()),
            // 20 bits are always a SubstreamID.
            substream: SubstreamId::new(low.substream()).filter(|_| low.ssv()),
            group: high.group(),
            last: low.last(),
            address: high.address() << PAGE_SHIFT,
            read: low.read(),
            write: low.write(),
            execute: low.execute(),
            privileged: low.privileged(),
        }
    }
}

/// The response that Resp of a CMD_PRI_RESP stands for; `None` for the reserved 0b11, which is
/// CERROR_ILL.
pub const fn page_response(resp: u8) -> Option<PageResponse> {
    match resp {
        0 => Some(PageResponse::Failure),
        1 => Some(PageResponse::InvalidRequest),
        2 => Some(PageResponse::Success),
        _ => None,
    }
}

/// Resp of a CMD_PRI_RESP with `response`.
pub const fn pri_resp(response: PageResponse) -> u8 {
    match response {
        PageResponse::Failure => 0,
        PageResponse::InvalidRequest => 1,
        PageResponse::Success => 2,
    }
}

/// What a CMD_RESUME does with a stalled transaction (Ac, Ab).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Resume {
    /// Ac: it is handled as if it had just arrived.
    Retry,
    /// Ab: it ends with an abort.
    Abort,
    /// Neither: it ends, a write without effect, a read with zeroes. With an abort where an SMMU
    /// has nothing else (IDR0.TERM_MODEL).
    Terminate,
}

impl Resume {
    /// Decodes Ac (bit 0) and Ab (bit 1), of which Ac alone counts where it is set.
    pub const fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            1 | 3 => Self::Retry,
            2 => Self::Abort,
            _ => Self::Terminate,
        }
    }

    /// Ac (bit 0) and Ab (bit 1).
    pub const fn into_bits(self) -> u8 {
        match self {
            Self::Retry => 1,
            Self::Abort => 2,
            Self::Terminate => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        let none = PageRequest {
            stream: StreamId(0),
            substream: None,
            group: 0,
            last: false,
            address: 0,
            read: false,
            write: false,
            execute: false,
            privileged: false,
        };
        let with = PageRequest { substream: SubstreamId::new(0), ..none };
        let all = PageRequest {
            stream: StreamId(0x8765_4321),
            substream: SubstreamId::new(0xf_edcb),
            group: 0x1a5,
            last: true,
            address: 0xabcd_ef01_2345_6fff,
            read: true,
            write: true,
            execute: true,
            privileged: true,
        };
        for (request, low, high) in [
            (none, 0, 0),
            (PageRequest { stream: StreamId(u32::MAX), ..none }, 0xffff_ffff, 0),
            (PageRequest { read: true, ..none }, 1 << 60, 0),
            (PageRequest { write: true, ..none }, 1 << 61, 0),
            (PageRequest { last: true, ..none }, 1 << 62, 0),
            (PageRequest { group: 0x1ff, ..none }, 0, 0x1ff),
            (with, 1 << 63, 0),
            (PageRequest { privileged: true, ..with }, 1 << 63 | 1 << 58, 0),
            (PageRequest { execute: true, ..with }, 1 << 63 | 1 << 59, 0),
            (all, 0xfc0f_edcb_8765_4321, 0xabcd_ef01_2345_61a5),
        ] {
            assert_eq!(request.encode(), [low, high], "{request:x?}");
            let address = request.address & !0xfff;
            assert_eq!(PageRequest::decode([low, high]), PageRequest { address, ..request });
        }
        let plain = PageRequest { execute: true, privileged: true, ..none };
        assert_eq!(plain.encode(), [0, 0], "SSV is 0");
        assert_eq!(PageRequest::decode([5 << 32, 0]).substream, None);
    }

    #[test]
    fn codes_round_trip() {
        for resp in 0..3 {
            assert_eq!(page_response(resp).map(pri_resp), Some(resp));
        }
        assert_eq!(page_response(3), None);
        for bits in 0..3 {
            assert_eq!(Resume::from_bits(bits).into_bits(), bits);
        }
        assert_eq!(Resume::from_bits(3), Resume::Retry, "Ab is ignored");
    }
}
