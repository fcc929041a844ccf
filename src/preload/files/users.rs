// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who uses the groups of a machine: as in Linux, a group is open once, or some of its devices are
//! bound through their own character devices, but not both.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard, Weak};
use twostage::sync::Mutex;

use twostage::iommufd::Errno;

/// The name of the file of group `number`.
pub fn group_name(number: u32) -> String {
    format!("group{number}")
}

/// The groups of a machine, by number, and their users.
#[derive(Debug, Default)]
pub struct Groups(Mutex<BTreeMap<u32, Users>>);

#[derive(Debug, Default)]
struct Users {
    /// The opener, which still has it.
    open: Option<Weak<dyn Any + Send + Sync>>,
    /// Number of devices bound through their own character devices.
    bound: usize,
}

impl Users {
    fn is_open(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.strong_count() > 0)
    }
}

impl Groups {
    /// Opens the group `number`, created by `group`.
    ///
    /// # Errors
    /// `EBUSY` it is open, or a device of it is bound.
    pub fn open<G>(&self, number: u32, group: impl FnOnce() -> G) -> Result<Arc<G>, Errno>
    where
        G: Any + Send + Sync,
    {
        let mut groups = self.lock();
        let users = groups.entry(number).or_default();
        if users.is_open() || users.bound > 0 {
            return Err(Errno::EBUSY);
        }
        let group = Arc::new(group());
        let open: Weak<G> = Arc::downgrade(&group);
        users.open = Some(open);
        Ok(group)
    }

    /// Prevents the group `number` from being opened while the result exists, as a device of it is
    /// to be bound.
    ///
    /// # Errors
    /// `EBUSY` it is open.
    pub fn block(self: &Arc<Self>, number: u32) -> Result<Blocked, Errno> {
        let mut groups = self.lock();
        let users = groups.entry(number).or_default();
        if users.is_open() {
            return Err(Errno::EBUSY);
        }
        users.bound += 1;
        Ok(Blocked { groups: self.clone(), number })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Users>> {
        self.0.lock()
    }
}

/// A group that cannot be opened.
#[derive(Debug)]
pub struct Blocked {
    groups: Arc<Groups>,
    number: u32,
}

impl Drop for Blocked {
    fn drop(&mut self) {
        if let Some(users) = self.groups.lock().get_mut(&self.number) {
            users.bound = users.bound.saturating_sub(1);
        }
    }
}
