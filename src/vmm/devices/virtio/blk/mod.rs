// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The block device (virtio 1.3 §5.2).
//!
//! Data goes through a bounce buffer, piece by piece: no section is open while the disk is
//! accessed, and nothing waits while memory is copied.

mod disk;
mod image_file;
#[cfg(test)]
mod tests;

use std::fmt;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::backend::{Backend, Features, Model};
use super::chain::{Broken, Chain, NotCopied, Unserved};
use super::memory::DeviceMemory;
use super::queue::Virtqueue;
use twostage::ratelimit::RateLimit;

pub use disk::{Disk, DiskAccess, DiskError, SECTOR_SIZE};

/// Queue size.
const QUEUE_SIZE: u16 = 256;
/// Data buffers of a request: the queue size less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes transferred at once: the most that is copied in one section.
const PIECE: usize = 128 << 10;
/// What `O_DIRECT` may want offsets, lengths and buffers aligned to.
const PAGE_SIZE: usize = 4096;

/// Header of a request (§5.2.6).
#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct Header {
    kind: U32,
    reserved: U32,
    sector: U64,
}

/// The start of the configuration (§5.2.4): fields of features that are not offered are 0.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    geometry: U32,
    blk_size: U32,
}

/// Why a request fails.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    NotCopied(#[from] NotCopied),
    #[error("disk: {0}")]
    Disk(#[from] std::io::Error),
    #[error("sector {sector} and {length} bytes are not blocks of the disk")]
    Range { sector: u64, length: u64 },
    #[error("the disk is read-only")]
    ReadOnly,
    #[error("requests of type {0} are not supported")]
    Unsupported(u32),
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

/// The block device.
#[derive(Debug)]
pub struct Block {
    engine: Engine,
    failures: RateLimit,
}

/// Performs the requests.
#[derive(Debug)]
struct Engine {
    disk: Disk,
    buffer: BounceBuffer,
    /// The driver has negotiated flushes. If not, every write is flushed (§5.2.6.2).
    flushes: bool,
}

impl Block {
    /// A device backed by `disk`.
    pub fn new(disk: Disk) -> Self {
        let engine = Engine { disk, buffer: BounceBuffer::new(PIECE), flushes: false };
        Self { engine, failures: RateLimit::default() }
    }
}

impl Backend for Block {
    fn model(&self) -> Model {
        let disk = &self.engine.disk;
        let features = Features::default()
            .with(VIRTIO_BLK_F_SEG_MAX)
            .with(VIRTIO_BLK_F_BLK_SIZE)
            .with(VIRTIO_BLK_F_FLUSH);
        let config = Config {
            capacity: (disk.size() / SECTOR_SIZE).into(),
            size_max: 0.into(),
            seg_max: SEG_MAX.into(),
            geometry: 0.into(),
            blk_size: disk.block_size().into(),
        };
        Model {
            name: "blk",
            device_type: VIRTIO_ID_BLOCK as u16,
            // Mass storage, other.
            class: 0x01_8000,
            features: if disk.is_read_only() { features.with(VIRTIO_BLK_F_RO) } else { features },
            queue_sizes: &[QUEUE_SIZE],
            config: config.as_bytes().to_vec(),
        }
    }

    fn start(&mut self, features: Features) -> Result<(), Broken> {
        self.engine.flushes = features.has(VIRTIO_BLK_F_FLUSH);
        Ok(())
    }

    fn serve(
        &mut self,
        number: usize,
        queues: &mut [Virtqueue],
        memory: &mut DeviceMemory,
    ) -> Result<bool, Unserved> {
        let Some(queue) = queues.get_mut(number) else { return Ok(false) };
        let counters = queue.counters();
        queue.drain(memory, |memory, chain| {
            // The last writable byte is the status; data comes before it.
            let status_at = chain.writable().checked_sub(1).ok_or(Broken::Status)?;
            let result = self.engine.request(memory, chain, status_at);
            let (status, written) = match &result {
                Ok(()) => (VIRTIO_BLK_S_OK as u8, chain.writable()),
                Err(Failure::NotCopied(NotCopied::NotNow(not_now))) => {
                    return Err((*not_now).into())
                }
                // How much of the data was written does not matter.
                Err(failure) => (failure.status(), if status_at == 0 { 1 } else { 0 }),
            };
            if let Err(failure) = result {
                if matches!(failure, Failure::NotCopied(_)) {
                    counters.unreachable.count();
                }
                self.failures.warn(format_args!("blk: a request fails: {failure}"));
            }
            chain.write(memory, status_at, &[status]).map_err(|error| match error {
                NotCopied::NotNow(not_now) => Unserved::NotNow(not_now),
                NotCopied::Unreachable => Broken::Status.into(),
            })?;
            // Chains have less than 2^32 bytes.
            Ok(written as u32)
        })
    }
}

impl Engine {
    /// Performs the request of `chain`, which has `length` bytes for data to the driver.
    fn request(
        &mut self,
        memory: &mut DeviceMemory,
        chain: &Chain,
        length: u64,
    ) -> Result<(), Failure> {
        let mut header = Header::new_zeroed();
        chain.read(memory, 0, header.as_mut_bytes())?;
        let sector = header.sector.get();
        match header.kind.get() {
            VIRTIO_BLK_T_IN => self.read(memory, chain, sector, length),
            VIRTIO_BLK_T_OUT => {
                // The header has been read, so the chain is at least as long.
                let length = chain.readable() - size_of::<Header>() as u64;
                self.write(memory, chain, sector, length)
            }
            VIRTIO_BLK_T_FLUSH => Ok(self.disk.flush()?),
            VIRTIO_BLK_T_GET_ID => {
                let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
                id.iter_mut().zip(self.disk.id().bytes()).for_each(|(to, from)| *to = from);
                // A driver with a smaller buffer gets less.
                let length = length.min(id.len() as u64) as usize;
                Ok(chain.write(memory, 0, &id[..length])?)
            }
            kind => Err(Failure::Unsupported(kind)),
        }
    }

    fn read(
        &mut self,
        memory: &mut DeviceMemory,
        chain: &Chain,
        sector: u64,
        length: u64,
    ) -> Result<(), Failure> {
        let start = self.start(sector, length)?;
        let mut done = 0;
        while done < length {
            let piece = self.buffer.piece(length - done);
            self.disk.read(start + done, piece)?;
            chain.write(memory, done, piece)?;
            done += piece.len() as u64;
        }
        Ok(())
    }

    fn write(
        &mut self,
        memory: &mut DeviceMemory,
        chain: &Chain,
        sector: u64,
        length: u64,
    ) -> Result<(), Failure> {
        if self.disk.is_read_only() {
            return Err(Failure::ReadOnly);
        }
        let start = self.start(sector, length)?;
        let mut done = 0;
        while done < length {
            let piece = self.buffer.piece(length - done);
            chain.read(memory, size_of::<Header>() as u64 + done, piece)?;
            self.disk.write(start + done, piece)?;
            done += piece.len() as u64;
        }
        if !self.flushes {
            self.disk.flush()?;
        }
        Ok(())
    }

    /// The byte offset of `sector`, if `length` bytes from there are blocks of the disk.
    fn start(&self, sector: u64, length: u64) -> Result<u64, Failure> {
        sector
            .checked_mul(SECTOR_SIZE)
            .filter(|start| self.disk.has(*start, length))
            .ok_or(Failure::Range { sector, length })
    }
}

/// Memory aligned for `O_DIRECT`.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_SIZE]);

/// A buffer aligned to 4096 bytes.
struct BounceBuffer(Vec<Page>);

impl BounceBuffer {
    /// A buffer of `length` bytes, rounded up to whole pages.
    fn new(length: usize) -> Self {
        Self(vec![Page::new_zeroed(); length.div_ceil(PAGE_SIZE)])
    }

    /// All bytes of it.
    fn bytes(&mut self) -> &mut [u8] {
        self.0.as_mut_slice().as_mut_bytes()
    }

    /// The start of the buffer: `left` bytes, or all of it.
    fn piece(&mut self, left: u64) -> &mut [u8] {
        let bytes = self.bytes();
        let length = left.min(bytes.len() as u64) as usize;
        &mut bytes[..length]
    }
}

impl fmt::Debug for BounceBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BounceBuffer({} pages)", self.0.len())
    }
}
