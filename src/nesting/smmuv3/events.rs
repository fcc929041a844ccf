// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The way back: the events of a vEVENTQ reach the virtual SMMU.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::thread::{self, JoinHandle};

use crate::iommufd::{EventQueue, ObjectId, Readiness, Vevent};
use crate::viommu::smmuv3::{EventRecordWords, EventTarget};

/// Events are numbered modulo 2^31.
const SEQUENCE_MASK: u32 = i32::MAX as u32;

/// Where events go, and how many did.
#[derive(Default)]
pub(super) struct EventRoute {
    target: RwLock<Option<Weak<dyn EventTarget>>>,
    delivered: AtomicU64,
    lost: AtomicU64,
}

impl EventRoute {
    /// From now on events go to `target`, while that lives.
    pub fn set_target(&self, target: Weak<dyn EventTarget>) {
        *self.target.write().unwrap_or_else(PoisonError::into_inner) = Some(target);
    }

    /// Events brought to a target so far.
    pub fn delivered(&self) -> u64 {
        self.delivered.load(Ordering::Relaxed)
    }

    /// Times that events turned out to be lost.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    fn target(&self) -> Option<Arc<dyn EventTarget>> {
        self.target.read().unwrap_or_else(PoisonError::into_inner).as_ref()?.upgrade()
    }

    fn deliver(&self, record: EventRecordWords) {
        if let Some(target) = self.target() {
            target.event(record);
            self.delivered.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn events_lost(&self) {
        self.lost.fetch_add(1, Ordering::Relaxed);
        if let Some(target) = self.target() {
            target.events_lost();
        }
    }
}

impl fmt::Debug for EventRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventRoute")
            .field("delivered", &self.delivered)
            .field("lost", &self.lost)
            .finish_non_exhaustive()
    }
}

/// Reads one vEVENTQ in the order of its events.
struct Reader {
    queue: Arc<dyn EventQueue>,
    route: Arc<EventRoute>,
    /// The number of the next event, if none is lost.
    expected: u32,
}

impl Reader {
    /// Reads the queue until it is empty.
    fn drain(&mut self) {
        loop {
            match self.queue.next_event() {
                Ok(Some(event)) => self.bring(&event),
                Ok(None) => return,
                Err(error) => {
                    log::error!("events of the guest's streams are not read: {error}");
                    self.route.events_lost();
                    return;
                }
            }
        }
    }

    fn bring(&mut self, event: &Vevent) {
        let (Vevent::Event { sequence, .. } | Vevent::Lost { sequence }) = event;
        let gap = *sequence != self.expected;
        self.expected = sequence.wrapping_add(1) & SEQUENCE_MASK;
        let Vevent::Event { data, .. } = event else { return self.route.events_lost() };
        if gap {
            self.route.events_lost();
        }
        match record(data) {
            Some(record) => self.route.deliver(record),
            None => log::error!("an event of {} bytes is no record of an SMMU", data.len()),
        }
    }
}

/// The four little-endian words of `struct iommu_vevent_arm_smmuv3`.
fn record(data: &[u8]) -> Option<EventRecordWords> {
    let (words, rest) = data.as_chunks::<8>();
    let words: [[u8; 8]; 4] = words.try_into().ok()?;
    rest.is_empty().then(|| words.map(u64::from_le_bytes))
}

/// What the thread waits for.
#[derive(Debug, Default)]
struct Signal {
    wanted: Mutex<Wanted>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Wanted {
    readable: bool,
    stop: bool,
}

impl Signal {
    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is something to read; false: until it is time to stop.
    fn wait(&self) -> bool {
        let idle = |wanted: &mut Wanted| !wanted.readable && !wanted.stop;
        let mut wanted =
            self.changed.wait_while(self.wanted(), idle).unwrap_or_else(PoisonError::into_inner);
        // What comes after the queue was found empty is told anew.
        wanted.readable = false;
        !wanted.stop
    }

    fn stop(&self) {
        self.wanted().stop = true;
        self.changed.notify_all();
    }
}

impl Readiness for Signal {
    fn changed(&self, readable: bool) {
        self.wanted().readable |= readable;
        self.changed.notify_all();
    }
}

/// A thread that reads one vEVENTQ, and takes no lock of nesting: whoever holds one may be waiting
/// for the virtual SMMU, which the thread calls.
#[derive(Debug)]
pub(super) struct EventThread {
    object: ObjectId,
    signal: Arc<Signal>,
    thread: Option<JoinHandle<()>>,
}

impl EventThread {
    /// Starts to bring the events of `queue` along `route`.
    pub fn start(queue: Arc<dyn EventQueue>, route: Arc<EventRoute>) -> io::Result<Self> {
        let object = queue.object();
        let signal = Arc::<Signal>::default();
        let waited_for = signal.clone();
        let watched = queue.clone();
        let mut reader = Reader { queue, route, expected: 0 };
        let thread = thread::Builder::new().name("smmu-events".into()).spawn(move || {
            while waited_for.wait() {
                reader.drain();
            }
        })?;
        watched.watch(signal.clone());
        Ok(Self { object, signal, thread: Some(thread) })
    }

    /// The vEVENTQ.
    pub fn object(&self) -> ObjectId {
        self.object
    }

    /// Ends the thread and closes the vEVENTQ, which can then be destroyed.
    pub fn stop(self) -> ObjectId {
        self.object
    }
}

impl Drop for EventThread {
    /// Ends the thread, and closes the queue with it.
    fn drop(&mut self) {
        self.signal.stop();
        let Some(thread) = self.thread.take() else { return };
        // The last owner of the virtual SMMU may be the thread itself, which called it: it ends by
        // itself, right after.
        if thread.thread().id() != thread::current().id() && thread.join().is_err() {
            log::error!("the thread that brings events ended early");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Target(Mutex<Vec<Option<u64>>>);

    impl EventTarget for Target {
        fn event(&self, record: EventRecordWords) {
            self.0.lock().unwrap().push(Some(record[2]));
        }

        fn events_lost(&self) {
            self.0.lock().unwrap().push(None);
        }
    }

    #[derive(Debug)]
    struct NoQueue;

    impl EventQueue for NoQueue {
        fn object(&self) -> ObjectId {
            ObjectId(1)
        }

        fn next_event(&self) -> crate::iommufd::Result<Option<Vevent>> {
            Ok(None)
        }

        fn watch(&self, _: Arc<dyn Readiness>) {}
    }

    fn event(sequence: u32, address: u64) -> Vevent {
        let data = [0x10, 0, address, 0].into_iter().flat_map(u64::to_le_bytes).collect();
        Vevent::Event { sequence, data }
    }

    #[test]
    fn a_loss_is_told_whether_the_host_says_so_or_a_number_is_missing() {
        let target = Arc::new(Target::default());
        let route = Arc::<EventRoute>::default();
        let weak: Weak<Target> = Arc::downgrade(&target);
        route.set_target(weak);
        let mut reader = Reader { queue: Arc::new(NoQueue), route: route.clone(), expected: 0 };
        let last = SEQUENCE_MASK;
        for next in [event(0, 1), Vevent::Lost { sequence: 1 }, event(2, 2), event(5, 3)] {
            reader.bring(&next);
        }
        assert_eq!(*target.0.lock().unwrap(), [Some(1), None, Some(2), None, Some(3)]);
        target.0.lock().unwrap().clear();
        for next in [event(last, 4), event(0, 5), Vevent::Event { sequence: 1, data: vec![0; 31] }]
        {
            reader.bring(&next);
        }
        assert_eq!(*target.0.lock().unwrap(), [None, Some(4), Some(5)]);
        assert_eq!((route.delivered(), route.lost()), (5, 3));
    }
}
