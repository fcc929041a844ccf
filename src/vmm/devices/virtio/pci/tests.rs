// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The transport and its worker, seen from the driver.

use std::io::Write;

use proptest::prelude::*;

use super::*;
use crate::devices::virtio::net::FrameLink;
use crate::devices::virtio::testing::{Place, Rig, TestQueue, PLACES};
use crate::devices::virtio::{Block, Disk, DiskAccess, MacAddress, Net, Rng};

fn rng() -> Box<dyn Backend> {
    Box::new(Rng::open("/dev/zero".as_ref()).unwrap())
}

const BUFFER: u64 = 0x2_0000;

/// A request to the entropy device, whose source returns zeroes.
fn zeroes(rig: &Rig, queue: &mut TestQueue<'_>) {
    rig.poke(BUFFER, &[7; 100]);
    assert_eq!(queue.request(&[(BUFFER, 64, true)]), 64);
    assert_eq!(rig.peek(BUFFER, 65), [&[0; 64][..], &[7]].concat());
}

#[test]
fn capabilities_lead_to_the_structures() {
    let rig = Rig::new(Place::Direct, rng());
    assert_eq!(rig.read_config(0, 4), 0x1044_1af4);
    assert_eq!(rig.read_config(0x2c, 4), 0x0040_1af4);
    let mut found = Vec::new();
    let mut at = rig.read_config(0x34, 1) as u16;
    while at != 0 {
        if rig.read_config(at, 1) == 9 {
            let length = rig.read_config(at + 2, 1);
            let kind = rig.read_config(at + 3, 1);
            assert_eq!(length, if kind == 2 || kind == 5 { 20 } else { 16 });
            found.push((kind, rig.read_config(at + 8, 4), rig.read_config(at + 12, 4)));
        }
        at = rig.read_config(at + 1, 1) as u16;
    }
    // This device has no configuration of its own.
    assert_eq!(found, [(1, 0, 0x38), (3, 0x1000, 1), (2, 0x3000, 4), (5, 0, 0)]);
    let msix = rig.capability(0x11).unwrap();
    assert_eq!(rig.read_config(msix + 2, 2), 1);
    assert_eq!(rig.read_config(msix + 4, 4), 0x4000);
    assert_eq!(rig.read_config(msix + 8, 4), 0x5000);
}

#[test]
fn the_bar_is_reached_through_configuration_space() {
    let rig = Rig::new(Place::Direct, rng());
    let mut window = 0x34;
    loop {
        window = rig.read_config(window + u16::from(window != 0x34), 1) as u16;
        assert_ne!(window, 0);
        if rig.read_config(window, 1) == 9 && rig.read_config(window + 3, 1) == 5 {
            break;
        }
    }
    let access = |offset: u32, length: u32| {
        rig.write_config(window + 4, &[0]);
        rig.write_config(window + 8, &offset.to_le_bytes());
        rig.write_config(window + 12, &length.to_le_bytes());
    };
    // Until then the guest may have configuration space as memory.
    assert!(rig.pci.config_is_memory());
    access(0x14, 1);
    assert!(!rig.pci.config_is_memory());
    rig.write_config(window + 16, &[3]);
    assert_eq!((rig.status(), rig.read_config(window + 16, 4)), (3, 3));
    access(0x12, 2);
    assert_eq!(rig.read_config(window + 16, 2), 1);
    // An access outside the device reads the old data and writes nothing.
    for (offset, length) in [(0x14, 3), (0x14, 0), (0x8000, 1), (0x15, 2), (u32::MAX, 1)] {
        access(offset, length);
        rig.write_config(window + 16, &[0; 4]);
        assert_eq!(rig.read_config(window + 16, 4), 0);
    }
    access(0x14, 1);
    rig.write_config(window + 4, &[1]);
    rig.write_config(window + 16, &[0]);
    assert_eq!(rig.status(), 3);
}

#[test]
fn the_iommu_is_a_feature_only_behind_one() {
    for (place, platform) in [(Place::Direct, 0), (Place::Behind, 1)] {
        let rig = Rig::new(place, rng());
        assert_eq!(rig.offered() >> 32, 1 | platform << 1);
    }
}

#[test]
fn it_serves_until_it_is_reset_and_again_after() {
    for place in PLACES {
        for event_index in [0, 1 << VIRTIO_RING_F_EVENT_IDX] {
            let rig = Rig::new(place, rng());
            for _ in 0..20 {
                let [queue] = &mut rig.start(event_index)[..] else { panic!() };
                zeroes(&rig, queue);
                // Buffers made available earlier count, too; this time without a notification.
                rig.reset();
                assert_eq!(rig.read(0x1a, 2), 0xffff);
                queue.add(&[(BUFFER, 64, true)]);
                queue.notify();
                assert_eq!(queue.used_index(), 1);
            }
            rig.negotiate(event_index);
            let [queue] = &mut rig.set_up_queues()[..] else { panic!() };
            queue.add(&[(BUFFER, 64, true)]);
            rig.write(0x14, 1, 0xf);
            rig.wait("what was there before", || queue.used_index() == 1);
        }
    }
}

#[test]
fn a_function_level_reset_makes_the_function_what_it_was_without_an_address() {
    let rig = Rig::new(Place::Direct, rng());
    let express = rig.capability(0x10).unwrap();
    assert_eq!(rig.read_config(express + 2, 2), 0x92, "an integrated endpoint");
    assert_ne!(rig.read_config(express + 4, 4) & 1 << 28, 0, "that can be reset");
    for _ in 0..2 {
        let [queue] = &mut rig.start(0)[..] else { panic!() };
        zeroes(&rig, queue);
        // Masked, so that one is pending.
        rig.write(0x401c, 4, 1);
        zeroes(&rig, queue);
        rig.wait("a pending interrupt", || rig.read(0x5000, 1) == 2);
        rig.reset_function();
        rig.wait("the end of the reset", || rig.status() == 0);
        let msix = rig.capability(0x11).unwrap();
        let control = rig.read_config(msix + 2, 2);
        assert_eq!((rig.read_config(4, 2), rig.read_config(0x10, 4), control), (0, 0, 1));
        assert_eq!((rig.read(0x4000, 8), rig.read(0x4008, 8)), (0, 1 << 32));
        assert_eq!((rig.read(0x5000, 1), rig.read(0x1000, 1)), (0, 0));
        assert_eq!((rig.read(0x10, 2), rig.read(0x1a, 2)), (0xffff, 0xffff));
    }
}

#[test]
fn a_function_that_may_not_does_not() {
    let rig = Rig::new(Place::Direct, rng());
    let [queue] = &mut rig.start(0)[..] else { panic!() };
    zeroes(&rig, queue);
    rig.write_config(4, &[2, 0]);
    queue.add(&[(BUFFER, 64, true)]);
    queue.notify();
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(queue.used_index(), 1);
    rig.write_config(4, &[6, 0]);
    rig.wait("what had to wait", || queue.used_index() == 2);
}

#[test]
fn what_is_no_chain_or_ring_needs_a_reset() {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    type Mess = fn(&Rig, &TestQueue<'_>);
    let messes: [(&str, Mess); 7] = [
        ("a loop", |rig, queue| queue.descriptor(0, rig.address(BUFFER), 1, NEXT | WRITE, 0)),
        ("a chain into nowhere", |rig, queue| {
            queue.descriptor(0, rig.address(BUFFER), 1, NEXT | WRITE, 100);
        }),
        ("to read after to write", |rig, queue| {
            queue.descriptor(0, rig.address(BUFFER), 1, NEXT | WRITE, 1);
            queue.descriptor(1, rig.address(BUFFER), 1, 0, 0);
        }),
        ("an indirect table nowhere", |_, queue| {
            queue.descriptor(0, 0x1234_5678_9000, 32, INDIRECT, 0);
        }),
        ("an indirect table of no length", |rig, queue| {
            queue.descriptor(0, rig.address(BUFFER), 5, INDIRECT, 0);
        }),
        ("a head beyond the table", |_, queue| queue.make_available(99)),
        ("more than a queue full", |_, queue| queue.set_available_index(1000)),
    ];
    for place in PLACES {
        for (name, mess) in messes {
            let rig = Rig::new(place, rng());
            let [queue] = &mut rig.start(0)[..] else { panic!() };
            zeroes(&rig, queue);
            mess(&rig, queue);
            if !name.starts_with("a head") && !name.starts_with("more") {
                queue.make_available(0);
            }
            queue.notify();
            rig.wait_for_needs_reset();
            rig.wait_for_interrupts(0, 1);
            assert_eq!(rig.read(0x1000, 1) & 2, 2);
            let [queue] = &mut rig.start(0)[..] else { panic!() };
            zeroes(&rig, queue);
        }
    }
}

#[test]
fn a_queue_that_is_no_memory_needs_a_reset() {
    for place in PLACES {
        let rig = Rig::new(place, rng());
        rig.enable_function();
        rig.negotiate(0);
        rig.set_up_queues();
        rig.negotiate(0);
        for at in [0x20, 0x28, 0x30] {
            rig.write(at, 8, 0xffff_ffff_ffff_f000);
        }
        rig.write(0x1c, 2, 1);
        rig.write(0x14, 1, 0xf);
        rig.wait_for_needs_reset();
    }
}

#[test]
fn indirect_chains_are_served() {
    for place in PLACES {
        let rig = Rig::new(place, rng());
        let [queue] = &mut rig.start(1 << 28)[..] else { panic!() };
        // A table across a page boundary.
        let table = BUFFER + 0xff0;
        for (at, length, flags) in [(0, 10u32, 3u16), (16, 54, 2)] {
            let mut entry = rig.address(BUFFER + 0x3000 + at).to_le_bytes().to_vec();
            entry.extend(length.to_le_bytes());
            entry.extend(flags.to_le_bytes());
            entry.extend(1u16.to_le_bytes());
            rig.poke(table + at, &entry);
        }
        queue.descriptor(0, rig.address(table), 32, 4, 0);
        queue.make_available(0);
        queue.notify();
        rig.wait("an indirect chain", || queue.used_index() == 1);
        assert_eq!(queue.used(0), (0, 64));
    }
}

#[derive(Default)]
struct Recorder(Mutex<Vec<(bool, u64)>>);

impl Doorbells for Recorder {
    fn attach(&self, address: u64, _: &EventFd) -> bool {
        self.0.lock().push((true, address));
        // Taken by another device.
        address != 0xe120_3000
    }

    fn detach(&self, address: u64, _: &EventFd) {
        self.0.lock().push((false, address));
    }
}

#[test]
fn doorbells_are_where_the_bar_is() {
    let recorder = Arc::new(Recorder::default());
    let rig = Rig::with_doorbells(Place::Direct, rng(), recorder.clone());
    let take = || std::mem::take(&mut *recorder.0.lock());
    let move_to = |address: u32| rig.write_config(0x10, &address.to_le_bytes());
    assert_eq!(take(), [(true, 0xe000_3000)], "from the start");
    rig.write_config(4, &[0, 0]);
    assert_eq!(take(), [(false, 0xe000_3000)]);
    rig.write_config(4, &[2, 0]);
    assert_eq!(take(), [(true, 0xe000_3000)]);
    rig.write_config(0x3c, &[1]);
    assert_eq!(take(), []);
    move_to(0xe100_0000);
    assert_eq!(take(), [(false, 0xe000_3000), (true, 0xe100_3000)]);
    // Outside the window: RAM, or the registers of an IOMMU.
    move_to(0xfed9_0000);
    assert_eq!(take(), [(false, 0xe100_3000)]);
    move_to(0xe120_0000);
    assert_eq!(take(), [(true, 0xe120_3000)]);
    move_to(0xe100_0000);
    assert_eq!(take(), [(true, 0xe100_3000)]);
    rig.reset_function();
    assert_eq!(take(), [(false, 0xe100_3000)]);
    move_to(0xe100_0000);
    rig.write_config(4, &[2, 0]);
    assert_eq!(take(), [(true, 0xe100_3000)]);
    drop(rig);
    assert_eq!(take(), [(false, 0xe100_3000)]);
}

/// Frames from nowhere to nowhere.
struct Silence(EventFd);

impl std::os::fd::AsRawFd for Silence {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

impl FrameLink for Silence {
    fn name(&self) -> &str {
        "test"
    }

    fn receive(&mut self, data: &mut [u8]) -> io::Result<usize> {
        // Never runs dry, so that buffers are used.
        Ok(data.len().min(100))
    }

    fn send(&mut self, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn set_offloads(&mut self, _: Features) -> io::Result<()> {
        Ok(())
    }
}

fn backend(kind: u8) -> Box<dyn Backend> {
    match kind {
        0 => rng(),
        1 => {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(&[1; 8192]).unwrap();
            Box::new(
                Block::new(Disk::open(file.path(), DiskAccess::default()).unwrap(), 1).unwrap(),
            )
        }
        _ => {
            let wire = Silence(EventFd::new(0).unwrap());
            Box::new(Net::new(wire, MacAddress::local(1)))
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// Whatever is in the rings, a reset succeeds and the device works afterwards.
    #[test]
    fn garbage_in_rings_neither_panics_nor_hangs(
        kind in 0u8..3,
        behind in any::<bool>(),
        event_index in any::<bool>(),
        // Close to valid, so that some of it gets far: addresses are the driver's pages.
        descriptors in proptest::collection::vec(
            (0u64..0x10_0000, prop_oneof![0u32..0x2000, any::<u32>()], 0u16..8, 0u16..20),
            16,
        ),
        heads in proptest::collection::vec(0u16..18, 16),
        available in prop_oneof![0u16..17, any::<u16>()],
        wild in any::<bool>(),
    ) {
        let place = if behind { Place::Behind } else { Place::Direct };
        let rig = Rig::new(place, backend(kind));
        let features = if event_index { 1 << VIRTIO_RING_F_EVENT_IDX } else { 0 };
        for queue in rig.start(features) {
            for (index, (offset, length, flags, next)) in (0..).zip(&descriptors) {
                let address = if wild { offset << 24 } else { rig.address(*offset) };
                queue.descriptor(index, address, *length, *flags, *next);
            }
            heads.iter().for_each(|head| queue.make_available(*head));
            queue.set_available_index(available);
            queue.notify();
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
        rig.reset();
        drop(rig);
    }
}
