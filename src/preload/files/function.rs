// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The PCI function behind a VFIO device: its configuration space, BARs and interrupts.

use std::mem::size_of;
use std::sync::{Arc, Weak};

use twostage::iommufd::{Errno, UserMemory};
use twostage_emulated::{edu, DmaBuf};
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX as CONFIG_REGION, VFIO_PCI_NUM_REGIONS as REGIONS,
    VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};

use crate::files::config_space::{self as config, Kind, Services, BARS, COMMAND};
use crate::files::edu::Edu;
use crate::files::features::Export;
use crate::files::irqs::Irqs;
use crate::memory::pins;
use crate::sys;
use crate::table::Internal;

/// The function.
#[derive(Debug)]
pub struct Function {
    kind: Kind,
    config: Vec<u8>,
    bars: [u64; BARS],
    edu: Option<Edu>,
    /// That of BAR 2, which the program may map.
    memory: Option<Arc<Internal>>,
    /// Dma-bufs of it: revoked while memory space is disabled, as in vfio-pci.
    exports: Vec<Weak<DmaBuf>>,
    /// Its interrupts.
    pub irqs: Irqs,
}

/// A region of the device's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Its index.
    pub index: u32,
    /// In bytes; 0: there is none.
    pub size: u64,
}

impl Region {
    /// Its flags for VFIO. The registers cannot be mapped, as writes to them have effects, nor the
    /// table of MSI-X.
    pub fn flags(self) -> u32 {
        let map = if self.is_memory() { VFIO_REGION_INFO_FLAG_MMAP } else { 0 };
        match self.size {
            0 => 0,
            _ => VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE | map,
        }
    }

    /// Whether it is configuration space.
    pub fn is_config(self) -> bool {
        self.index == CONFIG_REGION
    }

    /// Whether it can be mapped.
    pub fn is_memory(self) -> bool {
        self.index == config::MEMORY && self.size > 0
    }
}

impl Function {
    /// A function with `services` that was just opened, with or without an engine: as in vfio-pci,
    /// its memory is enabled.
    ///
    /// # Errors
    /// There are no more descriptors, or no memory.
    pub fn new(kind: Kind, services: Services, edu: Option<Edu>) -> Result<Self, Errno> {
        let bars = kind.bars(edu.is_some());
        let memory = match kind.is_express() {
            true => Some(Internal::new(sys::file_of(&[0; edu::MEMORY_SIZE])?).into()),
            false => None,
        };
        let irqs = Irqs::new(kind.is_express());
        let (mut config, exports) = (kind.config_space(services.of_vfio()), Vec::new());
        if let Some(command) = config.get_mut(COMMAND).filter(|_| bars != [0; BARS]) {
            *command = config::MEMORY_SPACE;
        }
        Ok(Self { kind, config, bars, edu, memory, exports, irqs })
    }

    /// The region `index`; none if there is no such index.
    pub fn region(&self, index: u32) -> Option<Region> {
        let bar = usize::try_from(index).ok().and_then(|bar| self.bars.get(bar));
        let size = match index {
            CONFIG_REGION => self.config.len() as u64,
            _ if index < REGIONS => bar.copied().unwrap_or(0),
            _ => return None,
        };
        Some(Region { index, size })
    }

    /// The memory of BAR 2.
    pub fn memory(&self) -> Option<&Arc<Internal>> {
        self.memory.as_ref()
    }

    /// A dma-buf of its memory.
    ///
    /// # Errors
    /// `ENODEV` there is no such BAR; `EOPNOTSUPP` it has no memory; `EINVAL` it is shorter;
    /// `ENOMEM`.
    pub fn export(&mut self, export: &Export) -> Result<Arc<DmaBuf>, Errno> {
        let region = self.region(export.index).filter(|region| region.size > 0);
        let region = region.ok_or(Errno::ENODEV)?;
        if export.range.end > region.size {
            return Err(Errno::EINVAL);
        }
        let memory = self.memory.as_ref().filter(|_| region.is_memory());
        let (memory, start) = (memory.ok_or(Errno::EOPNOTSUPP)?, export.range.start);
        let mapped = pins::map_file(&**memory, start, export.range.end - start)?;
        let buf = DmaBuf::new(UserMemory::whole(mapped));
        if !self.memory_enabled() {
            buf.revoke();
        }
        self.exports.retain(|known| known.strong_count() > 0);
        self.exports.push(Arc::downgrade(&buf));
        Ok(buf)
    }

    fn memory_enabled(&self) -> bool {
        self.config.get(COMMAND).is_some_and(|byte| byte & config::MEMORY_SPACE != 0)
    }

    /// Revokes or restores its dma-bufs, whose memory space was enabled or not `before`.
    fn move_exports(&self, before: bool) {
        let exports = self.exports.iter().filter_map(Weak::upgrade);
        match (before, self.memory_enabled()) {
            (true, false) => exports.for_each(|buf| buf.revoke()),
            (false, true) => exports.for_each(|buf| buf.restore()),
            _ => {}
        }
    }

    /// Resets its registers and its memory. Linux saves and restores configuration space
    /// (`pci_try_reset_function`), so the command register stays, as do VFIO's eventfds; dma-bufs
    /// must be mapped again.
    pub fn reset(&mut self) {
        self.exports.iter().filter_map(Weak::upgrade).for_each(|buf| buf.revoke());
        if let Some(edu) = &mut self.edu {
            edu.reset();
        }
        if let Some(memory) = &self.memory {
            // It is as long.
            let _ = sys::write_at(memory.raw(), 0, &[0; edu::MEMORY_SIZE]);
        }
        self.move_exports(false);
        self.interrupt(None);
    }

    /// Reads or writes `bytes`, an aligned piece of at most eight bytes of `region`, at `at`.
    ///
    /// # Errors
    /// `EINVAL` there is nothing; `EIO` memory space is disabled.
    pub fn access(
        &mut self,
        region: Region,
        at: u64,
        bytes: &mut [u8],
        write: bool,
    ) -> Result<(), Errno> {
        match region.index {
            CONFIG_REGION => self.access_config(at, bytes, write),
            // The table is the host's, as in vfio-pci.
            config::MESSAGES if at < config::TABLE_SIZE => {
                if !write {
                    bytes.fill(0xff);
                }
                Ok(())
            }
            _ if !self.memory_enabled() => Err(Errno::EIO),
            config::REGISTERS => self.access_registers(at, bytes, write),
            config::MESSAGES => {
                // No bit is pending.
                if !write {
                    bytes.fill(0);
                }
                Ok(())
            }
            _ => {
                let memory = self.memory.as_ref().ok_or(Errno::EINVAL)?.raw();
                match write {
                    true => sys::write_at(memory, at, bytes),
                    false => sys::read_at(memory, at, bytes),
                }
            }
        }
    }

    fn access_config(&mut self, at: u64, bytes: &mut [u8], write: bool) -> Result<(), Errno> {
        let start = usize::try_from(at).map_err(|_| Errno::EINVAL)?;
        let end = start.checked_add(bytes.len()).ok_or(Errno::EINVAL)?;
        let before = self.memory_enabled();
        let space = self.config.get_mut(start..end).ok_or(Errno::EINVAL)?;
        let mut reset = false;
        for ((offset, place), byte) in (start..).zip(space).zip(bytes) {
            match offset {
                _ if !write => *byte = *place,
                COMMAND => *place = *byte & config::COMMAND_BITS,
                offset if offset == COMMAND + 1 => *place = *byte & config::INTERRUPT_DISABLE,
                config::DEVICE_CONTROL if self.kind.is_express() => {
                    reset |= *byte & config::INITIATE_RESET != 0;
                }
                _ => {}
            }
        }
        if reset {
            self.reset();
        } else if write {
            self.move_exports(before);
            self.interrupt(None);
        }
        Ok(())
    }

    fn access_registers(&mut self, at: u64, bytes: &mut [u8], write: bool) -> Result<(), Errno> {
        let bus_master = self.bus_master();
        let edu = self.edu.as_mut().ok_or(Errno::EINVAL)?;
        let mut value = [0; size_of::<u64>()];
        if write {
            value.iter_mut().zip(&*bytes).for_each(|(to, from)| *to = *from);
            let raised = edu.write(at, bytes.len(), u64::from_le_bytes(value), bus_master);
            self.interrupt(raised);
        } else {
            value = edu.read(at, bytes.len()).to_le_bytes();
            bytes.iter_mut().zip(value).for_each(|(to, from)| *to = from);
        }
        Ok(())
    }

    /// The pin follows the registers; a message is sent if causes were `raised`.
    fn interrupt(&mut self, raised: Option<u32>) {
        if let Some(causes) = raised {
            self.irqs.send(causes);
        }
        let pending = self.edu.as_ref().is_some_and(Edu::interrupt_pending);
        let command = self.config.get(COMMAND + 1).copied().unwrap_or(0);
        if let Some(status) = self.config.get_mut(config::STATUS) {
            let bit = config::STATUS_INTERRUPT;
            *status = *status & !bit | if pending { bit } else { 0 };
        }
        self.irqs.set_level(pending && command & config::INTERRUPT_DISABLE == 0);
    }

    fn bus_master(&self) -> bool {
        self.config.get(COMMAND).is_some_and(|byte| byte & config::BUS_MASTER != 0)
    }

    /// Continues a DMA whose page requests are answered; returns whether one is still waiting.
    pub fn resume(&mut self) -> bool {
        let bus_master = self.bus_master();
        let Some(edu) = &mut self.edu else { return false };
        let raised = edu.resume(bus_master);
        let waits = edu.waits();
        self.interrupt(raised);
        waits
    }
}

impl Drop for Function {
    fn drop(&mut self) {
        // The device is closed.
        self.exports.iter().filter_map(Weak::upgrade).for_each(|buf| buf.revoke());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(kind: Kind) -> Function {
        Function::new(kind, Services::default(), None).unwrap()
    }

    fn read(function: &mut Function, index: u32, at: u64) -> u64 {
        let mut bytes = [0; 8];
        let region = function.region(index).unwrap();
        function.access(region, at, &mut bytes, false).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn write(function: &mut Function, index: u32, at: u64, bytes: &[u8]) {
        let region = function.region(index).unwrap();
        function.access(region, at, &mut bytes.to_vec(), true).unwrap();
    }

    #[test]
    fn regions() {
        let flags = |function: &Function| {
            let of = |index| function.region(index).map(|region| (region.size, region.flags()));
            [0, 1, 2, 3, 7, 8, 9].map(of)
        };
        let (none, conventional, express) =
            (Some((0, 0)), function(Kind::Conventional), function(Kind::Endpoint));
        assert_eq!(flags(&conventional), [none, none, none, none, Some((256, 3)), none, None]);
        let (messages, memory) = (Some((0x1000, 3)), Some((0x4000, 7)));
        let config = Some((4096, 3));
        assert_eq!(flags(&express), [none, messages, memory, none, config, none, None]);
    }

    #[test]
    fn the_table_is_the_host_s() {
        let mut function = function(Kind::Integrated);
        write(&mut function, config::MESSAGES, 8, &[7; 8]);
        assert_eq!(read(&mut function, config::MESSAGES, 8), u64::MAX);
        assert_eq!(read(&mut function, config::MESSAGES, config::TABLE_SIZE), 0);
        assert_eq!(read(&mut function, config::MESSAGES, 0x800), 0, "nothing is pending");
    }

    #[test]
    fn a_reset_leaves_the_command_register_only() {
        for by_config in [false, true] {
            let mut function = function(Kind::Integrated);
            assert_eq!(read(&mut function, CONFIG_REGION, COMMAND as u64) & 0xffff, 2, "as opened");
            write(&mut function, CONFIG_REGION, COMMAND as u64, &[6, 4]);
            write(&mut function, config::MEMORY, 0x1ff8, b"a secret");
            let before = read(&mut function, config::MEMORY, 0x1ff8);
            assert_eq!(before.to_le_bytes(), *b"a secret");
            if by_config {
                let control = config::DEVICE_CONTROL as u64;
                write(&mut function, CONFIG_REGION, control, &[0x7f]);
                assert_eq!(read(&mut function, config::MEMORY, 0x1ff8), before, "another bit");
                write(&mut function, CONFIG_REGION, control, &[0x80]);
            } else {
                function.reset();
            }
            assert_eq!(read(&mut function, config::MEMORY, 0x1ff8), 0);
            let mut expected = Kind::Integrated.config_space(Services::default());
            expected[COMMAND..COMMAND + 2].copy_from_slice(&[6, 4]);
            assert_eq!(function.config, expected);
        }
    }

    #[test]
    fn nothing_answers_while_memory_space_is_disabled() {
        let mut function = function(Kind::Integrated);
        write(&mut function, CONFIG_REGION, COMMAND as u64, &[4]);
        let mut outcome = |index, at, write| {
            let region = function.region(index).unwrap();
            function.access(region, at, &mut [0; 8], write).map_err(Errno::raw)
        };
        for write in [false, true] {
            assert_eq!(outcome(config::MEMORY, 0, write), Err(libc::EIO));
            assert_eq!(outcome(config::MESSAGES, config::TABLE_SIZE, write), Err(libc::EIO));
            assert_eq!(outcome(config::MESSAGES, 0, write), Ok(()), "the table is the host's");
        }
    }

    #[test]
    fn a_conventional_function_has_no_such_reset() {
        let mut function = function(Kind::Conventional);
        write(&mut function, CONFIG_REGION, COMMAND as u64, &[6]);
        write(&mut function, CONFIG_REGION, config::DEVICE_CONTROL as u64, &[0x80]);
        assert_eq!(read(&mut function, CONFIG_REGION, COMMAND as u64) & 0xff, 6);
    }
}
