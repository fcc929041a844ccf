// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Acting as a device that writes: pages of a mock domain become dirty.

use std::mem::offset_of;

use super::abi::{Dirty, BODY};
use super::driver::mock_paging;
use crate::host::refusal::{refuse, Outcome};
use crate::host::user_space::UserSpace;
use crate::uapi::Argument;
use crate::EmulatedHost;
use twostage::iommufd::{Errno, ObjectId};

/// Maximum number of bits of a bitmap.
const MAX_BITS: u64 = (16 << 20) * 8;

/// `DIRTY`: marks the leaves of the IOVAs in `uptr`, a bitmap: one bit for every `page_size` bytes
/// of the range, whether anything is mapped there or not.
pub fn dirty(
    host: &EmulatedHost,
    hwpt: ObjectId,
    body: &Dirty,
    argument: &mut Argument,
    user: &dyn UserSpace,
) -> Outcome<()> {
    let &Dirty { iova, length, page_size, uptr, .. } = body;
    let aligned = page_size != 0 && (iova % page_size, length % page_size) == (0, 0);
    if !aligned || length == 0 || uptr == 0 {
        return refuse(
            Errno::EINVAL,
            format!("{length:#x} bytes at {iova:#x} in pages of {page_size:#x}"),
        );
    }
    let bits = length / page_size;
    if bits > MAX_BITS {
        return refuse(Errno::EOVERFLOW, format!("a bitmap of {bits} bits"));
    }
    let objects = host.objects();
    let paging = objects.table().hwpt_paging(hwpt)?;
    let (Some(domain), Some(log)) = (mock_paging(&*paging.domain), paging.domain.dirty_log())
    else {
        return refuse(Errno::EINVAL, format!("HWPT_PAGING {hwpt} tracks no dirty pages"));
    };
    if !log.is_enabled() {
        return refuse(Errno::EINVAL, format!("dirty tracking of HWPT_PAGING {hwpt} is off"));
    }
    // At most 16 MiB.
    let mut bitmap = vec![0u8; bits.div_ceil(8) as usize];
    user.read(uptr, &mut bitmap)?;
    let ioas = objects.table().ioas(paging.ioas)?;
    let mut marked = 0u64;
    for bit in set_bits(&bitmap).take_while(|bit| *bit < bits) {
        marked += 1;
        let at = iova.wrapping_add(bit * page_size);
        let Some((start, area)) = ioas.space.first_area_in(&(at..=at)) else { continue };
        let output = area.pages.start_of(area.offset);
        if let Some(leaf) = domain.leaf(&(start..=area.last), output, at, ioas.huge_pages) {
            log.mark(leaf);
        }
    }
    let marked = marked.to_ne_bytes();
    argument.set(BODY + offset_of!(Dirty, out_nr_dirty), marked);
    Ok(())
}

/// The indices of the set bits, starting with the lowest bit of the first byte.
fn set_bits(bitmap: &[u8]) -> impl Iterator<Item = u64> + '_ {
    let of_byte = |(index, byte): (usize, &u8)| {
        let byte = *byte;
        let first = 8 * index as u64;
        (0..8).filter(move |bit| byte & 1 << bit != 0).map(move |bit| first + bit)
    };
    bitmap.iter().enumerate().flat_map(of_byte)
}
