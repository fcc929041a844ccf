// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every way in which a walk may come out while caches may have what memory has not any more.
//!
//! A walk is written as if memory never changed. Where a word may be one of several, it is run once
//! for each combination.

use std::ops::Range;

use super::memory::{Memory, Moment, PAGE};

/// More combinations than this are not looked at.
const MOST: usize = 400;

/// What a walk reads from.
pub struct Oracle<'a> {
    memory: &'a Memory,
    /// What was chosen, of how many, in the order of the choices.
    script: Vec<(usize, usize)>,
    at: usize,
    /// Pages, by number, that the unit writes to as it likes, and whether one was read.
    unknown: Range<u64>,
    is_unknown: bool,
    /// What was read.
    loads: Vec<u64>,
}

impl<'a> Oracle<'a> {
    fn new(memory: &'a Memory, unknown: Range<u64>) -> Self {
        let (script, loads) = (Vec::new(), Vec::new());
        Self { memory, script, at: 0, unknown, is_unknown: false, loads }
    }

    /// One of the values of the word at `gpa` that `may` be: each with the moment until which it
    /// was there. `None` if it is not memory.
    pub fn load(&mut self, gpa: u64, may: impl Fn(u64, Moment) -> bool) -> Option<u64> {
        self.is_unknown |= self.unknown.contains(&(gpa / PAGE));
        self.loads.push(gpa);
        let mut all = Vec::new();
        for (value, until) in self.memory.values(gpa)? {
            let is_present = until == Moment::MAX;
            if (is_present || may(value, until)) && !all.contains(&value) {
                all.push(value);
            }
        }
        Some(all[self.choose(all.len())])
    }

    fn choose(&mut self, count: usize) -> usize {
        if count == 1 {
            return 0;
        }
        let at = self.at;
        self.at += 1;
        match self.script.get(at) {
            Some((chosen, _)) => *chosen,
            None => {
                self.script.push((0, count));
                0
            }
        }
    }
}

/// The words that `walk` reads, and what it comes to, if memory is as it is now.
pub fn way<T>(memory: &Memory, walk: impl FnOnce(&mut Oracle<'_>) -> T) -> (Vec<u64>, T) {
    // The first value of each word is the present one.
    let mut oracle = Oracle::new(memory, 0..0);
    let result = walk(&mut oracle);
    (oracle.loads, result)
}

/// All results of `walk`, each once; `None` if there are too many ways, or one leads through pages
/// that are `unknown` (by number), which the unit writes to.
pub fn every<T: PartialEq>(
    memory: &Memory,
    unknown: Range<u64>,
    mut walk: impl FnMut(&mut Oracle<'_>) -> T,
) -> Option<Vec<T>> {
    let mut oracle = Oracle::new(memory, unknown);
    let mut results = Vec::new();
    for _ in 0..MOST {
        oracle.at = 0;
        oracle.loads.clear();
        let result = walk(&mut oracle);
        if oracle.is_unknown {
            return None;
        }
        if !results.contains(&result) {
            results.push(result);
        }
        // The next combination: the last choice that has another one.
        oracle.script.truncate(oracle.at);
        while let Some((chosen, count)) = oracle.script.pop() {
            if chosen + 1 < count {
                oracle.script.push((chosen + 1, count));
                break;
            }
        }
        if oracle.script.is_empty() {
            return Some(results);
        }
    }
    None
}
