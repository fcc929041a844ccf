// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Everything at once: pages are moved in every way, HWPTs and IOASes come and go, a user in the
//! host pins pages, and devices do DMA to all of it.
//!
//! Each mover has two pages of memory and moves an IOVA between them. It quarantines the old page,
//! as in the tests of one way. Nobody may use a page in quarantine, nobody waits forever (or this
//! test does), and nothing is left in the end.
//!
//! `TWOSTAGE_STRESS_SECONDS` sets the duration; default 2 seconds.

use std::sync::{OnceLock, Weak};
use std::time::{Duration, Instant};

use twostage_emulated::{Access, AccessUnmap};

use super::*;

/// Minimum number of rounds for everybody, however slow the machine is.
const MIN_ROUNDS: u64 = 20;
/// One transfer.
const PIECE: usize = 256;

/// The movers, by the way in which they move. Each has this IOVA and these two places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mover {
    /// A leaf is changed and invalidated.
    Leaf,
    /// The same in stage 2: unmapped and mapped elsewhere.
    Stage2,
    /// A PASID is attached to other tables.
    Replace,
    /// A PASID is detached, then attached to other tables.
    Detach,
    /// An IOVA is unmapped under a user in the host.
    Pinned,
}

impl Mover {
    const ALL: [Self; 5] = [Self::Leaf, Self::Stage2, Self::Replace, Self::Detach, Self::Pinned];

    fn number(self) -> u64 {
        self as u64
    }

    fn iova(self) -> u64 {
        match self {
            // Straight in the IOAS.
            Self::Pinned => WINDOW + 4 * PAGE,
            _ => IOVA + self.number() * PAGE,
        }
    }

    fn pasid(self) -> Option<u32> {
        matches!(self, Self::Replace | Self::Detach).then_some(self.number() as u32)
    }

    fn places(self) -> [u64; 2] {
        PLACES.map(|place| place + 2 * PAGE * self.number())
    }

    /// Nothing is mapped for a moment, between one place and the other.
    fn has_gap(self) -> bool {
        !matches!(self, Self::Leaf | Self::Replace)
    }
}

struct World {
    host: Arc<EmulatedHost>,
    unit: Arc<VtdUnit>,
    memory: Arc<GuestRegionMmap>,
    ioas: ObjectId,
    dev: ObjectId,
    parent: ObjectId,
    nested: [ObjectId; 2],
    rid: Bdf,
    access: Arc<Access>,
    pins: Arc<Pins>,
}

/// What the user in the host has pinned.
#[derive(Debug, Default)]
struct Pins {
    access: OnceLock<Weak<Access>>,
    /// Held while pinned memory is used.
    pinned: Mutex<Option<UserMemory>>,
}

impl AccessUnmap for Pins {
    fn unmap(&self, _: u64, _: u64) {
        let mut pinned = self.pinned.lock().unwrap();
        let access = self.access.get().and_then(Weak::upgrade);
        if let (Some(_), Some(access)) = (pinned.take(), access) {
            access.unpin_pages(Mover::Pinned.iova(), PAGE).unwrap();
        }
    }
}

impl World {
    fn new() -> Self {
        let host = EmulatedHost::new();
        let unit = VtdUnit::new(VtdUnitConfig::default());
        let unit_id = host.add_unit(Arc::clone(&unit));
        let rid = Bdf::new(0, 3, 0).unwrap();
        let config = DeviceConfig::default().with_pasid_bits(4);
        host.add_device("device", unit_id, rid, config).unwrap();
        let dev = host.device_bind("device").unwrap();
        let memory = GuestRegionMmap::<()>::from_range(GuestAddress(0), 0x40_0000, None).unwrap();
        let memory = Arc::new(memory);
        let ioas = host.ioas_alloc().unwrap();
        let whole = UserMemory::whole(Arc::clone(&memory));
        host.ioas_map(ioas, &whole, MapTarget::Fixed(0), Protection::READ_WRITE).unwrap();
        let pasid = || HwptFlags::new().with_pasid(true);
        let alloc = |flags, pt, data| {
            host.hwpt_alloc(&HwptAlloc { flags, dev, pt, data, fault: None }).unwrap()
        };
        let parent = alloc(pasid().with_nest_parent(true), ioas, HwptData::None);
        let nested = TABLES.map(|pgtbl_addr| {
            let data = iommu_hwpt_vtd_s1 { pgtbl_addr, addr_width: 48, ..Default::default() };
            alloc(pasid(), parent, HwptData::VtdS1(data))
        });
        let pins = Arc::<Pins>::default();
        let access = Arc::new(host.access_create(Some(pins.clone())).unwrap());
        pins.access.get_or_init(|| Arc::downgrade(&access));
        access.attach(ioas).unwrap();
        let world = Self { host, unit, memory, ioas, dev, parent, nested, rid, access, pins };
        for (tables, to) in TABLES.into_iter().zip(0..) {
            world.build_tables(tables, to);
        }
        for mover in Mover::ALL {
            mover.places().into_iter().for_each(|place| world.memory.fill(place, CLEAN));
            if matches!(mover, Mover::Stage2 | Mover::Pinned) {
                world.map(mover, 0);
            }
        }
        for pasid in [None, Mover::Replace.pasid(), Mover::Detach.pasid()] {
            world.host.device_attach(dev, pasid, nested[0]).unwrap();
        }
        world
    }

    /// GPA of the leaf of `mover` in the tables at `root`.
    fn leaf(root: u64, mover: Mover) -> u64 {
        root + 3 * PAGE + (mover.iova() >> 12 & 0x1ff) * 8
    }

    /// Tables at `root` that map to place `to` for every mover that uses them.
    fn build_tables(&self, root: u64, to: usize) {
        for level in 0..3 {
            let entry = root + level * PAGE + (IOVA >> (39 - 9 * level) & 0x1ff) * 8;
            self.memory.put(entry, (root + (level + 1) * PAGE) | 0x27);
        }
        for mover in [Mover::Leaf, Mover::Replace, Mover::Detach] {
            self.memory.put(Self::leaf(root, mover), mover.places()[to] | 0x67);
        }
        self.memory.put(Self::leaf(root, Mover::Stage2), WINDOW | 0x67);
    }

    fn map(&self, mover: Mover, to: usize) {
        let memory = UserMemory::new(Arc::clone(&self.memory), mover.places()[to], PAGE).unwrap();
        let iova = if mover == Mover::Stage2 { WINDOW } else { mover.iova() };
        let target = MapTarget::Fixed(iova);
        self.host.ioas_map(self.ioas, &memory, target, Protection::READ_WRITE).unwrap();
    }

    fn move_to(&self, mover: Mover, to: usize) {
        match mover {
            Mover::Leaf => {
                self.memory.put(Self::leaf(TABLES[0], mover), mover.places()[to] | 0x67);
                let entry = iommu_hwpt_vtd_s1_invalidate {
                    addr: mover.iova(),
                    npages: 1,
                    flags: VTD_INV_FLAGS_LEAF,
                    __reserved: 0,
                };
                let data = InvalidateData::VtdS1(&[entry]);
                self.host.hwpt_invalidate(self.nested[0], data).unwrap();
            }
            Mover::Stage2 | Mover::Pinned => {
                let iova = if mover == Mover::Stage2 { WINDOW } else { mover.iova() };
                self.host.ioas_unmap(self.ioas, iova, PAGE).unwrap();
                self.map(mover, to);
            }
            Mover::Replace => {
                self.host.device_attach(self.dev, mover.pasid(), self.nested[to]).unwrap();
            }
            Mover::Detach => {
                self.host.device_detach(self.dev, mover.pasid()).unwrap();
                self.host.device_attach(self.dev, mover.pasid(), self.nested[to]).unwrap();
            }
        }
    }

    /// One transfer of a device to each mover's page. Returns how many were stale or lost.
    fn transfers(&self, port: &mut DmaPort, write: bool, offset: u64) -> u64 {
        let stale = |mover: Mover, bytes: &[u8], outcome: Result<(), DmaError>| {
            let lost = outcome.is_err() && !mover.has_gap();
            u64::from(lost || outcome.is_ok() && bytes.contains(&QUARANTINE))
        };
        let movers = Mover::ALL.into_iter().filter(|mover| *mover != Mover::Pinned);
        movers
            .map(|mover| {
                let attributes = DmaAttributes { pasid: mover.pasid(), ..DmaAttributes::default() };
                let mut bytes = [DEVICE_DATA; PIECE];
                let iova = mover.iova() + offset;
                let outcome = match write {
                    true => port.write(attributes, iova, &bytes),
                    false => port.read(attributes, iova, &mut bytes),
                };
                stale(mover, &bytes, outcome)
            })
            .sum()
    }

    /// The user in the host pins its page, uses it and may keep it. Returns whether it was stale.
    fn use_pinned(&self, round: u64) -> u64 {
        // In this order, as the host calls the listener without holding locks.
        let mut pinned = self.pins.pinned.lock().unwrap();
        if pinned.is_none() {
            // Refused between unmap and map.
            let pieces = self.access.pin_pages(Mover::Pinned.iova(), PAGE, true);
            *pinned = pieces.ok().and_then(|pieces| pieces.into_iter().next());
        }
        let Some(memory) = &*pinned else { return 0 };
        let mut bytes = [DEVICE_DATA; PIECE];
        match round % 2 {
            0 => memory.slice().write_slice(&bytes, 0).unwrap(),
            _ => memory.slice().read_slice(&mut bytes, 0).unwrap(),
        }
        u64::from(bytes.contains(&QUARANTINE))
    }

    /// Creates and destroys unrelated objects.
    fn churn(&self) {
        let host = &self.host;
        let ioas = host.ioas_alloc().unwrap();
        let (target, both) = (MapTarget::Fixed(0), Protection::READ_WRITE);
        host.ioas_copy(ioas, target, self.ioas, 0, 4 * PAGE, both).unwrap();
        let data =
            iommu_hwpt_vtd_s1 { pgtbl_addr: TABLES[0], addr_width: 48, ..Default::default() };
        let hwpt = host
            .hwpt_alloc(&HwptAlloc {
                flags: HwptFlags::new().with_pasid(true),
                dev: self.dev,
                pt: self.parent,
                data: HwptData::VtdS1(data),
                fault: None,
            })
            .unwrap();
        host.device_attach(self.dev, Some(9), hwpt).unwrap();
        host.get_hw_info(self.dev).unwrap();
        assert!(host.graph().objects.len() >= 7);
        host.device_detach(self.dev, Some(9)).unwrap();
        host.destroy(hwpt).unwrap();
        host.destroy(ioas).unwrap();
    }
}

/// Counts everybody's rounds, with the time limit.
struct Clock {
    until: Instant,
    rounds: Vec<AtomicU64>,
    stop: AtomicBool,
}

impl Clock {
    /// Runs `work` as worker `who` until time is over and everybody has worked enough.
    fn work(&self, who: usize, mut work: impl FnMut(u64)) {
        let mut round = 0;
        while !self.stop.load(Ordering::Relaxed) {
            work(round);
            round += 1;
            self.rounds[who].store(round, Ordering::Release);
            let enough = || self.rounds.iter().all(|it| it.load(Ordering::Relaxed) >= MIN_ROUNDS);
            if Instant::now() >= self.until && enough() {
                self.stop.store(true, Ordering::Relaxed);
            }
            // There may be fewer processors than threads.
            thread::yield_now();
        }
    }

    /// Waits until what worker `who` has in progress has ended.
    fn wait_for(&self, who: usize) {
        let start = self.rounds[who].load(Ordering::Acquire);
        while self.rounds[who].load(Ordering::Acquire) < start + 2
            && !self.stop.load(Ordering::Relaxed)
        {
            thread::yield_now();
        }
    }
}

#[test]
fn everything_at_once() {
    let seconds = std::env::var("TWOSTAGE_STRESS_SECONDS").ok();
    let seconds = seconds.map_or(2, |text| text.parse().expect("a number of seconds"));
    let world = World::new();
    // Two devices' threads and the user come first: movers wait for them.
    let users = 3;
    let clock = Clock {
        until: Instant::now() + Duration::from_secs(seconds),
        rounds: (0..users + Mover::ALL.len() + 1).map(|_| AtomicU64::new(0)).collect(),
        stop: AtomicBool::new(false),
    };
    let stale = AtomicU64::new(0);
    let first_port = world.unit.port(world.rid.raw());
    thread::scope(|scope| {
        let (world, clock, stale) = (&world, &clock, &stale);
        let add = |found| stale.fetch_add(found, Ordering::Relaxed);
        for who in 0..2 {
            let mut port = first_port.clone();
            scope.spawn(move || {
                clock.work(who, |round| {
                    // Disjoint pieces: concurrent writes of two devices to one byte would be their
                    // race.
                    let offset = (2 * round + who as u64) * PIECE as u64 % PAGE;
                    add(world.transfers(&mut port, who == 0, offset));
                });
            });
        }
        scope.spawn(move || {
            clock.work(2, |round| {
                add(world.use_pinned(round));
            });
        });
        for (who, mover) in (users..).zip(Mover::ALL) {
            scope.spawn(move || {
                clock.work(who, |round| {
                    let (to, from) = if round % 2 == 0 { (1, 0) } else { (0, 1) };
                    world.move_to(mover, to);
                    world.memory.fill(mover.places()[from], QUARANTINE);
                    (0..users).for_each(|user| clock.wait_for(user));
                    add(u64::from(!world.memory.holds(mover.places()[from], QUARANTINE)));
                    world.memory.fill(mover.places()[from], CLEAN);
                });
            });
        }
        let who = users + Mover::ALL.len();
        scope.spawn(move || clock.work(who, |_| world.churn()));
    });
    let rounds: Vec<_> = clock.rounds.iter().map(|it| it.load(Ordering::Relaxed)).collect();
    println!("rounds: {rounds:?}");
    assert_eq!(stale.into_inner(), 0, "after {rounds:?}");
    world.host.close();
    assert_eq!((world.host.live_objects(), world.host.pinned_bytes()), (0, 0));
}
