// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a side core reports.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

/// A side core.
#[derive(Debug, Clone, Serialize)]
pub struct SideCoreReport {
    /// `on` or `auto`.
    pub mode: &'static str,
    /// KVM cannot map registers read-only, so the guest reads them with exits.
    pub reads_exit: bool,
    /// KVM can lend register pages.
    pub lends: bool,
    /// Whether it polls at the moment; otherwise it is parked.
    pub polling: bool,
    /// How often it began to poll, and for how long it did, in milliseconds.
    pub polls: u64,
    /// See `polls`.
    pub polled_ms: u64,
    /// How often it was parked, by reason.
    pub parked: BTreeMap<&'static str, u64>,
    /// Tail writes that KVM put into its ring, which cost no exit to this process.
    pub tails_coalesced: u64,
    /// Tail writes to memory, which cost no exit at all; several may have been one.
    pub tails_in_memory: u64,
    /// How often pages were lent.
    pub lent: u64,
    /// How often they came back, by reason.
    pub taken_back: BTreeMap<&'static str, u64>,
}

impl fmt::Display for SideCoreReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mode, polls, polled_ms, tails_coalesced, tails_in_memory, lent, .. } = self;
        let now = if self.polling { "polling" } else { "parked" };
        let lacks = match (self.reads_exit, self.lends) {
            (true, _) => "; reads exit, and pages are not lent: KVM lacks what that needs",
            (false, false) => "; pages are not lent: KVM lacks what that needs",
            (false, true) => "",
        };
        writeln!(
            f,
            "side core ({mode}): {now}, polled {polls} times, {polled_ms} ms in all{lacks}"
        )?;
        writeln!(f, "side core, parked: {}", counts(&self.parked))?;
        writeln!(f, "side core, tails: {tails_coalesced} coalesced, {tails_in_memory} in memory")?;
        writeln!(f, "side core, pages lent {lent} times, taken back: {}", counts(&self.taken_back))
    }
}

/// The counts that are not 0.
fn counts(counts: &BTreeMap<&'static str, u64>) -> String {
    let counted = counts.iter().filter(|(_, count)| **count != 0);
    let counted: Vec<_> = counted.map(|(name, count)| format!("{name} {count}")).collect();
    if counted.is_empty() {
        "none".to_owned()
    } else {
        counted.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_what_is_worth_it() {
        let mut report = SideCoreReport {
            mode: "auto",
            reads_exit: false,
            lends: true,
            polling: false,
            polls: 2,
            polled_ms: 40,
            parked: BTreeMap::from([("idle", 2), ("preempted", 0)]),
            tails_coalesced: 5,
            tails_in_memory: 7,
            lent: 1,
            taken_back: BTreeMap::from([("asked", 1)]),
        };
        let text = report.to_string();
        assert!(text.starts_with("side core (auto): parked, polled 2 times, 40 ms in all\n"));
        assert!(text.contains("parked: idle 2\n") && text.contains("5 coalesced, 7 in memory"));
        assert!(text.ends_with("pages lent 1 times, taken back: asked 1\n"), "{text}");
        report.lends = false;
        assert!(report.to_string().contains(" in all; pages are not lent: KVM lacks"));
        report.reads_exit = true;
        assert!(report.to_string().contains(" in all; reads exit, and pages are not lent: KVM"));
    }
}
