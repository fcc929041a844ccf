// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Configuration space as memory of the guest that it can only read: a boot reads it a thousand
//! times, and none of these reads is an exit.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, VolatileMemory};

use super::layout::CONFIG_SIZE;

/// A page that shows what software reads in a function's configuration space.
#[derive(Debug)]
pub struct ConfigPage(MmapRegion);

/// A page is with the guest while this exists.
pub trait PageLoan: Send {}

/// Maps pages into the guest.
pub trait ConfigLender {
    /// Maps `page` into the guest at `address`, for reading: writes exit.
    ///
    /// # Errors
    /// The hypervisor's error.
    fn lend_config(&self, address: u64, page: Arc<ConfigPage>) -> io::Result<Box<dyn PageLoan>>;
}

impl ConfigPage {
    /// A page that shows `bytes`.
    ///
    /// # Errors
    /// The process has no memory.
    pub fn new(bytes: &[u8; CONFIG_SIZE]) -> io::Result<Self> {
        let region = MmapRegion::new(CONFIG_SIZE).map_err(io::Error::other)?;
        // The guest has it later.
        region.as_volatile_slice().write_slice(bytes, 0).map_err(io::Error::other)?;
        Ok(Self(region))
    }

    /// Its address in this process.
    pub fn address(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    /// What it shows.
    #[cfg(feature = "test-support")]
    pub fn shown(&self) -> [u8; CONFIG_SIZE] {
        let mut bytes = [0; CONFIG_SIZE];
        // It has that length.
        let _ = self.0.as_volatile_slice().read_slice(&mut bytes, 0);
        bytes
    }

    /// Shows the registers of `bytes` that have a byte in `changed`. The guest may read meanwhile:
    /// it sees each register as it was or as it is.
    pub fn show(&self, bytes: &[u8; CONFIG_SIZE], changed: std::ops::Range<usize>) {
        let slice = self.0.as_volatile_slice();
        let changed = changed.start / 4..changed.end.div_ceil(4);
        let registers = bytes.as_chunks::<4>().0.iter().enumerate();
        for (number, register) in registers.skip(changed.start).take(changed.len()) {
            // In the page, which has the size of configuration space, and aligned.
            let _ = slice.store(u32::from_ne_bytes(*register), 4 * number, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use twostage::spec::pci::Bdf;
    use twostage::sync::Mutex;

    use super::super::layout::{COMMAND, INTERRUPT_LINE, STATUS, VENDOR_ID};
    use super::super::{ConfigSpace, HostBridge, Identity, PciBus, PciFunction};
    use super::*;

    const IDENTITY: Identity =
        Identity { vendor: 0x1234, device: 0x11e8, class: 0xff00, revision: 0 };

    /// Bytes of `page` as the guest reads them.
    fn read(page: &ConfigPage, offset: u16, data: &mut [u8]) {
        page.0.as_volatile_slice().read_slice(data, offset.into()).unwrap();
    }

    fn assert_shown(page: &ConfigPage, config: &ConfigSpace) {
        let (mut shown, mut right) = ([0; CONFIG_SIZE], [0; CONFIG_SIZE]);
        read(page, 0, &mut shown);
        config.read(0, &mut right);
        assert_eq!(shown, right);
    }

    #[test]
    fn a_page_shows_what_software_reads_after_every_change() {
        let mut config = ConfigSpace::new(IDENTITY);
        config.add_bar(0, 0x1000, 0xe000_0000);
        let page = config.show().unwrap();
        assert_shown(&page, &config);
        config.write(COMMAND, &[6, 4]);
        config.write(INTERRUPT_LINE, &[11]);
        // Not aligned, over two registers, and outside.
        config.write(COMMAND + 3, &[0xff; 2]);
        config.write(0x11, &[0xee; 2]);
        config.write(0xfff, &[1; 4]);
        assert_shown(&page, &config);
        config.set_interrupt_status(true);
        let mut status = [0];
        read(&page, STATUS, &mut status);
        assert_eq!(status[0] & 1 << 3, 1 << 3);
        config.reset();
        assert_shown(&page, &config);
    }

    /// A function whose configuration space is memory until its interrupt line is written.
    struct Function(Mutex<ConfigSpace>);

    impl PciFunction for Function {
        fn config(&self) -> &Mutex<ConfigSpace> {
            &self.0
        }
        fn config_is_memory(&self) -> bool {
            self.0.lock().u16(INTERRUPT_LINE) & 0xff == 0
        }
        fn reset(&self) {}
        fn read_bar(&self, _: usize, _: u64, _: &mut [u8]) {}
        fn write_bar(&self, _: usize, _: u64, _: &[u8]) {}
    }

    /// What is lent, by address.
    type Pages = Arc<Mutex<Vec<(u64, Arc<ConfigPage>)>>>;

    #[derive(Default)]
    struct Lender(Pages);

    struct Lent(Pages, u64);

    impl PageLoan for Lent {}

    impl Drop for Lent {
        fn drop(&mut self) {
            self.0.lock().retain(|(address, _)| *address != self.1);
        }
    }

    impl ConfigLender for Lender {
        fn lend_config(
            &self,
            address: u64,
            page: Arc<ConfigPage>,
        ) -> io::Result<Box<dyn PageLoan>> {
            self.0.lock().push((address, page));
            Ok(Box::new(Lent(self.0.clone(), address)))
        }
    }

    #[test]
    fn functions_on_the_root_bus_are_lent_as_long_as_they_are_memory() {
        let mut bus = PciBus::default();
        bus.insert(Bdf::from_raw(0), Arc::new(HostBridge::new()));
        for raw in [0x18, 0x20, 0x118] {
            let function = Function(Mutex::new(ConfigSpace::new(IDENTITY)));
            bus.insert(Bdf::from_raw(raw), Arc::new(function));
        }
        bus.write_config(Bdf::from_raw(0x20), INTERRUPT_LINE, &[1]);
        let lender = Lender::default();
        let lent = || lender.0.lock().iter().map(|(address, _)| *address).collect::<Vec<_>>();
        bus.lend_config(0xb000_0000, &lender).unwrap();
        assert_eq!(lent(), [0xb000_0000, 0xb001_8000], "not what is no memory, nor other buses");
        let mut vendor = [0; 2];
        read(&lender.0.lock()[1].1, VENDOR_ID, &mut vendor);
        assert_eq!(vendor, 0x1234u16.to_le_bytes());
        bus.write_config(Bdf::from_raw(0x18), COMMAND, &[2]);
        assert_eq!(lent().len(), 2);
        bus.write_config(Bdf::from_raw(0x18), INTERRUPT_LINE, &[1]);
        assert_eq!(lent(), [0xb000_0000]);
        // For good.
        bus.write_config(Bdf::from_raw(0x18), INTERRUPT_LINE, &[0]);
        assert_eq!(lent(), [0xb000_0000]);
        drop(bus);
        assert!(lent().is_empty());
    }
}
