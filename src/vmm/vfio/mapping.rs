// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A part of a device's file mapped into this process.
#![allow(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

/// Mapped memory, unmapped when it is dropped. This process does not access it: it is for mapping
/// into a guest.
pub struct Mapping {
    address: NonNull<libc::c_void>,
    length: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and nothing here dereferences it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `length` bytes at `offset` of `file`, shared, readable and writable.
    ///
    /// # Errors
    /// The error of `mmap(2)`.
    pub fn new(file: &File, offset: u64, length: u64) -> io::Result<Self> {
        let invalid = |_| io::Error::from_raw_os_error(libc::EOVERFLOW);
        let (length, offset) =
            (usize::try_from(length).map_err(invalid)?, i64::try_from(offset).map_err(invalid)?);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the kernel chooses a place where nothing is; the file is open for the call.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                protection,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                offset,
            )
        };
        match NonNull::new(address) {
            Some(address) if address.as_ptr() != libc::MAP_FAILED => Ok(Self { address, length }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Its address in this process.
    pub fn address(&self) -> u64 {
        self.address.as_ptr() as u64
    }

    /// Bytes.
    pub fn length(&self) -> u64 {
        self.length as u64
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped with this length, by this value alone, and not unmapped before.
        if unsafe { libc::munmap(self.address.as_ptr(), self.length) } != 0 {
            log::error!("a device stays mapped: {}", io::Error::last_os_error());
        }
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({:#x}+{:#x})", self.address(), self.length)
    }
}

/// This machine's page size: the granularity of mappings.
pub fn page_size() -> u64 {
    // SAFETY: the call has no other effect than to tell.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    // POSIX requires it.
    u64::try_from(size).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_mapped_or_not() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x2000).unwrap();
        let mapping = Mapping::new(&file, 0x1000, 0x1000).unwrap();
        assert_eq!((mapping.address() % 0x1000, mapping.length()), (0, 0x1000));
        assert!(Mapping::new(&file, 1, 0x1000).is_err());
        assert!(Mapping::new(&file, 0, 0).is_err());
        assert!(Mapping::new(&file, u64::MAX, 1).is_err());
    }
}
