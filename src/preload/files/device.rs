// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A VFIO device: `/dev/vfio/devices/vfioN`; and the groups, which its binding keeps from being
//! opened.
//!
//! The ioctls that concern iommufd are the emulated host's; here is the device itself, as in
//! `linux/vfio.h`: a PCI function with configuration space and BAR 0, both by `pread` and `pwrite`.
//! Its interrupts are MSI and the pin. Its regions cannot be mapped: the registers have effects.

use std::any::Any;
use std::collections::BTreeMap;
use std::mem::size_of;
use std::sync::{Arc, MutexGuard, Weak};
use twostage::sync::Mutex;

use twostage::iommufd::Errno;
use twostage_emulated::edu;
use twostage_emulated::uapi::{self, vfio_request, DeviceFile, UserSpace};
use twostage_emulated::uapi::{ATTACH_IOMMUFD_PT, BIND_IOMMUFD, DETACH_IOMMUFD_PT};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_PCI_BAR0_REGION_INDEX as BAR0_REGION,
    VFIO_PCI_CONFIG_REGION_INDEX as CONFIG_REGION, VFIO_PCI_NUM_REGIONS as REGIONS,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};

use crate::callers::process::Process;
use crate::files::edu::Edu;
use crate::files::file::{Answer, Argument, Call, Caller, Excess, File};
use crate::files::irqs::{self, Irqs, IRQS};
use crate::table::Internal;

const GET_INFO: u32 = vfio_request(7);
const GET_REGION_INFO: u32 = vfio_request(8);
const GET_IRQ_INFO: u32 = vfio_request(9);
const SET_IRQS: u32 = vfio_request(10);
const RESET: u32 = vfio_request(11);
const GET_PCI_HOT_RESET_INFO: u32 = vfio_request(12);
const PCI_HOT_RESET: u32 = vfio_request(13);

const DEVICE_FLAGS: u32 = VFIO_DEVICE_FLAGS_RESET | VFIO_DEVICE_FLAGS_PCI;
const REGION_FLAGS: u32 = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
/// A region's offset in the file is its index, shifted by this, as in vfio-pci.
const REGION_SHIFT: u32 = 40;

/// Of BAR 0, in bytes.
pub const BAR_SIZE: u64 = edu::BAR_SIZE as u64;
const CONFIG_SIZE: usize = 256;
const COMMAND: usize = 0x04;
/// Memory space, bus master: the writable bits of the command register's first byte.
const COMMAND_BITS: u8 = 0b110;
const BUS_MASTER: u8 = 0b100;
/// The pin is not asserted: the writable bit of the second.
const INTERRUPT_DISABLE: u8 = 1 << 2;
/// Status: there is a capability list. The pointer to the first, and its offset: MSI.
const STATUS: usize = 0x06;
/// An interrupt is pending.
const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CAPABILITIES_POINTER: usize = 0x34;
/// 1: INTA.
const INTERRUPT_PIN: usize = 0x3d;
const MSI: usize = 0x40;

/// An open device.
#[derive(Debug)]
pub struct Device {
    name: String,
    /// The group that is blocked while it is bound, unless it was opened through the group.
    group: Option<(Arc<Groups>, u32)>,
    // Unbound before the group is released.
    file: DeviceFile,
    state: Mutex<Function>,
}

/// The PCI function behind it.
#[derive(Debug)]
struct Function {
    bound: bool,
    blocked: Option<Blocked>,
    config: [u8; CONFIG_SIZE],
    edu: Option<Edu>,
    irqs: Irqs,
}

impl Device {
    /// The device `name` behind `file`, with or without an engine.
    pub fn new(name: String, file: DeviceFile, edu: Option<Edu>) -> Self {
        let function = Function {
            bound: false,
            blocked: None,
            config: config_space(),
            edu,
            irqs: Irqs::default(),
        };
        Self { name, group: None, file, state: Mutex::new(function) }
    }

    /// The same, opened by its character device: while it is bound, group `number` of `groups`
    /// cannot be opened.
    pub fn outside_group(self, groups: Arc<Groups>, number: u32) -> Self {
        Self { group: Some((groups, number)), ..self }
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
        self.function().bound = true;
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

    fn function(&self) -> MutexGuard<'_, Function> {
        self.state.lock()
    }

    fn ioctl(&self, caller: &dyn Caller, request: u32, address: u64) -> Result<i64, Errno> {
        let process = caller.process();
        match request {
            BIND_IOMMUFD | ATTACH_IOMMUFD_PT | DETACH_IOMMUFD_PT => {}
            _ if !self.function().bound => return Err(Errno::EINVAL),
            RESET => {
                self.function().reset();
                return Ok(0);
            }
            GET_INFO => return answer(process, address, [DEVICE_FLAGS, REGIONS, IRQS], 0),
            GET_REGION_INFO => return self.region_info(process, address),
            GET_IRQ_INFO => return irq_info(process, address),
            SET_IRQS => return self.function().irqs.set(process, address),
            // The machine has no bridges whose bus could be reset.
            GET_PCI_HOT_RESET_INFO | PCI_HOT_RESET => return Err(Errno::ENODEV),
            _ => return Err(Errno::ENOTTY),
        }
        let mut argument = Argument::copy_in(process, address, Excess::Ignored)?;
        let mut blocked = None;
        if let (BIND_IOMMUFD, Some((groups, number))) = (request, &self.group) {
            blocked = Some(groups.block(*number)?);
        }
        self.file.ioctl(request, &mut argument.bytes, caller)?;
        argument.copy_out(process)?;
        if request == BIND_IOMMUFD {
            let mut function = self.function();
            (function.bound, function.blocked) = (true, blocked);
        }
        Ok(0)
    }

    /// `struct vfio_region_info`: argsz, flags, index, cap_offset, size, offset.
    fn region_info(&self, process: &Process, address: u64) -> Result<i64, Errno> {
        let mut info = [0; 32];
        let argsz = copy_in(process, address, &mut info)?;
        if argsz < info.len() {
            return Err(Errno::EINVAL);
        }
        let index = u32_at(&info, 8);
        let size = match index {
            BAR0_REGION if self.function().edu.is_some() => BAR_SIZE,
            CONFIG_REGION => CONFIG_SIZE as u64,
            _ if index < REGIONS => 0,
            _ => return Err(Errno::EINVAL),
        };
        let flags = if size > 0 { REGION_FLAGS } else { 0 };
        let offset = u64::from(index) << REGION_SHIFT;
        let words = [flags, index, 0, size as u32, (size >> 32) as u32, offset as u32];
        answer(process, address, words, (offset >> 32) as u32)
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
        mut piece: impl FnMut(&mut Function, Place, usize) -> Result<(), Errno>,
    ) -> Result<i64, Errno> {
        let mut function = self.function();
        if !function.bound {
            return Err(Errno::EINVAL);
        }
        let (region, at) = (offset >> REGION_SHIFT, offset & ((1 << REGION_SHIFT) - 1));
        let (place, widest): (fn(u64) -> Place, _) = match u32::try_from(region) {
            Ok(CONFIG_REGION) => (Place::Config, 4),
            Ok(BAR0_REGION) if function.edu.is_some() && at < BAR_SIZE => (Place::Bar, 8),
            _ => return Err(Errno::EINVAL),
        };
        let end = match place(at) {
            Place::Bar(_) => at + count.min(BAR_SIZE - at),
            Place::Config(_) => {
                let end = at.checked_add(count).filter(|end| *end <= CONFIG_SIZE as u64);
                end.ok_or(Errno::EFAULT)?
            }
        };
        let mut from = at;
        while from < end {
            let fits = |width: &u64| {
                *width <= widest && from.is_multiple_of(*width) && from + width <= end
            };
            // One byte always fits.
            let width = [8, 4, 2].into_iter().find(fits).unwrap_or(1);
            piece(&mut function, place(from), width as usize)?;
            from += width;
        }
        // No larger than a region.
        Ok((end - at) as i64)
    }
}

/// A byte of a region.
#[derive(Debug, Clone, Copy)]
enum Place {
    Config(u64),
    Bar(u64),
}

impl Function {
    fn reset(&mut self) {
        self.config = config_space();
        if let Some(edu) = &mut self.edu {
            edu.reset();
        }
        self.interrupt(false);
    }

    /// Reads or writes `bytes`, a piece of a region.
    fn access(&mut self, place: Place, bytes: &mut [u8], write: bool) -> Result<(), Errno> {
        match place {
            Place::Config(at) => self.access_config(at, bytes, write),
            Place::Bar(at) => self.access_bar(at, bytes, write),
        }
    }

    fn access_config(&mut self, at: u64, bytes: &mut [u8], write: bool) -> Result<(), Errno> {
        let start = usize::try_from(at).map_err(|_| Errno::EINVAL)?;
        let end = start.checked_add(bytes.len()).ok_or(Errno::EINVAL)?;
        let space = self.config.get_mut(start..end).ok_or(Errno::EINVAL)?;
        for ((offset, place), byte) in space.iter_mut().enumerate().zip(bytes) {
            if !write {
                *byte = *place;
            } else if start + offset == COMMAND {
                *place = *byte & COMMAND_BITS;
            } else if start + offset == COMMAND + 1 {
                *place = *byte & INTERRUPT_DISABLE;
            }
        }
        if write {
            self.interrupt(false);
        }
        Ok(())
    }

    /// The pin follows the registers; a message is sent if a cause was `raised`.
    fn interrupt(&mut self, raised: bool) {
        if raised {
            self.irqs.send();
        }
        let pending = self.edu.as_ref().is_some_and(Edu::interrupt_pending);
        let disabled =
            self.config.get(COMMAND + 1).is_some_and(|byte| byte & INTERRUPT_DISABLE != 0);
        if let Some(status) = self.config.get_mut(STATUS) {
            *status = STATUS_CAPABILITIES | if pending { STATUS_INTERRUPT } else { 0 };
        }
        self.irqs.set_level(pending && !disabled);
    }

    fn bus_master(&self) -> bool {
        self.config.get(COMMAND).is_some_and(|byte| byte & BUS_MASTER != 0)
    }

    /// Continues a DMA whose page requests are answered; returns whether one is still waiting.
    fn resume(&mut self) -> bool {
        let bus_master = self.bus_master();
        let Some(edu) = &mut self.edu else { return false };
        let raised = edu.resume(bus_master);
        let waits = edu.waits();
        self.interrupt(raised);
        waits
    }

    fn access_bar(&mut self, at: u64, bytes: &mut [u8], write: bool) -> Result<(), Errno> {
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
                self.access(offset.unwrap_or(0), count, |function, place, width| {
                    let mut bytes = [0; size_of::<u64>()];
                    let bytes = bytes.get_mut(..width).unwrap_or_default();
                    function.access(place, bytes, false)?;
                    process.write(to, bytes).map_err(|_| Errno::EFAULT)?;
                    to = to.wrapping_add(width as u64);
                    Ok(())
                })?
            }
            Call::Write { mut from, count, offset } => {
                self.access(offset.unwrap_or(0), count, |function, place, width| {
                    let mut bytes = [0; size_of::<u64>()];
                    let bytes = bytes.get_mut(..width).unwrap_or_default();
                    process.read(from, bytes).map_err(|_| Errno::EFAULT)?;
                    function.access(place, bytes, true)?;
                    from = from.wrapping_add(width as u64);
                    Ok(())
                })?
            }
        };
        Ok(done.into())
    }

    fn resume(&self) -> bool {
        self.function().resume()
    }

    fn wake_event(&self) -> Option<Arc<Internal>> {
        self.function().irqs.wake_event()
    }

    fn woken(&self) {
        self.function().irqs.woken();
    }
}

/// The configuration space of a function after reset.
pub fn config_space() -> [u8; CONFIG_SIZE] {
    let mut space = [0; CONFIG_SIZE];
    // Vendor and device, command and status, revision and class.
    let header = [0x34, 0x12, 0xe8, 0x11, 0, 0, 0, 0, 0x10, 0, 0xff, 0];
    space.iter_mut().zip(header).for_each(|(to, from)| *to = from);
    space[STATUS] = STATUS_CAPABILITIES;
    space[CAPABILITIES_POINTER] = MSI as u8;
    space[INTERRUPT_PIN] = 1;
    // MSI (PCIe 6.0 §7.7.1): one vector, a 64-bit address. The message itself is up to the host.
    space[MSI] = 5;
    space[MSI + 2] = 1 << 7;
    space
}

/// Fills `structure` from `address` on; returns the length in its first field.
fn copy_in(process: &Process, address: u64, structure: &mut [u8]) -> Result<usize, Errno> {
    process.read(address, structure).map_err(|_| Errno::EFAULT)?;
    Ok(u32_at(structure, 0) as usize)
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let word = bytes.get(offset..).and_then(|rest| rest.first_chunk());
    word.map_or(0, |word| u32::from_ne_bytes(*word))
}

/// `struct vfio_irq_info`: argsz, flags, index, count.
fn irq_info(process: &Process, address: u64) -> Result<i64, Errno> {
    let mut info = [0; 16];
    let argsz = copy_in(process, address, &mut info)?;
    let index = u32_at(&info, 8);
    if argsz < info.len() {
        return Err(Errno::EINVAL);
    }
    let (flags, count) = irqs::info(index)?;
    answer(process, address, [flags, index], count)
}

/// Writes `words` and `last` after the first field of the structure at `address`, whose length is
/// known to suffice or checked here.
fn answer<const N: usize>(
    process: &Process,
    address: u64,
    words: [u32; N],
    last: u32,
) -> Result<i64, Errno> {
    let bytes: Vec<u8> = words.into_iter().chain([last]).flat_map(u32::to_ne_bytes).collect();
    let mut head = [0; size_of::<u32>()];
    let argsz = copy_in(process, address, &mut head)?;
    // The first version of every structure ends with `words`.
    if argsz < size_of::<u32>() * (1 + N) {
        return Err(Errno::EINVAL);
    }
    let room = bytes.len().min(argsz - size_of::<u32>());
    let bytes = bytes.get(..room).unwrap_or_default();
    process.write(address + size_of::<u32>() as u64, bytes).map_err(|_| Errno::EFAULT)?;
    Ok(0)
}

/// The groups of a machine, by number, and their users: as in Linux, a group is open once, or some
/// of its devices are bound through their own character devices, but not both.
#[derive(Debug, Default)]
pub struct Groups(Mutex<BTreeMap<u32, Users>>);

#[derive(Debug, Default)]
struct Users {
    /// The opener, which still has it.
    open: Option<Weak<dyn Any + Send + Sync>>,
    /// Number of devices bound through their own character devices.
    bound: usize,
}

impl Users {
    fn is_open(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.strong_count() > 0)
    }
}

impl Groups {
    /// Opens the group `number`, created by `group`.
    ///
    /// # Errors
    /// `EBUSY` it is open, or a device of it is bound.
    pub fn open<G>(&self, number: u32, group: impl FnOnce() -> G) -> Result<Arc<G>, Errno>
    where
        G: Any + Send + Sync,
    {
        let mut groups = self.lock();
        let users = groups.entry(number).or_default();
        if users.is_open() || users.bound > 0 {
            return Err(Errno::EBUSY);
        }
        let group = Arc::new(group());
        let open: Weak<G> = Arc::downgrade(&group);
        users.open = Some(open);
        Ok(group)
    }

    /// Prevents the group `number` from being opened while the result exists, as a device of it is
    /// to be bound.
    ///
    /// # Errors
    /// `EBUSY` it is open.
    fn block(self: &Arc<Self>, number: u32) -> Result<Blocked, Errno> {
        let mut groups = self.lock();
        let users = groups.entry(number).or_default();
        if users.is_open() {
            return Err(Errno::EBUSY);
        }
        users.bound += 1;
        Ok(Blocked { groups: self.clone(), number })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Users>> {
        self.0.lock()
    }
}

/// A group that cannot be opened.
#[derive(Debug)]
struct Blocked {
    groups: Arc<Groups>,
    number: u32,
}

impl Drop for Blocked {
    fn drop(&mut self) {
        if let Some(users) = self.groups.lock().get_mut(&self.number) {
            users.bound = users.bound.saturating_sub(1);
        }
    }
}
