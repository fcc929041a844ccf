// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! VFIO groups, `/dev/vfio/N`: how programs that use containers get their devices; and opening the
//! machine's devices, in a group or by number.
//!
//! As in a Linux whose containers are iommufds: the group is added to a container, which then has
//! an IOAS; a device opened through the group is bound to that iommufd, and attached to the IOAS.

use std::collections::BTreeMap;
use std::mem::size_of;
use std::sync::{Arc, MutexGuard, Weak};
use twostage::sync::Mutex;

use twostage::iommufd::{Errno, UserMemory};
use twostage::spec::pci::Bdf;
use twostage_emulated::uapi::{self, vfio_request, Credentials, UserFault, UserSpace};
use twostage_emulated::{EmulatedHost, Machine, MmapRequest};
use vfio_bindings::bindings::vfio::{
    VFIO_GROUP_FLAGS_CONTAINER_SET as CONTAINER_SET, VFIO_GROUP_FLAGS_VIABLE as VIABLE,
};

use crate::config::{Device as DeviceEntry, Dma};
use crate::files::config_space::{Kind, Services};
use crate::files::device::Device;
use crate::files::edu::Edu;
use crate::files::file::{Answer, Call, Caller, File, Pages};
use crate::files::function::Function;
use crate::files::info::Place;
use crate::files::users::group_name;
use crate::memory::pins::Pins;
use crate::table::Internal;

const GET_STATUS: u32 = vfio_request(3);
const SET_CONTAINER: u32 = vfio_request(4);
const UNSET_CONTAINER: u32 = vfio_request(5);
const GET_DEVICE_FD: u32 = vfio_request(6);

/// Maximum length of a device name, in bytes.
const LONGEST_NAME: u64 = 64;

/// An open group. Devices opened through it keep it open.
#[derive(Debug)]
pub struct Group {
    number: u32,
    devices: Opener,
    container: Mutex<Option<Arc<EmulatedHost>>>,
    /// The open devices, by number. Held while one is bound or released.
    open: Mutex<BTreeMap<u32, Weak<Device>>>,
}

impl Group {
    /// The group `number`, whose devices `devices` opens.
    pub fn new(number: u32, devices: Opener) -> Self {
        Self { number, devices, container: Mutex::default(), open: Mutex::default() }
    }

    fn container(&self) -> MutexGuard<'_, Option<Arc<EmulatedHost>>> {
        self.container.lock()
    }

    /// `struct vfio_group_status`: argsz, flags.
    fn status(&self, caller: &dyn Caller, address: u64) -> Result<i64, Errno> {
        let mut status = [0; 2 * size_of::<u32>()];
        caller.read(address, &mut status).map_err(|_| Errno::EFAULT)?;
        let argsz = status.first_chunk().map_or(0, |argsz| u32::from_ne_bytes(*argsz));
        if (argsz as usize) < status.len() {
            return Err(Errno::EINVAL);
        }
        let flags = VIABLE | if self.container().is_some() { CONTAINER_SET } else { 0 };
        let address = address + size_of::<u32>() as u64;
        caller.write(address, &flags.to_ne_bytes()).map_err(|_| Errno::EFAULT)?;
        Ok(0)
    }

    fn set_container(&self, caller: &dyn Caller, address: u64) -> Result<i64, Errno> {
        let mut fd = [0; size_of::<i32>()];
        caller.read(address, &mut fd).map_err(|_| Errno::EFAULT)?;
        let host = match uapi::Process::iommufd(caller, i32::from_ne_bytes(fd)) {
            Err(errno) if errno.raw() == libc::EBADF => return Err(errno),
            host => host,
        };
        let mut container = self.container();
        if container.is_some() {
            return Err(Errno::EINVAL);
        }
        let host = host?;
        host.vfio_add_group()?;
        *container = Some(host);
        Ok(0)
    }

    fn unset_container(&self) -> Result<i64, Errno> {
        match self.container().take() {
            Some(_) => Ok(0),
            None => Err(Errno::EINVAL),
        }
    }

    fn open(&self) -> MutexGuard<'_, BTreeMap<u32, Weak<Device>>> {
        self.open.lock()
    }

    /// Opens the device of that name, bound and attached. An open device is opened once more as it
    /// is: all of its descriptors share its binding.
    fn device(self: &Arc<Self>, caller: &dyn Caller, address: u64) -> Result<i64, Errno> {
        let name = read_name(caller, address)?;
        let number = self.devices.named(&name).ok_or(Errno::ENODEV)?;
        let host = self.container().clone().ok_or(Errno::EINVAL)?;
        let mut open = self.open();
        let device = match open.get(&number).and_then(Weak::upgrade) {
            Some(device) => device,
            None => {
                let device = Arc::new(self.devices.open(number)?);
                let process = InGroup { caller, host: &host };
                device.bind(&process)?;
                device.attach(vfio_ioas(&host, &process)?, &process)?;
                open.insert(number, Arc::downgrade(&device));
                device
            }
        };
        drop(open);
        let file = Arc::new(OfGroup { device: Some(device), group: self.clone() });
        caller.open(file).map(i64::from)
    }
}

/// The IOAS of VFIO's ioctls of `host`.
fn vfio_ioas(host: &EmulatedHost, process: &InGroup<'_>) -> Result<u32, Errno> {
    /// `IOMMU_VFIO_IOAS`.
    const REQUEST: u32 = 0x3b88;
    // size, ioas_id, op (GET) and reserved
    let mut argument = [0; 12];
    argument.iter_mut().zip(12u32.to_ne_bytes()).for_each(|(to, from)| *to = from);
    host.ioctl(REQUEST, &mut argument, process)?;
    let ioas = argument.get(4..).and_then(|rest| rest.first_chunk());
    Ok(ioas.map_or(0, |ioas| u32::from_ne_bytes(*ioas)))
}

/// The string at `address`.
fn read_name(caller: &dyn Caller, address: u64) -> Result<String, Errno> {
    let mut bytes = Vec::new();
    for at in address..address.saturating_add(LONGEST_NAME) {
        let mut byte = [0];
        caller.read(at, &mut byte).map_err(|_| Errno::EFAULT)?;
        match byte {
            [0] => return String::from_utf8(bytes).map_err(|_| Errno::ENODEV),
            [byte] => bytes.push(byte),
        }
    }
    Err(Errno::ENODEV)
}

/// An open group, as a file.
#[derive(Debug)]
pub struct GroupFile(pub Arc<Group>);

impl File for GroupFile {
    fn name(&self) -> String {
        group_name(self.0.number)
    }

    fn call(&self, caller: &dyn Caller, call: Call) -> Result<Answer, Errno> {
        let Call::Ioctl { request, argument } = call else { return Err(Errno::EINVAL) };
        let done = match request {
            GET_STATUS => self.0.status(caller, argument),
            SET_CONTAINER => self.0.set_container(caller, argument),
            UNSET_CONTAINER => self.0.unset_container(),
            GET_DEVICE_FD => self.0.device(caller, argument),
            _ => Err(Errno::ENOTTY),
        };
        done.map(Answer::from)
    }
}

/// A device opened through a group: one descriptor's share of it.
#[derive(Debug)]
struct OfGroup {
    /// Present until it is dropped.
    device: Option<Arc<Device>>,
    group: Arc<Group>,
}

impl File for OfGroup {
    fn name(&self) -> String {
        self.device.as_ref().map_or_else(String::new, |device| device.name())
    }

    fn call(&self, caller: &dyn Caller, call: Call) -> Result<Answer, Errno> {
        self.device.as_ref().ok_or(Errno::ENODEV)?.call(caller, call)
    }

    fn map(self: Arc<Self>, request: MmapRequest) -> Result<Pages, Errno> {
        self.device.as_ref().ok_or(Errno::ENODEV)?.pages(request, self.clone())
    }

    fn resume(&self) -> bool {
        self.device.as_ref().is_some_and(|device| device.resume())
    }

    fn wake_event(&self) -> Option<Arc<Internal>> {
        self.device.as_ref()?.wake_event()
    }

    fn woken(&self) {
        if let Some(device) = &self.device {
            device.woken();
        }
    }
}

impl Drop for OfGroup {
    fn drop(&mut self) {
        // The next opener of the device finds it either open or unbound.
        let _open = self.group.open();
        drop(self.device.take());
    }
}

/// The process that opens a device: every descriptor it passes is the container.
#[derive(Debug)]
struct InGroup<'a> {
    caller: &'a dyn Caller,
    host: &'a Arc<EmulatedHost>,
}

impl UserSpace for InGroup<'_> {
    fn share(&self) -> Arc<dyn UserSpace> {
        self.caller.share()
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), UserFault> {
        self.caller.read(address, bytes)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), UserFault> {
        self.caller.write(address, bytes)
    }

    fn memory(&self, address: u64, length: u64, writable: bool) -> Result<UserMemory, UserFault> {
        self.caller.memory(address, length, writable)
    }

    fn credentials(&self) -> Credentials {
        self.caller.credentials()
    }
}

impl uapi::Process for InGroup<'_> {
    fn iommufd(&self, _: i32) -> Result<Arc<EmulatedHost>, Errno> {
        Ok(self.host.clone())
    }
}

/// A device of the machine.
#[derive(Debug)]
pub struct Entry {
    /// Its part of the machine's description.
    pub config: DeviceEntry,
    /// The number of its group.
    pub group: u32,
}

impl Entry {
    /// Its Requester ID, which is valid in a machine.
    fn rid(&self) -> Result<Bdf, Errno> {
        self.config.rid().map_err(|_| Errno::ENODEV)
    }

    /// The services of its function.
    pub fn services(&self) -> Services {
        let DeviceEntry { pasid_bits, ats, pri, .. } = self.config;
        Services { pasid_bits, ats, pri: ats && pri }
    }

    /// What its function is.
    pub fn kind(&self) -> Kind {
        match (self.config.express, self.config.rid().map_or(0, Bdf::bus)) {
            (false, _) => Kind::Conventional,
            (true, 0) => Kind::Integrated,
            (true, _) => Kind::Endpoint,
        }
    }
}

/// Opens devices of a machine, or of one group in it.
#[derive(Debug)]
pub struct Opener {
    /// The machine.
    pub machine: Arc<Machine>,
    /// Its devices, by number.
    pub devices: Arc<BTreeMap<u32, Entry>>,
    /// Keeps memory available for DMA, whatever the program does.
    pub pins: Arc<Pins>,
    /// The only group whose devices are found by name; none for all.
    pub group: Option<u32>,
}

impl Opener {
    /// Opens the device `number`.
    ///
    /// # Errors
    /// `ENODEV` there is none.
    pub fn open(&self, number: u32) -> Result<Device, Errno> {
        let device = self.devices.get(&number).ok_or(Errno::ENODEV)?;
        let name = device_name(number);
        let file = self.machine.open_device(&name)?;
        let edu = match device.config.dma {
            Dma::None => None,
            Dma::Edu => {
                let port = self.machine.dma_port(&name);
                port.map(|port| Edu::new(port, self.pins.clone()))
            }
        };
        let (rid, group) = (device.rid()?, device.group);
        let same_bus = |other: &&Entry| other.rid().is_ok_and(|other| other.bus() == rid.bus());
        let resettable = rid.bus() > 0 && self.devices.values().filter(same_bus).count() == 1;
        let place = Place { rid, group, resettable };
        Ok(Device::new(name, place, file, Function::new(device.kind(), device.services(), edu)?))
    }

    /// The number of the device at the PCI address `name`, such as `0000:00:04.0`.
    pub fn named(&self, name: &str) -> Option<u32> {
        let name = name.strip_prefix("0000:").unwrap_or(name);
        let rid = name.parse::<Bdf>().ok()?;
        let is_it = |device: &&Entry| {
            device.config.rid() == Ok(rid) && self.group.is_none_or(|group| device.group == group)
        };
        self.devices.values().find(is_it).map(|device| device.config.vfio)
    }
}

/// The machine's name of device `number`.
pub fn device_name(number: u32) -> String {
    format!("vfio{number}")
}
