// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every way in which a walk may come out while caches may have what memory has not any more.
//!
//! A walk is written as if memory never changed. Where a word may be one of several, it is run once
//! for each combination. What a [part](Oracle::part) of it may come to is found once.

use std::any::Any;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use super::memory::{Memory, Moment, PAGE};

/// More combinations than this, of a walk or a part of it, are not looked at.
const MOST: usize = 400;

/// What tells one part of a walk from all others.
pub type Part = [u64; 3];

/// What a walk reads from.
pub struct Oracle<'a> {
    memory: &'a Memory,
    /// What was chosen, of how many, in the order of the choices.
    script: Vec<(usize, usize)>,
    at: usize,
    /// All that a part may come to; `None`: words are only what they are now.
    parts: Option<BTreeMap<Part, Rc<dyn Any>>>,
    /// Pages, by number, that the unit writes to as it likes, and whether one was read, or there
    /// were too many ways.
    unknown: Range<u64>,
    is_unknown: bool,
    /// What was read.
    loads: Vec<u64>,
}

impl<'a> Oracle<'a> {
    fn new(memory: &'a Memory, unknown: Range<u64>, parts: bool) -> Self {
        let (script, loads) = (Vec::new(), Vec::new());
        let parts = parts.then(BTreeMap::new);
        Self { memory, script, at: 0, parts, unknown, is_unknown: false, loads }
    }

    /// One of the values of the word at `gpa` that `may` be: each with the moment until which it
    /// was there. `None` if it is not memory.
    pub fn load(&mut self, gpa: u64, may: impl Fn(u64, Moment) -> bool) -> Option<u64> {
        if self.parts.is_none() {
            self.loads.push(gpa);
            return self.memory.look(gpa);
        }
        self.is_unknown |= self.unknown.contains(&(gpa / PAGE));
        let present = self.memory.look(gpa)?;
        let mut other = Vec::new();
        self.memory.past(gpa, |value, until| {
            if value != present && may(value, until) && !other.contains(&value) {
                other.push(value);
            }
        });
        match self.choose(other.len() + 1) {
            0 => Some(present),
            number => Some(other[number - 1]),
        }
    }

    /// Until when the word at `gpa`, which was loaded, was `value`.
    pub fn until(&self, gpa: u64, value: u64) -> Moment {
        if self.memory.load(gpa) == Some(value) {
            return Moment::MAX;
        }
        let mut last = 0;
        self.memory.past(gpa, |was, until| {
            if was == value {
                last = last.max(until);
            }
        });
        last
    }

    /// What `walk` comes to, which depends on `part` and on nothing else that was chosen before:
    /// one of all ways. `part` stands for the same in all of the walk that this is a part of.
    pub fn part<T: Clone + PartialEq + 'static>(
        &mut self,
        part: Part,
        mut walk: impl FnMut(&mut Self) -> T,
    ) -> T {
        let known = match &self.parts {
            None => return walk(self),
            Some(parts) => parts.get(&part).cloned(),
        };
        let all = known.unwrap_or_else(|| {
            let outer = (std::mem::take(&mut self.script), self.at);
            let all: Rc<dyn Any> = Rc::new(self.all(walk));
            (self.script, self.at) = outer;
            if let Some(parts) = &mut self.parts {
                parts.insert(part, all.clone());
            }
            all
        });
        let all = all.downcast_ref::<Vec<T>>().expect("a part is always of one type");
        all[self.choose(all.len())].clone()
    }

    /// All results of `walk`, each once. If there are too many ways, it is unknown.
    fn all<T: PartialEq>(&mut self, mut walk: impl FnMut(&mut Self) -> T) -> Vec<T> {
        let mut results = Vec::new();
        for _ in 0..MOST {
            self.at = 0;
            let result = walk(self);
            if !results.contains(&result) {
                results.push(result);
            }
            // The next combination: the last choice that has another one.
            self.script.truncate(self.at);
            while let Some((chosen, count)) = self.script.pop() {
                if chosen + 1 < count {
                    self.script.push((chosen + 1, count));
                    break;
                }
            }
            if self.script.is_empty() || self.is_unknown {
                return results;
            }
        }
        self.is_unknown = true;
        results
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
    let mut oracle = Oracle::new(memory, 0..0, false);
    let result = walk(&mut oracle);
    (oracle.loads, result)
}

/// All results of `walk`, each once, first the one if memory is as it is now; `None` if there are
/// too many ways, or one leads through pages that are `unknown` (by number), which the unit writes
/// to.
pub fn every<T: PartialEq>(
    memory: &Memory,
    unknown: Range<u64>,
    walk: impl FnMut(&mut Oracle<'_>) -> T,
) -> Option<Vec<T>> {
    let mut oracle = Oracle::new(memory, unknown, true);
    let results = oracle.all(walk);
    (!oracle.is_unknown).then_some(results)
}
