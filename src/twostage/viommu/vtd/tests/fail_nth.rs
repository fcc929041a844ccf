// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A life of the unit in which each host call fails in turn.

use super::*;
use crate::spec::vtd::qi::PasidCacheScope;

/// Enables, serves, changes, invalidates and disables; clears IQE as often as a driver would.
fn life(guest: &Guest) {
    guest.write_tables();
    guest.write_pasid(5, 0x6000);
    guest.set_root(0x400);
    guest.enable_queue(0x800);
    guest.enable_translation();
    let changed = Descriptor::PasidCache(PasidCacheScope::Global);
    let stale = |value| Descriptor::PasidIotlb { domain: DOMAIN, pasid: pasid(value), range: None };
    guest.write_pasid(5, 0x7000);
    guest.submit(&[changed, stale(5), wait(1)]);
    guest.write(DIRECTORY, &[0]);
    guest.submit(&[changed, stale(0), wait(2)]);
    guest.iommu.add_device(UPPER_RID);
    guest.iommu.remove_device(UPPER_RID);
    guest.write32(regs::FSTS, 1 << 4);
    // Whatever the host did, the queue has been processed.
    assert_eq!(guest.status(), 2);
    guest.submit(&[changed, wait(3)]);
    assert_eq!(guest.status(), 3);
    for requester in [Requester::rid(RID), with_pasid(5)] {
        assert_eq!(guest.reason(requester), Some(0x51));
    }
    guest.disable_translation();
}

#[test]
fn each_failure_is_counted_told_and_survived() {
    for failing in 0.. {
        let guest = Guest::new(VtdConfig::default());
        guest.host.refusals.after(failing);
        life(&guest);
        let calls = guest.calls();
        let counters = guest.iommu.counters();
        let Some(call) = calls.get(failing as usize) else {
            assert_eq!((counters.host_errors, counters.queue_errors), (0, 0));
            assert!(failing > 10, "{calls:?}");
            return;
        };
        assert_eq!(counters.host_errors, 1, "{call:?}");
        // The first call is SRTP's, which cannot report a failure.
        let queue_errors = u64::from(matches!(call, Call::Invalidate(_)) && failing > 0);
        assert_eq!(counters.queue_errors, queue_errors, "{call:?}");
    }
}
