// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Operations on a disk that are under way while its device goes on: by io_uring, or where that is
//! forbidden, by threads.
//!
//! An operation owns its buffer until it is finished. It never refers to the guest's memory: so it
//! may take as long as the disk does, or for ever, and nobody who takes memory away from the device
//! waits for it. The price is a copy, which is a bounded piece of work; how long a disk takes is
//! not. (An operation on guest memory could not be taken back: neither a thread in a system call
//! nor io_uring's, on a file, can be told to stop.)

#[cfg(test)]
pub(super) mod fake;
#[cfg(feature = "test-support")]
pub(super) mod scripted;
mod threads;
mod uring;

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::Arc;

use super::buffers::BounceBuffer;
use super::image_file;
use crate::process::jail;
use threads::Threads;
use uring::Uring;

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// Reads from the disk into the buffer.
    Read,
    /// Writes the buffer to the disk.
    Write,
    /// Brings everything that was written to the medium; needs no buffer.
    Flush,
}

/// An operation on a disk.
#[derive(Debug)]
pub(super) struct Operation {
    /// Tells operations under way apart: less than the engine's depth.
    pub tag: usize,
    pub action: Action,
    /// Where on the disk, in bytes.
    pub offset: u64,
    pub buffer: BounceBuffer,
    /// The bytes of the buffer that are read or written.
    pub part: Range<usize>,
}

impl Operation {
    /// The bytes that are read or written.
    fn bytes(&mut self) -> &mut [u8] {
        self.buffer.bytes().get_mut(self.part.clone()).unwrap_or_default()
    }
}

/// A finished operation, and how many bytes were read or written: perhaps not all.
#[derive(Debug)]
pub(super) struct Finished {
    pub operation: Operation,
    pub result: io::Result<usize>,
}

impl Finished {
    /// Whether nothing was done, and the system says that it may be tried again: a signal came, or
    /// there are no resources at the moment.
    pub fn may_be_tried_again(&self) -> bool {
        use io::ErrorKind::{Interrupted, WouldBlock};
        self.result.as_ref().is_err_and(|error| matches!(error.kind(), Interrupted | WouldBlock))
    }
}

/// Performs operations on one disk. They finish in any order.
pub(super) trait Engine: fmt::Debug + Send {
    /// Its name, for reports.
    fn name(&self) -> &'static str;

    /// Accepts an operation, which is under way after [`Engine::submit`] at the latest.
    fn begin(&mut self, operation: Operation);

    /// Everything accepted gets under way.
    ///
    /// # Errors
    /// The system's error: the engine is of no use any more.
    fn submit(&mut self) -> io::Result<()>;

    /// The next operation that is finished, if there is one.
    fn finished(&mut self) -> Option<Finished>;

    /// Waits until an operation that is under way is finished, as long as the disk takes.
    ///
    /// # Errors
    /// The system's error: the engine is of no use any more.
    fn wait(&mut self) -> io::Result<()>;

    /// What becomes readable when an operation is finished: edge-triggered.
    fn event(&self) -> RawFd;
}

/// The best engine that the system, and the jail, permit for the disk `file`, with up to `depth`
/// operations.
///
/// # Errors
/// There is none.
pub(super) fn best(file: &Arc<File>, depth: usize) -> io::Result<Box<dyn Engine>> {
    let uring = match () {
        // The jail refuses that, and whoever tries it is no more.
        () if jail::is_inside() => Err(io::ErrorKind::PermissionDenied.into()),
        // Where FUSE has no cache, a short read goes on at its start, and is reported as a whole
        // one, with wrong bytes (Linux 6.18).
        () if image_file::is_of_fuse(file) => Err(io::Error::other("a file of FUSE")),
        () => Uring::new(file.clone(), depth),
    };
    match uring {
        Ok(uring) => Ok(Box::new(uring)),
        Err(error) => {
            log::info!("io_uring is not to be had ({error}): threads wait for disks");
            by_threads(file)
        }
    }
}

/// Threads that wait for the disk `file`.
///
/// # Errors
/// The process is out of file descriptors.
pub(super) fn by_threads(file: &Arc<File>) -> io::Result<Box<dyn Engine>> {
    Ok(Box::new(Threads::new(file.clone())?))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Write;
    use std::thread;

    use seccompiler::{apply_filter, BpfProgram, SeccompAction, SeccompFilter};
    use twostage::skips::not_tested;
    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

    use super::*;

    const DEPTH: usize = 8;

    fn engines(file: &Arc<File>) -> Vec<Box<dyn Engine>> {
        let mut engines: Vec<Box<dyn Engine>> = vec![Box::new(Threads::new(file.clone()).unwrap())];
        match Uring::new(file.clone(), DEPTH) {
            Ok(uring) => engines.push(Box::new(uring)),
            Err(error) => not_tested(format!("no io_uring is to be had ({error})")),
        }
        engines
    }

    fn operation(tag: usize, action: Action, offset: u64, bytes: &[u8]) -> Operation {
        let mut buffer = BounceBuffer::new(4096);
        buffer.bytes()[..bytes.len()].copy_from_slice(bytes);
        Operation { tag, action, offset, buffer, part: 0..bytes.len() }
    }

    /// Waits for all `count` operations; their results and bytes by tag.
    fn all(engine: &mut dyn Engine, count: usize) -> BTreeMap<usize, (io::Result<usize>, Vec<u8>)> {
        let mut all = BTreeMap::new();
        while all.len() < count {
            match engine.finished() {
                Some(Finished { mut operation, result }) => {
                    all.insert(operation.tag, (result, operation.bytes().to_vec()));
                }
                None => engine.wait().unwrap(),
            }
        }
        assert!(engine.finished().is_none());
        all
    }

    #[test]
    fn operations_do_what_they_say_many_at_a_time() {
        let mut temporary = tempfile::NamedTempFile::new().unwrap();
        temporary.write_all(&[0x11; 4096]).unwrap();
        let file = Arc::new(temporary.reopen().unwrap());
        for mut engine in engines(&file) {
            for round in 0..20u8 {
                for tag in 0..DEPTH {
                    let byte = round.wrapping_add(tag as u8);
                    engine.begin(operation(tag, Action::Write, 512 * tag as u64, &[byte; 512]));
                }
                engine.submit().unwrap();
                let written = all(&mut *engine, DEPTH);
                assert!(written.values().all(|(result, _)| *result.as_ref().unwrap() == 512));
                engine.begin(operation(DEPTH - 1, Action::Flush, 0, &[]));
                for tag in 0..DEPTH - 1 {
                    engine.begin(operation(tag, Action::Read, 512 * tag as u64, &[0; 512]));
                }
                engine.submit().unwrap();
                let mut read = all(&mut *engine, DEPTH);
                assert_eq!(read.remove(&(DEPTH - 1)).unwrap().0.unwrap(), 0);
                for (tag, (result, bytes)) in read {
                    assert_eq!((result.unwrap(), bytes[0]), (512, round.wrapping_add(tag as u8)));
                    assert!(bytes.iter().all(|byte| *byte == bytes[0]));
                }
            }
        }
    }

    /// A filter that forbids a system call, for the thread that installs it.
    fn forbid(call: i64) {
        let (others, listed) = (SeccompAction::Allow, SeccompAction::Errno(libc::EPERM as u32));
        let arch = std::env::consts::ARCH.try_into().unwrap();
        let rules = BTreeMap::from([(call, Vec::new())]);
        let filter = SeccompFilter::new(rules, others, listed, arch).unwrap();
        apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
    }

    #[test]
    fn threads_serve_where_io_uring_is_forbidden_in_whole_or_in_part() {
        let mut temporary = tempfile::NamedTempFile::new().unwrap();
        temporary.write_all(&[0x11; 4096]).unwrap();
        let file = Arc::new(temporary.reopen().unwrap());
        for call in
            [libc::SYS_io_uring_setup, libc::SYS_io_uring_register, libc::SYS_io_uring_enter]
        {
            let file = file.clone();
            let forbidden = thread::spawn(move || {
                forbid(call);
                let mut engine = best(&file, DEPTH).unwrap();
                assert_eq!(engine.name(), "threads", "without system call {call}");
                engine.begin(operation(0, Action::Read, 0, &[0; 512]));
                engine.submit().unwrap();
                assert_eq!(all(&mut *engine, 1).remove(&0).unwrap().1, [0x11; 512]);
            });
            forbidden.join().unwrap();
        }
    }

    #[test]
    fn errors_and_ends_are_results() {
        let temporary = tempfile::NamedTempFile::new().unwrap();
        temporary.as_file().set_len(4096).unwrap();
        let file = Arc::new(File::open(temporary.path()).unwrap());
        for mut engine in engines(&file) {
            engine.begin(operation(0, Action::Read, 4096 - 512, &[7; 1024]));
            engine.begin(operation(1, Action::Read, 4096, &[7; 512]));
            engine.begin(operation(2, Action::Write, 0, &[7; 512]));
            engine.submit().unwrap();
            let mut all = all(&mut *engine, 3);
            assert_eq!(all.remove(&0).unwrap().0.unwrap(), 512);
            assert_eq!(all.remove(&1).unwrap().0.unwrap(), 0);
            let error = all.remove(&2).unwrap().0.unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EBADF), "{}", engine.name());
        }
    }

    #[test]
    fn the_event_says_that_something_is_finished() {
        let temporary = tempfile::NamedTempFile::new().unwrap();
        temporary.as_file().set_len(4096).unwrap();
        let file = Arc::new(temporary.reopen().unwrap());
        for mut engine in engines(&file) {
            engine.begin(operation(0, Action::Flush, 0, &[]));
            engine.submit().unwrap();
            let epoll = Epoll::new().unwrap();
            let edges = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
            epoll.ctl(ControlOperation::Add, engine.event(), edges).unwrap();
            // Before the wait or after, once or again.
            for _ in 0..20 {
                assert_eq!(epoll.wait(-1, &mut [EpollEvent::default()]).unwrap(), 1);
                assert!(engine.finished().is_some());
                engine.begin(operation(0, Action::Flush, 0, &[]));
                engine.submit().unwrap();
            }
            engine.wait().unwrap();
            assert!(engine.finished().is_some());
        }
    }
}
