// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A fault queue: page requests to be read, and those to be answered.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use super::{transferred, Input, Output, Watcher};
use crate::host::refusal::{refuse, Outcome};
use twostage::iommufd::{
    Errno, ObjectId, PageRequest, PageRequestGroup, PageResponseCode, Readiness,
};

/// Size of `struct iommu_hwpt_pgfault`, in bytes.
const REQUEST_SIZE: usize = size_of::<iommufd_bindings::iommu_hwpt_pgfault>();
/// Size of `struct iommu_hwpt_page_response`, in bytes.
const RESPONSE_SIZE: usize = size_of::<iommufd_bindings::iommu_hwpt_page_response>();

/// One attachment of a HWPT in a slot of a group: its page requests are answered when it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct AttachmentId(pub u64);

/// Responds to the device. Called once, with the queue locked.
pub(crate) type Responder = Box<dyn FnOnce(PageResponseCode) + Send>;

/// Page requests that are answered together, and their responder.
pub(crate) struct PendingGroup {
    pub attachment: AttachmentId,
    /// The device that they are reported under.
    pub dev: ObjectId,
    /// Oldest first; the last one closes the group.
    pub requests: Vec<PageRequest>,
    pub respond: Responder,
}

impl fmt::Debug for PendingGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PendingGroup")
            .field("dev", &self.dev)
            .field("requests", &self.requests)
            .finish_non_exhaustive()
    }
}

/// See the [module's documentation](self).
#[derive(Debug, Default)]
pub(crate) struct FaultQueue {
    state: Mutex<State>,
    watcher: Watcher,
}

#[derive(Debug, Default)]
struct State {
    /// To be read.
    deliver: VecDeque<PendingGroup>,
    /// To be answered, by cookie.
    response: BTreeMap<u32, PendingGroup>,
}

impl FaultQueue {
    /// Adds a complete group.
    pub fn report(&self, group: PendingGroup) {
        // The queue stays locked while the watcher is notified; otherwise a reader's notification
        // could overtake it.
        let mut state = self.state();
        state.deliver.push_back(group);
        self.watcher.tell(true);
    }

    /// Reads whole groups into `count` bytes.
    ///
    /// # Errors
    /// `ESPIPE` not a whole number of requests; `EINVAL` the first group does not fit; those of
    /// `output`.
    pub fn read(&self, count: usize, output: Output<'_>) -> Outcome<usize> {
        if !count.is_multiple_of(REQUEST_SIZE) {
            return refuse(Errno::ESPIPE, format!("{count} bytes of page requests"));
        }
        let mut state = self.state();
        let mut done = 0;
        let mut outcome = Ok(());
        while let Some(group) = state.deliver.pop_front() {
            let size = group.requests.len().saturating_mul(REQUEST_SIZE);
            if size > count - done {
                outcome = refuse(Errno::EINVAL, "the first group of page requests does not fit");
                state.deliver.push_front(group);
                break;
            }
            let cookie = state.free_cookie();
            outcome = (done..).step_by(REQUEST_SIZE).zip(&group.requests).try_for_each(
                |(offset, request)| output(offset, &request_bytes(request, group.dev, cookie)),
            );
            if outcome.is_err() {
                state.deliver.push_front(group);
                break;
            }
            state.response.insert(cookie, group);
            done += size;
        }
        self.watcher.tell(!state.deliver.is_empty());
        transferred(done, outcome)
    }

    /// Takes the responses in `count` bytes.
    ///
    /// # Errors
    /// `ESPIPE` not a whole number of responses; `EINVAL` an invalid response or cookie; those of
    /// `input`.
    pub fn write(&self, count: usize, input: Input<'_>) -> Outcome<usize> {
        if !count.is_multiple_of(RESPONSE_SIZE) {
            return refuse(Errno::ESPIPE, format!("{count} bytes of page responses"));
        }
        let mut state = self.state();
        let mut done = 0;
        let outcome = (0..count).step_by(RESPONSE_SIZE).try_for_each(|offset| {
            let mut bytes = [0; RESPONSE_SIZE];
            input(offset, &mut bytes)?;
            let [a, b, c, d, e, f, g, h] = bytes;
            let cookie = u32::from_ne_bytes([a, b, c, d]);
            let code = match u32::from_ne_bytes([e, f, g, h]) {
                0 => PageResponseCode::Success,
                1 => PageResponseCode::Invalid,
                other => return refuse(Errno::EINVAL, format!("response code {other}")),
            };
            state.answer(cookie, code)?;
            done += RESPONSE_SIZE;
            Ok(())
        });
        transferred(done, outcome)
    }

    /// Takes the next group, if there is one; it must be answered.
    pub fn next(&self) -> Option<PageRequestGroup> {
        let mut state = self.state();
        let group = state.deliver.pop_front()?;
        let cookie = state.free_cookie();
        let next = PageRequestGroup { cookie, dev: group.dev, requests: group.requests.clone() };
        state.response.insert(cookie, group);
        self.watcher.tell(!state.deliver.is_empty());
        Some(next)
    }

    /// Responds to the group with `cookie`.
    ///
    /// # Errors
    /// `EINVAL` there is none, or no longer.
    pub fn respond(&self, cookie: u32, code: PageResponseCode) -> Outcome<()> {
        self.state().answer(cookie, code)
    }

    /// `attachment` ends: responds to all its requests with `INVALID`.
    pub fn end(&self, attachment: AttachmentId) {
        let mut state = self.state();
        let ended = |group: &PendingGroup| group.attachment == attachment;
        let deliver = std::mem::take(&mut state.deliver).into_iter();
        let (gone, left): (Vec<_>, Vec<_>) = deliver.partition(ended);
        state.deliver = left.into();
        let response = std::mem::take(&mut state.response).into_iter();
        let (read, left): (Vec<_>, Vec<_>) = response.partition(|(_, group)| ended(group));
        state.response = left.into_iter().collect();
        let read = read.into_iter().map(|(_, group)| group);
        for group in gone.into_iter().chain(read) {
            (group.respond)(PageResponseCode::Invalid);
        }
        self.watcher.tell(!state.deliver.is_empty());
    }

    /// Whether there is something to read.
    pub fn readable(&self) -> bool {
        !self.state().deliver.is_empty()
    }

    /// Notifies `watcher` of the current state and of changes.
    pub fn watch(&self, watcher: Arc<dyn Readiness>) {
        let state = self.state();
        self.watcher.set(watcher, !state.deliver.is_empty());
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl State {
    /// The lowest free cookie; never 0.
    fn free_cookie(&self) -> u32 {
        let taken = self.response.keys();
        let gap = (1u32..).zip(taken).find(|(cookie, taken)| cookie != *taken);
        // There is less memory than for that many groups.
        gap.map_or(self.response.len() as u32 + 1, |(cookie, _)| cookie)
    }

    fn answer(&mut self, cookie: u32, code: PageResponseCode) -> Outcome<()> {
        match self.response.remove(&cookie) {
            Some(group) => {
                (group.respond)(code);
                Ok(())
            }
            None => refuse(Errno::EINVAL, format!("no page request has the cookie {cookie}")),
        }
    }
}

/// `struct iommu_hwpt_pgfault`. Its length is always 0.
fn request_bytes(request: &PageRequest, dev: ObjectId, cookie: u32) -> [u8; REQUEST_SIZE] {
    let PageRequest { flags, pasid, group, permissions, address } = *request;
    let [low, high] = split(address);
    let fields =
        [flags.into_bits(), dev.0, pasid, group, permissions.into_bits(), 0, low, high, 0, cookie];
    let mut bytes = [0; REQUEST_SIZE];
    let all = fields.into_iter().flat_map(u32::to_ne_bytes);
    bytes.iter_mut().zip(all).for_each(|(to, from)| *to = from);
    bytes
}

/// The halves of a 64-bit field, in memory order.
fn split(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_ne_bytes();
    [u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])]
}

#[cfg(test)]
mod tests {
    use super::*;
    use twostage::iommufd::{PageRequestFlags, PageRequestPermissions};

    type Answers = Arc<Mutex<Vec<(u64, PageResponseCode)>>>;

    const FIRST: AttachmentId = AttachmentId(1);
    const SECOND: AttachmentId = AttachmentId(2);

    fn request(address: u64) -> PageRequest {
        PageRequest {
            flags: PageRequestFlags::new().with_last_page(true),
            pasid: 5,
            group: 2,
            permissions: PageRequestPermissions::new().with_write(true),
            address,
        }
    }

    /// Reports a group of `count` requests whose response is recorded under `address`.
    fn report(queue: &FaultQueue, answers: &Answers, of: AttachmentId, address: u64, count: usize) {
        let answers = answers.clone();
        queue.report(PendingGroup {
            attachment: of,
            dev: ObjectId(7),
            requests: vec![request(address); count],
            respond: Box::new(move |code| answers.lock().push((address, code))),
        });
    }

    fn read(queue: &FaultQueue, count: usize) -> Result<Vec<u8>, Errno> {
        let mut bytes = Vec::new();
        let done = queue.read(count, &mut |offset, piece| {
            assert_eq!(offset, bytes.len());
            bytes.extend_from_slice(piece);
            Ok(())
        });
        let done = done.map_err(|refusal| refusal.errno)?;
        assert_eq!(done, bytes.len());
        Ok(bytes)
    }

    fn write(queue: &FaultQueue, words: &[u32]) -> Result<usize, Errno> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut input = |offset: usize, piece: &mut [u8]| {
            piece.copy_from_slice(&bytes[offset..offset + piece.len()]);
            Ok(())
        };
        queue.write(bytes.len(), &mut input).map_err(|refusal| refusal.errno)
    }

    fn word(bytes: &[u8], index: usize) -> u32 {
        u32::from_ne_bytes(bytes[4 * index..][..4].try_into().unwrap())
    }

    fn taken(answers: &Answers) -> Vec<(u64, PageResponseCode)> {
        std::mem::take(&mut answers.lock())
    }

    #[test]
    fn a_group_is_read_as_a_whole_and_answered_by_its_cookie() {
        let (queue, answers) = (FaultQueue::default(), Answers::default());
        assert_eq!(read(&queue, 40), Ok(Vec::new()), "nothing to read is no error");
        report(&queue, &answers, FIRST, 0x1_2345_6000, 2);
        assert_eq!(read(&queue, 0), Err(Errno::EINVAL));
        assert_eq!(read(&queue, 40), Err(Errno::EINVAL));
        assert_eq!(read(&queue, 41), Err(Errno::ESPIPE));
        report(&queue, &answers, FIRST, 0x2000, 1);
        let bytes = read(&queue, 80).unwrap();
        assert_eq!(bytes.len(), 80, "the second group did not fit");
        // flags, dev_id, pasid, grpid, perm, reserved, addr, length, cookie
        let words: Vec<_> = (0..10).map(|index| word(&bytes, index)).collect();
        assert_eq!(words, [2, 7, 5, 2, 2, 0, 0x2345_6000, 1, 0, 1]);
        assert_eq!(word(&bytes, 19), 1, "the same cookie in each record");
        assert_eq!(word(&read(&queue, 400).unwrap(), 9), 2);
        assert_eq!(write(&queue, &[2, 0, 1, 1]), Ok(16));
        let told =
            [(0x2000, PageResponseCode::Success), (0x1_2345_6000, PageResponseCode::Invalid)];
        assert_eq!(taken(&answers), told);
    }

    #[test]
    fn answers_stop_at_the_first_that_is_none() {
        let (queue, answers) = (FaultQueue::default(), Answers::default());
        for address in [0x1000, 0x2000] {
            report(&queue, &answers, FIRST, address, 1);
        }
        read(&queue, 80).unwrap();
        assert_eq!(write(&queue, &[1, 2]), Err(Errno::EINVAL), "a code");
        assert_eq!(write(&queue, &[3, 0]), Err(Errno::EINVAL), "a cookie");
        assert_eq!(write(&queue, &[1]), Err(Errno::ESPIPE));
        assert_eq!(write(&queue, &[1, 0, 1, 0, 2, 0]), Ok(8), "answered twice");
        assert_eq!(taken(&answers), [(0x1000, PageResponseCode::Success)]);
        report(&queue, &answers, FIRST, 0x3000, 1);
        assert_eq!(word(&read(&queue, 40).unwrap(), 9), 1, "the lowest free cookie");
    }

    #[test]
    fn what_could_not_be_copied_is_read_again() {
        let (queue, answers) = (FaultQueue::default(), Answers::default());
        report(&queue, &answers, FIRST, 0x1000, 2);
        let mut copied = 0;
        let outcome = queue.read(80, &mut |_, _| {
            copied += 1;
            if copied == 2 {
                return refuse(Errno::EFAULT, "no memory");
            }
            Ok(())
        });
        assert_eq!(outcome.unwrap_err().errno, Errno::EFAULT);
        assert_eq!(word(&read(&queue, 80).unwrap(), 9), 1);
    }

    #[test]
    fn an_attachment_that_ends_is_answered() {
        let (queue, answers) = (FaultQueue::default(), Answers::default());
        report(&queue, &answers, FIRST, 0x1000, 1);
        report(&queue, &answers, SECOND, 0x2000, 1);
        read(&queue, 80).unwrap();
        report(&queue, &answers, FIRST, 0x3000, 1);
        queue.end(FIRST);
        let invalid = PageResponseCode::Invalid;
        assert_eq!(taken(&answers), [(0x3000, invalid), (0x1000, invalid)]);
        assert!(!queue.readable());
        assert_eq!(write(&queue, &[1, 0]), Err(Errno::EINVAL));
        assert_eq!(write(&queue, &[2, 0]), Ok(8));
    }

    #[test]
    fn a_watcher_is_told_of_what_there_is_to_read() {
        struct Seen(Mutex<Vec<bool>>);
        impl Readiness for Seen {
            fn changed(&self, readable: bool) {
                self.0.lock().push(readable);
            }
        }
        let (queue, answers) = (FaultQueue::default(), Answers::default());
        let seen = Arc::new(Seen(Mutex::default()));
        queue.watch(seen.clone());
        report(&queue, &answers, FIRST, 0x1000, 1);
        assert!(queue.readable());
        queue.next().unwrap();
        assert_eq!(*seen.0.lock(), [false, true, false]);
        queue.respond(1, PageResponseCode::Success).unwrap();
        assert!(queue.next().is_none());
    }
}
