// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Device memory in an IOAS.

use iommufd_bindings::*;
use vm_memory::{Bytes, MemoryRegionAddress};

use super::{id, u64_at, Process, D, Q};
use crate::host::objects::tests::fake::{memory, Bench, Fake};
use crate::{DeviceConfig, DmaAttributes, DmaBuf, EmulatedHost, VtdUnit, VtdUnitConfig};
use twostage::iommufd::{Errno, HostIommu, MapTarget, ObjectId, Protection};
use twostage::spec::pci::Bdf;

const SIZE: u64 = 0x4000;
const FD: u32 = 5;

/// A process that has opened a device's memory, and an IOAS.
fn process() -> (Process, ObjectId) {
    let host = EmulatedHost::new();
    let unit = host.add_unit(VtdUnit::new(VtdUnitConfig::default()));
    host.add_device("edu", unit, Bdf::from_raw(0x20), DeviceConfig::default()).unwrap();
    let mut bench = Bench::of(Fake::able(), Fake::able());
    bench.host = host;
    let mut process = Process::of(bench);
    process.dma_bufs.push((FD as i32, DmaBuf::new(memory(SIZE))));
    let ioas = process.bench.ioas();
    (process, ioas)
}

impl Process {
    fn map_dma_buf(&self, ioas: ObjectId, start: u64, length: u64) -> Result<u64, Errno> {
        let fields = [D(6), id(ioas), D(FD), Q(start), Q(length), Q(0)];
        self.call(IOMMUFD_CMD_IOAS_MAP_FILE, &fields).map(|answer| u64_at(&answer, 32))
    }

    fn reaches(&self, iova: u64) -> bool {
        let mut port = self.bench.host.dma_port("edu").unwrap();
        port.write(DmaAttributes::default(), iova, &[1]).is_ok()
    }
}

#[test]
fn a_device_reaches_another_ones_memory_until_it_is_revoked() {
    let (process, ioas) = process();
    let (host, buf) = (&process.bench.host, &process.dma_bufs[0].1);
    let dev = process.bench.bind("edu");
    let before = process.map_dma_buf(ioas, 0x1000, SIZE - 0x1000).unwrap();
    host.device_attach(dev, None, ioas).unwrap();
    let after = process.map_dma_buf(ioas, 0, SIZE).unwrap();
    assert!(process.reaches(before) && process.reaches(after + SIZE - 1));
    assert_eq!(host.pinned_bytes(), 0, "it is not accounted");
    let mut first = [0];
    let region = buf.memory().region();
    region.read_slice(&mut first, MemoryRegionAddress(0x1000)).unwrap();
    assert_eq!(first, [1]);

    buf.revoke();
    assert!(!process.reaches(before) && !process.reaches(after));
    assert_eq!(process.map_dma_buf(ioas, 0, SIZE), Err(Errno::ENODEV));
    buf.restore();
    let anew = process.map_dma_buf(ioas, 0, SIZE).unwrap();
    assert!(process.reaches(anew));
    assert!(!process.reaches(before), "what was lost stays so");
    host.device_detach(dev, None).unwrap();
    host.device_attach(dev, None, ioas).unwrap();
    assert!(!process.reaches(before) && process.reaches(anew), "also to a new HWPT");
    buf.revoke();
    assert!(!process.reaches(anew));
    assert_eq!(process.bench.unmapped(ioas), 3 * SIZE - 0x1000);
}

#[test]
fn only_hwpts_hold_memory_of_a_device() {
    let (process, ioas) = process();
    let host = &process.bench.host;
    for (start, length, errno) in [
        (0, 0, Errno::EINVAL),
        (u64::MAX, 2, Errno::EOVERFLOW),
        (SIZE, SIZE, Errno::EINVAL),
        (0, SIZE + 1, Errno::EINVAL),
    ] {
        assert_eq!(process.map_dma_buf(ioas, start, length), Err(errno), "{start:#x} {length:#x}");
    }
    let iova = process.map_dma_buf(ioas, 0, SIZE).unwrap();
    let access = host.access_create(None).unwrap();
    access.attach(ioas).unwrap();
    assert_eq!(access.read(iova, &mut [0]).unwrap_err().errno, Errno::EINVAL);
    let change = process.call(IOMMUFD_CMD_IOAS_CHANGE_PROCESS, &[D(0)]);
    assert_eq!(change.unwrap_err(), Errno::EINVAL);
    let mut objects = host.objects();
    assert_eq!(objects.cut(ioas, iova + 0xfff).unwrap_err().errno, Errno::EOPNOTSUPP);
    drop(objects);
    let copy = MapTarget::Fixed(0x10_0000);
    let rw = Protection::READ_WRITE;
    host.ioas_copy(ioas, copy, ioas, iova, SIZE, rw).expect("a copy is as good");
}
