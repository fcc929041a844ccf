// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest of a probe: one vCPU that runs one program in ring 0 in 64-bit mode.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs, CpuId};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::signal::Killable;

use super::{Program, BREAKPOINT_HANDLER, DATA, END, RESULT_PORT, RIGHT, XSAVE};
use crate::arch::x86_64::layout::KVM_TSS;
use crate::memory::MachineMemory;
use crate::process::signals::kick_signal;
use crate::{Error, Result};

/// Bytes of RAM.
const MEMORY: u64 = 2 << 20;
/// Guest-physical addresses. Page tables of four levels, down to pages of 2 MiB or 1 GiB:
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
/// Descriptors,
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
/// code,
const CODE: u64 = 0x8000;
const HANDLER: u64 = 0x8800;
/// and the stack, which grows down.
const STACK: u64 = 0x10000;

const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;
/// CR0: protected mode, monitor the coprocessor, its type, its errors natively, write protection,
/// paging.
const CR0: u64 = 1 << 0 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
/// CR4: PAE, FXSAVE and its exceptions.
const CR4: u64 = 1 << 5 | 1 << 9 | 1 << 10;
const CR4_OSXSAVE: u64 = 1 << 18;
/// EFER: long mode, enabled and active.
const EFER: u64 = 1 << 8 | 1 << 10;
/// The bit of RFLAGS that always reads as 1.
const RFLAGS_FIXED: u64 = 1 << 1;
const CODE_SELECTOR: u16 = 0x08;
const DATA_SELECTOR: u16 = 0x10;
/// Descriptors of 64-bit code and of data (Intel SDM Vol. 3, §3.4.5).
const DESCRIPTORS: [u64; 3] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
const BREAKPOINT: u64 = 3;

/// A program takes microseconds; somewhat more if ring 0 is emulated.
const TIME_LIMIT: Duration = Duration::from_secs(5);

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// With the right result.
    Works,
    /// It was not run: CPUID does not announce the feature.
    NotAnnounced,
    /// With a wrong result.
    Wrong,
    /// KVM gave up (`KVM_EXIT_INTERNAL_ERROR`).
    InternalError {
        /// KVM's suberror; 1: it could not emulate an instruction.
        suberror: u32,
    },
    /// With a triple fault.
    TripleFault,
    /// It did not end within the time limit.
    Hangs,
    /// In another way.
    Other(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Works => f.write_str("works"),
            Self::NotAnnounced => f.write_str("not announced by CPUID"),
            Self::Wrong => f.write_str("FAILS: wrong result"),
            Self::InternalError { suberror } => {
                write!(f, "FAILS: KVM_EXIT_INTERNAL_ERROR, suberror {suberror}")
            }
            Self::TripleFault => f.write_str("FAILS: triple fault"),
            Self::Hangs => f.write_str("FAILS: does not end"),
            Self::Other(what) => write!(f, "FAILS: {what}"),
        }
    }
}

/// Runs `program` in a new virtual machine, whose vCPU has `cpuid`.
///
/// # Errors
/// The machine cannot be created; what the program does is no error.
pub(super) fn run(kvm: &Kvm, cpuid: &CpuId, program: &Program) -> Result<Outcome> {
    if program.announced_by.is_some_and(|bit| !bit.is_set(cpuid)) {
        return Ok(Outcome::NotAnnounced);
    }
    let memory = MachineMemory::new(MEMORY)?;
    load(&memory, program).map_err(|error| Error::Os {
        what: "writing guest memory",
        source: io::Error::other(error),
    })?;
    let vm = kvm.create_vm().map_err(Error::kvm("creating a virtual machine"))?;
    vm.set_tss_address(KVM_TSS as usize).map_err(Error::kvm("placing its TSS"))?;
    memory.register(&vm)?;
    let vcpu = make_vcpu(&vm, cpuid)?;
    run_vcpu(vcpu)
}

/// Writes the program and its tables.
fn load(memory: &MachineMemory, program: &Program) -> std::result::Result<(), GuestMemoryError> {
    let write = |bytes: &[u8], to| memory.map().write_slice(bytes, GuestAddress(to));
    let entry = |at, value: u64| write(&value.to_le_bytes(), at);
    entry(PML4, PDPT | PAGE_PRESENT_WRITABLE)?;
    if program.gib_page {
        entry(PDPT, PAGE_LARGE | PAGE_PRESENT_WRITABLE)?;
    } else {
        entry(PDPT, PAGE_DIRECTORY | PAGE_PRESENT_WRITABLE)?;
        entry(PAGE_DIRECTORY, PAGE_LARGE | PAGE_PRESENT_WRITABLE)?;
    }
    for (at, descriptor) in (GDT..).step_by(8).zip(DESCRIPTORS) {
        entry(at, descriptor)?;
    }
    // A 64-bit interrupt gate (Intel SDM Vol. 3, figure 6-8); the handler is below 64 KiB.
    let gate = HANDLER | u64::from(CODE_SELECTOR) << 16 | 0x8e << 40;
    entry(IDT + 16 * BREAKPOINT, gate)?;
    write(&[program.code, &END].concat(), CODE)?;
    write(&BREAKPOINT_HANDLER, HANDLER)
}

/// A vCPU about to run the program.
fn make_vcpu(vm: &VmFd, cpuid: &CpuId) -> Result<VcpuFd> {
    let vcpu = vm.create_vcpu(0).map_err(Error::kvm("creating a vCPU"))?;
    vcpu.set_cpuid2(cpuid).map_err(Error::kvm("setting CPUID"))?;
    let mut sregs = vcpu.get_sregs().map_err(Error::kvm("reading registers"))?;
    set_sregs(&mut sregs, XSAVE.is_set(cpuid));
    vcpu.set_sregs(&sregs).map_err(Error::kvm("setting registers"))?;
    let regs =
        kvm_regs { rip: CODE, rsp: STACK, rdi: DATA, rflags: RFLAGS_FIXED, ..kvm_regs::default() };
    vcpu.set_regs(&regs).map_err(Error::kvm("setting registers"))?;
    Ok(vcpu)
}

fn set_sregs(sregs: &mut kvm_sregs, xsave: bool) {
    let segment = |selector, type_| kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    };
    // Execute and read, accessed; read and write, accessed.
    sregs.cs = kvm_segment { l: 1, ..segment(CODE_SELECTOR, 0xb) };
    let data = kvm_segment { db: 1, ..segment(DATA_SELECTOR, 0x3) };
    for register in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *register = data;
    }
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, (size_of_val(&DESCRIPTORS) - 1) as u16);
    (sregs.idt.base, sregs.idt.limit) = (IDT, (16 * (BREAKPOINT + 1) - 1) as u16);
    sregs.cr0 = CR0;
    sregs.cr3 = PML4;
    sregs.cr4 = if xsave { CR4 | CR4_OSXSAVE } else { CR4 };
    sregs.efer = EFER;
}

/// Runs the vCPU until the program ends, or for [`TIME_LIMIT`].
fn run_vcpu(mut vcpu: VcpuFd) -> Result<Outcome> {
    let given_up = Arc::new(AtomicBool::new(false));
    let (sender, outcomes) = mpsc::channel();
    let thread = {
        let given_up = given_up.clone();
        let run = move || {
            // Fails only if the receiver has given up.
            let _ = sender.send(outcome(&mut vcpu, &given_up));
        };
        thread::Builder::new().name("probe".into()).spawn(run).map_err(Error::os("vCPU thread"))?
    };
    let outcome = match outcomes.recv_timeout(TIME_LIMIT) {
        Ok(outcome) => outcome,
        Err(RecvTimeoutError::Timeout) => Outcome::Hangs,
        Err(RecvTimeoutError::Disconnected) => Outcome::Other("its thread ended".into()),
    };
    given_up.store(true, Ordering::SeqCst);
    end(thread);
    Ok(outcome)
}

/// Waits for `thread`, which may be in KVM.
fn end(thread: JoinHandle<()>) {
    // A signal just before the thread enters KVM is lost, so it is sent until the thread has ended.
    while !thread.is_finished() {
        if let Err(error) = thread.kill(kick_signal()) {
            log::debug!("kicking a vCPU: {error}");
        }
        thread::sleep(Duration::from_millis(1));
    }
    if thread.join().is_err() {
        log::error!("a vCPU thread panicked");
    }
}

/// Enters the guest until the final exit.
fn outcome(vcpu: &mut VcpuFd, given_up: &AtomicBool) -> Outcome {
    while !given_up.load(Ordering::SeqCst) {
        return match vcpu.run() {
            Ok(VcpuExit::IoOut(RESULT_PORT, [RIGHT])) => Outcome::Works,
            Ok(VcpuExit::Hlt) => Outcome::Wrong,
            Ok(VcpuExit::Shutdown) => Outcome::TripleFault,
            Ok(VcpuExit::InternalError) => {
                // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which `internal` is the
                // member of the union that KVM filled in; it is plain integers.
                let suberror = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror };
                Outcome::InternalError { suberror }
            }
            Ok(VcpuExit::Intr) => continue,
            Ok(exit) => Outcome::Other(format!("{exit:?}")),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => continue,
            Err(error) => Outcome::Other(format!("KVM_RUN: {error}")),
        };
    }
    Outcome::Hangs
}
