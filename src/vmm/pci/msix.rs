// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! MSI-X (PCIe 6.0 §7.7.2): the capability, the vector table and the pending bits.

use std::fmt;
use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use vmm_sys_util::eventfd::EventFd;

use super::layout::*;
use super::{ConfigSpace, MsiMessage};

/// Bytes of one entry of the vector table.
const ENTRY_SIZE: usize = 16;
/// Doubleword of an entry that holds its mask bit.
const VECTOR_CONTROL: usize = 3;
/// Vector control: the vector is masked.
const VECTOR_MASKED: u32 = 1;
/// An entry after reset.
const RESET_ENTRY: [u32; ENTRY_SIZE / 4] = [0, 0, 0, VECTOR_MASKED];

/// Sends the message of one vector.
///
/// The table sets the message before it triggers a vector, and never triggers it without one.
pub trait InterruptVector: Send + Sync {
    /// Software changed the message, or masked or disabled the vector.
    fn update(&self, message: Option<MsiMessage>);

    /// Sends the message.
    fn trigger(&self);

    /// Whether an interrupt is pending that the table does not know of.
    fn is_pending(&self) -> bool {
        false
    }
}

/// A vector that somebody else triggers at any time by writing an eventfd.
///
/// Without a message the eventfd is not read; pending writes are sent with the next message.
pub trait EventVector: InterruptVector {
    /// The eventfd to write. It does not block.
    fn event(&self) -> &EventFd;
}

/// An MSI-X capability.
#[derive(Debug, Clone, Copy)]
pub struct MsixCapability {
    offset: u16,
}

/// Location of an MSI-X structure: a BAR, and an offset in it that is a multiple of 8.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsixPlace {
    /// The BAR.
    pub bar: u8,
    /// Offset in bytes.
    pub offset: u32,
}

impl MsixCapability {
    /// Adds the capability to `config`: `vectors` of them (1 to 2048), with the table and the
    /// pending bits at these places.
    pub fn add(
        config: &mut ConfigSpace,
        vectors: u16,
        table: MsixPlace,
        pending: MsixPlace,
    ) -> Self {
        let control = MsixControl::new().with_table_size(vectors - 1);
        let changeable = MsixControl::new().with_function_mask(true).with_enable(true);
        let mut body = [0; 10];
        body[..2].copy_from_slice(&control.into_bits().to_le_bytes());
        for (place, at) in [(table, 2), (pending, 6)] {
            body[at..at + 4].copy_from_slice(&(place.offset | u32::from(place.bar)).to_le_bytes());
        }
        let writable = changeable.into_bits().to_le_bytes();
        Self { offset: config.add_capability(CAPABILITY_MSIX, &body, &writable) }
    }

    /// The existing capability at `offset`.
    pub fn at(offset: u16) -> Self {
        Self { offset }
    }

    /// Message control as set by software.
    pub fn control(&self, config: &ConfigSpace) -> MsixControl {
        MsixControl::from_bits(config.u16(self.offset + 2))
    }
}

/// The vectors of one function.
pub struct Msix {
    state: Mutex<State>,
}

struct State {
    enabled: bool,
    function_masked: bool,
    bus_master: bool,
    vectors: Vec<Vector>,
}

struct Vector {
    /// Address, upper address, data, control, as read by software.
    entry: [u32; ENTRY_SIZE / 4],
    /// The message that the interrupt layer has.
    known: Option<MsiMessage>,
    pending: bool,
    sender: Arc<dyn InterruptVector>,
}

impl Vector {
    fn message(&self) -> Option<MsiMessage> {
        let [low, high, data, control] = self.entry;
        // The low two bits of the address are zero.
        let address = u64::from(high) << 32 | u64::from(low & !3);
        (control & VECTOR_MASKED == 0).then_some(MsiMessage { address, data })
    }

    /// Updates the interrupt layer, and sends what was pending.
    fn update(&mut self, on: bool) {
        let message = self.message().filter(|_| on);
        if message != self.known {
            self.known = message;
            self.sender.update(message);
        }
        if self.known.is_some() && std::mem::take(&mut self.pending) {
            self.sender.trigger();
        }
    }
}

impl Msix {
    /// Masked vectors, with messages sent by `senders`; bus mastering is enabled.
    pub fn new(senders: Vec<Arc<dyn InterruptVector>>) -> Self {
        let vector = |sender| Vector { entry: RESET_ENTRY, known: None, pending: false, sender };
        let vectors = senders.into_iter().map(vector).collect();
        let (enabled, function_masked, bus_master) = (false, false, true);
        Self { state: Mutex::new(State { enabled, function_masked, bus_master, vectors }) }
    }

    /// How many vectors there are.
    pub fn len(&self) -> usize {
        self.state().vectors.len()
    }

    /// Software may have written message control.
    pub fn set_control(&self, control: MsixControl) {
        let mut state = self.state();
        (state.enabled, state.function_masked) = (control.enable(), control.function_mask());
        state.update();
    }

    /// Sets whether bus mastering is enabled: MSIs are requests, so without it they wait like those
    /// of masked vectors. When this returns, none is being sent.
    pub fn set_bus_master(&self, allowed: bool) {
        let mut state = self.state();
        state.bus_master = allowed;
        state.update();
    }

    /// Function-level reset: every vector is masked and has no message, and none is pending. When
    /// this returns, none is being sent.
    pub fn reset(&self) {
        let mut state = self.state();
        (state.enabled, state.function_masked) = (false, false);
        for vector in &mut state.vectors {
            (vector.entry, vector.pending) = (RESET_ENTRY, false);
        }
        state.update();
    }

    /// Sends the message of `vector`, now or when it is unmasked. Ignored with MSI-X disabled, or
    /// without such a vector.
    pub fn trigger(&self, vector: u16) {
        let mut state = self.state();
        if !state.enabled {
            return;
        }
        let on = state.on();
        if let Some(vector) = state.vectors.get_mut(usize::from(vector)) {
            vector.pending = true;
            vector.update(on);
        }
    }

    /// Software reads `data.len()` bytes at `offset` of the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Some(range) = doublewords(offset, data.len()) else { return };
        let state = self.state();
        for (index, bytes) in range.zip(data.chunks_exact_mut(4)) {
            if let Some(vector) = state.vectors.get(index / 4) {
                bytes.copy_from_slice(&vector.entry[index % 4].to_le_bytes());
            }
        }
    }

    /// Software writes `data` at `offset` of the table.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let Some(range) = doublewords(offset, data.len()) else { return };
        let mut state = self.state();
        let on = state.on();
        for (index, bytes) in range.zip(data.chunks_exact(4)) {
            let Some(vector) = state.vectors.get_mut(index / 4) else { continue };
            let value = bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte));
            vector.entry[index % 4] = match index % 4 {
                VECTOR_CONTROL => value & VECTOR_MASKED,
                _ => value,
            };
            vector.update(on);
        }
    }

    /// Software reads `data.len()` bytes at `offset` of the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let state = self.state();
        for (byte, at) in data.iter_mut().zip(offset..) {
            let Some(first) = usize::try_from(at).ok().and_then(|at| at.checked_mul(8)) else {
                return;
            };
            let bits = state.vectors.iter().skip(first).take(8).enumerate();
            *byte = bits.fold(0, |byte, (bit, vector)| {
                let pending = vector.pending || vector.sender.is_pending();
                byte | u8::from(pending) << bit
            });
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl State {
    /// Whether messages are sent at all.
    fn on(&self) -> bool {
        self.enabled && !self.function_masked && self.bus_master
    }

    fn update(&mut self) {
        let on = self.on();
        self.vectors.iter_mut().for_each(|vector| vector.update(on));
    }
}

impl fmt::Debug for Msix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = |vector: &Vector| vector.known;
        f.debug_list().entries(self.state().vectors.iter().map(known)).finish()
    }
}

/// The doublewords of an access. Only aligned ones of 4 or 8 bytes are defined (§7.7.2).
fn doublewords(offset: u64, length: usize) -> Option<std::ops::Range<usize>> {
    let offset = usize::try_from(offset).ok()?;
    let aligned = matches!(length, 4 | 8) && offset.is_multiple_of(length);
    aligned.then_some(offset / 4..offset / 4 + length / 4)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::Identity;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<String>>);

    impl InterruptVector for Recorder {
        fn update(&self, message: Option<MsiMessage>) {
            self.0.lock().push(match message {
                Some(message) => format!("{:#x}/{:#x}", message.address, message.data),
                None => "none".into(),
            });
        }

        fn trigger(&self) {
            self.0.lock().push("sent".into());
        }
    }

    impl Recorder {
        fn take(&self) -> Vec<String> {
            std::mem::take(&mut self.0.lock())
        }
    }

    fn control(enable: bool, mask: bool) -> MsixControl {
        MsixControl::new().with_enable(enable).with_function_mask(mask)
    }

    fn pending(msix: &Msix) -> u8 {
        let mut bits = [0xff; 8];
        msix.read_pending(0, &mut bits);
        assert_eq!(bits[1..], [0; 7]);
        bits[0]
    }

    #[test]
    fn a_masked_vector_is_pending_until_it_is_unmasked() {
        let recorders = [(); 2].map(|()| Arc::new(Recorder::default()));
        let msix = Msix::new(recorders.iter().map(|one| one.clone() as Arc<_>).collect());
        msix.trigger(1);
        assert_eq!(pending(&msix), 0, "without MSI-X there are no messages");
        msix.set_control(control(true, true));
        msix.write_table(16, &0xfee0_0003u32.to_le_bytes());
        msix.write_table(20, &1u32.to_le_bytes());
        msix.write_table(24, &0x41u32.to_le_bytes());
        msix.write_table(28, &0xffff_fffeu32.to_le_bytes());
        msix.trigger(1);
        msix.trigger(0);
        msix.trigger(2);
        assert_eq!(pending(&msix), 3);
        assert_eq!(recorders[1].take(), [""; 0]);
        msix.set_control(control(true, false));
        assert_eq!(recorders[1].take(), ["0x1fee00000/0x41", "sent"]);
        assert_eq!(pending(&msix), 1, "vector 0 is masked by itself");
        // Masked, changed, unmasked: what was pending is sent with the new message, once.
        msix.write_table(28, &1u32.to_le_bytes());
        msix.trigger(1);
        msix.trigger(1);
        msix.write_table(24, &0x0000_0000_0000_0042u64.to_le_bytes());
        assert_eq!(recorders[1].take(), ["none", "0x1fee00000/0x42", "sent"]);
        msix.trigger(1);
        assert_eq!(recorders[1].take(), ["sent"]);
        msix.set_control(control(false, false));
        msix.trigger(1);
        assert_eq!(recorders[1].take(), ["none"]);
        assert_eq!(recorders[0].take(), [""; 0]);
    }

    #[test]
    fn messages_of_a_function_that_is_no_bus_master_wait() {
        let recorder = Arc::new(Recorder::default());
        let msix = Msix::new(vec![recorder.clone()]);
        msix.set_control(control(true, false));
        msix.write_table(0, &0xfee0_0000u32.to_le_bytes());
        msix.write_table(12, &0u32.to_le_bytes());
        recorder.take();
        msix.set_bus_master(false);
        msix.trigger(0);
        assert_eq!((recorder.take(), pending(&msix)), (vec!["none".to_owned()], 1));
        msix.set_bus_master(true);
        assert_eq!(recorder.take(), ["0xfee00000/0x0", "sent"]);
        assert_eq!(pending(&msix), 0);
    }

    #[test]
    fn after_a_reset_nothing_is_sent_and_nothing_is_left() {
        let recorder = Arc::new(Recorder::default());
        let msix = Msix::new(vec![recorder.clone(), Arc::new(Recorder::default())]);
        msix.set_control(control(true, false));
        msix.write_table(0, &0xfee0_0000u32.to_le_bytes());
        msix.write_table(12, &0u32.to_le_bytes());
        msix.trigger(1);
        assert_eq!((recorder.take(), pending(&msix)), (vec!["0xfee00000/0x0".to_owned()], 2));
        msix.reset();
        assert_eq!((recorder.take(), pending(&msix)), (vec!["none".to_owned()], 0));
        msix.trigger(0);
        msix.set_control(control(true, false));
        assert_eq!(recorder.take(), [""; 0]);
        let mut entry = [0xff; 8];
        msix.read_table(0, &mut entry);
        assert_eq!(entry, [0; 8]);
        msix.read_table(8, &mut entry);
        assert_eq!(entry, [0, 0, 0, 0, 1, 0, 0, 0]);
    }

    #[test]
    fn only_aligned_doublewords_mean_anything() {
        let msix = Msix::new(vec![Arc::new(Recorder::default())]);
        let mut data = [0xaa; 4];
        msix.read_table(12, &mut data);
        assert_eq!(data, [1, 0, 0, 0]);
        msix.write_table(1, &[0xff; 4]);
        msix.write_table(0, &[0xff; 2]);
        msix.write_table(4, &[0xff; 8]);
        msix.write_table(16, &[0xff; 4]);
        msix.write_table(!7, &[0xff; 8]);
        for offset in [0, 4, 8, 16, !3] {
            msix.read_table(offset, &mut data);
            assert_eq!(data, [0; 4]);
        }
        msix.read_pending(u64::MAX - 1, &mut data);
        assert_eq!(data, [0; 4]);
    }

    #[test]
    fn the_capability_says_where_the_table_is() {
        let identity = Identity { vendor: 1, device: 2, class: 0, revision: 0 };
        let mut config = ConfigSpace::new(identity);
        let table = MsixPlace { bar: 0, offset: 0x4000 };
        let pending = MsixPlace { bar: 2, offset: 0x5000 };
        let msix = MsixCapability::add(&mut config, 3, table, pending);
        assert_eq!(config.u16(msix.offset) & 0xff, 0x11);
        assert_eq!(config.u32(msix.offset + 4), 0x4000);
        assert_eq!(config.u32(msix.offset + 8), 0x5002);
        assert!(!msix.control(&config).enable());
        config.write(msix.offset + 2, &[0xff; 2]);
        let control = msix.control(&config);
        assert!(control.enable() && control.function_mask());
        assert_eq!(control.table_size(), 2);
    }
}
