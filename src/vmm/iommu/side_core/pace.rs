// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! When a side core polls, and when it lends a page: decisions from what a guest did, and nothing
//! else.

use std::time::{Duration, Instant};

/// Tail writes within [`BUSY_WITHIN`] that make it worth to poll: with exits of 20 to 120 µs, a
/// tenth of a processor.
const BUSY: u32 = 16;
const BUSY_WITHIN: Duration = Duration::from_millis(10);
/// Between two decisions of a thread that polls.
const WINDOW: Duration = Duration::from_millis(20);
/// Tail writes in a window below which it parks, or ones without any if it is to poll anyway.
const FEW: u64 = 16;
const NONE_FOR: u32 = 5;
/// Preemptions in a window of a thread that has a processor of its own: now and then the kernel has
/// something to do.
const PREEMPTIONS: u64 = 3;
/// How long it stays parked for want of a processor, or because polling did not pay: at first, and
/// at most.
const REST: Duration = Duration::from_millis(100);
const LONGEST_REST: Duration = Duration::from_secs(10);
const LONGEST_REST_IDLE: Duration = Duration::from_secs(1);

/// Quiet operations before a page is lent: at first, and at most.
const PATIENCE: u64 = 256;
const MOST_PATIENCE: u64 = 1 << 16;
/// Operations without exits for which it was worth to poll, or to lend the page: that and taking it
/// back cost 15 to 50 exits.
const PAID: u64 = 512;

/// Why a side core does not poll.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Parked {
    /// The guest has little to invalidate.
    Idle,
    /// It has no processor of its own.
    NoProcessor,
    /// Its processor was needed by others.
    Preempted,
}

impl Parked {
    pub const ALL: [Self; 3] = [Self::Idle, Self::NoProcessor, Self::Preempted];

    /// The name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::NoProcessor => "no processor",
            Self::Preempted => "preempted",
        }
    }
}

/// Counts tail writes that exit, until there are enough of them.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    since: Option<Instant>,
    count: u32,
}

impl Arrivals {
    /// One more at `now`. Returns whether the guest is busy.
    pub fn add(&mut self, now: Instant) -> bool {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) > BUSY_WITHIN) {
            (self.since, self.count) = (Some(now), 0);
        }
        self.count += 1;
        self.count >= BUSY
    }
}

/// Decides when to park.
#[derive(Debug)]
pub(super) struct Watch {
    /// Parks as soon as polling does not pay.
    auto: bool,
    until: Instant,
    tails: u64,
    empty: u32,
}

impl Watch {
    /// A thread starts to poll at `now`, after `tails` tail writes.
    pub fn new(auto: bool, now: Instant, tails: u64) -> Self {
        Self { auto, until: now + WINDOW, tails, empty: 0 }
    }

    /// Whether it parks at `now`, after `tails` tail writes; `preemptions` tells those since the
    /// last call.
    pub fn park(
        &mut self,
        now: Instant,
        tails: u64,
        preemptions: impl FnOnce() -> u64,
    ) -> Option<Parked> {
        if now < self.until {
            return None;
        }
        self.until = now + WINDOW;
        let new = tails.wrapping_sub(self.tails);
        self.tails = tails;
        self.empty = if new == 0 { self.empty + 1 } else { 0 };
        if self.auto && preemptions() >= PREEMPTIONS {
            return Some(Parked::Preempted);
        }
        let few = self.auto && new < FEW;
        (few || self.empty >= NONE_FOR).then_some(Parked::Idle)
    }
}

/// How long a side core rests that found no processor, or too little to do: longer each time.
#[derive(Debug, Default)]
pub(super) struct Rest {
    next: Option<Duration>,
    until: Option<Instant>,
}

impl Rest {
    /// It parked at `now` because of `why`, after it polled for `polled` and served `tails` tail
    /// writes.
    pub fn parked(&mut self, now: Instant, why: Parked, polled: Duration, tails: u64) {
        let (longest, paid) = match why {
            Parked::Idle => (LONGEST_REST_IDLE, tails >= PAID),
            Parked::NoProcessor | Parked::Preempted => (LONGEST_REST, false),
        };
        if paid {
            self.next = None;
            return;
        }
        let rest = match self.next {
            Some(next) if polled < LONGEST_REST => next.min(longest),
            _ => REST,
        };
        self.until = Some(now + rest);
        self.next = Some((rest * 2).min(longest));
    }

    /// Whether it is over at `now`.
    pub fn is_over(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| now >= until)
    }
}

/// Decides when to lend a page.
#[derive(Debug)]
pub(super) struct Patience {
    quiet: u64,
    needed: u64,
    least: u64,
    most: u64,
}

impl Default for Patience {
    fn default() -> Self {
        Self::of(PATIENCE, MOST_PATIENCE)
    }
}

impl Patience {
    /// From `least` to `most` quiet operations.
    pub fn of(least: u64, most: u64) -> Self {
        Self { quiet: 0, needed: least, least, most }
    }

    /// `tails` more tail writes, with nothing else between. Returns whether to lend.
    pub fn quiet(&mut self, tails: u64) -> bool {
        self.quiet = self.quiet.saturating_add(tails);
        self.quiet >= self.needed
    }

    /// Something other than a tail write happened.
    pub fn disturbed(&mut self) {
        self.quiet = 0;
    }

    /// The page came back after `tails` tail writes: lent for too little, it takes longer until it
    /// is lent again.
    pub fn came_back(&mut self, tails: u64) {
        self.quiet = 0;
        let paid = tails >= PAID;
        self.needed = if paid { self.least } else { (self.needed * 2).min(self.most) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_busy_with_many_writes_in_a_short_time() {
        let mut arrivals = Arrivals::default();
        let start = Instant::now();
        let at = |micros| start + Duration::from_micros(micros);
        assert!((0..100).all(|number| !arrivals.add(at(number * 1000))));
        let busy = (0..16).map(|number| arrivals.add(at(200_000 + number * 100)));
        assert_eq!(busy.collect::<Vec<_>>().iter().position(|busy| *busy), Some(15));
    }

    #[test]
    fn polling_ends_when_it_does_not_pay() {
        let start = Instant::now();
        let after = |windows: u32| start + WINDOW * windows;
        let mut watch = Watch::new(true, start, 100);
        assert_eq!(watch.park(start, 100, || 9), None);
        assert_eq!(watch.park(after(1), 116, || 2), None);
        assert_eq!(watch.park(after(2), 131, || 0), Some(Parked::Idle));
        assert_eq!(watch.park(after(3), 1000, || 3), Some(Parked::Preempted));
        // One that is to poll does so until the guest has been silent for some time.
        let mut watch = Watch::new(false, start, 0);
        let parked = |number| watch.park(after(number), u64::from(number > 1), || 9);
        let parked: Vec<_> = (1..8).map(parked).collect();
        assert_eq!(parked.iter().position(|parked| parked.is_some()), Some(6));
    }

    #[test]
    fn rests_become_longer() {
        let now = Instant::now();
        let mut rest = Rest::default();
        assert!(rest.is_over(now));
        rest.parked(now, Parked::Preempted, WINDOW, PAID);
        assert!(!rest.is_over(now) && rest.is_over(now + REST));
        rest.parked(now, Parked::NoProcessor, Duration::ZERO, 0);
        assert!(!rest.is_over(now + REST) && rest.is_over(now + 2 * REST));
        for _ in 0..20 {
            rest.parked(now, Parked::Preempted, WINDOW, 0);
        }
        assert!(rest.is_over(now + LONGEST_REST));
        rest.parked(now, Parked::Preempted, LONGEST_REST, 0);
        assert!(rest.is_over(now + REST));
    }

    #[test]
    fn a_poll_that_served_little_is_followed_by_a_rest() {
        let now = Instant::now();
        let mut rest = Rest::default();
        rest.parked(now, Parked::Idle, WINDOW, PAID);
        assert!(rest.is_over(now));
        rest.parked(now, Parked::Idle, WINDOW, PAID - 1);
        assert!(!rest.is_over(now) && rest.is_over(now + REST));
        for _ in 0..20 {
            rest.parked(now, Parked::Idle, WINDOW, 0);
        }
        assert!(
            !rest.is_over(now + LONGEST_REST_IDLE / 2) && rest.is_over(now + LONGEST_REST_IDLE)
        );
        // One that paid: the next one is followed by a short rest again.
        rest.parked(now, Parked::Idle, WINDOW, PAID);
        rest.parked(now, Parked::Idle, WINDOW, 0);
        assert!(rest.is_over(now + REST));
    }

    #[test]
    fn a_page_is_lent_after_quiet_operations() {
        let mut patience = Patience::default();
        assert!(!patience.quiet(255) && patience.quiet(1));
        patience.disturbed();
        assert!(!patience.quiet(255));
        patience.came_back(10);
        assert!(!patience.quiet(511) && patience.quiet(1));
        patience.came_back(PAID);
        assert!(patience.quiet(256));
        (0..20).for_each(|_| patience.came_back(0));
        assert!(patience.quiet(MOST_PATIENCE));
    }
}
