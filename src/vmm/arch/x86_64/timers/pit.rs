// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The interval timer, an 8254, and the chipset's port B, with the gate and output of its third
//! counter. With in-kernel interrupt controllers, KVM's is used instead.
//!
//! Source: Intel 82C54 data sheet (231244); port B: Intel ICH9 data sheet (316972), §13.7.1.

use std::io;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};
use twostage::sync::Mutex;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vm_superio::Trigger;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::counter::Counter;
use super::ticks;
use crate::bus::BusDevice;
use crate::{Error, Result};

/// First I/O port: the first counter's; the third's is followed by the control word's.
pub(in crate::arch::x86_64) const PIT_FIRST_PORT: u64 = 0x40;
/// Last I/O port.
pub(in crate::arch::x86_64) const PIT_LAST_PORT: u64 = 0x43;
/// I/O port of port B.
pub(in crate::arch::x86_64) const PORT_B: u64 = 0x61;

/// Clock frequency.
const HERTZ: u32 = 1_193_182;
/// Minimum interval between the guest's interrupts in nanoseconds, as in KVM.
const INTERVAL_MIN: u128 = 200_000;
/// Offset of the control word.
const CONTROL: u64 = 3;
/// The counters whose outputs are the interrupt and the speaker.
const TIMER: usize = 0;
const SPEAKER: usize = 2;
/// Control word: which counter; three is the read-back command.
const READ_BACK: u8 = 3;

/// Port B: the speaker counter's gate.
const SPEAKER_GATE: u8 = 1 << 0;
/// Port B: writable bits; the other one enables the speaker, which does not exist.
const PORT_B_WRITABLE: u8 = SPEAKER_GATE | 1 << 1;
/// Port B: memory refresh, toggles about every 15 µs.
const REFRESH_TOGGLE: u8 = 1 << 4;
const REFRESH_PULSES: i64 = 18;
/// Port B: the output of the speaker's counter.
const SPEAKER_OUTPUT: u8 = 1 << 5;

/// An interrupt line: an edge.
type Line = Box<dyn Trigger<E = io::Error> + Send + Sync>;

/// The interval timer.
pub(in crate::arch::x86_64) struct Pit {
    start: Instant,
    line: Line,
    state: Mutex<State>,
}

struct State {
    counters: [Counter; 3],
    port_b: u8,
    /// The pulse up to which the timer's output has been checked.
    seen: i64,
    /// When it last interrupted, in nanoseconds.
    interrupted: Option<u128>,
    timer: TimerFd,
}

impl Pit {
    /// A timer whose interrupt is `line`.
    ///
    /// # Errors
    /// The process has no file descriptors left.
    pub fn new(line: Line) -> Result<Arc<Self>> {
        let timer = TimerFd::new().map_err(Error::os("timerfd"))?;
        // Only the speaker's gate is connected.
        let counters = [Counter::new(true), Counter::new(true), Counter::new(false)];
        let state = State { counters, port_b: 0, seen: 0, interrupted: None, timer };
        Ok(Arc::new(Self { start: Instant::now(), line, state: Mutex::new(state) }))
    }

    /// Its ports.
    pub fn ports(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(PitPorts(self.clone()))
    }

    /// Port B.
    pub fn port_b(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(PortB(self.clone()))
    }

    /// Calls `access` with the state and the pulse; then interrupts if it is due.
    fn access<T>(&self, access: impl FnOnce(&mut State, i64) -> T) -> T {
        let now = self.start.elapsed().as_nanos();
        let mut state = self.state();
        // Threads may get here in another order than they read the clock.
        let pulse = (ticks(now, HERTZ) as i64).max(state.seen);
        // An interrupt that was due before the access is not lost.
        let due = state.is_due(pulse);
        let result = access(&mut state, pulse);
        state.seen = pulse;
        if due {
            state.interrupted = Some(now);
        }
        state.arm(now);
        drop(state);
        if due {
            if let Err(error) = self.line.trigger() {
                log::debug!("interval timer: {error}");
            }
        }
        result
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl State {
    /// Whether the timer's output has risen since the last check. It interrupts once, however often
    /// it rose.
    fn is_due(&mut self, pulse: i64) -> bool {
        let seen = self.seen;
        self.counters[TIMER].next_rise(seen).is_some_and(|rise| rise <= pulse)
    }

    /// Sets the timer to the output's next rise; this also clears its expiration.
    fn arm(&mut self, now: u128) {
        let seen = self.seen;
        let result = match self.counters[TIMER].next_rise(seen) {
            None => self.timer.clear(),
            Some(rise) => {
                let at = nanoseconds(rise);
                let earliest = self.interrupted.map_or(0, |last| last + INTERVAL_MIN);
                // A time of zero would disarm it.
                let pause = at.max(earliest).saturating_sub(now).max(1);
                // A period has at most 65536 pulses: less than a second.
                self.timer.reset(Duration::from_nanos(pause as u64), None)
            }
        };
        if let Err(error) = result {
            log::debug!("interval timer: {error}");
        }
    }

    fn control(&mut self, word: u8, pulse: i64) {
        match word >> 6 {
            READ_BACK => {
                let selected = self.counters.iter_mut().enumerate();
                for (_, counter) in selected.filter(|(number, _)| word >> (number + 1) & 1 != 0) {
                    // Both bits are active low.
                    if word & 1 << 5 == 0 {
                        counter.latch_count(pulse);
                    }
                    if word & 1 << 4 == 0 {
                        counter.latch_status(pulse);
                    }
                }
            }
            number => {
                if let Some(counter) = self.counters.get_mut(usize::from(number)) {
                    counter.control(word, pulse);
                }
            }
        }
    }
}

/// The end of a pulse, in nanoseconds.
fn nanoseconds(pulse: i64) -> u128 {
    // Pulses are counted from 0.
    (pulse.max(0) as u128 * 1_000_000_000).div_ceil(HERTZ.into())
}

/// Ports 0x40 to 0x43.
struct PitPorts(Arc<Pit>);

impl BusDevice for PitPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let [byte] = data {
            self.0.access(|state, pulse| {
                // Control words are write-only.
                if let Some(counter) = state.counters.get_mut(offset as usize) {
                    *byte = counter.read(pulse);
                }
            });
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let [byte] = data {
            self.0.access(|state, pulse| match state.counters.get_mut(offset as usize) {
                Some(counter) => counter.write(*byte, pulse),
                None if offset == CONTROL => state.control(*byte, pulse),
                None => {}
            });
        }
    }
}

/// Port 0x61.
struct PortB(Arc<Pit>);

impl BusDevice for PortB {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
        if let [byte] = data {
            *byte = self.0.access(|state, pulse| {
                let output = state.counters[SPEAKER].output(pulse);
                let output = if output { SPEAKER_OUTPUT } else { 0 };
                let refresh = if pulse / REFRESH_PULSES % 2 != 0 { REFRESH_TOGGLE } else { 0 };
                state.port_b | output | refresh
            });
        }
    }

    fn write(&self, _: u64, data: &[u8]) {
        if let [byte] = data {
            self.0.access(|state, pulse| {
                state.port_b = byte & PORT_B_WRITABLE;
                state.counters[SPEAKER].set_gate(byte & SPEAKER_GATE != 0, pulse);
            });
        }
    }
}

impl std::fmt::Debug for Pit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pit").finish_non_exhaustive()
    }
}

/// A [`Pit`] in the event loop.
pub(in crate::arch::x86_64) struct PitTimer(pub Arc<Pit>);

impl MutEventSubscriber for PitTimer {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.0.state().timer, EventSet::IN)) {
            log::error!("the interval timer does not interrupt: {error}");
        }
    }

    /// The timerfd is not read: there is nothing to read if it was set again meanwhile.
    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.0.access(|_, _| ());
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::sync::atomic::{AtomicU32, Ordering};

    use event_manager::{EventManager, SubscriberOps};
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Default)]
    struct Count(Arc<AtomicU32>);

    impl Trigger for Count {
        type E = io::Error;

        fn trigger(&self) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }

    fn pit() -> (Arc<Pit>, Count) {
        let count = Count::default();
        (Pit::new(Box::new(count.clone())).unwrap(), count)
    }

    fn write(pit: &Arc<Pit>, port: u64, bytes: &[u8]) {
        bytes.iter().for_each(|byte| pit.ports().write(port, &[*byte]));
    }

    fn read(device: &dyn BusDevice, offset: u64) -> u8 {
        let mut byte = [0];
        device.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn the_event_loop_interrupts_each_period() {
        let (pit, count) = pit();
        let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new().unwrap();
        events.add_subscriber(Box::new(PitTimer(pit.clone())));
        let start = Instant::now();
        // 100 Hz.
        write(&pit, CONTROL, &[0x34]);
        write(&pit, 0, &11932u16.to_le_bytes());
        while count.0.load(Ordering::SeqCst) < 5 {
            assert!(start.elapsed() < Duration::from_secs(60));
            events.run_with_timeout(1000).unwrap();
        }
        assert!(start.elapsed() >= Duration::from_millis(40), "no period is shorter");
    }

    #[test]
    fn a_count_that_is_over_interrupts_once_and_at_the_next_access() {
        let (pit, count) = pit();
        write(&pit, CONTROL, &[0x30]);
        write(&pit, 0, &[10, 0]);
        std::thread::sleep(Duration::from_millis(1));
        // No event loop runs here.
        write(&pit, CONTROL, &[0x30]);
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
        write(&pit, CONTROL, &[0x30]);
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_guest_does_not_drown_the_event_loop() {
        let (pit, count) = pit();
        let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new().unwrap();
        events.add_subscriber(Box::new(PitTimer(pit.clone())));
        // The shortest period: 600,000 per second.
        write(&pit, CONTROL, &[0x34]);
        write(&pit, 0, &[2, 0]);
        let start = Instant::now();
        for _ in 0..20 {
            events.run_with_timeout(1000).unwrap();
        }
        let most = start.elapsed().as_nanos() / INTERVAL_MIN + 2;
        assert!(u128::from(count.0.load(Ordering::SeqCst)) <= most);
    }

    #[test]
    fn the_speakers_counter_measures_time_by_port_b() {
        let (pit, _) = pit();
        let port_b = pit.port_b();
        port_b.write(0, &[0]);
        // As Linux calibrates: mode 0, gate on, until the output is high.
        port_b.write(0, &[1]);
        let start = Instant::now();
        write(&pit, CONTROL, &[0xb0]);
        write(&pit, 2, &1193u16.to_le_bytes());
        while read(&*port_b, 0) & SPEAKER_OUTPUT == 0 {
            assert!(start.elapsed() < Duration::from_secs(60));
        }
        assert!(start.elapsed() >= Duration::from_micros(900));
        assert_eq!(read(&*port_b, 0) & 0x0f, 1);
        port_b.write(0, &[0xff]);
        assert_eq!(read(&*port_b, 0) & 0x0f, 3, "two bits can be written");
    }

    #[test]
    fn the_refresh_bit_toggles() {
        let (pit, _) = pit();
        let (port_b, start) = (pit.port_b(), Instant::now());
        for wanted in [REFRESH_TOGGLE, 0, REFRESH_TOGGLE] {
            while read(&*port_b, 0) & REFRESH_TOGGLE != wanted {
                assert!(start.elapsed() < Duration::from_secs(60));
            }
        }
    }

    #[test]
    fn read_back_latches_the_counters_it_selects() {
        let (pit, _) = pit();
        let ports = pit.ports();
        write(&pit, CONTROL, &[0x34]);
        write(&pit, 0, &[0, 0]);
        write(&pit, CONTROL, &[0x70]);
        write(&pit, 1, &[0, 0x80]);
        // Only the status, of the first two.
        write(&pit, CONTROL, &[0xe0 | 1 << 1 | 1 << 2]);
        assert_eq!((read(&*ports, 0) & 0x3f, read(&*ports, 1) & 0x3f), (0x34, 0x30));
        // Only the count, of the second: it stays latched.
        let latched_and_later = || {
            let start = Instant::now();
            write(&pit, CONTROL, &[0xd0 | 1 << 2]);
            let low = read(&*ports, 1);
            std::thread::sleep(Duration::from_millis(1));
            let latched = u16::from_le_bytes([low, read(&*ports, 1)]);
            let later = u16::from_le_bytes([read(&*ports, 1), read(&*ports, 1)]);
            // It wraps after 54.9 ms: a longer sleep proves nothing.
            (start.elapsed() < Duration::from_millis(50)).then_some((latched, later))
        };
        let start = Instant::now();
        let (latched, later) = loop {
            if let Some(counts) = latched_and_later() {
                break counts;
            }
            assert!(start.elapsed() < Duration::from_secs(60));
        };
        assert!(latched.wrapping_sub(later) >= 1000, "{later} after {latched}");
        assert_eq!(read(&*ports, CONTROL), 0xff);
        ports.write(0, &[1, 2]);
    }

    proptest! {
        /// Whatever a guest writes, the timer is never set to a past or distant time.
        #[test]
        fn any_access_is_served(accesses in prop::collection::vec((0u64..5, any::<u8>()), 0..64)) {
            let (pit, _) = pit();
            for (port, byte) in accesses {
                let (device, port) =
                    if port == 4 { (pit.port_b(), 0) } else { (pit.ports(), port) };
                device.write(port, &[byte]);
                read(&*device, port);
            }
            prop_assert!(pit.state().timer.as_raw_fd() >= 0);
        }
    }
}
