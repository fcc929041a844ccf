// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The files that wait for a call on another one: a DMA, for the response to its page requests.

use std::sync::{Arc, MutexGuard, Weak};
use twostage::sync::Mutex;

use crate::files::file::File;

/// See the [module's documentation](self).
#[derive(Debug, Default)]
pub struct Waiting(Mutex<Vec<Weak<dyn File>>>);

impl Waiting {
    /// `file` was written to, and may be waiting from now on.
    pub fn written(&self, file: &Arc<dyn File>) {
        // What it waits for may have come before it is registered.
        if file.resume() {
            let file = Arc::downgrade(file);
            let mut files = self.files();
            if !files.iter().any(|known| known.ptr_eq(&file)) {
                files.push(file);
            }
        }
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.files().is_empty()
    }

    /// Continues every file that can. Nobody else sees the list empty, or accesses it, before that
    /// is done.
    pub fn resume(&self) {
        self.files().retain(|file| file.upgrade().is_some_and(|file| file.resume()));
    }

    fn files(&self) -> MutexGuard<'_, Vec<Weak<dyn File>>> {
        self.0.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use twostage::iommufd::Errno;

    use crate::files::file::{Answer, Call, Caller};

    #[derive(Debug, Default)]
    struct Device {
        waits: AtomicBool,
        resumed: AtomicU32,
    }

    impl File for Device {
        fn name(&self) -> String {
            "device".into()
        }

        fn call(&self, _: &dyn Caller, _: Call) -> Result<Answer, Errno> {
            Err(Errno::ENOTTY)
        }

        fn resume(&self) -> bool {
            self.resumed.fetch_add(1, Ordering::Relaxed);
            self.waits.load(Ordering::Relaxed)
        }
    }

    #[test]
    fn only_what_waits_goes_on() {
        let (waiting, idle, device) = (Waiting::default(), Arc::default(), Arc::default());
        let (idle, device): (Arc<Device>, Arc<Device>) = (idle, device);
        let files: [Arc<dyn File>; 2] = [idle.clone(), device.clone()];
        device.waits.store(true, Ordering::Relaxed);
        files.iter().for_each(|file| waiting.written(file));
        waiting.written(&files[1]);
        let resumed = || [&idle, &device].map(|device| device.resumed.load(Ordering::Relaxed));
        assert_eq!((waiting.is_empty(), resumed()), (false, [1, 2]));
        waiting.resume();
        assert_eq!(
            (waiting.is_empty(), resumed()),
            (false, [1, 3]),
            "once, though it is known twice"
        );
        device.waits.store(false, Ordering::Relaxed);
        waiting.resume();
        waiting.resume();
        assert_eq!((waiting.is_empty(), resumed()), (true, [1, 4]));
    }

    #[test]
    fn a_file_that_waits_is_not_kept() {
        let waiting = Waiting::default();
        let device = Arc::new(Device { waits: true.into(), ..Device::default() });
        let file: Arc<dyn File> = device.clone();
        waiting.written(&file);
        drop(file);
        assert_eq!(Arc::strong_count(&device), 1);
        drop(device);
        waiting.resume();
        assert!(waiting.is_empty());
    }
}
