// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What each invalidation drops, by queue and by register, from the guest's descriptor to the
//! host's caches: compared after every step with naive caches, an IOTLB and a paging-structure
//! cache.

use std::cell::RefCell;

use proptest::prelude::*;
use twostage::spec::pci::Bdf;
use twostage::spec::vtd::first_stage::FirstStageEntry;
use twostage::spec::vtd::qi::{AddressMask, ContextScope, Descriptor, IotlbScope, PasidCacheScope};
use twostage::spec::vtd::regs::{self, Ccmd, Ecap, IotlbReg, Iva};
use twostage::spec::vtd::second_stage::SecondStageEntry;
use twostage_emulated::kit::Mmio;
use twostage_emulated::VtdUnitConfig;

use super::guest::{Completion, Entry};
use super::machine::{self, vtd_config, Machine};
use super::{iotlb, pasid_pages};
use crate::caches::{self, overlaps, write, Caches, Format, Next, Space, Write, SLOTS};
use crate::common::{A, B, PAGE};

/// The largest mask of CAP.MAMV.
const MAMV: u8 = 18;

struct FirstStage;
pub(super) struct SecondStage;

impl Format for FirstStage {
    fn pointer(&self, gpa: u64) -> u64 {
        let user = FirstStageEntry::new().with_p(true).with_us(true).with_rw(true);
        user.with_frame(gpa / PAGE).into_bits()
    }

    /// The global bit is for processors only: it is ignored here.
    fn leaf(&self, gpa: u64, height: u8, global: bool) -> u64 {
        let large = FirstStageEntry::new().with_ps(height > 1).into_bits();
        self.pointer(gpa) | large | u64::from(global) << 8
    }

    fn decode(&self, word: u64, height: u8) -> Option<Next> {
        let entry = FirstStageEntry::from_bits(word);
        let gpa = entry.address(height);
        entry.p().then_some(Next { gpa, leaf: entry.is_leaf(height), global: false })
    }
}

impl Format for SecondStage {
    fn pointer(&self, gpa: u64) -> u64 {
        let entry = SecondStageEntry::new().with_r(true).with_w(true);
        entry.with_frame(gpa / PAGE).into_bits()
    }

    fn leaf(&self, gpa: u64, height: u8, _: bool) -> u64 {
        self.pointer(gpa) | SecondStageEntry::new().with_ps(height > 1).into_bits()
    }

    fn decode(&self, word: u64, height: u8) -> Option<Next> {
        let entry = SecondStageEntry::from_bits(word);
        let gpa = entry.address(height);
        entry.is_present().then_some(Next { gpa, leaf: entry.is_leaf(height), global: false })
    }
}

/// What is cached of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Kind {
    /// First-stage tables, alone or with second-stage tables below.
    FirstStage,
    SecondStage,
    /// The second-stage tables below first-stage ones.
    Below,
}

/// The tag of a cached translation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Tag {
    pub kind: Kind,
    pub domain: u16,
    pub pasid: u32,
}

/// Drops what `descriptor` requires (§6.5.2.3, §6.5.2.4).
pub(super) fn forget(caches: &mut Caches<Tag>, descriptor: &Descriptor) {
    let (names, range): (Box<dyn Fn(Tag) -> bool>, _) = match *descriptor {
        Descriptor::Iotlb { scope: IotlbScope::Global, .. } => (Box::new(|_| true), None),
        Descriptor::Iotlb { scope: IotlbScope::Domain(domain), .. } => {
            (Box::new(move |tag| tag.domain == domain), None)
        }
        Descriptor::Iotlb { scope: IotlbScope::Pages { domain, range }, .. } => {
            // Everything of first-stage tables, whatever the address and the hint.
            let first_stage = |tag: Tag| tag.domain == domain && tag.kind == Kind::FirstStage;
            caches.pages.retain(|page| !first_stage(page.tag));
            caches.tables.retain(|table| !first_stage(table.tag));
            let second_stage = move |tag: Tag| tag.domain == domain && tag.kind != Kind::FirstStage;
            (Box::new(second_stage), Some(range))
        }
        Descriptor::PasidIotlb { domain, pasid, range } => {
            let pasid = pasid.raw();
            // Nothing of second-stage tables need be dropped; where they are alone it is, and no
            // test depends on it.
            let names = move |tag: Tag| tag.domain == domain && tag.pasid == pasid;
            (Box::new(move |tag| names(tag) && tag.kind != Kind::Below), range)
        }
        _ => return,
    };
    let (first, last, leaf) = match range {
        Some(AddressMask { address, mask, leaf }) if mask < 52 => {
            let low = (1 << (12 + mask)) - 1;
            (address & !low, address | low, leaf)
        }
        // With the hint a mask of all addresses need not drop tables, but does.
        Some(_) | None => (0, u64::MAX, false),
    };
    // A mask that is too small for a large page need not drop it, but does.
    caches
        .pages
        .retain(|page| !(names(page.tag) && overlaps(page.iova, page.shift(), first, last)));
    // The hint: no table pointer has changed.
    caches.tables.retain(|table| {
        leaf || !(names(table.tag) && overlaps(table.iova, table.shift(), first, last))
    });
}

/// Ranges: a page that tests use, a mask, the hint.
fn range(masks: &'static [u8]) -> impl Strategy<Value = AddressMask> {
    (0..SLOTS, prop::sample::select(masks), any::<bool>())
        .prop_map(|(slot, mask, leaf)| AddressMask { address: caches::iova(slot), mask, leaf })
}

/// Domains: of requesters, and an unused one.
fn domain() -> impl Strategy<Value = u16> {
    5u16..8
}

fn iotlb_scope(masks: &'static [u8]) -> impl Strategy<Value = IotlbScope> {
    prop_oneof![
        1 => Just(IotlbScope::Global),
        2 => domain().prop_map(IotlbScope::Domain),
        6 => (domain(), range(masks))
            .prop_map(|(domain, range)| IotlbScope::Pages { domain, range }),
    ]
}

/// Descriptors of scalable mode.
pub(super) fn descriptor() -> impl Strategy<Value = Descriptor> {
    let pages = prop::option::weighted(0.8, range(&[0, 1, 9, MAMV, 30, 52]));
    prop_oneof![
        6 => iotlb_scope(&[0, 1, 9, MAMV]).prop_map(iotlb),
        6 => (domain(), 0u32..3, pages)
            .prop_map(|(domain, pasid, range)| pasid_pages(domain, pasid, range)),
        // These do not affect translations.
        1 => pasid_cache().prop_map(Descriptor::PasidCache),
        1 => context().prop_map(Descriptor::ContextCache),
    ]
}

pub(super) fn pasid_cache() -> impl Strategy<Value = PasidCacheScope> {
    let one = |(domain, pasid)| PasidCacheScope::Pasid { domain, pasid: machine::pasid(pasid) };
    prop_oneof![
        Just(PasidCacheScope::Global),
        domain().prop_map(PasidCacheScope::Domain),
        (domain(), 0u32..3).prop_map(one),
    ]
}

pub(super) fn context() -> impl Strategy<Value = ContextScope> {
    // Functions 4.0 and 5.0, the devices, and others.
    let source = prop::sample::select(vec![0x20u16, 0x21, 0x24, 0x27, 0x28, 0x2e]);
    prop_oneof![
        Just(ContextScope::Global),
        domain().prop_map(ContextScope::Domain),
        (domain(), source, 0u8..4).prop_map(|(domain, source, function_mask)| {
            ContextScope::Device { domain, source: Bdf::from_raw(source), function_mask }
        }),
    ]
}

#[derive(Debug, Clone)]
enum Step {
    /// Writes an entry of this space's tables.
    Write(usize, Write),
    /// The guest invalidates.
    Forget(Vec<Descriptor>),
}

/// Steps, each with the pages to read after it.
fn steps(
    spaces: usize,
    descriptor: impl Strategy<Value = Descriptor>,
) -> impl Strategy<Value = Vec<(Step, u64)>> {
    // All of a batch have the hint or none: adjacent ranges of a batch lose it together.
    let batch =
        (prop::collection::vec(descriptor, 1..4), any::<bool>()).prop_map(|(mut batch, hint)| {
            for descriptor in &mut batch {
                match descriptor {
                    Descriptor::Iotlb { scope: IotlbScope::Pages { range, .. }, .. }
                    | Descriptor::PasidIotlb { range: Some(range), .. } => range.leaf = hint,
                    _ => {}
                }
            }
            Step::Forget(batch)
        });
    let step = prop_oneof![
        (0..spaces, write()).prop_map(|(space, write)| Step::Write(space, write)),
        batch,
    ];
    let reads = prop_oneof![Just(u64::MAX), any::<u64>()];
    prop::collection::vec((step, reads), 1..24)
}

/// A machine, its address spaces, and the devices that use them.
struct Bench {
    machine: Machine,
    spaces: Vec<Space>,
    users: Vec<(Bdf, Option<u32>, Tag, usize)>,
    caches: RefCell<Caches<Tag>>,
}

impl Bench {
    /// On a unit that also supports guest-owned second-stage tables.
    fn new(formats: &[&'static dyn Format]) -> Self {
        let unit = VtdUnitConfig::default().with_guest_second_stage(true);
        let machine = Machine::with(unit, vtd_config().with_second_stage(true));
        caches::number_pages(&machine.guest);
        let spaces = formats.iter().map(|format| Space::new(&machine.guest, *format)).collect();
        Self { machine, spaces, users: Vec::new(), caches: RefCell::default() }
    }

    /// Scalable mode: first- and second-stage tables under the same domain IDs; devices that share.
    fn scalable() -> Self {
        let mut bench =
            Self::new(&[&FirstStage, &FirstStage, &FirstStage, &SecondStage, &SecondStage]);
        let guest = &bench.machine.guest;
        for (rid, pasid, domain, space) in [
            (A, None, 5, 0),
            (B, None, 5, 0),
            (A, Some(1), 5, 1),
            (B, Some(1), 5, 1),
            (A, Some(2), 6, 2),
            (A, Some(3), 5, 3),
            (B, Some(3), 6, 4),
        ] {
            let table = bench.spaces[space].top;
            let (kind, entry) = match space > 2 {
                true => (Kind::SecondStage, Entry::SecondStage { table, domain }),
                false => (Kind::FirstStage, Entry::FirstStage { table, domain }),
            };
            guest.set_entry(rid, pasid.unwrap_or(0), entry);
            let tag = Tag { kind, domain, pasid: pasid.unwrap_or(0) };
            bench.users.push((rid, pasid, tag, space));
        }
        guest.enable();
        bench
    }

    /// Legacy mode: second-stage tables, of one domain or two.
    fn legacy(queue: bool, shared: bool) -> Self {
        let mut bench = Self::new(&[&SecondStage, &SecondStage]);
        let guest = &bench.machine.guest;
        for (rid, domain, space) in [(A, 5, 0), if shared { (B, 5, 0) } else { (B, 6, 1) }] {
            let table = bench.spaces[space].top;
            guest.set_legacy_entry(rid, Entry::SecondStage { table, domain });
            let tag = Tag { kind: Kind::SecondStage, domain, pasid: 0 };
            bench.users.push((rid, None, tag, space));
        }
        guest.enable_legacy(queue);
        bench
    }

    /// Takes a step, without the reads.
    fn take(&self, step: &Step, tell: impl Fn(&Machine, &[Descriptor])) {
        let guest = &self.machine.guest;
        match step {
            Step::Write(space, write) => self.spaces[*space].write(guest, *write),
            Step::Forget(batch) => {
                tell(&self.machine, batch);
                batch.iter().for_each(|it| forget(&mut self.caches.borrow_mut(), it));
            }
        }
    }

    /// The devices' reads, and those of the model.
    fn compare(&self, reads: u64) -> Result<(), String> {
        let slots = (0..SLOTS).filter(|slot| reads >> slot & 1 != 0);
        for slot in slots {
            let iova = caches::iova(slot);
            for (rid, pasid, tag, space) in &self.users {
                let tags = (*tag, None);
                let space = &self.spaces[*space];
                let model = self.caches.borrow_mut().read(&self.machine.guest, space, tags, iova);
                let read = self.machine.read(*rid, *pasid, iova).ok();
                if read != model {
                    return Err(format!("{rid} {tag:?} at {iova:#x}: {read:x?}, not {model:x?}"));
                }
            }
        }
        Ok(())
    }

    fn run(
        &self,
        steps: &[(Step, u64)],
        tell: impl Fn(&Machine, &[Descriptor]),
    ) -> Result<(), TestCaseError> {
        let compare = |reads| self.compare(reads).map_err(TestCaseError::fail);
        compare(u64::MAX)?;
        for (number, (step, reads)) in steps.iter().enumerate() {
            self.take(step, &tell);
            self.compare(*reads)
                .map_err(|error| TestCaseError::fail(format!("after {number}: {error}")))?;
        }
        compare(u64::MAX)
    }
}

pub(super) fn by_queue(machine: &Machine, batch: &[Descriptor]) {
    assert_eq!(machine.guest.submit(batch), Completion::Done, "{batch:?}");
}

/// Each by the IOTLB or the context command register, which must report completion.
pub(super) fn by_register(machine: &Machine, batch: &[Descriptor]) {
    let guest = &machine.guest;
    for descriptor in batch {
        match *descriptor {
            Descriptor::Iotlb { scope, .. } => {
                let base = Ecap::from_bits(guest.registers.read64(regs::ECAP)).iotlb_offset();
                let command = IotlbReg::new().with_dw(true).with_dr(true).with_ivt(true);
                let (command, done) = match scope {
                    IotlbScope::Global => (command.with_iirg(1), 1),
                    IotlbScope::Domain(domain) => (command.with_iirg(2).with_did(domain), 2),
                    IotlbScope::Pages { domain, range } => {
                        let AddressMask { address, mask, leaf } = range;
                        let iva = Iva::new().with_am(mask).with_ih(leaf).with_addr(address / PAGE);
                        guest.registers.write64(base + regs::IVA, iva.into_bits());
                        let done = if mask > MAMV { 2 } else { 3 };
                        (command.with_iirg(3).with_did(domain), done)
                    }
                };
                guest.registers.write64(base + regs::IOTLB, command.into_bits());
                let answer = IotlbReg::from_bits(guest.registers.read64(base + regs::IOTLB));
                assert_eq!((answer.ivt(), answer.iaig()), (false, done), "{scope:?}");
            }
            Descriptor::ContextCache(scope) => {
                let command = Ccmd::new().with_icc(true);
                let (command, done) = match scope {
                    ContextScope::Global => (command.with_cirg(1), 1),
                    ContextScope::Domain(domain) => (command.with_cirg(2).with_did(domain), 2),
                    ContextScope::Device { domain, source, function_mask } => {
                        let command = command.with_cirg(3).with_did(domain);
                        (command.with_sid(source.raw()).with_fm(function_mask), 3)
                    }
                };
                guest.registers.write64(regs::CCMD, command.into_bits());
                let answer = Ccmd::from_bits(guest.registers.read64(regs::CCMD));
                assert_eq!((answer.icc(), answer.caig()), (false, done), "{scope:?}");
            }
            _ => unreachable!("no register asks for that"),
        }
    }
}

/// Descriptors of legacy mode, for either interface.
fn legacy_descriptor(masks: &'static [u8]) -> impl Strategy<Value = Descriptor> {
    prop_oneof![
        6 => iotlb_scope(masks).prop_map(iotlb),
        1 => context().prop_map(Descriptor::ContextCache),
    ]
}

/// A mask that is larger than supported covers the whole domain.
fn widened(step: &(Step, u64)) -> (Step, u64) {
    let (Step::Forget(batch), reads) = step else { return step.clone() };
    let widen = |descriptor: &Descriptor| match *descriptor {
        Descriptor::Iotlb { scope: IotlbScope::Pages { domain, range }, .. }
            if range.mask > MAMV =>
        {
            iotlb(IotlbScope::Domain(domain))
        }
        other => other,
    };
    (Step::Forget(batch.iter().map(widen).collect()), *reads)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn translations_go_as_the_text_says(steps in steps(5, descriptor())) {
        Bench::scalable().run(&steps, by_queue)?;
    }

    #[test]
    fn translations_of_legacy_mode_go_as_the_text_says(
        shared in any::<bool>(),
        steps in steps(1, legacy_descriptor(&[0, 1, 9, MAMV])),
    ) {
        Bench::legacy(true, shared).run(&steps, by_queue)?;
    }

    #[test]
    fn translations_go_by_register_as_the_text_says(
        shared in any::<bool>(),
        steps in steps(1, legacy_descriptor(&[0, 1, 9, MAMV, 19, 52])),
    ) {
        let bench = Bench::legacy(false, shared);
        // The unit gets the original step; the model widens it.
        for step in &steps {
            let (_, reads) = step;
            if let (Step::Forget(batch), _) = step {
                by_register(&bench.machine, batch);
            }
            bench.take(&widened(step).0, |_, _| {});
            bench.compare(*reads).map_err(TestCaseError::fail)?;
        }
        bench.compare(u64::MAX).map_err(TestCaseError::fail)?;
    }
}
