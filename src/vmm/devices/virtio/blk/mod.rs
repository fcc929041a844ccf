// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The block device (virtio 1.3 §5.2).
//!
//! Requests are under way in parallel, up to [`under_way::DEPTH`], and finish in any order. Data
//! goes through a buffer of this process, piece by piece ([`engine`] says why): no section is open
//! while the disk is accessed, and nothing waits while memory is copied. So an invalidation, a
//! reset, or bus mastering that is switched off waits for a copy at most, and never for a disk:
//! data that arrives later is not copied. What was begun at the disk is waited for by the worker,
//! before it ends: no write of an earlier driver reaches the disk after one of a later driver.
//!
//! An image in memory (tmpfs, a memfd) has no disk to wait for. There the kernel copies between the
//! image and the guest's memory: a piece of a request is translated in one section, adjacent
//! buffers are one, and one system call in that section does it. Where time goes is copies, and
//! this is one instead of two. It is as bounded as a copy by this process, as long as the image is
//! in memory: for pages that were swapped out, or while a memory cgroup reclaims, or while somebody
//! else cuts or allocates the image (its inode lock), the section lasts as long as that.
//!
//! A flush that fails says that writes may be lost. The system reports that once, so all later
//! flushes fail, too, until the image is opened again.
//!
//! A request that is interrupted while its data is copied is not made again: its data waits in the
//! buffer, and is copied when the device may make requests again.

mod buffers;
mod disk;
mod engine;
mod image_file;
#[cfg(test)]
mod parallel_tests;
mod request;
#[cfg(test)]
mod tests;
mod under_way;

use std::io;
use std::os::fd::RawFd;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use super::backend::{Backend, Features, Model};
use super::chain::{Broken, Unserved};
use super::memory::DeviceMemory;
use super::queue::Virtqueue;
use engine::Engine;
use request::{Failure, Request};
use twostage::ratelimit::RateLimit;
use under_way::{Over, UnderWay, DEPTH};

pub use disk::{Disk, DiskAccess, DiskError, SECTOR_SIZE};
#[cfg(feature = "test-support")]
pub use engine::scripted::{Faults, Outcome};

/// Queues of a device at most.
pub const MAX_QUEUES: usize = 64;
/// Size of a queue: so that 1 MiB in pages is one request.
const QUEUE_SIZE: u16 = 512;
/// The sizes of as many queues as there may be.
static QUEUE_SIZES: [u16; MAX_QUEUES] = [QUEUE_SIZE; MAX_QUEUES];
/// Data buffers of a request: the queue size less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Requests, and bytes of their data, that are returned to the driver at once, and with one
/// interrupt, at most.
const BATCH: usize = 32;
const BATCH_BYTES: u64 = 1 << 20;

/// The start of the configuration (§5.2.4): fields of features that are not offered are 0.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    geometry: U32,
    blk_size: U32,
    topology: U64,
    writeback: u8,
    unused: u8,
    num_queues: U16,
}

/// The block device.
#[derive(Debug)]
pub struct Block {
    disk: Disk,
    under_way: UnderWay,
    /// Its engine failed: there is to be another before the next driver's requests.
    engine_failed: bool,
    queues: Vec<OfQueue>,
    /// The queue whose turn it is to have a request taken.
    turn: usize,
    /// The driver has negotiated flushes. If not, every write is flushed (§5.2.6.2).
    flushes: bool,
    failures: RateLimit,
}

/// What the device knows of a queue.
#[derive(Debug, Default)]
struct OfQueue {
    /// There may be new requests in it.
    filled: bool,
    /// Requests that are over, and not returned yet: head, bytes written.
    over: Vec<(u16, u32)>,
    /// Bytes of their data.
    bytes: u64,
}

impl Block {
    /// A device with `queues` queues, 1 to [`MAX_QUEUES`], backed by `disk`.
    ///
    /// # Errors
    /// The process is out of file descriptors.
    pub fn new(disk: Disk, queues: usize) -> io::Result<Self> {
        let engine = engine::best(disk.file(), DEPTH)?;
        let block = Self::with_engine(disk, queues, engine);
        log::info!("{}: {} serves requests", block.disk.path().display(), block.served_by());
        Ok(block)
    }

    /// A device whose operations on `disk` come to what `faults` says; it has a single thread.
    ///
    /// # Errors
    /// The process is out of file descriptors.
    #[cfg(feature = "test-support")]
    pub fn scripted(mut disk: Disk, queues: usize, faults: Faults) -> io::Result<Self> {
        disk.wait_for();
        let engine = engine::scripted::Scripted::new(disk.file().clone(), faults)?;
        Ok(Self::with_engine(disk, queues, Box::new(engine)))
    }

    /// A device that waits for `disk` by the best engine, or by threads, even if it is in memory.
    ///
    /// # Errors
    /// The process is out of file descriptors.
    #[cfg(feature = "test-support")]
    pub fn waiting(mut disk: Disk, queues: usize, by_threads: bool) -> io::Result<Self> {
        disk.wait_for();
        let file = disk.file();
        let engine = match by_threads {
            true => engine::by_threads(file)?,
            false => engine::best(file, DEPTH)?,
        };
        Ok(Self::with_engine(disk, queues, engine))
    }

    /// A device whose operations on `disk` are performed by `engine`.
    fn with_engine(disk: Disk, queues: usize, engine: Box<dyn Engine>) -> Self {
        Self {
            disk,
            under_way: UnderWay::new(engine),
            engine_failed: false,
            queues: (0..queues).map(|_| OfQueue::default()).collect(),
            turn: 0,
            flushes: false,
            failures: RateLimit::default(),
        }
    }

    fn served_by(&self) -> &'static str {
        match self.disk.is_in_memory() {
            true => "memory",
            false => self.under_way.engine(),
        }
    }

    /// Goes on with what is under way, and takes new requests.
    fn go_on(
        &mut self,
        queues: &mut [Virtqueue],
        memory: &mut DeviceMemory,
    ) -> Result<(), Unserved> {
        self.under_way.collect(&mut self.disk);
        self.advance(queues, memory)?;
        self.take_all(queues, memory)?;
        // What the host has in its memory is there when this returns: it is collected at once.
        self.under_way.submit().map_err(engine_failed)?;
        self.under_way.collect(&mut self.disk);
        self.advance(queues, memory)?;
        for number in 0..queues.len() {
            self.give_back(number, queues, memory)?;
        }
        Ok(())
    }

    /// Takes new requests: one from each queue in turn, since they share the room that there is. At
    /// most as many as the queues hold.
    fn take_all(
        &mut self,
        queues: &mut [Virtqueue],
        memory: &mut DeviceMemory,
    ) -> Result<(), Unserved> {
        for _ in 0..queues.len() * usize::from(QUEUE_SIZE) {
            if !self.is_filled() || !self.under_way.has_room() {
                return Ok(());
            }
            let number = self.turn;
            self.turn = if number + 1 < queues.len() { number + 1 } else { 0 };
            self.take(number, queues, memory)?;
        }
        Ok(())
    }

    /// Takes a new request from queue `number`, if it has one.
    fn take(
        &mut self,
        number: usize,
        queues: &mut [Virtqueue],
        memory: &mut DeviceMemory,
    ) -> Result<(), Unserved> {
        let filled = self.queues.get(number).is_some_and(|queue| queue.filled);
        let Some(queue) = queues.get_mut(number).filter(|_| filled) else { return Ok(()) };
        match queue.pop(memory)? {
            Some(chain) => {
                let flush = !self.flushes;
                let request = Request::new(memory, number, chain, &self.disk, flush)?;
                queue.keep();
                self.under_way.add(request, &self.disk);
                self.advance(queues, memory)?;
            }
            None if queue.enable_notification(memory)? => queue.disable_notification(memory)?,
            None => self.set_filled(number, false),
        }
        Ok(())
    }

    /// Whether a queue may have new requests.
    fn is_filled(&self) -> bool {
        self.queues.iter().any(|queue| queue.filled)
    }

    fn set_filled(&mut self, number: usize, filled: bool) {
        if let Some(queue) = self.queues.get_mut(number) {
            queue.filled = filled;
        }
    }

    /// Advances requests as far as they go without the disk.
    fn advance(
        &mut self,
        queues: &mut [Virtqueue],
        memory: &mut DeviceMemory,
    ) -> Result<(), Unserved> {
        while let Some(over) = self.under_way.advance(memory, &self.disk)? {
            let Over { queue: number, head, written, length, failure } = over;
            if let Some(failure) = failure {
                if let (Failure::NotCopied(_), Some(queue)) = (&failure, queues.get(number)) {
                    queue.counters().unreachable.count();
                }
                let disk = self.disk.path().display();
                self.failures.warn(format_args!("blk: {disk}: {failure}"));
            }
            let Some(queue) = self.queues.get_mut(number) else { continue };
            queue.over.push((head, written));
            queue.bytes = queue.bytes.saturating_add(length);
            if queue.over.len() >= BATCH || queue.bytes >= BATCH_BYTES {
                self.give_back(number, queues, memory)?;
            }
        }
        Ok(())
    }

    /// Returns the requests of queue `number` that are over to the driver.
    fn give_back(
        &mut self,
        number: usize,
        queues: &mut [Virtqueue],
        memory: &mut DeviceMemory,
    ) -> Result<(), Unserved> {
        if let (Some(of_queue), Some(queue)) = (self.queues.get_mut(number), queues.get_mut(number))
        {
            queue.give_back(memory, &of_queue.over)?;
            of_queue.bytes = 0;
            let counters = queue.counters();
            of_queue.over.drain(..).for_each(|_| counters.done.count());
            // Not before: if this is not allowed now, they are not returned once more.
            queue.interrupt(memory)?;
        }
        Ok(())
    }
}

/// The device cannot continue without its engine.
fn engine_failed(error: io::Error) -> Broken {
    Broken::Device(format!("its requests to the host: {error}"))
}

impl Backend for Block {
    fn model(&self) -> Model {
        let disk = &self.disk;
        let features = Features::default()
            .with(VIRTIO_BLK_F_SEG_MAX)
            .with(VIRTIO_BLK_F_BLK_SIZE)
            .with(VIRTIO_BLK_F_FLUSH);
        let features = match self.queues.len() {
            1 => features,
            _ => features.with(VIRTIO_BLK_F_MQ),
        };
        let features = if disk.is_read_only() { features.with(VIRTIO_BLK_F_RO) } else { features };
        let config = Config {
            capacity: (disk.size() / SECTOR_SIZE).into(),
            size_max: 0.into(),
            seg_max: SEG_MAX.into(),
            geometry: 0.into(),
            blk_size: disk.block_size().into(),
            topology: 0.into(),
            writeback: 0,
            unused: 0,
            // At most MAX_QUEUES.
            num_queues: (self.queues.len() as u16).into(),
        };
        Model {
            name: "blk",
            device_type: VIRTIO_ID_BLOCK as u16,
            // Mass storage, other.
            class: 0x01_8000,
            features,
            queue_sizes: QUEUE_SIZES.get(..self.queues.len()).unwrap_or(&QUEUE_SIZES),
            config: config.as_bytes().to_vec(),
        }
    }

    fn host(&self) -> String {
        self.disk.path().display().to_string()
    }

    fn start(&mut self, features: Features) -> Result<(), Broken> {
        self.flushes = features.has(VIRTIO_BLK_F_FLUSH);
        if self.engine_failed {
            let engine = engine::best(self.disk.file(), DEPTH).map_err(engine_failed)?;
            // With the former engine, the former driver's requests end.
            self.under_way = UnderWay::new(engine);
            self.engine_failed = false;
        }
        Ok(())
    }

    fn served_by(&self) -> Option<&'static str> {
        Some(Self::served_by(self))
    }

    fn input(&self) -> Option<RawFd> {
        Some(self.under_way.event())
    }

    fn serve(
        &mut self,
        number: usize,
        queues: &mut [Virtqueue],
        memory: &mut DeviceMemory,
    ) -> Result<bool, Unserved> {
        self.set_filled(number, true);
        if let Some(queue) = queues.get_mut(number) {
            queue.disable_notification(memory)?;
        }
        let result = self.go_on(queues, memory);
        // Whatever happened, what was begun gets under way: it is waited for.
        self.under_way.submit().map_err(engine_failed)?;
        result?;
        Ok(self.under_way.has_room() && self.is_filled())
    }

    fn stop(&mut self) {
        if let Err(error) = self.under_way.end(&mut self.disk) {
            log::error!("blk: {}: {error}", self.disk.path().display());
            self.engine_failed = true;
        }
        for queue in &mut self.queues {
            *queue = OfQueue::default();
        }
    }
}
