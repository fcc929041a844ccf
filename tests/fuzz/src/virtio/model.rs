// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What must have become of a chain when the device has used it, naively.

use std::collections::VecDeque;

use super::backend::{SECTOR, SECTORS};

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

/// What the driver and the device have seen.
#[derive(Debug)]
pub struct Model {
    /// The disk; unknown where writes raced or failed.
    disk: Vec<Option<u8>>,
    pub read_only: bool,
    /// Operations of the disk may have failed.
    pub faults: bool,
    /// Frames for the driver that it has not got yet.
    pub frames: VecDeque<Vec<u8>>,
    /// What is left of the frame that it is getting, and of how many buffers it was to consist.
    partial: Option<(Vec<u8>, u16)>,
    pub mergeable: bool,
}

impl Model {
    pub fn new(read_only: bool) -> Self {
        let disk = vec![Some(0); (SECTORS * SECTOR) as usize];
        Self {
            disk,
            read_only,
            faults: false,
            frames: VecDeque::new(),
            partial: None,
            mergeable: false,
        }
    }

    /// The device was reset: what was under way may have been done, or not.
    pub fn reset<'a>(&mut self, under_way: impl Iterator<Item = &'a Purpose>) {
        for purpose in under_way {
            if let Purpose::Blk(request) = purpose {
                self.forget(request);
            }
        }
        self.frames.clear();
        self.partial = None;
    }

    /// What `request`, a write, was to change is unknown.
    fn forget(&mut self, request: &BlkRequest) {
        if let Some(range) = self.range(request, request.data.len()).filter(|_| request.kind == OUT)
        {
            self.disk[range].fill(None);
        }
    }

    /// Where `length` bytes of `request` are on the disk, if they are blocks of it.
    fn range(&self, request: &BlkRequest, length: usize) -> Option<std::ops::Range<usize>> {
        let start = usize::try_from(request.sector.checked_mul(SECTOR)?).ok()?;
        let end = start.checked_add(length)?;
        let blocks = (length as u64).is_multiple_of(SECTOR);
        (blocks && end <= self.disk.len()).then_some(start..end)
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
        let failed = self.faults && *status == IOERR && matches!(request.kind, IN | OUT | FLUSH);
        assert!(*status == expected || failed, "{request:?}: {status}, and not {expected}");
        match *status {
            OK => assert_eq!(written, buffer.len()),
            _ => assert!(written <= 1, "{request:?} failed with {written} bytes"),
        }
        match request.kind {
            IN if *status == OK => {
                let range = self.range(request, data.len()).expect("it was read");
                let same = |(on_disk, read): (&Option<u8>, &u8)| on_disk.is_none_or(|b| b == *read);
                let right = self.disk[range].iter().zip(data).all(same);
                assert!(right || request.raced, "{request:?} reads something else");
            }
            // Parts of it may be there before it failed.
            IN => {}
            OUT if *status == OK && !request.raced => {
                let range = self.range(request, request.data.len()).expect("it was written");
                let written = request.data.iter().map(|byte| Some(*byte));
                self.disk[range].iter_mut().zip(written).for_each(|(to, from)| *to = from);
            }
            OUT => self.forget(request),
            GET_ID => {
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
        let (rest, left) = self.partial.take().unwrap_or_else(|| {
            let count = u16::from_le_bytes([part[10], part[11]]);
            assert!(count == 1 || self.mergeable, "{count} buffers of a frame");
            // Frames that no queue had room for were dropped.
            while let Some(mut frame) = self.frames.pop_front() {
                frame[10..12].copy_from_slice(&part[10..12]);
                if frame.starts_with(part) && (frame.len() == part.len() || count > 1) {
                    return (frame, count);
                }
            }
            panic!("a frame that nobody sent, of {} bytes", part.len());
        });
        assert!(rest.starts_with(part), "a part of another frame");
        let rest = &rest[part.len()..];
        match left - 1 {
            0 => assert!(rest.is_empty(), "{} bytes of a frame are lost", rest.len()),
            left => self.partial = Some((rest.to_vec(), left)),
        }
    }
}
