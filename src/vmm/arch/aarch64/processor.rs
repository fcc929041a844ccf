// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An arm64 machine's vCPUs: setup and exits.

use std::mem::offset_of;
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, RawFd};

use kvm_bindings::{
    kvm_regs, kvm_vcpu_init, user_pt_regs, KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2,
    KVM_REG_ARM64, KVM_REG_ARM_CORE, KVM_REG_SIZE_U64,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use super::boot::StartState;
use super::IrqChip;
use crate::arch::exits::{ExitKind, Exits};
use crate::config::MachineConfig;
use crate::memory::MachineMemory;
use crate::process::stop::StopReason;
use crate::{Error, Result};

/// Register offsets in KVM's structure.
const X0: usize = offset_of!(kvm_regs, regs) + offset_of!(user_pt_regs, regs);
const PC: usize = offset_of!(kvm_regs, regs) + offset_of!(user_pt_regs, pc);
const PSTATE: usize = offset_of!(kvm_regs, regs) + offset_of!(user_pt_regs, pstate);

/// PSTATE at a kernel's start: EL1 with SP_EL1, exceptions masked (D, A, I, F).
const EL1H_MASKED: u64 = 0b1111 << 6 | 0b0101;

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
    pub fn new(_kvm: &Kvm, vm: &VmFd, config: &MachineConfig, start: &StartState) -> Result<Self> {
        let all = (0..config.vcpus)
            .map(|id| Processor::new(vm, id, start))
            .collect::<Result<Vec<_>>>()?;
        // After all vCPUs, as it has registers for each.
        Ok(Self { chip: IrqChip::new(vm)?, all })
    }
}

/// One vCPU.
#[derive(Debug)]
pub(crate) struct Processor {
    id: u8,
    fd: VcpuFd,
}

impl Processor {
    /// A vCPU of `vm`. The first starts with `start`; the others wait for PSCI's CPU_ON, which the
    /// kernel serves.
    fn new(vm: &VmFd, id: u8, start: &StartState) -> Result<Self> {
        let fd = vm.create_vcpu(id.into()).map_err(Error::kvm("creating a vCPU"))?;
        let mut init = kvm_vcpu_init::default();
        vm.get_preferred_target(&mut init).map_err(Error::kvm("querying the vCPU type"))?;
        init.features[0] |= 1 << KVM_ARM_VCPU_PSCI_0_2;
        if id != 0 {
            init.features[0] |= 1 << KVM_ARM_VCPU_POWER_OFF;
        }
        fd.vcpu_init(&init).map_err(Error::kvm("setting up a vCPU"))?;
        if id == 0 {
            for (register, value) in
                [(PSTATE, EL1H_MASKED), (PC, start.pc), (X0, start.device_tree)]
            {
                fd.set_one_reg(core_register(register), &value.to_le_bytes())
                    .map_err(Error::kvm("setting registers"))?;
            }
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
        _memory: &MachineMemory,
    ) -> std::result::Result<ControlFlow<StopReason>, kvm_ioctls::Error> {
        let id = self.id;
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) if error.errno() == libc::ENOSYS => {
                return Ok(ControlFlow::Break(StopReason::Stuck(self.describe_access())));
            }
            Err(error) => return Err(error),
        };
        let stuck = |what: String| StopReason::Stuck(format!("vCPU {id}: {what}"));
        let reason = match exit {
            VcpuExit::MmioRead(address, data) => {
                exits.mmio_read(address, data);
                return Ok(ControlFlow::Continue(()));
            }
            VcpuExit::MmioWrite(address, data) => {
                exits.mmio_write(address, data);
                return Ok(ControlFlow::Continue(()));
            }
            VcpuExit::SystemEvent(event, _) => {
                exits.counters.count(ExitKind::SystemEvent);
                exits.board.system_event(event)
            }
            other => {
                exits.counters.count(ExitKind::Other);
                match other {
                    VcpuExit::Intr => return Ok(ControlFlow::Continue(())),
                    VcpuExit::FailEntry(reason, _) => stuck(format!(
                        "the processor refuses to enter the guest (reason {reason:#x})"
                    )),
                    VcpuExit::InternalError => stuck("KVM internal error".to_owned()),
                    other => stuck(format!("unexpected exit of KVM: {other:?}")),
                }
            }
        };
        Ok(ControlFlow::Break(reason))
    }

    /// An access to unbacked addresses by an instruction without syndrome information.
    fn describe_access(&self) -> String {
        let mut pc = [0; 8];
        let known = self.fd.get_one_reg(core_register(PC), &mut pc).is_ok();
        let at = known.then(|| format!(" at PC {:#x}", u64::from_le_bytes(pc)));
        format!(
            "vCPU {}: the guest's instruction{} accesses no memory, and KVM cannot emulate it as a \
             device access: a pair, a vector, or one with writeback of the base register",
            self.id,
            at.unwrap_or_default()
        )
    }
}

/// KVM's ID of the 64-bit register at `offset` of its structure.
fn core_register(offset: usize) -> u64 {
    // In units of 32 bits, of which the structure has a few hundred.
    let index = (offset / size_of::<u32>()) as u64;
    KVM_REG_ARM64 | KVM_REG_SIZE_U64 | u64::from(KVM_REG_ARM_CORE) | index
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_have_the_numbers_of_kvms_documentation() {
        assert_eq!(core_register(X0), 0x6030_0000_0010_0000);
        assert_eq!(core_register(PC), 0x6030_0000_0010_0040);
        assert_eq!(core_register(PSTATE), 0x6030_0000_0010_0042);
    }
}
