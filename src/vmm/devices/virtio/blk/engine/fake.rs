// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk whose operations are finished when a test says so, in any order.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use twostage::patience::wait_until;
use twostage::sync::{Condvar, Mutex};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use super::{Action, Engine, Finished, Operation};

/// The test's end: the disk.
#[derive(Debug, Clone)]
pub struct FakeDisk(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    event: EventFd,
}

#[derive(Debug, Default)]
struct State {
    contents: Vec<u8>,
    /// Operations that were begun and not submitted.
    begun: Vec<Operation>,
    under_way: Vec<Operation>,
    finished: VecDeque<Finished>,
    submissions: usize,
    /// Nothing can be submitted, and nothing waited for.
    broken: bool,
    /// The device waits for the disk.
    waits: bool,
}

/// The device's end.
#[derive(Debug)]
pub struct FakeEngine(FakeDisk);

impl FakeDisk {
    pub fn new(contents: Vec<u8>) -> (Self, Box<FakeEngine>) {
        let state = Mutex::new(State { contents, ..State::default() });
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let disk = Self(Arc::new(Shared { state, changed: Condvar::new(), event }));
        (disk.clone(), Box::new(FakeEngine(disk)))
    }

    pub fn contents(&self) -> Vec<u8> {
        self.0.state.lock().contents.clone()
    }

    /// Waits until `count` operations are under way; what they do: action, offset and length.
    pub fn wait_for(&self, count: usize) -> Vec<(Action, u64, usize)> {
        wait_until("operations", || self.0.state.lock().under_way.len() >= count);
        self.under_way()
    }

    pub fn under_way(&self) -> Vec<(Action, u64, usize)> {
        let state = self.0.state.lock();
        let what = |op: &Operation| (op.action, op.offset, op.part.len());
        state.under_way.iter().map(what).collect()
    }

    pub fn submissions(&self) -> usize {
        self.0.state.lock().submissions
    }

    /// From now on the engine fails, or does not.
    pub fn set_broken(&self, broken: bool) {
        self.0.state.lock().broken = broken;
    }

    /// Waits until the device waits for the disk, and does nothing else.
    pub fn wait_for_waiter(&self) {
        wait_until("the device", || self.0.state.lock().waits);
    }

    /// Finishes the operation `number` of those under way, for at most `most` bytes.
    pub fn finish(&self, number: usize, most: usize) {
        let mut state = self.0.state.lock();
        let finished = state.finish(number, most);
        state.finished.push_back(finished);
        self.tell();
    }

    /// Finishes all operations that are under way at once.
    pub fn finish_all(&self) {
        let mut state = self.0.state.lock();
        while !state.under_way.is_empty() {
            let finished = state.finish(0, usize::MAX);
            state.finished.push_back(finished);
        }
        self.tell();
    }

    /// The operation `number` of those under way fails.
    pub fn fail(&self, number: usize, error: i32) {
        let mut state = self.0.state.lock();
        let operation = state.under_way.remove(number);
        let result = Err(io::Error::from_raw_os_error(error));
        state.finished.push_back(Finished { operation, result });
        self.tell();
    }

    fn tell(&self) {
        self.0.changed.notify_all();
        self.0.event.write(1).unwrap();
    }
}

impl State {
    fn finish(&mut self, number: usize, most: usize) -> Finished {
        let mut operation = self.under_way.remove(number);
        let from = operation.offset as usize;
        let length = operation.part.len().min(most).min(self.contents.len() - from);
        let on_disk = &mut self.contents[from..from + length];
        match operation.action {
            Action::Read => operation.bytes()[..length].copy_from_slice(on_disk),
            Action::Write => on_disk.copy_from_slice(&operation.bytes()[..length]),
            Action::Flush => {}
        }
        Finished { operation, result: Ok(length) }
    }
}

impl Engine for FakeEngine {
    fn name(&self) -> &'static str {
        "test"
    }

    fn begin(&mut self, operation: Operation) {
        let mut state = self.0 .0.state.lock();
        let tags = state.under_way.iter().chain(&state.begun).map(|operation| operation.tag);
        assert!(tags.into_iter().all(|tag| tag != operation.tag), "a tag is used twice");
        state.begun.push(operation);
    }

    fn submit(&mut self) -> io::Result<()> {
        let mut state = self.0 .0.state.lock();
        if state.broken {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        let begun = std::mem::take(&mut state.begun);
        state.submissions += usize::from(!begun.is_empty());
        state.under_way.extend(begun);
        Ok(())
    }

    fn finished(&mut self) -> Option<Finished> {
        self.0 .0.state.lock().finished.pop_front()
    }

    fn wait(&mut self) -> io::Result<()> {
        let mut state = self.0 .0.state.lock();
        state.waits = true;
        let waits = |state: &mut State| state.finished.is_empty() && !state.under_way.is_empty();
        self.0 .0.changed.wait_while(state, waits).waits = false;
        Ok(())
    }

    fn event(&self) -> RawFd {
        self.0 .0.event.as_raw_fd()
    }
}
