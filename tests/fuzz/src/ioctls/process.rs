// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The process, its machine, and the invariants.

use std::sync::{Arc, Mutex, OnceLock};

use iommufd_bindings::*;
use twostage::iommufd::{Errno, ObjectId, PageRequest, UserMemory};
use twostage::spec::pci::Bdf;
use twostage_emulated::uapi::{self, Credentials, DeviceFile, RegionSpace, UserFault, UserSpace};
use twostage_emulated::uapi::{ATTACH_IOMMUFD_PT, BIND_IOMMUFD};
use twostage_emulated::{
    AddressWidth, DeviceConfig, DmaAccess, DmaAttributes, DmaError, DmaPort, EmulatedHost,
    EventFile, Machine, MmapRequest, VtdUnit, VtdUnitConfig,
};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress};

use super::access::User;
use super::graph;
use super::table::iommufd;
use super::value::{MEMORY, PAGE, PAGES};

/// A device of the machine.
struct Device {
    name: &'static str,
    /// The unit it is behind.
    unit: usize,
    function: u8,
    group: Option<u32>,
    /// It sends page requests.
    pri: bool,
}

const DEVICES: [Device; 3] = [
    Device { name: "a", unit: 0, function: 0, group: Some(1), pri: false },
    Device { name: "b", unit: 0, function: 1, group: Some(1), pri: false },
    Device { name: "far", unit: 1, function: 2, group: None, pri: true },
];
/// The one that sends page requests.
const FAR: usize = 2;
/// Maximum number of open queues of faults and events of a process.
const MAX_FILES: usize = 4;
/// Largest DMA, in bytes.
const MAX_DMA: usize = 0x3000;
/// Where the tables of a prepared process start.
const TABLES: u64 = 8 * PAGE;
/// Address of structures in a prepared process.
const SCRATCH: u64 = 7 * PAGE;

/// The object of an ioctl.
#[derive(Debug, Clone, Copy)]
enum On {
    /// An iommufd, by the number of the command.
    Iommufd(u32),
    /// A device, by its number, and the request.
    Device(usize, u32),
}

/// See the [module's documentation](self).
pub struct Process {
    iommufds: [Arc<EmulatedHost>; 2],
    files: [Option<DeviceFile>; 3],
    ports: [DmaPort; 3],
    /// Unanswered page requests: device and group.
    asked: Vec<(usize, u16)>,
    users: [Option<User>; 4],
    memory: Arc<GuestRegionMmap>,
    caller: Caller,
}

/// The memory, reused by all processes, as mapping it anew each time would dominate the run time.
fn memory() -> Arc<GuestRegionMmap> {
    static MEMORY: OnceLock<Arc<GuestRegionMmap>> = OnceLock::new();
    let length = (PAGES * PAGE) as usize;
    let region = MEMORY.get_or_init(|| {
        Arc::new(GuestRegionMmap::from_range(GuestAddress(0), length, None).expect("64 KiB"))
    });
    region.write_slice(&[0; (PAGES * PAGE) as usize], MemoryRegionAddress(0)).expect("the whole");
    region.clone()
}

fn machine() -> Arc<Machine> {
    let machine = Machine::new();
    let small = VtdUnitConfig::default()
        .with_iotlb_entries(16)
        .with_paging_structure_entries(8)
        .with_stage2_entries(8);
    let other = small
        .clone()
        .with_address_width(AddressWidth::Bits57)
        .with_extended_accessed(true)
        .with_supervisor_requests(true)
        .with_erratum_772415(false)
        .with_sanitize(true)
        .with_device_tlb(true)
        .with_page_requests(true);
    let units = [small, other].map(|config| machine.add_unit(VtdUnit::new(config)));
    for Device { name, unit, function, group, pri } in DEVICES {
        let rid = Bdf::new(0, 1, function).expect("a function");
        let reserved = if name == "far" { vec![0x1_0000..=0x1_0fff] } else { Vec::new() };
        let config = DeviceConfig::default()
            .with_pasid_bits(4)
            .with_pasid_priv(true)
            .with_ats(pri)
            .with_pri(pri)
            .with_reserved(reserved)
            .with_group(group);
        machine.add_device(name, units[unit], rid, config).expect("a new device");
    }
    machine
}

impl Process {
    /// A process; if `prepared`, with device "a" on nested tables, or device "far" on such tables
    /// with a fault queue for its page requests.
    pub fn new(prepared: bool, asking: bool) -> Self {
        let machine = machine();
        let memory = memory();
        let space = RegionSpace::new(vec![memory.clone()]);
        let iommufds = [machine.open(), machine.open()];
        let caller = Caller { space, iommufds: iommufds.to_vec(), files: Mutex::default() };
        let ports =
            DEVICES.map(|device| machine.dma_port(device.name).expect("a device of the machine"));
        let (files, asked, users) = Default::default();
        let mut process = Self { iommufds, files, ports, asked, users, memory, caller };
        if prepared {
            process.prepare(if asking { FAR } else { 0 });
        }
        process
    }

    fn prepare(&mut self, device: usize) {
        for (table, below) in [(8, 9), (9, 10), (10, 11)] {
            self.write(MEMORY + table * PAGE, (below * PAGE) | 0x27);
        }
        for page in 0..7 {
            self.write(MEMORY + TABLES + 3 * PAGE + page * 8, (page * PAGE) | 0x67);
        }
        self.open_device(device as u8);
        let dev = self.must(On::Device(device, BIND_IOMMUFD), &[0, 0, 0, 0, 0], 12);
        let ioas = self.must(On::Iommufd(IOMMUFD_CMD_IOAS_ALLOC), &[0, 0], 8);
        let (low, high) = (MEMORY as u32, (MEMORY >> 32) as u32);
        let length = (PAGES * PAGE) as u32;
        let map = [7, ioas, 0, low, high, length, 0, 0, 0];
        self.must(On::Iommufd(IOMMUFD_CMD_IOAS_MAP), &map, 0);
        let parent = [1, dev, ioas, 0, 0, 0, 0, 0, 0, 0, 0];
        let parent = self.must(On::Iommufd(IOMMUFD_CMD_HWPT_ALLOC), &parent, 16);
        self.write(MEMORY + SCRATCH + 8, TABLES);
        self.write(MEMORY + SCRATCH + 16, 48);
        let scratch = low + SCRATCH as u32;
        let mut nested = [0, dev, parent, 0, 0, 1, 24, scratch, high, 0, 0];
        if DEVICES[device].pri {
            nested[0] = iommufd_hwpt_alloc_flags_IOMMU_HWPT_FAULT_ID_VALID;
            nested[9] = self.must(On::Iommufd(IOMMUFD_CMD_FAULT_QUEUE_ALLOC), &[0, 0, 0], 8);
        }
        let nested = self.must(On::Iommufd(IOMMUFD_CMD_HWPT_ALLOC), &nested, 16);
        self.must(On::Device(device, ATTACH_IOMMUFD_PT), &[0, nested], 0);
    }

    /// Makes an ioctl that must succeed, with these words after the size; returns the word at
    /// `answer` (bytes).
    fn must(&mut self, on: On, words: &[u32], answer: usize) -> u32 {
        let size = 4 + 4 * words.len() as u32;
        let mut bytes: Vec<u8> =
            [size].iter().chain(words).flat_map(|word| word.to_le_bytes()).collect();
        relocate(&mut bytes, &self.memory);
        let outcome = match on {
            On::Iommufd(number) => {
                self.iommufds[0].ioctl(iommufd(number), &mut bytes, &self.caller).map(drop)
            }
            On::Device(device, request) => match &self.files[device] {
                Some(file) => file.ioctl(request, &mut bytes, &self.caller),
                None => Err(Errno::ENODEV),
            },
        };
        assert_eq!(outcome, Ok(()), "{on:x?} {words:?}");
        u32::from_le_bytes(bytes[answer..answer + 4].try_into().expect("four bytes"))
    }

    pub fn ioctl(&mut self, fd: usize, request: u32, argument: &mut [u8]) {
        relocate(argument, &self.memory);
        let _ = self.iommufds[fd % 2].ioctl(request, argument, &self.caller);
    }

    pub fn device_ioctl(&mut self, device: u8, request: u32, argument: &mut [u8]) {
        if let Some(file) = &self.files[usize::from(device) % 3] {
            let _ = file.ioctl(request, argument, &self.caller);
        }
    }

    /// Reads from an open queue of faults or events, or writes to it, or closes it.
    pub fn event_file(&mut self, number: u8, how: u8, address: u64, count: usize) {
        let mut files = self.caller.files.lock().expect("no panic before");
        let number = usize::from(number) % files.len().max(1);
        let Some(file) = files.get(number) else { return };
        let address = address.wrapping_sub(MEMORY).wrapping_add(self.memory.as_ptr() as u64);
        match how % 4 {
            0 => drop(files.swap_remove(number)),
            1 => {
                let _ = file.write(&self.caller, address, count);
            }
            _ => {
                let readable = file.readable();
                let read = file.read(&self.caller, address, count);
                assert!(readable || !matches!(read, Ok(1..)), "{read:?} of nothing");
            }
        }
    }

    /// A device sends a page request, or an IOMMU reports an event.
    pub fn raise(&mut self, fd: usize, object: ObjectId, kind: u32, request: PageRequest) {
        let host = &self.iommufds[fd % 2];
        let _ = host.page_request(object, request);
        let _ = host.report_event(object, kind % 4, &[kind as u8; 8]);
    }

    /// Maps pages of an IOMMU, for a moment.
    pub fn mmap(&mut self, fd: usize, offset: u64, length: u64, how: u8) {
        let (shared, executable) = (how & 1 == 0, how & 6 == 6);
        let request = MmapRequest { offset, length, shared, executable };
        if let Ok(pages) = self.iommufds[fd % 2].mmap(request) {
            self.look();
            drop(pages);
        }
    }

    /// Makes an ioctl on a VFIO container, whose structure is written to `at`.
    pub fn container_ioctl(&mut self, fd: usize, request: u32, at: u64, mut argument: Vec<u8>) {
        relocate(&mut argument, &self.memory);
        let offset = at.wrapping_sub(MEMORY);
        let _ = self.memory.write_slice(&argument, MemoryRegionAddress(offset));
        self.container_number(fd, request, at);
    }

    /// Makes an ioctl on a VFIO container, with a number or an address.
    pub fn container_number(&mut self, fd: usize, request: u32, number: u64) {
        let mut number = number.to_le_bytes();
        relocate(&mut number, &self.memory);
        let number = u64::from_le_bytes(number);
        let _ = self.iommufds[fd % 2].vfio_ioctl(request, number, &self.caller);
    }

    pub fn add_group(&mut self, how: u8) {
        let host = &self.iommufds[usize::from(how) % 2];
        let _ =
            if how & 2 == 0 { host.vfio_add_group() } else { host.vfio_add_group_without_iommu() };
    }

    pub fn open_device(&mut self, device: u8) {
        let number = usize::from(device) % 3;
        let opened = self.iommufds[0].machine().open_device(DEVICES[number].name);
        self.files[number] = Some(opened.expect("a device of the machine"));
    }

    pub fn close_device(&mut self, device: u8) {
        self.files[usize::from(device) % 3] = None;
    }

    pub fn new_access(&mut self, how: u8) {
        let host = &self.iommufds[usize::from(how >> 2) % 2];
        self.users[usize::from(how) % 4] = Some(User::new(host, how & 8 == 0));
    }

    pub fn access(&mut self, user: u8, how: u8, ioas: u32, iova: u64, length: u64) {
        if let Some(user) = &self.users[usize::from(user) % 4] {
            user.act(how, ObjectId(ioas), iova, length);
        }
    }

    pub fn drop_access(&mut self, user: u8) {
        self.users[usize::from(user) % 4] = None;
    }

    pub fn close_iommufd(&mut self, fd: u8) {
        self.iommufds[usize::from(fd) % 2].close();
    }

    /// Writes `word` to the process's memory at `address`, if there is any.
    pub fn write(&mut self, address: u64, word: u64) {
        if let Some(offset) = address.checked_sub(MEMORY) {
            let _ = self.memory.write_slice(&word.to_le_bytes(), MemoryRegionAddress(offset));
        }
    }

    pub fn dma(&mut self, device: u8, how: u8, pasid: u32, iova: u64) {
        let number = usize::from(device) % 3;
        let pasid = (how & 1 != 0).then_some(pasid);
        let attributes = DmaAttributes { pasid, privileged: how & 2 != 0, execute: how & 4 != 0 };
        let mut bytes = [how; MAX_DMA];
        let bytes = &mut bytes[..if how & 0x10 != 0 { MAX_DMA } else { 8 }];
        let write = how & 8 != 0;
        if DEVICES[number].pri {
            self.look_for_answers(how & 0x20 != 0);
            self.dma_until_asking(number, attributes, iova, bytes, write);
            return;
        }
        let port = &mut self.ports[number];
        // Blocked or not.
        let _ = match write {
            true => port.write(attributes, iova, bytes),
            false => port.read(attributes, iova, bytes),
        };
    }

    /// DMA of a device that sends a page request and does not wait for the response, as nobody else
    /// would run.
    fn dma_until_asking(
        &mut self,
        number: usize,
        attributes: DmaAttributes,
        iova: u64,
        bytes: &mut [u8],
        write: bool,
    ) {
        let access = if write { DmaAccess::Write } else { DmaAccess::Read };
        let mut done = 0;
        while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let Some(address) = iova.checked_add(done as u64) else { return };
            let port = &mut self.ports[number];
            match port.translate(attributes, address, rest.len(), access) {
                Ok(translated) => {
                    let slice = translated.slice();
                    match write {
                        true => slice.copy_from(rest),
                        false => _ = slice.copy_to(rest),
                    }
                    assert!((1..=rest.len()).contains(&slice.len()), "{} bytes", slice.len());
                    done += slice.len();
                }
                Err(DmaError::PageRequested { group, .. }) => {
                    self.asked.push((number, group));
                    return;
                }
                Err(_) => return,
            }
        }
    }

    /// Devices take the responses to their page requests, or forget about them.
    fn look_for_answers(&mut self, forget: bool) {
        let ports = &self.ports;
        self.asked.retain(|(number, group)| ports[*number].page_response(*group).is_none());
        if forget {
            self.asked.clear();
        }
    }

    /// Every object's dependencies exist.
    pub fn look(&self) {
        self.iommufds.iter().for_each(|host| _ = graph::checked(host));
    }

    /// The same, and people see them.
    pub fn look_at_text(&self) {
        self.iommufds.iter().for_each(|host| graph::check_text(&graph::checked(host)));
    }

    /// Closes everything, devices and users first or last; nothing may be left.
    pub fn end(mut self, devices_first: bool) {
        self.look();
        if devices_first {
            (self.files, self.users) = Default::default();
            self.caller.files.lock().expect("no panic before").clear();
        }
        for host in &self.iommufds {
            host.close();
        }
        (self.files, self.users) = Default::default();
        self.caller.files.lock().expect("no panic before").clear();
        for host in &self.iommufds {
            assert_eq!((host.live_objects(), host.pinned_bytes()), (0, 0), "{}", host.graph());
        }
        // The end of an attachment is a response.
        self.look_for_answers(false);
        assert_eq!(self.asked, [], "page requests without an answer");
        let Credentials { user, process, .. } = self.caller.credentials();
        assert_eq!((user.bytes(), process.bytes()), (0, 0), "bytes stay locked");
        for port in &mut self.ports {
            port.read(DmaAttributes::default(), 0, &mut [0]).expect_err("nothing is attached");
        }
        // Of the static and of this process: nobody else has kept the memory.
        drop((self.iommufds, self.ports, self.caller));
        assert_eq!(Arc::strong_count(&self.memory), 2, "somebody keeps the process's memory");
    }
}

/// Replaces every 64-bit field that points to the memory by the real address.
fn relocate(argument: &mut [u8], memory: &GuestRegionMmap) {
    for field in argument.chunks_exact_mut(8) {
        let word = u64::from_le_bytes(field.try_into().unwrap_or_default());
        let offset = word.wrapping_sub(MEMORY);
        if offset < PAGES * PAGE {
            let address = memory.as_ptr() as u64 + offset;
            field.copy_from_slice(&address.to_le_bytes());
        }
    }
}

/// The process as the host sees it.
#[derive(Debug)]
struct Caller {
    space: RegionSpace,
    iommufds: Vec<Arc<EmulatedHost>>,
    files: Mutex<Vec<EventFile>>,
}

impl UserSpace for Caller {
    fn share(&self) -> Arc<dyn UserSpace> {
        // Without the descriptors: mappings keep this, and an iommufd keeps its mappings.
        self.space.share()
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), UserFault> {
        self.space.read(address, bytes)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), UserFault> {
        self.space.write(address, bytes)
    }

    fn memory(&self, address: u64, length: u64, writable: bool) -> Result<UserMemory, UserFault> {
        self.space.memory(address, length, writable)
    }

    fn credentials(&self) -> Credentials {
        self.space.credentials()
    }
}

impl uapi::Process for Caller {
    fn iommufd(&self, fd: i32) -> Result<Arc<EmulatedHost>, Errno> {
        let number = usize::try_from(fd).map_err(|_| Errno::EBADF)?;
        self.iommufds.get(number).cloned().ok_or(Errno::EBADF)
    }

    fn install(&self, file: EventFile) -> Result<i32, Errno> {
        let mut files = self.files.lock().expect("no panic before");
        if files.len() >= MAX_FILES {
            return Err(Errno::EMFILE);
        }
        files.push(file);
        Ok(files.len() as i32)
    }
}
