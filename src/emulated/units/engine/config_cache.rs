// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Per-thread cache: index of a requester's configuration by PASID.

/// Lines of the cache, each for the PASIDs of one remainder.
const LINES: usize = 8;

/// Indices of one requester's configurations in a table of the engine. Belongs to one thread;
/// invalid as soon as the table has changed, which gives it another *generation*.
#[derive(Debug, Default, Clone)]
pub(crate) struct ConfigCache {
    generation: u64,
    /// The PASID and the index of its configuration.
    lines: [Option<(Option<u32>, usize)>; LINES],
}

impl ConfigCache {
    /// The index of the configuration for requests with `pasid`, if cached in the table's
    /// `generation`.
    #[inline]
    pub fn get(&self, generation: u64, pasid: Option<u32>) -> Option<usize> {
        // In bounds: a remainder of a division by the length.
        let (held, index) = self.lines[line(pasid)]?;
        (self.generation == generation && held == pasid).then_some(index)
    }

    /// Caches the `index` for requests with `pasid`; returns whether another one was evicted.
    pub fn fill(&mut self, generation: u64, pasid: Option<u32>, index: usize) -> bool {
        if self.generation != generation {
            *self = Self { generation, ..Self::default() };
        }
        // In bounds: a remainder of a division by the length.
        self.lines[line(pasid)].replace((pasid, index)).is_some()
    }
}

/// The line for requests with `pasid`.
#[inline]
fn line(pasid: Option<u32>) -> usize {
    pasid.unwrap_or(0) as usize % LINES
}
