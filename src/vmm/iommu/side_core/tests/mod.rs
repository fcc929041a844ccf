// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A side core of KVM under a guest that writes registers at random from two vCPUs, while a device
//! faults: pages are lent and taken back as fast as the thread can, and compared with a naive model
//! of registers.

mod driver;
mod guest;

use std::cell::Cell;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use twostage::patience::PATIENCE;
use twostage::skips::not_tested;
use twostage::spec::pci::Bdf;
use twostage::spec::vtd::regs;
use twostage::viommu::vtd::{
    DmaFault, FaultTarget, Invalidation, RequesterConfig, VtdConfig, VtdHostSide, VtdIommu,
};
use twostage::viommu::{HostSideError, InterruptSink, Requester};
use vm_memory::{Bytes, GuestAddress};

use super::kvm::{Abilities, PageSlot, Ring};
use super::pace::Patience;
use super::*;
use crate::arch;
use crate::memory::MachineMemory;
use driver::{Driver, Random, ENABLED, FAULT_EVENT, INVALIDATION_EVENT, PROGRESS, QUEUE};
use guest::{Vcpu, MEMORY, REGISTERS};

const RID: Bdf = Bdf::from_raw(8);

/// A host that does all, at once.
#[derive(Debug)]
struct Host;

impl VtdHostSide for Host {
    fn configure(
        &self,
        _: Requester,
        _: &RequesterConfig,
    ) -> std::result::Result<(), HostSideError> {
        Ok(())
    }

    fn invalidate(&self, _: &[Invalidation]) -> std::result::Result<(), HostSideError> {
        Ok(())
    }
}

thread_local! {
    /// The data of the last message that this thread has sent.
    static SENT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Takes the messages of events, and counts those that the guest has masked.
#[derive(Default)]
struct Sink {
    sent: AtomicU32,
    masked: AtomicU32,
}

impl InterruptSink for Sink {
    fn send_msi(&self, _: u64, data: u32) {
        self.sent.fetch_add(1, Ordering::Relaxed);
        self.masked.fetch_add(data % 2, Ordering::Relaxed);
        SENT.set(Some(data));
    }
}

/// Everything but the vCPUs.
struct Race {
    iommu: Arc<VtdIommu>,
    sink: Arc<Sink>,
    side_core: SideCore,
    /// What exits, by way of the side core.
    exits: Arc<dyn BusDevice>,
    memory: MachineMemory,
}

impl Race {
    /// `None` without a KVM that has what it takes.
    fn new() -> Option<(Self, [Vcpu; 2])> {
        let kvm = Kvm::new().ok()?;
        let memory = MachineMemory::new(MEMORY).unwrap();
        let vm = Arc::new(arch::create_vm(&kvm).unwrap());
        let abilities = Abilities::of(&vm).ok()?;
        memory.register(&vm).unwrap();
        guest::prepare(memory.map());
        let vcpus = [0, 1].map(|number| Vcpu::new(&kvm, &vm, memory.map(), number));
        let (sink, tables) = (Arc::new(Sink::default()), Arc::new(memory.map().clone()));
        let config = VtdConfig::default().with_interrupt_remapping(true);
        let iommu = VtdIommu::new(&config, tables, Arc::new(Host), sink.clone(), None).unwrap();
        iommu.add_device(RID).unwrap();
        let stopper = Stopper::new().unwrap();
        let page = RegisterPage::new().unwrap();
        let slot = PageSlot::new(vm.clone(), 1, REGISTERS, page.clone(), stopper.clone());
        let shared = Shared {
            vm,
            stopper,
            ring: Ring::new(vcpus[0].file().as_raw_fd()).unwrap(),
            abilities,
            auto: false,
            cpu: None,
            vcpus: 2,
            units: vec![Unit::new(iommu.clone(), page, slot, (REGISTERS, 0x1000))],
            state: Mutex::default(),
            changed: Condvar::new(),
            polling: AtomicBool::new(false),
            polls: AtomicU64::new(0),
            polled_ms: AtomicU64::new(0),
            parked: Default::default(),
        };
        // Lent whenever it can be.
        shared.units[0].loan.lock().patience = Patience::of(1, 1);
        let mut side_core = SideCore { shared: Arc::new(shared), thread: None };
        side_core.start().unwrap();
        let exits = side_core.registers(REGISTERS, iommu.clone());
        let race = Self { iommu, sink, side_core, exits, memory };
        race.write(regs::IQA, QUEUE as u32 | 0x800);
        race.write(regs::GCMD, 1 << 26);
        race.write(regs::GCMD, ENABLED);
        Some((race, vcpus))
    }

    fn write(&self, offset: u64, value: u32) {
        self.exits.write(offset, &value.to_le_bytes());
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.exits.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Whether all has happened that is to be seen.
    fn has_raced(&self) -> bool {
        let report = self.side_core.report();
        let lent = report.lent > 10 && report.tails_in_memory > 10;
        report.tails_coalesced > 10 && (lent || !report.lends)
    }

    fn unit(&self) -> &Unit {
        &self.side_core.shared.units[0]
    }

    /// A fault now and then, so that some of the time none is pending, until `running` is over. The
    /// guest learns of it by the event as it is by then.
    fn fault(&self, running: &AtomicBool) {
        let fault = DmaFault {
            requester: Requester::rid(RID),
            address: 0x1000,
            write: true,
            execute: false,
            privileged: false,
            reason: None,
            stage2: false,
        };
        let mut random = Random(0x5851_f42d);
        while running.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_micros(random.below(20_000)));
            let written = self.memory.map().load(GuestAddress(PROGRESS), Ordering::Acquire);
            let written: u32 = written.unwrap();
            SENT.set(None);
            self.iommu.dma_fault(&fault);
            let sent = SENT.get();
            assert!(sent.is_none_or(|sent| sent >= written), "{sent:x?} after {written:x}");
        }
    }

    /// Takes the page back now and then, until `running` is over.
    fn take_back(&self, running: &AtomicBool) {
        let mut random = Random(0x1405_7b7e);
        while running.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_micros(random.below(20_000)));
            self.unit().registers.take_page_back();
        }
    }
}

#[test]
fn no_write_of_two_vcpus_is_lost_while_pages_are_lent_and_taken_back() {
    let seconds = std::env::var("TWOSTAGE_STRESS_SECONDS").ok();
    let seconds = seconds.and_then(|text| text.parse().ok()).unwrap_or(2);
    let end = Instant::now() + Duration::from_secs(seconds);
    let Some((race, mut vcpus)) = Race::new() else {
        not_tested("no /dev/kvm with coalesced writes");
        return;
    };
    let (race, running) = (&race, &AtomicBool::new(true));
    let mut drivers =
        [Driver::new(FAULT_EVENT, 0x9e37_79b9), Driver::new(INVALIDATION_EVENT, 0x1234_5678_9abc)];
    thread::scope(|scope| {
        let _over = Over(running);
        scope.spawn(|| race.fault(running));
        scope.spawn(|| race.take_back(running));
        while Instant::now() < end || !race.has_raced() {
            assert!(Instant::now() < end + PATIENCE, "{}", race.side_core.report());
            let scripts: [fn(&mut Driver) -> &[guest::Step]; 2] =
                [Driver::invalidate_and_serve_faults, Driver::write_other_registers];
            thread::scope(|scope| {
                for ((vcpu, driver), script) in vcpus.iter_mut().zip(&mut drivers).zip(scripts) {
                    scope.spawn(move || {
                        vcpu.run(script(driver), &*race.exits);
                        driver.compare_reads(vcpu);
                    });
                }
            });
            for driver in &drivers {
                driver.compare(|offset| race.read(offset));
            }
            let (waits, tail) = drivers[0].queued();
            let pointers = [regs::IQT, regs::IQH].map(|pointer| u64::from(race.read(pointer)));
            assert_eq!((race.iommu.counters().wait, pointers), (waits, [tail; 2]));
            assert_eq!(race.read(regs::GSTS) & ENABLED, ENABLED);
        }
    });
    // Nothing that was cleared is left.
    race.write(regs::FSTS, 0x7f);
    (0..8).for_each(|record| race.write(0x22c + 16 * record, 1 << 31));
    race.write(regs::ICS, 1);
    // FRI stays.
    assert_eq!((race.read(regs::FSTS) & 0xff, race.read(regs::ICS)), (0, 0));
    let root = race.iommu.snapshot().unwrap().registers.root;
    assert_eq!(root.map(|root| root.into_bits()), drivers[1].root());
    assert_eq!(race.sink.masked.load(Ordering::Relaxed), 0);
    assert_ne!(race.sink.sent.load(Ordering::Relaxed), 0);
    eprintln!("{}", race.side_core.report());
}

/// Ends the other threads, also when this one panics.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}
