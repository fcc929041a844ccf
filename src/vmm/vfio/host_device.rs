// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A VFIO device as the rest of this module knows it: regions and interrupts, in the terms of
//! `linux/vfio.h`.

use std::fmt::Debug;
use std::io;

use vmm_sys_util::eventfd::EventFd;

use super::mapping::Mapping;
use super::region::Region;

/// What a VFIO device can do. Any thread may call it at any time.
pub trait HostDevice: Debug + Send + Sync {
    /// `VFIO_DEVICE_GET_REGION_INFO`: region `index`, a BAR by its number or
    /// `VFIO_PCI_CONFIG_REGION_INDEX`. A region that the device does not have is empty.
    ///
    /// # Errors
    /// What VFIO says.
    fn region(&self, index: u32) -> io::Result<Region>;

    /// Reads `data.len()` bytes at `offset` of `region`.
    ///
    /// # Errors
    /// What VFIO says; `EIO` while a BAR is not decoded.
    fn read(&self, region: &Region, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes `data` at `offset` of `region`.
    ///
    /// # Errors
    /// As [`HostDevice::read`].
    fn write(&self, region: &Region, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Maps `length` bytes at `offset` of `region`, all of which must be mappable.
    ///
    /// # Errors
    /// What `mmap(2)` says.
    fn map(&self, region: &Region, offset: u64, length: u64) -> io::Result<Mapping>;

    /// `VFIO_DEVICE_GET_IRQ_INFO`.
    ///
    /// # Errors
    /// What VFIO says.
    fn irq(&self, irq: Irq) -> io::Result<IrqInfo>;

    /// `VFIO_DEVICE_SET_IRQS`: from now on the interrupts of `irq` from number `start` on write
    /// `events`; where there is none, that interrupt is off. The first such call switches the kind
    /// of interrupt on, and only one kind is on at a time.
    ///
    /// # Errors
    /// What VFIO says; `ENOSPC` when the host has not as many interrupts.
    fn set_triggers(&self, irq: Irq, start: u32, events: &[Option<&EventFd>]) -> io::Result<()>;

    /// From now on writing `event` lets INTx, which masks itself when it is sent, be sent again.
    ///
    /// # Errors
    /// What VFIO says.
    fn set_intx_unmask(&self, event: &EventFd) -> io::Result<()>;

    /// Switches that kind of interrupt off.
    ///
    /// # Errors
    /// What VFIO says.
    fn disable_irq(&self, irq: Irq) -> io::Result<()>;

    /// Whether [`HostDevice::reset`] can do anything.
    fn can_reset(&self) -> bool;

    /// `VFIO_DEVICE_RESET`.
    ///
    /// # Errors
    /// What VFIO says.
    fn reset(&self) -> io::Result<()>;
}

/// The kinds of interrupts of a PCI device: `VFIO_PCI_*_IRQ_INDEX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Irq {
    /// The interrupt pin.
    Intx = 0,
    /// Messages, by the MSI capability.
    Msi = 1,
    /// Messages, by the MSI-X capability.
    Msix = 2,
}

/// What VFIO says of a kind of interrupts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IrqInfo {
    /// How many there are.
    pub count: u32,
    /// `VFIO_IRQ_INFO_NORESIZE`: all that will be used must be there from the first.
    pub fixed: bool,
}
