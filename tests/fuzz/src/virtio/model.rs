// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What must have become of a chain when the device has used it, naively.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;

use super::backend::{SECTOR, SECTORS};
use super::driver::SIZE;

/// Bytes of the header of a frame.
pub const FRAME_HEADER: usize = 12;
/// The longest frame that a device takes, with its header.
const LONGEST_FRAME: usize = FRAME_HEADER + 65_536 + 18;
/// Bytes of a request for entropy that are served at most.
const ENTROPY: usize = 4096;
/// What a driver writes to buffers, so that it sees what the device writes.
pub const UNTOUCHED: u8 = 0xaa;

/// A request to a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlkRequest {
    pub kind: u32,
    pub sector: u64,
    /// The data to write.
    pub data: Vec<u8>,
    /// Another one was under way at the same sectors, one of them a write.
    pub raced: bool,
}

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const ID_LENGTH: usize = 20;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// What a chain is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Purpose {
    Blk(BlkRequest),
    /// The frame, with its header.
    Transmit(Vec<u8>),
    Receive,
    Entropy,
}

/// The bytes of a sector.
type Sector = [u8; SECTOR as usize];

/// What the driver and the device have seen.
#[derive(Debug)]
pub struct Model {
    /// The sectors of the disk; unknown where writes raced or failed.
    disk: Vec<Option<Sector>>,
    pub read_only: bool,
    /// So many operations of the disk have failed as they were told to, if they were not flushes;
    /// and so many in any case.
    pub failed: (usize, usize),
    /// The driver does not flush: each write does.
    pub write_through: bool,
    /// So many requests failed for that, and so many flushes after the first one that did.
    told: (usize, usize),
    /// A flush has failed: what was written before may be lost, which all later flushes say.
    lost_writes: bool,
    /// Frames for the driver that it has not got yet.
    pub frames: VecDeque<Vec<u8>>,
    /// Bytes of the driver's buffers for frames, in order.
    pub room: VecDeque<usize>,
    /// What is left of the frame that it is getting, and of how many buffers it was to consist.
    partial: Option<(Vec<u8>, u16)>,
    pub mergeable: bool,
    /// The ID that the disk has.
    id: [u8; ID_LENGTH],
}

impl Model {
    pub fn new(read_only: bool, id: [u8; ID_LENGTH]) -> Self {
        let disk = vec![Some([0; SECTOR as usize]); SECTORS as usize];
        Self {
            disk,
            read_only,
            failed: (0, 0),
            write_through: false,
            told: (0, 0),
            lost_writes: false,
            frames: VecDeque::new(),
            room: VecDeque::new(),
            partial: None,
            mergeable: false,
            id,
        }
    }

    /// The device was reset: what was under way may have been done, or not.
    pub fn reset<'a>(&mut self, under_way: impl Iterator<Item = &'a Purpose>) {
        for purpose in under_way {
            if let Purpose::Blk(request) = purpose {
                self.forget(request);
            }
        }
        // Those that were under way were not told of failures.
        self.lost_writes |= self.failed.0 > self.told.0;
        self.told = (self.failed.0, 0);
        self.frames.clear();
        self.room.clear();
        self.partial = None;
    }

    /// The driver may have written anywhere.
    pub fn forget_all(&mut self) {
        self.disk.fill(None);
    }

    /// The disk has what was written, and nothing else.
    pub fn check_disk(&self, file: &File) {
        let mut bytes = vec![0; self.disk.len() * SECTOR as usize];
        file.read_exact_at(&mut bytes, 0).expect("memory");
        for (number, expected) in self.disk.iter().enumerate() {
            let sector = &bytes[number * SECTOR as usize..][..SECTOR as usize];
            let right = expected.is_none_or(|expected| expected == sector);
            assert!(right, "sector {number} of the disk: {sector:x?}, not {expected:x?}");
        }
    }

    /// The device was given time for everything.
    pub fn nothing_is_left(&mut self) {
        let told = self.told.0 + self.told.1;
        assert!(told >= self.failed.1, "the disk failed, and nobody was told");
        let waits = |model: &Self| match model.buffers() {
            Some(_) => panic!("a frame was lost that there was room for"),
            None => model.frames.is_empty() || model.room.len() < model.most(),
        };
        while !waits(self) {
            self.frames.pop_front();
        }
        assert!(self.partial.is_none(), "half of a frame");
    }

    /// How many buffers a frame has at most.
    fn most(&self) -> usize {
        if self.mergeable {
            usize::from(SIZE)
        } else {
            1
        }
    }

    /// How many buffers the next frame needs, if there is one and they are there.
    fn buffers(&self) -> Option<usize> {
        let length = self.frames.front()?.len();
        let mut room = 0;
        self.room
            .iter()
            .take(self.most())
            .position(|buffer| {
                room += buffer;
                room >= length
            })
            .map(|last| last + 1)
    }

    /// What `request`, a write, was to change is unknown.
    fn forget(&mut self, request: &BlkRequest) {
        if let Some(range) = self.range(request, request.data.len()).filter(|_| request.kind == OUT)
        {
            self.disk[range].fill(None);
        }
    }

    /// The sectors of the disk that `length` bytes of `request` are, if they are some of it.
    fn range(&self, request: &BlkRequest, length: usize) -> Option<std::ops::Range<usize>> {
        let start = usize::try_from(request.sector).ok()?;
        let end = start.checked_add(length / SECTOR as usize)?;
        let whole = (length as u64).is_multiple_of(SECTOR);
        (whole && end <= self.disk.len()).then_some(start..end)
    }

    /// Whether two requests are at the same sectors, and one of them is a write. `writable`: what
    /// each can read, in bytes.
    pub fn race(&self, one: (&BlkRequest, usize), other: (&BlkRequest, usize)) -> bool {
        let range = |(request, writable): (&BlkRequest, usize)| match request.kind {
            IN => self.range(request, writable.saturating_sub(1)),
            OUT => self.range(request, request.data.len()),
            _ => None,
        };
        let (Some(a), Some(b)) = (range(one), range(other)) else { return false };
        a.start < b.end && b.start < a.end && (one.0.kind == OUT || other.0.kind == OUT)
    }

    /// The device has used a chain for `purpose` and says that it has written `written` bytes of
    /// its writable ones, which are `buffer` now.
    pub fn used(&mut self, purpose: &Purpose, written: usize, buffer: &[u8]) {
        assert!(written <= buffer.len(), "{written} bytes were written to {}", buffer.len());
        match purpose {
            Purpose::Blk(request) => self.blk(request, written, buffer),
            Purpose::Transmit(_) => assert_eq!(written, 0, "a frame was sent, not received"),
            Purpose::Receive => self.receive(written, buffer),
            Purpose::Entropy => {
                assert_eq!(written, buffer.len().min(ENTROPY));
                assert!(buffer[..written].iter().all(|byte| *byte == 0));
                assert!(buffer[written..].iter().all(|byte| *byte == UNTOUCHED));
            }
        }
    }

    /// Whether the device sends this frame.
    pub fn is_sent(frame: &[u8]) -> bool {
        frame.len() > FRAME_HEADER && frame.len() <= LONGEST_FRAME
    }

    fn blk(&mut self, request: &BlkRequest, written: usize, buffer: &[u8]) {
        let (status, data) = buffer.split_last().expect("a request has a status");
        let expected = match request.kind {
            IN => self.range(request, data.len()).map_or(IOERR, |_| OK),
            OUT if self.read_only => IOERR,
            OUT => self.range(request, request.data.len()).map_or(IOERR, |_| OK),
            FLUSH | GET_ID => OK,
            _ => UNSUPP,
        };
        if (*status, expected) == (IOERR, OK) {
            let flushes = request.kind == FLUSH || (request.kind == OUT && self.write_through);
            let lost = flushes && self.lost_writes;
            assert!(lost || self.told.0 < self.failed.0, "{request:?} failed, and no disk did");
            let told = if lost { &mut self.told.1 } else { &mut self.told.0 };
            *told += 1;
            self.lost_writes |= flushes;
        } else {
            assert_eq!(*status, expected, "{request:?}");
        }
        match *status {
            OK => assert_eq!(written, buffer.len()),
            _ => assert!(written <= 1, "{request:?} failed with {written} bytes"),
        }
        match request.kind {
            IN if *status == OK => {
                let range = self.range(request, data.len()).expect("it was read");
                let read = data.chunks_exact(SECTOR as usize);
                let same = |(on_disk, read): (&Option<Sector>, &[u8])| {
                    on_disk.is_none_or(|on_disk| on_disk == read)
                };
                let right = self.disk[range].iter().zip(read).all(same);
                assert!(right || request.raced, "{request:?} reads something else");
            }
            // Parts of it may be there before it failed.
            IN => {}
            OUT if *status == OK && !request.raced => {
                let range = self.range(request, request.data.len()).expect("it was written");
                let written = request.data.chunks_exact(SECTOR as usize);
                for (to, from) in self.disk[range].iter_mut().zip(written) {
                    *to = from.try_into().ok();
                }
            }
            OUT => self.forget(request),
            GET_ID => {
                let length = data.len().min(ID_LENGTH);
                let right = *status != OK || data[..length] == self.id[..length];
                assert!(right, "another ID: {data:x?}");
                let rest = data.get(ID_LENGTH..).unwrap_or_default();
                assert!(rest.iter().all(|byte| *byte == UNTOUCHED), "an ID of more than 20 bytes");
            }
            _ => assert!(data.iter().all(|byte| *byte == UNTOUCHED), "{request:?} has data"),
        }
    }

    /// The driver got a buffer of a frame.
    fn receive(&mut self, written: usize, buffer: &[u8]) {
        assert!(buffer[written..].iter().all(|byte| *byte == UNTOUCHED));
        let part = &buffer[..written];
        let (rest, left) = self.partial.take().unwrap_or_else(|| self.next_frame());
        let room = self.room.pop_front();
        assert_eq!(room, Some(buffer.len()), "another buffer came first");
        assert!(rest.starts_with(part), "a part of another frame");
        assert_eq!(part.len(), rest.len().min(buffer.len()), "a buffer that is not full");
        let rest = &rest[part.len()..];
        match left - 1 {
            0 => assert!(rest.is_empty(), "{} bytes of a frame are lost", rest.len()),
            left => self.partial = Some((rest.to_vec(), left)),
        }
    }
    /// The next frame that the device delivers, and to how many buffers.
    fn next_frame(&mut self) -> (Vec<u8>, u16) {
        loop {
            if let Some(count) = self.buffers() {
                let mut frame = self.frames.pop_front().expect("it has buffers");
                frame[10..12].copy_from_slice(&(count as u16).to_le_bytes());
                return (frame, count as u16);
            }
            // One for which all of the queue has no room is dropped.
            assert!(self.room.len() >= self.most(), "a frame without buffers");
            self.frames.pop_front().expect("a frame that nobody sent");
        }
    }
}
