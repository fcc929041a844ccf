// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Access objects: sharing, pins, unmaps that wait.

use std::sync::{Arc, OnceLock, Weak};
use twostage::sync::Mutex;

use vm_memory::Bytes;

use super::fake::{memory, Bench, PLAIN};
use crate::{
    Access, AccessError, AccessUnmap, DeviceConfig, DmaAttributes, EmulatedHost, VtdUnit,
    VtdUnitConfig,
};
use twostage::iommufd::{Errno, HostIommu, MapTarget, ObjectId, Protection, UserMemory};
use twostage::spec::pci::Bdf;

/// A mediated device: pins on behalf of its driver, and unpins on request.
#[derive(Debug, Default)]
struct Mediated {
    access: OnceLock<Access>,
    pinned: Mutex<Vec<(u64, u64)>>,
    asked: Mutex<Vec<(u64, u64)>>,
    stubborn: bool,
}

impl Mediated {
    fn new(host: &Arc<EmulatedHost>, ioas: ObjectId, stubborn: bool) -> Arc<Self> {
        let device = Arc::new(Self { stubborn, ..Self::default() });
        let access = host.access_create(Some(Arc::new(Listener(Arc::downgrade(&device))))).unwrap();
        access.attach(ioas).unwrap();
        device.access.set(access).unwrap();
        device
    }

    fn access(&self) -> &Access {
        self.access.get().unwrap()
    }

    fn pin(&self, iova: u64, length: u64) -> Result<Vec<UserMemory>, Errno> {
        let places = self.access().pin_pages(iova, length, true).map_err(|error| error.errno)?;
        self.pinned.lock().push((iova, length));
        Ok(places)
    }

    fn asked(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.asked.lock())
    }
}

#[derive(Debug)]
struct Listener(Weak<Mediated>);

impl AccessUnmap for Listener {
    fn unmap(&self, iova: u64, length: u64) {
        let Some(device) = self.0.upgrade() else { return };
        device.asked.lock().push((iova, length));
        if device.stubborn {
            return;
        }
        let last = iova.saturating_add(length - 1);
        let mut pinned = device.pinned.lock();
        pinned.retain(|(pinned_iova, pinned_length)| {
            let touched = *pinned_iova <= last && iova <= pinned_iova + (pinned_length - 1);
            if touched {
                device.access().unpin_pages(*pinned_iova, *pinned_length).unwrap();
            }
            !touched
        });
    }
}

fn errno<T: std::fmt::Debug>(outcome: Result<T, AccessError>) -> Errno {
    outcome.unwrap_err().errno
}

#[test]
fn three_kinds_of_device_share_an_ioas() {
    let host = EmulatedHost::new();
    let unit = host.add_unit(VtdUnit::new(VtdUnitConfig::default()));
    host.add_device("pci", unit, Bdf::from_raw(0x20), DeviceConfig::default()).unwrap();
    let (pci, ioas) = (host.device_bind("pci").unwrap(), host.ioas_alloc().unwrap());
    let ram = memory(0x10_0000);
    let rw = Protection::READ_WRITE;
    host.ioas_map(ioas, &ram, MapTarget::Fixed(0x10_0000), rw).unwrap();

    let mediated = Mediated::new(&host, ioas, false);
    let vdpa = host.access_create(None).unwrap();
    vdpa.attach(ioas).unwrap();
    assert_eq!(host.pinned_bytes(), 0, "nobody has pinned anything");
    let page = mediated.pin(0x10_2000, 0x1000).unwrap().remove(0);
    assert_eq!(host.pinned_bytes(), 0x1000);
    host.device_attach(pci, None, ioas).unwrap();
    assert_eq!(host.pinned_bytes(), 0x10_0000, "pinned and accounted once");

    // What one of them writes, the others read.
    let mut port = host.dma_port("pci").unwrap();
    port.write(DmaAttributes::default(), 0x10_2010, b"pci").unwrap();
    let mut bytes = [0; 3];
    vdpa.read(0x10_2010, &mut bytes).unwrap();
    assert_eq!(&bytes, b"pci");
    vdpa.write(0x10_2010, b"vda").unwrap();
    page.slice().read_slice(&mut bytes, 0x10).unwrap();
    assert_eq!(&bytes, b"vda");
    page.slice().write_slice(b"mdv", 0x10).unwrap();
    port.read(DmaAttributes::default(), 0x10_2010, &mut bytes).unwrap();
    assert_eq!(&bytes, b"mdv");

    host.device_unbind(pci).unwrap();
    assert_eq!(host.pinned_bytes(), 0x1000, "what the mediated device has pinned stays");
    assert_eq!(host.ioas_unmap(ioas, 0, u64::MAX).unwrap(), 0x10_0000);
    assert_eq!(mediated.asked(), [(0x10_0000, 0x10_0000)], "only the area, and once");
    assert_eq!(host.pinned_bytes(), 0);
    assert_eq!(errno(vdpa.read(0x10_2010, &mut bytes)), Errno::ENOENT);
}

#[test]
fn an_unmap_waits_for_pins_and_gives_up_on_those_that_stay() {
    let bench = Bench::new();
    let ioas = bench.ioas();
    for iova in [0x1000, 0x2000, 0x8000] {
        bench.map(ioas, iova, 0x1000).unwrap();
    }
    let polite = Mediated::new(&bench.host, ioas, false);
    let stubborn = Mediated::new(&bench.host, ioas, true);
    polite.pin(0x1000, 0x2000).unwrap();
    polite.pin(0x1000, 0x2000).unwrap();
    stubborn.pin(0x8000, 0x1000).unwrap();
    assert_eq!(bench.host.ioas_unmap(ioas, 0x1000, 0x2000).unwrap(), 0x2000);
    assert_eq!(polite.asked(), [(0x1000, 0x1000)], "the second area had been let go by then");
    assert_eq!(stubborn.asked(), [(0x1000, 0x1000)], "all who are attached are asked");
    let stuck = bench.host.ioas_unmap(ioas, 0, u64::MAX).unwrap_err();
    assert_eq!(stuck.errno, Errno::EDEADLK);
    assert_eq!(stubborn.asked().len(), 100);
    assert_eq!(stubborn.pin(0x8000, 0x1000).unwrap_err(), Errno::EINVAL, "being unmapped");
    stubborn.access().unpin_pages(0x8000, 0x1000).unwrap();
    assert_eq!(bench.host.ioas_unmap(ioas, 0, u64::MAX).unwrap(), 0x1000);
}

#[test]
fn what_pins_and_transfers_are_refused() {
    let bench = Bench::new();
    let (host, ioas) = (&bench.host, bench.ioas());
    let reader = host.access_create(None).unwrap();
    let mediated = Mediated::new(host, ioas, false);
    bench.map(ioas, 0x1000, 0x2000).unwrap();
    host.ioas_map(ioas, &memory(0x1000), MapTarget::Fixed(0x3000), Protection::READ_ONLY).unwrap();
    let pin = |iova, length, write| errno(mediated.access().pin_pages(iova, length, write));
    assert_eq!(pin(0x1000, 0, false), Errno::EINVAL);
    assert_eq!(pin(u64::MAX, 2, false), Errno::EOVERFLOW);
    assert_eq!(pin(0x1800, 0x800, false), Errno::EINVAL, "not from the start of a page");
    assert_eq!(pin(0x1000, 0x3000, true), Errno::EPERM, "the last part is read-only");
    assert_eq!(pin(0x1000, 0x3001, false), Errno::ENOENT, "a hole at the end");
    assert_eq!(host.pinned_bytes(), 0, "a pin that fails leaves nothing");
    assert_eq!(errno(mediated.access().unpin_pages(0x1000, 0x1000)), Errno::EINVAL);
    mediated.access().pin_pages(0x1000, 0x2010, false).unwrap();
    assert_eq!(host.pinned_bytes(), 0x3000, "the last page as a whole");
    assert_eq!(errno(mediated.access().unpin_pages(0x1000, 0x2000)), Errno::EINVAL);
    mediated.access().unpin_pages(0x1000, 0x2010).unwrap();
    assert_eq!(host.pinned_bytes(), 0);

    let mut bytes = [0; 0x20];
    assert_eq!(errno(reader.read(0x1000, &mut bytes)), Errno::ENOENT, "attached to nothing");
    assert_eq!(errno(reader.replace(ioas)), Errno::ENOENT);
    assert_eq!(errno(reader.attach(ObjectId(99))), Errno::ENOENT);
    reader.attach(ioas).unwrap();
    assert_eq!(errno(reader.attach(ioas)), Errno::EINVAL);
    assert_eq!(errno(reader.pin_pages(0x1000, 0x1000, false)), Errno::EINVAL, "it cannot listen");
    assert_eq!(errno(reader.read(0x1000, &mut [])), Errno::EINVAL);
    assert_eq!(errno(reader.write(0x2ff0, &bytes)), Errno::EPERM, "the second half is read-only");
    reader.read(0x2ff0, &mut bytes).unwrap();
    assert_eq!(errno(reader.read(0x3ff0, &mut bytes)), Errno::ENOENT);
}

#[test]
fn one_that_pins_needs_aligned_mappings() {
    let bench = Bench::new();
    let ioas = bench.ioas();
    let alignment = || bench.host.ioas_iova_ranges(ioas).unwrap().alignment;
    let reader = bench.host.access_create(None).unwrap();
    reader.attach(ioas).unwrap();
    assert_eq!(alignment(), 1);
    bench.map(ioas, 0x1800, 0x1000).unwrap();
    let mediated = Mediated::new(&bench.host, bench.ioas(), false);
    assert_eq!(errno(mediated.access().replace(ioas)), Errno::EADDRINUSE);
    assert_eq!(mediated.asked(), [], "nothing has changed");
    bench.unmapped(ioas);
    mediated.access().replace(ioas).unwrap();
    assert_eq!(alignment(), 0x1000);
    mediated.access().detach().unwrap();
    assert_eq!(alignment(), 1);
}

#[test]
fn an_ioas_is_held_by_who_is_attached_and_left_without_pins() {
    let bench = Bench::new();
    let (host, first, second) = (&bench.host, bench.ioas(), bench.ioas());
    let mediated = Mediated::new(host, first, false);
    let stubborn = Mediated::new(host, first, true);
    for ioas in [first, second] {
        bench.map(ioas, 0x1000, 0x1000).unwrap();
    }
    assert_eq!(host.destroy(mediated.access().id()).unwrap_err().errno, Errno::EBUSY);
    for device in [&mediated, &stubborn] {
        device.pin(0x1000, 0x1000).unwrap();
        assert_eq!(host.destroy(first).unwrap_err().errno, Errno::EBUSY);
        device.access().replace(second).unwrap();
        assert_eq!(device.asked(), [(0, u64::MAX)]);
        device.access().replace(second).unwrap();
        assert_eq!(device.asked(), [], "no change");
    }
    assert_eq!(host.pinned_bytes(), 0);
    host.destroy(first).unwrap();
    mediated.pin(0x1000, 0x1000).unwrap();
    host.close();
    assert_eq!(mediated.asked(), [(0, u64::MAX)], "closing lets go");
    assert_eq!((host.pinned_bytes(), host.live_objects()), (0, 0));
    assert_eq!(errno(mediated.access().pin_pages(0x1000, 0x1000, true)), Errno::ENOENT);
}

#[test]
fn a_copy_of_pinned_pages_is_not_pinned_again() {
    let bench = Bench::new();
    let (a, src, dst) = (bench.bind("a"), bench.ioas(), bench.ioas());
    bench.map(src, 0x1000, 0x2000).unwrap();
    let mediated = Mediated::new(&bench.host, src, false);
    mediated.pin(0x1000, 0x1000).unwrap();
    bench.paging(a, dst, PLAIN).unwrap();
    let target = MapTarget::Fixed(0x8000);
    bench.host.ioas_copy(dst, target, src, 0x1000, 0x2000, Protection::READ_WRITE).unwrap();
    assert_eq!(bench.host.pinned_bytes(), 0x2000);
    assert_eq!(bench.unmapped(src), 0x2000);
    assert_eq!(bench.host.pinned_bytes(), 0x2000, "the copy keeps what it shows");
    assert_eq!(bench.unmapped(dst), 0x2000);
    assert_eq!(bench.host.pinned_bytes(), 0);
}
