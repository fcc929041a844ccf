// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The programs that a probe runs in a guest's ring 0: one small program for each feature that
//! Linux needs.
//!
//! A program starts in 64-bit mode with [`DATA`] in RDI, at least 64 zeroed bytes. Its last
//! comparison (ZF) says whether the result was right.

use kvm_bindings::CpuId;

/// Guest-physical address of what programs read and write.
pub(super) const DATA: u64 = 0x9000;
/// The port that a program writes its result to.
pub(super) const RESULT_PORT: u16 = 0xf4;
/// The value for a right result.
pub(super) const RIGHT: u8 = 0x2a;

/// A register of a CPUID leaf.
#[derive(Debug, Clone, Copy)]
enum Register {
    Ebx,
    Ecx,
    Edx,
}

/// A feature bit of CPUID.
#[derive(Debug, Clone, Copy)]
pub(super) struct CpuidBit {
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
pub(super) const XSAVE: CpuidBit = CpuidBit::new(1, 0, Register::Ecx, 26);

/// Something that Linux does in ring 0.
#[derive(Debug, Clone, Copy)]
pub(super) struct Program {
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

/// Every program.
pub(super) const PROGRAMS: [Program; 8] = [
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
pub(super) const END: [u8; 7] = [
    0x75,
    0x04, // jne: not right
    0xb0,
    RIGHT, // mov $RIGHT, %al
    0xe6,
    RESULT_PORT as u8, // out %al, $RESULT_PORT
    0xf4,              // hlt
];

/// The handler of INT3.
pub(super) const BREAKPOINT_HANDLER: [u8; 4] = [
    0xff, 0x07, // incl (%rdi)
    0x48, 0xcf, // iretq
];

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_cpuid_entry2;

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
