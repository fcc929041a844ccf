// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vEVENTQs: numbered events of a vIOMMU, up to a limit.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use super::{transferred, Output, Watcher};
use crate::host::refusal::{refuse, Outcome};
use twostage::iommufd::{Errno, Readiness, Vevent};

/// Maximum depth of a queue.
pub(crate) const MAX_DEPTH: u32 = 1 << 19;
/// Size of `struct iommufd_vevent_header`, in bytes.
const HEADER_SIZE: usize = 8;
/// The maximum sequence number; then they wrap to 0.
const MAX_SEQUENCE: u32 = i32::MAX as u32;

/// The vEVENTQs of one vIOMMU, by type.
#[derive(Debug, Default)]
pub(crate) struct ViommuEvents(Mutex<BTreeMap<u32, Arc<VeventQueue>>>);

impl ViommuEvents {
    /// Reports an event: `data` in the layout of `kind`.
    ///
    /// # Errors
    /// `EOPNOTSUPP` there is no queue for this type.
    pub fn report(&self, kind: u32, data: &[u8]) -> Outcome<()> {
        match self.queues().get(&kind).cloned() {
            Some(queue) => {
                queue.report(data);
                Ok(())
            }
            None => refuse(Errno::EOPNOTSUPP, format!("there is no vEVENTQ of type {kind:#x}")),
        }
    }

    /// Whether there is a queue of this type.
    pub fn has(&self, kind: u32) -> bool {
        self.queues().contains_key(&kind)
    }

    /// A new queue of a type that has none.
    pub fn add(&self, kind: u32, depth: u32) -> Arc<VeventQueue> {
        let queue =
            Arc::new(VeventQueue { depth, state: Mutex::default(), watcher: Watcher::default() });
        self.queues().insert(kind, queue.clone());
        queue
    }

    /// Removes the queue of this type.
    pub fn remove(&self, kind: u32) {
        self.queues().remove(&kind);
    }

    fn queues(&self) -> MutexGuard<'_, BTreeMap<u32, Arc<VeventQueue>>> {
        self.0.lock()
    }
}

/// One vEVENTQ.
#[derive(Debug)]
pub(crate) struct VeventQueue {
    /// Maximum number of events.
    depth: u32,
    state: Mutex<State>,
    watcher: Watcher,
}

#[derive(Debug, Default)]
struct State {
    /// Number and data, oldest first.
    events: VecDeque<(u32, Vec<u8>)>,
    /// Events were lost after the last one: the number of the last lost one.
    lost: Option<u32>,
    /// Number of the next event.
    sequence: u32,
}

impl State {
    fn is_empty(&self) -> bool {
        self.events.is_empty() && self.lost.is_none()
    }

    /// The header and the data of the next record to be read.
    fn front(&self) -> Option<([u8; HEADER_SIZE], &[u8])> {
        let lost = || self.lost.map(|sequence| (header(1, sequence), &[][..]));
        let event = self.events.front();
        event.map(|(sequence, data)| (header(0, *sequence), data.as_slice())).or_else(lost)
    }

    fn pop(&mut self) {
        if self.events.pop_front().is_none() {
            self.lost = None;
        }
    }
}

impl VeventQueue {
    fn report(&self, data: &[u8]) {
        let mut state = self.state();
        let sequence = state.sequence;
        state.sequence = sequence.wrapping_add(1) & MAX_SEQUENCE;
        // A gap in the numbers is enough; only the end needs the note.
        state.lost = None;
        if state.events.len() < self.depth as usize {
            state.events.push_back((sequence, data.to_vec()));
        } else {
            state.lost = Some(sequence);
        }
        self.watcher.tell(true);
    }

    /// Reads whole events into `count` bytes.
    ///
    /// # Errors
    /// `EINVAL` there is no room for a header, or for the first event; those of `output`.
    pub fn read(&self, count: usize, output: Output<'_>) -> Outcome<usize> {
        if count < HEADER_SIZE {
            return refuse(Errno::EINVAL, format!("{count} bytes of events"));
        }
        let mut state = self.state();
        let mut done = 0;
        let mut outcome = Ok(());
        while let Some((header, data)) = state.front() {
            let size = HEADER_SIZE + data.len();
            if size > count - done {
                outcome = refuse(Errno::EINVAL, "the first event does not fit");
                break;
            }
            outcome = output(done, &header);
            if outcome.is_ok() && !data.is_empty() {
                outcome = output(done + HEADER_SIZE, data);
            }
            if outcome.is_err() {
                break;
            }
            done += size;
            state.pop();
        }
        self.watcher.tell(!state.is_empty());
        transferred(done, outcome)
    }

    /// Takes the next record, if there is one.
    pub fn next(&self) -> Option<Vevent> {
        let mut state = self.state();
        let next = match state.events.pop_front() {
            Some((sequence, data)) => Vevent::Event { sequence, data },
            None => Vevent::Lost { sequence: state.lost.take()? },
        };
        self.watcher.tell(!state.is_empty());
        Some(next)
    }

    /// Whether there is something to read.
    pub fn readable(&self) -> bool {
        !self.state().is_empty()
    }

    /// Notifies `watcher` of the current state and of changes.
    pub fn watch(&self, watcher: Arc<dyn Readiness>) {
        let state = self.state();
        self.watcher.set(watcher, !state.is_empty());
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

/// `struct iommufd_vevent_header`.
fn header(flags: u32, sequence: u32) -> [u8; HEADER_SIZE] {
    let [a, b, c, d] = flags.to_ne_bytes();
    let [e, f, g, h] = sequence.to_ne_bytes();
    [a, b, c, d, e, f, g, h]
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: u32 = 1;

    fn queue(depth: u32) -> (ViommuEvents, Arc<VeventQueue>) {
        let events = ViommuEvents::default();
        let queue = events.add(KIND, depth);
        (events, queue)
    }

    fn read(queue: &VeventQueue, count: usize) -> Result<Vec<u8>, Errno> {
        let mut bytes = Vec::new();
        let done = queue.read(count, &mut |offset, piece| {
            assert_eq!(offset, bytes.len());
            bytes.extend_from_slice(piece);
            Ok(())
        });
        assert_eq!(done.map_err(|refusal| refusal.errno)?, bytes.len());
        Ok(bytes)
    }

    fn all(queue: &VeventQueue) -> Vec<Vevent> {
        std::iter::from_fn(|| queue.next()).collect()
    }

    fn event(sequence: u32) -> Vevent {
        Vevent::Event { sequence, data: vec![9; 4] }
    }

    #[test]
    fn events_are_numbered_and_of_their_type() {
        let (events, queue) = queue(4);
        assert_eq!(events.report(2, &[0]).unwrap_err().errno, Errno::EOPNOTSUPP);
        assert!(events.has(KIND) && !events.has(2));
        events.report(KIND, &[9; 4]).unwrap();
        events.report(KIND, &[9; 4]).unwrap();
        assert_eq!(all(&queue), [event(0), event(1)]);
        events.remove(KIND);
        assert_eq!(events.report(KIND, &[0]).unwrap_err().errno, Errno::EOPNOTSUPP);
    }

    #[test]
    fn a_full_queue_notes_that_events_are_lost() {
        let (events, queue) = queue(2);
        for _ in 0..4 {
            events.report(KIND, &[9; 4]).unwrap();
        }
        assert_eq!(all(&queue), [event(0), event(1), Vevent::Lost { sequence: 3 }]);
        events.report(KIND, &[9; 4]).unwrap();
        assert_eq!(all(&queue), [event(4)]);
    }

    #[test]
    fn the_note_gives_way_to_an_event_that_comes_after() {
        let (events, queue) = queue(1);
        for _ in 0..2 {
            events.report(KIND, &[9; 4]).unwrap();
        }
        assert_eq!(queue.next(), Some(event(0)));
        events.report(KIND, &[9; 4]).unwrap();
        assert_eq!(all(&queue), [event(2)], "number 1 is missing");
    }

    #[test]
    fn numbers_come_round_within_31_bits() {
        let (events, queue) = queue(4);
        queue.state().sequence = MAX_SEQUENCE;
        events.report(KIND, &[9; 4]).unwrap();
        events.report(KIND, &[9; 4]).unwrap();
        assert_eq!(all(&queue), [event(MAX_SEQUENCE), event(0)]);
    }

    #[test]
    fn whole_events_are_read() {
        let (events, queue) = queue(2);
        for count in [0, 7] {
            assert_eq!(read(&queue, count), Err(Errno::EINVAL), "{count}");
        }
        assert_eq!(read(&queue, 8), Ok(Vec::new()));
        for _ in 0..3 {
            events.report(KIND, &[9; 4]).unwrap();
        }
        assert_eq!(read(&queue, 8), Err(Errno::EINVAL), "no room for the data");
        let first: Vec<u8> = [header(0, 0).as_slice(), &[9; 4]].concat();
        assert_eq!(read(&queue, 23).unwrap(), first);
        let rest = [header(0, 1).as_slice(), &[9; 4], &header(1, 2)].concat();
        assert_eq!(read(&queue, 100).unwrap(), rest);
        assert!(!queue.readable());
    }

    #[test]
    fn what_could_not_be_copied_is_read_again() {
        let (events, queue) = queue(2);
        events.report(KIND, &[9; 4]).unwrap();
        for fails_at in [0, HEADER_SIZE] {
            let outcome = queue.read(12, &mut |offset, _| match offset == fails_at {
                true => refuse(Errno::EFAULT, "no memory"),
                false => Ok(()),
            });
            assert_eq!(outcome.unwrap_err().errno, Errno::EFAULT);
        }
        assert_eq!(all(&queue), [event(0)]);
    }
}
