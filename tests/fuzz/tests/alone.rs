// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What executions of the fuzzers share makes no difference to them: an input does the same alone
//! and after others.

use std::ffi::OsString;
use std::thread;

use twostage_vmm::inside::parsed;

/// Command lines that are taken, refused by the options' parser, and by what they mean.
const LINES: [&str; 16] = [
    "run --kernel k",
    "run --kernel k --cpus boot=4 --memory size=2G --device edu --device edu",
    "run",
    "",
    "--help",
    "run --help",
    "--version",
    "info",
    "probe",
    "nonsense --kernel k",
    "run --kernel k --kernel k",
    "run --kernel k --memory size=0",
    "run --kernel k --disk path=/dev/null,colour=red",
    "run --kernel k --on-reset restart --jail log --report json,file=r",
    "run --kernel k -- more",
    "run --kernel k --net tap=tap0,mac=03:00:00:00:00:01",
];

fn words(line: &str) -> Vec<OsString> {
    ["twostage"].into_iter().chain(line.split_whitespace()).map(OsString::from).collect()
}

#[test]
fn a_command_line_means_the_same_after_any_other() {
    // The options are described once for each thread.
    let alone = LINES.map(|line| thread::spawn(move || parsed(&words(line))).join().unwrap());
    assert!(alone[0].is_ok() && alone[2].is_err());
    for before in LINES {
        let _ = parsed(&words(before));
        for (line, alone) in LINES.iter().zip(&alone) {
            assert_eq!(parsed(&words(line)), *alone, "'{line}' after '{before}'");
        }
    }
}
