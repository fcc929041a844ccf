// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests that are under way at once, at a disk that answers when and as a test says.

use std::thread;
use std::time::Duration;

use super::engine::fake::FakeDisk;
use super::engine::Action::{Flush, Read, Write};
use super::*;
use crate::devices::virtio::testing::{Place, Rig, TestBuffer, TestQueue, PLACES};

/// Where the driver's requests are in its memory: each has a page for header and status, and one
/// for data.
const HEADERS: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
const STATUS: u64 = 0x800;
const PAGE: u64 = 0x1000;
const UNTOUCHED: u8 = 0xee;
/// Queues of the device.
const QUEUES: usize = 3;
/// Bytes of the disk.
const SIZE: usize = 4 << 20;
/// Kinds of requests.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
/// Features.
const FLUSHES: u64 = 1 << VIRTIO_BLK_F_FLUSH;
const EVENT_INDEX: u64 = 1 << 29;

fn contents() -> Vec<u8> {
    (0..SIZE as u32).map(|at| (at / 512 + at) as u8).collect()
}

fn machine(place: Place) -> (Rig, FakeDisk) {
    machine_with(place, QUEUES)
}

fn machine_with(place: Place, queues: usize) -> (Rig, FakeDisk) {
    let (disk, engine) = FakeDisk::new(contents());
    let file = tempfile::tempfile().unwrap();
    file.set_len(SIZE as u64).unwrap();
    let block = Block::with_engine(Disk::of(file, SIZE as u64), queues, engine);
    (Rig::new(place, Box::new(block)), disk)
}

/// Makes request `number` available: it is for `length` bytes, of `kind`, at `sector`.
fn add(rig: &Rig, queue: &mut TestQueue<'_>, number: u64, kind: u32, sector: u64, length: u32) {
    let head = write(rig, queue, number, kind, sector, length);
    queue.make_available(head);
}

/// Writes request `number`, which is not available yet; returns its head.
fn write(
    rig: &Rig,
    queue: &mut TestQueue<'_>,
    number: u64,
    kind: u32,
    sector: u64,
    length: u32,
) -> u16 {
    let at = HEADERS + number * PAGE;
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    rig.poke(at, &header);
    rig.poke(at + STATUS, &[UNTOUCHED]);
    let mut buffers: Vec<TestBuffer> = vec![(at, 16, false)];
    if length != 0 {
        buffers.push((DATA + number * PAGE, length, kind == IN));
    }
    buffers.push((at + STATUS, 1, true));
    queue.chain(&buffers)
}

fn status(rig: &Rig, number: u64) -> u8 {
    rig.peek(HEADERS + number * PAGE + STATUS, 1)[0]
}

fn data(rig: &Rig, number: u64, length: usize) -> Vec<u8> {
    rig.peek(DATA + number * PAGE, length)
}

fn wait_for_used(rig: &Rig, queue: &TestQueue<'_>, index: u16) {
    rig.wait("used buffers", || queue.used_index() == index);
}

#[test]
fn requests_are_at_the_disk_together_and_finish_in_any_order() {
    for place in PLACES {
        let (rig, disk) = machine(place);
        let [queue, ..] = &mut rig.start(FLUSHES)[..] else { panic!() };
        // The device looks at its queues when it starts: it sees none of them, or all.
        let heads = [0, 1, 2, 3, 4].map(|at| write(&rig, queue, at, IN, 8 * at, 512));
        queue.make_all_available(&heads);
        queue.notify();
        let at_disk = disk.wait_for(5);
        assert_eq!(at_disk, [0, 1, 2, 3, 4].map(|number| (Read, 4096 * number, 512)));
        // One system call for all.
        assert_eq!(disk.submissions(), 1);
        // The last one first.
        for (done, number) in (1..).zip((0..5).rev()) {
            disk.finish(number, 512);
            wait_for_used(&rig, queue, done);
            // Three descriptors each.
            assert_eq!(queue.used(done - 1), (3 * number as u32, 513));
            let (number, at) = (number as u64, 4096 * number);
            assert_eq!(
                (status(&rig, number), data(&rig, number, 512)),
                (0, contents()[at..at + 512].to_vec())
            );
        }
        rig.wait("a count", || rig.pci.counters().done.get() == 5);
    }
}

#[test]
fn what_finishes_together_is_one_interrupt() {
    let (rig, disk) = machine(Place::Behind);
    let [queue, ..] = &mut rig.start(FLUSHES | EVENT_INDEX)[..] else { panic!() };
    // The third request wants an interrupt.
    queue.set_used_event(2);
    for number in 0..5 {
        add(&rig, queue, number, IN, number, 512);
    }
    queue.notify();
    disk.wait_for(5);
    disk.finish_all();
    wait_for_used(&rig, queue, 5);
    rig.wait_for_interrupts(1, 1);
    // None for those after it.
    add(&rig, queue, 5, FLUSH, 0, 0);
    queue.notify();
    assert_eq!(disk.wait_for(1), [(Flush, 0, 0)]);
    disk.finish(0, 0);
    wait_for_used(&rig, queue, 6);
    rig.wait("a count", || rig.pci.counters().done.get() == 6);
    rig.wait_for_interrupts(1, 1);
}

#[test]
fn each_queue_has_its_requests_and_its_interrupts() {
    for place in PLACES {
        let (rig, disk) = machine(place);
        assert_eq!(rig.read(0x2022, 2), QUEUES as u64);
        let [first, second, third] = &mut rig.start(FLUSHES | 1 << VIRTIO_BLK_F_MQ)[..] else {
            panic!()
        };
        for (number, queue) in [(0, &mut *first), (1, &mut *third), (2, &mut *second)] {
            add(&rig, queue, number, IN, 8 * number, 512);
            queue.notify();
            disk.wait_for(number as usize + 1);
        }
        // All at once, and each returns to where it came from.
        disk.finish_all();
        for (vector, number, queue) in [(1, 0, first), (3, 1, third), (2, 2, second)] {
            wait_for_used(&rig, queue, 1);
            assert_eq!(queue.used(0), (0, 513));
            rig.wait_for_interrupts(vector, 1);
            let at = 4096 * number as usize;
            assert_eq!(data(&rig, number, 512), contents()[at..at + 512]);
        }
    }
}

#[test]
fn the_last_of_as_many_queues_as_there_may_be_is_served() {
    let (rig, disk) = machine_with(Place::Behind, MAX_QUEUES);
    let mut queues = rig.start(FLUSHES | 1 << VIRTIO_BLK_F_MQ);
    assert_eq!((queues.len(), rig.vectors.len()), (MAX_QUEUES, MAX_QUEUES + 1));
    let queue = queues.last_mut().unwrap();
    // After all queues.
    let (header, data, status) = (0xd_0000, 0xd_1000, 0xd_2000);
    rig.poke(header, &[0; 16]);
    rig.poke(status, &[UNTOUCHED]);
    queue.add(&[(header, 16, false), (data, 512, true), (status, 1, true)]);
    queue.notify();
    disk.wait_for(1);
    disk.finish(0, 512);
    wait_for_used(&rig, queue, 1);
    rig.wait_for_interrupts(MAX_QUEUES, 1);
    assert_eq!((rig.peek(status, 1), rig.peek(data, 512)), (vec![0], contents()[..512].to_vec()));
}

#[test]
fn a_piece_that_fails_fails_its_request_alone() {
    for place in PLACES {
        let (rig, disk) = machine(place);
        let [queue, ..] = &mut rig.start(FLUSHES)[..] else { panic!() };
        let long = (buffers::LARGEST + 4096) as u32;
        let far = [(HEADERS + STATUS, 1, true), (HEADERS, 16, false)];
        rig.poke(HEADERS, &[0; 16]);
        rig.poke(HEADERS + STATUS, &[UNTOUCHED]);
        // 2 MiB of the driver's memory are not there: the same page again and again.
        let mut chain = vec![far[1]];
        chain.extend((0..8).map(|_| (DATA, long / 8, true)));
        chain.push(far[0]);
        queue.add(&chain);
        add(&rig, queue, 1, OUT, 16, 512);
        queue.notify();
        assert_eq!(disk.wait_for(2), [(Read, 0, buffers::LARGEST), (Write, 16 * 512, 512)]);
        disk.finish(0, buffers::LARGEST);
        // The second piece.
        rig.wait("the rest", || {
            disk.under_way().last() == Some(&(Read, buffers::LARGEST as u64, 4096))
        });
        disk.fail(1, libc::EIO);
        wait_for_used(&rig, queue, 1);
        assert_eq!((status(&rig, 0), status(&rig, 1)), (1, UNTOUCHED));
        disk.finish(0, 512);
        wait_for_used(&rig, queue, 2);
        assert_eq!((status(&rig, 1), rig.status()), (0, 0xf));
    }
}

#[test]
fn what_a_disk_does_in_part_is_continued_and_an_end_is_an_error() {
    let (rig, disk) = machine(Place::Behind);
    let [queue, ..] = &mut rig.start(FLUSHES)[..] else { panic!() };
    for (number, kind) in [(0, IN), (1, OUT)] {
        rig.poke(DATA + PAGE, &[0x5a; 1024]);
        add(&rig, queue, number, kind, 4, 1024);
        queue.notify();
        let (action, start) = (if kind == IN { Read } else { Write }, 2048);
        assert_eq!(disk.wait_for(1), [(action, start, 1024)]);
        disk.finish(0, 100);
        assert_eq!(disk.wait_for(1), [(action, start + 100, 924)]);
        disk.finish(0, 1);
        assert_eq!(disk.wait_for(1), [(action, start + 101, 923)]);
        disk.finish(0, 923);
        wait_for_used(&rig, queue, number as u16 + 1);
        assert_eq!(status(&rig, number), 0);
    }
    assert_eq!(data(&rig, 0, 1024), contents()[2048..3072]);
    assert_eq!(disk.contents()[2048..3072], [0x5a; 1024]);
    for (number, kind) in [(2, IN), (3, OUT)] {
        add(&rig, queue, number, kind, 4, 1024);
        queue.notify();
        disk.wait_for(1);
        disk.finish(0, 0);
        wait_for_used(&rig, queue, number as u16 + 1);
        assert_eq!(status(&rig, number), 1);
    }
}

#[test]
fn a_write_is_flushed_for_a_driver_without_flushes() {
    let (rig, disk) = machine(Place::Direct);
    let [queue, ..] = &mut rig.start(0)[..] else { panic!() };
    add(&rig, queue, 0, OUT, 0, 512);
    queue.notify();
    assert_eq!(disk.wait_for(1), [(Write, 0, 512)]);
    disk.finish(0, 512);
    rig.wait("a flush", || disk.under_way().first().is_some_and(|(action, ..)| *action == Flush));
    assert_eq!((queue.used_index(), status(&rig, 0)), (0, UNTOUCHED));
    disk.finish(0, 0);
    wait_for_used(&rig, queue, 1);
    assert_eq!(status(&rig, 0), 0);
}

/// Long enough to notice a mistake; a short sleep cannot make the test fail.
fn assert_quiet(rig: &Rig, queue: &TestQueue<'_>, length: usize) {
    thread::sleep(Duration::from_millis(10));
    assert_eq!((queue.used_index(), status(rig, 0)), (0, UNTOUCHED));
    assert_eq!(data(rig, 0, length), vec![UNTOUCHED; length]);
}

#[test]
fn data_that_arrives_while_the_device_may_make_no_requests_waits() {
    for place in PLACES {
        let (rig, disk) = machine(place);
        let [queue, ..] = &mut rig.start(FLUSHES)[..] else { panic!() };
        rig.poke(DATA, &[UNTOUCHED; 1024]);
        add(&rig, queue, 0, IN, 2, 1024);
        queue.notify();
        disk.wait_for(1);
        rig.write_config(4, &[2, 0]);
        disk.finish(0, 1024);
        assert_quiet(&rig, queue, 1024);
        rig.write_config(4, &[6, 0]);
        wait_for_used(&rig, queue, 1);
        assert_eq!((status(&rig, 0), data(&rig, 0, 1024)), (0, contents()[1024..2048].to_vec()));
        // It was read once.
        assert_eq!((disk.submissions(), disk.under_way()), (1, Vec::new()));
    }
}

#[test]
fn an_unmapped_buffer_is_not_written_by_a_read_that_was_under_way() {
    let (rig, disk) = machine(Place::Behind);
    let [queue, ..] = &mut rig.start(FLUSHES)[..] else { panic!() };
    rig.poke(DATA, &[UNTOUCHED; 512]);
    add(&rig, queue, 0, IN, 0, 512);
    queue.notify();
    disk.wait_for(1);
    // The disk hangs, and the invalidation is complete nevertheless.
    rig.unmap(DATA);
    disk.finish(0, 512);
    wait_for_used(&rig, queue, 1);
    assert_eq!((status(&rig, 0), data(&rig, 0, 512)), (1, vec![UNTOUCHED; 512]));
    assert_eq!(rig.pci.counters().unreachable.get(), 1);
}

#[test]
fn a_reset_is_over_when_the_disk_has_answered_and_nothing_is_written_to_memory() {
    let resets: [fn(&Rig); 2] = [|rig| rig.write(0x14, 1, 0), Rig::reset_function];
    for (place, reset) in PLACES.into_iter().zip(resets) {
        let (rig, disk) = machine(place);
        let [queue, ..] = &mut rig.start(FLUSHES)[..] else { panic!() };
        rig.poke(DATA, &[UNTOUCHED; 1024]);
        add(&rig, queue, 0, IN, 0, 1024);
        add(&rig, queue, 1, OUT, 9, 512);
        queue.notify();
        disk.wait_for(2);
        reset(&rig);
        disk.wait_for_waiter();
        // A later driver's write must not be overtaken by this one.
        assert_ne!(rig.status(), 0);
        disk.finish(1, 512);
        assert_ne!(rig.status(), 0);
        disk.finish(0, 1024);
        rig.wait("the reset", || rig.status() == 0);
        assert_quiet(&rig, queue, 1024);
        let [queue, ..] = &mut rig.start(FLUSHES)[..] else { panic!() };
        add(&rig, queue, 0, IN, 0, 512);
        queue.notify();
        assert_eq!(disk.wait_for(1), [(Read, 0, 512)]);
        disk.finish(0, 512);
        wait_for_used(&rig, queue, 1);
        assert_eq!(data(&rig, 0, 512), contents()[..512]);
    }
}

#[test]
fn requests_end_with_an_engine_that_fails_and_the_next_driver_has_another() {
    for place in PLACES {
        let (rig, disk) = machine(place);
        let [queue, ..] = &mut rig.start(FLUSHES)[..] else { panic!() };
        rig.poke(DATA, &[UNTOUCHED; 1024]);
        add(&rig, queue, 0, IN, 0, 1024);
        queue.notify();
        disk.wait_for(1);
        disk.set_broken(true);
        add(&rig, queue, 1, FLUSH, 0, 0);
        queue.notify();
        rig.wait_for_needs_reset();
        rig.reset();
        let [queue, ..] = &mut rig.start(FLUSHES)[..] else { panic!() };
        // Too late.
        disk.set_broken(false);
        disk.finish_all();
        add(&rig, queue, 1, IN, 0, 512);
        queue.notify();
        wait_for_used(&rig, queue, 1);
        assert_eq!(queue.used(0), (0, 513));
        // The image has zeros.
        assert_eq!((status(&rig, 1), data(&rig, 1, 512)), (0, vec![0; 512]));
        assert_eq!(data(&rig, 0, 1024), vec![UNTOUCHED; 1024]);
    }
}

#[test]
fn what_the_system_says_may_be_tried_again_is_some_times() {
    let (rig, disk) = machine(Place::Behind);
    let [queue, ..] = &mut rig.start(FLUSHES)[..] else { panic!() };
    add(&rig, queue, 0, IN, 1, 512);
    queue.notify();
    for error in [libc::EAGAIN, libc::EINTR] {
        assert_eq!(disk.wait_for(1), [(Read, 512, 512)]);
        disk.fail(0, error);
    }
    disk.wait_for(1);
    disk.finish(0, 512);
    wait_for_used(&rig, queue, 1);
    assert_eq!((status(&rig, 0), data(&rig, 0, 512)), (0, contents()[512..1024].to_vec()));

    add(&rig, queue, 1, IN, 1, 512);
    queue.notify();
    rig.wait("an end", || {
        if !disk.under_way().is_empty() {
            disk.fail(0, libc::EAGAIN);
        }
        queue.used_index() == 2
    });
    assert_eq!(status(&rig, 1), 1);
}

#[test]
fn after_a_flush_that_fails_none_succeeds() {
    let (rig, disk) = machine(Place::Direct);
    let [queue, ..] = &mut rig.start(FLUSHES)[..] else { panic!() };
    for number in 0..2 {
        add(&rig, queue, number, FLUSH, 0, 0);
    }
    add(&rig, queue, 2, OUT, 0, 512);
    queue.notify();
    disk.wait_for(3);
    disk.fail(0, libc::EIO);
    wait_for_used(&rig, queue, 1);
    // The others, of which the system reports nothing.
    disk.finish_all();
    wait_for_used(&rig, queue, 3);
    assert_eq!([0, 1, 2].map(|number| status(&rig, number)), [1, 1, 0]);
    // Nor one of another driver.
    rig.reset();
    let [queue, ..] = &mut rig.start(FLUSHES)[..] else { panic!() };
    add(&rig, queue, 0, FLUSH, 0, 0);
    queue.notify();
    disk.wait_for(1);
    disk.finish_all();
    wait_for_used(&rig, queue, 1);
    assert_eq!(status(&rig, 0), 1);
}

#[test]
fn a_queue_that_is_always_full_does_not_keep_the_others_out() {
    let (rig, disk) = machine(Place::Direct);
    let [first, second, ..] = &mut rig.start(FLUSHES | 1 << VIRTIO_BLK_F_MQ)[..] else { panic!() };
    add(&rig, first, 0, IN, 0, 512);
    for round in 0..=DEPTH as u16 / TestQueue::SIZE {
        for _ in 0..TestQueue::SIZE - u16::from(round == 0) {
            first.make_available(0);
        }
        first.notify();
        disk.wait_for(DEPTH.min((usize::from(round) + 1) * usize::from(TestQueue::SIZE)));
    }
    add(&rig, second, 1, IN, 8, 512);
    second.notify();
    let others = || disk.under_way().contains(&(Read, 4096, 512));
    assert!(!others());
    for done in 1..=QUEUES as u16 {
        disk.finish(0, 512);
        wait_for_used(&rig, first, done);
        disk.wait_for(DEPTH);
    }
    assert!(others());
    // Else the worker would be left behind.
    let all = DEPTH as u16 + TestQueue::SIZE;
    rig.wait("the rest", || {
        disk.finish_all();
        (first.used_index(), second.used_index()) == (all, 1)
    });
}

#[test]
fn the_end_of_the_machine_does_not_wait_for_a_disk_that_hangs() {
    let (rig, disk) = machine(Place::Direct);
    let [queue, ..] = &mut rig.start(FLUSHES)[..] else { panic!() };
    add(&rig, queue, 0, IN, 0, 512);
    queue.notify();
    disk.wait_for(1);
    // The test hangs here if it fails.
    drop(rig);
    disk.wait_for_waiter();
    disk.finish(0, 512);
}

#[test]
fn a_driver_has_no_more_requests_at_the_disk_than_there_is_room_for() {
    let (rig, disk) = machine(Place::Direct);
    let [queue, ..] = &mut rig.start(FLUSHES)[..] else { panic!() };
    // The same chain again and again, as no honest driver would have it.
    add(&rig, queue, 0, IN, 0, 512);
    let rounds = DEPTH as u16 / TestQueue::SIZE + 1;
    for round in 1..=rounds {
        for _ in 0..TestQueue::SIZE - u16::from(round == 1) {
            queue.make_available(0);
        }
        queue.notify();
        disk.wait_for(DEPTH.min((round * TestQueue::SIZE).into()));
    }
    assert_eq!(disk.wait_for(DEPTH).len(), DEPTH);
    thread::sleep(Duration::from_millis(10));
    assert_eq!(disk.under_way().len(), DEPTH);
    // As soon as there is room, it goes on.
    disk.finish_all();
    rig.wait("the rest", || queue.used_index() == DEPTH as u16);
    let rest = disk.wait_for(usize::from(rounds * TestQueue::SIZE) - DEPTH).len();
    disk.finish_all();
    wait_for_used(&rig, queue, DEPTH as u16 + rest as u16);
}
