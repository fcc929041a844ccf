// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Two vCPUs of KVM that do what scripts say: at full speed where the kernel emulates all but the
//! processor's user mode, as they are in that.

use std::time::Instant;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use twostage::patience::PATIENCE;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::bus::BusDevice;

/// Where the registers are.
pub const REGISTERS: u64 = 0xfed9_0000;
/// A write here ends a script, with the address where it ended.
const END: u64 = 0xfed0_0000;

const TABLES: u64 = 0x1000;
const CODE_AT: u64 = 0x8000;
const SCRIPTS: [u64; 2] = [0x10_0000, 0x20_0000];
/// Bytes of the guest's memory.
pub const MEMORY: u64 = 0x30_0000;
/// Maximum steps of a script.
const STEPS: usize = 0x8000;

/// What a vCPU does.
#[derive(Debug, Clone, Copy)]
pub enum Step {
    Write32(u64, u32),
    Write64(u64, u64),
    /// 32 bits, which [`Vcpu::read`] has afterwards.
    Read(u64),
    /// Reads until `mask` of the word is `value`.
    Await {
        address: u64,
        mask: u32,
        value: u32,
    },
    /// So many turns of a loop.
    Pause(u32),
}

impl Step {
    fn words(self) -> [u64; 2] {
        let step = |kind: u64, address: u64, value| [kind | address << 32, value];
        match self {
            Self::Write32(address, value) => step(1, address, value.into()),
            Self::Write64(address, value) => step(2, address, value),
            Self::Read(address) => step(3, address, 0),
            Self::Await { address, mask, value } => {
                step(4, address, u64::from(mask) << 32 | u64::from(value))
            }
            Self::Pause(turns) => step(5, 0, turns.into()),
        }
    }
}

/// Does the steps at RDI. RSI is [`END`], R9 where the script begins:
/// ```text
/// next:   mov (%rdi),%eax         await:  mov %rdx,%rbx           write32: mov %edx,(%rcx)
///         mov 4(%rdi),%ecx                shr $32,%rbx                     jmp next
///         mov 8(%rdi),%rdx                mov $0x10000000,%r8d    write64: mov %rdx,(%rcx)
///         add $16,%rdi            1:      mov (%rcx),%eax                  jmp next
///         dec %eax                        and %ebx,%eax           read:    mov (%rcx),%eax
///         jz write32                      cmp %edx,%eax                    mov %rax,-8(%rdi)
///         dec %eax                        je next                          jmp next
///         jz write64                      pause                   pause:   pause
///         dec %eax                        dec %r8d                         dec %edx
///         jz read                         jnz 1b                           jns pause
///         dec %eax                        jmp stop                         jmp next
///         jz await                stop:   mov %rdi,(%rsi)
///         dec %eax                        mov %r9,%rdi
///         jz pause                        jmp next
/// ```
#[rustfmt::skip]
const CODE: [u8; 96] = [
    0x8b, 0x07, 0x8b, 0x4f, 0x04, 0x48, 0x8b, 0x57, 0x08, 0x48, 0x83, 0xc7, 0x10, 0xff, 0xc8, 0x74,
    0x18, 0xff, 0xc8, 0x74, 0x18, 0xff, 0xc8, 0x74, 0x19, 0xff, 0xc8, 0x74, 0x1d, 0xff, 0xc8, 0x74,
    0x37, 0x48, 0x89, 0x3e, 0x4c, 0x89, 0xcf, 0xeb, 0xd7, 0x89, 0x11, 0xeb, 0xd3, 0x48, 0x89, 0x11,
    0xeb, 0xce, 0x8b, 0x01, 0x48, 0x89, 0x47, 0xf8, 0xeb, 0xc6, 0x48, 0x89, 0xd3, 0x48, 0xc1, 0xeb,
    0x20, 0x41, 0xb8, 0x00, 0x00, 0x00, 0x10, 0x8b, 0x01, 0x21, 0xd8, 0x39, 0xd0, 0x74, 0xb1, 0xf3,
    0x90, 0x41, 0xff, 0xc8, 0x75, 0xf1, 0xeb, 0xc9, 0xf3, 0x90, 0xff, 0xca, 0x79, 0xfa, 0xeb, 0xa0,
];

/// Writes what all vCPUs need to `memory`: the code, and tables that map 4 GiB to themselves.
pub fn prepare(memory: &GuestMemoryMmap) {
    const PRESENT_WRITABLE_USER: u64 = 7;
    const LARGE: u64 = 1 << 7;
    let write = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).unwrap();
    let (pointers, directories) = (TABLES + 0x1000, TABLES + 0x2000);
    write(TABLES, pointers | PRESENT_WRITABLE_USER);
    for gigabyte in 0..4 {
        let directory = directories + gigabyte * 0x1000;
        write(pointers + 8 * gigabyte, directory | PRESENT_WRITABLE_USER);
        for page in 0..512 {
            let address = gigabyte << 30 | page << 21;
            write(directory + 8 * page, address | PRESENT_WRITABLE_USER | LARGE);
        }
    }
    memory.write_slice(&CODE, GuestAddress(CODE_AT)).unwrap();
}

/// One of the two.
pub struct Vcpu {
    vcpu: VcpuFd,
    memory: GuestMemoryMmap,
    script: u64,
}

impl Vcpu {
    /// vCPU `number` (0 or 1) of `vm`, whose `memory` has been [prepared](prepare).
    pub fn new(kvm: &Kvm, vm: &VmFd, memory: &GuestMemoryMmap, number: usize) -> Self {
        let vcpu = vm.create_vcpu(number as u64).unwrap();
        let supported = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
        vcpu.set_cpuid2(&supported).unwrap();
        let mut special = vcpu.get_sregs().unwrap();
        user_mode(&mut special);
        vcpu.set_sregs(&special).unwrap();
        let script = SCRIPTS[number];
        let (rip, rflags, rsi) = (CODE_AT, 2, END);
        let start = kvm_regs { rip, rflags, rsi, rdi: script, r9: script, ..Default::default() };
        vcpu.set_regs(&start).unwrap();
        Self { vcpu, memory: memory.clone(), script }
    }

    pub fn file(&self) -> &VcpuFd {
        &self.vcpu
    }

    /// Does `steps`, with `registers` for what exits. Panics if it waits in vain.
    pub fn run(&mut self, steps: &[Step], registers: &dyn BusDevice) {
        assert!(steps.len() < STEPS);
        let words = steps.iter().flat_map(|step| step.words()).chain([0, 0]);
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        self.memory.write_slice(&bytes, GuestAddress(self.script)).unwrap();
        let start = Instant::now();
        let ended = loop {
            assert!(start.elapsed() < 4 * PATIENCE, "it waits for a register in vain");
            match self.vcpu.run() {
                Ok(VcpuExit::MmioWrite(END, data)) => {
                    break u64::from_le_bytes(data.try_into().unwrap());
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    registers.write(address.checked_sub(REGISTERS).unwrap(), data);
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    registers.read(address.checked_sub(REGISTERS).unwrap(), data);
                }
                Ok(other) => panic!("{other:?}"),
                Err(error) => assert!(matches!(error.errno(), libc::EINTR | libc::EAGAIN)),
            }
        };
        let done = ((ended - self.script) / 16) as usize;
        let last = done.checked_sub(1).and_then(|last| steps.get(last));
        assert_eq!(done, steps.len() + 1, "it waits in vain: {last:x?}");
    }

    /// What step `number` of the last script has read.
    pub fn read(&self, number: usize) -> u32 {
        let at = self.script + 16 * number as u64 + 8;
        self.memory.read_obj::<u64>(GuestAddress(at)).unwrap() as u32
    }
}

/// Flat segments, long mode, privilege level 3.
fn user_mode(special: &mut kvm_sregs) {
    const PROTECTED_AND_PAGED: u64 = 0x8001_0033;
    const PAE_AND_FXSR: u64 = 0x220;
    const LONG_NX_SYSCALL: u64 = 0xd01;
    let flat = kvm_segment {
        limit: u32::MAX,
        selector: 0x2b,
        type_: 3,
        present: 1,
        dpl: 3,
        s: 1,
        db: 1,
        g: 1,
        ..Default::default()
    };
    special.cs = kvm_segment { selector: 0x33, type_: 11, l: 1, db: 0, ..flat };
    (special.ds, special.es, special.ss) = (flat, flat, flat);
    (special.fs, special.gs) = (flat, flat);
    (special.cr0, special.cr3, special.cr4) = (PROTECTED_AND_PAGED, TABLES, PAE_AND_FXSR);
    special.efer = LONG_NX_SYSCALL;
}
