// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A PC's vCPUs: setup and exits.
#![allow(unsafe_code)]

use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, RawFd};

use kvm_bindings::{kvm_msr_entry, kvm_run, Msrs, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress};

use super::boot::StartState;
use super::cpuid::{self, VcpuIdentity};
use super::exits::{dispatch, Next};
use super::IrqChip;
use crate::arch::exits::Exits;
use crate::config::MachineConfig;
use crate::memory::MachineMemory;
use crate::process::stop::{ResetCause, StopReason};
use crate::{Error, Result};

/// Longest x86 instruction, in bytes.
const MAX_INSTRUCTION: usize = 15;
/// Model-specific registers as initialized by firmware (Intel SDM Vol. 4, table 2-2).
const FIRMWARE_MSRS: [kvm_msr_entry; 2] = [
    // IA32_MISC_ENABLE: fast string operations.
    kvm_msr_entry { index: 0x1a0, reserved: 0, data: 1 << 0 },
    // IA32_MTRR_DEF_TYPE: MTRRs enabled, default write-back.
    kvm_msr_entry { index: 0x2ff, reserved: 0, data: 1 << 11 | 6 },
];
/// `KVM_INTERNAL_ERROR_EMULATION`.
const INTERNAL_ERROR_EMULATION: u32 = 1;
/// RIP of a vCPU after reset.
const RIP_AFTER_RESET: u64 = 0xfff0;

/// The processors of a machine and their interrupt controllers.
#[derive(Debug)]
pub(crate) struct Processors {
    pub chip: IrqChip,
    pub all: Vec<Processor>,
}

impl Processors {
    /// Those of `vm`, the machine of `config`. The first processor starts with `start`.
    ///
    /// # Errors
    /// KVM lacks something, or refuses it.
    pub fn new(kvm: &Kvm, vm: &VmFd, config: &MachineConfig, start: &StartState) -> Result<Self> {
        // Before any vCPU, as LAPICs depend on it.
        let chip = IrqChip::new(vm, config)?;
        let all = (0..config.vcpus)
            .map(|id| VcpuIdentity { id, count: config.vcpus })
            .map(|identity| Processor::new(kvm, vm, identity, start))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { chip, all })
    }
}

/// One vCPU.
#[derive(Debug)]
pub(crate) struct Processor {
    id: u8,
    fd: VcpuFd,
}

impl Processor {
    /// A vCPU of `vm`. The first starts with `start`; the others wait for INIT and SIPI from the
    /// in-kernel LAPICs.
    fn new(kvm: &Kvm, vm: &VmFd, identity: VcpuIdentity, start: &StartState) -> Result<Self> {
        let id = identity.id;
        let fd = vm.create_vcpu(id.into()).map_err(Error::kvm("creating a vCPU"))?;
        let mut cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(Error::kvm("querying CPUID"))?;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        cpuid::set_identity(&mut cpuid, identity, tsc_deadline);
        fd.set_cpuid2(&cpuid).map_err(Error::kvm("setting CPUID"))?;
        set_firmware_msrs(&fd)?;
        if id == 0 {
            let mut sregs = fd.get_sregs().map_err(Error::kvm("reading registers"))?;
            start.set_sregs(&mut sregs);
            fd.set_sregs(&sregs).map_err(Error::kvm("setting registers"))?;
            fd.set_regs(&start.regs()).map_err(Error::kvm("setting registers"))?;
        }
        Ok(Self { id, fd })
    }

    /// Its file, while it exists.
    pub fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Its number, from 0.
    pub fn id(&self) -> u8 {
        self.id
    }

    /// Runs the guest until it exits, and handles the exit. Returns the reason if the machine must
    /// stop.
    ///
    /// # Errors
    /// The guest could not be run, or a signal came.
    pub fn enter(
        &mut self,
        exits: &Exits,
        memory: &MachineMemory,
    ) -> std::result::Result<ControlFlow<StopReason>, kvm_ioctls::Error> {
        let run: *const kvm_run = self.fd.get_kvm_run();
        let next = match self.fd.run()? {
            exit @ (VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => {
                // SAFETY: `run` is the page that `self.fd` keeps mapped. KVM filled in `io`, the
                // member of the union for these exits, and writes it again only when the vCPU
                // runs. The data that `exit` borrows is behind it in the page.
                let item = unsafe { (&raw const (*run).__bindgen_anon_1.io.size).read() };
                dispatch(exits, exit, item)
            }
            exit => dispatch(exits, exit, 1),
        };
        Ok(ControlFlow::Break(match next {
            Next::Enter => return Ok(ControlFlow::Continue(())),
            Next::TripleFault => {
                let rip = self.rip().filter(|rip| *rip != RIP_AFTER_RESET);
                StopReason::Reset(ResetCause::TripleFault { vcpu: self.id, rip })
            }
            Next::InternalError => StopReason::Stuck(self.describe_internal_error(memory)),
            Next::FailedEntry(reason) => StopReason::Stuck(format!(
                "vCPU {}: the processor refuses to enter the guest (reason {reason:#x})",
                self.id
            )),
            Next::Unexpected => StopReason::Stuck(format!(
                "vCPU {}: unexpected exit of KVM, reason {}",
                self.id,
                self.fd.get_kvm_run().exit_reason
            )),
        }))
    }

    fn rip(&self) -> Option<u64> {
        self.fd.get_regs().ok().map(|regs| regs.rip)
    }

    /// What KVM could not do, at which instruction, and what may help.
    fn describe_internal_error(&mut self, memory: &MachineMemory) -> String {
        // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which `internal` is the member
        // of the union that KVM filled in; it is plain integers.
        let suberror = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
        let rip = self.rip().unwrap_or(0);
        let Some(instruction) = self.instruction_at(rip, memory) else {
            return format!(
                "vCPU {}: the guest went to RIP {rip:#x}, where its memory cannot be read (KVM \
                 internal error, suberror {suberror})",
                self.id
            );
        };
        if suberror == INTERNAL_ERROR_EMULATION {
            format!(
                "vCPU {}: this KVM cannot run the guest's instruction at RIP {rip:#x} \
                 (bytes {instruction}); a KVM without VT-x or SVM emulates the guest's ring 0 and \
                 knows few instructions there: no int n, CMPXCHG16B, XSAVE, BMI, SSE or AVX",
                self.id
            )
        } else {
            format!(
                "vCPU {}: KVM internal error, suberror {suberror}, at RIP {rip:#x} (bytes \
                 {instruction})",
                self.id
            )
        }
    }

    /// The bytes at `rip`, as far as readable; none if the first is not.
    fn instruction_at(&self, rip: u64, memory: &MachineMemory) -> Option<String> {
        let base = self.fd.get_sregs().map_or(0, |sregs| sregs.cs.base);
        let linear = base.wrapping_add(rip);
        let mut bytes = Vec::with_capacity(MAX_INSTRUCTION);
        for offset in 0..MAX_INSTRUCTION as u64 {
            let Ok(translation) = self.fd.translate_gva(linear.wrapping_add(offset)) else { break };
            if translation.valid == 0 {
                break;
            }
            let Ok(byte) = memory.map().read_obj::<u8>(GuestAddress(translation.physical_address))
            else {
                break;
            };
            bytes.push(format!("{byte:02x}"));
        }
        (!bytes.is_empty()).then(|| bytes.join(" "))
    }
}

/// Sets the registers that firmware would. Those that this KVM lacks are skipped.
fn set_firmware_msrs(fd: &VcpuFd) -> Result<()> {
    for msr in FIRMWARE_MSRS {
        let msrs = Msrs::from_entries(&[msr]).map_err(|error| {
            // One entry is never too many.
            Error::KvmLacks(format!("model-specific registers: {error:?}"))
        })?;
        let set = fd.set_msrs(&msrs).map_err(Error::kvm("setting model-specific registers"))?;
        if set == 0 {
            log::debug!("KVM refuses to set model-specific register {:#x}", msr.index);
        }
    }
    Ok(())
}
