// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A program that exports memory to devices, and revokes it.

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestRegionMmap};

use super::abi::DmabufGet;
use crate::host::refusal::{refuse, Outcome};
use crate::ioas::PAGE_SIZE;
use crate::uapi::{Process, TestFile};
use crate::DmaBuf;
use twostage::iommufd::{Errno, UserMemory};

/// Maximum number of pages of one export.
const MAX_PAGES: u64 = 512;

/// A dma-buf of a test.
#[derive(Debug)]
pub struct TestDmaBuf(Arc<DmaBuf>);

impl TestFile for TestDmaBuf {
    fn name(&self) -> &'static str {
        "dmabuf"
    }

    fn dma_buf(&self) -> Option<&Arc<DmaBuf>> {
        Some(&self.0)
    }
}

/// `DMABUF_GET`: the descriptor of a new dma-buf, the ioctl's return value.
pub fn get(body: &DmabufGet, process: &dyn Process) -> Outcome<i32> {
    let length = u64::from(body.length).next_multiple_of(PAGE_SIZE);
    if length == 0 || length > MAX_PAGES * PAGE_SIZE {
        return refuse(Errno::EINVAL, format!("a dma-buf of {length:#x} bytes"));
    }
    // At most 2 MiB.
    let region = GuestRegionMmap::from_range(GuestAddress(0), length as usize, None);
    let region = region.or_else(|error| refuse(Errno::ENOMEM, error.to_string()))?;
    let file = TestDmaBuf(DmaBuf::new(UserMemory::whole(Arc::new(region))));
    let fd = process.install_test_file(Arc::new(file));
    fd.or_else(|errno| refuse(errno, "the process can have no descriptor"))
}

/// `DMABUF_REVOKE`: revokes the memory, or restores it for new mappings. In both cases existing
/// mappings lose it.
pub fn revoke(fd: i32, revoked: bool, process: &dyn Process) -> Outcome<()> {
    let Some(buf) = process.dma_buf(fd) else {
        let errno = if process.file(fd).is_some() { Errno::EINVAL } else { Errno::EBADF };
        return refuse(errno, format!("{fd} is not a dma-buf"));
    };
    buf.revoke();
    if !revoked {
        buf.restore();
    }
    Ok(())
}
