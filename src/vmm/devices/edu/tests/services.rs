// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! ATS and PRI: what software enables, and a DMA that waits for its page.

use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::Arc;
use twostage::sync::Mutex;

use super::{reset, wait_until, Fixture, PASID_CONTROL};
use crate::config::EduConfig;
use crate::devices::{DirectMemory, DmaError, DmaMaster, ServiceControl, Services};
use twostage::spec::pci::Pasid;
use twostage_emulated::edu::BUFFER_START;
use twostage_emulated::PageTries;

/// ATS control; PRI control and status; PRI allocation: after PASID's capability at 0x100.
const ATS_CONTROL: u16 = 0x10e;
const PRI_CONTROL: u16 = 0x114;
const PRI_STATUS: u16 = 0x116;
const PRI_ALLOCATION: u16 = 0x11c;
/// Status: stopped, and responses have PASIDs.
const STOPPED: u32 = 0x8100;
/// Status: not stopped.
const STOPPING: u32 = 0x8000;

/// Has no page until it was asked for, and `answers` says whether it is there.
struct Asking {
    memory: DirectMemory,
    services: Services,
    waits: Arc<Waits>,
}

/// The page requests.
struct Waits {
    /// Of the groups that were asked for and have no answer.
    open: Mutex<usize>,
    answer: Mutex<Sender<bool>>,
    answers: Mutex<Receiver<bool>>,
    /// Some page was answered for.
    there: Mutex<bool>,
    /// The device TLB is enabled.
    device_tlb: Mutex<bool>,
}

impl DmaMaster for Asking {
    fn read(&mut self, _: Option<Pasid>, iova: u64, data: &mut [u8]) -> Result<(), DmaError> {
        if !*self.waits.there.lock() {
            if !self.services.pri {
                return Err(DmaError::at(iova));
            }
            *self.waits.open.lock() += 1;
            return Err(DmaError { address: iova, group: Some(3) });
        }
        self.memory.read(None, iova, data)
    }

    fn write(&mut self, _: Option<Pasid>, iova: u64, data: &[u8]) -> Result<(), DmaError> {
        self.memory.write(None, iova, data)
    }

    fn set_services(&mut self, services: Services) {
        self.services = services;
    }

    fn service_control(&self) -> Option<Arc<dyn ServiceControl>> {
        Some(self.waits.clone())
    }
}

impl ServiceControl for Waits {
    fn enabled(&self, services: Services) {
        *self.device_tlb.lock() = services.ats;
    }

    fn wait(&self, group: u16, address: u64, _: &mut PageTries) -> Result<(), DmaError> {
        assert_eq!(group, 3);
        let answer = self.answers.lock().recv().unwrap();
        *self.open.lock() = 0;
        *self.there.lock() = answer;
        answer.then_some(()).ok_or(DmaError::at(address))
    }

    fn outstanding(&self) -> usize {
        *self.open.lock()
    }

    fn reset(&self) {
        if *self.open.lock() > 0 {
            self.answer.lock().send(false).unwrap();
        }
    }
}

/// A device with all services, whose memory is absent until it is asked for.
fn asking() -> (Fixture, Arc<Waits>) {
    let (answer, answers) = channel();
    let waits = Arc::new(Waits {
        open: Mutex::default(),
        answer: Mutex::new(answer),
        answers: Mutex::new(answers),
        there: Mutex::default(),
        device_tlb: Mutex::default(),
    });
    let config = EduConfig { pasid_bits: 6, ats: true, pri: true, ..EduConfig::default() };
    let fixture = Fixture::of(&config, |memory| {
        let (memory, services) = (DirectMemory(memory), Services::default());
        Box::new(Asking { memory, services, waits: waits.clone() })
    });
    fixture.enable_msi();
    (fixture, waits)
}

/// Enables both, as Linux does.
fn enable(fixture: &Fixture) {
    fixture.write_config(ATS_CONTROL, &[0, 0x80]);
    fixture.write_config(PRI_ALLOCATION, &[1, 0, 0, 0]);
    fixture.write_config(PRI_CONTROL, &[1, 0]);
}

fn status(fixture: &Fixture) -> u32 {
    use crate::pci::PciFunction;
    fixture.edu.config_reading(PRI_STATUS, 2);
    fixture.config(PRI_STATUS) & 0xffff
}

#[test]
fn what_software_enables_is_what_requests_use() {
    let (fixture, waits) = asking();
    let device_tlb = || *waits.device_tlb.lock();
    assert_eq!([0x100, 0x108, 0x110].map(|at| fixture.config(at) & 0xffff), [0x1b, 0xf, 0x13]);
    let services = || fixture.edu.shared.rights.services();
    assert_eq!((services(), status(&fixture)), (Services::default(), STOPPED));
    // Without ATS, or an allocation, it asks for nothing.
    fixture.write_config(PRI_CONTROL, &[1, 0]);
    fixture.write_config(ATS_CONTROL, &[0, 0x80]);
    assert_eq!((services(), device_tlb()), (Services { ats: true, ..Services::default() }, true));
    fixture.write_config(PRI_CONTROL, &[0, 0]);
    enable(&fixture);
    assert_eq!(services(), Services { pasid: false, ats: true, pri: true });
    // PASIDs stay off as long as ATS is on.
    fixture.write_config(PASID_CONTROL, &[1, 0]);
    assert!(!services().pasid);
    fixture.write_config(ATS_CONTROL, &[0, 0]);
    assert!(!device_tlb());
    fixture.write_config(PASID_CONTROL, &[1, 0]);
    assert_eq!(services(), Services { pasid: true, ..Services::default() });
    enable(&fixture);
    assert!(device_tlb());
    reset(&fixture.edu);
    assert_eq!((services(), status(&fixture)), (Services::default(), STOPPED));
    assert!(!device_tlb());
    let left = [PASID_CONTROL, ATS_CONTROL, PRI_CONTROL, PRI_ALLOCATION];
    assert_eq!(left.map(|at| fixture.config(at) & 0xffff), [0; 4]);
}

#[test]
fn a_dma_waits_for_its_page_and_others_do_not_wait_for_it() {
    let (fixture, waits) = asking();
    enable(&fixture);
    for (there, done) in [(false, (0, 1)), (true, (1, 1))] {
        fixture.transfer(0x1000, BUFFER_START, 8, 0b101);
        wait_until("a page request", || waits.outstanding() == 1);
        // Its right to requests can be taken away, as none is being made.
        fixture.write_config(4, &[2, 0]);
        fixture.write_config(PRI_CONTROL, &[0, 0]);
        assert_eq!(status(&fixture), STOPPING);
        enable(&fixture);
        fixture.write_config(4, &[6, 0]);
        waits.answer.lock().send(there).unwrap();
        fixture.messages.recv().unwrap();
        let counters = fixture.edu.counters();
        assert_eq!((counters.done(), counters.failed()), done);
    }
    fixture.write_config(PRI_CONTROL, &[0, 0]);
    assert_eq!(status(&fixture), STOPPED);
}

#[test]
fn a_wait_ends_with_a_reset_of_the_interface_or_of_the_function_and_with_the_device() {
    let (fixture, waits) = asking();
    enable(&fixture);
    let wait = || {
        fixture.transfer(0x1000, BUFFER_START, 8, 0b101);
        wait_until("a page request", || waits.outstanding() == 1);
    };
    wait();
    // Not while it is enabled.
    fixture.write_config(PRI_CONTROL, &[3, 0]);
    assert_eq!(waits.outstanding(), 1);
    fixture.write_config(PRI_CONTROL, &[0, 0]);
    fixture.write_config(PRI_CONTROL, &[2, 0]);
    fixture.messages.recv().unwrap();
    assert_eq!((status(&fixture), fixture.edu.counters().failed()), (STOPPED, 1));
    enable(&fixture);
    wait();
    reset(&fixture.edu);
    wait_until("the end of the wait", || waits.outstanding() == 0);
    fixture.write_config(4, &[6, 0]);
    enable(&fixture);
    wait();
    // Dropping it waits for its thread.
    drop(fixture);
    assert_eq!(waits.outstanding(), 0);
}
