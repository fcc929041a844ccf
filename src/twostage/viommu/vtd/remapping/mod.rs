// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupt remapping (§5.1) in operation: the interrupt entry cache (§6.2.5), and the interrupts
//! sent through it.
//!
//! An interrupt is looked up and delivered under one lock, which an invalidation takes too: when
//! that is complete, no interrupt by the old entry is on its way.

pub(super) mod entries;

use crate::sync::Mutex;
use std::collections::HashMap;
use std::sync::{MutexGuard, Weak};

use crate::spec::pci::Bdf;
use crate::spec::vtd::interrupt::Irte;
use crate::spec::vtd::qi::InterruptEntryScope;
use crate::viommu::observer::FaultOutcome;
use crate::viommu::vtd::remapping::entries::{
    decide, is_interrupt_request, is_valid, read_entry, InterruptFault, Setup,
};
use crate::viommu::vtd::state::Registers;
use crate::viommu::vtd::VtdIommu;
use crate::viommu::{InterruptListener, InterruptRemapper, InterruptSink, MsiMessage, TableMemory};

/// Interrupt remapping of a unit. Its lock is taken after that of the registers, and before that of
/// the fault log.
#[derive(Default)]
pub(in crate::viommu::vtd) struct Remapping {
    entries: Mutex<Entries>,
    listeners: Mutex<Vec<Weak<dyn InterruptListener>>>,
}

#[derive(Default)]
struct Entries {
    /// The guest's setup, while remapping is enabled.
    setup: Option<Setup>,
    /// Cached entries, at most one for each index of the table.
    cache: HashMap<u16, Irte>,
}

/// Why a message is not delivered.
enum Refusal {
    /// It is not an interrupt request.
    NoInterrupt,
    Fault(InterruptFault),
}

impl Entries {
    /// The message as the LAPICs receive it. `keep_all`: invalid entries are cached, too.
    fn look_up(
        &mut self,
        memory: &dyn TableMemory,
        keep_all: bool,
        source: Bdf,
        message: MsiMessage,
    ) -> Result<MsiMessage, Refusal> {
        let Some(setup) = self.setup else { return Ok(message) };
        if !is_interrupt_request(message.address) {
            return Err(Refusal::NoInterrupt);
        }
        let cache = &mut self.cache;
        decide(setup, source, message, |index| {
            if let Some(irte) = cache.get(&index) {
                return Ok(*irte);
            }
            let irte = read_entry(memory, setup.table, index)?;
            if keep_all || is_valid(irte, setup.table.eime()) {
                cache.insert(index, irte);
            }
            Ok(irte)
        })
        .map_err(Refusal::Fault)
    }

    fn invalidate(&mut self, scope: InterruptEntryScope) {
        match scope {
            InterruptEntryScope::Global => self.cache.clear(),
            InterruptEntryScope::Index { index, mask } => {
                let same = |other: u16| u32::from(index ^ other).checked_shr(mask.into());
                self.cache.retain(|other, _| same(*other).unwrap_or(0) != 0);
            }
        }
    }
}

impl Remapping {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock()
    }

    fn listeners(&self) -> MutexGuard<'_, Vec<Weak<dyn InterruptListener>>> {
        self.listeners.lock()
    }

    /// Notifies the listeners that still exist.
    fn tell(&self) {
        let listeners: Vec<_> = self.listeners().iter().filter_map(Weak::upgrade).collect();
        for listener in listeners {
            listener.interrupts_changed();
        }
    }
}

impl VtdIommu {
    /// From now on `listener` is notified of changes. It must look up again what it has already.
    pub fn add_interrupt_listener(&self, listener: Weak<dyn InterruptListener>) {
        self.remapping.listeners().push(listener);
    }

    /// Latches IRTA. This also invalidates the cache (CAP.ESIRTPS).
    pub(in crate::viommu::vtd) fn set_interrupt_table_pointer(&self, registers: &mut Registers) {
        registers.interrupt_table = registers.irta;
        self.remapping.entries().cache.clear();
        registers.gsts.set_irtps(true);
        self.publish_remapping(registers);
    }

    /// Applies the interrupt remapping state of the registers before this returns.
    pub(in crate::viommu::vtd) fn publish_remapping(&self, registers: &Registers) {
        let setup =
            Setup { table: registers.interrupt_table, compatibility: registers.gsts.cfis() };
        self.remapping.entries().setup = registers.gsts.ires().then_some(setup);
        self.remapping.tell();
    }

    /// Invalidates the cached entries of `scope`.
    pub(in crate::viommu::vtd) fn invalidate_interrupt_entries(&self, scope: InterruptEntryScope) {
        self.remapping.entries().invalidate(scope);
        self.remapping.tell();
    }

    fn look_up(
        &self,
        entries: &mut Entries,
        source: Bdf,
        message: MsiMessage,
    ) -> Result<MsiMessage, Refusal> {
        entries.look_up(&*self.memory, self.caps.cap.cm(), source, message)
    }

    fn interrupt_blocked(&self, source: Bdf, message: MsiMessage, fault: InterruptFault) {
        self.counters.interrupts_blocked.count();
        let InterruptFault { reason, index, fault_disabled } = fault;
        let outcome = if reason.is_recorded(fault_disabled) {
            let recorded = self.fault_log().record_interrupt(source, index, reason);
            self.recorded(recorded)
        } else {
            self.counters.faults_suppressed.count();
            FaultOutcome::Suppressed
        };
        if let Some(observer) = &self.observer {
            observer.interrupt_fault(source, message, reason, outcome);
        }
    }
}

impl InterruptRemapper for VtdIommu {
    fn send_remapped(&self, source: Bdf, message: MsiMessage, sink: &dyn InterruptSink) -> bool {
        let mut entries = self.remapping.entries();
        match self.look_up(&mut entries, source, message) {
            Ok(MsiMessage { address, data }) => {
                if entries.setup.is_some() {
                    self.counters.interrupts_remapped.count();
                }
                sink.send_msi(address, data);
                return true;
            }
            Err(Refusal::NoInterrupt) => {
                let address = message.address;
                self.guest_error(format_args!("{source} interrupts at {address:#x}"));
            }
            Err(Refusal::Fault(fault)) => {
                // The fault event is an interrupt, too.
                drop(entries);
                self.interrupt_blocked(source, message, fault);
            }
        }
        false
    }

    fn translate(&self, source: Bdf, message: MsiMessage) -> Option<MsiMessage> {
        self.look_up(&mut self.remapping.entries(), source, message).ok()
    }
}
