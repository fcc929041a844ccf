// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DMA of an `edu`, naively: byte by byte between its buffer and a memory, as registers say.

use super::around::MEMORY;
use crate::models::msix::Message;

/// Where the buffer is for the device, and how long it is.
const BUFFER: u64 = 0x4_0000;
const LENGTH: u64 = 0x1000;
/// Writes there are messages, if they are doublewords.
const MESSAGES: std::ops::Range<u64> = 0xfee0_0000..0xfef0_0000;

/// The registers of a transfer, and what it works on.
pub struct Transfers {
    pub source: u64,
    pub destination: u64,
    pub count: u64,
    /// Of PASIDs: as written.
    pub pasid: u32,
    mask: u64,
    buffer: Vec<u8>,
    pub memory: Vec<u8>,
    /// Messages that must have been sent.
    pub sent: Vec<Message>,
}

/// What is in memory at the start: in each byte something else than in those near it.
pub fn fresh_memory() -> Vec<u8> {
    (0..MEMORY).map(|at| (at * 7 + (at >> 8) * 13) as u8).collect()
}

impl Transfers {
    pub fn new(mask: u64) -> Self {
        let (buffer, memory) = (vec![0; LENGTH as usize], fresh_memory());
        let (source, destination, count, pasid, sent) = (0, 0, 0, 0, Vec::new());
        Self { source, destination, count, pasid, mask, buffer, memory, sent }
    }

    /// A reset: memory stays as it is.
    pub fn reset(&mut self) {
        let memory = std::mem::take(&mut self.memory);
        let sent = std::mem::take(&mut self.sent);
        *self = Self { memory, sent, ..Self::new(self.mask) };
    }

    /// A transfer, to memory or from it; `pasid`: requests carry one. It stops at the first page
    /// that is missing.
    pub fn run(&mut self, to_memory: bool, pasid: bool) {
        let (device, memory) = match to_memory {
            true => (self.source, self.destination),
            false => (self.destination, self.source),
        };
        let Some(start) = device.checked_sub(BUFFER) else { return };
        if start.checked_add(self.count).is_none_or(|end| end > LENGTH) {
            return;
        }
        let iova = |done: u64| (memory & self.mask).wrapping_add(done) & self.mask;
        let mut done = 0;
        while done < self.count {
            let (at, place) = (iova(done), (start + done) as usize);
            if !pasid && MESSAGES.contains(&at) {
                // Requests end with a page.
                let request = (self.count - done).min(0x1000 - at % 0x1000);
                if !to_memory || request != 4 || !at.is_multiple_of(4) {
                    return;
                }
                let data = [0, 1, 2, 3].map(|byte| self.buffer[place + byte]);
                self.sent.push((at, u32::from_le_bytes(data)));
                done += 4;
                continue;
            }
            let Some(byte) = usize::try_from(at).ok().filter(|at| *at < MEMORY) else { return };
            match to_memory {
                true => self.memory[byte] = self.buffer[place],
                false => self.buffer[place] = self.memory[byte],
            }
            done += 1;
        }
    }
}
