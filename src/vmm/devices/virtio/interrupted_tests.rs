// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What interrupts a request: bus mastering disabled, a reset, the end of the machine.

use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use super::backend::{Features, Model};
use super::chain::{Broken, Chain, NotCopied, Unserved};
use super::queue::{Interrupts, Virtqueue};
use super::testing::{Place, Rig, TestQueue, PLACES};
use super::*;
use crate::devices::NotNow;
use twostage::patience::wait_until;

/// Where the buffer of a request is in the driver's memory, and its length.
const BUFFER: u64 = 0x2_0000;
const LENGTH: u32 = 0x1000;
const MARK: [u8; 8] = [0xaa; 8];

/// What a device does with a chain.
type Serve = dyn FnMut(&mut DeviceMemory, &Chain) -> Result<u32, Unserved> + Send;

struct Device(Box<Serve>);

impl Backend for Device {
    fn host(&self) -> String {
        "a test".to_owned()
    }

    fn model(&self) -> Model {
        Model {
            name: "test",
            device_type: 4,
            class: 0,
            features: Features::default(),
            queue_sizes: &[64],
            config: Vec::new(),
        }
    }

    fn start(&mut self, _: Features) -> Result<(), Broken> {
        Ok(())
    }

    fn serve(
        &mut self,
        number: usize,
        queues: &mut [Virtqueue],
        memory: &mut DeviceMemory,
    ) -> Result<bool, Unserved> {
        queues[number].drain(memory, Interrupts::Each, &mut self.0)
    }
}

fn rig(
    place: Place,
    serve: impl FnMut(&mut DeviceMemory, &Chain) -> Result<u32, Unserved> + Send + 'static,
) -> Rig {
    Rig::new(place, Box::new(Device(Box::new(serve))))
}

/// A request that never ends writes its buffer piece by piece.
fn endless(memory: &mut DeviceMemory, chain: &Chain) -> Result<u32, Unserved> {
    loop {
        match chain.write(memory, 0, &[0; LENGTH as usize]) {
            Ok(()) => {}
            Err(NotCopied::NotNow(not_now)) => return Err(not_now.into()),
            Err(NotCopied::Unreachable) => return Ok(0),
        }
    }
}

/// Makes a request for the whole buffer, which is marked.
fn ask(rig: &Rig, queue: &mut TestQueue<'_>) {
    rig.poke(BUFFER, &MARK);
    queue.add(&[(BUFFER, LENGTH, true)]);
    queue.notify();
}

fn wait_for_a_write(rig: &Rig) {
    rig.wait("a write", || rig.peek(BUFFER, 8) != MARK);
}

fn assert_quiet(rig: &Rig) {
    rig.poke(BUFFER, &MARK);
    // Long enough to notice a mistake; a short sleep cannot make the test fail.
    thread::sleep(Duration::from_millis(10));
    assert_eq!(rig.peek(BUFFER, 8), MARK);
}

#[test]
fn bus_mastering_that_is_switched_off_ends_a_request_between_two_pieces() {
    for place in PLACES {
        let rig = rig(place, endless);
        let [queue] = &mut rig.start(0)[..] else { panic!() };
        ask(&rig, queue);
        for _ in 0..5 {
            wait_for_a_write(&rig);
            rig.write_config(4, &[2, 0]);
            assert_quiet(&rig);
            // It continues once allowed, without another notification.
            rig.write_config(4, &[6, 0]);
        }
        wait_for_a_write(&rig);
        assert_eq!((queue.used_index(), rig.status()), (0, 0xf));
    }
}

#[test]
fn a_reset_ends_a_request_between_two_pieces() {
    for place in PLACES {
        let rig = rig(place, endless);
        for _ in 0..20 {
            let [queue] = &mut rig.start(0)[..] else { panic!() };
            ask(&rig, queue);
            wait_for_a_write(&rig);
            rig.write(0x14, 1, 0);
            assert_quiet(&rig);
            rig.reset();
            assert_eq!(queue.used_index(), 0);
        }
    }
}

#[test]
fn a_function_level_reset_ends_a_request_between_two_pieces() {
    for place in PLACES {
        let rig = rig(place, endless);
        for _ in 0..20 {
            let [queue] = &mut rig.start(0)[..] else { panic!() };
            ask(&rig, queue);
            wait_for_a_write(&rig);
            rig.reset_function();
            // Not even if software lets it again.
            rig.write_config(4, &[6, 0]);
            assert_quiet(&rig);
            rig.wait("the end of the reset", || rig.status() == 0);
            assert_eq!(queue.used_index(), 0);
        }
    }
}

#[test]
fn the_end_of_the_machine_ends_a_request_between_two_pieces() {
    for halted in [false, true] {
        let rig = rig(Place::Behind, endless);
        let [queue] = &mut rig.start(0)[..] else { panic!() };
        ask(&rig, queue);
        wait_for_a_write(&rig);
        if halted {
            rig.pci.halt();
            assert_quiet(&rig);
            // The driver does not know, and its actions have no effect.
            rig.start(0);
            assert_quiet(&rig);
        }
        drop(rig);
    }
}

#[test]
fn what_was_served_is_given_back_later_and_not_served_again() {
    let (tell, served) = channel();
    let mut first = true;
    let rig = rig(Place::Direct, move |memory, _| {
        if std::mem::take(&mut first) {
            memory.gate().set_bus_master(false);
        }
        tell.send(()).unwrap();
        Ok(7)
    });
    let [queue] = &mut rig.start(0)[..] else { panic!() };
    queue.add(&[(BUFFER, LENGTH, true)]);
    queue.add(&[(BUFFER, LENGTH, true)]);
    queue.notify();
    served.recv().unwrap();
    assert_eq!(queue.used_index(), 0);
    // Off for the bus, too, and on again.
    rig.write_config(4, &[2, 0]);
    rig.write_config(4, &[6, 0]);
    rig.wait("both", || queue.used_index() == 2);
    assert_eq!((queue.used(0).1, queue.used(1).1), (7, 7));
    served.recv().unwrap();
    assert!(served.try_recv().is_err());
    rig.wait("a count", || rig.pci.counters().done.get() == 2);
}

/// A device stuck in a host call until it is released, as long as the sender exists.
struct Stuck {
    rig: Rig,
    serving: Receiver<()>,
    go: Sender<()>,
    /// The device, including its memory.
    alive: Weak<()>,
    result: Receiver<Result<(), NotCopied>>,
}

fn stuck() -> Stuck {
    let (serve, serving) = channel();
    let (go, wait) = channel();
    let (tell, result) = channel();
    let here = Arc::new(());
    let alive = Arc::downgrade(&here);
    let rig = rig(Place::Direct, move |memory, chain| {
        let _ = &here;
        serve.send(()).unwrap();
        // Like a system call that does not return.
        let _ = wait.recv();
        let written = chain.write(memory, 0, &[0; 8]);
        let _ = tell.send(written);
        written.map(|()| 8).map_err(|_| Unserved::NotNow(NotNow))
    });
    let [queue] = &mut rig.start(0)[..] else { panic!() };
    ask(&rig, queue);
    serving.recv().unwrap();
    Stuck { rig, serving, go, alive, result }
}

#[test]
fn a_reset_does_not_wait_for_the_host_and_is_over_when_the_host_is() {
    let resets: [fn(&Rig); 2] = [|rig| rig.write(0x14, 1, 0), Rig::reset_function];
    for reset in resets {
        let Stuck { rig, serving, go, result, .. } = stuck();
        reset(&rig);
        // The reset is not over, yet registers stay accessible and writes have no effect.
        assert_ne!(rig.status(), 0);
        rig.write(0x14, 1, 1);
        rig.write(0x14, 1, 0);
        rig.write_config(4, &[2, 0]);
        rig.write_config(4, &[6, 0]);
        assert_eq!(rig.status(), 0xf);
        go.send(()).unwrap();
        assert_eq!(result.recv().unwrap(), Err(NotCopied::NotNow(NotNow)));
        rig.reset();
        assert_eq!(rig.peek(BUFFER, 8), MARK);
        // As good as new.
        let [queue] = &mut rig.start(0)[..] else { panic!() };
        queue.add(&[(BUFFER, LENGTH, true)]);
        queue.notify();
        serving.recv().unwrap();
        go.send(()).unwrap();
        rig.wait("a request", || queue.used_index() == 1);
    }
}

#[test]
fn the_end_of_the_machine_does_not_wait_for_the_host_and_leaves_it_the_memory() {
    let Stuck { rig, go, alive, result, .. } = stuck();
    // The test hangs here if it fails.
    drop(rig);
    assert!(alive.upgrade().is_some(), "the thread's memory went away under it");
    go.send(()).unwrap();
    assert_eq!(result.recv().unwrap(), Err(NotCopied::NotNow(NotNow)));
    wait_until("the device's end", || alive.upgrade().is_none());
}

#[test]
fn what_a_worker_that_is_left_behind_has_is_free_when_it_is_not_left_behind_any_more() {
    let Stuck { rig, go, alive, result, .. } = stuck();
    drop(rig);
    assert!(!none_is_left_behind());
    go.send(()).unwrap();
    assert!(result.recv().unwrap().is_err());
    // Workers of other tests may be left behind, too.
    wait_until("the worker's end", none_is_left_behind);
    assert!(alive.upgrade().is_none(), "it has the device yet");
}
