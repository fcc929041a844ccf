// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an SMMUv3's sanitizer compares: the context descriptor of a requester, then its tables.
//!
//! Stream table entries are those of the host's driver here, which changes them together with what
//! is cached. So a guest that forgets CMD_CFGI_STE is not noticed: the host's entry is still the
//! old one, too.

use super::context::AddressSpace;
use super::fault::Fault;
use super::invalidation::{known_range, Invalidation, GLOBAL};
use super::streams::Configuration;
use super::tables::Stage1;
use crate::units::engine::{
    Caches, ContextInvalidation, DmaWay, LocalCounters, Request, Sanitizer, Scope, Source, Spaces,
    StaleContext, Target, TlbInvalidation, Used,
};
use crate::units::hardware::{CacheRange, CacheTag};
use twostage::spec::pci::Bdf;
use twostage::spec::smmuv3::command::AddressRange;
use twostage::spec::vtd::PageRange;

/// The finding, if any, for a request that went by `used` when the context descriptors in memory
/// now give `now`.
pub(super) fn stale_context(
    request: &Request,
    used: &Configuration,
    now: Result<&Configuration, Fault>,
) -> Option<StaleContext> {
    if now.is_ok_and(|now| now.space == used.space) {
        return None;
    }
    Some(StaleContext {
        rid: Bdf::from_raw(request.rid),
        pasid: request.pasid,
        old: way(used.space.as_ref()),
        new: now.map_or(DmaWay::Blocked, |now| way(now.space.as_ref())),
        // Requests without SubstreamID use number 0, if any.
        needed: ContextInvalidation::SmmuV3CfgiCd { substream: request.pasid.unwrap_or(0) },
        uses: 1,
        invalidated_since: false,
    })
}

fn way(space: Option<&AddressSpace>) -> DmaWay {
    space.map_or(DmaWay::Bypass, |space| DmaWay::AddressSpace {
        asid: space.asid,
        tables: space.tables(),
    })
}

/// Compares `target`, which `request` is about to use by `configuration`, with the tables, of which
/// pages of `shifts` are cached. Returns the part of it that was compared.
pub(super) fn check(
    sanitizer: &Sanitizer,
    caches: &Caches,
    configuration: &Configuration,
    counters: &LocalCounters,
    request: &Request,
    target: Target,
) -> Target {
    // Stage 2 is the host's, which drops what it changes.
    let Some(space) = &configuration.space else { return target };
    match used(configuration, space, request) {
        Some((used, request)) => sanitizer.check(caches, &used, counters, &request, target),
        None => target,
    }
}

/// Where the tables of `configuration` send `request` now, if anywhere.
pub(super) fn now(
    sanitizer: &Sanitizer,
    caches: &Caches,
    configuration: &Configuration,
    request: &Request,
) -> Option<Target> {
    let Some(space) = &configuration.space else {
        let page = caches.stage2_now(&configuration.host, request.address)?;
        let allowed = page.allows(request.kind);
        return allowed.then_some(Target { place: page.place, length: page.length });
    };
    let (used, request) = used(configuration, space, request)?;
    sanitizer.now(caches, &used, &request)
}

/// The tables of `space` that `request` uses, if any, and the request as they take it.
fn used<'a>(
    configuration: &'a Configuration,
    space: &'a AddressSpace,
    request: &Request,
) -> Option<(Used<'a, Stage1>, Request)> {
    let Configuration { tag, host, .. } = configuration;
    let (address, tables) = space.half(request.address);
    let tables = tables?;
    let used = Used {
        tables,
        lower: None,
        host,
        source: Source::new(*tag, space.asid.into()),
        others: Some(Source::new(*tag, GLOBAL)),
        shifts: tables.shifts(),
        invalidation: TlbInvalidation::SmmuV3TlbiNhVa { asid: space.asid },
    };
    Some((used, Request { address, ..*request }))
}

/// Informs `sanitizer` of `invalidation`, of an SMMU with or without range support.
pub(super) fn invalidated(sanitizer: &Sanitizer, invalidation: &Invalidation, ranges: bool) {
    let pages = |range| CacheRange::from(known_range(range, ranges));
    let told =
        |tag: CacheTag, spaces, range| sanitizer.invalidated(Scope { tag: tag.0, spaces }, range);
    match *invalidation {
        Invalidation::All { tag } => told(tag, Spaces::UpTo(GLOBAL), CacheRange::All),
        Invalidation::Asid { tag, asid } => told(tag, Spaces::One(asid.into()), CacheRange::All),
        Invalidation::Va { tag, asid, range } => {
            told(tag, Spaces::Two(asid.into(), GLOBAL), pages(range));
        }
        Invalidation::Vaa { tag, range } => told(tag, Spaces::UpTo(GLOBAL), pages(range)),
        Invalidation::Context { sid, substream } => {
            sanitizer.contexts_changed(sid, |pasid| pasid.unwrap_or(0) == substream);
        }
        Invalidation::Contexts { sid } => sanitizer.contexts_changed(sid, |_| true),
        Invalidation::DeviceTlb { sid, substream, range } => {
            sanitizer.device_told(sid, substream, range);
        }
    }
}

impl From<AddressRange> for CacheRange {
    /// A command without a range names a page of 4 KiB, or a larger one around it.
    fn from(range: AddressRange) -> Self {
        let AddressRange { address, leaf, .. } = range;
        Self::Pages(PageRange::new(address, range.bytes().unwrap_or(1 << 12) >> 12, leaf))
    }
}
