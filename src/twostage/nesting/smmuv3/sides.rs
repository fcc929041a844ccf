// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtual SMMUv3 in front of devices of several hosts. See [`crate::nesting::sides`].

use std::sync::{Arc, Weak};

use super::SmmuNesting;
use crate::iommufd::ObjectId;
use crate::nesting::sides::{join, Side, Sides};
use crate::nesting::{DeviceInfo, GuestIoas, Result};
use crate::spec::pci::{Bdf, PageResponse};
use crate::spec::smmuv3::command::Command;
use crate::spec::smmuv3::StreamId;
use crate::viommu::smmuv3::{
    EventTarget, SmmuHostSide, SmmuInvalidateError, StalledTransaction, StreamPolicy,
};
use crate::viommu::{HostSideError, PageTicket};

impl Side for SmmuNesting {
    type Target = dyn EventTarget;

    fn beside(&self, ioas: Arc<GuestIoas>) -> Self {
        let state = self.state();
        let beside = Self::with_event_depth(ioas, state.event_depth);
        let mut beside = beside.with_threads(state.threads.clone());
        beside.state.get_mut().serves_faults = state.serves_faults;
        beside
    }

    fn ioas(&self) -> Result<Arc<GuestIoas>> {
        SmmuNesting::ioas(self)
    }

    fn add_device(&self, rid: Bdf, dev: ObjectId) -> Result<()> {
        SmmuNesting::add_device(self, rid, dev)
    }

    fn remove_device(&self, rid: Bdf) -> Result<()> {
        SmmuNesting::remove_device(self, rid)
    }

    fn hw_infos(&self) -> Vec<DeviceInfo> {
        SmmuNesting::hw_infos(self)
    }

    fn set_fault_target(&self, target: Weak<dyn EventTarget>) {
        SmmuNesting::set_fault_target(self, target);
    }

    fn shutdown(&self) -> Result<()> {
        SmmuNesting::shutdown(self)
    }
}

impl Sides<SmmuNesting> {
    /// See [`SmmuNesting::quiesce`].
    pub fn quiesce(&self) -> Result<()> {
        self.iter().try_for_each(|side| side.quiesce())
    }
}

impl SmmuHostSide for Sides<SmmuNesting> {
    fn configure(&self, stream: StreamId, policy: &StreamPolicy) -> Result<(), HostSideError> {
        let side = stream.bdf().map_or_else(|| self.first().clone(), |rid| self.of(rid));
        side.configure(stream, policy)
    }

    /// All commands to each side, so that their numbers are the same: a side leaves those out that
    /// name no stream of its own.
    fn invalidate(&self, commands: &[Command]) -> Result<(), SmmuInvalidateError> {
        let mut result = Ok(());
        for side in self.iter() {
            result = both(result, side.invalidate(commands));
        }
        result
    }

    fn respond(&self, stream: StreamId, ticket: PageTicket, response: PageResponse) {
        if let Some(rid) = stream.bdf() {
            self.of(rid).respond(stream, ticket, response);
        }
    }

    fn take_unread(&self) -> Vec<(StalledTransaction, PageTicket)> {
        self.iter().flat_map(|side| side.take_unread()).collect()
    }
}

/// The result of two sides. Commands before the earlier one that was refused are complete on both.
fn both(
    one: Result<(), SmmuInvalidateError>,
    other: Result<(), SmmuInvalidateError>,
) -> Result<(), SmmuInvalidateError> {
    match (one, other) {
        (Err(one), Err(other)) => {
            let unanswered = one.unanswered || other.unanswered;
            let error = match (one.done, other.done) {
                (_, true) => one,
                (true, false) => other,
                (false, false) => {
                    let refused = one.refused.min(other.refused);
                    let error = join(one.error, &other.error);
                    SmmuInvalidateError::new(refused, one.flushed && other.flushed, error)
                }
            };
            Err(SmmuInvalidateError { unanswered, ..error })
        }
        (one, other) => one.and(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_device_of_one_side_is_told_with_the_refusal_of_another() {
        let host = || HostSideError::new("test", false, Arc::new(std::io::Error::other("test")));
        let silent = || Err(SmmuInvalidateError::unanswered(host()));
        let refused = |number| Err(SmmuInvalidateError::new(number, false, host()));
        for (one, other, told) in [
            (silent(), refused(3), (3, true, false)),
            (refused(3), silent(), (3, true, false)),
            (silent(), silent(), (0, true, true)),
            (refused(4), refused(3), (3, false, false)),
            (silent(), Ok(()), (0, true, true)),
        ] {
            let error = both(one, other).unwrap_err();
            assert_eq!((error.refused, error.unanswered, error.done), told);
        }
    }
}
