// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A PC: PIC, IOAPIC and LAPICs, I/O ports, ACPI.

pub mod acpi;
mod board;
pub mod boot;
mod config_ports;
mod cpuid;
mod exits;
pub(crate) mod firmware;
mod interrupts;
mod ioapic;
pub mod layout;
mod power;
pub mod probe;
mod processor;
mod timers;

use kvm_bindings::{kvm_enable_cap, KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL};
use kvm_ioctls::{Cap, Kvm, VmFd};
use serde_json::{json, Value};

pub(crate) use board::Board;
#[cfg(feature = "test-support")]
pub use config_ports::ConfigPorts;
pub(crate) use interrupts::{EdgeLine, IrqChip, Lines};
#[cfg(feature = "test-support")]
pub use ioapic::Ioapic;
pub(crate) use processor::{Processor, Processors};

use crate::{Error, Result};
use twostage::spec::vtd::interrupt::{
    CompatibilityAddress, MessageData, RemappableAddress, RemappableData,
};
use twostage::viommu::MsiMessage;

/// KVM capabilities that the machine requires, besides those of every architecture.
pub(crate) const KVM_CAPABILITIES: &[(Cap, &str)] =
    &[(Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"), (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID")];

/// The virtual IOMMU that its firmware can describe.
pub(crate) const IOMMU: &str = "vtd";

/// A virtual machine without memory or vCPUs.
///
/// # Errors
/// KVM cannot create one.
pub(crate) fn create_vm(kvm: &Kvm) -> Result<VmFd> {
    let vm = kvm.create_vm().map_err(Error::kvm("creating a virtual machine"))?;
    // Ignored by processors that need no such segment; KVM requires it before any vCPU.
    vm.set_tss_address(layout::KVM_TSS as usize).map_err(Error::kvm("placing its TSS"))?;
    Ok(vm)
}

/// Whether the guest's accesses to registers in memory, which it maps uncached, and those of this
/// process see each other.
pub(crate) fn memory_is_coherent(_: &VmFd) -> bool {
    // Uncached accesses snoop caches.
    true
}

/// From now on, a memory slot that `vm` loses does not take the page tables of all others with it.
/// Returns whether that is so.
pub(crate) fn keep_other_slots(vm: &VmFd) -> bool {
    let quirk = KVM_X86_QUIRK_SLOT_ZAP_ALL;
    let known = vm.check_extension_raw(KVM_CAP_DISABLE_QUIRKS2.into()) as u32;
    let mut disable = kvm_enable_cap { cap: KVM_CAP_DISABLE_QUIRKS2, ..Default::default() };
    disable.args[0] = quirk.into();
    known & quirk != 0 && vm.enable_cap(&disable).is_ok()
}

/// An interrupt's `message`, decoded for traces: in remappable format an interrupt index; otherwise
/// a vector and a destination, of 32 bits if it has been remapped.
pub(crate) fn decoded_message(message: MsiMessage) -> Value {
    let MsiMessage { address, data } = message;
    let mut value = json!({ "address": format!("{address:#x}"), "data": format!("{data:#x}") });
    // The upper half is another part of the destination.
    let compatibility = CompatibilityAddress::from_bits(address as u32);
    if compatibility.remappable() {
        let address = RemappableAddress::from_bits(address as u32);
        value["handle"] = address.handle().into();
        if address.shv() {
            value["subhandle"] = RemappableData::from_bits(data).subhandle().into();
        }
        return value;
    }
    let data = MessageData::from_bits(data);
    let high = (address >> 32) as u32 & !0xff;
    value["vector"] = data.vector().into();
    value["destination"] = (high | u32::from(compatibility.destination())).into();
    value["logical"] = compatibility.logical().into();
    value["delivery_mode"] = data.delivery_mode().into();
    value["level"] = data.level().into();
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remapped_message_has_a_vector_and_a_wide_destination() {
        let message = MsiMessage { address: 0x0001_0200_fee3_4004, data: 0xc131 };
        let value = decoded_message(message);
        assert_eq!(value["vector"], 0x31);
        assert_eq!(value["destination"], 0x0001_0234);
        assert_eq!((&value["logical"], &value["level"]), (&true.into(), &true.into()));
        assert_eq!((&value["delivery_mode"], &value["data"]), (&1.into(), &"0xc131".into()));
    }

    #[test]
    fn a_message_to_be_remapped_names_an_entry() {
        let value = decoded_message(MsiMessage { address: 0xfee0_00b8, data: 3 });
        assert_eq!((&value["handle"], &value["subhandle"]), (&5.into(), &3.into()));
        assert!(value.get("vector").is_none());
        assert!(decoded_message(MsiMessage { address: 0xfee0_00b0, data: 3 })
            .get("subhandle")
            .is_none());
    }
}
