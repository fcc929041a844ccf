// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Fault queues, as far as possible without a device with page requests.

use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};

use twostage::iommufd::{Errno, HwptAlloc, HwptData, HwptFlags, PageResponseCode, Readiness};

use super::{destroy, refused, Bound, Subject};

/// Forwards notifications.
pub struct Told(Mutex<Sender<bool>>);

impl Told {
    pub fn new() -> (Arc<Self>, Receiver<bool>) {
        let (sender, receiver) = channel();
        (Arc::new(Self(Mutex::new(sender))), receiver)
    }
}

impl Readiness for Told {
    fn changed(&self, readable: bool) {
        // The check may have ended.
        let _ = self.0.lock().unwrap_or_else(PoisonError::into_inner).send(readable);
    }
}

pub fn faults(subject: &Subject) {
    let bound = Bound::new(subject);
    let host = bound.host();
    let queue = host.fault_queue_alloc().expect("FAULT_QUEUE_ALLOC");
    let id = queue.object();
    assert_eq!(queue.next_group().expect("a read"), None);
    refused(queue.respond(1, PageResponseCode::Success), Errno::EINVAL);
    let (watcher, told) = Told::new();
    queue.watch(watcher);
    assert_eq!(told.recv(), Ok(false));
    refused(host.destroy(id), Errno::EBUSY);
    let ioas = host.ioas_alloc().expect("IOAS_ALLOC");
    let args = HwptAlloc {
        flags: HwptFlags::new().with_fault_id_valid(true),
        dev: bound.dev,
        pt: ioas,
        data: HwptData::None,
        fault: Some(id),
    };
    let hwpt = host.hwpt_alloc(&args).expect("HWPT_ALLOC");
    drop(queue);
    refused(host.destroy(id), Errno::EBUSY);
    destroy(host, &[hwpt, id, ioas]);
}
