// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A VFIO device: `/dev/vfio/devices/vfioN`.
//!
//! The ioctls that concern iommufd are the emulated host's; here is the device's file itself, as in
//! `linux/vfio.h`: its regions, by `pread` and `pwrite`, and by `mmap` what is memory; interrupts
//! and resets. The function behind it is [`Function`].

use std::mem::size_of;
use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use twostage::iommufd::Errno;
use twostage_emulated::uapi::{self, vfio_request, DeviceFile, UserSpace};
use twostage_emulated::uapi::{ATTACH_IOMMUFD_PT, BIND_IOMMUFD, DETACH_IOMMUFD_PT};
use twostage_emulated::MmapRequest;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_PCI_NUM_REGIONS as REGIONS,
};

use crate::callers::process::Process;
use crate::files::features::{feature, BarFile};
use crate::files::file::{Answer, Argument, Call, Caller, Excess, File, Pages};
use crate::files::function::{Function, Region};
use crate::files::info::{copy_in, copy_out, u32_at, Place};
use crate::files::iommufd::OpenTestFile;
use crate::files::irqs::IRQS;
use crate::files::users::{Blocked, Groups};
use crate::table::Internal;

const GET_INFO: u32 = vfio_request(7);
const GET_REGION_INFO: u32 = vfio_request(8);
const GET_IRQ_INFO: u32 = vfio_request(9);
const SET_IRQS: u32 = vfio_request(10);
const RESET: u32 = vfio_request(11);
const GET_PCI_HOT_RESET_INFO: u32 = vfio_request(12);
const PCI_HOT_RESET: u32 = vfio_request(13);
const FEATURE: u32 = vfio_request(17);

const DEVICE_FLAGS: u32 = VFIO_DEVICE_FLAGS_RESET | VFIO_DEVICE_FLAGS_PCI;
/// A region's offset in the file is its index, shifted by this, as in vfio-pci.
const REGION_SHIFT: u32 = 40;
const PAGE_SIZE: u64 = 4096;

/// An open device.
#[derive(Debug)]
pub struct Device {
    name: String,
    place: Place,
    /// Of its machine, unless it was opened through its group, which is blocked while it is bound.
    groups: Option<Arc<Groups>>,
    // Unbound before the group is released.
    file: DeviceFile,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Its object, while it is bound.
    bound: Option<u32>,
    blocked: Option<Blocked>,
    function: Function,
}

impl Device {
    /// The device `name` at `place` behind `file`.
    pub fn new(name: String, place: Place, file: DeviceFile, function: Function) -> Self {
        let state = State { bound: None, blocked: None, function };
        Self { name, place, groups: None, file, state: Mutex::new(state) }
    }

    /// The same, opened by its character device: while it is bound, its group in `groups` cannot be
    /// opened.
    pub fn outside_group(self, groups: Arc<Groups>) -> Self {
        Self { groups: Some(groups), ..self }
    }

    /// Binds it to the iommufd of `process`, whatever descriptor that passes.
    ///
    /// # Errors
    /// As `VFIO_DEVICE_BIND_IOMMUFD`.
    pub fn bind(&self, process: &dyn uapi::Process) -> Result<(), Errno> {
        // argsz, flags, iommufd, out_devid
        let mut argument: Vec<u8> =
            [16u32, 0, 0, 0].into_iter().flat_map(u32::to_ne_bytes).collect();
        self.file.ioctl(BIND_IOMMUFD, &mut argument, process)?;
        self.state().bound = Some(u32_at(&argument, 12));
        Ok(())
    }

    /// Attaches it to `pt`.
    ///
    /// # Errors
    /// As `VFIO_DEVICE_ATTACH_IOMMUFD_PT`.
    pub fn attach(&self, pt: u32, process: &dyn uapi::Process) -> Result<(), Errno> {
        // argsz, flags, pt_id
        let mut argument: Vec<u8> = [12, 0, pt].into_iter().flat_map(u32::to_ne_bytes).collect();
        self.file.ioctl(ATTACH_IOMMUFD_PT, &mut argument, process)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    fn ioctl(&self, caller: &dyn Caller, request: u32, address: u64) -> Result<i64, Errno> {
        let process = caller.process();
        let bound = self.state().bound;
        match (request, bound) {
            (BIND_IOMMUFD | ATTACH_IOMMUFD_PT | DETACH_IOMMUFD_PT, _) => {}
            (_, None) => return Err(Errno::EINVAL),
            (RESET, _) => {
                self.state().function.reset();
                return Ok(0);
            }
            (GET_INFO, _) => return device_info(process, address),
            (GET_REGION_INFO, _) => return self.region_info(process, address),
            (GET_IRQ_INFO, _) => return self.irq_info(process, address),
            (SET_IRQS, _) => return self.state().function.irqs.set(process, address),
            (GET_PCI_HOT_RESET_INFO, dev) => {
                let dev = dev.filter(|_| self.groups.is_some());
                return self.place.reset_info(process, address, dev);
            }
            (PCI_HOT_RESET, _) => {
                self.place.may_reset(caller, address, self.groups.is_some())?;
                self.state().function.reset();
                return Ok(0);
            }
            (FEATURE, _) => {
                let has_bar = |index| {
                    self.state().function.region(index).is_some_and(|region| region.size > 0)
                };
                let Some(export) = feature(process, address, has_bar)? else { return Ok(0) };
                let buf = self.state().function.export(&export)?;
                return caller.open(Arc::new(OpenTestFile(Arc::new(BarFile(buf))))).map(i64::from);
            }
            _ => return Err(Errno::ENOTTY),
        }
        let mut argument = Argument::copy_in(process, address, Excess::Ignored)?;
        let mut blocked = None;
        if let (BIND_IOMMUFD, Some(groups)) = (request, &self.groups) {
            blocked = Some(groups.block(self.place.group)?);
        }
        self.file.ioctl(request, &mut argument.bytes, caller)?;
        argument.copy_out(process)?;
        if request == BIND_IOMMUFD {
            let mut state = self.state();
            (state.bound, state.blocked) = (Some(u32_at(&argument.bytes, 12)), blocked);
        }
        Ok(0)
    }

    /// `struct vfio_region_info`: argsz, flags, index, cap_offset, size, offset.
    fn region_info(&self, process: &Process, address: u64) -> Result<i64, Errno> {
        let mut info = [0; 32];
        copy_in(process, address, &mut info)?;
        let index = u32_at(&info, 8);
        let region = self.state().function.region(index).ok_or(Errno::EINVAL)?;
        let words = |number: u64| [number as u32, (number >> 32) as u32];
        let ([size, more], [offset, high]) =
            (words(region.size), words(u64::from(index) << REGION_SHIFT));
        copy_out(process, address, &[region.flags(), index, 0, size, more, offset, high])
    }

    /// `struct vfio_irq_info`: argsz, flags, index, count.
    fn irq_info(&self, process: &Process, address: u64) -> Result<i64, Errno> {
        let mut info = [0; 16];
        copy_in(process, address, &mut info)?;
        let index = u32_at(&info, 8);
        let (flags, count) = self.state().function.irqs.info(index)?;
        copy_out(process, address, &[flags, index, count])
    }

    /// Accesses `count` bytes at `offset` of the file, like vfio-pci: in aligned pieces of at most
    /// a register, each by `piece`; of a BAR as many as exist.
    ///
    /// # Errors
    /// `EINVAL` there is no such region, or the BAR is too small; `EFAULT` not all of it is in
    /// configuration space; those of `piece`.
    fn access(
        &self,
        offset: u64,
        count: u64,
        mut piece: impl FnMut(&mut Function, Region, u64, usize) -> Result<(), Errno>,
    ) -> Result<i64, Errno> {
        let mut state = self.state();
        if state.bound.is_none() {
            return Err(Errno::EINVAL);
        }
        let (region, at) = region_at(&state.function, offset)?;
        let (end, widest) = if region.is_config() {
            let end = at.checked_add(count).filter(|end| *end <= region.size);
            (end.ok_or(Errno::EFAULT)?, 4)
        } else if at < region.size {
            (at + count.min(region.size - at), 8)
        } else {
            return Err(Errno::EINVAL);
        };
        let mut from = at;
        while from < end {
            let fits = |width: &u64| {
                *width <= widest && from.is_multiple_of(*width) && from + width <= end
            };
            // One byte always fits.
            let width = [8, 4, 2].into_iter().find(fits).unwrap_or(1);
            piece(&mut state.function, region, from, width as usize)?;
            from += width;
        }
        // No larger than a region.
        Ok((end - at) as i64)
    }

    /// What to map for `request`; `file`, an open one of the device, stays open meanwhile.
    ///
    /// # Errors
    /// As vfio-pci: `EINVAL` that cannot be mapped.
    pub fn pages(&self, request: MmapRequest, file: Arc<dyn File>) -> Result<Pages, Errno> {
        let state = self.state();
        let (region, offset) = region_at(&state.function, request.offset)?;
        let length = request.length.checked_next_multiple_of(PAGE_SIZE).ok_or(Errno::EINVAL)?;
        let memory = state.function.memory().filter(|_| {
            let fits = offset.checked_add(length).is_some_and(|end| end <= region.size);
            state.bound.is_some() && request.shared && region.is_memory() && fits
        });
        Ok(Pages::Device { memory: memory.ok_or(Errno::EINVAL)?.clone(), offset, _file: file })
    }
}

/// The region at `offset` of the file, and the offset in it.
///
/// # Errors
/// `EINVAL` there is none.
fn region_at(function: &Function, offset: u64) -> Result<(Region, u64), Errno> {
    let index = u32::try_from(offset >> REGION_SHIFT).map_err(|_| Errno::EINVAL)?;
    let region = function.region(index).filter(|region| region.size > 0).ok_or(Errno::EINVAL)?;
    Ok((region, offset & ((1 << REGION_SHIFT) - 1)))
}

/// `struct vfio_device_info`: argsz, flags, num_regions, num_irqs, and a longer one's cap_offset.
fn device_info(process: &Process, address: u64) -> Result<i64, Errno> {
    let argsz = copy_in(process, address, &mut [0; 16])?;
    let words = [DEVICE_FLAGS, REGIONS, IRQS, 0];
    let known = if argsz < 20 { 3 } else { 4 };
    copy_out(process, address, words.get(..known).unwrap_or_default())
}

impl File for Device {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn call(&self, caller: &dyn Caller, call: Call) -> Result<Answer, Errno> {
        let process = caller.process();
        let done = match call {
            Call::Ioctl { request, argument } => self.ioctl(caller, request, argument)?,
            Call::Read { mut to, count, offset } => {
                self.access(offset.unwrap_or(0), count, |function, region, at, width| {
                    let mut bytes = [0; size_of::<u64>()];
                    let bytes = bytes.get_mut(..width).unwrap_or_default();
                    function.access(region, at, bytes, false)?;
                    process.write(to, bytes).map_err(|_| Errno::EFAULT)?;
                    to = to.wrapping_add(width as u64);
                    Ok(())
                })?
            }
            Call::Write { mut from, count, offset } => {
                self.access(offset.unwrap_or(0), count, |function, region, at, width| {
                    let mut bytes = [0; size_of::<u64>()];
                    let bytes = bytes.get_mut(..width).unwrap_or_default();
                    process.read(from, bytes).map_err(|_| Errno::EFAULT)?;
                    function.access(region, at, bytes, true)?;
                    from = from.wrapping_add(width as u64);
                    Ok(())
                })?
            }
        };
        Ok(done.into())
    }

    fn map(self: Arc<Self>, request: MmapRequest) -> Result<Pages, Errno> {
        self.pages(request, self.clone())
    }

    fn resume(&self) -> bool {
        self.state().function.resume()
    }

    fn wake_event(&self) -> Option<Arc<Internal>> {
        self.state().function.irqs.wake_event()
    }

    fn woken(&self) {
        self.state().function.irqs.woken();
    }
}
