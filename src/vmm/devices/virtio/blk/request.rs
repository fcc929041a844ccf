// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One request of the driver, from its header to its status, piece by piece.

use std::fmt;
use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::buffers::{BounceBuffer, LARGEST};
use super::disk::{Disk, SECTOR_SIZE};
use super::engine::{Action, Finished, Operation};
use super::image_file;
use crate::devices::virtio::chain::{Broken, Chain, NotCopied, Unserved};
use crate::devices::virtio::memory::DeviceMemory;
use crate::devices::NotNow;

/// Bytes that are copied under one permit at most: whoever takes it away waits that long.
pub(super) const COPY: usize = 128 << 10;

/// How often an operation is tried again, in a row.
const MOST_TRIES: u32 = 100;

/// Header of a request (virtio 1.3 §5.2.6).
#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct Header {
    kind: U32,
    reserved: U32,
    sector: U64,
}

/// Why a request fails.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("a request fails: {0}")]
    NotCopied(NotCopied),
    #[error("a {what} fails: {source}")]
    Disk { what: Piece, source: io::Error },
    #[error("a request fails: sector {sector} and {length} bytes are not blocks of the disk")]
    Range { sector: u64, length: u64 },
    #[error("a request fails: the disk is read-only")]
    ReadOnly,
    #[error("a request fails: requests of type {0} are not supported")]
    Unsupported(u32),
}

/// What of a request the disk did not do: a piece of its data, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    action: Action,
    offset: u64,
    length: usize,
}

impl fmt::Display for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { action, offset, length } = self;
        match action {
            Action::Read => write!(f, "read of {length} bytes at offset {offset}"),
            Action::Write => write!(f, "write of {length} bytes at offset {offset}"),
            Action::Flush => f.write_str("flush"),
        }
    }
}

impl Failure {
    fn status(&self) -> u8 {
        let status = match self {
            Self::Unsupported(_) => VIRTIO_BLK_S_UNSUPP,
            _ => VIRTIO_BLK_S_IOERR,
        };
        // Three values, all small.
        status as u8
    }
}

/// `result`, unless the device may make no requests now: this is no result.
fn settled(result: Result<(), NotCopied>) -> Result<Result<(), Failure>, NotNow> {
    match result {
        Err(NotCopied::NotNow(not_now)) => Err(not_now),
        result => Ok(result.map_err(Failure::NotCopied)),
    }
}

/// A request that was taken from a queue and not returned.
#[derive(Debug)]
pub(super) struct Request {
    queue: usize,
    chain: Chain,
    /// Its last writable byte is the status; data comes before it.
    status_at: u64,
    work: Work,
    /// Bytes of data that are done.
    done: u64,
    /// What the data of a piece is in, unless an operation has it.
    buffer: BounceBuffer,
    step: Step,
    /// How often its operation was tried again.
    tries: u32,
}

/// What the driver wants. Offsets and lengths are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    Read { start: u64, length: u64 },
    Write { start: u64, length: u64, flush: bool },
    Flush,
    Nothing,
}

/// What is to be done next.
#[derive(Debug)]
enum Step {
    /// To begin with the next piece.
    Next,
    /// The disk has it.
    UnderWay,
    /// To copy this many bytes of the buffer to the guest.
    Copy(usize),
    /// To report the result.
    Report(Result<(), Failure>),
}

/// What comes of advancing a request.
#[derive(Debug)]
pub(super) enum Advance {
    /// An operation is to be begun.
    Begin(Operation),
    /// It is over, and its status is written.
    Over {
        /// Bytes written to its buffers.
        written: u32,
        /// Why it failed, if it did.
        failure: Option<Failure>,
    },
}

impl Request {
    /// The request of `chain`, from queue `queue`. With `flush`, writes are on the medium when they
    /// are reported.
    ///
    /// # Errors
    /// It has no status, or the device may make no requests now.
    pub fn new(
        memory: &mut DeviceMemory,
        queue: usize,
        chain: Chain,
        disk: &Disk,
        flush: bool,
    ) -> Result<Self, Unserved> {
        let status_at = chain.writable().checked_sub(1).ok_or(Broken::Status)?;
        let mut header = Header::new_zeroed();
        let read = settled(chain.read(memory, 0, header.as_mut_bytes()))?;
        let work = match read {
            Ok(()) => work(&header, &chain, status_at, disk, flush),
            Err(failure) => Err(failure),
        };
        let (work, step) = match work {
            Ok(Work::Nothing) => {
                (Work::Nothing, Step::Report(settled(write_id(memory, &chain, status_at, disk))?))
            }
            Ok(work) => (work, Step::Next),
            Err(failure) => (Work::Nothing, Step::Report(Err(failure))),
        };
        let buffer = BounceBuffer::default();
        Ok(Self { queue, chain, status_at, work, done: 0, buffer, step, tries: 0 })
    }

    /// Bytes of the largest buffer that it needs for `disk`.
    pub fn buffer_needed(&self, disk: &Disk) -> usize {
        match (self.work, &self.step) {
            _ if disk.is_in_memory() => 0,
            // At most the size of a buffer.
            (Work::Read { length, .. } | Work::Write { length, .. }, Step::Next) => {
                length.min(LARGEST as u64) as usize
            }
            _ => 0,
        }
    }

    /// Gives it the buffer that it needs.
    pub fn set_buffer(&mut self, buffer: BounceBuffer) {
        self.buffer = buffer;
    }

    /// The buffer that it had, when it is over.
    pub fn into_buffer(self) -> BounceBuffer {
        self.buffer
    }

    /// Bytes of its data.
    pub fn length(&self) -> u64 {
        self.extent().1
    }

    /// The number of its queue.
    pub fn queue(&self) -> usize {
        self.queue
    }

    /// Its first descriptor.
    pub fn head(&self) -> u16 {
        self.chain.head()
    }

    /// Goes on until it needs the disk or is over. Operations have the tag `tag`.
    ///
    /// # Errors
    /// The status cannot be written, or the device may make no requests now: then it is advanced
    /// again when it may. A piece that was not copied as a whole is copied again.
    pub fn advance(
        &mut self,
        memory: &mut DeviceMemory,
        disk: &Disk,
        tag: usize,
    ) -> Result<Advance, Unserved> {
        loop {
            match &self.step {
                Step::Next if disk.is_in_memory() => self.at_once(memory, disk)?,
                Step::Next => {
                    if let Some(operation) = self.next(memory, tag)? {
                        self.step = Step::UnderWay;
                        return Ok(Advance::Begin(operation));
                    }
                }
                Step::Copy(length) => {
                    let length = *length;
                    let bytes = self.buffer.bytes().get(..length).unwrap_or_default();
                    let copied = settled(copy_out(memory, &self.chain, self.done, bytes))?;
                    self.done += length as u64;
                    self.step =
                        copied.map_or_else(|error| Step::Report(Err(error)), |()| Step::Next);
                }
                Step::Report(_) => return self.report(memory),
                // Nobody asks then.
                Step::UnderWay => {
                    return Err(Broken::Device("a request is advanced twice".into()).into())
                }
            }
        }
    }

    /// Does the next piece at a disk in memory, or reports that there is none: the kernel copies
    /// between that and the guest's memory, no more than this process would copy under one permit.
    fn at_once(&mut self, memory: &mut DeviceMemory, disk: &Disk) -> Result<(), NotNow> {
        let (start, length) = self.extent();
        let left = length.saturating_sub(self.done);
        // Small.
        let piece = left.min(COPY as u64) as usize;
        let (file, at, chain) = (disk.file(), start + self.done, &self.chain);
        let transferred = match self.work {
            Work::Read { .. } if piece > 0 => {
                chain.with_writable(memory, (self.done, piece), |to| {
                    image_file::read_into(file, at, to)
                })
            }
            Work::Write { .. } if piece > 0 => {
                let from = size_of::<Header>() as u64 + self.done;
                chain.with_readable(memory, (from, piece), |from| {
                    image_file::write_from(file, at, from)
                })
            }
            // Memory is the medium.
            _ => {
                self.step = Step::Report(Ok(()));
                return Ok(());
            }
        };
        match transferred {
            Err(NotCopied::NotNow(not_now)) => return Err(not_now),
            Err(error) => self.step = Step::Report(Err(Failure::NotCopied(error))),
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(source)) => self.step = self.failed(piece, source),
            Ok(Ok(0)) => self.step = self.failed(piece, self.no_progress()),
            Ok(Ok(count)) => self.done += count as u64,
        }
        Ok(())
    }

    /// Where the data is on the disk, and how long it is.
    fn extent(&self) -> (u64, u64) {
        match self.work {
            Work::Read { start, length } | Work::Write { start, length, .. } => (start, length),
            Work::Flush | Work::Nothing => (0, 0),
        }
    }

    /// The image became shorter, or there is no room.
    fn no_progress(&self) -> io::Error {
        io::Error::other(match self.work {
            Work::Write { .. } => "nothing is written, and no error is given",
            _ => "the image has become shorter",
        })
    }

    /// The disk did not do the next piece, of `length` bytes.
    fn failed(&self, length: usize, source: io::Error) -> Step {
        let action = match self.work {
            Work::Read { .. } => Action::Read,
            Work::Write { .. } => Action::Write,
            Work::Flush | Work::Nothing => Action::Flush,
        };
        let offset = self.extent().0 + self.done;
        Step::Report(Err(Failure::Disk { what: Piece { action, offset, length }, source }))
    }

    /// The next operation; or none, and the next step is another.
    fn next(&mut self, memory: &mut DeviceMemory, tag: usize) -> Result<Option<Operation>, NotNow> {
        let (start, length) = self.extent();
        let left = length.saturating_sub(self.done);
        // At most the length of the buffer.
        let piece = left.min(self.buffer.len() as u64) as usize;
        let action = match self.work {
            Work::Read { .. } if piece > 0 => Action::Read,
            Work::Write { .. } if piece > 0 => {
                let bytes = self.buffer.bytes().get_mut(..piece).unwrap_or_default();
                let from = size_of::<Header>() as u64 + self.done;
                if let Err(failure) = settled(copy_in(memory, &self.chain, from, bytes))? {
                    self.step = Step::Report(Err(failure));
                    return Ok(None);
                }
                Action::Write
            }
            Work::Write { flush: true, .. } | Work::Flush if left == 0 => {
                self.work = Work::Flush;
                Action::Flush
            }
            _ => {
                self.step = match left {
                    0 => Step::Report(Ok(())),
                    // Small: there was no memory for a buffer.
                    _ => self.failed(left as usize, io::ErrorKind::OutOfMemory.into()),
                };
                return Ok(None);
            }
        };
        let buffer = std::mem::take(&mut self.buffer);
        Ok(Some(Operation { tag, action, offset: start + self.done, buffer, part: 0..piece }))
    }

    /// The disk has finished its operation: returns it if it was not all done.
    pub fn finished(&mut self, finished: Finished) -> Option<Operation> {
        if finished.may_be_tried_again() && self.tries < MOST_TRIES {
            self.tries += 1;
            return Some(finished.operation);
        }
        self.tries = 0;
        let Finished { mut operation, result } = finished;
        let wanted = operation.part.len();
        let part = operation.part.clone();
        let Operation { action, offset, .. } = operation;
        let failed = |source| {
            let what = Piece { action, offset, length: wanted };
            Step::Report(Err(Failure::Disk { what, source }))
        };
        self.step = match result {
            Err(source) => failed(source),
            Ok(0) if wanted != 0 => failed(self.no_progress()),
            Ok(count) if count < wanted => {
                operation.part.start += count;
                operation.offset += count as u64;
                return Some(operation);
            }
            Ok(_) => match self.work {
                Work::Read { .. } => Step::Copy(part.end),
                Work::Write { .. } => {
                    self.done += part.end as u64;
                    Step::Next
                }
                Work::Flush | Work::Nothing => Step::Report(Ok(())),
            },
        };
        self.buffer = operation.buffer;
        None
    }

    /// Writes the status.
    fn report(&mut self, memory: &mut DeviceMemory) -> Result<Advance, Unserved> {
        let (status, written) = match &self.step {
            // Chains have less than 2^32 bytes.
            Step::Report(Ok(())) => (VIRTIO_BLK_S_OK as u8, self.chain.writable() as u32),
            // How much of the data was written does not matter.
            Step::Report(Err(failure)) => (failure.status(), u32::from(self.status_at == 0)),
            _ => return Err(Broken::Status.into()),
        };
        match self.chain.write(memory, self.status_at, &[status]) {
            Ok(()) => {}
            Err(NotCopied::NotNow(not_now)) => return Err(not_now.into()),
            Err(NotCopied::Unreachable) => return Err(Broken::Status.into()),
        }
        let step = std::mem::replace(&mut self.step, Step::UnderWay);
        let failure = if let Step::Report(Err(failure)) = step { Some(failure) } else { None };
        Ok(Advance::Over { written, failure })
    }
}

/// What the driver wants with `header`.
fn work(
    header: &Header,
    chain: &Chain,
    status_at: u64,
    disk: &Disk,
    flush: bool,
) -> Result<Work, Failure> {
    let sector = header.sector.get();
    match header.kind.get() {
        VIRTIO_BLK_T_IN => {
            Ok(Work::Read { start: start(disk, sector, status_at)?, length: status_at })
        }
        VIRTIO_BLK_T_OUT if disk.is_read_only() => Err(Failure::ReadOnly),
        VIRTIO_BLK_T_OUT => {
            // The header has been read, so the chain is at least as long.
            let length = chain.readable() - size_of::<Header>() as u64;
            Ok(Work::Write { start: start(disk, sector, length)?, length, flush })
        }
        VIRTIO_BLK_T_FLUSH => Ok(Work::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(Work::Nothing),
        kind => Err(Failure::Unsupported(kind)),
    }
}

/// The byte offset of `sector`, if `length` bytes from there are blocks of the disk.
fn start(disk: &Disk, sector: u64, length: u64) -> Result<u64, Failure> {
    sector
        .checked_mul(SECTOR_SIZE)
        .filter(|start| disk.has(*start, length))
        .ok_or(Failure::Range { sector, length })
}

/// Writes the disk's identifier to the `length` bytes of data of `chain`.
fn write_id(
    memory: &mut DeviceMemory,
    chain: &Chain,
    length: u64,
    disk: &Disk,
) -> Result<(), NotCopied> {
    let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
    id.iter_mut().zip(disk.id().bytes()).for_each(|(to, from)| *to = from);
    // A driver with a smaller buffer gets less.
    let length = length.min(id.len() as u64) as usize;
    chain.write(memory, 0, id.get(..length).unwrap_or_default())
}

/// Writes `bytes` to the chain's data at `offset`, under a permit for each [`COPY`] bytes.
fn copy_out(
    memory: &mut DeviceMemory,
    chain: &Chain,
    offset: u64,
    bytes: &[u8],
) -> Result<(), NotCopied> {
    let offsets = (offset..).step_by(COPY);
    bytes.chunks(COPY).zip(offsets).try_for_each(|(piece, at)| chain.write(memory, at, piece))
}

/// Reads `bytes` from the chain's readable bytes at `offset`, likewise.
fn copy_in(
    memory: &mut DeviceMemory,
    chain: &Chain,
    offset: u64,
    bytes: &mut [u8],
) -> Result<(), NotCopied> {
    let offsets = (offset..).step_by(COPY);
    bytes.chunks_mut(COPY).zip(offsets).try_for_each(|(piece, at)| chain.read(memory, at, piece))
}
