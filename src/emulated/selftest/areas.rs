// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! IOVAs by the index of a mapping, which a fuzzer guesses more easily.

use std::mem::offset_of;

use iommufd_bindings::{iommu_ioas_copy, IOMMUFD_CMD_IOAS_COPY};

use super::abi;
use crate::ioas::IovaSpace;
use crate::uapi::Argument;
use crate::EmulatedHost;

/// The IOVA encoded in `iova`: its lower half is the index of a mapping, by ascending IOVA, the
/// upper half an offset in it. 0 if there is no such mapping.
pub fn in_area(space: &IovaSpace, iova: u64) -> u64 {
    // Truncated to the lower half.
    let (number, offset) = (iova as u32, iova >> 32);
    space.areas().nth(number as usize).map_or(0, |(start, _)| start.wrapping_add(offset))
}

/// Converts an `IOAS_COPY` with the flag for a source by index to an ordinary one.
pub fn convert_copy(host: &EmulatedHost, number: u32, argument: &mut Argument) {
    const FLAGS: usize = offset_of!(iommu_ioas_copy, flags);
    const SRC_IOVA: usize = offset_of!(iommu_ioas_copy, src_iova);
    let flags = argument.u32(FLAGS);
    if number != IOMMUFD_CMD_IOAS_COPY || flags & abi::MOCK_FLAGS_ACCESS_SYZ == 0 {
        return;
    }
    argument.set_u32(FLAGS, flags & !abi::MOCK_FLAGS_ACCESS_SYZ);
    let objects = host.objects();
    if let Ok(ioas) = objects.table().ioas(argument.id(offset_of!(iommu_ioas_copy, src_ioas_id))) {
        argument.set_u64(SRC_IOVA, in_area(&ioas.space, argument.u64(SRC_IOVA)));
    }
}
