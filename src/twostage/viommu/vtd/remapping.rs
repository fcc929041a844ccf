// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupt remapping (§5.1) in operation: the interrupt entry cache (§6.2.5), and the interrupts
//! sent through it.
//!
//! An interrupt is looked up and delivered under one lock, which an invalidation takes too: when
//! that is complete, no interrupt by the old entry is on its way.
//!
//! The outcome of one interrupt request is a pure function of the request, the guest's setup, and
//! the table entry.

use std::collections::HashMap;
use std::sync::Weak;

use super::state::{InterruptEntryState, Registers};
use super::VtdIommu;
use crate::spec::pci::Bdf;
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::interrupt::{
    CompatibilityAddress, Irte, MessageData, RemappableAddress, RemappableData, SourceValidation,
    IRTE_SIZE,
};
use crate::spec::vtd::qi::InterruptEntryScope;
use crate::spec::vtd::regs::Irta;
use crate::sync::Mutex;
use crate::viommu::{
    BadAddress, FaultOutcome, InterruptListener, InterruptRemapper, InterruptSink, MsiMessage,
    TableMemory,
};

/// Interrupt remapping of a unit. Its lock is taken after that of the registers, and before that of
/// the fault log.
#[derive(Default)]
pub(super) struct Remapping {
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
    /// The cached entries, ascending.
    pub fn cached(&self) -> Vec<InterruptEntryState> {
        let entries = self.entries.lock();
        let cached = entries.cache.iter();
        let mut cached: Vec<_> = cached
            .map(|(&index, irte)| InterruptEntryState { index, entry: irte.to_words() })
            .collect();
        cached.sort_unstable_by_key(|cached| cached.index);
        cached
    }

    /// Replaces the cached entries.
    pub fn set_cached(&self, cached: &[InterruptEntryState]) {
        let entries = cached.iter().map(|cached| (cached.index, Irte::from_words(cached.entry)));
        self.entries.lock().cache = entries.collect();
    }

    /// Whether anybody would be told of a change.
    fn is_listened_to(&self) -> bool {
        self.listeners.lock().iter().any(|listener| listener.strong_count() > 0)
    }

    /// Notifies the listeners that still exist.
    fn tell(&self) {
        let listeners: Vec<_> = self.listeners.lock().iter().filter_map(Weak::upgrade).collect();
        for listener in listeners {
            listener.interrupts_changed();
        }
    }
}

impl VtdIommu {
    /// From now on `listener` is notified of changes; and once before this returns, as whatever it
    /// has may be from before.
    pub fn add_interrupt_listener(&self, listener: Weak<dyn InterruptListener>) {
        {
            let mut listeners = self.remapping.listeners.lock();
            listeners.retain(|listener| listener.strong_count() > 0);
            listeners.push(listener.clone());
        }
        if let Some(listener) = listener.upgrade() {
            listener.interrupts_changed();
        }
    }

    /// Latches IRTA. This also invalidates the cache (CAP.ESIRTPS).
    pub(super) fn set_interrupt_table_pointer(&self, registers: &mut Registers) {
        registers.interrupt_table = registers.irta;
        self.remapping.entries.lock().cache.clear();
        registers.gsts.set_irtps(true);
        self.publish_remapping(registers);
    }

    /// Applies the interrupt remapping state of the registers before this returns.
    pub(super) fn publish_remapping(&self, registers: &Registers) {
        let setup =
            Setup { table: registers.interrupt_table, compatibility: registers.gsts.cfis() };
        self.remapping.entries.lock().setup = registers.gsts.ires().then_some(setup);
        self.remapping.tell();
    }

    /// Invalidates the cached entries of `scope`.
    pub(super) fn invalidate_interrupt_entries(&self, scope: InterruptEntryScope) {
        self.remapping.entries.lock().invalidate(scope);
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
            let recorded = self.fault_log_for_event().record_interrupt(source, index, reason);
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
        let mut entries = self.remapping.entries.lock();
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
        if !self.remapping.is_listened_to() {
            return None;
        }
        self.look_up(&mut self.remapping.entries.lock(), source, message).ok()
    }
}

/// The guest's setup of interrupt remapping, while it is enabled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Setup {
    /// The table latched by GCMD.SIRTP.
    table: Irta,
    /// GSTS.CFIS: compatibility-format interrupts pass.
    compatibility: bool,
}

/// Why an interrupt is blocked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct InterruptFault {
    reason: FaultReason,
    /// The table entry; 0 if the request names none.
    index: u16,
    /// The entry suppresses fault recording (FPD).
    fault_disabled: bool,
}

/// Whether a write to `address` is an interrupt request rather than a memory access (§3.14).
fn is_interrupt_request(address: u64) -> bool {
    address >> 32 == 0 && CompatibilityAddress::from_bits(address as u32).is_interrupt()
}

/// Reads entry `index` of the table at `table`.
fn read_entry(memory: &dyn TableMemory, table: Irta, index: u16) -> Result<Irte, BadAddress> {
    let word = |offset: u64| {
        let address = table.base().checked_add(IRTE_SIZE * u64::from(index) + offset);
        address.map_or(Err(BadAddress { address: u64::MAX, length: 8 }), |address| {
            memory.load_u64(address)
        })
    };
    // P first: when an entry is made present last, everything else is there.
    Ok(Irte::from_words([word(0)?, word(8)?]))
}

/// The outcome of the interrupt request `message` of `source`; `entry` returns table entries.
fn decide(
    setup: Setup,
    source: Bdf,
    message: MsiMessage,
    entry: impl FnOnce(u16) -> Result<Irte, BadAddress>,
) -> Result<MsiMessage, InterruptFault> {
    let fault = |reason, index| InterruptFault { reason, index, fault_disabled: false };
    let address = RemappableAddress::from_bits(message.address as u32);
    let extended = setup.table.eime();
    if !address.remappable() {
        if extended || !setup.compatibility {
            return Err(fault(FaultReason::InterruptCompatibilityBlocked, 0));
        }
        return Ok(message);
    }
    let data = RemappableData::from_bits(message.data);
    let mut index = u32::from(address.handle());
    if address.shv() {
        if data.reserved() != 0 {
            return Err(fault(FaultReason::InterruptRequestReserved, 0));
        }
        index += u32::from(data.subhandle());
    }
    if index >= setup.table.entries() {
        return Err(fault(FaultReason::InterruptIndexBeyond, index as u16));
    }
    // The largest table has 65536 entries.
    let index = index as u16;
    let irte = entry(index).map_err(|_| fault(FaultReason::InterruptEntryAccess, index))?;
    match refused(irte, extended, source) {
        Some(reason) => Err(InterruptFault { reason, index, fault_disabled: irte.low.fpd() }),
        None => Ok(message_of(irte, extended)),
    }
}

/// Why `irte` does not serve `source`, if so.
fn refused(irte: Irte, extended: bool, source: Bdf) -> Option<FaultReason> {
    if !irte.low.p() {
        Some(FaultReason::InterruptEntryNotPresent)
    } else if irte.has_reserved(extended) {
        Some(FaultReason::InterruptEntryReserved)
    } else if !source_matches(irte, source) {
        Some(FaultReason::InterruptSourceMismatch)
    } else {
        None
    }
}

/// Whether `irte` is valid, for any source.
fn is_valid(irte: Irte, extended: bool) -> bool {
    irte.low.p() && !irte.has_reserved(extended)
}

fn source_matches(irte: Irte, source: Bdf) -> bool {
    let sid = irte.high.sid();
    match irte.high.validation() {
        SourceValidation::None => true,
        SourceValidation::Source => (sid ^ source.raw()) & !irte.high.ignored_source_bits() == 0,
        SourceValidation::Bus => (sid >> 8..=sid & 0xff).contains(&source.bus().into()),
        SourceValidation::Reserved => false,
    }
}

/// The message that `irte` sends.
fn message_of(irte: Irte, extended: bool) -> MsiMessage {
    let destination = irte.destination(extended);
    let address = CompatibilityAddress::new()
        .with_logical(irte.low.dm())
        .with_redirection_hint(irte.low.rh())
        .with_destination(destination as u8);
    let data = MessageData::new()
        .with_vector(irte.low.v())
        .with_delivery_mode(irte.low.dlm())
        .with_assert(true)
        .with_level(irte.low.tm());
    MsiMessage {
        address: u64::from(destination & !0xff) << 32 | u64::from(address.into_bits()),
        data: data.into_bits(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use FaultReason::*;

    const SOURCE: Bdf = Bdf::from_raw(0x1234);
    /// A table of 256 entries.
    const TABLE: Irta = Irta::new().with_s(7).with_addr(1);
    const SETUP: Setup = Setup { table: TABLE, compatibility: false };
    const EXTENDED: Setup = Setup { table: TABLE.with_eime(true), compatibility: true };
    const COMPATIBILITY: Setup = Setup { compatibility: true, ..SETUP };

    fn of_handle(handle: u16) -> MsiMessage {
        let address = RemappableAddress::new().with_handle(handle).into_bits();
        MsiMessage { address: address.into(), data: 0 }
    }

    fn with_subhandle(handle: u16, data: u32) -> MsiMessage {
        let address = RemappableAddress::new().with_handle(handle).with_shv(true).into_bits();
        MsiMessage { address: address.into(), data }
    }

    /// The fault and its index, when entry 7 is `words`.
    fn blocked(setup: Setup, message: MsiMessage, words: [u64; 2]) -> Option<(FaultReason, u16)> {
        let entry = |index| {
            assert_eq!(index, 7);
            Ok(Irte::from_words(words))
        };
        decide(setup, SOURCE, message, entry).err().map(|fault| (fault.reason, fault.index))
    }

    #[test]
    fn each_reason_of_the_request_is_told() {
        let never = |_| unreachable!();
        let reason = |setup, message| {
            let fault = decide(setup, SOURCE, message, never).unwrap_err();
            assert!(!fault.fault_disabled);
            (fault.reason, fault.index)
        };
        let compatibility = MsiMessage { address: 0xfee0_1000, data: 0x41 };
        assert_eq!(reason(SETUP, compatibility), (InterruptCompatibilityBlocked, 0));
        assert_eq!(reason(EXTENDED, compatibility), (InterruptCompatibilityBlocked, 0));
        let reserved = with_subhandle(0, 0x1_0000);
        assert_eq!(reason(SETUP, reserved), (InterruptRequestReserved, 0));
        assert_eq!(reason(SETUP, of_handle(256)), (InterruptIndexBeyond, 256));
        assert_eq!(reason(SETUP, with_subhandle(255, 1)), (InterruptIndexBeyond, 256));
        let beyond_all = with_subhandle(0xffff, 0xffff);
        assert_eq!(reason(SETUP, beyond_all), (InterruptIndexBeyond, 0xfffe));
        let unreadable = |_| Err(BadAddress { address: 0, length: 8 });
        let fault = decide(SETUP, SOURCE, of_handle(255), unreadable).unwrap_err();
        assert_eq!((fault.reason, fault.index), (InterruptEntryAccess, 255));
    }

    #[test]
    fn each_reason_of_the_entry_is_told() {
        let low = |bits: u64| [bits, 0];
        for (words, reason) in [
            (low(0), InterruptEntryNotPresent),
            // Reserved bits matter only in a present entry.
            (low(1 << 12), InterruptEntryNotPresent),
            (low(1 << 12 | 1), InterruptEntryReserved),
            (low(1 << 15 | 1), InterruptEntryReserved),
            (low(3 << 5 | 1), InterruptEntryReserved),
            (low(1 << 48 | 1), InterruptEntryReserved),
            ([1, 1 << 20], InterruptEntryReserved),
            ([1, 3 << 18], InterruptEntryReserved),
            ([1, 1 << 18], InterruptSourceMismatch),
        ] {
            assert_eq!(blocked(SETUP, of_handle(7), words), Some((reason, 7)), "{words:x?}");
        }
        assert_eq!(blocked(SETUP, with_subhandle(3, 4), low(1)), None);
        assert_eq!(blocked(EXTENDED, of_handle(7), low(1 << 48 | 1)), None);
    }

    #[test]
    fn fpd_suppresses_what_the_entry_itself_is_to_blame_for() {
        let disabled = |words| {
            decide(SETUP, SOURCE, of_handle(0), |_| Ok(Irte::from_words(words)))
                .unwrap_err()
                .fault_disabled
        };
        assert!(disabled([0b10, 0]));
        assert!(!disabled([0b00, 0]));
        assert!(disabled([1 << 12 | 0b11, 0]));
        assert!(disabled([0b11, 1 << 18]));
    }

    #[test]
    fn the_source_is_validated_as_the_entry_says() {
        // SQ, SVT, SID.
        let served = |source: u16, sq: u64, svt: u64, sid: u64| {
            let words = [1, svt << 18 | sq << 16 | sid];
            let source = Bdf::from_raw(source);
            decide(SETUP, source, of_handle(0), |_| Ok(Irte::from_words(words))).is_ok()
        };
        assert!(served(0xffff, 0, 0, 0x1234));
        assert!(served(0x1234, 0, 1, 0x1234));
        for (sq, ignored) in [(0, 0b000), (1, 0b100), (2, 0b110), (3, 0b111u16)] {
            for bit in 0..16 {
                let source = 0x1234 ^ 1 << bit;
                assert_eq!(served(source, sq, 1, 0x1234), ignored & 1 << bit != 0, "{sq} {bit}");
            }
        }
        for (bus, inside) in [(0x0f, false), (0x10, true), (0x12, true), (0x13, false)] {
            assert_eq!(served(bus << 8 | 0x55, 0, 2, 0x1012), inside, "{bus:#x}");
        }
        assert!(!served(0x1100, 0, 2, 0x1210));
    }

    #[test]
    fn compatibility_format_passes_as_it_is_where_it_may() {
        let message = MsiMessage { address: 0xfee1_200c, data: 0xc141 };
        assert_eq!(decide(COMPATIBILITY, SOURCE, message, |_| unreachable!()), Ok(message));
    }

    #[test]
    fn the_entry_makes_the_message() {
        let words = [0x0102_0304 << 32 | 0x41 << 16 | 4 << 5 | 0b11101, 0];
        let of = |setup| decide(setup, SOURCE, of_handle(0), |_| Ok(Irte::from_words(words)));
        let message = of(EXTENDED).unwrap();
        assert_eq!(message, MsiMessage { address: 0x0102_0300_fee0_400c, data: 0xc441 });
        let narrow = [0x1200 << 32 | 0x30 << 16 | 1, 0];
        let message = decide(SETUP, SOURCE, of_handle(0), |_| Ok(Irte::from_words(narrow)));
        assert_eq!(message, Ok(MsiMessage { address: 0xfee1_2000, data: 0x4030 }));
    }

    #[test]
    fn the_largest_table_has_an_entry_for_every_index() {
        let setup = Setup { table: TABLE.with_s(15), ..SETUP };
        let entry = |index| {
            assert_eq!(index, 0xffff);
            Ok(Irte::from_words([1, 0]))
        };
        assert!(decide(setup, SOURCE, of_handle(0xffff), entry).is_ok());
        assert!(decide(setup, SOURCE, with_subhandle(0xfffe, 1), entry).is_ok());
    }

    #[test]
    fn only_the_interrupt_range_is_one() {
        for (address, is) in [
            (0xfee0_0000, true),
            (0xfeef_fffc, true),
            (0xfedf_fffc, false),
            (0xfef0_0000, false),
            (0x1_fee0_0000, false),
        ] {
            assert_eq!(is_interrupt_request(address), is, "{address:#x}");
        }
    }
}
