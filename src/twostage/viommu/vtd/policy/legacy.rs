// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Policies from legacy root and context entries (§3.4.2, §9.1, §9.3).

use super::{Blocked, Served, Tables};
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::regs::Rtaddr;
use crate::spec::vtd::root::{
    ContextHigh, ContextLow, ContextTranslationType, RootHalf, CONTEXT_ENTRY_SIZE, ROOT_ENTRY_SIZE,
};
use crate::viommu::vtd::host_side::{DomainTag, Stage1, VtdSecondStage};
use crate::viommu::Requester;

/// What the tables at `root` say about `requester`.
pub(super) fn serve(
    tables: &Tables<'_>,
    root: Rtaddr,
    requester: Requester,
) -> Result<Served, Blocked> {
    if requester.pasid.is_some() {
        return Err(Blocked::recorded(FaultReason::PasidInLegacyMode));
    }
    let (low, high) = context_entry(tables, root, requester)?;
    let blocked = |reason| Blocked { reason, fault_disabled: low.fpd() };
    let invalid = blocked(FaultReason::LegacyContextInvalid);
    let translation_type = low.translation_type().ok_or(invalid)?;
    let width = tables.second_stage_width(high.aw()).ok_or(invalid)?;
    let translated = match translation_type {
        // §9.3: AW is then the widest supported.
        ContextTranslationType::PassThrough if Some(width) == tables.widest_second_stage() => false,
        ContextTranslationType::PassThrough => return Err(invalid),
        ContextTranslationType::Untranslated => true,
        ContextTranslationType::All if tables.caps.ecap.dt() => true,
        ContextTranslationType::All => return Err(invalid),
    };
    let stage1 = if translated {
        let table = low.second_stage_table();
        if tables.memory.load_u64(table).is_err() {
            return Err(invalid);
        }
        Some(Stage1::VtdSecondStage(VtdSecondStage {
            table,
            address_width: width,
            accessed_dirty: false,
        }))
    } else {
        None
    };
    let tag = DomainTag { domain: high.did(), pasid: 0 };
    Ok(Served { stage1, tag, fault_disabled: low.fpd() })
}

fn context_entry(
    tables: &Tables<'_>,
    root: Rtaddr,
    requester: Requester,
) -> Result<(ContextLow, ContextHigh), Blocked> {
    let rid = requester.rid;
    let address = root.root_table() + u64::from(rid.bus()) * ROOT_ENTRY_SIZE;
    let [half, reserved] =
        tables.words(address).map_err(|_| Blocked::recorded(FaultReason::LegacyRootAccess))?;
    let entry = RootHalf::from_bits(half);
    if !entry.p() {
        return Err(Blocked::recorded(FaultReason::LegacyRootNotPresent));
    }
    let table = entry.context_table();
    if half & RootHalf::RESERVED != 0 || reserved != 0 || tables.is_beyond_width(table) {
        return Err(Blocked::recorded(FaultReason::LegacyRootReserved));
    }
    let address = table + u64::from(rid.devfn()) * CONTEXT_ENTRY_SIZE;
    let [low_word, high_word] =
        tables.words(address).map_err(|_| Blocked::recorded(FaultReason::LegacyContextAccess))?;
    let low = ContextLow::from_bits(low_word);
    let blocked = |reason| Blocked { reason, fault_disabled: low.fpd() };
    if !low.p() {
        return Err(blocked(FaultReason::LegacyContextNotPresent));
    }
    if low_word & ContextLow::RESERVED != 0
        || high_word & ContextHigh::RESERVED != 0
        || tables.is_beyond_width(low.second_stage_table())
    {
        return Err(blocked(FaultReason::LegacyContextReserved));
    }
    Ok((low, ContextHigh::from_bits(high_word)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::pci::Bdf;
    use crate::spec::vtd::root::AddressWidth;
    use crate::viommu::vtd::config::VtdConfig;
    use crate::viommu::vtd::host_side::{Policy, RequesterConfig};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    const ROOT: u64 = 0x1000;
    const CONTEXT: u64 = 0x2000;
    const RID: u16 = 0x0108;
    const RESERVED_ADDRESS: u64 = 1 << 52;

    /// A well-formed pair of entries, with `root` and `context` words XORed in.
    fn configured(config: &VtdConfig, root: [u64; 2], context: [u64; 2]) -> RequesterConfig {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let at = |address, word: u64| memory.write_obj(word, GuestAddress(address)).unwrap();
        at(ROOT + 0x10, (CONTEXT | 1) ^ root[0]);
        at(ROOT + 0x18, root[1]);
        at(CONTEXT + 0x80, 0x3001 ^ context[0]);
        at(CONTEXT + 0x88, (0x17 << 8 | 2) ^ context[1]);
        let caps = config.capabilities().unwrap();
        let root = Some(Rtaddr::new().with_rta(ROOT >> 12));
        let tables = Tables { memory: &memory, caps: &caps, root };
        let config = tables.config(Requester::rid(Bdf::from_raw(RID)));
        if !matches!(config.policy, Policy::Blocked(_)) {
            assert_eq!(config.tag, DomainTag { domain: 0x17, pasid: 0 });
        }
        config
    }

    /// The resulting configuration.
    fn decide(config: &VtdConfig, root: [u64; 2], context: [u64; 2]) -> Policy {
        configured(config, root, context).policy
    }

    fn with_second_stage() -> VtdConfig {
        VtdConfig { second_stage: true, ..Default::default() }
    }

    fn blocked(reason: u8) -> Policy {
        Policy::Blocked(FaultReason::from_code(reason).unwrap())
    }

    #[test]
    fn well_formed_entries_are_served() {
        let tables = VtdSecondStage {
            table: 0x3000,
            address_width: AddressWidth::Bits48,
            accessed_dirty: false,
        };
        let served = decide(&with_second_stage(), [0; 2], [0; 2]);
        assert_eq!(served, Policy::Stage1(Stage1::VtdSecondStage(tables)));
        // Bits 6:3 of the upper word are ignored.
        let served = decide(&with_second_stage(), [0; 2], [0, 0x78]);
        assert_eq!(served, Policy::Stage1(Stage1::VtdSecondStage(tables)));
        let narrow = decide(&with_second_stage(), [0; 2], [0, 3]);
        let tables = VtdSecondStage {
            table: 0x3000,
            address_width: AddressWidth::Bits39,
            accessed_dirty: false,
        };
        assert_eq!(narrow, Policy::Stage1(Stage1::VtdSecondStage(tables)));
        assert_eq!(decide(&with_second_stage(), [0; 2], [0b1000, 0]), Policy::Bypass);
    }

    #[test]
    fn pass_through_has_the_widest_width() {
        let wide = VtdConfig { address_width: 57, ..with_second_stage() };
        assert_eq!(decide(&wide, [0; 2], [0b1000, 1]), Policy::Bypass);
        assert_eq!(decide(&wide, [0; 2], [0b1000, 0]), blocked(0x03));
        assert_eq!(decide(&with_second_stage(), [0; 2], [0b1000, 3]), blocked(0x03));
    }

    #[test]
    fn each_check_has_its_reason() {
        let config = with_second_stage();
        let cases: &[([u64; 2], [u64; 2], u8)] = &[
            ([1, 0], [0; 2], 0x01),
            ([RESERVED_ADDRESS, 0], [0; 2], 0x0a),
            ([2, 0], [0; 2], 0x0a),
            ([0, 1], [0; 2], 0x0a),
            ([CONTEXT ^ 0x10_0000, 0], [0; 2], 0x09),
            ([0; 2], [1, 0], 0x02),
            ([0; 2], [0x10, 0], 0x0b),
            ([0; 2], [RESERVED_ADDRESS, 0], 0x0b),
            ([0; 2], [0, 0x80], 0x0b),
            ([0; 2], [0, 1 << 24], 0x0b),
            // TT reserved; TT 01 without device-TLBs; widths that are reserved or not offered.
            ([0; 2], [0b1100, 0], 0x03),
            ([0; 2], [0b0100, 0], 0x03),
            ([0; 2], [0, 2], 0x03),
            ([0; 2], [0, 1], 0x03),
            // The top table is outside memory.
            ([0; 2], [0x10_0000, 0], 0x03),
        ];
        for &(root, context, reason) in cases {
            assert_eq!(decide(&config, root, context), blocked(reason), "{root:x?} {context:x?}");
        }
        // Second-stage tables are not offered, so an entry has no valid width.
        for entry in [0, 0b1000] {
            assert_eq!(decide(&VtdConfig::default(), [0; 2], [entry, 0]), blocked(0x03));
        }
    }

    #[test]
    fn fpd_counts_even_in_an_entry_that_is_not_present() {
        let config = configured(&with_second_stage(), [0; 2], [0b11, 0]);
        assert_eq!((config.policy, config.fault_disabled), (blocked(0x02), true));
    }

    #[test]
    fn a_root_table_outside_memory_is_an_access_error() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let caps = with_second_stage().capabilities().unwrap();
        let root = Some(Rtaddr::new().with_rta(0x10));
        let tables = Tables { memory: &memory, caps: &caps, root };
        let config = tables.config(Requester::rid(Bdf::from_raw(RID)));
        assert_eq!(config.policy, blocked(0x08));
    }
}
