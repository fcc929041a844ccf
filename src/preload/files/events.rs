// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Fault queues and vEVENTQs: files that poll as readable when there is something to read.
//!
//! While there is, a message of the owner is pending in the descriptor's socket. A read that takes
//! the last event also takes the message. Events that are dropped unread leave it behind: the
//! descriptor then polls as readable once more, and the read finds nothing. A socket is always
//! writable, so a vEVENTQ polls as writable, unlike Linux's.

use std::sync::{Arc, MutexGuard, Weak};
use twostage::sync::Mutex;

use twostage::iommufd::{Errno, Readiness};
use twostage_emulated::EventFile;

use crate::files::file::{Answer, Call, Caller, File};
use crate::internal::Internal;
use crate::sys;

/// An open fault queue or vEVENTQ.
#[derive(Debug)]
pub struct Events {
    file: EventFile,
    /// Whether a message is pending.
    told: Arc<Mutex<bool>>,
}

impl Events {
    /// The descriptor's side of `file`.
    pub fn new(file: EventFile) -> Self {
        Self { file, told: Arc::default() }
    }
}

fn lock(told: &Mutex<bool>) -> MutexGuard<'_, bool> {
    told.lock()
}

impl File for Events {
    fn name(&self) -> String {
        "events".to_owned()
    }

    fn call(&self, caller: &dyn Caller, call: Call) -> Result<Answer, Errno> {
        let done = match call {
            Call::Read { to, count, offset: None } => self.file.read(caller, to, count as usize)?,
            Call::Write { from, count, offset: None } => {
                self.file.write(caller, from, count as usize)?
            }
            Call::Read { .. } | Call::Write { .. } => return Err(Errno::from_raw(libc::ESPIPE)),
            Call::Ioctl { .. } => return Err(Errno::ENOTTY),
        };
        let mut told = lock(&self.told);
        let take_message = *told && !self.file.readable();
        *told &= !take_message;
        Ok(Answer { value: done as i64, take_message })
    }

    fn opened(&self, end: &Arc<Internal>) {
        let (told, end) = (self.told.clone(), Arc::downgrade(end));
        self.file.watch(Arc::new(Watcher { told, end }));
    }
}

/// Keeps the descriptor in sync with the queue.
struct Watcher {
    told: Arc<Mutex<bool>>,
    end: Weak<Internal>,
}

impl Readiness for Watcher {
    fn changed(&self, readable: bool) {
        let mut told = lock(&self.told);
        let Some(end) = self.end.upgrade().filter(|_| readable && !*told) else { return };
        // Fails if the last descriptor is closed: then nobody polls.
        *told = sys::send(end.raw(), &[0], None).is_ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, OwnedFd};

    use rustix::event::PollFlags;

    fn polls_readable(fd: &OwnedFd) -> bool {
        sys::events(fd.as_raw_fd()).contains(PollFlags::IN)
    }

    #[test]
    fn a_descriptor_polls_as_readable_while_a_message_waits() {
        let (fd, end) = sys::socket_pair().unwrap();
        let end = Arc::new(Internal::new(end));
        let told: Arc<Mutex<bool>> = Arc::default();
        let watcher = Watcher { told: told.clone(), end: Arc::downgrade(&end) };
        watcher.changed(false);
        assert!(!polls_readable(&fd));
        watcher.changed(true);
        watcher.changed(true);
        assert!(polls_readable(&fd));
        // As done by a read that takes the last event.
        *lock(&told) = false;
        assert_eq!(sys::receive(fd.as_raw_fd(), &mut [0], false).unwrap().unwrap().0, 1);
        assert!(!polls_readable(&fd), "one message, however often it is told");
        watcher.changed(true);
        assert!(polls_readable(&fd));
        drop(end);
        watcher.changed(true);
    }
}
