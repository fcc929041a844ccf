// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A user's dirty bitmaps: one bit per page, starting with the lowest bit of the first byte.

use std::ops::RangeInclusive;

use crate::host::refusal::{refuse, Outcome};
use crate::host::user_space::{UserFault, UserSpace};
use crate::ioas::PAGE_SIZE;
use twostage::iommufd::{DirtyRange, Errno};

/// Whether `words` have a bit for every page of `range`.
///
/// # Errors
/// `EFAULT`.
pub(crate) fn check_words(range: &DirtyRange, words: &[u64]) -> Outcome<()> {
    let pages = range.length.checked_div(range.page_size).unwrap_or(0);
    if pages.div_ceil(64) > words.len() as u64 {
        return refuse(
            Errno::EFAULT,
            format!("{pages:#x} pages do not fit in {:#x} words", words.len()),
        );
    }
    Ok(())
}

/// Sets `bits`; those past the end are ignored.
pub(crate) fn set_words(words: &mut [u64], bits: RangeInclusive<u64>) {
    let end = (words.len() as u64).saturating_mul(64);
    for bit in *bits.start()..end.min(bits.end().saturating_add(1)) {
        // In bounds: the bit is before the end.
        words[(bit / 64) as usize] |= 1 << (bit % 64);
    }
}

/// Sets `bits` of a bitmap at `address`, which need not be aligned.
///
/// # Errors
/// Not all of it is the user's memory. The bits before may be set then.
pub(crate) fn set_user(
    user: &dyn UserSpace,
    address: u64,
    bits: RangeInclusive<u64>,
) -> Result<(), UserFault> {
    let (first, last) = (bits.start() / 8, bits.end() / 8);
    let mut byte = first;
    loop {
        let fault = UserFault { address, length: last + 1 };
        let at = address.checked_add(byte).ok_or(fault)?;
        // Up to the end of the page, where the memory may end.
        let piece = last.min(byte + (PAGE_SIZE - 1 - at % PAGE_SIZE));
        let mut buffer = [0; PAGE_SIZE as usize];
        // In bounds: at most a page.
        let bytes = &mut buffer[..(piece - byte + 1) as usize];
        user.read(at, bytes)?;
        for (number, value) in (byte..).zip(bytes.iter_mut()) {
            *value |= mask(number, &bits);
        }
        user.write(at, bytes)?;
        if piece == last {
            return Ok(());
        }
        byte = piece + 1;
    }
}

/// The bits of byte `number` in `bits`, at least one.
fn mask(number: u64, bits: &RangeInclusive<u64>) -> u8 {
    let low = if number == bits.start() / 8 { bits.start() % 8 } else { 0 };
    let high = if number == bits.end() / 8 { bits.end() % 8 } else { 7 };
    (0xff << low) & (0xff >> (7 - high))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::user_space::RegionSpace;
    use proptest::prelude::*;
    use std::sync::Arc;
    use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress};

    const MEMORY: u64 = 0x3000;

    fn memory() -> (RegionSpace, Arc<GuestRegionMmap>) {
        let region = GuestRegionMmap::from_range(GuestAddress(0), MEMORY as usize, None).unwrap();
        let region = Arc::new(region);
        (RegionSpace::new(vec![region.clone()]), region)
    }

    #[test]
    fn what_is_no_memory_is_a_fault() {
        let (space, region) = memory();
        let end = region.as_ptr() as u64 + MEMORY;
        // Up to the end of the memory, and one bit more.
        set_user(&space, end - 2, 4..=15).unwrap();
        set_user(&space, end - 2, 4..=16).unwrap_err();
        set_user(&space, end, 0..=7).unwrap_err();
        set_user(&space, u64::MAX, 0..=20).unwrap_err();
        let bytes: [u8; 3] = region.read_obj(MemoryRegionAddress(MEMORY - 3)).unwrap();
        assert_eq!(bytes, [0, 0xf0, 0xff]);
    }

    #[test]
    fn words_are_as_many_as_there_are() {
        let mut words = [0; 2];
        set_words(&mut words, 60..=65);
        set_words(&mut words, 127..=u64::MAX);
        set_words(&mut words, 500..=501);
        assert_eq!(words, [0xf << 60, 3 | 1 << 63]);
        let range = |pages: u64| DirtyRange { iova: 0, length: pages * 0x1000, page_size: 0x1000 };
        check_words(&range(128), &words).unwrap();
        assert_eq!(check_words(&range(129), &words).unwrap_err().errno, Errno::EFAULT);
    }

    proptest! {
        #[test]
        fn bits_are_set_as_one_by_one(
            offset in prop_oneof![0u64..70, 0xff0u64..0x1010],
            runs in prop::collection::vec((0u64..40_000, 0u64..40_000), 1..4),
        ) {
            let (space, region) = memory();
            let mut naive = vec![0u8; MEMORY as usize];
            for (first, length) in runs {
                let last = (first + length).min((MEMORY - offset) * 8 - 1);
                set_user(&space, region.as_ptr() as u64 + offset, first..=last).unwrap();
                for bit in first..=last {
                    naive[(offset + bit / 8) as usize] |= 1 << (bit % 8);
                }
            }
            let mut bytes = vec![0; MEMORY as usize];
            region.read_slice(&mut bytes, MemoryRegionAddress(0)).unwrap();
            prop_assert!(bytes == naive);
        }
    }
}
