// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A host whose verbs fail, once or for a while: streams are blocked meanwhile, or translated as
//! ever; what failed is told; and once verbs do not fail any more, what is repeated is done.

use std::fmt::Debug;
use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use twostage::iommufd::{Errno, FailNth, HostIommu};
use twostage::spec::smmuv3::command::Command;
use twostage::spec::smmuv3::regs;
use twostage_emulated::EmulatedHost;

use super::account::RANGE_ALL;
use super::commands::Ended;
use super::world::World;

/// What verbs fail with: not ENOENT, which says that an object is gone.
const ERRORS: [Errno; 8] = [
    Errno::ENOMEM,
    Errno::EIO,
    Errno::EINVAL,
    Errno::EBUSY,
    Errno::ETIMEDOUT,
    Errno::ENOSPC,
    Errno::EIO,
    Errno::ETIMEDOUT,
];

/// The host, and what is known of its failures.
#[derive(Debug)]
pub struct Failures {
    host: Arc<FailNth<EmulatedHost>>,
    /// Streams may be blocked that the guest's tables do not block.
    pub may_block: bool,
    /// One verb is to fail, and none has since all streams were as the tables say.
    is_first: bool,
}

impl Failures {
    pub fn new(host: Arc<EmulatedHost>) -> Self {
        Self { host: Arc::new(FailNth::new(host)), may_block: false, is_first: false }
    }

    pub fn host(&self) -> Arc<dyn HostIommu> {
        self.host.clone()
    }

    /// Whether a verb is to fail.
    pub fn are_due(&self) -> bool {
        self.host.is_armed()
    }

    /// No verb fails any more.
    fn end(&mut self) {
        self.host.fail_nth(0, Errno::EIO);
        self.is_first = false;
    }

    fn begin(&mut self, once: bool, number: u64, errno: Errno) {
        match once {
            true => self.host.fail_nth(number, errno),
            false => self.host.fail_next(number, errno),
        }
        self.is_first = once && !self.may_block;
        self.may_block = true;
    }

    /// Does what fails only if a verb does; then again, when none does.
    pub fn insist<T, E: Debug>(&mut self, act: impl Fn() -> std::result::Result<T, E>) -> T {
        let due = self.are_due();
        act().unwrap_or_else(|error| {
            assert!(due, "the host does not fail: {error:?}");
            self.end();
            act().expect("no verb fails any more")
        })
    }
}

impl World {
    /// [`World::command`], while verbs fail.
    pub fn command_that_may_fail(&mut self, commands: &[Command]) {
        let wrong = commands.iter().position(|command| !self.accepts(command));
        let attaches = |command: &Command| {
            matches!(command, Command::CfgiSte { .. } | Command::CfgiSteRange { .. })
        };
        // A stream that cannot be attached is blocked, and nothing else is told.
        let must_tell = self.failures.is_first && !commands.iter().any(attaches);
        let ended = self.ended(commands);
        self.is_unanswered = true;
        crate::models::trace(|| format!("  {commands:x?}, while verbs fail: {ended:?}"));
        assert!(wrong.is_none() || ended.wrong.is_some(), "{ended:?}: {commands:x?}");
        if self.failures.are_due() {
            return;
        }
        let is_told = ended != Ended { wrong: None, unanswered: false };
        assert!(is_told || !must_tell, "it failed, and is complete: {commands:x?}");
        self.failures.is_first = false;
        if !self.silent.contains(&true) {
            let again = self.ended(commands);
            assert_eq!(again.wrong, wrong, "again: {commands:x?}");
        }
    }

    /// `commands` are complete, and no verb has failed meanwhile.
    pub fn may_repair(&mut self, commands: &[Command]) {
        let is_all = |command: &Command| matches!(command, Command::CfgiSteRange { range, .. } if *range == RANGE_ALL);
        let is_acknowledged = self.read32(regs::CR0) == self.read32(regs::CR0ACK);
        let repaired = self.is_enabled() && is_acknowledged && commands.iter().any(is_all);
        self.failures.may_block &= !repaired;
    }
}

/// Verbs begin to fail, or none does any more.
pub fn step(world: &mut World, input: &mut Unstructured) -> Result<()> {
    let [how, number]: [u8; 2] = input.arbitrary()?;
    let errno = ERRORS[usize::from(how >> 3 & 7)];
    match how & 7 {
        0..=3 => world.failures.begin(true, 1 + u64::from(number % 8), errno),
        4 | 5 => world.failures.begin(false, 1 + u64::from(number % 40), errno),
        6 => world.failures.end(),
        _ => {
            // The last one that goes, and the first one that comes.
            for device in [0, 1] {
                if world.plugged[device] {
                    world.plug(device);
                }
            }
            world.failures.begin(number & 0x80 == 0, 1 + u64::from(number % 16), errno);
            world.plug(usize::from(how >> 6 & 1));
        }
    }
    Ok(())
}
