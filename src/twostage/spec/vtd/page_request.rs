// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page request descriptors (§7.4.1.1). Page group responses (§7.6.1) have the codes of PCIe.

use twostage_bits::bitfield;

use super::PAGE_SHIFT;
use crate::spec::pci::{Bdf, Pasid};

pub use crate::spec::pci::PageResponse;

/// Size of a page request descriptor, in bytes.
pub const PAGE_REQUEST_SIZE: u64 = 32;

/// The type of a page request descriptor.
const PAGE_REQUEST_TYPE: u8 = 1;

/// A page request descriptor (§7.4.1.1), without private data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRequest {
    /// RID: the requesting device.
    pub rid: Bdf,
    /// PP and PASID: the PASID, if the request had one.
    pub pasid: Option<Pasid>,
    /// PRGI: page request group index, 9 bits.
    pub group: u16,
    /// LPIG: the last one of its group.
    pub last: bool,
    /// ADDR: the page, in bytes; the low 12 bits are dropped.
    pub address: u64,
    /// RD: read access is requested.
    pub read: bool,
    /// WR: write access is requested.
    pub write: bool,
    /// EXR: execute access is requested.
    pub execute: bool,
    /// PMR: supervisor privilege is requested.
    pub privileged: bool,
}

/// Bits 63:0.
#[bitfield(u64)]
struct Low {
    pub kind: u8,
    pub pp: bool,
    #[bits(7)]
    __: u8,
    pub rid: u16,
    #[bits(20)]
    pub pasid: u32,
    pub exr: bool,
    pub pmr: bool,
    #[bits(10)]
    __: u16,
}

/// Bits 127:64.
#[bitfield(u64)]
struct High {
    pub rd: bool,
    pub wr: bool,
    pub lpig: bool,
    #[bits(9)]
    pub prgi: u16,
    #[bits(52)]
    pub addr: u64,
}

impl PageRequest {
    /// The words of the descriptor.
    pub fn encode(&self) -> [u64; 4] {
        let Self { rid, pasid, group, last, address, read, write, execute, privileged } = *self;
        let low = Low::new()
            .with_kind(PAGE_REQUEST_TYPE)
            .with_pp(pasid.is_some())
            .with_rid(rid.raw())
            .with_pasid(pasid.map_or(0, Pasid::raw))
            .with_exr(execute)
            .with_pmr(privileged);
        let high = High::new()
            .with_rd(read)
            .with_wr(write)
            .with_lpig(last)
            .with_prgi(group & 0x1ff)
            .with_addr(address >> PAGE_SHIFT);
        [low.into_bits(), high.into_bits(), 0, 0]
    }

    /// The descriptor that `words` hold; `None` if they are of another type.
    pub fn decode(words: [u64; 4]) -> Option<Self> {
        let [low, high, ..] = words;
        let (low, high) = (Low::from_bits(low), High::from_bits(high));
        if low.kind() != PAGE_REQUEST_TYPE {
            return None;
        }
        let pasid = if low.pp() { Some(Pasid::new(low.pasid())?) } else { None };
        Some(Self {
            rid: Bdf::from_raw(low.rid()),
            pasid,
            group: high.prgi(),
            last: high.lpig(),
            address: high.addr() << PAGE_SHIFT,
            read: high.rd(),
            write: high.wr(),
            execute: low.exr(),
            privileged: low.pmr(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        let none = PageRequest {
            rid: Bdf::from_raw(0),
            pasid: None,
            group: 0,
            last: false,
            address: 0,
            read: false,
            write: false,
            execute: false,
            privileged: false,
        };
        let all = PageRequest {
            rid: Bdf::from_raw(0x1234),
            pasid: Pasid::new(0xf_edcb),
            group: 0x1a5,
            last: true,
            address: 0xabcd_ef01_2345_6fff,
            read: true,
            write: true,
            execute: true,
            privileged: true,
        };
        for (request, low, high) in [
            (none, 1, 0),
            (PageRequest { read: true, ..none }, 1, 1),
            (PageRequest { write: true, ..none }, 1, 2),
            (PageRequest { last: true, ..none }, 1, 4),
            (PageRequest { execute: true, ..none }, 1 | 1 << 52, 0),
            (PageRequest { privileged: true, ..none }, 1 | 1 << 53, 0),
            (all, 0x003f_edcb_1234_0101, 0xabcd_ef01_2345_6d2f),
        ] {
            assert_eq!(request.encode(), [low, high, 0, 0], "{request:x?}");
            let address = request.address & !0xfff;
            assert_eq!(
                PageRequest::decode([low, high, 7, 7]),
                Some(PageRequest { address, ..request })
            );
        }
        assert_eq!(PageRequest::decode([2, 0, 0, 0]), None);
    }
}
