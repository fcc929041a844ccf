// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device that goes on with DMA, on a thread of its own, while something happens.

use std::cell::OnceCell;
use std::fmt::Debug;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender, TryRecvError};
use std::sync::Arc;
use std::thread;

use twostage_emulated::{DmaAttributes, DmaPort};

use super::memory::Memory;

/// What the device does, again and again.
#[derive(Debug, Clone, Copy)]
pub struct Access {
    pub attributes: DmaAttributes,
    /// An aligned word.
    pub iova: u64,
    /// What it writes; `None`: it reads.
    pub value: Option<u64>,
}

impl Access {
    /// Does it; the word, if it is not refused.
    fn once(&self, port: &mut DmaPort) -> Option<u64> {
        let mut bytes = self.value.unwrap_or_default().to_le_bytes();
        let done = match self.value {
            Some(_) => port.write(self.attributes, self.iova, &bytes),
            None => port.read(self.attributes, self.iova, &mut bytes),
        };
        done.is_ok().then(|| u64::from_le_bytes(bytes))
    }
}

/// How far the device is.
#[derive(Debug, Default)]
struct Progress {
    over: AtomicBool,
    count: AtomicU64,
}

/// Ends the device's DMA when it is dropped.
struct Beside {
    progress: Arc<Progress>,
    ended: Receiver<Option<u64>>,
}

impl Beside {
    fn start(mut port: DmaPort, access: Access) -> Self {
        let progress = Arc::<Progress>::default();
        let ((end, ended), of_device) = (channel(), progress.clone());
        work(Box::new(move || {
            let mut last = None;
            while !of_device.over.load(Ordering::SeqCst) {
                last = access.once(&mut port);
                of_device.count.fetch_add(1, Ordering::SeqCst);
            }
            // Whoever waits owns the unit alone.
            drop(port);
            // Nobody waits if something has failed.
            let _ = end.send(last);
        }));
        Self { progress, ended }
    }

    /// Waits until an access that begins after this call has ended.
    fn go_on(&self) {
        let enough = self.progress.count.load(Ordering::SeqCst) + 2;
        while self.progress.count.load(Ordering::SeqCst) < enough {
            assert_eq!(
                self.ended.try_recv(),
                Err(TryRecvError::Empty),
                "it does not end by itself"
            );
            thread::yield_now();
        }
    }

    /// What the last access got.
    fn end(self) -> Option<u64> {
        self.progress.over.store(true, Ordering::SeqCst);
        self.ended.recv().expect("no access panics")
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        self.progress.over.store(true, Ordering::SeqCst);
    }
}

/// The machine of a fuzzer, with a model that says where DMA may go.
pub trait Machine {
    /// A request of a device.
    type Dma: Copy + Debug;

    fn memory(&mut self) -> &mut Memory;
    /// A port of the device of `dma`, and what it does there but for the word that it writes.
    fn access(&self, dma: Self::Dma) -> (DmaPort, Access);
    /// Whether `dma` writes.
    fn writes(dma: Self::Dma) -> bool;
    /// `dma`, but it reads.
    fn reading(dma: Self::Dma) -> Self::Dma;
    /// How many words devices have written.
    fn serial(&mut self) -> &mut u64;
    /// The last DMA of a device, by number, that is there.
    fn last_of(&self, device: usize) -> Option<Self::Dma>;
    /// A device goes, or comes back.
    fn plug(&mut self, device: usize);
    /// Whether it is known what happens while `dma` goes on.
    fn may_go_on(&self, dma: Self::Dma) -> bool;
    /// Where `dma` may go; `None`: it is not known, or it may be elsewhere than in pages for data.
    fn data(&mut self, dma: Self::Dma) -> Option<Vec<u64>>;
    /// Does `dma` once.
    fn dma(&mut self, dma: Self::Dma);

    /// A word that nothing has written yet.
    fn next_value(&mut self) -> u64 {
        *self.serial() += 1;
        0x5e_0000_0000_0000 | *self.serial() << 12
    }
}

/// A device goes or comes back; as `how` says, it goes in the middle of what it did last, if it did
/// anything.
pub fn plug<M: Machine>(machine: &mut M, how: u8) {
    let device = usize::from(how & 1);
    match machine.last_of(device).filter(|_| how & 0x30 == 0x30) {
        Some(dma) => goes_on(machine, dma, None, |machine| machine.plug(device)),
        None => machine.plug(device),
    }
}

/// `dma` goes on while a word `changes`, if one does (its address and what it becomes), of which
/// nobody is told, and then `end` happens. When that is over, nothing gets to where the device went
/// before, unless it may go there now. Where a write may go to what is no data, the device reads.
/// Where it is not known what happens meanwhile, it does nothing.
pub fn goes_on<M: Machine>(
    machine: &mut M,
    dma: M::Dma,
    changes: Option<(u64, u64)>,
    end: impl FnOnce(&mut M),
) {
    if !machine.may_go_on(dma) {
        changes.into_iter().for_each(|(at, next)| machine.memory().store(at, next));
        return end(machine);
    }
    let changes = changes.and_then(|(at, next)| Some((at, machine.memory().load(at)?, next)));
    // All that the device may use is known before it begins: it sets flags in tables then.
    if let Some((at, _, next)) = changes {
        machine.memory().store(at, next);
    }
    let mut may = machine.data(dma);
    let (mut does, writes) = (dma, M::writes(dma) && may.is_some());
    if !writes {
        does = M::reading(dma);
        may = machine.data(does);
    }
    if let Some((at, now, _)) = changes {
        machine.memory().store(at, now);
    }
    let before = may.filter(|_| writes).unwrap_or_default();
    let (port, mut access) = machine.access(does);
    let (value, mark) = (machine.next_value(), machine.next_value());
    access.value = writes.then_some(value);
    let beside = Beside::start(port, access);
    beside.go_on();
    if let Some((at, _, next)) = changes {
        machine.memory().store(at, next);
    }
    end(machine);
    before.iter().for_each(|gpa| machine.memory().store(*gpa, mark));
    beside.go_on();
    let got = beside.end();
    let then = machine.data(does);
    let what = || format!("{does:x?}: {got:x?}, {before:x?}, {then:x?}");
    super::trace(|| format!("  beside {}", what()));
    if let Some(then) = &then {
        let mut word = |gpa: u64| machine.memory().load(gpa);
        for gpa in before.iter().filter(|gpa| !then.contains(gpa)) {
            assert_eq!(word(*gpa), Some(mark), "it is written to at {gpa:x}; {}", what());
        }
        // Read, or written by the last access.
        let is_there = got.is_none() || then.iter().any(|gpa| word(*gpa) == got);
        assert!(is_there, "{}", what());
    }
    machine.dma(dma);
}

type Work = Box<dyn FnOnce() + Send>;

/// Has a thread do `work`: to start one takes longer than most executions.
fn work(work: Work) {
    thread_local! {
        static WORKER: OnceCell<Sender<Work>> = const { OnceCell::new() };
    }
    let start = || {
        let (sender, all) = channel::<Work>();
        thread::spawn(move || all.into_iter().for_each(|work| work()));
        sender
    };
    WORKER.with(|worker| worker.get_or_init(start).send(work)).expect("no work panics");
}
