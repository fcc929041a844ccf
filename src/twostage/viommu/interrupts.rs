// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Message-signalled interrupts: of a virtual IOMMU itself, and of devices, which it remaps.

use crate::spec::pci::Bdf;

/// A message-signalled interrupt.
///
/// One that is not remapped any more carries bits 31:8 of its destination, a 32-bit APIC ID, in
/// bits 63:40 of the address, and bits 7:0 where they always were.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    /// Where it is written.
    pub address: u64,
    /// What is written.
    pub data: u32,
}

/// Where interrupts go that are not, or no longer, to be remapped: to the LAPICs.
pub trait InterruptSink: Send + Sync {
    /// Writes `data` to `address` (0xFEEx_xxxx on x86).
    fn send_msi(&self, address: u64, data: u32);
}

/// What a virtual IOMMU does to the interrupts of the functions behind it. Any thread may call it,
/// an [`InterruptListener`] too.
pub trait InterruptRemapper: Send + Sync {
    /// `source` sends `message`: `sink` gets what it becomes. `false` when it is blocked; the fault
    /// is then recorded. No change is complete while an interrupt of before is on its way to
    /// `sink`, which therefore must not wait for anybody.
    fn send_remapped(&self, source: Bdf, message: MsiMessage, sink: &dyn InterruptSink) -> bool;

    /// What would become of a `message` that `source` will send: for whoever sends it past the
    /// virtual IOMMU, until [`InterruptListener::interrupts_changed`]; `None` when it would be
    /// blocked, or nobody would be told of a change: then each is to be sent by itself. No fault is
    /// recorded for what was not sent.
    fn translate(&self, source: Bdf, message: MsiMessage) -> Option<MsiMessage>;
}

/// Whoever keeps what [`InterruptRemapper::translate`] said.
pub trait InterruptListener: Send + Sync {
    /// Every translation may be another now. The guest is not told that its change is complete
    /// before this returns: then nothing of the old translations may be in use. Called with locks
    /// of the virtual IOMMU held: of it, only its [`InterruptRemapper`] may be called.
    fn interrupts_changed(&self);
}
