// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests of `ioctl` besides those of the library's hosts: KVM's, VFIO's, and those of taps,
//! disks and terminals.
//!
//! Source: Linux `include/uapi/linux/kvm.h`, `vfio.h`, `if_tun.h`, `fs.h`.

use std::mem::size_of;

use kvm_bindings::*;
use twostage::jail::Ioctl;
use vfio_bindings::bindings::vfio::{VFIO_BASE, VFIO_TYPE};
use vmm_sys_util::ioctl::{ioctl_expr, _IOC_NONE, _IOC_READ, _IOC_WRITE};

const BOTH: u32 = _IOC_READ | _IOC_WRITE;

/// A request of KVM with an argument of `size` bytes.
const fn kvm(name: &'static str, direction: u32, number: u32, size: usize) -> Ioctl {
    // Sizes have 14 bits, requests 32.
    Ioctl { name, request: ioctl_expr(direction, KVMIO, number, size as u32) as u32 }
}

const fn kvm_io(name: &'static str, number: u32) -> Ioctl {
    kvm(name, _IOC_NONE, number, 0)
}

/// A request of VFIO.
const fn vfio(name: &'static str, number: u32) -> Ioctl {
    let request = ioctl_expr(_IOC_NONE, VFIO_TYPE as u32, VFIO_BASE + number, 0);
    Ioctl { name, request: request as u32 }
}

macro_rules! of_others {
    ($($name:ident)*) => { &[$(Ioctl { name: stringify!($name), request: libc::$name as u32 }),*] };
}

const RUN: Ioctl = kvm_io("KVM_RUN", 0x80);
const SET_USER_MEMORY_REGION: Ioctl =
    kvm("KVM_SET_USER_MEMORY_REGION", _IOC_WRITE, 0x46, size_of::<kvm_userspace_memory_region>());
const REGISTER_COALESCED_MMIO: Ioctl =
    kvm("KVM_REGISTER_COALESCED_MMIO", _IOC_WRITE, 0x67, size_of::<kvm_coalesced_mmio_zone>());
const UNREGISTER_COALESCED_MMIO: Ioctl =
    kvm("KVM_UNREGISTER_COALESCED_MMIO", _IOC_WRITE, 0x68, size_of::<kvm_coalesced_mmio_zone>());
const IRQ_LINE: Ioctl = kvm("KVM_IRQ_LINE", _IOC_WRITE, 0x61, size_of::<kvm_irq_level>());
const SET_GSI_ROUTING: Ioctl =
    kvm("KVM_SET_GSI_ROUTING", _IOC_WRITE, 0x6a, size_of::<kvm_irq_routing>());
const IRQFD: Ioctl = kvm("KVM_IRQFD", _IOC_WRITE, 0x76, size_of::<kvm_irqfd>());
const IOEVENTFD: Ioctl = kvm("KVM_IOEVENTFD", _IOC_WRITE, 0x79, size_of::<kvm_ioeventfd>());
const SIGNAL_MSI: Ioctl = kvm("KVM_SIGNAL_MSI", _IOC_WRITE, 0xa5, size_of::<kvm_msi>());
const CHECK_EXTENSION: Ioctl = kvm_io("KVM_CHECK_EXTENSION", 0x03);
const ENABLE_CAP: Ioctl = kvm("KVM_ENABLE_CAP", _IOC_WRITE, 0xa3, size_of::<kvm_enable_cap>());

const SET_IRQS: Ioctl = vfio("VFIO_DEVICE_SET_IRQS", 10);
const RESET: Ioctl = vfio("VFIO_DEVICE_RESET", 11);

/// Runs the guest, and says where it is when it cannot go on.
#[cfg(target_arch = "x86_64")]
pub(super) const RUNNING: &[Ioctl] = &[
    RUN,
    kvm("KVM_GET_REGS", _IOC_READ, 0x81, size_of::<kvm_regs>()),
    kvm("KVM_GET_SREGS", _IOC_READ, 0x83, size_of::<kvm_sregs>()),
    kvm("KVM_TRANSLATE", BOTH, 0x85, size_of::<kvm_translation>()),
];
/// Runs the guest, and says where it is when it cannot go on.
#[cfg(target_arch = "aarch64")]
pub(super) const RUNNING: &[Ioctl] = &[RUN, GET_ONE_REG];

/// Interrupts for the guest.
pub(super) const INTERRUPTS: &[Ioctl] = &[SIGNAL_MSI, IRQ_LINE];

/// Where interrupts of devices go: by their vectors, and by the tables of virtual IOMMUs.
pub(super) const ROUTING: &[Ioctl] = &[IRQFD, SET_GSI_ROUTING];

/// What a guest sets up: notifications.
pub(super) const WIRING: &[Ioctl] = &[IOEVENTFD];

/// Where memory of devices is, and pages of registers that are taken back.
pub(super) const MEMORY: &[Ioctl] = &[SET_USER_MEMORY_REGION];

/// Interrupts of assigned devices, and their reset.
pub(super) const ASSIGNED: &[Ioctl] = &[SET_IRQS, RESET];

/// Lends pages of registers to the guest.
pub(super) const LENDING: &[Ioctl] =
    &[SET_USER_MEMORY_REGION, REGISTER_COALESCED_MMIO, UNREGISTER_COALESCED_MMIO];

/// Tells a tap what its guest accepts.
pub(super) const TAP: &[Ioctl] = of_others!(TUNSETOFFLOAD);

/// Changes a terminal, and leaves it as it was.
pub(super) const TERMINAL: &[Ioctl] = of_others!(TCGETS TCGETS2 TCSETS TCSETS2 TIOCGPGRP);

/// Opens disks and taps.
pub(super) const FILES: &[Ioctl] = &[
    Ioctl { name: "BLKROGET", request: 0x125e },
    Ioctl { name: "BLKSSZGET", request: libc::BLKSSZGET as u32 },
    Ioctl { name: "SIOCGIFINDEX", request: libc::SIOCGIFINDEX as u32 },
    Ioctl { name: "TUNSETIFF", request: libc::TUNSETIFF as u32 },
    Ioctl { name: "TUNGETIFF", request: libc::TUNGETIFF as u32 },
    Ioctl { name: "TUNSETVNETHDRSZ", request: libc::TUNSETVNETHDRSZ as u32 },
    // What the frames of one that was handed over look like.
    Ioctl { name: "TUNGETFILTER", request: libc::TUNGETFILTER as u32 },
    Ioctl { name: "TUNATTACHFILTER", request: libc::TUNATTACHFILTER as u32 },
    Ioctl { name: "TUNDETACHFILTER", request: libc::TUNDETACHFILTER as u32 },
    vfio("VFIO_DEVICE_GET_INFO", 7),
    vfio("VFIO_DEVICE_GET_REGION_INFO", 8),
    vfio("VFIO_DEVICE_GET_IRQ_INFO", 9),
];

/// Makes a machine.
#[cfg(target_arch = "x86_64")]
pub(super) const MACHINE: &[Ioctl] = &[
    kvm_io("KVM_GET_API_VERSION", 0x00),
    kvm_io("KVM_CREATE_VM", 0x01),
    CHECK_EXTENSION,
    kvm_io("KVM_GET_VCPU_MMAP_SIZE", 0x04),
    kvm("KVM_GET_SUPPORTED_CPUID", BOTH, 0x05, size_of::<kvm_cpuid2>()),
    kvm_io("KVM_CREATE_VCPU", 0x41),
    kvm_io("KVM_SET_TSS_ADDR", 0x47),
    kvm_io("KVM_CREATE_IRQCHIP", 0x60),
    kvm("KVM_SET_IRQCHIP", _IOC_READ, 0x63, size_of::<kvm_irqchip>()),
    kvm("KVM_CREATE_PIT2", _IOC_WRITE, 0x77, size_of::<kvm_pit_config>()),
    kvm("KVM_SET_REGS", _IOC_WRITE, 0x82, size_of::<kvm_regs>()),
    kvm("KVM_SET_SREGS", _IOC_WRITE, 0x84, size_of::<kvm_sregs>()),
    kvm("KVM_SET_MSRS", _IOC_WRITE, 0x89, size_of::<kvm_msrs>()),
    kvm("KVM_SET_CPUID2", _IOC_WRITE, 0x90, size_of::<kvm_cpuid2>()),
    ENABLE_CAP,
];
/// Makes a machine.
#[cfg(target_arch = "aarch64")]
pub(super) const MACHINE: &[Ioctl] = &[
    kvm_io("KVM_GET_API_VERSION", 0x00),
    kvm_io("KVM_CREATE_VM", 0x01),
    CHECK_EXTENSION,
    kvm_io("KVM_GET_VCPU_MMAP_SIZE", 0x04),
    kvm_io("KVM_CREATE_VCPU", 0x41),
    kvm("KVM_ARM_VCPU_INIT", _IOC_WRITE, 0xae, size_of::<kvm_vcpu_init>()),
    kvm("KVM_ARM_PREFERRED_TARGET", _IOC_READ, 0xaf, size_of::<kvm_vcpu_init>()),
    kvm("KVM_SET_ONE_REG", _IOC_WRITE, 0xac, size_of::<kvm_one_reg>()),
    GET_ONE_REG,
    kvm("KVM_CREATE_DEVICE", BOTH, 0xe0, size_of::<kvm_create_device>()),
    kvm("KVM_SET_DEVICE_ATTR", _IOC_WRITE, 0xe1, size_of::<kvm_device_attr>()),
    kvm("KVM_GET_DEVICE_ATTR", _IOC_WRITE, 0xe2, size_of::<kvm_device_attr>()),
    kvm("KVM_HAS_DEVICE_ATTR", _IOC_WRITE, 0xe3, size_of::<kvm_device_attr>()),
    ENABLE_CAP,
];

#[cfg(target_arch = "aarch64")]
const GET_ONE_REG: Ioctl = kvm("KVM_GET_ONE_REG", _IOC_WRITE, 0xab, size_of::<kvm_one_reg>());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_the_kernels() {
        assert_eq!(RUN.request, 0xae80);
        assert_eq!(SET_USER_MEMORY_REGION.request, 0x4020_ae46);
        assert_eq!(REGISTER_COALESCED_MMIO.request, 0x4010_ae67);
        assert_eq!(UNREGISTER_COALESCED_MMIO.request, 0x4010_ae68);
        assert_eq!(IRQ_LINE.request, 0x4008_ae61);
        assert_eq!(SET_GSI_ROUTING.request, 0x4008_ae6a);
        assert_eq!(IRQFD.request, 0x4020_ae76);
        assert_eq!(IOEVENTFD.request, 0x4040_ae79);
        assert_eq!(SIGNAL_MSI.request, 0x4020_aea5);
        assert_eq!((SET_IRQS.request, RESET.request), (0x3b6e, 0x3b6f));
        assert_eq!(TAP[0].request, 0x4004_54d0);
    }
}
