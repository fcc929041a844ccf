// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Registers as drivers use them, and as they should not.

use super::*;
use crate::pci::Msix;
use proptest::prelude::*;

fn link() -> Link {
    Link::new("test".into(), 2, Msix::new(Vec::new()), std::sync::Arc::default(), None).unwrap()
}

fn common() -> CommonConfig {
    CommonConfig::new(Features::of_transport(true).with(5), &[256, 64])
}

struct Driver {
    common: CommonConfig,
    link: Link,
}

impl Driver {
    fn new() -> Self {
        Self { common: common(), link: link() }
    }

    fn write(&mut self, offset: u64, length: usize, value: u64) -> Result<Effect, Mistake> {
        self.common.write(offset, length, value, &self.link)
    }

    fn read(&self, offset: u64, length: usize) -> u64 {
        self.common.read(offset, length, &self.link).unwrap()
    }

    fn accept(&mut self, features: u64) {
        for select in 0..2 {
            self.write(0x08, 4, select).unwrap();
            self.write(0x0c, 4, features >> (32 * select) & 0xffff_ffff).unwrap();
        }
    }

    /// Negotiated up to FEATURES_OK.
    fn negotiated() -> Self {
        let mut driver = Self::new();
        driver.write(0x14, 1, 1).unwrap();
        driver.write(0x14, 1, 3).unwrap();
        driver.accept(1 << 32 | 1 << 33);
        driver.write(0x14, 1, 0xb).unwrap();
        driver
    }
}

#[test]
fn features_are_negotiated() {
    let mut driver = Driver::new();
    for (select, word) in [(0, 0x3000_0020), (1, 3), (2, 0), (u32::MAX.into(), 0)] {
        driver.write(0x00, 4, select).unwrap();
        assert_eq!(driver.read(0x04, 4), word);
    }
    driver.write(0x14, 1, 3).unwrap();
    // Without version 1; without ACCESS_PLATFORM; with a feature that was not offered.
    for bad in [1 << 33, 1 << 32, 7 << 32] {
        driver.accept(bad);
        assert_eq!(driver.write(0x14, 1, 0xb), Err(Mistake::Features(bad)));
        assert_eq!(driver.read(0x14, 1), 3);
        assert_eq!(
            driver.write(0x14, 1, 0xf).unwrap_err(),
            Mistake::Features(bad),
            "no way around FEATURES_OK"
        );
        assert_eq!(driver.read(0x14, 1), 3);
    }
    driver.accept(3 << 32 | 1 << 5);
    assert_eq!(driver.write(0x14, 1, 0xb), Ok(Effect::None));
    assert_eq!(driver.read(0x14, 1), 0xb);
    assert_eq!(driver.write(0x0c, 4, 0), Err(Mistake::LateFeatures));
    assert_eq!(driver.common.accepted(), Features(3 << 32 | 1 << 5));
    assert_eq!(driver.write(0x14, 1, 0xf), Ok(Effect::Start));
    assert_eq!(driver.write(0x14, 1, 0xf), Ok(Effect::None), "once");
}

#[test]
fn status_goes_ahead_or_back_to_the_start() {
    let mut driver = Driver::new();
    let refused = |from, to| Err(Mistake::Status { from, to });
    assert_eq!(driver.write(0x14, 1, 0x8), refused(0, 8), "FEATURES_OK needs DRIVER");
    assert_eq!(driver.write(0x14, 1, 0x4), refused(0, 4), "DRIVER_OK needs FEATURES_OK");
    assert_eq!(driver.write(0x14, 1, 0x10), refused(0, 0x10));
    driver.write(0x14, 1, 3).unwrap();
    assert_eq!(driver.write(0x14, 1, 1), refused(3, 1));
    assert_eq!(driver.write(0x14, 1, 0x83), Ok(Effect::None));
    driver.link.set_needs_reset(&"on purpose");
    assert_eq!(driver.read(0x14, 1), 0xc3);
    assert_eq!(driver.write(0x14, 1, 0), Ok(Effect::Reset));
    driver.common.reset();
    driver.link.reset();
    assert_eq!(driver.read(0x14, 1), 0);
    assert_eq!(driver.common, common());
}

#[test]
fn queues_are_set_up_between_features_and_ready() {
    let mut driver = Driver::new();
    assert_eq!(driver.read(0x12, 2), 2);
    assert_eq!(driver.write(0x18, 2, 16), Err(Mistake::QueueOrder(0)));
    let mut driver = Driver::negotiated();
    driver.write(0x16, 2, 1).unwrap();
    assert_eq!((driver.read(0x18, 2), driver.read(0x1e, 2)), (64, 1));
    for size in [0, 3, 65, 128, 0xffff] {
        assert_eq!(driver.write(0x18, 2, size), Err(Mistake::QueueSize(1, size as u16)));
    }
    driver.write(0x18, 2, 32).unwrap();
    driver.write(0x20, 4, 0x1000_0008).unwrap();
    driver.write(0x24, 4, 0x12).unwrap();
    driver.write(0x28, 8, 0x12_1000_0002).unwrap();
    driver.write(0x30, 4, 0x1000_0004).unwrap();
    assert_eq!(driver.write(0x1c, 2, 1), Err(Mistake::QueueAlignment(1)));
    assert_eq!(driver.read(0x1c, 2), 0);
    driver.write(0x20, 4, 0x1000_0010).unwrap();
    assert_eq!(driver.write(0x1c, 2, 0), Err(Mistake::QueueEnable(1)));
    assert_eq!(driver.write(0x1c, 2, 1), Ok(Effect::None));
    assert_eq!((driver.read(0x1c, 2), driver.read(0x24, 4)), (1, 0x12));
    for (offset, length) in [(0x18, 2), (0x1c, 2), (0x20, 4), (0x34, 4)] {
        assert_eq!(driver.write(offset, length, 1), Err(Mistake::QueueOrder(1)));
    }
    let queue = QueueSetup {
        max_size: 64,
        size: 32,
        enabled: true,
        descriptors: 0x12_1000_0010,
        available: 0x12_1000_0002,
        used: 0x1000_0004,
    };
    assert_eq!(driver.common.queues()[1], queue);
    driver.write(0x16, 2, 2).unwrap();
    assert_eq!((driver.read(0x18, 2), driver.read(0x1c, 2)), (0, 0));
    for (offset, length) in [(0x18, 2), (0x1a, 2), (0x1c, 2), (0x20, 8)] {
        assert_eq!(driver.write(offset, length, 1), Err(Mistake::NoQueue(2)));
    }
}

#[test]
fn vectors_that_are_not_there_are_none() {
    struct Nobody;
    impl crate::pci::InterruptVector for Nobody {
        fn update(&self, _: Option<crate::pci::MsiMessage>) {}
        fn trigger(&self) {}
    }
    let vectors = (0..2).map(|_| std::sync::Arc::new(Nobody) as _).collect();
    let link =
        Link::new("test".into(), 2, Msix::new(vectors), std::sync::Arc::default(), None).unwrap();
    let mut driver = Driver { common: common(), link };
    for offset in [0x10, 0x1a] {
        assert_eq!(driver.read(offset, 2), 0xffff);
        driver.write(offset, 2, 1).unwrap();
        assert_eq!(driver.read(offset, 2), 1);
        driver.write(offset, 2, 2).unwrap();
        assert_eq!(driver.read(offset, 2), 0xffff);
    }
}

proptest! {
    #[test]
    fn no_access_panics_or_enables_nonsense(
        accesses in proptest::collection::vec(
            (0u64..0x48, prop_oneof![Just(1usize), Just(2), Just(4), Just(8)], any::<u64>()),
            0..60,
        ),
        low in any::<bool>(),
    ) {
        let mut driver = Driver::negotiated();
        for (offset, length, value) in accesses {
            let value = if low { value % 300 } else { value };
            let value = value & (u64::MAX >> (64 - 8 * length));
            if driver.write(offset, length, value) == Ok(Effect::Reset) {
                driver.common.reset();
            }
            let read = driver.common.read(offset, length, &driver.link);
            prop_assert_eq!(read.is_ok(), Field::at(offset, length).is_some());
            prop_assert!(driver.read(0x14, 1) & 0x4 == 0 || driver.read(0x14, 1) & 0x8 != 0);
            for queue in driver.common.queues() {
                prop_assert!(queue.size.is_power_of_two() && queue.size <= queue.max_size);
                prop_assert!(!queue.enabled || queue.descriptors % 16 == 0);
            }
        }
    }
}
