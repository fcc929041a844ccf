// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! SIGKILL under writes: what the guest was told is done, is done.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use tempfile::{NamedTempFile, TempDir};

use crate::child::kvm;
use crate::guest::Guest;
use crate::world::{folders, IN_MEMORY};

const SECTOR: usize = 512;
/// Sectors of the disk, more than are written.
const SECTORS: u64 = 1 << 20;

/// The number that a sector is filled with, if it is filled with one.
fn number(file: &File, sector: u64) -> Option<u64> {
    let mut bytes = [0; SECTOR];
    file.read_exact_at(&mut bytes, sector * SECTOR as u64).unwrap();
    let mut words = bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
    let first = words.next().unwrap();
    words.all(|word| word == first).then_some(first)
}

/// Kills a machine under numbered writes after `wait`, and compares. Returns how many the guest has
/// reported.
fn kill_after(folder: &TempDir, direct: &str, wait: Duration) -> u64 {
    let file = NamedTempFile::new_in(folder).unwrap();
    file.as_file().set_len(SECTORS * SECTOR as u64).unwrap();
    let option = format!("path={},direct={direct}", file.path().display());
    let mut guest = Guest::start(&["--disk", &option]);
    guest.order("k 0 1000000");
    assert_eq!(guest.line(), "k 1");
    std::thread::sleep(wait);
    guest.machine.0.kill().unwrap();
    guest.machine.0.wait().unwrap();
    let rest = guest.rest();
    // The last line may be cut off.
    let whole = rest.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let mut reported = 1;
    for line in whole.lines() {
        reported += 1;
        assert_eq!(line, format!("k {reported}"));
    }
    let file = file.reopen().unwrap();
    for sector in 1..=reported {
        assert_eq!(number(&file, sector), Some(sector), "of {reported}");
    }
    // Those that the guest could not report any more: in order, and then one that is under way.
    let written = (1..SECTORS).take_while(|sector| number(&file, *sector) == Some(*sector)).count();
    for sector in written as u64 + 2..written as u64 + 100 {
        assert_eq!(number(&file, sector), Some(0), "{written} were written");
    }
    reported
}

#[test]
fn what_the_guest_was_told_is_in_the_file_after_a_kill() {
    if !kvm() {
        return;
    }
    let mut reported = Vec::new();
    for folder in folders() {
        let is_in_memory = folder.path().starts_with(IN_MEMORY);
        let direct = if is_in_memory { &["off"][..] } else { &["off", "on"] };
        for (direct, round) in direct.iter().flat_map(|direct| (0..4).map(move |n| (direct, n))) {
            // At any moment: how far the guest gets is a matter of the machine.
            let wait = Duration::from_micros(37_003 * round);
            reported.push(kill_after(&folder, direct, wait));
        }
    }
    println!("reported: {reported:?}");
}
