// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! KVM's interrupt routing: what each global system interrupt (GSI) leads to.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi,
    kvm_irq_routing_msi__bindgen_ty_1, KvmIrqRouting, KVM_IRQ_ROUTING_MSI, KVM_MAX_IRQ_ROUTES,
    KVM_MSI_VALID_DEVID,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::errno;

use crate::spec::pci::Bdf;
use crate::viommu::MsiMessage;
use crate::vmm::arch::layout::PINS;
use crate::vmm::{Error, Result};

/// Takes the whole routing.
pub(in crate::vmm) trait Routing: Send + Sync {
    /// Replaces what was there. When this returns, nothing uses it any more.
    fn set(&self, entries: &[kvm_irq_routing_entry]) -> std::result::Result<(), errno::Error>;
}

impl Routing for VmFd {
    fn set(&self, entries: &[kvm_irq_routing_entry]) -> std::result::Result<(), errno::Error> {
        let routing =
            KvmIrqRouting::from_entries(entries).map_err(|_| errno::Error::new(libc::E2BIG))?;
        self.set_gsi_routing(&routing)
    }
}

/// A message, and who sends it: an interrupt controller may want to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::vmm) struct SentMessage {
    pub source: Bdf,
    pub message: MsiMessage,
}

/// The routing. GSIs below [`PINS`] are those of the interrupt controllers' pins; the others lead to
/// messages.
pub(in crate::vmm) struct GsiTable {
    routing: Arc<dyn Routing>,
    /// Pins of interrupt controllers in the kernel.
    fixed: Vec<kvm_irq_routing_entry>,
    table: Mutex<Table>,
    updates: AtomicU64,
}

#[derive(Default)]
struct Table {
    messages: BTreeMap<u32, SentMessage>,
    used: BTreeSet<u32>,
    /// KVM refused the last change.
    refused: bool,
}

impl GsiTable {
    /// The routing of a machine, `fixed` of it, which KVM has from the start.
    pub fn new(routing: Arc<dyn Routing>, fixed: Vec<kvm_irq_routing_entry>) -> Self {
        Self { routing, fixed, table: Mutex::default(), updates: AtomicU64::new(0) }
    }

    /// A GSI for messages, leading nowhere. Given back with [`GsiTable::release`].
    pub fn allocate(&self) -> Result<u32> {
        let mut table = self.table();
        let last = KVM_MAX_IRQ_ROUTES as u32 - self.fixed.len() as u32;
        let free = (PINS..last).find(|gsi| !table.used.contains(gsi));
        let gsi = free.ok_or(Error::Interrupts("KVM has no more interrupt routes".into()))?;
        table.used.insert(gsi);
        Ok(gsi)
    }

    /// Gives `gsi` back; it leads nowhere again.
    pub fn release(&self, gsi: u32) {
        // That it leads somewhere a little longer harms nobody: nobody triggers it.
        let _ = self.update([(gsi, None)]);
        self.table().used.remove(&gsi);
    }

    /// Leads GSIs to messages, or nowhere. When this returns without an error, nothing of before is
    /// in use.
    pub fn update(
        &self,
        changes: impl IntoIterator<Item = (u32, Option<SentMessage>)>,
    ) -> std::result::Result<(), errno::Error> {
        let mut table = self.table();
        let mut changed = table.refused;
        for (gsi, message) in changes {
            let before = match message {
                Some(message) => table.messages.insert(gsi, message),
                None => table.messages.remove(&gsi),
            };
            changed |= before != message;
        }
        if !changed {
            return Ok(());
        }
        let messages = table.messages.iter().map(|(gsi, message)| message_route(*gsi, *message));
        let entries: Vec<_> = self.fixed.iter().copied().chain(messages).collect();
        self.updates.fetch_add(1, Ordering::Relaxed);
        let result = self.routing.set(&entries);
        table.refused = result.is_err();
        result
    }

    /// How often KVM was given a routing.
    pub fn updates(&self) -> u64 {
        self.updates.load(Ordering::Relaxed)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for GsiTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(&self.table().messages).finish()
    }
}

fn message_route(gsi: u32, sent: SentMessage) -> kvm_irq_routing_entry {
    let SentMessage { source, message } = sent;
    let msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        __bindgen_anon_1: kvm_irq_routing_msi__bindgen_ty_1 { devid: source.raw().into() },
    };
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        // Without interrupt translation nobody asks who it was.
        flags: KVM_MSI_VALID_DEVID,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..kvm_irq_routing_entry::default()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    /// Remembers each routing: (GSI, type).
    #[derive(Default)]
    pub struct FakeRouting {
        pub calls: Mutex<Vec<Vec<(u32, u32)>>>,
        pub refuse: AtomicBool,
    }

    impl Routing for FakeRouting {
        fn set(&self, entries: &[kvm_irq_routing_entry]) -> std::result::Result<(), errno::Error> {
            let entries = entries.iter().map(|entry| (entry.gsi, entry.type_)).collect();
            self.calls.lock().unwrap().push(entries);
            match self.refuse.load(Ordering::SeqCst) {
                true => Err(errno::Error::new(libc::EINVAL)),
                false => Ok(()),
            }
        }
    }

    const ONE: SentMessage = SentMessage {
        source: Bdf::from_raw(8),
        message: MsiMessage { address: 0xfee0_0000, data: 0x41 },
    };
    const MSI: u32 = KVM_IRQ_ROUTING_MSI;

    #[test]
    fn several_changes_are_one_call_and_none_is_none() {
        let routing = Arc::new(FakeRouting::default());
        let table = GsiTable::new(routing.clone(), Vec::new());
        let calls = || std::mem::take(&mut *routing.calls.lock().unwrap());
        table.update([(24, None)]).unwrap();
        assert!(calls().is_empty());
        table.update([(30, Some(ONE)), (2, Some(ONE))]).unwrap();
        assert_eq!(calls(), [[(2, MSI), (30, MSI)]]);
        table.update([(30, Some(ONE)), (2, Some(ONE))]).unwrap();
        assert!(calls().is_empty());
        table.update([(2, Some(SentMessage { source: Bdf::from_raw(16), ..ONE }))]).unwrap();
        table.update([(2, None)]).unwrap();
        assert_eq!(calls(), [vec![(2, MSI), (30, MSI)], vec![(30, MSI)]]);
    }

    #[test]
    fn a_change_that_was_refused_is_tried_again() {
        let routing = Arc::new(FakeRouting::default());
        let table = GsiTable::new(routing.clone(), Vec::new());
        routing.refuse.store(true, Ordering::SeqCst);
        assert!(table.update([(24, Some(ONE))]).is_err());
        routing.refuse.store(false, Ordering::SeqCst);
        table.update([(24, Some(ONE))]).unwrap();
        table.update([(24, Some(ONE))]).unwrap();
        assert_eq!((routing.calls.lock().unwrap().len(), table.updates()), (2, 2));
    }

    #[test]
    fn pins_keep_their_routes() {
        let routing = Arc::new(FakeRouting::default());
        let fixed = vec![kvm_irq_routing_entry { gsi: 4, ..kvm_irq_routing_entry::default() }];
        let table = GsiTable::new(routing.clone(), fixed);
        table.update([(PINS, Some(ONE))]).unwrap();
        assert_eq!(routing.calls.lock().unwrap()[0], [(4, 0), (PINS, MSI)]);
    }

    #[test]
    fn gsis_are_allocated_above_the_pins_and_given_back() {
        let table = GsiTable::new(Arc::new(FakeRouting::default()), Vec::new());
        let next = || table.allocate().unwrap() - PINS;
        assert_eq!((next(), next()), (0, 1));
        table.release(PINS);
        assert_eq!((next(), next()), (0, 2));
        while table.allocate().is_ok() {}
        table.release(1000);
        assert_eq!(table.allocate().unwrap(), 1000);
    }
}
