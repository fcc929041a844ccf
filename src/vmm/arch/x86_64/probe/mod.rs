// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The probe: what this machine's KVM can do, and whether Linux runs on it.
//!
//! A KVM without VT-x or SVM emulates the guest's ring 0, with few instructions. Small guests try
//! those that Linux needs, each in its own virtual machine.

mod guest;

use std::fmt;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Cap;
use serde::{Serialize, Serializer};

pub use self::guest::Outcome;
use crate::machine::open_kvm;
use crate::process::signals;
use crate::{Error, Result};

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
        let cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(Error::kvm("querying CPUID"))?;
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

/// Guest-physical address of what programs read and write.
const DATA: u64 = 0x9000;
/// The port that a program writes its result to.
const RESULT_PORT: u16 = 0xf4;
/// The value for a right result.
const RIGHT: u8 = 0x2a;

/// A register of a CPUID leaf.
#[derive(Debug, Clone, Copy)]
enum Register {
    Ebx,
    Ecx,
    Edx,
}

/// A feature bit of CPUID.
#[derive(Debug, Clone, Copy)]
struct CpuidBit {
    leaf: u32,
    index: u32,
    register: Register,
    bit: u32,
}

impl CpuidBit {
    const fn new(leaf: u32, index: u32, register: Register, bit: u32) -> Self {
        Self { leaf, index, register, bit }
    }

    /// Whether `cpuid` has it.
    pub fn is_set(self, cpuid: &CpuId) -> bool {
        let mut leaves = cpuid.as_slice().iter();
        let leaf = leaves.find(|entry| (entry.function, entry.index) == (self.leaf, self.index));
        leaf.is_some_and(|entry| {
            let value = match self.register {
                Register::Ebx => entry.ebx,
                Register::Ecx => entry.ecx,
                Register::Edx => entry.edx,
            };
            value >> self.bit & 1 != 0
        })
    }
}

/// XSAVE and related instructions (CPUID.1:ECX, bit 26); allows setting CR4.OSXSAVE.
const XSAVE: CpuidBit = CpuidBit::new(1, 0, Register::Ecx, 26);

/// Something that Linux does in ring 0.
#[derive(Debug, Clone, Copy)]
struct Program {
    /// What it tries.
    pub name: &'static str,
    /// The bit that announces it: kernels do not use the feature without it.
    pub announced_by: Option<CpuidBit>,
    /// The guest's first GiB is mapped by one page.
    pub gib_page: bool,
    /// The instructions.
    pub code: &'static [u8],
}

impl Program {
    const fn new(name: &'static str, announced_by: Option<CpuidBit>, code: &'static [u8]) -> Self {
        Self { name, announced_by, gib_page: false, code }
    }
}

/// Every program: one for each feature that Linux needs. It starts in 64-bit mode with [`DATA`] in
/// RDI, at least 64 zeroed bytes; its last comparison (ZF) says whether the result was right.
const PROGRAMS: [Program; 8] = [
    Program::new("64-bit mode", None, COUNT),
    Program::new(
        "CMPXCHG16B",
        Some(CpuidBit::new(1, 0, Register::Ecx, 13)),
        &[
            0x31, 0xc0, // xor %eax, %eax
            0x31, 0xd2, // xor %edx, %edx
            0xbb, 1, 0, 0, 0, // mov $1, %ebx
            0xb9, 2, 0, 0, 0, // mov $2, %ecx
            0xf0, 0x48, 0x0f, 0xc7, 0x0f, // lock cmpxchg16b (%rdi)
            0x83, 0x7f, 0x08, 2, // cmpl $2, 8(%rdi)
        ],
    ),
    Program::new(
        "FXSAVE, FXRSTOR",
        Some(CpuidBit::new(1, 0, Register::Edx, 24)),
        &[
            0x48, 0x0f, 0xae, 0x07, // fxsave64 (%rdi)
            0x48, 0x0f, 0xae, 0x0f, // fxrstor64 (%rdi)
            // MXCSR after reset: cmpl $0x1f80, 24(%rdi)
            0x81, 0x7f, 0x18, 0x80, 0x1f, 0, 0,
        ],
    ),
    Program::new(
        "XSETBV, XSAVE, XRSTOR",
        Some(XSAVE),
        &[
            0x31, 0xc9, // xor %ecx, %ecx
            0x31, 0xd2, // xor %edx, %edx
            0xb8, 3, 0, 0, 0, // mov $3, %eax: x87 and SSE
            0x0f, 0x01, 0xd1, // xsetbv
            0x48, 0x0f, 0xae, 0x27, // xsave64 (%rdi)
            0x48, 0x0f, 0xae, 0x2f, // xrstor64 (%rdi)
            // MXCSR after reset: cmpl $0x1f80, 24(%rdi)
            0x81, 0x7f, 0x18, 0x80, 0x1f, 0, 0,
        ],
    ),
    Program::new(
        "BMI1",
        Some(CpuidBit::new(7, 0, Register::Ebx, 3)),
        &[
            0xb8, 0x0f, 0, 0, 0, // mov $0x0f, %eax
            0xb9, 0xff, 0, 0, 0, // mov $0xff, %ecx
            0xc4, 0xe2, 0x78, 0xf2, 0xc1, // andn %ecx, %eax, %eax
            0x3d, 0xf0, 0, 0, 0, // cmp $0xf0, %eax
        ],
    ),
    Program::new(
        "BMI2",
        Some(CpuidBit::new(7, 0, Register::Ebx, 8)),
        &[
            0xb8, 1, 0, 0, 0, // mov $1, %eax
            0xb9, 4, 0, 0, 0, // mov $4, %ecx
            0xc4, 0xe2, 0xf1, 0xf7, 0xc0, // shlx %rcx, %rax, %rax
            0x83, 0xf8, 0x10, // cmp $16, %eax
        ],
    ),
    Program::new(
        "INT3, IRETQ",
        None,
        &[
            0xcc, // int3, to BREAKPOINT_HANDLER
            0x83, 0x3f, 1, // cmpl $1, (%rdi)
        ],
    ),
    Program {
        gib_page: true,
        ..Program::new("1 GiB pages", Some(CpuidBit::new(0x8000_0001, 0, Register::Edx, 26)), COUNT)
    },
];

/// Counts to one in memory.
const COUNT: &[u8] = &[
    0xff, 0x07, // incl (%rdi)
    0x83, 0x3f, 1, // cmpl $1, (%rdi)
];

/// Appended to every program: reports the result.
const END: [u8; 7] = [
    0x75,
    0x04, // jne: not right
    0xb0,
    RIGHT, // mov $RIGHT, %al
    0xe6,
    RESULT_PORT as u8, // out %al, $RESULT_PORT
    0xf4,              // hlt
];

/// The handler of INT3.
const BREAKPOINT_HANDLER: [u8; 4] = [
    0xff, 0x07, // incl (%rdi)
    0x48, 0xcf, // iretq
];

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_cpuid_entry2;
    use twostage::skips::not_tested;

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
            not_tested("no /dev/kvm");
            return;
        }
        let probe = Probe::new().unwrap();
        assert_eq!(probe.ring0.len(), PROGRAMS.len());
        // Every KVM on x86-64 can do this; the others depend on the machine.
        assert_eq!(probe.ring0[0].outcome, Outcome::Works);
    }

    #[test]
    fn a_bit_is_found_in_its_leaf_alone() {
        let leaf = |function, index, ebx| kvm_cpuid_entry2 {
            function,
            index,
            ebx,
            ..kvm_cpuid_entry2::default()
        };
        let bmi1 = CpuidBit::new(7, 0, Register::Ebx, 3);
        let with = |entries: &[_]| bmi1.is_set(&CpuId::from_entries(entries).unwrap());
        assert!(with(&[leaf(1, 0, 0), leaf(7, 0, 1 << 3)]));
        assert!(!with(&[leaf(7, 0, !(1 << 3)), leaf(7, 1, !0), leaf(1, 0, !0)]));
        assert!(!with(&[]));
    }
}
