// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The probe: what this machine's KVM can do, and whether Linux runs on it.
//!
//! A KVM without VT-x or SVM emulates the guest's ring 0, with few instructions. Small guests try
//! those that Linux needs, each in its own virtual machine.

mod guest;
mod programs;

use std::fmt;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Cap;
use serde::{Serialize, Serializer};

pub use self::guest::Outcome;
use self::programs::PROGRAMS;
use crate::machine::open_kvm;
use crate::{process::signals, Error, Result};

/// The result.
#[derive(Debug, Clone, Serialize)]
pub struct Probe {
    /// Optional parts of KVM's interface.
    pub kvm: Interface,
    /// What Linux needs in ring 0.
    pub ring0: Vec<Trial>,
    /// Whether Linux runs as a guest: nothing failed.
    pub linux: bool,
}

/// Parts of KVM's interface.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Interface {
    /// Maximum number of vCPUs of one machine.
    pub max_vcpus: usize,
    /// Recommended number of vCPUs.
    pub recommended_vcpus: usize,
    /// `KVM_CAP_SPLIT_IRQCHIP`: an IOAPIC outside of the kernel, which interrupt remapping needs.
    pub split_irqchip: bool,
    /// `KVM_CAP_X2APIC_API`: interrupt destinations of 32 bits.
    pub x2apic_api: bool,
    /// `KVM_CAP_IRQFD`: interrupts without an exit.
    pub irqfd: bool,
    /// `KVM_CAP_IOEVENTFD`: doorbells without an exit to user space.
    pub ioeventfd: bool,
    /// `KVM_CAP_TSC_DEADLINE_TIMER`: the LAPIC timer's deadline mode.
    pub tsc_deadline_timer: bool,
}

/// One trial.
#[derive(Debug, Clone, Serialize)]
pub struct Trial {
    /// Its name.
    pub name: &'static str,
    /// How it ended.
    #[serde(serialize_with = "as_text")]
    pub outcome: Outcome,
}

impl Trial {
    fn failed(&self) -> bool {
        !matches!(self.outcome, Outcome::Works | Outcome::NotAnnounced)
    }
}

impl Probe {
    /// Probes this machine's KVM.
    ///
    /// # Errors
    /// There is no KVM, it lacks what every machine needs, or it refuses a small machine.
    pub fn new() -> Result<Self> {
        let kvm = open_kvm()?;
        // A program that does not end is stopped with a signal.
        signals::install_kick()?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(Error::kvm("querying CPUID"))?;
        let ring0 = PROGRAMS
            .iter()
            .map(|program| {
                Ok(Trial { name: program.name, outcome: guest::run(&kvm, &cpuid, program)? })
            })
            .collect::<Result<Vec<_>>>()?;
        let has = |capability| kvm.check_extension(capability);
        let interface = Interface {
            max_vcpus: kvm.get_max_vcpus(),
            recommended_vcpus: kvm.get_nr_vcpus(),
            split_irqchip: has(Cap::SplitIrqchip),
            x2apic_api: has(Cap::X2ApicApi),
            irqfd: has(Cap::Irqfd),
            ioeventfd: has(Cap::Ioeventfd),
            tsc_deadline_timer: has(Cap::TscDeadlineTimer),
        };
        Ok(Self { kvm: interface, linux: !ring0.iter().any(Trial::failed), ring0 })
    }

    /// The result in one line.
    pub fn verdict(&self) -> String {
        let failed: Vec<_> =
            self.ring0.iter().filter(|trial| trial.failed()).map(|trial| trial.name).collect();
        if self.linux {
            "Linux runs on this machine's KVM".to_owned()
        } else {
            format!(
                "Linux does not run on this machine's KVM, which cannot do in ring 0: {}",
                failed.join("; ")
            )
        }
    }
}

fn as_text<S: Serializer>(value: &Outcome, to: S) -> std::result::Result<S::Ok, S::Error> {
    to.collect_str(value)
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "KVM:")?;
        let Interface { max_vcpus, recommended_vcpus, .. } = self.kvm;
        line(f, "vCPUs", &format_args!("{max_vcpus} at most, {recommended_vcpus} recommended"))?;
        for (name, there) in [
            ("split irqchip", self.kvm.split_irqchip),
            ("x2APIC API", self.kvm.x2apic_api),
            ("irqfd", self.kvm.irqfd),
            ("ioeventfd", self.kvm.ioeventfd),
            ("TSC deadline timer", self.kvm.tsc_deadline_timer),
        ] {
            line(f, name, &if there { "yes" } else { "no" })?;
        }
        writeln!(f, "ring 0 of a guest:")?;
        for trial in &self.ring0 {
            line(f, trial.name, &trial.outcome)?;
        }
        writeln!(f, "{}", self.verdict())
    }
}

fn line(f: &mut fmt::Formatter<'_>, name: &str, what: &dyn fmt::Display) -> fmt::Result {
    writeln!(f, "  {name:<22} {what}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(outcomes: [Outcome; 3]) -> Probe {
        let names = ["64-bit mode", "BMI2", "INT3, IRETQ"];
        let trials = names.into_iter().zip(outcomes);
        let ring0: Vec<_> = trials.map(|(name, outcome)| Trial { name, outcome }).collect();
        let kvm = Interface {
            max_vcpus: 8,
            recommended_vcpus: 2,
            split_irqchip: true,
            x2apic_api: false,
            irqfd: true,
            ioeventfd: true,
            tsc_deadline_timer: true,
        };
        Probe { kvm, linux: !ring0.iter().any(Trial::failed), ring0 }
    }

    #[test]
    fn what_fails_keeps_linux_from_running_and_is_named() {
        let suberror = Outcome::InternalError { suberror: 1 };
        let probe = probe([Outcome::Works, suberror, Outcome::TripleFault]);
        assert!(!probe.linux);
        let text = probe.to_string();
        assert!(text.ends_with("cannot do in ring 0: BMI2; INT3, IRETQ\n"), "{text}");
        assert!(text.contains("KVM_EXIT_INTERNAL_ERROR, suberror 1\n"), "{text}");
        assert!(text.contains("x2APIC API             no\n"), "{text}");
        let json = serde_json::to_value(&probe).unwrap();
        assert_eq!(json["ring0"][2]["outcome"], "FAILS: triple fault");
        assert_eq!(json["kvm"]["split_irqchip"], true);
    }

    #[test]
    fn what_cpuid_does_not_announce_is_no_failure() {
        let probe = probe([Outcome::Works, Outcome::NotAnnounced, Outcome::Works]);
        assert!(probe.linux);
        assert!(probe.to_string().ends_with("Linux runs on this machine's KVM\n"));
    }

    #[test]
    fn small_guests_run_here() {
        if kvm_ioctls::Kvm::new().is_err() {
            eprintln!("no /dev/kvm: not tested");
            return;
        }
        let probe = Probe::new().unwrap();
        assert_eq!(probe.ring0.len(), PROGRAMS.len());
        // Every KVM on x86-64 can do this; the others depend on the machine.
        assert_eq!(probe.ring0[0].outcome, Outcome::Works);
    }
}
