// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Message-signalled interrupts: of a virtual IOMMU itself, and of devices, which it remaps.

use crate::spec::pci::Bdf;

/// A message-signalled interrupt.
///
/// After remapping, bits 63:40 of the address hold bits 31:8 of the destination, a 32-bit APIC ID;
/// bits 7:0 are in their usual place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    /// The address written to.
    pub address: u64,
    /// The data written.
    pub data: u32,
}

/// The sink of interrupts that need no (further) remapping: the LAPICs.
pub trait InterruptSink: Send + Sync {
    /// Writes `data` to `address` (0xFEEx_xxxx on x86).
    fn send_msi(&self, address: u64, data: u32);
}

/// How a virtual IOMMU handles the interrupts of the functions behind it. May be called from any
/// thread, also by an [`InterruptListener`].
pub trait InterruptRemapper: Send + Sync {
    /// `source` sends `message`: `sink` receives the remapped message. Returns `false` when it is
    /// blocked; the fault has then been recorded. A change completes only after interrupts under
    /// the old state have been delivered to `sink`, which therefore must not block.
    fn send_remapped(&self, source: Bdf, message: MsiMessage, sink: &dyn InterruptSink) -> bool;

    /// The translation of a `message` that `source` will send, for senders that bypass the virtual
    /// IOMMU; valid until [`InterruptListener::interrupts_changed`]. `None` when it would be
    /// blocked, or when changes would not be notified: then each message must be sent through the
    /// IOMMU. Records no fault.
    fn translate(&self, source: Bdf, message: MsiMessage) -> Option<MsiMessage>;
}

/// A cache of [`InterruptRemapper::translate`] results.
pub trait InterruptListener: Send + Sync {
    /// Every translation may have changed. When this returns, no old translation may be in use:
    /// only then is the guest told that its change is complete. Called with locks of the virtual
    /// IOMMU held: only its [`InterruptRemapper`] may be called.
    fn interrupts_changed(&self);
}
