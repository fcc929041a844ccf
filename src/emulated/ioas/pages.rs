// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The pages behind mappings: shared by all copies of a mapping, pinned and accounted once.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use super::ranges::Coverage;
use super::{Payer, RlimitMode, Source, PAGE_SIZE};
use crate::host::dma_buf::DmaBuf;
use crate::host::refusal::{allocate, refuse, Outcome};
use crate::host::user_space::Credentials;
use twostage::iommufd::{Errno, UserMemory};

/// Number of pinned bytes of all [`Pages`] that share the account.
#[derive(Debug, Default)]
pub(crate) struct PinAccount {
    bytes: AtomicU64,
}

impl PinAccount {
    /// Number of pinned bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// The memory of one `IOAS_MAP`: its source, whether it may be written, and what is pinned.
///
/// A page is looked up when it is first pinned, and its memory is kept until the last unpin.
#[derive(Debug)]
pub(crate) struct Pages {
    source: Source,
    /// In bytes.
    length: u64,
    writable: bool,
    account: Arc<PinAccount>,
    state: Mutex<State>,
    /// They were memory of a device and have been revoked.
    lost: AtomicBool,
}

#[derive(Debug)]
struct State {
    /// By page number, relative to the page that the source starts in.
    pins: Coverage,
    /// Memory of the pinned pages: pieces by offset in bytes, disjoint.
    places: BTreeMap<u64, UserMemory>,
    payer: Payer,
}

impl Pages {
    /// `length` bytes of `source`, not pinned. `writable`: the original mapping is writable.
    pub fn new(
        source: Source,
        length: u64,
        writable: bool,
        mode: RlimitMode,
        account: Arc<PinAccount>,
    ) -> Self {
        let payer = Payer::of(&source, mode);
        let state = State { pins: Coverage::default(), places: BTreeMap::new(), payer };
        Self {
            source,
            length,
            writable,
            account,
            state: Mutex::new(state),
            lost: AtomicBool::default(),
        }
    }

    /// Whether a mapping of these pages may be writable.
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// Their source.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// The uAPI's `user_va` (or `start`) of the byte at `offset`.
    pub fn start_of(&self, offset: u64) -> u64 {
        self.source.start() + offset
    }

    /// Offset in its page of the byte at `offset`.
    pub fn page_offset(&self, offset: u64) -> u64 {
        self.start_of(offset) % PAGE_SIZE
    }

    /// The device memory, if they are that.
    pub fn dma_buf(&self) -> Option<&Arc<DmaBuf>> {
        match &self.source {
            Source::DmaBuf(buf, _) => Some(buf),
            _ => None,
        }
    }

    /// The device memory was revoked: there is nothing behind them from now on.
    pub fn lose(&self) {
        self.lost.store(true, Ordering::Relaxed);
    }

    /// Pins the pages of `length` bytes at `offset`, and returns the memory of those bytes: pieces
    /// in ascending order, none for revoked device memory. Pages that are already pinned keep their
    /// memory and are not accounted again.
    ///
    /// # Errors
    /// `EFAULT` no such memory; `EINVAL` no such pages of a file; `ENOMEM` the memory-lock limit.
    /// Nothing is pinned then.
    pub fn pin(&self, offset: u64, length: u64) -> Outcome<Vec<UserMemory>> {
        if self.dma_buf().is_some() {
            // The device keeps the memory.
            let lost = self.lost.load(Ordering::Relaxed);
            let memory = (!lost).then(|| self.source.pin(offset, length, self.writable));
            return memory.into_iter().collect();
        }
        let (first, end) = self.page_numbers(offset, length);
        let mut state = self.lock();
        let mut found = Vec::new();
        let mut bytes = 0;
        for gap in state.pins.gaps(first, end) {
            bytes += (gap.end - gap.start) * PAGE_SIZE;
            self.find(self.offsets(&gap), &mut found)?;
        }
        if bytes > 0 {
            state.payer.charge(&self.source, bytes)?;
        }
        state.places.extend(found);
        state.pins.add(first, end);
        self.account.bytes.fetch_add(bytes, Ordering::Relaxed);
        let places = state.places_of(offset, length);
        debug_assert_eq!(places.iter().map(UserMemory::length).sum::<u64>(), length);
        Ok(places)
    }

    /// Removes one pin from the pages of `length` bytes at `offset`, as given to [`Self::pin`].
    pub fn unpin(&self, offset: u64, length: u64) {
        if self.dma_buf().is_some() {
            return;
        }
        let (first, end) = self.page_numbers(offset, length);
        let mut state = self.lock();
        state.pins.sub(first, end);
        let mut bytes = 0;
        for gap in state.pins.gaps(first, end) {
            bytes += (gap.end - gap.start) * PAGE_SIZE;
            state.forget(self.offsets(&gap));
        }
        state.payer.discharge(bytes);
        self.account.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// The memory of all pinned pages, in whole pages except the first and the last.
    #[cfg(feature = "selftest")]
    pub fn places(&self) -> Vec<UserMemory> {
        self.lock().places.values().cloned().collect()
    }

    /// Pin count of the page at `offset`.
    #[cfg(test)]
    pub(crate) fn pins(&self, offset: u64) -> u32 {
        self.lock().pins.at(self.page_numbers(offset, 1).0)
    }

    /// Charges `who`, too, for what is pinned, until [`Self::settle`] releases the current payer.
    /// None if nothing changes.
    ///
    /// # Errors
    /// `ENOMEM` the memory-lock limit of `who`.
    pub fn charge_also(&self, who: &Credentials) -> Outcome<Option<Payer>> {
        let state = self.lock();
        let Some(payer) = state.payer.successor(who) else { return Ok(None) };
        payer.take_over(self.pinned_bytes(&state))?;
        Ok(Some(payer))
    }

    /// Releases `payer` from what [`Self::charge_also`] charged.
    pub fn discharge(&self, payer: &Payer) {
        payer.discharge(self.pinned_bytes(&self.lock()));
    }

    /// Makes `payer` the only payer.
    pub fn settle(&self, payer: Payer) {
        let mut state = self.lock();
        let old = std::mem::replace(&mut state.payer, payer);
        old.discharge(self.pinned_bytes(&state));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Looks up the memory of the bytes in `offsets`.
    fn find(&self, offsets: Range<u64>, found: &mut Vec<(u64, UserMemory)>) -> Outcome<()> {
        let mut at = offsets.start;
        while at < offsets.end {
            let left = offsets.end - at;
            allocate("what is pinned")?;
            let memory = self.source.pin(at, left, self.writable)?;
            let length = memory.length();
            if length == 0 || length > left {
                return refuse(Errno::EFAULT, format!("{length:#x} bytes in place of {left:#x}"));
            }
            found.push((at, memory));
            at += length;
        }
        Ok(())
    }

    fn pinned_bytes(&self, state: &State) -> u64 {
        let (first, end) = self.page_numbers(0, self.length);
        let free: u64 = state.pins.gaps(first, end).iter().map(|gap| gap.end - gap.start).sum();
        (end - first - free) * PAGE_SIZE
    }

    /// Pages of `length` bytes at `offset`: the first, and one past the last.
    fn page_numbers(&self, offset: u64, length: u64) -> (u64, u64) {
        let start = self.page_offset(0) + offset;
        (start / PAGE_SIZE, (start + length).div_ceil(PAGE_SIZE))
    }

    /// The bytes of `pages`: the source may have only parts of the first and last page.
    fn offsets(&self, pages: &Range<u64>) -> Range<u64> {
        let offset = |page: u64| (page * PAGE_SIZE).saturating_sub(self.page_offset(0));
        offset(pages.start)..offset(pages.end).min(self.length)
    }
}

impl State {
    /// The memory of `length` bytes at `offset`, all pinned.
    fn places_of(&self, offset: u64, length: u64) -> Vec<UserMemory> {
        let end = offset + length;
        let from = self.places.range(..=offset).next_back().map_or(offset, |(start, _)| *start);
        let places = self.places.range(from..end).filter_map(|(&start, memory)| {
            let (first, last) = (start.max(offset), (start + memory.length()).min(end));
            // The first one may end before.
            let length = last.checked_sub(first).filter(|length| *length > 0)?;
            memory.part(first - start, length).ok()
        });
        places.collect()
    }

    /// Drops the memory of the bytes in `offsets`.
    fn forget(&mut self, offsets: Range<u64>) {
        let first = self.places.range(..=offsets.start).next_back();
        let from = first.map_or(offsets.start, |(start, _)| *start);
        let touched: Vec<u64> =
            self.places.range(from..offsets.end).map(|(start, _)| *start).collect();
        for start in touched {
            let Some(memory) = self.places.remove(&start) else { continue };
            let end = start + memory.length();
            // What is left of it before and after.
            for (first, last) in [(start, offsets.start.min(end)), (offsets.end.max(start), end)] {
                let length = last.saturating_sub(first);
                let rest = (length > 0).then(|| memory.part(first - start, length));
                self.places.extend(rest.and_then(Result::ok).map(|rest| (first, rest)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::user_space::{RegionSpace, UserSpace};
    use proptest::prelude::*;
    use vm_memory::{GuestAddress, GuestRegionMmap};

    fn region(length: usize) -> Arc<GuestRegionMmap> {
        Arc::new(GuestRegionMmap::from_range(GuestAddress(0), length, None).unwrap())
    }

    fn pages_of(source: Source, length: u64, account: &Arc<PinAccount>) -> Pages {
        Pages::new(source, length, true, RlimitMode::User, account.clone())
    }

    fn pages(offset: u64, length: u64, account: &Arc<PinAccount>) -> Pages {
        let memory = UserMemory::new(region(0x10000), offset, length).unwrap();
        pages_of(Source::Memory(memory), length, account)
    }

    #[test]
    fn pages_are_accounted_once() {
        let account = Arc::default();
        let pages = pages(0x1000, 0x4000, &account);
        pages.pin(0, 0x4000).unwrap();
        pages.pin(0x1000, 0x1000).unwrap();
        assert_eq!(account.bytes(), 0x4000);
        pages.unpin(0, 0x4000);
        assert_eq!(account.bytes(), 0x1000);
        assert_eq!((pages.pins(0xfff), pages.pins(0x1000)), (0, 1));
        pages.unpin(0x1000, 0x1000);
        assert_eq!(account.bytes(), 0);
    }

    #[test]
    fn whole_pages_are_pinned() {
        let account = Arc::default();
        let pages = pages(0x1800, 0x1000, &account);
        pages.pin(0, 0x1000).unwrap();
        assert_eq!(account.bytes(), 0x2000);
        let place = &pages.pin(0x800, 0x10).unwrap()[0];
        assert_eq!((place.offset(), place.length()), (0x2000, 0x10));
        assert_eq!(account.bytes(), 0x2000);
    }

    #[test]
    fn memory_of_two_regions_is_two_pieces_and_a_hole_is_a_fault() {
        let whole = region(0x4000);
        let mut space = RegionSpace::new(vec![whole.clone()]);
        let account = Arc::default();
        let source = |space: &RegionSpace| Source::User(space.share(), whole.as_ptr() as u64);
        let longer = pages_of(source(&space), 0x5000, &account);
        assert_eq!(longer.pin(0, 0x5000).unwrap_err().errno, Errno::EFAULT);
        assert_eq!(account.bytes(), 0, "nothing is left of a pin that failed");
        longer.pin(0, 0x4000).unwrap();
        space = RegionSpace::default();
        let gone = pages_of(source(&space), 0x4000, &account);
        assert_eq!(gone.pin(0, 1).unwrap_err().errno, Errno::EFAULT);
        assert_eq!(longer.pin(0x1000, 0x3000).unwrap().len(), 1, "pinned pages stay");
    }

    #[test]
    fn pages_of_a_file_are_whole_and_within_it() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(0x4000).unwrap();
        let account = Arc::default();
        let user = RegionSpace::default().share();
        let pages = |start, length| {
            pages_of(Source::File(user.clone(), file.clone(), start), length, &account)
        };
        let inside = pages(0x1800, 0x1000);
        let place = inside.pin(0, 0x1000).unwrap();
        assert_eq!((place[0].offset(), place[0].length()), (0x800, 0x1000));
        assert_eq!(account.bytes(), 0x2000);
        for (start, length) in [(0x1000, 0x3001), (0x4000, 1), (u64::MAX - 0x1000, 0x1000)] {
            let outcome = pages(start, length).pin(0, length);
            assert_eq!(outcome.unwrap_err().errno, Errno::EINVAL, "{start:#x} {length:#x}");
        }
    }

    fn limited(memlock_limit: u64) -> Credentials {
        Credentials { memlock_limit, ipc_lock: false, ..Credentials::privileged() }
    }

    #[test]
    fn the_limit_is_of_what_is_pinned_and_moves_with_the_process() {
        let whole = region(0x8000);
        let who = limited(0x3000);
        let user = RegionSpace::new(vec![whole.clone()]).with_credentials(who.clone());
        let source = Source::User(user.share(), whole.as_ptr() as u64);
        let account = Arc::default();
        let pages = |mode| Pages::new(source.clone(), 0x8000, true, mode, Arc::clone(&account));
        let (of_user, of_process) = (pages(RlimitMode::User), pages(RlimitMode::Process));
        of_user.pin(0, 0x2000).unwrap();
        of_user.pin(0x1000, 0x2000).unwrap();
        assert_eq!(of_user.pin(0x3000, 1).unwrap_err().errno, Errno::ENOMEM);
        of_process.pin(0, 0x3000).unwrap();
        assert_eq!((who.user.bytes(), who.process.bytes()), (0x3000, 0x3000));
        assert_eq!(who.pinned.bytes(), 0x6000);

        let poor = of_user.charge_also(&limited(0x2000));
        assert_eq!(poor.unwrap_err().errno, Errno::ENOMEM);
        assert!(of_user.charge_also(&who).unwrap().is_none(), "the same process");
        let rich = limited(0x3000);
        let payer = of_user.charge_also(&rich).unwrap().unwrap();
        assert_eq!((who.user.bytes(), rich.user.bytes()), (0x3000, 0x3000));
        of_user.settle(payer);
        assert_eq!((who.user.bytes(), rich.user.bytes()), (0, 0x3000));
        assert_eq!((who.pinned.bytes(), rich.pinned.bytes()), (0x3000, 0x3000));
        of_user.unpin(0x1000, 0x2000);
        of_user.unpin(0, 0x2000);
        assert_eq!((rich.user.bytes(), who.process.bytes()), (0, 0x3000));
    }

    /// Pins, and unpins in reverse order, in units of half a page, and counts along.
    fn check_pins(skew: u64, changes: &[(u64, u64, bool)]) -> Result<(), TestCaseError> {
        const UNIT: u64 = 0x800;
        let account = Arc::default();
        let pages = pages(0x2000 + skew, 0xc000, &account);
        let mut counts = [0u32; 32];
        let mut pinned: Vec<(u64, u64)> = Vec::new();
        let pages_of = |offset: u64, length: u64| {
            let start = skew + offset;
            (start / PAGE_SIZE) as usize..(start + length).div_ceil(PAGE_SIZE) as usize
        };
        for &(unit, length, add) in changes {
            let offset = unit * UNIT;
            let length = (length * UNIT).min(0xc000u64.saturating_sub(offset));
            if add && length > 0 {
                let places = pages.pin(offset, length).unwrap();
                let mut at = 0x2000 + skew + offset;
                for place in &places {
                    prop_assert_eq!(place.offset(), at);
                    at += place.length();
                }
                prop_assert_eq!(at, 0x2000 + skew + offset + length);
                pinned.push((offset, length));
                counts[pages_of(offset, length)].iter_mut().for_each(|pins| *pins += 1);
            } else if let Some((offset, length)) = pinned.pop() {
                pages.unpin(offset, length);
                counts[pages_of(offset, length)].iter_mut().for_each(|pins| *pins -= 1);
            }
            let naive = counts.iter().filter(|pins| **pins > 0).count() as u64;
            prop_assert_eq!(account.bytes(), naive * PAGE_SIZE);
        }
        for (offset, length) in pinned {
            pages.unpin(offset, length);
        }
        prop_assert_eq!(account.bytes(), 0);
        prop_assert!(pages.lock().places.is_empty());
        Ok(())
    }

    #[test]
    fn nothing_pinned_and_nothing_to_unpin() {
        check_pins(0, &[(25, 1, false)]).unwrap();
    }

    proptest! {
        #[test]
        fn pins_are_counted_as_an_array_does(
            skew in prop_oneof![Just(0u64), Just(0x800)],
            changes in prop::collection::vec((0u64..30, 1u64..16, any::<bool>()), 0..40),
        ) {
            check_pins(skew, &changes)?;
        }
    }
}
