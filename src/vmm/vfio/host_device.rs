// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A VFIO device for the rest of this module: regions and interrupts, in the terms of
//! `linux/vfio.h`.

use std::fmt::Debug;
use std::io;

use vmm_sys_util::eventfd::EventFd;

use super::mapping::Mapping;
use super::region::Region;

/// The operations of a VFIO device. Any thread may call it at any time.
pub trait HostDevice: Debug + Send + Sync {
    /// `VFIO_DEVICE_GET_REGION_INFO`: region `index`, a BAR by its number or
    /// `VFIO_PCI_CONFIG_REGION_INDEX`. A missing region is empty.
    ///
    /// # Errors
    /// VFIO's error.
    fn region(&self, index: u32) -> io::Result<Region>;

    /// Reads `data.len()` bytes at `offset` of `region`.
    ///
    /// # Errors
    /// VFIO's error; `EIO` while a BAR is not decoded.
    fn read(&self, region: &Region, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes `data` at `offset` of `region`.
    ///
    /// # Errors
    /// As [`HostDevice::read`].
    fn write(&self, region: &Region, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Maps `length` bytes at `offset` of `region`, all of which must be mappable.
    ///
    /// # Errors
    /// The error of `mmap(2)`.
    fn map(&self, region: &Region, offset: u64, length: u64) -> io::Result<Mapping>;

    /// `VFIO_DEVICE_GET_IRQ_INFO`.
    ///
    /// # Errors
    /// VFIO's error.
    fn irq(&self, irq: Irq) -> io::Result<IrqInfo>;

    /// `VFIO_DEVICE_SET_IRQS`: the interrupts of `irq` from number `start` on write `events`;
    /// `None` disables one. The first such call enables the kind of interrupt; only one kind is
    /// enabled at a time.
    ///
    /// # Errors
    /// VFIO's error; `ENOSPC` if the host has too few interrupts.
    fn set_triggers(&self, irq: Irq, start: u32, events: &[Option<&EventFd>]) -> io::Result<()>;

    /// `event` unmasks INTx, which masks itself when it is sent.
    ///
    /// # Errors
    /// VFIO's error.
    fn set_intx_unmask(&self, event: &EventFd) -> io::Result<()>;

    /// Disables that kind of interrupt.
    ///
    /// # Errors
    /// VFIO's error.
    fn disable_irq(&self, irq: Irq) -> io::Result<()>;

    /// Whether [`HostDevice::reset`] is supported.
    fn can_reset(&self) -> bool;

    /// `VFIO_DEVICE_RESET`.
    ///
    /// # Errors
    /// VFIO's error.
    fn reset(&self) -> io::Result<()>;
}

/// The kinds of interrupts of a PCI device: `VFIO_PCI_*_IRQ_INDEX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Irq {
    /// The interrupt pin.
    Intx = 0,
    /// The MSI capability.
    Msi = 1,
    /// The MSI-X capability.
    Msix = 2,
}

/// VFIO's information about a kind of interrupts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IrqInfo {
    /// Their number.
    pub count: u32,
    /// `VFIO_IRQ_INFO_NORESIZE`: all vectors to be used must be set at first.
    pub fixed: bool,
}
