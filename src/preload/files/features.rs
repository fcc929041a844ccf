// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `VFIO_DEVICE_FEATURE`. Of the features there is one: dma-bufs of what can be mapped, with which
//! `IOMMU_IOAS_MAP_FILE` maps a device's memory for other devices.

use std::mem::size_of;
use std::ops::Range;
use std::sync::Arc;

use twostage::iommufd::Errno;
use twostage_emulated::uapi::{TestFile, UserSpace};
use twostage_emulated::DmaBuf;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_DMA_BUF as DMA_BUF, VFIO_DEVICE_FEATURE_GET as GET,
    VFIO_DEVICE_FEATURE_MASK as FEATURE, VFIO_DEVICE_FEATURE_PROBE as PROBE,
    VFIO_DEVICE_FEATURE_SET as SET, VFIO_PCI_ROM_REGION_INDEX as ROM,
};

use crate::callers::process::Process;
use crate::files::info::{copy_in, u32_at};

/// `struct vfio_device_feature`: argsz, flags.
const HEAD_SIZE: usize = 2 * size_of::<u32>();
/// `struct vfio_device_feature_dma_buf` without its ranges, and one of these: an offset, a length.
const DMA_BUF_SIZE: usize = 4 * size_of::<u32>();
const RANGE_SIZE: usize = 2 * size_of::<u64>();
const PAGE_SIZE: u64 = 4096;

/// A dma-buf to be made: of the BAR, from and to these offsets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// The region.
    pub index: u32,
    /// In bytes, of whole pages.
    pub range: Range<u64>,
}

/// What the `VFIO_DEVICE_FEATURE` at `address` of `process` asks for; none if it only asks whether
/// that is possible. `has_bar` knows which BARs there are.
///
/// # Errors
/// As vfio-pci, for a device without migration; `EOPNOTSUPP` for a dma-buf of several ranges.
pub fn feature(
    process: &Process,
    address: u64,
    has_bar: impl Fn(u32) -> bool,
) -> Result<Option<Export>, Errno> {
    let mut head = [0; HEAD_SIZE];
    let length = copy_in(process, address, &mut head)?;
    let flags = u32_at(&head, 4);
    if flags & !(FEATURE | GET | SET | PROBE) != 0 || flags & (GET | SET | PROBE) == GET | SET {
        return Err(Errno::EINVAL);
    }
    if flags & FEATURE != DMA_BUF {
        return Err(Errno::ENOTTY);
    }
    if flags & SET != 0 {
        return Err(Errno::EINVAL);
    }
    if flags & PROBE != 0 {
        return Ok(None);
    }
    if flags & GET == 0 || length < HEAD_SIZE + DMA_BUF_SIZE {
        return Err(Errno::EINVAL);
    }
    let mut bytes = [0; DMA_BUF_SIZE];
    let address = address.wrapping_add(HEAD_SIZE as u64);
    process.read(address, &mut bytes).map_err(|_| Errno::EFAULT)?;
    // region_index, open_flags (the descriptor is closed on exec in any case), flags, nr_ranges
    let [index, _, flags, count] = [0, 4, 8, 12].map(|at| u32_at(&bytes, at));
    if flags != 0 || count == 0 {
        return Err(Errno::EINVAL);
    }
    if index >= ROM || !has_bar(index) {
        return Err(Errno::ENODEV);
    }
    if count > 1 {
        return Err(Errno::EOPNOTSUPP);
    }
    let mut range = [0; RANGE_SIZE];
    process
        .read(address.wrapping_add(bytes.len() as u64), &mut range)
        .map_err(|_| Errno::EFAULT)?;
    let word = |at: usize| u64::from(u32_at(&range, at)) | u64::from(u32_at(&range, at + 4)) << 32;
    let (offset, length) = (word(0), word(8));
    if length == 0 || !offset.is_multiple_of(PAGE_SIZE) || !length.is_multiple_of(PAGE_SIZE) {
        return Err(Errno::EINVAL);
    }
    let end = offset.checked_add(length).ok_or(Errno::EOVERFLOW)?;
    Ok(Some(Export { index, range: offset..end }))
}

/// The open file of a dma-buf.
#[derive(Debug)]
pub struct BarFile(pub Arc<DmaBuf>);

impl TestFile for BarFile {
    fn name(&self) -> &'static str {
        "dma-buf"
    }

    fn dma_buf(&self) -> Option<&Arc<DmaBuf>> {
        Some(&self.0)
    }
}
