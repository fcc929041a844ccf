// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host that a state is restored on: what it is told, and what that must be.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use twostage::spec::smmuv3::command::Command;
use twostage::spec::smmuv3::StreamId;
use twostage::viommu::smmuv3::{SmmuHostSide, SmmuInvalidateError, StreamPolicy};
use twostage::viommu::vtd::{Invalidation, Policy, RequesterConfig, VtdHostSide};
use twostage::viommu::{HostSideError, Requester, RestoreError};

/// How a host treats DMA.
pub trait Treatment: fmt::Debug + Copy + PartialEq {
    /// No DMA passes.
    fn blocks(&self) -> bool;
}

impl Treatment for RequesterConfig {
    fn blocks(&self) -> bool {
        matches!(self.policy, Policy::Blocked(_))
    }
}

impl Treatment for StreamPolicy {
    fn blocks(&self) -> bool {
        *self == Self::Abort
    }
}

/// A host that refuses one call, or none.
#[derive(Debug)]
pub struct Host<R, T> {
    /// The number of the call, counted from 1.
    refused: usize,
    told: Mutex<Told<R, T>>,
}

#[derive(Debug)]
struct Told<R, T> {
    /// Every call, also the refused one.
    calls: Vec<(R, T)>,
    /// Who is not blocked.
    open: BTreeMap<R, T>,
}

impl<R: Ord + Copy + fmt::Debug + fmt::Display, T: Treatment> Host<R, T> {
    /// One that refuses call number `refused`; none if that is 0.
    pub fn new(refused: u8) -> Arc<Self> {
        let told = Mutex::new(Told { calls: Vec::new(), open: BTreeMap::new() });
        Arc::new(Self { refused: refused.into(), told })
    }

    fn told(&self) -> MutexGuard<'_, Told<R, T>> {
        self.told.lock().expect("nothing panics")
    }

    fn give(&self, who: R, treatment: T) -> Result<(), HostSideError> {
        let Told { calls, open } = &mut *self.told();
        calls.push((who, treatment));
        let refused = calls.len() == self.refused;
        if refused || treatment.blocks() {
            open.remove(&who);
        } else {
            open.insert(who, treatment);
        }
        if !refused {
            return Ok(());
        }
        let source = Arc::new(std::io::Error::from(std::io::ErrorKind::OutOfMemory));
        Err(HostSideError::new(who.to_string(), false, source))
    }

    /// A state with these `decisions` was restored: the host was told each of them, once, and
    /// nothing else.
    pub fn restored(&self, decisions: &BTreeMap<R, T>) {
        let Told { calls, .. } = &*self.told();
        assert_eq!(calls.len(), decisions.len(), "{calls:?}, not {decisions:?}");
        assert_eq!(calls.iter().copied().collect::<BTreeMap<_, _>>(), *decisions);
    }

    /// The state with these `decisions`, of a snapshot that was `changed`, was not restored because
    /// of `error`: this host has refused something, or the change. What was open for it is blocked,
    /// and nothing else was open.
    pub fn refused(&self, error: &RestoreError, changed: bool, decisions: &BTreeMap<R, T>) {
        let Told { calls, open } = &*self.told();
        assert!(open.is_empty(), "{error}, but {open:?} are not blocked");
        let refused = (1..=calls.len()).contains(&self.refused);
        assert_eq!(matches!(error, RestoreError::Refused { .. }), refused, "{error}: {calls:?}");
        assert!(refused || changed && calls.is_empty(), "{error}: {calls:?}");
        for (who, treatment) in calls.iter().filter(|(_, treatment)| !treatment.blocks()) {
            assert_eq!(decisions.get(who), Some(treatment), "{who}");
        }
    }

    /// The host has what the virtual IOMMU says by now: of each requester the decision, and whether
    /// it was applied.
    pub fn has(&self, decisions: impl Iterator<Item = (R, T, bool)>) {
        let mut open = self.told().open.clone();
        for (who, decision, applied) in decisions {
            match open.remove(&who) {
                Some(treatment) => assert_eq!(treatment, decision, "{who}"),
                None => assert!(decision.blocks() || !applied, "{who} is blocked: {decision:?}"),
            }
        }
        assert!(open.is_empty(), "nobody decided about {open:?}");
    }

    /// Who is not blocked.
    pub fn open(&self) -> BTreeMap<R, T> {
        self.told().open.clone()
    }
}

impl VtdHostSide for Host<Requester, RequesterConfig> {
    fn configure(&self, who: Requester, config: &RequesterConfig) -> Result<(), HostSideError> {
        self.give(who, *config)
    }

    fn invalidate(&self, _: &[Invalidation]) -> Result<(), HostSideError> {
        Ok(())
    }
}

impl SmmuHostSide for Host<StreamId, StreamPolicy> {
    fn configure(&self, who: StreamId, policy: &StreamPolicy) -> Result<(), HostSideError> {
        self.give(who, *policy)
    }

    fn invalidate(&self, _: &[Command]) -> Result<(), SmmuInvalidateError> {
        Ok(())
    }
}
