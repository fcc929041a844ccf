// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host's stage 2 as contexts use it, and which contexts share a tag or a stage 2.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::key::Source;
use crate::units::stage2::{DirtyLog, Stage2};

/// The host's stage 2 as one context uses it.
#[derive(Debug, Clone)]
pub(crate) struct HostStage2 {
    /// The mappings of the IOAS.
    pub stage2: Arc<Stage2>,
    /// The source of its cached translations.
    pub source: Source,
    /// The log of written pages; none if they are not tracked.
    pub dirty: Option<Arc<DirtyLog>>,
}

impl HostStage2 {
    /// A stage 2 with a `tag` that is unique among those cached at the same time.
    pub fn new(stage2: Arc<Stage2>, tag: u32, dirty: Option<Arc<DirtyLog>>) -> Self {
        Self { stage2, source: Source::new(tag, 0), dirty }
    }

    /// The log for writes, if tracking is on.
    pub fn tracking(&self) -> Option<&DirtyLog> {
        self.dirty.as_deref().filter(|log| log.is_enabled())
    }
}

/// Maximum number of retired tags. Nothing hits what is cached of them, so keeping it for a while
/// only costs space.
const RETIRED: usize = 64;

/// Tracks which contexts share a tag or a stage 2.
///
/// What is cached of a tag or of a stage 2 must be dropped after its last context is gone. With
/// counts, the cost of changing one attachment does not depend on their number.
#[derive(Debug, Default)]
pub(crate) struct Sharing {
    /// By address: their contexts keep them alive.
    stages2: BTreeMap<usize, Stage2Users>,
    /// Unused tags below the highest number of stages 2 that ever existed at once.
    free_stage2_tags: Vec<u32>,
    /// Tags without a context, which may still have cached entries.
    retired: BTreeSet<u32>,
}

/// The users of one stage 2.
#[derive(Debug)]
struct Stage2Users {
    /// Tag of its cached translations; unique among the stages 2 in use.
    stage2_tag: u32,
    /// Number of contexts of each tag; no entry is 0. (A tag stands for one HWPT, which has one
    /// stage 2.)
    contexts: BTreeMap<u32, usize>,
}

/// What must be dropped from the caches before anything else happens.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Gone {
    /// The tags.
    pub tags: BTreeSet<u32>,
    /// The tag of the stage 2, if it is affected.
    pub stage2_tag: Option<u32>,
}

impl Sharing {
    /// One more context for `tag` on `stage2`. Returns the tag of the stage 2.
    pub fn add(&mut self, tag: u32, stage2: &Arc<Stage2>) -> u32 {
        // If no tag is free, those in use are all below their number. There are fewer than 2^32.
        let next = self.stages2.len() as u32;
        let free = &mut self.free_stage2_tags;
        let users = self.stages2.entry(key(stage2)).or_insert_with(|| Stage2Users {
            stage2_tag: free.pop().unwrap_or(next),
            contexts: BTreeMap::new(),
        });
        *users.contexts.entry(tag).or_default() += 1;
        users.stage2_tag
    }

    /// One context less for `tag` on `stage2`.
    pub fn remove(&mut self, tag: u32, stage2: &Arc<Stage2>) -> Option<Gone> {
        let users = self.stages2.get_mut(&key(stage2))?;
        let count = users.contexts.get_mut(&tag)?;
        *count -= 1;
        if *count > 0 {
            return None;
        }
        users.contexts.remove(&tag);
        self.retired.insert(tag);
        if users.contexts.is_empty() {
            let stage2_tag = users.stage2_tag;
            self.stages2.remove(&key(stage2));
            self.free_stage2_tags.push(stage2_tag);
            // Its memory must be released now.
            return Some(Gone { tags: self.take_retired(), stage2_tag: Some(stage2_tag) });
        }
        (self.retired.len() >= RETIRED)
            .then(|| Gone { tags: self.take_retired(), stage2_tag: None })
    }

    /// Before `tag` gets a context: it may have had others, for another HWPT.
    pub fn reuse(&mut self, tag: u32) -> Option<Gone> {
        let retired = self.retired.contains(&tag);
        retired.then(|| Gone { tags: self.take_retired(), stage2_tag: None })
    }

    /// Everything that uses `stage2` or is retired; none if nothing uses it.
    pub fn through(&mut self, stage2: &Arc<Stage2>) -> Option<Gone> {
        let users = self.stages2.get(&key(stage2))?;
        let (stage2_tag, living) = (users.stage2_tag, users.contexts.keys().copied());
        let mut tags: BTreeSet<u32> = living.collect();
        tags.append(&mut self.retired);
        Some(Gone { tags, stage2_tag: Some(stage2_tag) })
    }

    fn take_retired(&mut self) -> BTreeSet<u32> {
        std::mem::take(&mut self.retired)
    }
}

fn key(stage2: &Arc<Stage2>) -> usize {
    Arc::as_ptr(stage2).addr()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gone(tags: impl IntoIterator<Item = u32>, stage2_tag: Option<u32>) -> Option<Gone> {
        Some(Gone { tags: tags.into_iter().collect(), stage2_tag })
    }

    #[test]
    fn a_stage_2_goes_with_its_last_context_and_its_tag_is_free_again() {
        let mut sharing = Sharing::default();
        let [one, two, three]: [Arc<Stage2>; 3] = std::array::from_fn(|_| Arc::default());
        assert_eq!([&one, &one, &two].map(|stage2| sharing.add(5, stage2)), [0, 0, 1]);
        assert_eq!(sharing.remove(5, &one), None);
        assert_eq!(sharing.remove(5, &one), gone([5], Some(0)));
        assert_eq!(sharing.remove(5, &one), None);
        assert_eq!([&three, &one].map(|stage2| sharing.add(6, stage2)), [0, 2]);
    }

    #[test]
    fn retired_tags_go_many_at_once_or_with_the_next_that_must() {
        let mut sharing = Sharing::default();
        let (stage2, other) = (Arc::default(), Arc::default());
        let count = RETIRED as u32;
        for tag in 0..=count {
            sharing.add(tag, &stage2);
        }
        for tag in 1..count {
            assert_eq!(sharing.remove(tag, &stage2), None);
        }
        assert_eq!(sharing.remove(count, &stage2), gone(1..=count, None));
        assert_eq!(sharing.reuse(1), None);
        sharing.add(1, &stage2);
        assert_eq!(sharing.remove(1, &stage2), None);
        assert_eq!(sharing.reuse(1), gone([1], None));
        sharing.add(1, &stage2);
        assert_eq!(sharing.remove(1, &stage2), None);
        assert_eq!(sharing.through(&other), None);
        assert_eq!(sharing.through(&stage2), gone([0, 1], Some(0)));
        assert_eq!(sharing.through(&stage2), gone([0], Some(0)));
    }
}
