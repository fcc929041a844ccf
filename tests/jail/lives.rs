// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The lives of virtual IOMMUs on a host, each step by a thread of its kind.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use twostage::iommufd::{
    CountedHost, HostIommu, ObjectId, Protection, UserMemory, Verb, VerbObserver,
};
use twostage::jail::{ThreadKind, GUEST, REMOVE, SETUP};
use twostage::nesting::survey::survey;
use twostage::nesting::vtd::Nesting;
use twostage::nesting::GuestIoas;
use twostage::spec::pci::{Bdf, Pasid};
use twostage::spec::smmuv3::command::Command;
use twostage::spec::vtd::page_request::PageResponse;
use twostage::spec::vtd::qi::Descriptor;
use twostage::unit::{Smmuv3Builder, VtdBuilder};
use twostage::viommu::smmuv3::{
    EventRecordWords, EventTarget, Smmu, SmmuInterrupt, SmmuInterrupts,
};
use twostage::viommu::vtd::VtdConfig;
use twostage::viommu::InterruptSink;
use twostage_emulated::kit::{smmuv3, vtd, Pages};
use twostage_emulated::{
    DeviceConfig, DmaAttributes, EmulatedHost, EmulatedUnit, SmmuV3Unit, SmmuV3UnitConfig, VtdUnit,
    VtdUnitConfig,
};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::{Jail, KIND};

/// The device for the guest.
const RID: Bdf = Bdf::from_raw(0x20);
/// Memory: ordinary, and of a file.
const LOW: usize = 16 << 20;
const HIGH: u64 = 1 << 32;
const HIGH_SIZE: usize = 2 << 20;
/// Within the reach of edu (28 bits), and not guest memory.
const IOVA: u64 = 0x234_5000;
const PAGE: u64 = 0x1000;
/// A domain or an address space of the guest.
const NAME: u16 = 7;

/// Which kind of thread has called which verb.
#[derive(Default)]
pub struct Watch(Mutex<BTreeSet<(&'static str, Verb)>>);

impl VerbObserver for Watch {
    fn called(&self, verb: Verb, _: &[ObjectId], _: Instant, _: Duration, _: Option<&dyn Display>) {
        // Others are devices, which the emulated host has in this process.
        if let Some(kind) = KIND.get() {
            self.0.lock().unwrap().insert((kind.name, verb));
        }
    }
}

/// A load by the device at an IOVA, which may fail.
pub type Load = Box<dyn Fn(u64)>;

/// Opens the host, whose threads the jail starts.
pub type Open = Box<dyn Fn(&Jail) -> Arc<dyn HostIommu> + Sync>;

/// Does something on this thread in the midst of DMA by the device.
pub type DuringDma = Box<dyn Fn(&dyn Fn()) + Sync>;

/// What machines are made of.
pub struct World {
    pub jail: Jail,
    pub watch: Arc<Watch>,
    pub device: String,
    pub open: Open,
    pub engine: Box<dyn Fn(ObjectId) -> Load + Sync>,
    pub during_dma: DuringDma,
}

/// What a VMM has before there is a virtual IOMMU.
struct Ground {
    host: Arc<CountedHost>,
    ioas: Arc<GuestIoas>,
    dev: ObjectId,
}

impl World {
    /// An emulated host with `unit`, each time it is opened.
    pub fn emulated(locked: bool, unit: fn() -> EmulatedUnit) -> Self {
        let hosts = Arc::new(Mutex::new(Vec::<Arc<EmulatedHost>>::new()));
        let (opened, busy) = (hosts.clone(), hosts.clone());
        let open = move |_: &Jail| -> Arc<dyn HostIommu> {
            let host = EmulatedHost::new();
            let id = host.add_unit(unit());
            let config = DeviceConfig::default().with_pasid_bits(8).with_ats(true).with_pri(true);
            host.add_device("nic", id, RID, config).unwrap();
            opened.lock().unwrap().push(host.clone());
            host
        };
        let engine = move |_| -> Load {
            let port = hosts.lock().unwrap().last().unwrap().dma_port("nic").unwrap();
            let port = Mutex::new(port);
            Box::new(move |iova| {
                let _ = port.lock().unwrap().read(DmaAttributes::default(), iova, &mut [0; 8]);
            })
        };
        let during_dma = move |work: &dyn Fn()| {
            let mut port = busy.lock().unwrap().last().unwrap().dma_port("nic").unwrap();
            let _section = port.section(DmaAttributes::default());
            work();
        };
        Self {
            jail: Jail { locked, ..Jail::default() },
            watch: Arc::default(),
            device: "nic".to_owned(),
            open: Box::new(open),
            engine: Box::new(engine),
            during_dma: Box::new(during_dma),
        }
    }

    /// A new host that maps `memory`, and its device.
    fn ground(&self, memory: &[Arc<GuestRegionMmap>]) -> Ground {
        let observer = self.watch.clone();
        self.jail.run(&SETUP, || {
            let host = Arc::new(CountedHost::new((self.open)(&self.jail), Some(observer)));
            survey(&*host, std::slice::from_ref(&self.device)).unwrap();
            let ioas = GuestIoas::new(host.clone()).unwrap();
            for (start, region) in [0, HIGH].into_iter().zip(memory) {
                ioas.map(start, &UserMemory::whole(region.clone()), Protection::READ_WRITE)
                    .unwrap();
            }
            // Memory may come and go.
            ioas.unmap(HIGH, HIGH_SIZE as u64).unwrap();
            let high = UserMemory::whole(memory[1].clone());
            ioas.map(HIGH, &high, Protection::READ_WRITE).unwrap();
            let dev = host.device_bind(&self.device).unwrap();
            Ground { host, ioas, dev }
        })
    }

    /// Does `work` on a new thread of that kind while DMA is going on that ends a long time later.
    fn run_during_dma<T: Send>(
        &self,
        kind: &'static ThreadKind,
        work: impl FnOnce() -> T + Send,
    ) -> T {
        let begun = Barrier::new(2);
        thread::scope(|scope| {
            scope.spawn(|| {
                (self.during_dma)(&|| {
                    begun.wait();
                    // Who waits for it yields at first (some 900 times), and then sleeps. A yield
                    // takes as long there as here, even on a busy machine and when it is traced.
                    (0..1024).for_each(|_| thread::yield_now());
                    thread::sleep(Duration::from_millis(20));
                })
            });
            self.jail.run(kind, || {
                begun.wait();
                work()
            })
        })
    }

    /// The kinds of threads that were started, and who called which verb, once all is over.
    pub fn end(self) -> (BTreeSet<&'static str>, BTreeSet<(&'static str, Verb)>) {
        let started = self.jail.end();
        (started, std::mem::take(&mut *self.watch.0.lock().unwrap()))
    }
}

/// Guest memory, ordinary and of a file.
fn memory() -> [Arc<GuestRegionMmap>; 2] {
    let file = tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile()).unwrap();
    file.set_len(HIGH_SIZE as u64).unwrap();
    let file = Some(FileOffset::new(file, 0));
    let low = GuestRegionMmap::from_range(GuestAddress(0), LOW, None).unwrap();
    let high = GuestRegionMmap::from_range(GuestAddress(HIGH), HIGH_SIZE, file).unwrap();
    [Arc::new(low), Arc::new(high)]
}

/// Interrupts of units, which are of no interest here.
struct Interrupts;

impl SmmuInterrupts for Interrupts {
    fn message(&self, _: u64, _: u32) -> bool {
        true
    }

    fn wire(&self, _: SmmuInterrupt) {}
}

impl InterruptSink for Interrupts {
    fn send_msi(&self, _: u64, _: u32) {}
}

/// Holds events back while its lock is taken.
struct Gate {
    smmu: Arc<Smmu>,
    lock: Arc<Mutex<()>>,
}

impl EventTarget for Gate {
    fn event(&self, record: EventRecordWords) {
        drop(self.lock.lock().unwrap());
        self.smmu.event(record);
    }

    fn events_lost(&self) {
        self.smmu.events_lost();
    }
}

#[track_caller]
fn wait_until(what: &str, mut over: impl FnMut() -> bool) {
    let start = Instant::now();
    while !over() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited a minute for {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A virtual SMMUv3 on `world`: built, used, filled with events, moved to another host, taken down.
pub fn smmu_life(world: &World) {
    let (jail, regions) = (&world.jail, memory());
    let map = GuestMemoryMmap::<()>::from_arc_regions(regions.to_vec()).unwrap();
    let map = Arc::new(map);
    let lock = Arc::new(Mutex::new(()));
    let builder = |ground: &Ground| {
        let lock = lock.clone();
        Smmuv3Builder::new(ground.ioas.clone(), map.clone(), Arc::new(Interrupts))
            .threads(Arc::new(jail.clone()))
            .event_depth(1)
            .fault_target(move |smmu| Arc::new(Gate { smmu, lock }))
            .device(RID, ground.dev, "device")
    };
    let ground = world.ground(&regions);
    let unit = Arc::new(jail.run(&SETUP, || builder(&ground).build().unwrap()));
    let guest = smmuv3::Driver::new(Pages::new(map.clone(), 0x10_0000), unit.clone());
    let load = (world.engine)(ground.dev);
    let [table, other] = [guest.page(), guest.page()];
    guest.map(table, IOVA, guest.page(), 3, true);
    jail.run(&GUEST, || {
        guest.enable();
        for entry in [
            smmuv3::Entry::Bypass,
            smmuv3::Entry::Stage1 { cd: guest.context(other, NAME) },
            smmuv3::Entry::Stage1 { cd: guest.context(table, NAME) },
        ] {
            guest.set_entry(RID.into(), entry);
            assert_eq!(guest.flush_entries(&[RID]), smmuv3::Completion::Done);
        }
    });
    load(IOVA);
    let asid = Command::TlbiNhAsid { vmid: 0, asid: NAME };
    assert_eq!(world.run_during_dma(&GUEST, || guest.submit(&[asid])), smmuv3::Completion::Done);
    let events = || unit.nesting().counters().events;
    load(IOVA + PAGE);
    wait_until("an event", || events() == 1);
    assert!(jail.run(&GUEST, || guest.take_event()).is_some());
    // More than the queue holds: one is held back, one is in the queue, and one is lost.
    let held = lock.lock().unwrap();
    (0..4).for_each(|_| load(IOVA + PAGE));
    drop(held);
    wait_until("a loss", || unit.nesting().counters().events_lost != 0);
    let state = jail.run(&GUEST, || unit.snapshot().unwrap());
    jail.run(&GUEST, || unit.reset().unwrap());
    world.run_during_dma(&REMOVE, || unit.remove_device(RID).unwrap());
    world.run_during_dma(&SETUP, || unit.add_device(RID, ground.dev, "again").unwrap());
    drop(load);
    jail.run(&REMOVE, || {
        unit.shutdown().unwrap();
        ground.host.device_unbind(ground.dev).unwrap();
        drop((guest, unit, ground));
    });

    let ground = world.ground(&regions);
    let unit = jail.run(&SETUP, || builder(&ground).restore(&state).unwrap());
    let load = (world.engine)(ground.dev);
    load(IOVA + PAGE);
    wait_until("an event", || unit.nesting().counters().events == 1);
    drop(load);
    // Dropped in use.
    jail.run(&REMOVE, || drop((unit, ground)));
}

/// A virtual VT-d on `world`, likewise; with a PASID if `pasids`. Its tables are nested or
/// mirrored, as `nesting` says.
pub fn vtd_life(world: &World, pasids: bool, nesting: Nesting) {
    let (jail, regions) = (&world.jail, memory());
    let map = GuestMemoryMmap::<()>::from_arc_regions(regions.to_vec()).unwrap();
    let map = Arc::new(map);
    let builder = |ground: &Ground| {
        VtdBuilder::new(ground.ioas.clone(), map.clone(), Arc::new(Interrupts))
            .threads(Arc::new(jail.clone()))
            .nesting(nesting)
            .device(RID, ground.dev, "device")
    };
    let ground = world.ground(&regions);
    let config = VtdConfig::default().with_first_stage(Some(true));
    let unit = Arc::new(jail.run(&SETUP, || builder(&ground).config(&config).build().unwrap()));
    let guest = vtd::Driver::new(Pages::new(map.clone(), 0x10_0000), unit.clone());
    let load = (world.engine)(ground.dev);
    let [table, other] = [guest.page(), guest.page()];
    guest.map(table, IOVA, guest.page(), 1, true);
    guest.map(table, IOVA + 8 * PAGE, guest.page(), 1, true);
    let entry = |table| vtd::Entry::FirstStage { table, domain: NAME };
    jail.run(&GUEST, || {
        guest.enable();
        for (pasid, entry) in [
            (0, vtd::Entry::PassThrough { domain: NAME }),
            (0, entry(table)),
            (5, entry(other)),
            (5, vtd::Entry::NotPresent),
            (5, entry(other)),
        ] {
            if pasid == 0 || pasids {
                guest.set_entry(RID, pasid, entry);
                assert_eq!(guest.flush_pasid_cache(), vtd::Completion::Done);
            }
        }
    });
    load(IOVA);
    let pasid = Pasid::new(0).unwrap();
    let all = Descriptor::PasidIotlb { domain: NAME, pasid, range: None };
    guest.unmap(table, IOVA + 8 * PAGE);
    assert_eq!(world.run_during_dma(&GUEST, || guest.submit(&[all])), vtd::Completion::Done);
    load(IOVA + PAGE);
    let state = jail.run(&GUEST, || unit.snapshot().unwrap());
    jail.run(&GUEST, || unit.reset().unwrap());
    world.run_during_dma(&REMOVE, || unit.remove_device(RID).unwrap());
    world.run_during_dma(&SETUP, || unit.add_device(RID, ground.dev, "again").unwrap());
    drop(load);
    jail.run(&REMOVE, || {
        unit.shutdown().unwrap();
        ground.host.device_unbind(ground.dev).unwrap();
        drop((guest, unit, ground));
    });

    let ground = world.ground(&regions);
    let unit = jail.run(&SETUP, || builder(&ground).restore(&state).unwrap());
    // Dropped in use.
    jail.run(&REMOVE, || drop((unit, ground)));
}

/// A virtual VT-d on `world`, whose unit and device have page requests: the guest serves one, and
/// another one ends with the unit.
pub fn asking_life(world: &World) {
    let (jail, regions) = (&world.jail, memory());
    let map = GuestMemoryMmap::<()>::from_arc_regions(regions.to_vec()).unwrap();
    let map = Arc::new(map);
    let ground = world.ground(&regions);
    let config = VtdConfig::default().with_device_iotlb(true).with_page_requests(true);
    let unit = jail.run(&SETUP, || {
        VtdBuilder::new(ground.ioas.clone(), map.clone(), Arc::new(Interrupts))
            .threads(Arc::new(jail.clone()))
            .device(RID, ground.dev, "device")
            .config(&config)
            .build()
            .unwrap()
    });
    let unit = Arc::new(unit);
    let guest = vtd::Driver::new(Pages::new(map, 0x10_0000), unit.clone());
    let table = guest.page();
    jail.run(&GUEST, || {
        guest.set_entry(RID, 0, vtd::Entry::FirstStage { table, domain: NAME });
        guest.set_page_requests(RID, true);
        guest.start_page_queue();
        guest.enable();
    });
    let asked = || {
        let mut request = None;
        wait_until("a page request", || {
            request = guest.take_page_request();
            request.is_some()
        });
        request.unwrap()
    };
    thread::scope(|scope| {
        let load = |iova| scope.spawn(move || (world.engine)(ground.dev)(iova));
        let served = load(IOVA);
        jail.run(&GUEST, || {
            let request = asked();
            guest.map(table, IOVA, guest.page(), 1, true);
            let done = guest.respond(&request, PageResponse::Success);
            assert_eq!(done, vtd::Completion::Done);
        });
        served.join().unwrap();
        let left = load(IOVA + PAGE);
        jail.run(&GUEST, asked);
        jail.run(&REMOVE, || unit.shutdown().unwrap());
        left.join().unwrap();
    });
    jail.run(&REMOVE, || drop((guest, unit, ground)));
}

pub fn smmu() -> EmulatedUnit {
    SmmuV3Unit::new(SmmuV3UnitConfig::default()).into()
}

pub fn asking_vt_d() -> EmulatedUnit {
    let config = VtdUnitConfig::default().with_device_tlb(true).with_page_requests(true);
    VtdUnit::new(config).into()
}

pub fn vt_d() -> EmulatedUnit {
    VtdUnit::new(VtdUnitConfig::default()).into()
}
