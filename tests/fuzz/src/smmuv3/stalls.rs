// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Transactions that stall: each ends once, as the guest says, or as it must without that.
//!
//! Nobody reads the host's queue here, so they get into the event queue where a CMD_SYNC says that
//! they must, and what that queue has no room for is tried again.

use twostage::iommufd::PageResponseCode;
use twostage::spec::pci::Pasid;
use twostage::spec::smmuv3::command::Command;
use twostage::spec::smmuv3::event::{EventId, EventRecord};
use twostage::spec::smmuv3::page_request::Resume;
use twostage::spec::smmuv3::StreamId;

use twostage_emulated::DmaPort;

use super::dma::Dma;
use super::world::{World, DEVICES};

/// More than these do not wait, if the guest can say so.
const MOST: usize = 8;

/// One that has not ended, as far as the device knows.
#[derive(Debug, Clone)]
pub struct Waiting {
    dma: Dma,
    /// Its tag.
    group: u16,
    /// The guest has a record of it; `None`: perhaps.
    recorded: Option<bool>,
    /// How it may have ended.
    may: Vec<PageResponseCode>,
    /// It has.
    must: bool,
}

impl Waiting {
    fn is_of(&self, of: StreamId) -> bool {
        u32::from(DEVICES[self.dma.device]) == of.raw()
    }

    /// Checks that its device does not wait any more.
    pub fn has_ended(&self, ports: &[DmaPort]) {
        assert!(ports[self.dma.device].page_response(self.group).is_some(), "{self:x?} waits");
    }

    fn may(&mut self, code: PageResponseCode) {
        if !self.may.contains(&code) {
            self.may.push(code);
        }
    }

    /// Whether `event` is what the guest is told of it.
    fn is(&self, event: &EventRecord) -> bool {
        let Dma { substream, address, kind, .. } = self.dma;
        let qw1 = event.qw1;
        self.is_of(event.stream())
            && qw1.stag() == self.group
            && event.id() == Some(EventId::Translation)
            && event.substream() == substream.and_then(Pasid::new)
            && event.input_address == address
            && (qw1.rnw(), qw1.pnu(), qw1.ind()) == (!kind.write, kind.privileged, kind.execute)
    }
}

impl World {
    /// `dma` waits, by this tag.
    pub fn waits(&mut self, dma: Dma, group: u16) {
        let (must, may) = Default::default();
        self.waiting.push(Waiting { dma, group, recorded: Some(false), may, must });
    }

    /// Has all that wait end, if they are many. Where the queue stands, they wait on.
    pub fn let_wait(&mut self) {
        if self.waiting.len() >= MOST {
            let end = |rid: u16| Command::StallTerm { stream: StreamId(rid.into()) };
            self.say(&DEVICES.map(end));
        }
    }

    /// Something has happened after which all that wait may have a record or have ended.
    pub fn may_end(&mut self) {
        for waiting in &mut self.waiting {
            waiting.recorded = waiting.recorded.filter(|recorded| *recorded);
            waiting.may(PageResponseCode::Success);
            waiting.may(PageResponseCode::Invalid);
        }
    }

    /// `commands` and a CMD_SYNC are complete, which has written `records`.
    pub fn ended_by(&mut self, commands: &[Command], records: &[EventRecord]) {
        for command in commands {
            for waiting in &mut self.waiting {
                match *command {
                    // What a stream is attached to may be another one.
                    Command::CfgiSte { .. } | Command::CfgiSteRange { .. } => {
                        waiting.may(PageResponseCode::Invalid);
                    }
                    Command::Resume { stream, stag, response }
                        if waiting.is_of(stream) && stag == waiting.group =>
                    {
                        // One whose record is new need not have had it before.
                        waiting.may(match Resume::from_bits(response) {
                            Resume::Retry => PageResponseCode::Success,
                            Resume::Abort | Resume::Terminate => PageResponseCode::Invalid,
                        });
                        waiting.must |= waiting.recorded == Some(true);
                    }
                    Command::StallTerm { stream } if waiting.is_of(stream) => {
                        waiting.may(PageResponseCode::Invalid);
                        waiting.must = true;
                    }
                    _ => {}
                }
            }
        }
        // The SMMU's own are of entries that it cannot read.
        for record in records.iter().filter(|record| record.qw1.stall()) {
            let mut waiting = self.waiting.iter_mut();
            let of = waiting.find(|it| it.recorded != Some(true) && it.is(record));
            let of = of.unwrap_or_else(|| panic!("{record:x?} is of nothing that waits"));
            of.recorded = Some(true);
        }
        for waiting in self.waiting.iter_mut().filter(|it| it.recorded == Some(false)) {
            waiting.may(PageResponseCode::Success);
            waiting.must = true;
        }
    }

    /// Takes the answers to all that wait; those that are to be tried again are.
    pub fn take_answers(&mut self) {
        for waiting in std::mem::take(&mut self.waiting) {
            let Waiting { dma, group, ref may, must, .. } = waiting;
            match self.ports[dma.device].page_response(group) {
                None => {
                    assert!(!must, "{waiting:x?} waits");
                    self.waiting.push(waiting);
                }
                Some(code) => {
                    assert!(may.contains(&code), "{code:?} for {waiting:x?}");
                    if code == PageResponseCode::Success {
                        self.dma(dma);
                    }
                }
            }
        }
    }

    /// The guest says something about one that waits, or reads its event queue.
    pub fn resume(&mut self, how: u8) {
        let number = usize::from(how >> 2 & 7) % self.waiting.len().max(1);
        let Some(waiting) = self.waiting.get(number) else { return self.read_events() };
        let stream = StreamId(DEVICES[waiting.dma.device].into());
        let resume = Command::Resume { stream, stag: waiting.group, response: how & 3 };
        match how >> 5 {
            0..=3 => self.command(&[resume]),
            4 => self.command(&[Command::StallTerm { stream }]),
            5 => self.command(&[resume, resume]),
            6 => self.command(&[]),
            _ => self.read_events(),
        }
    }
}
