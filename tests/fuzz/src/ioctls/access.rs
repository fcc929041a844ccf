// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A user of pages inside the host: an access object that unpins when asked.

use std::sync::{Arc, Mutex, OnceLock, Weak};

use twostage::iommufd::ObjectId;
use twostage_emulated::{Access, AccessUnmap, EmulatedHost};

/// Maximum number of pins of one user.
const MAX_PINS: usize = 16;

/// An access object and its user.
#[derive(Debug)]
pub struct User {
    access: Arc<Access>,
    pins: Arc<Pins>,
}

/// The user's pins: first IOVA and length.
#[derive(Debug, Default)]
struct Pins {
    access: OnceLock<Weak<Access>>,
    ranges: Mutex<Vec<(u64, u64)>>,
}

impl AccessUnmap for Pins {
    fn unmap(&self, iova: u64, length: u64) {
        let last = iova.saturating_add(length - 1);
        let Some(access) = self.access.get().and_then(Weak::upgrade) else { return };
        let mut ranges = self.ranges.lock().expect("no panic before");
        ranges.retain(|&(start, length)| {
            let named = start <= last && start + (length - 1) >= iova;
            if named {
                access.unpin_pages(start, length).expect("it is pinned");
            }
            !named
        });
    }
}

impl User {
    /// One that pins pages, or only reads and writes.
    pub fn new(host: &Arc<EmulatedHost>, pins_pages: bool) -> Self {
        let pins = Arc::<Pins>::default();
        let listener = pins_pages.then(|| pins.clone() as Arc<dyn AccessUnmap>);
        let access = Arc::new(host.access_create(listener).expect("ids are left"));
        pins.access.get_or_init(|| Arc::downgrade(&access));
        Self { access, pins }
    }

    /// Does what the lowest bits of `how` select.
    pub fn act(&self, how: u8, ioas: ObjectId, iova: u64, length: u64) {
        let mut bytes = [how; 0x1800];
        let bytes = &mut bytes[..(length as usize).min(0x1800)];
        // Refused or not.
        let _ = match how % 8 {
            0 => self.access.attach(ioas),
            1 => self.access.replace(ioas),
            2 => self.access.detach(),
            3 => self.access.read(iova, bytes),
            4 => self.access.write(iova, bytes),
            5 => self.unpin_one(),
            _ => self.pin(iova, length, how % 8 == 6),
        };
    }

    fn pin(
        &self,
        iova: u64,
        length: u64,
        write: bool,
    ) -> Result<(), twostage_emulated::AccessError> {
        if self.pins.ranges.lock().expect("no panic before").len() < MAX_PINS {
            let pieces = self.access.pin_pages(iova, length, write)?;
            let pinned: u64 = pieces.iter().map(|piece| piece.length()).sum();
            assert_eq!(pinned, length, "what was pinned is not what was asked for");
            self.pins.ranges.lock().expect("no panic before").push((iova, length));
        }
        Ok(())
    }

    fn unpin_one(&self) -> Result<(), twostage_emulated::AccessError> {
        match self.pins.ranges.lock().expect("no panic before").pop() {
            Some((iova, length)) => self.access.unpin_pages(iova, length),
            None => Ok(()),
        }
    }
}
