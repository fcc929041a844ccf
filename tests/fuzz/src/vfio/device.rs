// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host's device: what VFIO would say of it, and what reaches it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::MutexGuard;
use twostage::sync::Mutex;

use rustix::fs::{memfd_create, MemfdFlags};
use twostage_vmm::{HostDevice, Irq, IrqInfo, Mapping, Region};
use vmm_sys_util::eventfd::EventFd;

use crate::input::Input;

/// The region of configuration space, and its length.
const CONFIG: u32 = 7;
pub const CONFIG_SIZE: usize = 4096;
/// What a device's memory has everywhere.
pub const DEVICE_BYTE: u8 = 0x5a;
/// Sizes that BARs may have.
const SIZES: [u64; 8] = [0, 0x1000, 0x2000, 0x4000, 0x1_0000, 0x20, 0x3000, 1 << 40];

/// A device that says what it was made of.
#[derive(Debug)]
pub struct Device {
    pub config: Mutex<Vec<u8>>,
    sizes: [u64; 6],
    mappable: u8,
    irqs: [IrqInfo; 3],
    can_reset: bool,
    refuses: AtomicBool,
    /// Bytes of configuration space that were written.
    written: Mutex<Vec<u16>>,
    /// Writes to BARs: which, the offset, and the bytes.
    stores: Mutex<Vec<(usize, u64, Vec<u8>)>>,
    /// What was mapped, by its address: the BAR and the offset in it.
    maps: Mutex<BTreeMap<u64, (usize, u64)>>,
    /// Interrupts that are on: index and sub-index.
    on: Mutex<BTreeMap<(Irq, u32), RawFd>>,
    file: File,
}

impl Device {
    pub fn new(input: &mut Input<'_>) -> Self {
        let mut config = vec![0; CONFIG_SIZE];
        let mut put = |at: usize, bytes: &[u8]| {
            config.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
        };
        put(0, &[0x36, 0x1b, 0x10, 0x00, 0x07, 0x01, 0x18, 0x00, 2, 2, 8, 1]);
        // A list of capabilities, each where the last one ends or somewhere else.
        let mut at = 0x40_u8;
        put(0x34, &[at]);
        for _ in 0..input.byte() % 8 {
            let id = input.pick(&[0x05, 0x11, 0x10, 0x01, 0x09, 0x03, 0x13, 0x05, 0x11, 0x10]);
            let length = match id {
                0x05 => 0x18,
                0x10 => 0x3c,
                0x11 => 0x0c,
                _ => 0x08,
            };
            let next = match input.byte() {
                far @ 0xf0.. => far,
                _ => at.wrapping_add(length + 4) & 0xfc,
            };
            let mut body = vec![id, next];
            body.extend((2..length).map(|_| input.byte()));
            if id == 0x11 && input.flag() {
                body[2..].copy_from_slice(&[7, 0, 0, 0x10, 0, 0, 0, 0x18, 0, 0]);
            }
            put(at.into(), &body);
            at = next;
        }
        let mut at = 0x100_u16;
        for _ in 0..input.byte() % 6 {
            let id: u32 = input.pick(&[0x03, 0x0b, 0x23, 0x01, 0x10, 0x0f, 0x13, 0x1b, 0x0d, 0x19]);
            let next = match input.byte() {
                far @ 0xe0.. => u16::from(far) << 4,
                _ => at + 0x40,
            };
            let header = id | 1 << 16 | u32::from(next) << 20;
            let mut body = header.to_le_bytes().to_vec();
            body.extend((0..8).map(|_| input.byte()));
            put(at.into(), &body);
            at = next & 0xffc;
            if at == 0 {
                break;
            }
        }
        let kinds: [u8; 6] = std::array::from_fn(|_| input.pick(&[0, 4, 0xc, 1, 8, 0]));
        for (number, kind) in kinds.into_iter().enumerate() {
            put(0x10 + 4 * number, &[kind]);
        }
        for _ in 0..input.byte() % 8 {
            let at = usize::from(input.half()) % CONFIG_SIZE;
            put(at, &[input.byte()]);
        }
        put(0x3d, &[input.byte() % 3]);
        let count = |input: &mut Input<'_>| IrqInfo {
            count: input.pick(&[1, 0, 8, 16, 2048, u32::MAX]),
            fixed: input.flag(),
        };
        let file = File::from(memfd_create("bar", MemfdFlags::CLOEXEC).expect("memory"));
        file.set_len(0x1_0000).expect("memory");
        Self {
            config: Mutex::new(config),
            sizes: std::array::from_fn(|_| input.pick(&SIZES)),
            mappable: input.byte(),
            irqs: std::array::from_fn(|_| count(input)),
            can_reset: !input.one_in(4),
            refuses: AtomicBool::new(false),
            written: Mutex::default(),
            stores: Mutex::default(),
            maps: Mutex::default(),
            on: Mutex::default(),
            file,
        }
    }

    /// Bytes of a BAR.
    pub fn size(&self, bar: usize) -> u64 {
        self.sizes[bar]
    }

    pub fn config(&self) -> MutexGuard<'_, Vec<u8>> {
        self.config.lock()
    }

    /// The device changes a register by itself.
    pub fn change(&self, input: &mut Input<'_>) {
        let at = usize::from(input.half()) % CONFIG_SIZE;
        self.config()[at] = input.byte();
    }

    /// Calls for interrupts and resets fail from now on, or not.
    pub fn refuse(&self, refuse: bool) {
        self.refuses.store(refuse, Ordering::Relaxed);
    }

    /// What was written of configuration space since the last call.
    pub fn take_written(&self) -> Vec<u16> {
        std::mem::take(&mut *self.written.lock())
    }

    /// The writes to BARs since the last call.
    pub fn take_stores(&self) -> Vec<(usize, u64, Vec<u8>)> {
        std::mem::take(&mut *self.stores.lock())
    }

    /// The BAR, and the offset in it, of what is mapped at an address of this process.
    pub fn mapped_at(&self, address: u64) -> (usize, u64) {
        self.maps.lock()[&address]
    }

    /// Whether a BAR can be mapped.
    pub fn is_mappable(&self, bar: usize) -> bool {
        self.mappable >> bar & 1 != 0 && self.sizes[bar] <= 0x1_0000
    }

    /// Whether calls for interrupts and resets fail.
    pub fn refuses(&self) -> bool {
        self.refuses.load(Ordering::Relaxed)
    }

    /// The interrupts that are on.
    pub fn interrupts(&self) -> Vec<(Irq, u32)> {
        self.on.lock().keys().copied().collect()
    }

    /// The eventfd of an interrupt that is on.
    pub fn trigger(&self, irq: Irq, number: u32) -> Option<RawFd> {
        self.on.lock().get(&(irq, number)).copied()
    }

    fn answer(&self) -> io::Result<()> {
        match self.refuses() {
            true => Err(io::Error::from_raw_os_error(22)),
            false => Ok(()),
        }
    }
}

impl HostDevice for Device {
    fn region(&self, index: u32) -> io::Result<Region> {
        let size = match index {
            CONFIG => CONFIG_SIZE as u64,
            _ => self.sizes.get(index as usize).copied().unwrap_or_default(),
        };
        let mapped = index < 6 && self.is_mappable(index as usize);
        let mappable = std::iter::once(0..size).filter(|_| mapped).collect();
        Ok(Region { index, size, offset: u64::from(index) << 40, mappable })
    }

    fn read(&self, region: &Region, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.answer()?;
        if !region.contains(offset, data.len()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        match region.index {
            CONFIG => data.copy_from_slice(&self.config()[offset as usize..][..data.len()]),
            _ => data.fill(DEVICE_BYTE),
        }
        Ok(())
    }

    fn write(&self, region: &Region, offset: u64, data: &[u8]) -> io::Result<()> {
        if !region.contains(offset, data.len()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if region.index == CONFIG {
            let bytes = (offset as u16..).take(data.len());
            self.written.lock().extend(bytes);
            self.config()[offset as usize..][..data.len()].copy_from_slice(data);
        } else {
            self.stores.lock().push((region.index as usize, offset, data.to_vec()));
        }
        self.answer()
    }

    fn map(&self, region: &Region, offset: u64, length: u64) -> io::Result<Mapping> {
        assert!(offset + length <= region.size);
        assert!(offset.is_multiple_of(0x1000) && length.is_multiple_of(0x1000));
        let mapping = Mapping::new(&self.file, offset, length)?;
        self.maps.lock().insert(mapping.address(), (region.index as usize, offset));
        Ok(mapping)
    }

    fn irq(&self, irq: Irq) -> io::Result<IrqInfo> {
        Ok(match irq {
            Irq::Intx => self.irqs[0],
            Irq::Msi => self.irqs[1],
            Irq::Msix => self.irqs[2],
        })
    }

    fn set_triggers(&self, irq: Irq, start: u32, events: &[Option<&EventFd>]) -> io::Result<()> {
        self.answer()?;
        if start as usize + events.len() > self.irq(irq)?.count as usize {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut on = self.on.lock();
        for (number, event) in (start..).zip(events) {
            match event {
                Some(event) => on.insert((irq, number), event.as_raw_fd()),
                None => on.remove(&(irq, number)),
            };
        }
        Ok(())
    }

    fn set_intx_unmask(&self, _: &EventFd) -> io::Result<()> {
        self.answer()
    }

    fn disable_irq(&self, irq: Irq) -> io::Result<()> {
        // VFIO does that in any case.
        self.on.lock().retain(|(of, _), _| *of != irq);
        self.answer()
    }

    fn can_reset(&self) -> bool {
        self.can_reset
    }

    fn reset(&self) -> io::Result<()> {
        self.answer()
    }
}
