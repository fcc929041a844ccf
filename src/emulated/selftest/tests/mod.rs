// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The operations as used by a program.

mod access;
mod devices;
mod mappings;
mod viommu;

use std::sync::Arc;
use twostage::sync::Mutex;

use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress};

use super::abi::{self, op};
use crate::uapi::{Process, RegionSpace, TestFile, UserFault, UserSpace};
use crate::{DmaBuf, EmulatedHost};
use twostage::iommufd::{
    Errno, HostIommu, HwptAlloc, HwptData, HwptFlags, MapTarget, ObjectId, Protection, UserMemory,
};

/// `IOMMU_TEST_CMD`.
const TEST: u32 = 0x3ba0;
const HWPT_ALLOC: u32 = 0x3b89;
const HWPT_INVALIDATE: u32 = 0x3b8d;
const VIOMMU_ALLOC: u32 = 0x3b90;

/// A process with a little memory.
#[derive(Debug, Clone)]
struct Caller {
    space: RegionSpace,
    /// Open files, from descriptor 0 on.
    files: Arc<Mutex<Vec<Arc<dyn TestFile>>>>,
}

impl Process for Caller {
    fn install_test_file(&self, file: Arc<dyn TestFile>) -> Result<i32, Errno> {
        let mut files = self.files.lock();
        files.push(file);
        Ok(files.len() as i32 - 1)
    }

    fn test_file(&self, fd: i32) -> Option<Arc<dyn TestFile>> {
        self.files.lock().get(usize::try_from(fd).ok()?).cloned()
    }
}

impl UserSpace for Caller {
    fn share(&self) -> Arc<dyn UserSpace> {
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

    fn dma_buf(&self, fd: i32) -> Option<Arc<DmaBuf>> {
        self.test_file(fd)?.dma_buf().cloned()
    }
}

/// A process and its iommufd.
struct Program {
    host: Arc<EmulatedHost>,
    caller: Caller,
    region: Arc<GuestRegionMmap>,
}

/// The results of `MOCK_DOMAIN`.
struct Mock {
    stdev: u32,
    hwpt: u32,
    idev: u32,
}

/// 64-bit fields as words of a body.
fn words(values: &[u64]) -> Vec<u32> {
    values.iter().flat_map(|value| [*value as u32, (*value >> 32) as u32]).collect()
}

type Answer = Result<Vec<u32>, Errno>;

impl Program {
    fn new() -> Self {
        let region = Arc::new(GuestRegionMmap::from_range(GuestAddress(0), 0x8000, None).unwrap());
        let space = RegionSpace::new(vec![region.clone()]);
        let caller = Caller { space, files: Arc::default() };
        Self { host: EmulatedHost::new(), caller, region }
    }

    /// Maps its memory.
    fn map(&self, ioas: u32, iova: u64, offset: u64, length: u64) {
        let memory = UserMemory::new(self.region.clone(), offset, length).unwrap();
        let target = MapTarget::Fixed(iova);
        self.host.ioas_map(ObjectId(ioas), &memory, target, Protection::READ_WRITE).unwrap();
    }

    /// The address of a byte of its memory.
    fn at(&self, offset: u64) -> u64 {
        self.region.as_ptr() as u64 + offset
    }

    /// Puts a structure of 32-bit words into its memory.
    fn put(&self, offset: u64, words: &[u32]) -> u64 {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.region.write_slice(&bytes, MemoryRegionAddress(offset)).unwrap();
        self.at(offset)
    }

    /// An ioctl on a structure of 32-bit words, the first of which is its size; returns the
    /// structure.
    fn ioctl(&self, request: u32, words: &[u32]) -> Answer {
        let size = 4 * words.len() as u32;
        let words = [size].into_iter().chain(words.iter().skip(1).copied());
        let mut bytes: Vec<u8> = words.flat_map(|word| word.to_ne_bytes()).collect();
        self.host.ioctl(request, &mut bytes, &self.caller)?;
        let (words, _) = bytes.as_chunks::<4>();
        Ok(words.iter().map(|word| u32::from_ne_bytes(*word)).collect())
    }

    /// A test operation with `body` as its part; returns that part.
    fn test(&self, operation: u32, id: u32, body: &[u32]) -> Answer {
        let mut words = vec![0, operation, id, 0];
        words.extend(body);
        words.resize(abi::SIZE / 4, 0);
        Ok(self.ioctl(TEST, &words)?.split_off(abi::BODY / 4))
    }

    fn ioas(&self) -> u32 {
        self.host.ioas_alloc().unwrap().0
    }

    fn mock(&self, pt: u32, flags: u32) -> Result<Mock, Errno> {
        let ids = self.test(op::MOCK_DOMAIN_FLAGS, pt, &[0, 0, 0, flags])?;
        Ok(Mock { stdev: ids[0], hwpt: ids[1], idev: ids[2] })
    }

    fn hwpt(&self, dev: u32, pt: u32, flags: HwptFlags) -> Result<u32, Errno> {
        let (dev, pt, data) = (ObjectId(dev), ObjectId(pt), HwptData::None);
        let id = self.host.hwpt_alloc(&HwptAlloc { flags, dev, pt, data, fault: None });
        id.map(|id| id.0).map_err(|error| error.errno)
    }

    /// A HWPT with driver-specific data.
    fn hwpt_with(&self, dev: u32, pt: u32, flags: u32, data: &[u32]) -> Result<u32, Errno> {
        self.hwpt_of(dev, pt, flags, 0, data)
    }

    /// A HWPT with driver-specific data, and a fault queue if the flags say so.
    fn hwpt_of(
        &self,
        dev: u32,
        pt: u32,
        flags: u32,
        fault: u32,
        data: &[u32],
    ) -> Result<u32, Errno> {
        let address = self.put(0x7000, data);
        let (low, high, length) = (address as u32, (address >> 32) as u32, 4 * data.len() as u32);
        let data_type = abi::IOMMU_HWPT_DATA_SELFTEST;
        let words = [0, flags, dev, pt, 0, 0, data_type, length, low, high, fault, 0];
        Ok(self.ioctl(HWPT_ALLOC, &words)?[4])
    }

    /// `HWPT_INVALIDATE` with entries of `width` words; returns the number completed, and the
    /// error.
    fn invalidate(&self, hwpt: u32, width: usize, entries: &[u32]) -> (u32, Result<(), Errno>) {
        let address = self.put(0x7000, entries);
        let (low, high) = (address as u32, (address >> 32) as u32);
        let (length, count) = (4 * width as u32, (entries.len() / width) as u32);
        let data_type = abi::IOMMU_HWPT_INVALIDATE_DATA_SELFTEST;
        let words = [32, hwpt, low, high, data_type, length, count, 0];
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let outcome = self.host.ioctl(HWPT_INVALIDATE, &mut bytes, &self.caller);
        (u32::from_ne_bytes(bytes[24..28].try_into().unwrap()), outcome.map(drop))
    }
}
