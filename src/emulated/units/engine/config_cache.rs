// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where the configuration of a requester is, by PASID: what one of its threads keeps of it.

/// Lines of the cache, each for the PASIDs of one remainder.
const LINES: usize = 8;

/// Where in a table of the engine's the configurations of one requester are. Belongs to one thread;
/// what it holds is invalid as soon as the table has changed, which is another *generation* of it.
#[derive(Debug, Default, Clone)]
pub(crate) struct ConfigCache {
    generation: u64,
    /// The PASID and the index of its configuration.
    lines: [Option<(Option<u32>, usize)>; LINES],
}

impl ConfigCache {
    /// The index of the configuration for requests with `pasid`, when it is cached of the table's
    /// `generation`.
    #[inline]
    pub fn get(&self, generation: u64, pasid: Option<u32>) -> Option<usize> {
        // In bounds: a remainder of the length.
        let (held, index) = self.lines[line(pasid)]?;
        (self.generation == generation && held == pasid).then_some(index)
    }

    /// Caches the `index` for requests with `pasid`; whether another one had to go for it.
    pub fn fill(&mut self, generation: u64, pasid: Option<u32>, index: usize) -> bool {
        if self.generation != generation {
            *self = Self { generation, ..Self::default() };
        }
        // In bounds: a remainder of the length.
        self.lines[line(pasid)].replace((pasid, index)).is_some()
    }
}

/// The line that the configuration for requests with `pasid` can be in.
#[inline]
fn line(pasid: Option<u32>) -> usize {
    pasid.unwrap_or(0) as usize % LINES
}
