// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The way back: delivers the events of a vEVENTQ to the virtual SMMU.

use crate::sync::RwLock;
use std::fmt;
use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::counters::Counter;
use crate::iommufd::{EventQueue, HostError, Vevent};
use crate::nesting::reader::{self, Drained, QueueThread};
use crate::threads::ThreadStart;
use crate::viommu::smmuv3::{EventRecordWords, EventTarget};
use crate::warn_limited;

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

    /// Where events go.
    pub fn target(&self) -> Option<Arc<dyn EventTarget>> {
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
        let next = || {
            let event = self.queue.next_event()?;
            Ok(event.inspect(|event| self.bring(event)).is_some())
        };
        let drained = reader::drain(next, pause);
        if let Drained::Broken(error) = &drained {
            log::error!("{}", Unreadable(error));
            self.route.events_lost();
        }
        drained
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

/// Has `threads` start a thread that delivers the events of `queue` along `route`.
///
/// # Errors
/// There is no thread for it, or none that waits for the queue. The queue is closed.
pub(super) fn deliver(
    threads: &dyn ThreadStart,
    queue: Arc<dyn EventQueue>,
    route: Arc<EventRoute>,
) -> io::Result<QueueThread> {
    let object = queue.object();
    let watched = queue.clone();
    let mut reader = Reader { queue, route, expected: 0 };
    let drain = move |pause: &dyn Fn(Duration) -> bool| reader.drain(pause);
    QueueThread::start(threads, "smmu-events", object, |signal| watched.watch(signal), drain)
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::iommufd::{Errno, ObjectId, Readiness, Verb};
    use crate::nesting::reader::Signal;
    use crate::patience::wait_until;
    use crate::sync::Mutex;
    use crate::threads::{Started, StdThreads};

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
        assert_eq!(reader.drain(|_| false), Drained::Stopped);
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
            assert!(matches!(reader.drain(pause), Drained::Broken(_)));
            assert_eq!(*target.0.lock(), [Some(1), None]);
            // The thread has ended as well: more to read wakes nobody.
            let thread = deliver(&StdThreads, queue.clone(), Arc::default()).unwrap();
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
        let error = deliver(&StdThreads, queue.clone(), Arc::default()).unwrap_err();
        assert!(error.to_string().contains("EMFILE"), "{error}");
        assert_eq!(Arc::strong_count(&queue), 1, "it can be destroyed");
    }

    #[test]
    fn delivery_is_waited_for_until_the_queue_is_empty_or_cannot_be_read() {
        let (route, target) = route();
        let queue = Script::new([Ok(event(0, 1)), Ok(event(1, 2))]);
        let thread = deliver(&StdThreads, queue.clone(), route).unwrap();
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
