// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! KVM's interrupt routing: the destination of each global system interrupt (GSI).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use kvm_bindings::{
    kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi,
    kvm_irq_routing_msi__bindgen_ty_1, KvmIrqRouting, KVM_IRQ_ROUTING_MSI, KVM_MAX_IRQ_ROUTES,
    KVM_MSI_VALID_DEVID,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::errno;

use crate::arch::layout::PINS;
use crate::{Error, Result};
use twostage::spec::pci::Bdf;
use twostage::viommu::MsiMessage;
use twostage::warn_limited;

/// Sets the whole routing.
pub(crate) trait Routing: Send + Sync {
    /// Replaces the routing by `fixed` and `messages`. When this returns, the old one is no longer
    /// used.
    fn set(
        &self,
        fixed: &[kvm_irq_routing_entry],
        messages: &BTreeMap<u32, SentMessage>,
    ) -> std::result::Result<(), errno::Error>;
}

impl Routing for VmFd {
    fn set(
        &self,
        fixed: &[kvm_irq_routing_entry],
        messages: &BTreeMap<u32, SentMessage>,
    ) -> std::result::Result<(), errno::Error> {
        let messages = messages.iter().map(|(gsi, message)| message_route(*gsi, *message));
        let entries: Vec<_> = fixed.iter().copied().chain(messages).collect();
        let routing =
            KvmIrqRouting::from_entries(&entries).map_err(|_| errno::Error::new(libc::E2BIG))?;
        self.set_gsi_routing(&routing)
    }
}

/// A message and its sender, which an interrupt controller may need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SentMessage {
    pub source: Bdf,
    pub message: MsiMessage,
}

/// The routing. GSIs below [`PINS`] are those of the interrupt controllers' pins; the others are
/// messages.
pub(crate) struct GsiTable {
    routing: Arc<dyn Routing>,
    /// Pins of in-kernel interrupt controllers.
    fixed: Vec<kvm_irq_routing_entry>,
    table: Mutex<Table>,
    updates: AtomicU64,
}

#[derive(Default)]
struct Table {
    messages: BTreeMap<u32, SentMessage>,
    used: BTreeSet<u32>,
    /// Messages that KVM does not accept. It refuses a routing with one of them, so they are left
    /// out.
    refused: BTreeMap<u32, SentMessage>,
    /// KVM does not have all of it.
    stale: bool,
}

/// A GSI's new destination.
type Change = (u32, Option<SentMessage>);

impl Table {
    /// Changes `gsi`; returns the inverse change.
    fn set(&mut self, (gsi, message): Change) -> Change {
        let before = match message {
            Some(message) => self.messages.insert(gsi, message),
            None => self.messages.remove(&gsi),
        };
        (gsi, before)
    }
}

impl GsiTable {
    /// The routing of a machine, with `fixed`, which KVM has from the start.
    pub fn new(routing: Arc<dyn Routing>, fixed: Vec<kvm_irq_routing_entry>) -> Self {
        Self { routing, fixed, table: Mutex::default(), updates: AtomicU64::new(0) }
    }

    /// A GSI for messages, initially without a route. Returned with [`GsiTable::release`].
    pub fn allocate(&self) -> Result<u32> {
        let mut table = self.table();
        let last = KVM_MAX_IRQ_ROUTES as u32 - self.fixed.len() as u32;
        let free = (PINS..last).find(|gsi| !table.used.contains(gsi));
        let gsi = free.ok_or(Error::Interrupts("KVM has no more interrupt routes".into()))?;
        table.used.insert(gsi);
        Ok(gsi)
    }

    /// Returns `gsi`, without a route.
    pub fn release(&self, gsi: u32) {
        // If it fails, the route stays a little longer, which is harmless: nobody triggers it.
        let _ = self.update([(gsi, None)]);
        self.table().used.remove(&gsi);
    }

    /// Sets routes of GSIs. When this returns without an error, the old ones are no longer used.
    /// Returns the GSIs whose message KVM does not accept, which have no route.
    pub fn update(
        &self,
        changes: impl IntoIterator<Item = Change>,
    ) -> std::result::Result<BTreeSet<u32>, errno::Error> {
        let mut table = self.table();
        let (mut changed, mut left_out) = (Vec::new(), BTreeSet::new());
        for (gsi, mut message) in changes {
            if message.is_some() && table.refused.get(&gsi) == message.as_ref() {
                // It would be refused again.
                left_out.insert(gsi);
                message = None;
            } else {
                table.refused.remove(&gsi);
            }
            if table.messages.get(&gsi) != message.as_ref() {
                changed.push((gsi, message));
            }
        }
        if table.stale || !changed.is_empty() {
            self.apply(&mut table, &changed, &mut left_out)?;
        }
        Ok(left_out)
    }

    /// Applies `changes`. If KVM refuses the whole routing because of a message, bisects to find
    /// it.
    fn apply(
        &self,
        table: &mut Table,
        changes: &[Change],
        left_out: &mut BTreeSet<u32>,
    ) -> std::result::Result<(), errno::Error> {
        let before: Vec<Change> = changes.iter().map(|change| table.set(*change)).collect();
        let error = match self.install(table) {
            Err(error) if error.errno() == libc::EINVAL => error,
            result => return result,
        };
        match changes {
            [] | [(_, None)] => Err(error),
            [(gsi, Some(refused))] => {
                let address = refused.message.address;
                warn_limited!(
                    "interrupt route {gsi}: KVM does not accept a message to {address:#x}, which \
                     is left out"
                );
                table.set((*gsi, None));
                table.refused.insert(*gsi, *refused);
                left_out.insert(*gsi);
                // KVM still has the old routing.
                self.install(table)
            }
            _ => {
                for change in before.into_iter().rev() {
                    table.set(change);
                }
                let (one, other) = changes.split_at(changes.len() / 2);
                self.apply(table, one, left_out)?;
                self.apply(table, other, left_out)
            }
        }
    }

    /// Gives KVM the table.
    fn install(&self, table: &mut Table) -> std::result::Result<(), errno::Error> {
        self.updates.fetch_add(1, Ordering::Relaxed);
        let result = self.routing.set(&self.fixed, &table.messages);
        table.stale = result.is_err();
        result
    }

    /// How often KVM's routing was set.
    pub fn updates(&self) -> u64 {
        self.updates.load(Ordering::Relaxed)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock()
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
        // Ignored without interrupt translation.
        flags: KVM_MSI_VALID_DEVID,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..kvm_irq_routing_entry::default()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    /// Records each routing: (GSI, type). Like KVM, it refuses messages with an upper address that
    /// is no APIC's.
    #[derive(Default)]
    pub struct FakeRouting {
        pub calls: Mutex<Vec<Vec<(u32, u32)>>>,
        pub refuse: AtomicBool,
        /// The current messages.
        pub in_use: Mutex<BTreeMap<u32, SentMessage>>,
    }

    impl Routing for FakeRouting {
        fn set(
            &self,
            fixed: &[kvm_irq_routing_entry],
            messages: &BTreeMap<u32, SentMessage>,
        ) -> std::result::Result<(), errno::Error> {
            let pins = fixed.iter().map(|entry| (entry.gsi, entry.type_));
            let seen = pins.chain(messages.keys().map(|gsi| (*gsi, MSI))).collect();
            self.calls.lock().push(seen);
            if self.refuse.load(Ordering::SeqCst) {
                return Err(errno::Error::new(libc::ENOMEM));
            }
            if messages.values().any(|sent| sent.message.address >> 32 & 0xff != 0) {
                return Err(errno::Error::new(libc::EINVAL));
            }
            self.in_use.lock().clone_from(messages);
            Ok(())
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
        let calls = || std::mem::take(&mut *routing.calls.lock());
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
        assert_eq!((routing.calls.lock().len(), table.updates()), (2, 2));
    }

    fn to(address: u64) -> Option<SentMessage> {
        Some(SentMessage { message: MsiMessage { address, data: 0x41 }, ..ONE })
    }

    #[test]
    fn a_message_that_kvm_refuses_is_left_out_and_no_other() {
        let routing = Arc::new(FakeRouting::default());
        let table = GsiTable::new(routing.clone(), Vec::new());
        let (good, bad) = (to(0xfee0_0000), to(0x1_fee0_0000));
        let in_use = || routing.in_use.lock().keys().copied().collect::<Vec<_>>();
        table.update([(24, good), (25, good)]).unwrap();
        // The old route is removed: it is not what it was.
        assert_eq!(table.update([(24, bad)]).unwrap(), BTreeSet::from([24]));
        assert_eq!(in_use(), [25]);
        // Setting it again costs nothing.
        let updates = table.updates();
        assert_eq!(table.update([(24, bad), (25, good)]).unwrap(), BTreeSet::from([24]));
        assert_eq!(table.updates(), updates);
        let changes = (24..40).map(|gsi| (gsi, if gsi % 5 == 0 { bad } else { good }));
        let refused = BTreeSet::from([25, 30, 35]);
        assert_eq!(table.update(changes.clone()).unwrap(), refused);
        assert_eq!(in_use(), (24..40).filter(|gsi| gsi % 5 != 0).collect::<Vec<_>>());
        assert_eq!(table.update(changes).unwrap(), refused);
        // Valid from now on.
        assert_eq!(table.update([(25, good)]).unwrap(), BTreeSet::new());
        assert!(in_use().contains(&25));
        table.release(25);
        assert!(!in_use().contains(&25));
    }

    #[test]
    fn pins_keep_their_routes() {
        let routing = Arc::new(FakeRouting::default());
        let fixed = vec![kvm_irq_routing_entry { gsi: 4, ..kvm_irq_routing_entry::default() }];
        let table = GsiTable::new(routing.clone(), fixed);
        table.update([(PINS, Some(ONE))]).unwrap();
        assert_eq!(routing.calls.lock()[0], [(4, 0), (PINS, MSI)]);
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
