// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The way back: delivers the events of a vEVENTQ to the virtual SMMU.

use crate::sync::{Condvar, Mutex, RwLock};
use std::fmt;
use std::io;
use std::sync::{Arc, MutexGuard, Weak};
use std::time::Duration;

use crate::counters::Counter;
use crate::iommufd::{Errno, EventQueue, HostError, ObjectId, Readiness, Vevent};
use crate::jail;
use crate::threads::{Started, ThreadStart};
use crate::viommu::smmuv3::{EventRecordWords, EventTarget};
use crate::warn_limited;

/// The first and the longest pause after a read failed for lack of memory; each pause is twice as
/// long as the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Events are numbered modulo 2^31.
const SEQUENCE_MASK: u32 = i32::MAX as u32;

/// Where events go, and their number.
#[derive(Default)]
pub(super) struct EventRoute {
    target: RwLock<Option<Weak<dyn EventTarget>>>,
    delivered: Counter,
    lost: Counter,
}

impl EventRoute {
    /// From now on events go to `target`, while it lives.
    pub fn set_target(&self, target: Weak<dyn EventTarget>) {
        *self.target.write() = Some(target);
    }

    /// Events delivered so far.
    pub fn delivered(&self) -> u64 {
        self.delivered.get()
    }

    /// Times that events were found to be lost.
    pub fn lost(&self) -> u64 {
        self.lost.get()
    }

    fn target(&self) -> Option<Arc<dyn EventTarget>> {
        self.target.read().as_ref()?.upgrade()
    }

    fn deliver(&self, record: EventRecordWords) {
        if let Some(target) = self.target() {
            target.event(record);
            self.delivered.count();
        }
    }

    fn events_lost(&self) {
        self.lost.count();
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

/// Reads one vEVENTQ in order.
struct Reader {
    queue: Arc<dyn EventQueue>,
    route: Arc<EventRoute>,
    /// The number of the next event, if none is lost.
    expected: u32,
}

impl Reader {
    /// Reads the queue until it is empty. Temporary failures are retried after a `pause`, which
    /// returns whether to continue.
    fn drain(&mut self, pause: impl Fn(Duration) -> bool) -> Drained {
        let mut next_pause = FIRST_PAUSE;
        loop {
            match self.queue.next_event() {
                Ok(Some(event)) => {
                    self.bring(&event);
                    next_pause = FIRST_PAUSE;
                }
                Ok(None) => return Drained::Empty,
                Err(error) if passes(error.errno) => {
                    if next_pause == FIRST_PAUSE {
                        warn_limited!("{error}; retrying until it works");
                    }
                    if !pause(next_pause) {
                        return Drained::Over;
                    }
                    next_pause = (next_pause * 2).min(LONGEST_PAUSE);
                }
                Err(error) => {
                    log::error!("{}", Unreadable(&error));
                    self.route.events_lost();
                    return Drained::Over;
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
            None => warn_limited!("an event of {} bytes is not an SMMU record", data.len()),
        }
    }
}

/// How reading a queue ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Drained {
    /// It is empty for now.
    Empty,
    /// It is not to be read any more.
    Over,
}

/// Whether a read that failed with `errno` may succeed later: the event is still there.
fn passes(errno: Errno) -> bool {
    errno == Errno::ENOMEM
}

/// The user's message about a queue that cannot be read.
struct Unreadable<'a>(&'a HostError);

impl fmt::Display for Unreadable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: faults of the devices behind this virtual SMMU are no longer reported, neither to \
             the guest nor here; everything else continues. Restart the guest to get them back",
            self.0
        )
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
pub(super) struct Signal {
    wanted: Mutex<Wanted>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Wanted {
    readable: bool,
    stop: bool,
    /// The thread waits.
    idle: bool,
    /// The thread has ended.
    over: bool,
}

impl Signal {
    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock()
    }

    /// Waits until there is something to read (true) or it is time to stop (false).
    fn wait(&self) -> bool {
        let mut wanted = self.wanted();
        wanted.idle = true;
        self.changed.notify_all();
        let nothing = |wanted: &mut Wanted| !wanted.readable && !wanted.stop;
        let mut wanted = self.changed.wait_while(wanted, nothing);
        // Anything that arrives after the queue was found empty is signalled again.
        (wanted.readable, wanted.idle) = (false, false);
        !wanted.stop
    }

    /// Waits until the thread has delivered all that can be read now; false when it has not after
    /// `time`.
    pub fn quiesce(&self, time: Duration) -> bool {
        let mut wanted = self.wanted();
        // Whether or not it was noticed already.
        wanted.readable = true;
        self.changed.notify_all();
        let busy = |wanted: &mut Wanted| !wanted.over && (wanted.readable || !wanted.idle);
        !self.changed.wait_timeout_while(wanted, time, busy).1
    }

    fn end(&self) {
        self.wanted().over = true;
        self.changed.notify_all();
    }

    /// Waits for `time`; false when it is time to stop.
    fn pause(&self, time: Duration) -> bool {
        let going = |wanted: &mut Wanted| !wanted.stop;
        !self.changed.wait_timeout_while(self.wanted(), time, going).0.stop
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

/// A thread that reads one vEVENTQ. It takes no lock of nesting: the holder of one may be waiting
/// for the virtual SMMU, which the thread calls.
#[derive(Debug)]
pub(super) struct EventThread {
    object: ObjectId,
    signal: Arc<Signal>,
    thread: Option<Started>,
}

impl EventThread {
    /// Has `threads` start delivering the events of `queue` along `route`.
    ///
    /// # Errors
    /// There is no thread for it, or none that waits for the queue. The queue is closed.
    pub fn start(
        threads: &dyn ThreadStart,
        queue: Arc<dyn EventQueue>,
        route: Arc<EventRoute>,
    ) -> io::Result<Self> {
        let object = queue.object();
        let signal = Arc::<Signal>::default();
        let waited_for = signal.clone();
        let watched = queue.clone();
        let mut reader = Reader { queue, route, expected: 0 };
        let read = move || {
            let pause = |time| waited_for.pause(time);
            while waited_for.wait() && reader.drain(pause) == Drained::Empty {}
            waited_for.end();
        };
        let thread = Started::new(threads, "smmu-events".into(), &jail::EVENTS, read)?;
        // Dropped, the thread ends.
        let started = Self { object, signal, thread: Some(thread) };
        watched.watch(started.signal.clone()).map_err(io::Error::other)?;
        Ok(started)
    }

    /// The vEVENTQ.
    pub fn object(&self) -> ObjectId {
        self.object
    }

    /// For [`Signal::quiesce`], without any lock.
    pub fn signal(&self) -> Arc<Signal> {
        self.signal.clone()
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
        // The last owner of the virtual SMMU may be the thread itself, in a call to it: then it
        // ends by itself, right after.
        if let Some(thread) = self.thread.take() {
            thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::iommufd::Verb;
    use crate::patience::wait_until;
    use crate::threads::StdThreads;

    #[derive(Default)]
    struct Target(Mutex<Vec<Option<u64>>>);

    impl EventTarget for Target {
        fn event(&self, record: EventRecordWords) {
            self.0.lock().push(Some(record[2]));
        }

        fn events_lost(&self) {
            self.0.lock().push(None);
        }
    }

    /// Returns its scripted results, then is empty.
    #[derive(Debug, Default)]
    struct Script {
        reads: Mutex<VecDeque<crate::iommufd::Result<Vevent>>>,
        /// Nobody can watch it.
        unwatchable: bool,
        watcher: Mutex<Option<Weak<dyn Readiness>>>,
    }

    impl Script {
        fn new(reads: impl IntoIterator<Item = crate::iommufd::Result<Vevent>>) -> Arc<Self> {
            Arc::new(Self { reads: Mutex::new(reads.into_iter().collect()), ..Self::default() })
        }
    }

    impl EventQueue for Script {
        fn object(&self) -> ObjectId {
            ObjectId(6)
        }

        fn next_event(&self) -> crate::iommufd::Result<Option<Vevent>> {
            self.reads.lock().pop_front().transpose()
        }

        fn watch(&self, watcher: Arc<dyn Readiness>) -> crate::iommufd::Result<()> {
            if self.unwatchable {
                return refused(Errno::EMFILE).map(drop);
            }
            watcher.changed(true);
            *self.watcher.lock() = Some(Arc::downgrade(&watcher));
            Ok(())
        }
    }

    fn refused(errno: Errno) -> crate::iommufd::Result<Vevent> {
        Err(HostError::new(Verb::Vevent, ObjectId(6), errno, "read: refused"))
    }

    /// A route, and its target.
    fn route() -> (Arc<EventRoute>, Arc<Target>) {
        let (route, target) = (Arc::<EventRoute>::default(), Arc::new(Target::default()));
        let weak: Weak<Target> = Arc::downgrade(&target);
        route.set_target(weak);
        (route, target)
    }

    fn event(sequence: u32, address: u64) -> Vevent {
        let data = [0x10, 0, address, 0].into_iter().flat_map(u64::to_le_bytes).collect();
        Vevent::Event { sequence, data }
    }

    #[test]
    fn a_loss_is_told_whether_the_host_says_so_or_a_number_is_missing() {
        let (route, target) = route();
        let queue = Script::new([]);
        let mut reader = Reader { queue, route: route.clone(), expected: 0 };
        let last = SEQUENCE_MASK;
        for next in [event(0, 1), Vevent::Lost { sequence: 1 }, event(2, 2), event(5, 3)] {
            reader.bring(&next);
        }
        assert_eq!(*target.0.lock(), [Some(1), None, Some(2), None, Some(3)]);
        target.0.lock().clear();
        for next in [event(last, 4), event(0, 5), Vevent::Event { sequence: 1, data: vec![0; 31] }]
        {
            reader.bring(&next);
        }
        assert_eq!(*target.0.lock(), [None, Some(4), Some(5)]);
        assert_eq!((route.delivered(), route.lost()), (5, 3));
    }

    #[test]
    fn a_read_that_fails_for_now_is_done_again_and_nothing_is_lost() {
        let (route, target) = route();
        let again = || refused(Errno::ENOMEM);
        let reads = [Ok(event(0, 1)), again(), again(), Ok(event(1, 2)), again()];
        let queue = Script::new(reads);
        let mut reader = Reader { queue, route: route.clone(), expected: 0 };
        let pauses = Mutex::new(Vec::new());
        let pause = |time: Duration| {
            pauses.lock().push(time.as_millis());
            true
        };
        assert_eq!(reader.drain(pause), Drained::Empty);
        assert_eq!(*target.0.lock(), [Some(1), Some(2)]);
        assert_eq!(route.lost(), 0);
        // Each longer than the one before; a success starts again from the first.
        assert_eq!(*pauses.lock(), [1, 2, 1]);
    }

    #[test]
    fn a_pause_ends_when_it_is_time_to_stop() {
        let (route, _) = route();
        let queue = Script::new([refused(Errno::ENOMEM), Ok(event(0, 1))]);
        let mut reader = Reader { queue: queue.clone(), route, expected: 0 };
        assert_eq!(reader.drain(|_| false), Drained::Over);
        assert_eq!(queue.reads.lock().len(), 1);
        let signal = Signal::default();
        assert!(signal.pause(Duration::ZERO));
        signal.stop();
        assert!(!signal.pause(Duration::from_secs(3600)));
    }

    #[test]
    fn a_queue_that_cannot_be_read_is_not_read_again_and_the_guest_is_told_of_a_loss() {
        for errno in [Errno::EIO, Errno::EINVAL, Errno::EFAULT] {
            let (route, target) = route();
            let queue = Script::new([Ok(event(0, 1)), refused(errno), Ok(event(1, 2))]);
            let mut reader = Reader { queue: queue.clone(), route, expected: 0 };
            let pause = |_| unreachable!("nothing is tried again");
            assert_eq!(reader.drain(pause), Drained::Over);
            assert_eq!(*target.0.lock(), [Some(1), None]);
            // The thread has ended as well: more to read wakes nobody.
            let thread = EventThread::start(&StdThreads, queue.clone(), Arc::default()).unwrap();
            wait_until("the thread's read", || queue.reads.lock().len() != 1);
            queue.reads.lock().push_back(refused(errno));
            thread.signal.changed(true);
            let is_over = || thread.thread.as_ref().is_some_and(Started::is_over);
            wait_until("the thread's end", is_over);
            assert_eq!(thread.stop(), ObjectId(6));
        }
    }

    #[test]
    fn without_a_thread_that_waits_for_the_queue_there_is_none_that_reads_it() {
        let queue = Arc::new(Script { unwatchable: true, ..Script::default() });
        let error = EventThread::start(&StdThreads, queue.clone(), Arc::default()).unwrap_err();
        assert!(error.to_string().contains("EMFILE"), "{error}");
        assert_eq!(Arc::strong_count(&queue), 1, "it can be destroyed");
    }

    #[test]
    fn delivery_is_waited_for_until_the_queue_is_empty_or_cannot_be_read() {
        let (route, target) = route();
        let queue = Script::new([Ok(event(0, 1)), Ok(event(1, 2))]);
        let thread = EventThread::start(&StdThreads, queue.clone(), route).unwrap();
        // Nobody has said that there is something to read.
        assert!(thread.signal().quiesce(Duration::from_secs(60)));
        assert_eq!(*target.0.lock(), [Some(1), Some(2)]);
        queue.reads.lock().push_back(refused(Errno::EIO));
        assert!(thread.signal().quiesce(Duration::from_secs(60)));
        assert!(thread.signal().quiesce(Duration::from_secs(60)), "of a thread that has ended");
        // Without a thread, nothing is delivered.
        assert!(!Signal::default().quiesce(Duration::from_millis(1)));
    }

    #[test]
    fn what_is_said_of_a_queue_that_cannot_be_read() {
        let error = refused(Errno::EIO).unwrap_err();
        assert_eq!(
            Unreadable(&error).to_string(),
            "VEVENT on object 6: EIO: read: refused: faults of the devices behind this virtual \
             SMMU are no longer reported, neither to the guest nor here; everything else \
             continues. Restart the guest to get them back"
        );
    }
}
