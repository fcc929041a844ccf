// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The waveforms and counts of the data sheet's figures. A count written at pulse 0 is loaded by
//! pulse 1.

use proptest::prelude::*;

use super::*;

/// A counter with this control word, whose count of two bytes is written at pulse 0.
fn counter(mode: u8, count: u16) -> Counter {
    let mut counter = Counter::new(true);
    counter.control(0x30 | mode << 1, 0);
    write(&mut counter, count, 0);
    counter
}

fn write(counter: &mut Counter, count: u16, now: i64) {
    count.to_le_bytes().into_iter().for_each(|byte| counter.write(byte, now));
}

fn read(counter: &mut Counter, now: i64) -> u16 {
    let low = counter.read(now);
    u16::from_le_bytes([low, counter.read(now)])
}

/// The counts at pulses 1 and up.
fn counts<const N: usize>(counter: &mut Counter) -> [u16; N] {
    std::array::from_fn(|n| read(counter, n as i64 + 1))
}

/// The output at pulses 0 and up.
fn outputs(counter: &mut Counter, pulses: i64) -> String {
    (0..pulses).map(|now| if counter.output(now) { '-' } else { '_' }).collect()
}

#[test]
fn mode_0_interrupts_on_terminal_count() {
    let mut counter = counter(0, 4);
    assert_eq!(counter.next_rise(0), Some(5), "N + 1 pulses after the count is written");
    assert_eq!(counts(&mut counter), [4, 3, 2, 1, 0, 0xffff, 0xfffe]);
    let mut counter = super::tests::counter(0, 4);
    assert_eq!(outputs(&mut counter, 8), "_____---");
    assert_eq!(counter.next_rise(5), None, "once");
    // A new count: the first byte stops counting, the second restarts it.
    counter.write(3, 10);
    assert!(!counter.output(20));
    assert_eq!(counter.next_rise(20), None);
    counter.write(0, 20);
    assert_eq!(counter.next_rise(20), Some(24));
}

#[test]
fn a_closed_gate_holds_mode_0() {
    let mut counter = counter(0, 10);
    counter.set_gate(false, 4);
    assert_eq!((read(&mut counter, 4), read(&mut counter, 100)), (7, 7));
    assert_eq!(counter.next_rise(100), None);
    counter.set_gate(true, 200);
    assert_eq!((read(&mut counter, 201), counter.next_rise(201)), (6, Some(207)));
    // A count written while the gate is closed is not counted.
    counter.set_gate(false, 300);
    write(&mut counter, 5, 300);
    assert_eq!((read(&mut counter, 400), counter.output(400)), (5, false));
    counter.set_gate(true, 500);
    assert_eq!(counter.next_rise(500), Some(505));
}

#[test]
fn mode_1_is_a_one_shot_of_the_gate() {
    let mut counter = counter(1, 3);
    assert!(counter.output(50) && counter.next_rise(50).is_none());
    counter.set_gate(false, 60);
    counter.set_gate(true, 70);
    let output: Vec<_> = (70..76).map(|now| counter.output(now)).collect();
    assert_eq!(output, [true, false, false, false, true, true]);
    // Retriggered before the end, it lasts longer.
    counter.set_gate(false, 80);
    counter.set_gate(true, 81);
    counter.set_gate(false, 82);
    counter.set_gate(true, 83);
    assert!(!counter.output(86) && counter.output(87));
}

#[test]
fn mode_2_is_low_for_the_last_pulse_of_each_period() {
    let mut counter = counter(2, 3);
    assert_eq!(outputs(&mut counter, 11), "---_--_--_-");
    assert_eq!(counts(&mut super::tests::counter(2, 3)), [3, 2, 1, 3, 2, 1, 3]);
    let mut counter = super::tests::counter(2, 3);
    assert_eq!([0, 4, 5, 300].map(|now| counter.next_rise(now)), [4, 7, 7, 301].map(Some));
}

#[test]
fn a_new_count_of_mode_2_is_loaded_at_the_end_of_the_period() {
    let mut counter = counter(2, 4);
    write(&mut counter, 5, 2);
    assert_eq!(outputs(&mut counter, 12), "----_----_--");
    let mut counter = super::tests::counter(2, 4);
    write(&mut counter, 5, 2);
    assert_eq!((read(&mut counter, 3), counter.next_rise(3)), (2, Some(5)));
    assert_eq!((read(&mut counter, 5), counter.next_rise(5)), (5, Some(10)));
}

#[test]
fn the_gate_stops_and_synchronizes_mode_2() {
    let mut counter = counter(2, 4);
    counter.set_gate(false, 4);
    assert!(counter.output(4), "at once");
    assert_eq!(counter.next_rise(4), None);
    counter.set_gate(true, 100);
    assert_eq!(counter.next_rise(100), Some(105));
}

#[test]
fn mode_3_is_a_square_wave() {
    let mut counter = counter(3, 4);
    assert_eq!(outputs(&mut counter, 10), "---__--__-");
    assert_eq!(counts(&mut super::tests::counter(3, 4)), [4, 2, 4, 2, 4, 2]);
    let mut counter = super::tests::counter(3, 5);
    assert_eq!(outputs(&mut counter, 12), "----__---__-");
    assert_eq!(counts(&mut super::tests::counter(3, 5)), [4, 2, 0, 4, 2, 4, 2, 0, 4, 2]);
    let mut counter = super::tests::counter(3, 5);
    assert_eq!([0, 6, 7].map(|now| counter.next_rise(now)), [6, 11, 11].map(Some));
}

#[test]
fn a_new_count_of_mode_3_is_loaded_at_the_end_of_the_half() {
    // In the first half, which takes 4; the second half takes the new count's 2.
    let mut counter = counter(3, 8);
    write(&mut counter, 4, 2);
    assert_eq!(counter.next_rise(2), Some(7));
    assert_eq!(outputs(&mut counter, 13), "-----__--__--");
    // In the second half.
    let mut counter = super::tests::counter(3, 8);
    write(&mut counter, 4, 6);
    assert_eq!(counter.next_rise(6), Some(9));
    assert_eq!((9..15).map(|now| counter.output(now)).filter(|high| *high).count(), 4);
}

#[test]
fn modes_4_and_5_strobe_for_one_pulse() {
    let mut counter = counter(4, 3);
    assert_eq!(counter.next_rise(0), Some(5));
    assert_eq!(outputs(&mut counter, 8), "----_---");
    assert_eq!(counter.next_rise(5), None);
    let mut counter = super::tests::counter(5, 3);
    assert!(counter.output(50));
    counter.set_gate(false, 60);
    counter.set_gate(true, 61);
    assert_eq!((counter.next_rise(61), counter.output(65)), (Some(66), false));
}

#[test]
fn a_counter_that_nobody_has_set_up_counts_nothing() {
    let mut counter = Counter::new(true);
    assert_eq!((counter.next_rise(0), counter.output(1000), counter.read(1000)), (None, true, 0));
}

#[test]
fn zero_is_the_largest_count() {
    let mut counter = counter(2, 0);
    assert_eq!(counter.next_rise(0), Some(0x1_0001));
    assert_eq!((read(&mut counter, 1), read(&mut counter, 2)), (0, 0xffff));
}

#[test]
fn decimal_counts_have_four_digits() {
    let mut counter = Counter::new(true);
    counter.control(0x31 | 2 << 1, 0);
    write(&mut counter, 0x1000, 0);
    assert_eq!((read(&mut counter, 1), read(&mut counter, 2)), (0x1000, 0x0999));
    write(&mut counter, 0, 2);
    assert_eq!((read(&mut counter, 1001), read(&mut counter, 1002)), (0, 0x9999));
}

#[test]
fn one_byte_alone_is_written_and_read() {
    let mut counter = Counter::new(true);
    counter.control(0x10 | 2 << 1, 0);
    counter.write(5, 0);
    assert_eq!([1, 2, 3].map(|now| counter.read(now)), [5, 4, 3]);
    counter.control(0x20 | 2 << 1, 10);
    counter.write(2, 10);
    assert_eq!([11, 12].map(|now| counter.read(now)), [2, 1]);
}

#[test]
fn a_latched_count_stays_until_it_is_read() {
    let mut counter = counter(2, 1000);
    counter.control(0, 101);
    counter.control(0, 300);
    assert_eq!(counter.read(400), 0x84, "900 is 0x384");
    counter.control(0, 500);
    assert_eq!(counter.read(600), 0x03);
    assert_eq!(read(&mut counter, 601), 400);
}

#[test]
fn the_status_tells_of_output_null_count_and_mode() {
    let mut counter = Counter::new(true);
    counter.control(0x30 | 2 << 1, 0);
    let status = |counter: &mut Counter, now| {
        counter.latch_status(now);
        counter.read(now)
    };
    assert_eq!(status(&mut counter, 0), 0b1111_0100, "no count yet");
    write(&mut counter, 4, 0);
    assert_eq!(status(&mut counter, 0), 0b1111_0100, "not loaded yet");
    assert_eq!(status(&mut counter, 1), 0b1011_0100);
    assert_eq!(status(&mut counter, 4), 0b0011_0100);
    write(&mut counter, 6, 6);
    assert_eq!(status(&mut counter, 7), 0b1111_0100, "until the end of the period");
    assert_eq!(status(&mut counter, 9), 0b1011_0100);
    // The status is read before the count.
    counter.latch_count(10);
    counter.latch_status(11);
    counter.latch_status(14);
    assert_eq!((counter.read(20), read(&mut counter, 20)), (0b1011_0100, 5));
    // Modes 6 and 7 are 2 and 3.
    counter.control(0x30 | 7 << 1, 30);
    assert_eq!(status(&mut counter, 30) & 0b1110, 3 << 1);
}

proptest! {
    /// `next_rise` matches the output's rises, whatever was written before.
    #[test]
    fn rises_are_where_the_output_rises(
        mode in 0u8..6,
        steps in prop::collection::vec((0u16..12, 0i64..30, any::<bool>()), 1..6),
    ) {
        let mut counter = Counter::new(true);
        let mut now = 0;
        counter.control(0x30 | mode << 1, now);
        for (count, pause, gate) in steps {
            if gate {
                counter.set_gate(!counter.gate, now);
            } else {
                write(&mut counter, count, now);
            }
            let mut expected = None;
            // Pulse by pulse, starting with the pulse that loads the count.
            let mut walker = counter.clone();
            let mut before = walker.output(now + 1);
            for pulse in now + 2..now + 100 {
                let output = walker.output(pulse);
                if output && !before {
                    expected = Some(pulse);
                    break;
                }
                before = output;
            }
            let found = counter.clone().next_rise(now + 1).filter(|rise| *rise < now + 100);
            prop_assert_eq!(found, expected, "mode {} at {}: {:?}", mode, now, counter);
            now += pause;
        }
    }
}
