// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The network device, from its driver's side, with a socket where the tap interface would be.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;

use super::*;
use crate::vmm::devices::virtio::testing::{Place, Rig, PLACES};

/// One end of a pair of sockets.
#[derive(Debug)]
struct Wire(UnixDatagram);

impl AsRawFd for Wire {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl FrameLink for Wire {
    fn receive(&mut self, data: &mut [u8]) -> io::Result<usize> {
        self.0.recv(data)
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        self.0.send(frame).map(drop)
    }

    fn set_partial_checksums(&mut self, _partial: bool) -> io::Result<()> {
        Ok(())
    }
}

fn machine(place: Place) -> (Rig, UnixDatagram) {
    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
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
        for (seed, length) in [(1, 60), (2, 1514), (3, 40_000)] {
            let frame = frame(seed, length);
            rig.poke(BUFFERS, &frame);
            let rest = frame.len() as u32 - 12;
            // Header and frame in two buffers, as drivers do.
            assert_eq!(transmit.request(&[(BUFFERS, 12, false), (BUFFERS + 12, rest, false)]), 0);
            let count = far.recv(&mut received).unwrap();
            assert_eq!(received[..count], frame);
        }
        rig.wait_for_interrupts(2, 3);
        // No frame, too long a frame, nothing at all: lost, and on it goes.
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
        // The first is there before any buffer, the second finds one waiting.
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
        // Too small a buffer: the frame is lost, the buffer comes back.
        receive.add(&[(BUFFERS, 64, true)]);
        receive.notify();
        far.send(&expected[1]).unwrap();
        rig.wait("a buffer", || receive.used_index() == 3);
        assert_eq!(receive.used(2).1, 0);
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
    assert_eq!(rig.pci.counters().unreachable.get(), 2);
    assert_eq!(rig.status(), 0xf);
}
