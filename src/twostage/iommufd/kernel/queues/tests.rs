// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Queues whose files are sockets.

use super::*;
use crate::patience::wait_until;
use crate::threads::{NewThread, StdThreads};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::Command;
use std::sync::mpsc::{channel, Sender};
use std::time::Duration;
use std::{env, iter};

struct Told(Mutex<Sender<bool>>);

impl Readiness for Told {
    fn changed(&self, readable: bool) {
        self.0.lock().send(readable).unwrap();
    }
}

/// A queue of SMMU events, and a socket for adding some: like the kernel's, it never blocks.
fn queue() -> (Queue<Vevent>, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let parse = vevent_parser(iommu_veventq_type_IOMMU_VEVENTQ_TYPE_ARM_SMMUV3).unwrap();
    let file = File::from(OwnedFd::from(theirs));
    (Queue::new(ObjectId(1), Verb::Vevent, file, parse, Arc::new(StdThreads)), ours)
}

fn event(sequence: u32) -> Vec<u8> {
    let header = [0u32, sequence].into_iter().flat_map(u32::to_ne_bytes);
    header.chain([7; size_of::<iommu_vevent_arm_smmuv3>()]).collect()
}

fn sequence(queue: &Queue<Vevent>) -> Option<u32> {
    queue.next().unwrap().map(|event| match event {
        Vevent::Event { sequence, .. } | Vevent::Lost { sequence } => sequence,
    })
}

#[test]
fn a_watcher_hears_of_every_change_and_of_nothing_else() {
    let (queue, more) = queue();
    let (sender, told) = channel();
    queue.watch(Arc::new(Told(Mutex::new(sender)))).unwrap();
    assert_eq!(told.recv(), Ok(false));
    for round in 0..100 {
        more.send(&[event(round), event(round + 1)].concat()).unwrap();
        assert_eq!(told.recv(), Ok(true));
        assert_eq!(sequence(&queue), Some(round));
        assert_eq!(sequence(&queue), Some(round + 1));
        assert_eq!(sequence(&queue), None);
        assert_eq!(sequence(&queue), None);
        assert_eq!(told.recv(), Ok(false));
    }
    drop(queue);
    assert!(told.recv().is_err(), "nobody is left who could tell");
    // At once, but for a program that another test starts just now: it has our files until it runs.
    wait_until("the file is closed", || more.send(&event(0)).is_err());
}

/// In a process of its own, which can open few files: other tests need theirs.
#[test]
fn no_notification_is_lost_when_descriptors_run_out() {
    if env::var_os("TWOSTAGE_FEW_FILES").is_none() {
        let mut alone = Command::new("sh");
        alone.args(["-c", "ulimit -n 64; exec \"$0\" --exact \"$1\""]);
        let module = module_path!().split_once("::").unwrap().1;
        let test = format!("{module}::no_notification_is_lost_when_descriptors_run_out");
        alone.arg(env::current_exe().unwrap()).arg(test).env("TWOSTAGE_FEW_FILES", "1");
        let output = alone.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        return assert!(output.status.success() && text.contains("1 passed"), "{text}");
    }
    let ((watched, more), (other, _more)) = (queue(), queue());
    let (sender, told) = channel();
    watched.watch(Arc::new(Told(Mutex::new(sender.clone())))).unwrap();
    assert_eq!(told.recv(), Ok(false));
    let taken: Vec<File> = iter::from_fn(|| File::open("/dev/null").ok()).collect();
    more.send(&event(1)).unwrap();
    assert_eq!(told.recv_timeout(Duration::from_secs(60)), Ok(true));
    // And nobody waits for one that nobody can wait for.
    let error = other.watch(Arc::new(Told(Mutex::new(sender.clone())))).unwrap_err();
    assert_eq!((error.errno, error.object), (Errno::EMFILE, Some(ObjectId(1))), "{error}");
    drop(taken);
    other.watch(Arc::new(Told(Mutex::new(sender)))).unwrap();
    assert_eq!(told.recv(), Ok(false));
}

#[derive(Debug)]
struct NoThreads;

impl ThreadStart for NoThreads {
    fn start(&self, _: NewThread) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EAGAIN))
    }
}

#[test]
fn a_queue_without_a_thread_is_not_watched() {
    let (Queue { object, verb, shared, .. }, more) = queue();
    let queue =
        Queue { object, verb, shared, threads: Arc::new(NoThreads), poller: Mutex::new(None) };
    let (sender, told) = channel();
    let error = queue.watch(Arc::new(Told(Mutex::new(sender)))).unwrap_err();
    assert_eq!((error.verb, error.errno), (Verb::Vevent, Errno::from_raw(libc::EAGAIN)), "{error}");
    assert!(told.recv().is_err(), "the watcher was told nothing, and dropped");
    more.send(&event(5)).unwrap();
    assert_eq!(sequence(&queue), Some(5));
}

#[test]
fn what_is_no_event_is_an_error() {
    let (queue, more) = queue();
    more.send(&[1, 2, 3]).unwrap();
    assert_eq!(queue.next().unwrap_err().errno, Errno::EIO);
    more.send(&event(5)).unwrap();
    assert_eq!(sequence(&queue), Some(5));
}

#[test]
fn a_file_that_breaks_is_told_and_cannot_be_read_any_more() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let parse = vevent_parser(iommu_veventq_type_IOMMU_VEVENTQ_TYPE_ARM_SMMUV3).unwrap();
    let file = File::from(OwnedFd::from(theirs));
    let threads = Arc::new(StdThreads);
    let queue = Queue::new(ObjectId(7), Verb::Vevent, file, parse, threads);
    let (sender, told) = channel();
    queue.watch(Arc::new(Told(Mutex::new(sender)))).unwrap();
    assert_eq!(told.recv(), Ok(false));
    (&ours).write_all(&event(1)).unwrap();
    assert_eq!(told.recv(), Ok(true));
    assert_eq!(sequence(&queue), Some(1));
    assert_eq!(sequence(&queue), None);
    assert_eq!(told.recv(), Ok(false));
    drop(ours);
    assert_eq!(told.recv(), Ok(true));
    let error = queue.next().unwrap_err();
    assert_eq!((error.errno, error.object), (Errno::EIO, Some(ObjectId(7))), "{error}");
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

#[test]
fn requests_of_one_cookie_are_one_group() {
    // flags, dev_id, pasid, grpid, perm, reserved, addr (two words), length, cookie
    let record = |flags, addr, cookie| words(&[flags, 7, 5, 9, 3, 0, addr, 0, 0, cookie]);
    let bytes = [record(1, 0x1000, 1), record(3, 0x2000, 1), record(3, 0x3000, 2)].concat();
    let groups = page_requests(&bytes).unwrap();
    assert_eq!(groups.len(), 2);
    assert_eq!((groups[0].cookie, groups[0].dev), (1, ObjectId(7)));
    let addresses: Vec<u64> = groups[0].requests.iter().map(|each| each.address).collect();
    assert_eq!(addresses, [0x1000, 0x2000]);
    let last = groups[1].requests[0];
    assert!(last.flags.last_page() && last.flags.pasid_valid());
    assert!(last.permissions.read() && last.permissions.write());
    assert_eq!((last.pasid, last.group), (5, 9));
    assert_eq!(page_requests(&[]), Some(vec![]));
    assert_eq!(page_requests(&bytes[..60]), None);
}

#[test]
fn events_and_lost_ones() {
    let data = |byte: u8| [byte; size_of::<iommu_vevent_arm_smmuv3>()].to_vec();
    let bytes = [words(&[0, 4]), data(1), words(&[0, 5]), data(2), words(&[1, 9])].concat();
    let events = vevents::<iommu_vevent_arm_smmuv3>(&bytes).unwrap();
    assert_eq!(
        events,
        [
            Vevent::Event { sequence: 4, data: data(1) },
            Vevent::Event { sequence: 5, data: data(2) },
            Vevent::Lost { sequence: 9 }
        ]
    );
    assert_eq!(vevents::<iommu_vevent_arm_smmuv3>(&bytes[..20]), None);
    assert_eq!(vevents::<iommu_vevent_arm_smmuv3>(&bytes[..4]), None);
}
