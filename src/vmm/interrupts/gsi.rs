// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! KVM's interrupt routing: the destination of each global system interrupt (GSI).

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use kvm_bindings::{
    kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi,
    kvm_irq_routing_msi__bindgen_ty_1, KvmIrqRouting, KVM_IRQ_ROUTING_MSI, KVM_MAX_IRQ_ROUTES,
    KVM_MSI_VALID_DEVID,
};
use kvm_ioctls::VmFd;

use crate::arch::layout::PINS;
use twostage::viommu::routes::{MsiRouting, Route, RouteId};

/// The routing of one machine. GSIs below [`PINS`] are those of the interrupt controllers' pins;
/// the others are messages.
pub(crate) struct KvmRouting {
    pub vm: Arc<VmFd>,
    /// Pins of in-kernel interrupt controllers.
    pub pins: Vec<kvm_irq_routing_entry>,
}

impl KvmRouting {
    /// The GSIs for messages.
    pub fn message_gsis(&self) -> Range<u32> {
        PINS..KVM_MAX_IRQ_ROUTES as u32 - self.pins.len() as u32
    }
}

impl MsiRouting for KvmRouting {
    fn set(&self, table: &BTreeMap<RouteId, Route>) -> io::Result<()> {
        set_routing(&self.vm, &self.pins, table)
    }
}

/// Replaces the whole routing of `vm` by `pins` and `messages`.
///
/// # Errors
/// As [`MsiRouting::set`].
pub(crate) fn set_routing(
    vm: &VmFd,
    pins: &[kvm_irq_routing_entry],
    messages: &BTreeMap<RouteId, Route>,
) -> io::Result<()> {
    let routing = KvmIrqRouting::from_entries(&entries(pins, messages))
        .map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    Ok(vm.set_gsi_routing(&routing)?)
}

fn entries(
    pins: &[kvm_irq_routing_entry],
    messages: &BTreeMap<RouteId, Route>,
) -> Vec<kvm_irq_routing_entry> {
    let messages = messages.iter().map(|(gsi, route)| message_route(*gsi, *route));
    pins.iter().copied().chain(messages).collect()
}

fn message_route(RouteId(gsi): RouteId, route: Route) -> kvm_irq_routing_entry {
    let Route { source, message } = route;
    let msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        __bindgen_anon_1: kvm_irq_routing_msi__bindgen_ty_1 { devid: source.raw().into() },
    };
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        // Ignored without interrupt translation.
        flags: KVM_MSI_VALID_DEVID,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..kvm_irq_routing_entry::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use twostage::spec::pci::Bdf;
    use twostage::viommu::MsiMessage;

    #[test]
    fn pins_keep_their_routes() {
        let pin = kvm_irq_routing_entry { gsi: 4, ..kvm_irq_routing_entry::default() };
        let message = MsiMessage { address: 0x1_fee0_0000, data: 0x41 };
        let route = Route { source: Bdf::from_raw(8), message };
        let entries = entries(&[pin], &BTreeMap::from([(RouteId(PINS), route)]));
        let seen: Vec<_> = entries.iter().map(|entry| (entry.gsi, entry.type_)).collect();
        assert_eq!(seen, [(4, 0), (PINS, KVM_IRQ_ROUTING_MSI)]);
    }
}
