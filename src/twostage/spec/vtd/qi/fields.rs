// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Conversion of descriptor fields to and from words.

use super::words;
use super::{
    AddressMask, ContextScope, Descriptor, DeviceTlbRange, InterruptEntryScope, IotlbScope,
    PasidCacheScope, StatusWrite,
};
use crate::spec::pci::{Bdf, Pasid};
use crate::spec::vtd::{PAGE_SHIFT, PAGE_SIZE};

fn decode_range(high: u64) -> AddressMask {
    let high = words::RangeHigh::from_bits(high);
    AddressMask { address: high.addr() << PAGE_SHIFT, mask: high.am(), leaf: high.ih() }
}

pub(super) fn encode_range(range: AddressMask) -> u64 {
    words::RangeHigh::new()
        .with_am(range.mask & 0x3f)
        .with_ih(range.leaf)
        .with_addr(range.address >> PAGE_SHIFT)
        .into_bits()
}

pub(super) fn encode_device_range(range: DeviceTlbRange) -> u64 {
    (range.address & !(PAGE_SIZE - 1)) | u64::from(range.size)
}

pub(super) fn decode_context_cache(low: u64) -> Option<ContextScope> {
    let low = words::ContextCacheLow::from_bits(low);
    Some(match low.g() {
        1 => ContextScope::Global,
        2 => ContextScope::Domain(low.did()),
        3 => ContextScope::Device {
            domain: low.did(),
            source: Bdf::from_raw(low.sid()),
            function_mask: low.fm(),
        },
        _ => return None,
    })
}

pub(super) fn encode_context_cache(scope: ContextScope) -> u64 {
    let low = words::ContextCacheLow::new();
    match scope {
        ContextScope::Global => low.with_g(1),
        ContextScope::Domain(domain) => low.with_g(2).with_did(domain),
        ContextScope::Device { domain, source, function_mask } => {
            low.with_g(3).with_did(domain).with_sid(source.raw()).with_fm(function_mask & 3)
        }
    }
    .into_bits()
}

pub(super) fn decode_iotlb(low: u64, high: u64) -> Option<Descriptor> {
    let low = words::IotlbLow::from_bits(low);
    let scope = match low.g() {
        1 => IotlbScope::Global,
        2 => IotlbScope::Domain(low.did()),
        3 => IotlbScope::Pages { domain: low.did(), range: decode_range(high) },
        _ => return None,
    };
    Some(Descriptor::Iotlb { scope, drain_writes: low.dw(), drain_reads: low.dr() })
}

pub(super) fn encode_iotlb(scope: IotlbScope, drain_writes: bool, drain_reads: bool) -> [u64; 2] {
    let low = words::IotlbLow::new().with_dw(drain_writes).with_dr(drain_reads);
    let (low, high) = match scope {
        IotlbScope::Global => (low.with_g(1), 0),
        IotlbScope::Domain(domain) => (low.with_g(2).with_did(domain), 0),
        IotlbScope::Pages { domain, range } => {
            (low.with_g(3).with_did(domain), encode_range(range))
        }
    };
    [low.into_bits(), high]
}

pub(super) fn decode_device_tlb(low: u64, high: u64) -> Descriptor {
    let low = words::DeviceTlbLow::from_bits(low);
    Descriptor::DeviceTlb {
        source: Bdf::from_raw(low.sid()),
        physical_function: low.pfsid_high() << 4 | u16::from(low.pfsid_low()),
        max_pending: low.mip(),
        range: DeviceTlbRange { address: high & !(PAGE_SIZE - 1), size: high & 1 != 0 },
    }
}

pub(super) fn decode_interrupt_entry_cache(low: u64) -> InterruptEntryScope {
    let low = words::InterruptEntryLow::from_bits(low);
    if low.g() {
        InterruptEntryScope::Index { index: low.iidx(), mask: low.im() }
    } else {
        InterruptEntryScope::Global
    }
}

pub(super) fn encode_interrupt_entry_cache(scope: InterruptEntryScope) -> u64 {
    let low = words::InterruptEntryLow::new();
    match scope {
        InterruptEntryScope::Global => low,
        InterruptEntryScope::Index { index, mask } => {
            low.with_g(true).with_iidx(index).with_im(mask & 0x1f)
        }
    }
    .into_bits()
}

pub(super) fn decode_wait(low: u64, high: u64) -> Descriptor {
    let low = words::WaitLow::from_bits(low);
    Descriptor::Wait {
        status: low.sw().then_some(StatusWrite { address: high, data: low.data() }),
        interrupt: low.interrupt(),
        fence: low.fence(),
        drain_page_requests: low.pd(),
    }
}

pub(super) fn decode_pasid_iotlb(low: u64, high: u64) -> Option<Descriptor> {
    let low = words::PasidLow::from_bits(low);
    let range = match low.g() {
        2 => None,
        3 => Some(decode_range(high)),
        _ => return None,
    };
    Some(Descriptor::PasidIotlb { domain: low.did(), pasid: Pasid::new(low.pasid())?, range })
}

pub(super) fn decode_pasid_cache(low: u64) -> Option<PasidCacheScope> {
    let low = words::PasidLow::from_bits(low);
    Some(match low.g() {
        0 => PasidCacheScope::Domain(low.did()),
        1 => PasidCacheScope::Pasid { domain: low.did(), pasid: Pasid::new(low.pasid())? },
        3 => PasidCacheScope::Global,
        _ => return None,
    })
}

pub(super) fn encode_pasid_cache(scope: PasidCacheScope) -> u64 {
    let low = words::PasidLow::new();
    match scope {
        PasidCacheScope::Domain(domain) => low.with_did(domain),
        PasidCacheScope::Pasid { domain, pasid } => {
            low.with_g(1).with_did(domain).with_pasid(pasid.raw())
        }
        PasidCacheScope::Global => low.with_g(3),
    }
    .into_bits()
}

pub(super) fn decode_pasid_device_tlb(low: u64, high: u64) -> Option<Descriptor> {
    let low = words::PasidDeviceTlbLow::from_bits(low);
    let high = words::PasidDeviceTlbHigh::from_bits(high);
    Some(Descriptor::PasidDeviceTlb {
        source: Bdf::from_raw(low.sid()),
        pasid: Pasid::new(low.pasid())?,
        global: high.g(),
        physical_function: low.pfsid_high() << 4 | u16::from(low.pfsid_low()),
        max_pending: low.mip(),
        range: DeviceTlbRange { address: high.addr() << PAGE_SHIFT, size: high.s() },
    })
}

pub(super) fn decode_page_group_response(low: u64, high: u64) -> Option<Descriptor> {
    let low = words::PageGroupLow::from_bits(low);
    let pasid = if low.pp() { Some(Pasid::new(low.pasid())?) } else { None };
    Some(Descriptor::PageGroupResponse {
        requester: Bdf::from_raw(low.rid()),
        pasid,
        group: words::PageGroupHigh::from_bits(high).prgi(),
        code: low.rc(),
    })
}
