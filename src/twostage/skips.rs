// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests that cannot test here what they are for.

use std::fmt::Display;
use std::io::{self, Write};

/// Prints on standard error that something is not tested, and `why`, even if the test passes: the
/// test harness hides what a macro prints, and not what is written.
pub fn not_tested(why: impl Display) {
    // Nobody can be told if it fails. In one piece, as other tests write, too.
    let _ = io::stderr().write_all(format!("*** {why}: NOT tested\n").as_bytes());
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::process::Command;

    use super::*;

    const CHILD: &str = "TWOSTAGE_TEST_SKIPS";

    /// The child; nothing in an ordinary run of the tests.
    #[test]
    fn skipping_child() {
        if env::var_os(CHILD).is_some() {
            eprintln!("hidden");
            not_tested("in a child");
        }
    }

    #[test]
    fn what_is_not_tested_is_seen_though_the_test_passes() {
        let mut child = Command::new(env::current_exe().unwrap());
        child.args(["--exact", "skips::tests::skipping_child"]).env(CHILD, "1");
        let output = child.output().unwrap();
        assert!(output.status.success());
        assert_eq!(String::from_utf8_lossy(&output.stderr), "*** in a child: NOT tested\n");
    }
}
