// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The probe: what this machine's KVM can do, and whether Linux runs on it.

use std::fmt;

use kvm_ioctls::Cap;
use serde::Serialize;

use super::{create_vm, IrqChip};
use crate::machine::open_kvm;
use crate::Result;

/// The result.
#[derive(Debug, Clone, Serialize)]
pub struct Probe {
    /// Optional parts of KVM's interface.
    pub kvm: Interface,
    /// What KVM lacks for the interrupt controllers.
    pub lacking: Option<&'static str>,
    /// Whether Linux runs as a guest: nothing is missing.
    pub linux: bool,
}

/// Parts of KVM's interface.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Interface {
    /// Maximum number of vCPUs of one machine.
    pub max_vcpus: usize,
    /// Recommended number of vCPUs.
    pub recommended_vcpus: usize,
    /// Number of guest-physical address bits.
    pub address_bits: i32,
    /// `KVM_CAP_IRQFD`: interrupts without an exit.
    pub irqfd: bool,
    /// `KVM_CAP_IOEVENTFD`: doorbells without an exit to user space.
    pub ioeventfd: bool,
}

impl Probe {
    /// Probes this machine's KVM.
    ///
    /// # Errors
    /// There is no KVM, it lacks what every machine needs, or it refuses a small machine.
    pub fn new() -> Result<Self> {
        let kvm = open_kvm()?;
        let lacking = IrqChip::lacking(&create_vm(&kvm)?);
        let interface = Interface {
            max_vcpus: kvm.get_max_vcpus(),
            recommended_vcpus: kvm.get_nr_vcpus(),
            address_bits: kvm.get_host_ipa_limit(),
            irqfd: kvm.check_extension(Cap::Irqfd),
            ioeventfd: kvm.check_extension(Cap::Ioeventfd),
        };
        Ok(Self { kvm: interface, lacking, linux: lacking.is_none() })
    }

    /// The result in one line.
    pub fn verdict(&self) -> String {
        match self.lacking {
            None => "Linux runs on this machine's KVM".to_owned(),
            Some(name) => {
                format!("Linux does not run on this machine's KVM, which cannot create {name}")
            }
        }
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Interface { max_vcpus, recommended_vcpus, address_bits, irqfd, ioeventfd } = self.kvm;
        let yes = |there| if there { "yes" } else { "no" };
        writeln!(f, "KVM:")?;
        writeln!(
            f,
            "  vCPUs                  {max_vcpus} at most, {recommended_vcpus} recommended"
        )?;
        writeln!(f, "  guest addresses        {address_bits} bits")?;
        writeln!(f, "  irqfd                  {}", yes(irqfd))?;
        writeln!(f, "  ioeventfd              {}", yes(ioeventfd))?;
        writeln!(f, "{}", self.verdict())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lacking_is_named() {
        let kvm = Interface {
            max_vcpus: 8,
            recommended_vcpus: 2,
            address_bits: 40,
            irqfd: true,
            ioeventfd: false,
        };
        let probe = Probe { kvm, lacking: Some("a GICv3"), linux: false };
        assert!(probe.to_string().ends_with("cannot create a GICv3\n"), "{probe}");
        assert_eq!(serde_json::to_value(&probe).unwrap()["kvm"]["address_bits"], 40);
    }
}
