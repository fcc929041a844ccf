// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DMA between memory and the buffer.

use std::fmt;
use std::ops::Range;

use super::{BUFFER_SIZE, BUFFER_START};
use twostage::spec::pci::Pasid;

/// No request crosses a boundary of this many bytes (PCIe 6.0 §2.2.7).
const REQUEST_BOUNDARY: u64 = 4096;

/// A DMA, as requested by software.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transfer {
    /// The address to read.
    pub source: u64,
    /// The address to write.
    pub destination: u64,
    /// In bytes.
    pub count: u64,
    /// From the buffer to memory; otherwise the reverse.
    pub to_memory: bool,
    /// The PASID of its requests.
    pub pasid: Option<Pasid>,
    /// How many bytes are done.
    pub done: usize,
}

/// Memory access of a device. A request is within a page of 4 KiB.
pub trait Requests {
    /// Why a request failed.
    type Stop;

    /// Reads into `data` from `iova` on. Returns the number of bytes, at least one; the rest is
    /// requested separately.
    ///
    /// # Errors
    /// The DMA stops there.
    fn read(
        &mut self,
        pasid: Option<Pasid>,
        iova: u64,
        data: &mut [u8],
    ) -> Result<usize, Self::Stop>;

    /// Writes `data` from `iova` on, with the same result.
    ///
    /// # Errors
    /// The DMA stops there.
    fn write(&mut self, pasid: Option<Pasid>, iova: u64, data: &[u8]) -> Result<usize, Self::Stop>;
}

/// Why a DMA failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Failure<S> {
    /// It is not within the buffer.
    #[error("DMA of {count:#x} bytes at device address {address:#x} is not within the buffer")]
    Bounds {
        /// In the device's own address space.
        address: u64,
        /// In bytes.
        count: u64,
    },
    /// A request failed; those before it are done.
    #[error("DMA at {iova:#x}: {stop}")]
    Stopped {
        /// The address of the request.
        iova: u64,
        /// Why it failed.
        stop: S,
    },
}

/// The DMA engine.
pub struct Engine {
    mask: u64,
    buffer: Box<[u8; BUFFER_SIZE]>,
}

impl Engine {
    /// An engine with the DMA mask `mask`. Its buffer is zeroes.
    pub fn new(mask: u64) -> Self {
        Self { mask, buffer: Box::new([0; BUFFER_SIZE]) }
    }

    /// Does the rest of `transfer`, request by request, until one fails. Another call continues
    /// with the failed one.
    ///
    /// # Errors
    /// Why it stopped.
    pub fn run<R: Requests>(
        &mut self,
        transfer: &mut Transfer,
        requests: &mut R,
    ) -> Result<(), Failure<R::Stop>> {
        let Transfer { source, destination, count, to_memory, pasid, ref mut done } = *transfer;
        let (address, memory) = match to_memory {
            true => (source, destination),
            false => (destination, source),
        };
        let buffer = buffer_range(address, count)
            .and_then(|range| self.buffer.get_mut(range))
            .ok_or(Failure::Bounds { address, count })?;
        while let Some(rest) = buffer.get_mut(*done..).filter(|rest| !rest.is_empty()) {
            let iova = (memory & self.mask).wrapping_add(*done as u64) & self.mask;
            // At most 4096, so it fits.
            let length = (REQUEST_BOUNDARY - iova % REQUEST_BOUNDARY) as usize;
            let (part, _) = rest.split_at_mut(rest.len().min(length));
            let made = if to_memory {
                requests.write(pasid, iova, part)
            } else {
                // A failed read must not change the buffer.
                let mut data = [0; BUFFER_SIZE];
                let (data, _) = data.split_at_mut(part.len());
                requests.read(pasid, iova, data).inspect(|length| {
                    part.iter_mut().zip(data).take(*length).for_each(|(to, from)| *to = *from);
                })
            };
            let made = made.map_err(|stop| Failure::Stopped { iova, stop })?;
            *done += made.clamp(1, part.len());
        }
        Ok(())
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("mask", &self.mask).finish_non_exhaustive()
    }
}

/// The buffer range of `count` bytes at device address `address`.
fn buffer_range(address: u64, count: u64) -> Option<Range<usize>> {
    let start = address.checked_sub(BUFFER_START)?;
    let end = start.checked_add(count)?;
    (end <= BUFFER_SIZE as u64).then_some(start as usize..end as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Records requests, does at most `most` bytes of each, and refuses those to one page.
    struct Recorder {
        requests: Vec<(bool, u64, usize)>,
        most: usize,
        refused: Option<u64>,
    }

    #[derive(Debug, PartialEq, Eq)]
    struct Refused;

    impl Default for Recorder {
        fn default() -> Self {
            Self { requests: Vec::new(), most: usize::MAX, refused: None }
        }
    }

    impl Recorder {
        fn request(&mut self, write: bool, iova: u64, length: usize) -> Result<usize, Refused> {
            self.requests.push((write, iova, length));
            match self.refused {
                Some(page) if page == iova & !0xfff => Err(Refused),
                _ => Ok(length.min(self.most)),
            }
        }
    }

    impl Requests for Recorder {
        type Stop = Refused;

        fn read(&mut self, _: Option<Pasid>, iova: u64, data: &mut [u8]) -> Result<usize, Refused> {
            data.fill(0xaa);
            self.request(false, iova, data.len())
        }

        fn write(&mut self, _: Option<Pasid>, iova: u64, data: &[u8]) -> Result<usize, Refused> {
            self.request(true, iova, data.len())
        }
    }

    fn transfer(memory: u64, device: u64, count: u64, to_memory: bool) -> Transfer {
        let (source, destination) = if to_memory { (device, memory) } else { (memory, device) };
        Transfer { source, destination, count, to_memory, pasid: None, done: 0 }
    }

    #[test]
    fn requests_stay_in_their_page() {
        let mut memory = Recorder::default();
        let mut engine = Engine::new(u64::MAX);
        engine.run(&mut transfer(0x1ff0, BUFFER_START, 0x1000, true), &mut memory).unwrap();
        assert_eq!(memory.requests, [(true, 0x1ff0, 0x10), (true, 0x2000, 0xff0)]);
    }

    #[test]
    fn a_refused_read_leaves_the_buffer_as_it_was() {
        let mut memory = Recorder { refused: Some(0x2000), ..Recorder::default() };
        let mut engine = Engine::new(u64::MAX);
        let refused =
            engine.run(&mut transfer(0x1ff0, BUFFER_START + 0x10, 0x20, false), &mut memory);
        assert_eq!(refused, Err(Failure::Stopped { iova: 0x2000, stop: Refused }));
        assert_eq!(engine.buffer[..0x10], [0; 0x10]);
        assert_eq!(engine.buffer[0x10..0x20], [0xaa; 0x10]);
        assert_eq!(engine.buffer[0x20..0x40], [0; 0x20]);
    }

    #[test]
    fn transfers_outside_the_buffer_reach_nothing() {
        let mut memory = Recorder::default();
        let mut engine = Engine::new(u64::MAX);
        for (address, count) in [
            (0, 1),
            (BUFFER_START - 1, 1),
            (BUFFER_START, 0x1001),
            (BUFFER_START + 0xfff, 2),
            (BUFFER_START, u64::MAX),
            (u64::MAX, 1),
        ] {
            let failure = engine.run(&mut transfer(0x1000, address, count, true), &mut memory);
            assert_eq!(failure, Err(Failure::Bounds { address, count }));
        }
        assert!(memory.requests.is_empty());
        engine.run(&mut transfer(0x1000, BUFFER_START + 0x1000, 0, true), &mut memory).unwrap();
    }

    #[test]
    fn addresses_are_cut_to_the_mask() {
        let mut memory = Recorder::default();
        let mut engine = Engine::new((1 << 28) - 1);
        engine.run(&mut transfer(0x1_2345_6000, BUFFER_START, 8, true), &mut memory).unwrap();
        engine.run(&mut transfer(0x0fff_fffc, BUFFER_START, 8, true), &mut memory).unwrap();
        assert_eq!(memory.requests, [(true, 0x0345_6000, 8), (true, 0x0fff_fffc, 4), (true, 0, 4)]);
    }

    #[test]
    fn a_transfer_goes_on_where_it_stopped() {
        let mut memory = Recorder { most: 0xc, refused: Some(0x2000), ..Recorder::default() };
        let mut engine = Engine::new(u64::MAX);
        let mut transfer = transfer(0x1ff0, BUFFER_START, 0x20, false);
        let stopped = Failure::Stopped { iova: 0x2000, stop: Refused };
        assert_eq!(engine.run(&mut transfer, &mut memory), Err(stopped));
        assert_eq!((transfer.done, engine.buffer[0xf], engine.buffer[0x10]), (0x10, 0xaa, 0));
        memory.refused = None;
        engine.run(&mut transfer, &mut memory).unwrap();
        let requests = memory.requests.iter().map(|(_, iova, length)| (*iova, *length));
        let expected = [(0x1ff0, 0x10), (0x1ffc, 4), (0x2000, 0x10), (0x2000, 0x10), (0x200c, 4)];
        assert!(requests.eq(expected));
        assert_eq!(engine.buffer[..0x21], [[0xaa; 0x20].as_slice(), &[0]].concat());
    }
}
