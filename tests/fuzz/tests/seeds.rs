// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The fuzzers' seeds, executed without libFuzzer: what they reach works, and what they once found
//! stays mended.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use twostage_fuzz::TARGETS;

/// The largest seed, in bytes, as the fuzzers make them (`-max_len`).
const LARGEST: usize = 4096;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// The names of what is in `folder`, without extensions.
fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}

#[test]
fn every_target_has_a_program_and_seeds() {
    let targets: BTreeSet<_> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names(&folder("fuzz_targets")), targets);
    assert_eq!(names(&folder("seeds")), targets);
}

#[test]
fn seeds_find_nothing() {
    let mut failed = Vec::new();
    for (name, run) in TARGETS {
        let seeds = fs::read_dir(folder("seeds").join(name)).unwrap();
        let mut seeds: Vec<_> = seeds.map(|entry| entry.unwrap().path()).collect();
        seeds.sort();
        assert!(!seeds.is_empty(), "{name} has no seeds");
        for seed in seeds {
            let bytes = fs::read(&seed).unwrap();
            assert!(bytes.len() <= LARGEST, "{}: {} bytes", seed.display(), bytes.len());
            if std::panic::catch_unwind(|| run(&bytes)).is_err() {
                failed.push(seed);
            }
        }
    }
    assert!(failed.is_empty(), "these fail: {failed:#?}");
}
