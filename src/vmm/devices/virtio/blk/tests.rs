// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The block device, seen from its driver.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{memfd_create, MemfdFlags};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};

use super::*;
use crate::devices::virtio::testing::{Place, Rig, TestBuffer, TestQueue, PLACES};

/// Where requests are in the driver's memory. The data crosses a page boundary.
const HEADER: u64 = 0x8000;
const STATUS: u64 = 0x9fff;
const DATA: u64 = 0xaf00;

const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;

/// What the image is on.
#[derive(Debug, Clone, Copy)]
enum Image {
    Disk,
    Memory,
}

const IMAGES: [Image; 2] = [Image::Disk, Image::Memory];

struct Machine {
    rig: Rig,
    file: File,
}

impl Machine {
    fn new(place: Place, read_only: bool) -> Self {
        Self::of_size(place, Image::Disk, read_only, 1 << 20)
    }

    fn of_size(place: Place, image: Image, read_only: bool, size: u32) -> Self {
        let file = match image {
            Image::Disk => tempfile::tempfile().unwrap(),
            Image::Memory => memfd_create("image", MemfdFlags::CLOEXEC).unwrap().into(),
        };
        let content: Vec<u8> = (0..size).map(|at| (at / 512 + at) as u8).collect();
        file.write_all_at(&content, 0).unwrap();
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let access = DiskAccess { read_only, ..DiskAccess::default() };
        let mut disk = Disk::open(path.as_ref(), access).unwrap();
        match image {
            Image::Memory => assert!(disk.is_in_memory()),
            // Where temporary files are in memory, too.
            Image::Disk => disk.wait_for(),
        }
        Self { rig: Rig::new(place, Box::new(Block::new(disk, 1).unwrap())), file }
    }

    fn content(&self) -> Vec<u8> {
        let mut content = vec![0; self.file.metadata().unwrap().len() as usize];
        self.file.read_exact_at(&mut content, 0).unwrap();
        content
    }

    /// Makes a request of `kind`; returns its status and the reported length.
    fn request(
        &self,
        queue: &mut TestQueue<'_>,
        kind: u32,
        sector: u64,
        data: &[TestBuffer],
    ) -> (u8, u32) {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.rig.poke(HEADER, &header);
        self.rig.poke(STATUS, &[0xee]);
        let mut buffers = vec![(HEADER, 16, false)];
        buffers.extend(data);
        buffers.push((STATUS, 1, true));
        let length = queue.request(&buffers);
        (self.rig.peek(STATUS, 1)[0], length)
    }
}

fn everywhere() -> impl Iterator<Item = (Place, Image)> {
    PLACES.into_iter().flat_map(|place| IMAGES.map(|image| (place, image)))
}

/// The image ends before the disk does: as if somebody had made it shorter.
#[test]
fn an_image_that_became_shorter_is_an_error_of_the_request_alone() {
    for image in IMAGES {
        let machine = Machine::of_size(Place::Behind, image, false, 1 << 20);
        let [queue] = &mut machine.rig.start(FLUSH)[..] else { panic!() };
        machine.file.set_len(4096 + 512).unwrap();
        for (sector, status) in
            [(8, VIRTIO_BLK_S_OK), (7, VIRTIO_BLK_S_IOERR), (0, VIRTIO_BLK_S_OK)]
        {
            let (got, _) = machine.request(
                queue,
                0,
                sector,
                &[(DATA, 512 + 1024 * u32::from(sector == 7), true)],
            );
            assert_eq!(u32::from(got), status, "{image:?}, sector {sector}");
        }
        assert_eq!(machine.rig.status(), 0xf);
    }
}

#[test]
fn data_is_written_read_and_flushed() {
    for (place, image) in everywhere() {
        let machine = Machine::of_size(place, image, false, 1 << 20);
        let [queue] = &mut machine.rig.start(FLUSH)[..] else { panic!() };
        let before = machine.content();

        let (status, length) =
            machine.request(queue, 0, 3, &[(DATA, 512, true), (DATA + 0x4000, 7 * 512, true)]);
        assert_eq!((status, length), (0, 8 * 512 + 1));
        assert_eq!(machine.rig.peek(DATA, 512), before[3 * 512..4 * 512]);
        assert_eq!(machine.rig.peek(DATA + 0x4000, 7 * 512), before[4 * 512..11 * 512]);

        let data: Vec<u8> = (0..0x5000u32).map(|at| (at % 251) as u8).collect();
        machine.rig.poke(DATA, &data);
        let (status, length) =
            machine.request(queue, 1, 8, &[(DATA, 700, false), (DATA + 700, 0x5000 - 700, false)]);
        assert_eq!((status, length), (0, 1));
        let after = machine.content();
        assert_eq!(after[8 * 512..][..0x5000], data);
        assert_eq!(after[..8 * 512], before[..8 * 512]);
        assert_eq!(after[8 * 512 + 0x5000..], before[8 * 512 + 0x5000..]);

        assert_eq!(machine.request(queue, 4, 0, &[]), (0, 1));
        machine.rig.wait_for_interrupts(1, 3);
        machine.rig.wait("a count", || machine.rig.pci.counters().done.get() == 3);
        assert_eq!(machine.rig.pci.queue_counters()[0].used.get(), 3);
        assert_eq!(machine.rig.read(0x1000, 1), 1);
        assert_eq!(machine.rig.read(0x1000, 1), 0);
    }
}

#[test]
fn more_than_one_piece_is_transferred() {
    for (place, image) in everywhere() {
        let machine = Machine::of_size(place, image, false, 4 << 20);
        let [queue] = &mut machine.rig.start(0)[..] else { panic!() };
        // More than the driver's memory: each buffer is the same.
        let data: Vec<u8> = (0..512u32 << 10).map(|at| (at % 241) as u8).collect();
        let buffers = |writable| [(DATA, data.len() as u32, writable); 5];
        let length = 5 * data.len();
        assert!(length > 2 * buffers::LARGEST);
        machine.rig.poke(DATA, &data);
        assert_eq!(machine.request(queue, 1, 100, &buffers(false)), (0, 1));
        assert_eq!(machine.content()[51200..][..length], data.repeat(5));
        machine.rig.poke(DATA, &vec![0; data.len()]);
        assert_eq!(machine.request(queue, 0, 100, &buffers(true)), (0, length as u32 + 1));
        assert_eq!(machine.rig.peek(DATA, data.len()), data);
    }
}

#[test]
fn it_says_who_it_is() {
    let machine = Machine::new(Place::Direct, true);
    let [queue] = &mut machine.rig.start(0)[..] else { panic!() };
    assert_eq!(machine.rig.read_config(0, 4), 0x1042_1af4);
    assert_eq!(machine.rig.read(0x2000, 8), 2048);
    assert_eq!(machine.rig.read(0x200c, 4), 510);
    assert_eq!(machine.rig.read(0x2014, 4), 512);
    assert_eq!(machine.rig.read(0x2018, 4), 0);
    assert_ne!(machine.rig.offered() & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(machine.rig.offered() & 1 << VIRTIO_BLK_F_MQ, 0);
    assert_eq!(machine.rig.read(0x2022, 2), 1);
    assert_eq!(machine.request(queue, 8, 0, &[(DATA, 20, true)]), (0, 21));
    let id = machine.rig.peek(DATA, 20);
    assert!(id[0].is_ascii_hexdigit() && id.contains(&b'-'), "{id:?}");
    assert_eq!(machine.request(queue, 8, 0, &[(DATA, 4, true)]), (0, 5));
}

#[test]
fn what_cannot_be_done_fails_and_changes_nothing() {
    for (place, image) in everywhere() {
        let machine = Machine::of_size(place, image, false, 1 << 20);
        let [queue] = &mut machine.rig.start(FLUSH)[..] else { panic!() };
        let before = machine.content();
        for (kind, sector, length, status) in [
            (0, 2048, 512, VIRTIO_BLK_S_IOERR),
            (0, u64::MAX, 512, VIRTIO_BLK_S_IOERR),
            (0, 1 << 55, 512, VIRTIO_BLK_S_IOERR),
            (1, 2047, 1024, VIRTIO_BLK_S_IOERR),
            (1, 0, 100, VIRTIO_BLK_S_IOERR),
            (11, 0, 512, VIRTIO_BLK_S_UNSUPP),
            (0x8000_0000, 0, 512, VIRTIO_BLK_S_UNSUPP),
        ] {
            let (got, _) = machine.request(queue, kind, sector, &[(DATA, length, kind != 1)]);
            assert_eq!(u32::from(got), status, "type {kind}, sector {sector}");
        }
        assert_eq!(machine.content(), before);
        assert_eq!(machine.rig.status(), 0xf);
    }
    let machine = Machine::new(Place::Direct, true);
    let [queue] = &mut machine.rig.start(FLUSH)[..] else { panic!() };
    assert_eq!(machine.request(queue, 1, 0, &[(DATA, 512, false)]).0, 1);
    assert_eq!(machine.request(queue, 0, 0, &[(DATA, 512, true)]).0, 0);
}

/// `/dev/full` reads as zeros, and writes fail with ENOSPC.
#[test]
fn a_full_disk_is_an_error_of_the_request_alone() {
    let full = std::fs::File::options().read(true).write(true).open("/dev/full").unwrap();
    let rig = Rig::new(Place::Direct, Box::new(Block::new(Disk::of(full, 1 << 20), 1).unwrap()));
    let machine = Machine { rig, file: tempfile::tempfile().unwrap() };
    let [queue] = &mut machine.rig.start(FLUSH)[..] else { panic!() };
    machine.rig.poke(DATA, &[7; 512]);
    // More often than is logged.
    for _ in 0..20 {
        let (status, _) = machine.request(queue, 1, 0, &[(DATA, 512, false)]);
        assert_eq!(u32::from(status), VIRTIO_BLK_S_IOERR);
    }
    assert_eq!(machine.request(queue, 0, 0, &[(DATA, 512, true)]), (0, 513));
    assert_eq!(machine.rig.peek(DATA, 512), [0; 512]);
    assert_eq!(machine.rig.status(), 0xf);
}

#[test]
fn a_request_whose_buffer_the_iommu_blocks_fails() {
    for image in IMAGES {
        blocked(&Machine::of_size(Place::Behind, image, false, 1 << 20));
    }
}

fn blocked(machine: &Machine) {
    let [queue] = &mut machine.rig.start(FLUSH)[..] else { panic!() };
    let before = machine.content();
    machine.rig.unmap(0x2_0000);
    for kind in [0, 1] {
        let data = [(DATA, 512, kind == 0), (0x1_fe00, 1024, kind == 0)];
        assert_eq!(machine.request(queue, kind, 0, &data).0, 1);
    }
    assert_eq!(machine.rig.pci.counters().unreachable.get(), 2);
    assert_eq!(machine.content(), before);
    // Requests that do not touch the page still work.
    assert_eq!(machine.request(queue, 0, 0, &[(DATA, 512, true)]).0, 0);
    // Not even the status can be written: the device needs a reset.
    queue.add(&[(HEADER, 16, false), (0x2_0000, 1, true)]);
    queue.notify();
    machine.rig.wait_for_needs_reset();
    machine.rig.wait_for_interrupts(0, 1);
}

#[test]
fn a_request_without_a_header_or_a_status_is_no_request() {
    for (buffers, needs_reset) in [
        (vec![(HEADER, 16, false)], true),
        (vec![(STATUS, 1, true)], false),
        (vec![(HEADER, 15, false), (STATUS, 1, true)], false),
    ] {
        let machine = Machine::new(Place::Direct, false);
        let [queue] = &mut machine.rig.start(FLUSH)[..] else { panic!() };
        if needs_reset {
            queue.add(&buffers);
            queue.notify();
            machine.rig.wait_for_needs_reset();
        } else {
            queue.request(&buffers);
            assert_eq!(machine.rig.peek(STATUS, 1), [1]);
        }
    }
}

#[test]
fn header_and_status_may_be_in_any_pieces() {
    let machine = Machine::new(Place::Behind, false);
    let [queue] = &mut machine.rig.start(FLUSH)[..] else { panic!() };
    let content = machine.content();
    machine.rig.poke(HEADER, &[0; 16]);
    // The header in two buffers, the data together with the status.
    let length = queue.request(&[(HEADER, 5, false), (HEADER + 5, 11, false), (DATA, 513, true)]);
    assert_eq!(length, 513);
    assert_eq!(machine.rig.peek(DATA, 512), content[..512]);
    assert_eq!(machine.rig.peek(DATA + 512, 1), [0]);
}
