// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The exit codes in docs/faults.md and in the help are those of the code.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::child::TWOSTAGE;

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)).unwrap()
}

fn numbers(text: &str) -> impl Iterator<Item = u8> + '_ {
    text.split(|character: char| !character.is_ascii_digit()).filter_map(|word| word.parse().ok())
}

#[test]
fn every_exit_code_is_documented_and_no_other() {
    let source = read("src/vmm/process/mod.rs");
    let constants = source.lines().filter_map(|line| line.trim().strip_prefix("pub const "));
    let codes = constants.filter_map(|line| line.split_once(": u8 = "));
    let codes: BTreeSet<u8> = codes.flat_map(|(_, value)| numbers(value)).collect();
    assert!(codes.len() > 8, "{codes:?}");

    let faults = read("docs/faults.md");
    let cells = faults.lines().filter(|line| line.starts_with('|'));
    let cells = cells.filter_map(|line| line.trim_end_matches(" |").rsplit(" | ").next());
    let others = faults.lines().filter(|line| line.starts_with("Of no fault of the world: "));
    let documented: BTreeSet<u8> = cells.chain(others).flat_map(numbers).collect();
    // 0 is the guest's; beyond are those of signals.
    let documented: BTreeSet<u8> =
        documented.into_iter().filter(|it| (1..=128).contains(it)).collect();
    assert_eq!(documented, codes, "docs/faults.md");

    let output = Command::new(TWOSTAGE).args(["run", "--help"]).output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    let (_, listed) = help.split_once("Exit codes:\n").unwrap();
    let listed =
        listed.lines().filter_map(|line| line.split_once("  ")?.1.trim().split(' ').next());
    let listed: BTreeSet<u8> = listed.filter_map(|word| word.parse().ok()).collect();
    assert_eq!(listed, codes, "--help");
}
