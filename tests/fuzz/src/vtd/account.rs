// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the guest has said, and so which words of its tables a unit may still have in its caches.

use std::collections::BTreeMap;

use twostage::spec::vtd::qi::{
    AddressMask, ContextScope, Descriptor, DeviceTlbRange, IotlbScope, PasidCacheScope,
};

use super::naive::{Decision, EntriesSince, Who};
use super::walk::Since;
use crate::models::memory::{Moment, PAGE};

/// Pages of an invalidation.
#[derive(Debug, Clone, Copy)]
struct Pages {
    first: u64,
    last: u64,
    /// No pointer to a table has changed.
    hint: bool,
}

impl From<AddressMask> for Pages {
    fn from(AddressMask { address, mask, leaf: hint }: AddressMask) -> Self {
        match mask {
            52.. => Self { first: 0, last: u64::MAX, hint },
            _ => {
                let low = PAGE * (1 << mask) - 1;
                Self { first: address & !low, last: address | low, hint }
            }
        }
    }
}

impl Pages {
    fn of_device(DeviceTlbRange { address, size }: DeviceTlbRange) -> Self {
        let mask = if size { (address >> 12).trailing_ones() as u8 + 1 } else { 0 };
        AddressMask { address, mask, leaf: false }.into()
    }

    fn has(&self, address: u64, shift: u32) -> bool {
        let low = (1 << shift) - 1;
        self.first <= address & !low && address | low <= self.last
    }
}

/// What an invalidation of translations names.
#[derive(Debug, Clone, Copy)]
enum Named {
    Everything,
    Domain(u16),
    Pages(u16, Pages),
    Pasid(u16, u32, Option<Pages>),
}

/// See the [module's documentation](self).
#[derive(Debug, Default)]
pub struct Account {
    translations: Vec<(Named, Moment)>,
    contexts: BTreeMap<Who, Moment>,
    pasids: BTreeMap<Who, Moment>,
    devices: Vec<(u16, Option<u32>, Pages, Moment)>,
    /// When something happened after which a device TLB is not accounted for.
    unaccounted: Moment,
}

/// The words that count for the translations of one tag.
#[derive(Debug, Clone, Copy)]
pub struct Tagged<'a> {
    account: &'a Account,
    domain: u16,
    pasid: u32,
    /// Later invalidations do not count.
    as_of: Moment,
}

impl Account {
    /// Everything is forgotten.
    pub fn everything(&mut self, now: Moment) {
        self.translations.push((Named::Everything, now));
    }

    /// All entries of requesters are read again.
    pub fn entries(&mut self, everyone: &[Who], now: Moment) {
        self.unaccounted = now;
        for who in everyone {
            self.contexts.insert(*who, now);
            self.pasids.insert(*who, now);
        }
    }

    /// The device TLB of a function begins, or ends.
    pub fn device_tlb(&mut self, rid: u16, now: Moment) {
        self.devices.retain(|(of, ..)| *of != rid);
        self.devices.push((rid, None, Pages { first: 0, last: u64::MAX, hint: false }, now));
    }

    /// `descriptor` is complete. `decisions` are all that may be of a requester.
    pub fn complete(
        &mut self,
        descriptor: &Descriptor,
        legacy: bool,
        now: Moment,
        everyone: &[Who],
        decisions: &dyn Fn(&Self, Who) -> Option<Vec<Decision>>,
    ) {
        match *descriptor {
            Descriptor::Iotlb { scope, .. } => self.iotlb(scope, now),
            Descriptor::PasidIotlb { domain, pasid, range } => {
                let named = Named::Pasid(domain, pasid.raw(), range.map(Pages::from));
                self.translations.push((named, now));
            }
            Descriptor::DeviceTlb { source, range, .. } => {
                self.devices.push((source.raw(), None, Pages::of_device(range), now));
            }
            Descriptor::PasidDeviceTlb { source, pasid, global, range, .. } => {
                let pages = Pages::of_device(range);
                match global {
                    true => self.devices.push((source.raw(), None, pages, now)),
                    false => self.devices.push((source.raw(), Some(pasid.raw()), pages, now)),
                }
            }
            Descriptor::ContextCache(scope) => {
                let all = |account: &Self, who, domain: u16| {
                    decisions(account, who).is_some_and(|all| {
                        all.iter().all(|it| !it.is_blocked() && it.domain == domain)
                    })
                };
                for who in everyone {
                    let named = match scope {
                        ContextScope::Global => true,
                        ContextScope::Domain(domain) => legacy && all(self, *who, domain),
                        ContextScope::Device { domain, source, function_mask } => {
                            let ignored = [0, 4, 6, 7][usize::from(function_mask & 3)];
                            (who.rid ^ source.raw()) & !ignored == 0
                                && (!legacy || all(self, *who, domain))
                        }
                    };
                    if named {
                        self.contexts.insert(*who, now);
                    }
                }
            }
            Descriptor::PasidCache(scope) => {
                for who in everyone {
                    let named = match scope {
                        PasidCacheScope::Global => true,
                        PasidCacheScope::Domain(domain) => {
                            decisions(self, *who).is_some_and(|all| {
                                all.iter().all(|it| !it.is_blocked() && it.domain == domain)
                            })
                        }
                        PasidCacheScope::Pasid { domain, pasid } => decisions(self, *who)
                            .is_some_and(|all| {
                                all.iter().all(|it| {
                                    !it.is_blocked()
                                        && (it.domain, it.pasid) == (domain, pasid.raw())
                                })
                            }),
                    };
                    if named {
                        self.pasids.insert(*who, now);
                    }
                }
            }
            _ => {}
        }
    }

    /// An invalidation of the IOTLB is complete.
    pub fn iotlb(&mut self, scope: IotlbScope, now: Moment) {
        let named = match scope {
            IotlbScope::Global => Named::Everything,
            IotlbScope::Domain(domain) => Named::Domain(domain),
            IotlbScope::Pages { domain, range } => Named::Pages(domain, range.into()),
        };
        self.translations.push((named, now));
    }

    /// Since when the entries of `who` count.
    pub fn since(&self, who: Who) -> EntriesSince {
        let of = |moments: &BTreeMap<Who, Moment>| moments.get(&who).copied().unwrap_or(0);
        EntriesSince { contexts: of(&self.contexts), pasids: of(&self.pasids) }
    }

    /// Since when a device TLB may have what `who` got for `address`; `None`: not known.
    pub fn device_tlb_since(&self, who: Who, address: u64) -> Option<Moment> {
        let names = |(rid, pasid, pages, _): &&(u16, Option<u32>, Pages, Moment)| {
            *rid == who.rid && (pasid.is_none() || *pasid == who.pasid) && pages.has(address, 12)
        };
        let since = self.devices.iter().filter(names).map(|(.., at)| *at).max()?;
        (since > self.unaccounted).then_some(since)
    }

    /// What counts for translations by `decision`, of those invalidations up to `as_of`.
    pub fn tagged(&self, decision: &Decision, as_of: Moment) -> Tagged<'_> {
        let Decision { domain, pasid, .. } = *decision;
        Tagged { account: self, domain, pasid, as_of }
    }
}

impl Tagged<'_> {
    fn last(&self, covers: impl Fn(Named) -> bool) -> Moment {
        let said = self.account.translations.iter().rev();
        let mut covering = said.filter(|(named, at)| *at <= self.as_of && covers(*named));
        covering.next().map_or(0, |(_, at)| *at)
    }

    fn covers(&self, named: Named, second: bool, of_pages: impl Fn(Pages) -> bool) -> bool {
        match named {
            Named::Everything => true,
            Named::Domain(domain) => domain == self.domain,
            // Everything of a first stage, whatever the address and the hint (§6.5.2.3).
            Named::Pages(domain, _) if !second => domain == self.domain,
            Named::Pages(domain, pages) => domain == self.domain && of_pages(pages),
            Named::Pasid(domain, pasid, pages) => {
                !second
                    && (domain, pasid) == (self.domain, self.pasid)
                    && pages.is_none_or(of_pages)
            }
        }
    }
}

impl Since for Tagged<'_> {
    fn pointer(&self, second: bool, address: u64) -> Moment {
        self.last(|named| self.covers(named, second, |pages| !pages.hint && pages.has(address, 12)))
    }

    fn page(&self, second: bool, address: u64, shift: u32) -> Moment {
        self.last(|named| self.covers(named, second, |pages| pages.has(address, shift)))
    }
}
