// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What each invalidation of the context and PASID caches drops, by queue and by register: after
//! every step no device uses an entry that must be dropped according to the text. (More may be
//! dropped.)

use proptest::prelude::*;
use twostage::spec::pci::Bdf;
use twostage::spec::vtd::qi::{ContextScope, Descriptor, PasidCacheScope};
use twostage_emulated::VtdUnitConfig;

use super::granularity::{by_queue, by_register, context, pasid_cache};
use super::guest::Entry;
use super::machine::{vtd_config, Machine};
use crate::common::{A, B};

/// A GPA, which every table maps.
const IOVA: u64 = 0xc0_0000;
const TABLES: usize = 3;

/// Kinds of tables.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    FirstStage,
    SecondStage,
    Nested,
}

const KINDS: [Kind; 3] = [Kind::FirstStage, Kind::SecondStage, Kind::Nested];

/// An entry: a table, by its number.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Choice {
    Nothing,
    Bypass { domain: u16 },
    Tables { kind: Kind, number: usize, domain: u16 },
}

impl Choice {
    fn domain(self) -> Option<u16> {
        match self {
            Self::Nothing => None,
            Self::Bypass { domain } | Self::Tables { domain, .. } => Some(domain),
        }
    }

    /// The result of a read at [`IOVA`].
    fn reads(self) -> Option<u64> {
        match self {
            Self::Nothing => None,
            Self::Bypass { .. } => Some(1),
            Self::Tables { number, kind, .. } => Some(10 + 10 * kind as u64 + number as u64),
        }
    }
}

fn choice(first_stage: bool) -> impl Strategy<Value = Choice> {
    let kinds = if first_stage { &KINDS[..] } else { &[Kind::SecondStage] };
    let tables = (prop::sample::select(kinds), 0..TABLES, 5u16..8)
        .prop_map(|(kind, number, domain)| Choice::Tables { kind, number, domain });
    prop_oneof![
        1 => Just(Choice::Nothing),
        1 => (5u16..8).prop_map(|domain| Choice::Bypass { domain }),
        6 => tables,
    ]
}

#[derive(Debug, Clone)]
enum Step {
    /// The entry of this requester changes, without invalidation.
    Write(usize, Choice),
    Forget(Vec<Descriptor>),
}

fn steps(
    requesters: usize,
    first_stage: bool,
    descriptor: impl Strategy<Value = Descriptor>,
) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0..requesters, choice(first_stage)).prop_map(|(of, choice)| Step::Write(of, choice)),
        prop::collection::vec(descriptor, 1..4).prop_map(Step::Forget),
    ];
    prop::collection::vec(step, 1..40)
}

struct Requester {
    rid: Bdf,
    pasid: Option<u32>,
    now: Choice,
    /// What else may be cached, besides the current entry.
    before: Vec<Choice>,
}

impl Requester {
    fn new((rid, pasid): (Bdf, Option<u32>)) -> Self {
        Self { rid, pasid, now: Choice::Nothing, before: Vec::new() }
    }

    /// Whether `descriptor` covers what is cached of `choice` (§6.5.2.1, §6.5.2.2). In caching mode
    /// non-present entries are cached, too, without a domain: they are dropped with the current
    /// one.
    fn is_named(&self, descriptor: &Descriptor, choice: Choice) -> bool {
        let is_in = |domain| choice.domain().or(self.now.domain()) == Some(domain);
        match *descriptor {
            Descriptor::PasidCache(PasidCacheScope::Global)
            | Descriptor::ContextCache(ContextScope::Global) => true,
            Descriptor::PasidCache(PasidCacheScope::Domain(domain))
            | Descriptor::ContextCache(ContextScope::Domain(domain)) => is_in(domain),
            Descriptor::PasidCache(PasidCacheScope::Pasid { domain, pasid }) => {
                // Requests without PASID use RID_PASID, which is 0.
                is_in(domain) && self.pasid.unwrap_or(0) == pasid.raw()
            }
            Descriptor::ContextCache(ContextScope::Device { domain, source, function_mask }) => {
                let ignored = [0, 0b100, 0b110, 0b111][usize::from(function_mask)];
                is_in(domain) && (self.rid.raw() ^ source.raw()) & !ignored == 0
            }
            _ => false,
        }
    }
}

/// Runs `steps` on a machine whose `requesters` have their entries set by `set`.
fn run(
    machine: &Machine,
    requesters: &[(Bdf, Option<u32>)],
    steps: &[Step],
    set: impl Fn(&Machine, &Requester, Entry),
    tell: impl Fn(&Machine, &[Descriptor]),
) -> Result<(), TestCaseError> {
    let guest = &machine.guest;
    guest.store(IOVA, 1);
    // Nested ones differ in the first stage, in the second, or in both.
    let below = [guest.page(), guest.page()];
    let tables = KINDS.map(|kind| {
        std::array::from_fn::<_, TABLES, _>(|number| {
            let (table, page) = (guest.page(), guest.page());
            let choice = Choice::Tables { kind, number, domain: 0 };
            guest.store(page, choice.reads().unwrap());
            match kind {
                Kind::FirstStage => guest.map(table, IOVA, page, 1, true),
                Kind::SecondStage => guest.map_second_stage(table, IOVA, page, true),
                Kind::Nested => guest.map_nested(table, below[number % 2], IOVA, page, true),
            }
            table
        })
    });
    let mut requesters: Vec<_> = requesters.iter().copied().map(Requester::new).collect();
    for (number, step) in steps.iter().enumerate() {
        match step {
            Step::Write(of, choice) => {
                let requester = &mut requesters[*of];
                requester.before.push(requester.now);
                requester.now = *choice;
                let entry = match *choice {
                    Choice::Nothing => Entry::NotPresent,
                    Choice::Bypass { domain } => Entry::PassThrough { domain },
                    Choice::Tables { kind, number, domain } => {
                        let table = tables[kind as usize][number];
                        let second = below[number % 2];
                        match kind {
                            Kind::FirstStage => Entry::FirstStage { table, domain },
                            Kind::SecondStage => Entry::SecondStage { table, domain },
                            Kind::Nested => {
                                let (first, accessed_dirty) = (table, false);
                                Entry::Nested { first, second, domain, accessed_dirty }
                            }
                        }
                    }
                };
                set(machine, requester, entry);
            }
            Step::Forget(batch) => {
                tell(machine, batch);
                for descriptor in batch {
                    for requester in &mut requesters {
                        let mut before = std::mem::take(&mut requester.before);
                        before.retain(|choice| !requester.is_named(descriptor, *choice));
                        requester.before = before;
                    }
                }
            }
        }
        for Requester { rid, pasid, now, before } in &requesters {
            let read = machine.read(*rid, *pasid, IOVA).ok();
            let fresh = now.reads() == read;
            let cached = before.iter().any(|choice| choice.reads() == read);
            prop_assert!(
                fresh || cached,
                "after {number}: {rid} {pasid:?} reads {read:?} by {now:?}, or {before:?}"
            );
        }
    }
    Ok(())
}

fn machine() -> Machine {
    let unit = VtdUnitConfig::default().with_guest_second_stage(true);
    Machine::with(unit, vtd_config().with_second_stage(true).with_nest(true))
}

fn set_legacy(machine: &Machine, requester: &Requester, entry: Entry) {
    machine.guest.set_legacy_entry(requester.rid, entry);
}

/// A register's function mask covers several functions, like the queue's.
#[test]
fn a_context_command_names_functions_by_mask() {
    for (source, function_mask) in [(0x20, 0), (0x24, 1), (0x26, 2), (0x27, 3)] {
        let machine = machine();
        let guest = &machine.guest;
        let tables = [1, 2].map(|value| {
            let (table, page) = (guest.page(), guest.page());
            guest.store(page, value);
            guest.map_second_stage(table, IOVA, page, true);
            Entry::SecondStage { table, domain: 5 }
        });
        guest.set_legacy_entry(A, tables[0]);
        guest.enable_legacy(false);
        guest.set_legacy_entry(A, tables[1]);
        assert_eq!(machine.read(A, None, IOVA), Ok(1));
        let source = Bdf::from_raw(source);
        let scope = ContextScope::Device { domain: 5, source, function_mask };
        by_register(&machine, &[Descriptor::ContextCache(scope)]);
        assert_eq!(machine.read(A, None, IOVA), Ok(2), "{source} {function_mask}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn pasid_entries_go_as_the_text_says(
        // Without invalidations of the context cache, which may drop such entries, too.
        steps in steps(5, true, pasid_cache().prop_map(Descriptor::PasidCache)),
    ) {
        let machine = machine();
        machine.guest.enable();
        let requesters = [(A, None), (B, None), (A, Some(1)), (B, Some(1)), (A, Some(2))];
        let set = |machine: &Machine, of: &Requester, entry| {
            machine.guest.set_entry(of.rid, of.pasid.unwrap_or(0), entry);
        };
        run(&machine, &requesters, &steps, set, by_queue)?;
    }

    #[test]
    fn legacy_context_entries_go_as_the_text_says(
        register in any::<bool>(),
        steps in steps(2, false, context().prop_map(Descriptor::ContextCache)),
    ) {
        let machine = machine();
        machine.guest.enable_legacy(!register);
        let tell = if register { by_register } else { by_queue };
        run(&machine, &[(A, None), (B, None)], &steps, set_legacy, tell)?;
    }
}
