// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Raw ioctls, their structures, an edu-like device behind a VFIO character device, and the memory
//! of a guest.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io::{Error, Result};
use std::mem::size_of;
use std::os::fd::RawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use iommufd_bindings::*;

/// `_IO(IOMMUFD_TYPE, number)`; VFIO's type is the same.
pub fn request(number: u32) -> libc::c_ulong {
    libc::c_ulong::from(b';') << 8 | libc::c_ulong::from(number)
}

/// `ioctl(2)` with a structure.
pub fn ioctl<T>(fd: RawFd, number: u32, argument: &mut T) -> Result<()> {
    // SAFETY: all ioctls here take a structure with its size, and `T` is that.
    let result = unsafe { libc::ioctl(fd, request(number), argument) };
    if result < 0 {
        Err(Error::last_os_error())
    } else {
        Ok(())
    }
}

/// The name of the errno, for the log.
pub fn outcome<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => "ok".to_owned(),
        Err(error) => format!("errno {}", error.raw_os_error().unwrap_or(0)),
    }
}

pub fn open(path: &str) -> RawFd {
    let path = CString::new(path).expect("no zero");
    // SAFETY: the path is a C string.
    let fd = unsafe { libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    assert!(fd >= 0, "{path:?}: {}", Error::last_os_error());
    fd
}

fn size<T>() -> u32 {
    size_of::<T>() as u32
}

pub fn ioas_alloc(fd: RawFd) -> Result<u32> {
    let mut alloc = iommu_ioas_alloc { size: size::<iommu_ioas_alloc>(), ..Default::default() };
    ioctl(fd, IOMMUFD_CMD_IOAS_ALLOC, &mut alloc)?;
    Ok(alloc.out_ioas_id)
}

/// Maps `length` bytes at `address` as `iova`, readable and writable.
pub fn ioas_map(fd: RawFd, ioas: u32, address: u64, length: u64, iova: u64) -> Result<()> {
    /// Fixed address, writeable, readable.
    const FLAGS: u32 = 0b111;
    let mut map = iommu_ioas_map {
        size: size::<iommu_ioas_map>(),
        flags: FLAGS,
        ioas_id: ioas,
        user_va: address,
        length,
        iova,
        ..Default::default()
    };
    ioctl(fd, IOMMUFD_CMD_IOAS_MAP, &mut map)
}

/// Maps the first `length` bytes of the file `file` likewise.
pub fn ioas_map_file(fd: RawFd, ioas: u32, file: RawFd, length: u64, iova: u64) -> Result<()> {
    let mut map = iommu_ioas_map_file {
        size: size::<iommu_ioas_map_file>(),
        flags: 0b111,
        ioas_id: ioas,
        fd: file,
        length,
        iova,
        ..Default::default()
    };
    ioctl(fd, IOMMUFD_CMD_IOAS_MAP_FILE, &mut map)
}

/// Unmaps; returns the number of bytes.
pub fn ioas_unmap(fd: RawFd, ioas: u32, iova: u64, length: u64) -> Result<u64> {
    let size = size::<iommu_ioas_unmap>();
    let mut unmap = iommu_ioas_unmap { size, ioas_id: ioas, iova, length };
    ioctl(fd, IOMMUFD_CMD_IOAS_UNMAP, &mut unmap)?;
    Ok(unmap.length)
}

/// The mappable IOVAs: first and last of each range, at most four.
pub fn ioas_iova_ranges(fd: RawFd, ioas: u32) -> Result<Vec<(u64, u64)>> {
    let mut ranges = [iommu_iova_range::default(); 4];
    let mut call = iommu_ioas_iova_ranges {
        size: size::<iommu_ioas_iova_ranges>(),
        ioas_id: ioas,
        num_iovas: ranges.len() as u32,
        allowed_iovas: ranges.as_mut_ptr() as u64,
        ..Default::default()
    };
    ioctl(fd, IOMMUFD_CMD_IOAS_IOVA_RANGES, &mut call)?;
    let ranges = ranges.iter().take(call.num_iovas as usize);
    Ok(ranges.map(|range| (range.start, range.last)).collect())
}

/// Limits placement to the IOVAs from `start` to `last`, inclusive.
pub fn ioas_allow_iovas(fd: RawFd, ioas: u32, start: u64, last: u64) -> Result<()> {
    let range = iommu_iova_range { start, last };
    let mut call = iommu_ioas_allow_iovas {
        size: size::<iommu_ioas_allow_iovas>(),
        ioas_id: ioas,
        num_iovas: 1,
        allowed_iovas: &raw const range as u64,
        ..Default::default()
    };
    ioctl(fd, IOMMUFD_CMD_IOAS_ALLOW_IOVAS, &mut call)
}

pub fn destroy(fd: RawFd, id: u32) -> Result<()> {
    let mut destroy = iommu_destroy { size: size::<iommu_destroy>(), id };
    ioctl(fd, IOMMUFD_CMD_DESTROY, &mut destroy)
}

/// The capability registers, if the device is behind a VT-d; and whether dirty tracking is among
/// the capabilities.
pub fn hw_info_vtd(fd: RawFd, dev: u32) -> Result<(Option<iommu_hw_info_vtd>, bool)> {
    let mut vtd = iommu_hw_info_vtd::default();
    let mut info = iommu_hw_info {
        size: size::<iommu_hw_info>(),
        dev_id: dev,
        data_len: size::<iommu_hw_info_vtd>(),
        data_uptr: &raw mut vtd as u64,
        ..Default::default()
    };
    ioctl(fd, IOMMUFD_CMD_GET_HW_INFO, &mut info)?;
    // SAFETY: both members of the union are this number.
    let kind = unsafe { info.__bindgen_anon_1.out_data_type };
    // `IOMMU_HW_CAP_DIRTY_TRACKING`.
    Ok(((kind == 1).then_some(vtd), info.out_capabilities & 1 != 0))
}

/// Page tables of `ioas` have no entries for large pages: a dirty page is one of 4 KiB.
pub fn small_pages(fd: RawFd, ioas: u32) -> Result<()> {
    let mut option = iommu_option {
        size: size::<iommu_option>(),
        // `IOMMU_OPTION_HUGE_PAGES`, to 0.
        option_id: 1,
        object_id: ioas,
        ..Default::default()
    };
    ioctl(fd, IOMMUFD_CMD_OPTION, &mut option)
}

/// Starts or stops dirty tracking.
pub fn track_dirty(fd: RawFd, hwpt: u32, enable: bool) -> Result<()> {
    let size = size::<iommu_hwpt_set_dirty_tracking>();
    let flags = u32::from(enable);
    let mut set =
        iommu_hwpt_set_dirty_tracking { size, flags, hwpt_id: hwpt, ..Default::default() };
    ioctl(fd, IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING, &mut set)
}

/// The dirty pages of `length` bytes from address 0 on; they are clean from then on if `clear`.
pub fn dirty_pages(fd: RawFd, hwpt: u32, length: u64, clear: bool) -> Result<Vec<u64>> {
    let mut bitmap = vec![0u64; (length / 4096 / 64) as usize];
    let mut get = iommu_hwpt_get_dirty_bitmap {
        size: size::<iommu_hwpt_get_dirty_bitmap>(),
        hwpt_id: hwpt,
        // `IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR`.
        flags: u32::from(!clear),
        length,
        page_size: 4096,
        data: bitmap.as_mut_ptr() as u64,
        ..Default::default()
    };
    ioctl(fd, IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP, &mut get)?;
    let is_dirty = |page: &u64| bitmap[(page / 64) as usize] >> (page % 64) & 1 != 0;
    Ok((0..length / 4096).filter(is_dirty).collect())
}

/// A fault queue: its object and its descriptor.
pub fn fault_queue(fd: RawFd) -> Result<(u32, RawFd)> {
    let mut alloc = iommu_fault_alloc { size: size::<iommu_fault_alloc>(), ..Default::default() };
    ioctl(fd, IOMMUFD_CMD_FAULT_QUEUE_ALLOC, &mut alloc)?;
    Ok((alloc.out_fault_id, alloc.out_fault_fd as RawFd))
}

/// A nesting parent on `ioas` with dirty tracking.
pub fn nesting_parent(fd: RawFd, dev: u32, ioas: u32) -> Result<u32> {
    /// `IOMMU_HWPT_ALLOC_NEST_PARENT`, `IOMMU_HWPT_ALLOC_DIRTY_TRACKING`.
    const NEST_PARENT: u32 = 0b11;
    hwpt_alloc(
        fd,
        iommu_hwpt_alloc { flags: NEST_PARENT, dev_id: dev, pt_id: ioas, ..Default::default() },
    )
}

/// A nesting parent on `ioas` without it.
pub fn plain_nesting_parent(fd: RawFd, dev: u32, ioas: u32) -> Result<u32> {
    // `IOMMU_HWPT_ALLOC_NEST_PARENT`.
    hwpt_alloc(fd, iommu_hwpt_alloc { flags: 1, dev_id: dev, pt_id: ioas, ..Default::default() })
}

/// Tables of 48 bits at `tables` (an address of the parent), nested on `parent`; page requests go
/// to `faults`, if given.
pub fn nested(fd: RawFd, dev: u32, parent: u32, tables: u64, faults: Option<u32>) -> Result<u32> {
    /// `IOMMU_HWPT_FAULT_ID_VALID`.
    const FAULT_ID_VALID: u32 = 1 << 2;
    let data = iommu_hwpt_vtd_s1 { pgtbl_addr: tables, addr_width: 48, ..Default::default() };
    let alloc = iommu_hwpt_alloc {
        flags: faults.map_or(0, |_| FAULT_ID_VALID),
        fault_id: faults.unwrap_or(0),
        dev_id: dev,
        pt_id: parent,
        // `IOMMU_HWPT_DATA_VTD_S1`.
        data_type: 1,
        data_len: size::<iommu_hwpt_vtd_s1>(),
        data_uptr: &raw const data as u64,
        ..Default::default()
    };
    hwpt_alloc(fd, alloc)
}

pub fn hwpt_alloc(fd: RawFd, mut alloc: iommu_hwpt_alloc) -> Result<u32> {
    alloc.size = size::<iommu_hwpt_alloc>();
    ioctl(fd, IOMMUFD_CMD_HWPT_ALLOC, &mut alloc)?;
    Ok(alloc.out_hwpt_id)
}

/// Invalidates `pages` pages at each address; returns the number of entries completed according to
/// the kernel.
pub fn invalidate(fd: RawFd, hwpt: u32, ranges: &[(u64, u64)]) -> (Result<()>, u32) {
    let entries: Vec<iommu_hwpt_vtd_s1_invalidate> = ranges
        .iter()
        .map(|(addr, npages)| iommu_hwpt_vtd_s1_invalidate {
            addr: *addr,
            npages: *npages,
            ..Default::default()
        })
        .collect();
    let mut invalidate = iommu_hwpt_invalidate {
        size: size::<iommu_hwpt_invalidate>(),
        hwpt_id: hwpt,
        data_uptr: entries.as_ptr() as u64,
        // `IOMMU_HWPT_INVALIDATE_DATA_VTD_S1`.
        data_type: 0,
        entry_len: size::<iommu_hwpt_vtd_s1_invalidate>(),
        entry_num: entries.len() as u32,
        ..Default::default()
    };
    let result = ioctl(fd, IOMMUFD_CMD_HWPT_INVALIDATE, &mut invalidate);
    (result, invalidate.entry_num)
}

/// A VFIO device that is QEMU's educational one.
pub struct Device {
    file: File,
    bar: u64,
    /// It has the registers with the result of a DMA.
    pub tells: bool,
}

/// `VFIO_BASE + n`.
pub const fn vfio(n: u32) -> u32 {
    100 + n
}

/// Offset of the device's buffer.
const BUFFER: u64 = 0x4_0000;

impl From<File> for Device {
    fn from(file: File) -> Self {
        Self { file, bar: 0, tells: false }
    }
}

impl Device {
    pub fn open(path: &str) -> Self {
        File::options().read(true).write(true).open(path).expect(path).into()
    }

    pub fn fd(&self) -> RawFd {
        std::os::fd::AsRawFd::as_raw_fd(&self.file)
    }

    /// Binds it to `iommufd`, finds its registers and enables requests; returns its object.
    pub fn bind(&mut self, iommufd: RawFd) -> Result<u32> {
        // argsz, flags, iommufd, out_devid
        let mut bind = [16, 0, iommufd as u32, 0];
        ioctl(self.fd(), vfio(18), &mut bind)?;
        self.start()?;
        Ok(bind[3])
    }

    /// Finds the registers and enables requests.
    pub fn start(&mut self) -> Result<()> {
        self.bar = self.region(0);
        let config = self.region(7);
        let mut id = [0; 4];
        self.file.read_exact_at(&mut id, config)?;
        assert_eq!(u32::from_le_bytes(id), 0x11e8_1234, "the educational device");
        self.file.write_all_at(&[0b110], config + 4)?;
        // Twostage's register; all ones elsewhere.
        self.tells = self.read(0xa8) != u64::MAX;
        Ok(())
    }

    /// Accesses that are larger than a register.
    pub fn print_whole_accesses(&self) {
        let config = self.region(7);
        let mut bytes = [0u8; 300];
        let mut read = |count: usize, at: u64| {
            let result = self.file.read_at(&mut bytes[..count], at);
            result.map_err(|error| error.raw_os_error().unwrap_or(0))
        };
        println!("configuration space: {:?}", read(256, config));
        println!("past its end: {:?}", read(257, config));
        println!("an odd piece: {:?}", read(7, config + 1));
        println!("registers: {:?}", read(64, self.bar));
        println!("the end of the BAR: {:?}", read(64, self.bar + (1 << 20) - 16));
        println!("past it: {:?}", read(4, self.bar + (1 << 20)));
        let words: Vec<u8> = [1u64, 2, 3].into_iter().flat_map(u64::to_le_bytes).collect();
        let written = self.file.write_at(&words, self.bar + 0x80).expect("registers");
        println!("written: {written}, {:?}", [0x80, 0x88, 0x90].map(|at| self.read(at)));
    }

    /// `struct vfio_region_info`: argsz, flags, index, cap_offset, size, offset.
    fn info(&self, index: u32) -> [u32; 8] {
        let mut info = [0u32; 8];
        (info[0], info[2]) = (32, index);
        ioctl(self.fd(), vfio(8), &mut info).expect("VFIO_DEVICE_GET_REGION_INFO");
        info
    }

    /// Offset of the region `index` in the file.
    pub fn region(&self, index: u32) -> u64 {
        let info = self.info(index);
        u64::from(info[7]) << 32 | u64::from(info[6])
    }

    /// Its flags and its length.
    pub fn region_info(&self, index: u32) -> (u32, u64) {
        let info = self.info(index);
        (info[1], u64::from(info[5]) << 32 | u64::from(info[4]))
    }

    /// The eight bytes at `offset` of it.
    pub fn region_try(&self, index: u32, offset: u64) -> Result<u64> {
        let mut value = [0; 8];
        self.file.read_exact_at(&mut value, self.region(index) + offset)?;
        Ok(u64::from_le_bytes(value))
    }

    pub fn region_read(&self, index: u32, offset: u64) -> u64 {
        self.region_try(index, offset).expect("a region")
    }

    pub fn region_write(&self, index: u32, offset: u64, value: u64) {
        let at = self.region(index) + offset;
        self.file.write_all_at(&value.to_le_bytes(), at).expect("a region");
    }

    pub fn attach(&self, pt: u32) -> Result<u32> {
        // argsz, flags, pt_id
        let mut attach = [12, 0, pt];
        ioctl(self.fd(), vfio(19), &mut attach)?;
        Ok(attach[2])
    }

    pub fn detach(&self) -> Result<()> {
        // argsz, flags
        ioctl(self.fd(), vfio(20), &mut [8u32, 0])
    }

    fn read(&self, register: u64) -> u64 {
        let mut value = [0; 8];
        self.file.read_exact_at(&mut value, self.bar + register).expect("a register");
        u64::from_le_bytes(value)
    }

    fn write(&self, register: u64, value: u64) {
        self.file.write_all_at(&value.to_le_bytes(), self.bar + register).expect("a register");
    }

    pub fn region_write8(&self, index: u32, offset: u64, value: u8) {
        let at = self.region(index) + offset;
        self.file.write_all_at(&[value], at).expect("a region");
    }

    /// Writes a register of four bytes.
    pub fn write32(&self, register: u64, value: u32) {
        self.file.write_all_at(&value.to_le_bytes(), self.bar + register).expect("a register");
    }

    /// Makes the device copy `count` bytes.
    fn start_dma(&self, source: u64, destination: u64, count: u64, command: u64) {
        for (register, value) in [(0x80, source), (0x88, destination), (0x90, count)] {
            self.write(register, value);
        }
        self.write(0x98, command | 1);
    }

    /// Whether that is in progress.
    pub fn is_busy(&self) -> bool {
        self.read(0x98) & 1 != 0
    }

    /// The result, and the address where it was blocked, if it was; all ones on other devices than
    /// Twostage's.
    pub fn result(&self) -> (u64, u64) {
        (self.read(0xa8), self.read(0xb0))
    }

    /// Makes the device copy `count` bytes; returns whether it succeeded, if the device reports it.
    fn dma(&self, source: u64, destination: u64, count: u64, command: u64) -> bool {
        self.start_dma(source, destination, count, command);
        while self.is_busy() {
            std::thread::yield_now();
        }
        !self.tells || self.result().0 == 0
    }

    /// Makes the device start to write its buffer to `iova`.
    pub fn start_store(&self, iova: u64, count: u64) {
        self.start_dma(BUFFER, iova, count, 2);
    }

    /// Makes the device read `count` bytes at `iova` into its buffer.
    pub fn fetch(&self, iova: u64, count: u64) -> bool {
        self.dma(iova, BUFFER, count, 0)
    }

    /// Makes the device write its buffer to `iova`.
    pub fn store(&self, iova: u64, count: u64) -> bool {
        self.dma(BUFFER, iova, count, 2)
    }
}

/// Length of guest memory, in bytes.
pub const MEMORY: u64 = 16 << 20;
/// Size of a page, in bytes.
pub const PAGE: u64 = 4096;

/// Memory of a guest, from address 0 on.
pub struct Guest(*mut u8);

impl Guest {
    pub fn new() -> Self {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping touches nothing.
        let memory =
            unsafe { libc::mmap(std::ptr::null_mut(), MEMORY as usize, rights, flags, -1, 0) };
        assert_ne!(memory, libc::MAP_FAILED);
        Self(memory.cast())
    }

    /// Its address in this process.
    pub fn address(&self) -> u64 {
        self.0 as u64
    }

    fn word(&self, address: u64) -> &AtomicU64 {
        assert!(address.is_multiple_of(8) && address < MEMORY);
        // SAFETY: it is within the mapping, aligned, and accessed by devices like by another
        // thread.
        unsafe { &*self.0.add(address as usize).cast() }
    }

    pub fn get(&self, address: u64) -> u64 {
        self.word(address).load(Ordering::SeqCst)
    }

    pub fn set(&self, address: u64, value: u64) {
        self.word(address).store(value, Ordering::SeqCst);
    }
}
