// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The requests that are under way: those that wait for the disk, and those that do not.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;

use super::buffers::Buffers;
use super::disk::Disk;
use super::engine::{Action, Engine, Finished};
use super::request::{Advance, Failure, Request};
use crate::devices::virtio::chain::Unserved;
use crate::devices::virtio::memory::DeviceMemory;

/// Requests under way at most.
pub(super) const DEPTH: usize = 128;

/// A request that is over: its status is written.
#[derive(Debug)]
pub(super) struct Over {
    /// The number of its queue.
    pub queue: usize,
    /// Its first descriptor.
    pub head: u16,
    /// Bytes written to its buffers.
    pub written: u32,
    /// Bytes of its data.
    pub length: u64,
    /// Why it failed, if it did.
    pub failure: Option<Failure>,
}

/// The requests under way at a disk.
#[derive(Debug)]
pub(super) struct UnderWay {
    engine: Box<dyn Engine>,
    buffers: Buffers,
    /// By tag.
    requests: Vec<Option<Request>>,
    /// Tags without a request.
    free: Vec<usize>,
    /// Tags of requests that do not wait for the disk.
    ready: VecDeque<usize>,
    /// Operations that the engine has.
    at_disk: usize,
}

impl UnderWay {
    /// None yet, and a disk on which `engine` performs operations.
    pub fn new(engine: Box<dyn Engine>) -> Self {
        Self {
            engine,
            buffers: Buffers::default(),
            requests: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH).rev().collect(),
            ready: VecDeque::with_capacity(DEPTH),
            at_disk: 0,
        }
    }

    /// Whether one more can be added.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty() && self.buffers.has_room()
    }

    /// Adds a request, if there is room: the caller has looked.
    pub fn add(&mut self, mut request: Request, disk: &Disk) {
        let Some(tag) = self.free.pop() else { return };
        if let needed @ 1.. = request.buffer_needed(disk) {
            request.set_buffer(self.buffers.take(needed));
        }
        if let Some(place) = self.requests.get_mut(tag) {
            *place = Some(request);
            self.ready.push_back(tag);
        }
    }

    /// Collects what the disk has finished.
    pub fn collect(&mut self, disk: &mut Disk) {
        while let Some(finished) = self.next_finished(disk) {
            let tag = finished.operation.tag;
            let Some(Some(request)) = self.requests.get_mut(tag) else { continue };
            match request.finished(finished) {
                Some(rest) => {
                    self.engine.begin(rest);
                    self.at_disk += 1;
                }
                None => self.ready.push_back(tag),
            }
        }
    }

    /// Advances the requests that do not wait for the disk, until one is over. Operations that they
    /// begin are under way after [`Self::submit`].
    ///
    /// # Errors
    /// As for [`Request::advance`]: the request that it concerns stays the next one.
    pub fn advance(
        &mut self,
        memory: &mut DeviceMemory,
        disk: &Disk,
    ) -> Result<Option<Over>, Unserved> {
        while let Some(tag) = self.ready.front().copied() {
            let advance = match self.requests.get_mut(tag) {
                Some(Some(request)) => Some(request.advance(memory, disk, tag)?),
                _ => None,
            };
            self.ready.pop_front();
            match advance {
                Some(Advance::Begin(operation)) => {
                    self.engine.begin(operation);
                    self.at_disk += 1;
                }
                Some(Advance::Over { written, failure }) => {
                    let Some(request) = self.requests.get_mut(tag).and_then(Option::take) else {
                        continue;
                    };
                    self.free.push(tag);
                    let (queue, head, length) = (request.queue(), request.head(), request.length());
                    self.buffers.give_back(request.into_buffer());
                    return Ok(Some(Over { queue, head, written, length, failure }));
                }
                None => {}
            }
        }
        Ok(None)
    }

    /// The disk gets the operations that were begun.
    ///
    /// # Errors
    /// As for [`Engine::submit`].
    pub fn submit(&mut self) -> io::Result<()> {
        self.engine.submit()
    }

    /// Waits for what the disk has, and forgets all requests.
    ///
    /// # Errors
    /// As for [`Engine::wait`]: the engine may have operations that are not finished, so this is of
    /// no use any more, and to be dropped. Nobody is to hear of its requests.
    pub fn end(&mut self, disk: &mut Disk) -> io::Result<()> {
        self.submit()?;
        while self.at_disk > 0 {
            match self.next_finished(disk) {
                Some(finished) => {
                    let tag = finished.operation.tag;
                    if let Some(Some(request)) = self.requests.get_mut(tag) {
                        request.set_buffer(finished.operation.buffer);
                    }
                }
                None => self.engine.wait()?,
            }
        }
        self.ready.clear();
        self.free = (0..self.requests.len()).rev().collect();
        for request in self.requests.iter_mut().filter_map(Option::take) {
            self.buffers.give_back(request.into_buffer());
        }
        Ok(())
    }

    /// The name of the engine.
    pub fn engine(&self) -> &'static str {
        self.engine.name()
    }

    /// What becomes readable when the disk has finished something.
    pub fn event(&self) -> RawFd {
        self.engine.event()
    }

    fn next_finished(&mut self, disk: &mut Disk) -> Option<Finished> {
        let mut finished = self.engine.finished()?;
        self.at_disk = self.at_disk.saturating_sub(1);
        if finished.operation.action == Action::Flush && !finished.may_be_tried_again() {
            if let Err(error) = &finished.result {
                disk.flush_failed(error);
            }
            if disk.may_have_lost_writes() {
                finished.result = Err(io::Error::from_raw_os_error(libc::EIO));
            }
        }
        Some(finished)
    }
}
