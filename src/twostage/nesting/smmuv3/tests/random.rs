// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Random policies, commands and failures against a model of a TLB: no stream uses a translation
//! that the guest was told is invalidated.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::iommufd::{Errno, Verb};

const ASIDS: u16 = 2;
const PAGES: u64 = 3;

/// The tag of a cached translation: a page of an ASID.
type Name = (u16, u64);

fn names() -> impl Iterator<Item = Name> {
    (0..ASIDS).flat_map(|asid| (0..PAGES).map(move |page| (asid, page)))
}

/// Whether a command invalidates a tag.
fn is_about(command: &Command, (asid, page): Name) -> bool {
    match *command {
        Command::TlbiNhAll { .. } | Command::TlbiNsnhAll => true,
        Command::TlbiNhAsid { asid: of, .. } => asid == of,
        Command::TlbiNhVa { asid: of, range, .. } => asid == of && range.address == page << 12,
        Command::TlbiNhVaa { range, .. } => range.address == page << 12,
        _ => false,
    }
}

#[derive(Debug, Clone)]
enum Step {
    Configure {
        b: bool,
        policy: u8,
    },
    /// The guest changes these pages, and invalidates them with these commands.
    Invalidate {
        changed: Vec<Name>,
        commands: Vec<Command>,
    },
    /// The next call of this verb fails.
    Fail(Verb),
    /// The host refuses this command from now on; or accepts all again.
    Refuse(Option<Command>),
}

fn name() -> impl Strategy<Value = Name> {
    (0..ASIDS, 0..PAGES)
}

fn command() -> impl Strategy<Value = Command> {
    prop_oneof![
        1 => Just(Command::TlbiNhAll { vmid: 0 }),
        1 => Just(Command::TlbiNsnhAll),
        2 => (0..ASIDS).prop_map(asid),
        6 => name().prop_map(|(asid, page)| va(asid, page)),
        1 => (0..PAGES).prop_map(|page| {
            Command::TlbiNhVaa { vmid: 0, range: AddressRange::at(page << 12) }
        }),
        1 => Just(cd(STREAM_A)),
        1 => Just(atc(STREAM_A)),
        1 => Just(cd(StreamId(0x77))),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let verbs = [Verb::HwptInvalidate, Verb::DeviceAttach, Verb::DeviceDetach, Verb::HwptAlloc];
    prop_oneof![
        4 => (any::<bool>(), 0u8..5).prop_map(|(b, policy)| Step::Configure { b, policy }),
        8 => (prop::collection::vec(name(), 0..4), prop::collection::vec(command(), 0..6))
            .prop_map(|(changed, commands)| Step::Invalidate { changed, commands }),
        2 => prop::sample::select(verbs.to_vec()).prop_map(Step::Fail),
        1 => prop::option::of(command()).prop_map(Step::Refuse),
    ]
}

/// An SMMU that caches as much as it can, as early as it can.
#[derive(Debug, Default)]
struct Hardware {
    /// The `HWPT_NESTED` objects that translate.
    translating: Vec<String>,
    /// The attachment of each device object.
    attached: BTreeMap<String, String>,
    /// Cached translations: the version of the page at the time it was cached.
    tlb: BTreeMap<Name, u32>,
}

impl Hardware {
    fn translates(&self) -> bool {
        self.attached.values().any(|hwpt| self.translating.contains(hwpt))
    }

    /// Executes a host call, and fills the TLB while a stream uses stage 1.
    fn serve(&mut self, call: &str, now: &BTreeMap<Name, u32>) {
        if !call.contains('!') {
            let words: Vec<&str> = call.split(' ').collect();
            match *words {
                ["HWPT_ALLOC", ste, .., id] if ste.starts_with("ARM_SMMUV3") => {
                    self.translating.retain(|hwpt| hwpt != id);
                    if !["ARM_SMMUV3(0x1,", "ARM_SMMUV3(0x9,"].contains(&ste) {
                        self.translating.push(id.to_owned());
                    }
                }
                ["DEVICE_ATTACH", dev, "to", hwpt] => {
                    self.attached.insert(dev.to_owned(), hwpt.to_owned());
                }
                ["DEVICE_DETACH", dev] => {
                    self.attached.remove(dev);
                }
                ["HWPT_INVALIDATE", _, ..] => {
                    let list = call.split_once('[').unwrap().1.trim_end_matches(']');
                    for command in list.split(", ") {
                        let (low, high) = command.split_once(':').unwrap();
                        let word =
                            |hex: &str| u64::from_str_radix(hex.trim_start_matches("0x"), 16);
                        let words = [word(low).unwrap(), word(high).unwrap()];
                        let command = Command::decode(words).unwrap();
                        self.tlb.retain(|name, _| !is_about(&command, *name));
                    }
                }
                _ => {}
            }
        }
        if self.translates() {
            for name in names() {
                self.tlb.entry(name).or_insert(now[&name]);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn what_is_told_to_be_forgotten_is_not_used(steps in prop::collection::vec(step(), 1..40)) {
        let rig = Rig::new();
        let mut hardware = Hardware::default();
        // The version of each page, and the oldest version that streams may see.
        let mut now: BTreeMap<Name, u32> = names().map(|name| (name, 0)).collect();
        let mut promised = now.clone();
        let mut reachable = false;
        for step in steps {
            match step {
                Step::Fail(verb) => rig.host.fail_next(verb, Errno::EIO),
                Step::Refuse(Some(command)) => rig.host.refuse_command(command.encode()),
                Step::Refuse(None) => rig.host.refuse_no_command(),
                Step::Configure { b, policy } => {
                    let stream = if b { STREAM_B } else { STREAM_A };
                    let policy = match policy {
                        0 => StreamPolicy::Abort,
                        1 => StreamPolicy::GlobalBypass,
                        4 => StreamPolicy::Bypass,
                        other => stage1(u64::from(other) << 12, other == 2),
                    };
                    if let Err(error) = rig.configure(stream, policy) {
                        reachable |= error.still_reachable;
                    }
                }
                Step::Invalidate { changed, commands } => {
                    for name in changed {
                        *now.get_mut(&name).unwrap() += 1;
                    }
                    let done = match rig.invalidate(&commands) {
                        Ok(()) => commands.len(),
                        Err(refused) => {
                            reachable |= refused.error.still_reachable;
                            if refused.flushed {
                                commands.len()
                            } else {
                                refused.refused
                            }
                        }
                    };
                    for command in &commands[..done] {
                        for name in names().filter(|name| is_about(command, *name)) {
                            promised.insert(name, now[&name]);
                        }
                    }
                }
            }
            for call in rig.host.take_log() {
                hardware.serve(&call, &now);
            }
            // If the guest was told of an error, stale translations are allowed.
            if hardware.translates() && !reachable {
                for (name, seen) in &hardware.tlb {
                    prop_assert!(*seen >= promised[name], "{name:?} is stale: {hardware:?}");
                }
            }
        }
        rig.host.forget_failures();
        rig.ends_clean();
    }
}
