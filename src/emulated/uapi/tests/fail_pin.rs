// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every pinning fails in turn: the call fails, and has no effect.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestRegionMmap};

use crate::host::objects::tests::fake::{Bench, PLAIN};
use crate::host::objects::MapRequest;
use crate::ioas::Source;
use crate::uapi::{RegionSpace, UserFault, UserSpace};
use crate::{Access, AccessUnmap};
use twostage::iommufd::{Errno, HostIommu, MapTarget, ObjectId, Protection, UserMemory};

const PAGE: u64 = 0x1000;
const RW: Protection = Protection::READ_WRITE;

/// A process whose memory consists of pieces of one page, one of which cannot be pinned.
#[derive(Debug, Clone)]
struct Fragile {
    space: RegionSpace,
    /// Pages pinned before the failing one; negative if none fails.
    left: Arc<AtomicU64>,
}

const NEVER: u64 = u64::MAX / 2;

impl UserSpace for Fragile {
    fn share(&self) -> Arc<dyn UserSpace> {
        Arc::new(self.clone())
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), UserFault> {
        self.space.read(address, bytes)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), UserFault> {
        self.space.write(address, bytes)
    }

    fn memory(&self, address: u64, length: u64, writable: bool) -> Result<UserMemory, UserFault> {
        if self.left.fetch_sub(1, Ordering::Relaxed) == 0 {
            return Err(UserFault { address, length });
        }
        self.space.memory(address, length.min(PAGE - address % PAGE), writable)
    }
}

#[derive(Debug)]
struct Nobody;

impl AccessUnmap for Nobody {
    fn unmap(&self, _: u64, _: u64) {}
}

/// Two IOASes, the second with a HWPT, and an access object in the first.
struct Rig {
    bench: Bench,
    dev: ObjectId,
    src: ObjectId,
    dst: ObjectId,
    access: Access,
    user: Fragile,
    start: u64,
}

impl Rig {
    fn new() -> Self {
        let bench = Bench::new();
        let (dev, src, dst) = (bench.bind("a"), bench.ioas(), bench.ioas());
        bench.paging(dev, dst, PLAIN).unwrap();
        let access = bench.host.access_create(Some(Arc::new(Nobody))).unwrap();
        access.attach(src).unwrap();
        let region = GuestRegionMmap::from_range(GuestAddress(0), 0x10000, None).unwrap();
        let region = Arc::new(region);
        let start = region.as_ptr() as u64;
        let (space, left) = (RegionSpace::new(vec![region]), Arc::new(AtomicU64::new(NEVER)));
        Self { bench, dev, src, dst, access, user: Fragile { space, left }, start }
    }

    fn map(&self, ioas: ObjectId, iova: u64, pages: u64) -> Result<(), Errno> {
        let source = Source::User(self.user.share(), self.start);
        let (target, length) = (MapTarget::Fixed(iova), pages * PAGE);
        let request = MapRequest { target, source, length, protection: RW };
        let mut objects = self.bench.host.objects();
        objects.ioas_map(ioas, request).map(drop).map_err(|refusal| refusal.errno)
    }

    /// Everything that pins, in sequence; stops at the first failure.
    fn everything(&self) -> Result<(), Errno> {
        self.map(self.src, 0x10000, 3)?;
        self.map(self.src, 0x13000, 3)?;
        self.access.pin_pages(0x11000, 3 * PAGE, true).map_err(|error| error.errno)?;
        let copy = MapTarget::Fixed(0x20000);
        let (host, dst) = (&self.bench.host, self.dst);
        host.ioas_copy(dst, copy, self.src, 0x10000, 6 * PAGE, RW).map_err(|error| error.errno)?;
        self.map(dst, 0x30000, 2)?;
        self.bench.paging(self.dev, self.src, PLAIN).map(drop).map_err(|error| error.errno)
    }

    /// What is mapped and pinned.
    fn state(&self) -> (String, u64) {
        (self.bench.host.graph().to_string(), self.bench.host.pinned_bytes())
    }
}

#[test]
fn a_pin_that_fails_leaves_nothing_behind() {
    let asked = {
        let rig = Rig::new();
        rig.everything().unwrap();
        NEVER - rig.user.left.load(Ordering::Relaxed)
    };
    // 6 pages shared by everything, 2 separate ones.
    assert_eq!(asked, 8, "each page is asked for once, however many share it");
    for failing in 0..asked {
        let rig = Rig::new();
        rig.user.left.store(failing, Ordering::Relaxed);
        assert_eq!(rig.everything(), Err(Errno::EFAULT), "{failing}");
        rig.user.left.store(NEVER, Ordering::Relaxed);
        let pinned = rig.state().1;
        assert!(pinned < asked * PAGE && pinned.is_multiple_of(PAGE));
        // What failed succeeds now.
        let again = rig.bench.paging(rig.dev, rig.src, PLAIN).unwrap();
        rig.bench.host.destroy(again).unwrap();
        assert_eq!(rig.state().1, pinned, "{failing}");
        rig.access.detach().unwrap();
        for ioas in [rig.src, rig.dst] {
            rig.bench.unmapped(ioas);
        }
        assert_eq!(rig.bench.host.pinned_bytes(), 0, "{failing}");
    }
}

#[test]
fn a_call_whose_pin_fails_changes_nothing() {
    let rig = Rig::new();
    rig.map(rig.src, 0x10000, 4).unwrap();
    rig.access.pin_pages(0x11000, PAGE, true).unwrap();
    let before = rig.state();
    // A pinned page is not looked up.
    for failing in 0..3 {
        let fail = || rig.user.left.store(failing, Ordering::Relaxed);
        fail();
        assert_eq!(rig.access.pin_pages(0x10000, 4 * PAGE, true).unwrap_err().errno, Errno::EFAULT);
        fail();
        let copy = MapTarget::Fixed(0x20000);
        let copied = rig.bench.host.ioas_copy(rig.dst, copy, rig.src, 0x10000, 4 * PAGE, RW);
        assert_eq!(copied.unwrap_err().errno, Errno::EFAULT);
        fail();
        assert_eq!(rig.map(rig.dst, 0x20000, 4), Err(Errno::EFAULT));
        fail();
        let hwpt = rig.bench.paging(rig.dev, rig.src, PLAIN);
        assert_eq!(hwpt.unwrap_err().errno, Errno::EFAULT);
        assert_eq!(rig.state(), before, "{failing}");
    }
}
