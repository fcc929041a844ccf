// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The byte-level rules: those of all ioctls, then by what the ioctls are for.

mod hwpt;
mod ioas;
mod structures;
mod vfio;
mod vfio_compat;
mod viommu;

use std::fs::File;
use std::sync::Arc;
use twostage::sync::Mutex;

use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress};

use super::{iommufd_request, Credentials, RegionSpace, UserFault, UserSpace};
use crate::host::objects::tests::fake::{Bench, Fake};
use crate::{DeviceConfig, DmaBuf, EmulatedHost, EventFile, VtdUnit, VtdUnitConfig};
use twostage::iommufd::{Errno, ObjectId, UserMemory};
use twostage::spec::pci::Bdf;

/// A field of an argument.
#[derive(Debug, Clone, Copy)]
enum Field {
    D(u32),
    Q(u64),
}
use Field::{D, Q};

/// A process with a little memory, and a host.
struct Process {
    bench: Bench,
    space: RegionSpace,
    region: Arc<GuestRegionMmap>,
    /// Open files by descriptor.
    files: Vec<(i32, Arc<File>)>,
    dma_bufs: Vec<(i32, Arc<DmaBuf>)>,
    who: Credentials,
    /// Open queues, from descriptor 10 on; none if the limit is reached.
    queues: Option<Queues>,
}

type Queues = Arc<Mutex<Vec<EventFile>>>;

/// The process as the host sees it.
#[derive(Debug)]
struct Caller {
    space: RegionSpace,
    files: Vec<(i32, Arc<File>)>,
    dma_bufs: Vec<(i32, Arc<DmaBuf>)>,
    queues: Option<Queues>,
}

impl super::Process for Caller {
    fn install(&self, file: EventFile) -> Result<i32, Errno> {
        let mut queues = self.queues.as_ref().ok_or(Errno::EMFILE)?.lock();
        queues.push(file);
        Ok(9 + queues.len() as i32)
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

    fn file(&self, fd: i32) -> Option<Arc<File>> {
        self.files.iter().find(|(number, _)| *number == fd).map(|(_, file)| file.clone())
    }

    fn dma_buf(&self, fd: i32) -> Option<Arc<DmaBuf>> {
        self.dma_bufs.iter().find(|(number, _)| *number == fd).map(|(_, buf)| buf.clone())
    }

    fn credentials(&self) -> Credentials {
        self.space.credentials()
    }
}

const MEMORY: u64 = 0x8000;
/// An address where no process has memory.
const NOWHERE: u64 = 0x1000;

impl Process {
    fn new() -> Self {
        Self::of(Bench::new())
    }

    /// A process on a host with the device `edu` behind a VT-d.
    fn with_edu() -> Self {
        let host = EmulatedHost::new();
        let unit = host.add_unit(VtdUnit::new(VtdUnitConfig::default()));
        host.add_device("edu", unit, Bdf::from_raw(0x20), DeviceConfig::default()).unwrap();
        let mut bench = Bench::of(Fake::able(), Fake::able());
        bench.host = host;
        Self::of(bench)
    }

    fn of(bench: Bench) -> Self {
        let region = GuestRegionMmap::from_range(GuestAddress(0), MEMORY as usize, None).unwrap();
        let region = Arc::new(region);
        let (space, who) = (RegionSpace::new(vec![region.clone()]), Credentials::privileged());
        Self {
            bench,
            space,
            region,
            files: Vec::new(),
            dma_bufs: Vec::new(),
            who,
            queues: Some(Queues::default()),
        }
    }

    fn caller(&self) -> Caller {
        let space = self.space.clone().with_credentials(self.who.clone());
        let (files, dma_bufs) = (self.files.clone(), self.dma_bufs.clone());
        Caller { space, files, dma_bufs, queues: self.queues.clone() }
    }

    /// Address of the byte at `offset` of the memory.
    fn at(&self, offset: u64) -> u64 {
        self.region.as_ptr() as u64 + offset
    }

    fn poke(&self, offset: u64, fields: &[Field]) -> u64 {
        let bytes = flat(fields);
        self.region.write_slice(&bytes, MemoryRegionAddress(offset)).unwrap();
        self.at(offset)
    }

    fn peek(&self, offset: u64) -> u64 {
        self.region.read_obj(MemoryRegionAddress(offset)).unwrap()
    }

    /// Makes ioctl `number` on a structure with these fields after its size.
    fn call(&self, number: u32, fields: &[Field]) -> Result<Vec<u8>, Errno> {
        let (outcome, answer) = self.call_and_look(number, fields);
        outcome.map(|()| answer)
    }

    /// The same; also returns the structure, even if the call failed.
    fn call_and_look(&self, number: u32, fields: &[Field]) -> (Result<(), Errno>, Vec<u8>) {
        let mut bytes = flat(&[D(0)]);
        bytes.extend(flat(fields));
        let size = bytes.len() as u32;
        bytes[..4].copy_from_slice(&size.to_ne_bytes());
        let outcome = self.bench.host.ioctl(iommufd_request(number), &mut bytes, &self.caller());
        (outcome.map(drop), bytes)
    }

    fn errno(&self, number: u32, fields: &[Field]) -> Errno {
        self.call(number, fields).expect_err(&format!("{fields:?}"))
    }
}

fn flat(fields: &[Field]) -> Vec<u8> {
    fields
        .iter()
        .flat_map(|field| match field {
            D(value) => value.to_ne_bytes().to_vec(),
            Q(value) => value.to_ne_bytes().to_vec(),
        })
        .collect()
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_ne_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_ne_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

fn id(id: ObjectId) -> Field {
    D(id.0)
}
