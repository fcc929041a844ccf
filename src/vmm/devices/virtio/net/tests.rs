// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The network device, seen from its driver, with a socket in place of the tap interface.

use std::collections::VecDeque;
use std::os::unix::net::UnixDatagram;

use twostage::skips::not_tested;

use super::*;
use crate::devices::virtio::testing::{Place, Rig, TestQueue, PLACES};

/// One end of a socket pair.
#[derive(Debug)]
struct Wire(UnixDatagram);

impl AsRawFd for Wire {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl FrameLink for Wire {
    fn name(&self) -> &str {
        "test"
    }

    fn receive(&mut self, data: &mut [u8]) -> io::Result<usize> {
        self.0.recv(data)
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        self.0.send(frame).map(drop)
    }

    fn set_offloads(&mut self, _features: Features) -> io::Result<()> {
        Ok(())
    }
}

fn machine(place: Place) -> (Rig, UnixDatagram) {
    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_read_timeout(Some(std::time::Duration::from_secs(60))).unwrap();
    (Rig::new(place, Box::new(Net::new(Wire(near), MacAddress::local(1)))), far)
}

fn frame(seed: u8, length: usize) -> Vec<u8> {
    let mut frame = vec![0; Tap::HEADER_SIZE];
    frame.extend((0..length).map(|at| seed.wrapping_mul(31).wrapping_add(at as u8)));
    frame
}

/// Where buffers are in the driver's memory.
const BUFFERS: u64 = 0x2_0f80;

#[test]
fn frames_go_out() {
    for place in PLACES {
        let (rig, far) = machine(place);
        let mut queues = rig.start(0);
        let transmit = &mut queues[TRANSMIT];
        let mut received = vec![0; MAX_FRAME];
        for (number, length) in [(1, 60), (2, 1514), (3, 40_000)] {
            let frame = frame(number, length);
            rig.poke(BUFFERS, &frame);
            let rest = frame.len() as u32 - 12;
            // Header and frame in two buffers, as drivers do.
            assert_eq!(transmit.request(&[(BUFFERS, 12, false), (BUFFERS + 12, rest, false)]), 0);
            let count = far.recv(&mut received).unwrap();
            assert_eq!(received[..count], frame);
            // Two that come together have one interrupt.
            rig.wait_for_interrupts(2, number.into());
        }
        // No frame, too long a frame, nothing at all: dropped, and the device continues.
        transmit.request(&[(BUFFERS, 12, false)]);
        transmit.request(&[(BUFFERS, 40_000, false), (BUFFERS, 40_000, false)]);
        transmit.request(&[(BUFFERS, 12, true)]);
        let last = frame(9, 100);
        rig.poke(BUFFERS, &last);
        transmit.request(&[(BUFFERS, 112, false)]);
        let count = far.recv(&mut received).unwrap();
        assert_eq!(received[..count], last);
    }
}

#[test]
fn frames_come_in_as_far_as_there_are_buffers() {
    for place in PLACES {
        let (rig, far) = machine(place);
        let mut queues = rig.start(0);
        // The first arrives before any buffer, the second finds one waiting.
        let mut expected = [frame(1, 60), frame(2, 1500)];
        far.send(&expected[0]).unwrap();
        let receive = &mut queues[RECEIVE];
        assert_eq!(receive.request(&[(BUFFERS, 2000, true)]), 72);
        receive.add(&[(BUFFERS + 0x3000, 12, true), (BUFFERS + 0x4000, 1600, true)]);
        receive.notify();
        far.send(&expected[1]).unwrap();
        rig.wait("a frame", || receive.used_index() == 2);
        assert_eq!(receive.used(1).1, 1512);
        expected.iter_mut().for_each(|frame| frame[10] = 1);
        assert_eq!(rig.peek(BUFFERS, 72), expected[0]);
        assert_eq!(rig.peek(BUFFERS + 0x3000, 12), expected[1][..12]);
        assert_eq!(rig.peek(BUFFERS + 0x4000, 1500), expected[1][12..]);
        rig.wait_for_interrupts(1, 2);
        // Too small a buffer: this frame is dropped, the next one that fits is not.
        receive.add(&[(BUFFERS, 100, true)]);
        receive.notify();
        far.send(&expected[1]).unwrap();
        far.send(&expected[0]).unwrap();
        rig.wait("a frame", || receive.used_index() == 3);
        assert_eq!(receive.used(2).1, 72);
    }
}

#[test]
fn a_frame_may_be_in_several_buffers() {
    for place in PLACES {
        for event_index in [0, 1 << 29] {
            let (rig, far) = machine(place);
            let mut queues = rig.start(1 << VIRTIO_NET_F_MRG_RXBUF | event_index);
            let receive = &mut queues[RECEIVE];
            let add = |receive: &mut TestQueue<'_>, count: u64| {
                (0..count)
                    .map(|_| {
                        let buffer = BUFFERS + 0x1000 * receive.next_head();
                        (receive.add(&[(buffer, 1000, true)]), buffer)
                    })
                    .collect::<Vec<_>>()
            };
            let mut index = 0;
            // Enough to wrap around the ring.
            for round in 0..8 {
                let mut expected = frame(round, 2500);
                // Too few at first: none is used until there are enough.
                let mut buffers = add(receive, 2);
                receive.notify();
                far.send(&expected).unwrap();
                std::thread::sleep(std::time::Duration::from_millis(5));
                assert_eq!(receive.used_index(), index);
                buffers.extend(add(receive, 1));
                receive.notify();
                rig.wait("a frame", || receive.used_index() == index.wrapping_add(3));
                expected[10] = 3;
                for ((head, buffer), part) in buffers.into_iter().zip(expected.chunks(1000)) {
                    assert_eq!(receive.used(index), (head.into(), part.len() as u32));
                    assert_eq!(rig.peek(buffer, part.len()), part);
                    index = index.wrapping_add(1);
                }
                rig.wait_for_interrupts(1, u64::from(round) + 1);
                // In the middle of the next frame: requests one interrupt.
                receive.set_used_event(index + 1);
            }
            // A frame larger than all buffers together is dropped; the next one is not.
            add(receive, 16);
            receive.notify();
            far.send(&frame(1, 20_000)).unwrap();
            far.send(&frame(2, 100)).unwrap();
            rig.wait("a frame", || receive.used_index() == index.wrapping_add(1));
            assert_eq!(receive.used(index).1, 112);
        }
    }
}

/// A wire that returns these errors before any frame.
#[derive(Debug)]
struct Trouble(Wire, VecDeque<i32>);

impl AsRawFd for Trouble {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl FrameLink for Trouble {
    fn name(&self) -> &str {
        "test"
    }

    fn receive(&mut self, data: &mut [u8]) -> io::Result<usize> {
        match self.1.pop_front() {
            Some(error) => Err(io::Error::from_raw_os_error(error)),
            None => self.0.receive(data),
        }
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        self.0.send(frame)
    }

    fn set_offloads(&mut self, _features: Features) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_runt_is_lost_alone() {
    for place in PLACES {
        let (rig, far) = machine(place);
        let mut queues = rig.start(0);
        let receive = &mut queues[RECEIVE];
        // All arrive before there is a buffer: input is signalled once, and read until there is no
        // more.
        for length in [0, 1, 11, 12, 13, 25] {
            far.send(&vec![0; length]).unwrap();
        }
        let mut expected = frame(3, 14);
        far.send(&expected).unwrap();
        assert_eq!(receive.request(&[(BUFFERS, 2000, true)]), 26);
        expected[10] = 1;
        assert_eq!(rig.peek(BUFFERS, 26), expected);
        assert_eq!(rig.status(), 0xf);
    }
}

#[test]
fn an_error_does_not_end_what_comes_in() {
    let long = [libc::EIO; 2 * QUEUE_SIZE as usize];
    for errors in [&[libc::EINVAL, libc::EINTR, libc::EIO, libc::ENOMEM][..], &long] {
        let (near, far) = UnixDatagram::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        far.set_nonblocking(true).unwrap();
        let link = Trouble(Wire(near), errors.iter().copied().collect());
        let rig = Rig::new(Place::Direct, Box::new(Net::new(link, MacAddress::local(1))));
        let mut queues = rig.start(0);
        let receive = &mut queues[RECEIVE];
        receive.add(&[(BUFFERS, 2000, true)]);
        receive.notify();
        // While errors persist, only another frame triggers another look.
        rig.wait("a frame", || {
            // The socket may be full: what is there suffices then.
            let _ = far.send(&frame(1, 60));
            std::thread::sleep(std::time::Duration::from_millis(1));
            receive.used_index() == 1
        });
        assert_eq!(receive.used(0).1, 72);
        assert_eq!(rig.status(), 0xf);
    }
}

#[test]
fn an_interface_that_is_gone_is_not_asked_again_at_once() {
    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    // Each time that it is asked there is one error less, and then there are frames.
    let link = Trouble(Wire(near), [libc::EBADFD; QUEUE_SIZE as usize].into());
    let rig = Rig::new(Place::Direct, Box::new(Net::new(link, MacAddress::local(1))));
    let mut queues = rig.start(0);
    let receive = &mut queues[RECEIVE];
    receive.add(&[(BUFFERS, 2000, true)]);
    for _ in 0..10 {
        far.send(&frame(1, 60)).unwrap();
        receive.notify();
    }
    // Served in order: what is put into this queue is done after that.
    rig.poke(BUFFERS, &frame(1, 60));
    let transmit = &mut queues[TRANSMIT];
    transmit.request(&[(BUFFERS, 72, false)]);
    assert_eq!(queues[RECEIVE].used_index(), 0);
    assert_eq!(rig.status(), 0xf);
}

#[test]
fn a_frame_that_came_without_bus_mastering_is_received_with_it() {
    for place in PLACES {
        let (rig, far) = machine(place);
        let mut queues = rig.start(0);
        let receive = &mut queues[RECEIVE];
        receive.add(&[(BUFFERS, 2000, true)]);
        receive.add(&[(BUFFERS + 0x1000, 2000, true)]);
        receive.notify();
        // Everything has been looked at: the next frame is signalled by itself.
        far.send(&frame(1, 60)).unwrap();
        rig.wait("a frame", || receive.used_index() == 1);
        rig.write_config(4, &[2, 0]);
        far.send(&frame(2, 60)).unwrap();
        // Most likely seen by now. If not, it arrives all the same.
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!(receive.used_index(), 1);
        rig.write_config(4, &[6, 0]);
        rig.wait("a frame", || receive.used_index() == 2);
        assert_eq!(receive.used(1).1, 72);
    }
}

#[test]
fn it_has_an_address() {
    let (rig, _far) = machine(Place::Direct);
    assert_eq!(rig.read_config(0, 4), 0x1041_1af4);
    assert_ne!(rig.offered() & 1 << VIRTIO_NET_F_MAC, 0);
    let mac: Vec<u8> = (0..6).map(|at| rig.read(0x2000 + at, 1) as u8).collect();
    assert_eq!(mac, MacAddress::local(1).0);
}

#[test]
fn a_frame_that_the_iommu_blocks_is_lost() {
    let (rig, far) = machine(Place::Behind);
    let mut queues = rig.start(0);
    rig.unmap(0x3_0000);
    let [receive, transmit] = &mut queues[..] else { panic!() };
    transmit.request(&[(0x3_0000, 100, false)]);
    far.send(&frame(1, 60)).unwrap();
    assert_eq!(receive.request(&[(0x3_0000, 2000, true)]), 0);
    // Counted after the buffer is returned.
    rig.wait("the count", || rig.pci.counters().unreachable.get() == 2);
    assert_eq!(rig.status(), 0xf);
}

/// With a tap interface that is up and has the address 10.99.99.1, named by TWOSTAGE_TEST_TAP.
#[test]
fn the_host_answers_through_a_tap_interface() {
    let Ok(name) = std::env::var("TWOSTAGE_TEST_TAP") else {
        not_tested("TWOSTAGE_TEST_TAP names no tap interface");
        return;
    };
    let mac = MacAddress::local(1);
    let rig = Rig::new(Place::Behind, Box::new(Net::new(Tap::open(&name).unwrap(), mac)));
    let mut queues = rig.start(1 << VIRTIO_NET_F_GUEST_CSUM);
    let [receive, transmit] = &mut queues[..] else { panic!() };
    for buffer in 0..8 {
        receive.add(&[(BUFFERS + 0x1000 * buffer, 2000, true)]);
    }
    receive.notify();
    // Who has 10.99.99.1? Tell 10.99.99.2 (RFC 826).
    let mut request = vec![0; Tap::HEADER_SIZE];
    request.extend([0xff; 6]);
    request.extend(mac.0);
    request.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    request.extend(mac.0);
    request.extend([10, 99, 99, 2, 0, 0, 0, 0, 0, 0, 10, 99, 99, 1]);
    rig.poke(0x4_0000, &request);
    transmit.request(&[(0x4_0000, request.len() as u32, false)]);
    let is_answer = |index: u16| {
        let frame = rig.peek(BUFFERS + 0x1000 * u64::from(receive.used(index).0), 54);
        frame[12..18] == mac.0 && frame[24..26] == [8, 6] && frame[32..34] == [0, 2]
    };
    rig.wait("an answer", || (0..receive.used_index()).any(is_answer));
}

#[test]
fn addresses_are_of_one_device() {
    let mac: MacAddress = "02:00:5e:10:00:fF".parse().unwrap();
    assert_eq!(mac.to_string(), "02:00:5e:10:00:ff");
    assert_eq!(mac.to_string().parse(), Ok(mac));
    assert_eq!(MacAddress::local(7).to_string().parse(), Ok(MacAddress::local(7)));
    for bad in [
        "",
        "02:00:00:00:00",
        "02:00:00:00:00:01:02",
        "01:00:00:00:00:01",
        "00:00:00:00:00:00",
        "2:00:00:00:00:01",
        "02-00-00-00-00-01",
        "+2:00:00:00:00:01x",
        "02:+5:00:00:00:01",
    ] {
        assert_eq!(bad.parse::<MacAddress>(), Err(NoMac), "{bad}");
    }
}
