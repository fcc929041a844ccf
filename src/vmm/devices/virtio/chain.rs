// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Descriptor chains, read once, the copies between their buffers and the device, and the errors
//! that end serving a queue.
//!
//! What a driver wrote is read once and validated; later changes by the driver have no effect.
//! Buffers are translated anew for each copy, all of it in one section.

use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions, VolatileSlice};

use super::memory::{DeviceMemory, SectionMemory};
use crate::devices::NotNow;

/// A buffer as described by the driver, in the device's own address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Buffer {
    /// In bytes.
    address: u64,
    /// In bytes, not 0.
    length: u32,
}

/// A chain of buffers, device-readable ones first (virtio 1.3 §2.7.4.2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    head: u16,
    readable: Vec<Buffer>,
    writable: Vec<Buffer>,
}

/// Why bytes were not copied, or not all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotCopied {
    /// The device may make no requests now.
    #[error(transparent)]
    NotNow(#[from] NotNow),
    /// A buffer cannot be accessed: blocked by the IOMMU, or not in memory.
    #[error("a buffer cannot be reached")]
    Unreachable,
}

impl Chain {
    /// Reads a chain of at most `limit` descriptors.
    pub(super) fn read_from<'a>(
        descriptors: virtio_queue::DescriptorChain<&SectionMemory<'a>>,
        limit: u16,
    ) -> Result<Self, Broken> {
        let mut chain =
            Self { head: descriptors.head_index(), readable: Vec::new(), writable: Vec::new() };
        let (mut count, mut complete) = (0, false);
        for descriptor in descriptors {
            count += 1;
            if count > limit {
                return Err(Broken::Chain("it is longer than the queue"));
            }
            complete = !descriptor.has_next();
            let buffer = Buffer { address: descriptor.addr().0, length: descriptor.len() };
            let buffers = match descriptor.is_write_only() {
                true => &mut chain.writable,
                false if chain.writable.is_empty() => &mut chain.readable,
                false => return Err(Broken::Chain("a buffer to read follows one to write")),
            };
            if buffer.length != 0 {
                buffers.push(buffer);
            }
        }
        // Iteration ends early where a descriptor cannot be read or is invalid.
        if !complete {
            return Err(Broken::Chain("it does not end"));
        }
        Ok(chain)
    }

    /// Index of the first descriptor.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Device-readable bytes.
    pub fn readable(&self) -> u64 {
        length(&self.readable)
    }

    /// Device-writable bytes.
    pub fn writable(&self) -> u64 {
        length(&self.writable)
    }

    /// Fills `data` from the readable bytes at `offset`, in one section: keep it short.
    ///
    /// # Errors
    /// A buffer cannot be accessed, the chain is too short, or no requests are allowed.
    pub fn read(
        &self,
        memory: &mut DeviceMemory,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), NotCopied> {
        let section = memory.section()?;
        let mut rest = data;
        for (address, length) in pieces(&self.readable, offset, rest.len()) {
            let (piece, after) = rest.split_at_mut_checked(length).ok_or(NotCopied::Unreachable)?;
            let address = address.map(GuestAddress).ok_or(NotCopied::Unreachable)?;
            section.read_slice(piece, address).map_err(|_| NotCopied::Unreachable)?;
            rest = after;
        }
        reached(rest.is_empty())
    }

    /// Lends `with` the memory of `count` readable bytes at `offset`, which are translated and used
    /// in one section: keep it short.
    ///
    /// # Errors
    /// As for [`Chain::read`].
    pub fn with_readable<R>(
        &self,
        memory: &mut DeviceMemory,
        (offset, count): (u64, usize),
        with: impl FnOnce(&[VolatileSlice<'_>]) -> R,
    ) -> Result<R, NotCopied> {
        with_slices(pieces(&self.readable, offset, count), memory, Permissions::Read, with)
    }

    /// The same for writable bytes.
    ///
    /// # Errors
    /// As for [`Chain::read`].
    pub fn with_writable<R>(
        &self,
        memory: &mut DeviceMemory,
        (offset, count): (u64, usize),
        with: impl FnOnce(&[VolatileSlice<'_>]) -> R,
    ) -> Result<R, NotCopied> {
        with_slices(pieces(&self.writable, offset, count), memory, Permissions::Write, with)
    }

    /// Writes `data` to the writable bytes at `offset`, in one section: keep it short.
    ///
    /// # Errors
    /// As for [`Chain::read`]; some bytes may have been written.
    pub fn write(
        &self,
        memory: &mut DeviceMemory,
        offset: u64,
        data: &[u8],
    ) -> Result<(), NotCopied> {
        let section = memory.section()?;
        let mut rest = data;
        for (address, length) in pieces(&self.writable, offset, rest.len()) {
            let (piece, after) = rest.split_at_checked(length).ok_or(NotCopied::Unreachable)?;
            let address = address.map(GuestAddress).ok_or(NotCopied::Unreachable)?;
            section.write_slice(piece, address).map_err(|_| NotCopied::Unreachable)?;
            rest = after;
        }
        reached(rest.is_empty())
    }
}

/// Lends `with` the memory of `pieces` for `access`, all of it or none.
fn with_slices<R>(
    pieces: impl Iterator<Item = (Option<u64>, usize)>,
    memory: &mut DeviceMemory,
    access: Permissions,
    with: impl FnOnce(&[VolatileSlice<'_>]) -> R,
) -> Result<R, NotCopied> {
    let section = memory.section()?;
    let mut slices = Vec::with_capacity(pieces.size_hint().1.unwrap_or_default());
    for (address, length) in pieces {
        let address = address.map(GuestAddress).ok_or(NotCopied::Unreachable)?;
        let found = section.get_slices(address, length, access);
        for slice in found.map_err(|_| NotCopied::Unreachable)? {
            slices.push(slice.map_err(|_| NotCopied::Unreachable)?);
        }
    }
    Ok(with(&slices))
}

fn reached(reached: bool) -> Result<(), NotCopied> {
    reached.then_some(()).ok_or(NotCopied::Unreachable)
}

fn length(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|buffer| u64::from(buffer.length)).sum()
}

/// The pieces of `buffers` that make up `count` bytes from `offset` (fewer if they end before):
/// address (`None` past the end of the address space) and length.
fn pieces(
    buffers: &[Buffer],
    offset: u64,
    count: usize,
) -> impl Iterator<Item = (Option<u64>, usize)> + '_ {
    let (mut skip, mut left) = (offset, count);
    buffers.iter().filter_map(move |buffer| {
        let length = u64::from(buffer.length);
        let skipped = skip.min(length);
        skip -= skipped;
        // At most the length of a buffer, so it fits.
        let taken = left.min((length - skipped) as usize);
        left -= taken;
        (taken != 0).then_some((buffer.address.checked_add(skipped), taken))
    })
}

/// Why a device cannot continue: its driver has to reset it.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// A ring cannot be accessed, or its contents are inconsistent.
    #[error("virtqueue: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// The available ring cannot be read.
    #[error("virtqueue: the available ring cannot be read")]
    Available,
    /// The queue's areas cannot be accessed.
    #[error("virtqueue {0}: its areas are not memory that the device can reach")]
    Areas(usize),
    /// A descriptor chain is malformed.
    #[error("descriptor chain: {0}")]
    Chain(&'static str),
    /// A request has no status byte, or it cannot be accessed.
    #[error("the status of a request cannot be written")]
    Status,
    /// The device itself cannot start or continue.
    #[error("{0}")]
    Device(String),
}

/// Why serving a queue stopped.
#[derive(Debug, thiserror::Error)]
pub enum Unserved {
    /// The device may make no requests now. What was popped and not returned is popped again later.
    #[error(transparent)]
    NotNow(#[from] NotNow),
    /// The device cannot continue.
    #[error(transparent)]
    Broken(#[from] Broken),
}

impl From<virtio_queue::Error> for Unserved {
    fn from(error: virtio_queue::Error) -> Self {
        Self::Broken(error.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn buffers(lengths: &[u32]) -> Vec<Buffer> {
        let mut address = 0x1000;
        let buffer = |length: &u32| {
            let buffer = Buffer { address, length: *length };
            // A gap after each, so that none are contiguous.
            address += u64::from(*length) + 3;
            buffer
        };
        lengths.iter().map(buffer).collect()
    }

    proptest! {
        #[test]
        fn pieces_are_the_bytes_asked_for(
            lengths in proptest::collection::vec(1u32..20, 0..6),
            offset in 0u64..80,
            count in 0usize..80,
        ) {
            let buffers = buffers(&lengths);
            let bytes = buffers.iter().flat_map(|buffer| {
                (0..u64::from(buffer.length)).map(|byte| buffer.address + byte)
            });
            let expected: Vec<_> = bytes.skip(offset as usize).take(count).collect();
            let got: Vec<_> = pieces(&buffers, offset, count)
                .flat_map(|(address, length)| {
                    (0..length as u64).map(move |byte| address.unwrap() + byte)
                })
                .collect();
            prop_assert_eq!(got, expected);
        }
    }

    #[test]
    fn a_chain_without_enough_bytes_cannot_be_reached() {
        let map = vm_memory::GuestMemoryMmap::from_ranges(&[(GuestAddress(0x1000), 0x1000)]);
        let mut memory = DeviceMemory::direct(map.unwrap());
        memory.gate().set_bus_master(true);
        memory.gate().start();
        let chain = Chain { head: 0, readable: buffers(&[4, 4]), writable: buffers(&[8]) };
        assert_eq!((chain.readable(), chain.writable()), (8, 8));
        chain.write(&mut memory, 0, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        let mut data = [0; 3];
        chain.read(&mut memory, 3, &mut data).unwrap();
        // The second buffer starts at the eighth byte.
        assert_eq!(data, [4, 8, 0]);
        assert_eq!(chain.read(&mut memory, 6, &mut data), Err(NotCopied::Unreachable));
        assert_eq!(chain.write(&mut memory, 6, &data), Err(NotCopied::Unreachable));
        let away = Chain { writable: vec![Buffer { address: u64::MAX - 1, length: 8 }], ..chain };
        assert_eq!(away.write(&mut memory, 4, &[0]), Err(NotCopied::Unreachable));
    }

    #[test]
    fn nothing_is_copied_while_no_requests_are_allowed() {
        let map = vm_memory::GuestMemoryMmap::from_ranges(&[(GuestAddress(0x1000), 0x1000)]);
        let mut memory = DeviceMemory::direct(map.unwrap());
        let gate = memory.gate();
        gate.start();
        let chain = Chain { head: 0, readable: buffers(&[4]), writable: buffers(&[4]) };
        let refused = Err(NotCopied::NotNow(NotNow));
        assert_eq!(chain.write(&mut memory, 0, &[1; 4]), refused);
        gate.set_bus_master(true);
        let mut data = [0xff; 4];
        chain.read(&mut memory, 0, &mut data).unwrap();
        assert_eq!(data, [0; 4]);
        chain.write(&mut memory, 0, &[1; 4]).unwrap();
        gate.stop();
        assert_eq!(chain.read(&mut memory, 0, &mut data), refused);
    }
}
