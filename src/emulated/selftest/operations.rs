// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `IOMMU_TEST_CMD`: one ioctl of `/dev/iommu`, many operations. Here are those that create and
//! attach mock devices, act as a device or a vIOMMU, and export memory.

use std::mem::offset_of;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestRegionMmap};
use zerocopy::FromBytes;

use super::abi::{self, op, Dirty, DmabufGet, TriggerIopf, BODY};
use super::driver::{add_mock_device, mock_paging, with_driver};
use super::{access, checks};
use crate::host::device::Slot;
use crate::host::objects::{Change, Object};
use crate::host::refusal::{refuse, Outcome};
use crate::host::user_space::UserSpace;
use crate::ioas::{range_of, PAGE_SIZE};
use crate::uapi::{Argument, Process, TestFile};
use crate::{DmaBuf, EmulatedHost};
use twostage::iommufd::{
    Errno, ObjectId, PageRequest, PageRequestFlags, PageRequestPermissions, UserMemory,
};

/// The minimum limit of memory for batches: one entry of a batch.
const LEAST_MEMORY_LIMIT: u32 = 12;
/// Maximum number of bits of a bitmap of dirty pages.
const MAX_BITS: u64 = (16 << 20) * 8;
/// Maximum number of pages of an exported dma-buf.
const MAX_PAGES: u64 = 512;

/// A dma-buf of a test.
#[derive(Debug)]
struct TestDmaBuf(Arc<DmaBuf>);

impl TestFile for TestDmaBuf {
    fn name(&self) -> &'static str {
        "dmabuf"
    }

    fn dma_buf(&self) -> Option<&Arc<DmaBuf>> {
        Some(&self.0)
    }
}

/// Executes the operation in `argument`, a `struct iommu_test_cmd`.
///
/// # Errors
/// Those of Linux's operation; `EOPNOTSUPP` there is no such operation.
pub fn run(host: &EmulatedHost, argument: &mut Argument, process: &dyn Process) -> Outcome<()> {
    let id = argument.id(abi::ID);
    match argument.u32(abi::OP) {
        op::ADD_RESERVED => add_reserved(host, id, &body(argument)?),
        op::MOCK_DOMAIN => mock_domain(host, id, 0, argument),
        op::MOCK_DOMAIN_FLAGS => {
            let flags = body::<abi::MockDomain>(argument)?.dev_flags;
            mock_domain(host, id, flags, argument)
        }
        op::MOCK_DOMAIN_REPLACE => {
            let pt = ObjectId(body::<abi::MockDomainReplace>(argument)?.pt_id);
            let hwpt = host.objects().change_mock(id, None, pt, Change::Replace)?;
            argument.set_u32(BODY + offset_of!(abi::MockDomainReplace, pt_id), hwpt.0);
            Ok(())
        }
        op::MD_CHECK_MAP => checks::check_map(host, id, &body(argument)?, process),
        op::MD_CHECK_REFS => checks::check_refs(host, &body(argument)?, process),
        op::MD_CHECK_IOTLB => checks::check_iotlb(host, id, &body(argument)?),
        op::DEV_CHECK_CACHE => checks::check_device_cache(host, id, &body(argument)?),
        op::CREATE_ACCESS => access::create(host, id, argument, &body(argument)?, process),
        op::DESTROY_ACCESS_PAGES => {
            let item = body::<abi::DestroyAccessPages>(argument)?.access_pages_id;
            access::destroy_pages(fd(id), item, process)
        }
        op::ACCESS_PAGES => access::pages(host, fd(id), argument, &body(argument)?, process),
        op::ACCESS_RW => access::read_write(host, fd(id), &body(argument)?, process),
        op::ACCESS_REPLACE_IOAS => {
            let ioas = ObjectId(body::<abi::AccessReplaceIoas>(argument)?.ioas_id);
            access::replace_ioas(fd(id), ioas, process)
        }
        op::DIRTY => dirty(host, id, &body(argument)?, argument, process),
        op::SET_TEMP_MEMORY_LIMIT => set_memory_limit(body::<abi::MemoryLimit>(argument)?.limit),
        op::TRIGGER_IOPF => page_request(host, &body(argument)?),
        op::TRIGGER_VEVENT => vevent(host, ObjectId(body::<abi::TriggerVevent>(argument)?.dev_id)),
        op::DMABUF_GET => {
            let fd = export(&body(argument)?, process)?;
            argument.set_result(fd);
            Ok(())
        }
        op::DMABUF_REVOKE => {
            let abi::DmabufRevoke { dmabuf_fd, revoked } = body(argument)?;
            revoke(dmabuf_fd, revoked != 0, process)
        }
        op::PASID_ATTACH => pasid_change(host, id, argument, Change::Attach),
        op::PASID_REPLACE => pasid_change(host, id, argument, Change::Replace),
        op::PASID_DETACH => pasid_detach(host, id, &body(argument)?),
        op::PASID_CHECK_HWPT => pasid_check_hwpt(host, id, &body(argument)?),
        other => refuse(Errno::EOPNOTSUPP, format!("there is no test operation {other}")),
    }
}

/// The operation-specific part of `argument`.
fn body<T: FromBytes>(argument: &Argument) -> Outcome<T> {
    match T::read_from_prefix(argument.rest(BODY)) {
        Ok((body, _)) => Ok(body),
        Err(_) => refuse(Errno::EINVAL, "the structure is too short for the operation"),
    }
}

fn add_reserved(host: &EmulatedHost, ioas: ObjectId, body: &abi::AddReserved) -> Outcome<()> {
    let &abi::AddReserved { start, length } = body;
    if length == 0 {
        return refuse(Errno::EINVAL, "length 0");
    }
    match range_of(start, length) {
        Some(range) => host.objects().reserve_iovas(ioas, range),
        None => refuse(Errno::EOVERFLOW, format!("{start:#x} + {length:#x} is past 2^64")),
    }
}

fn mock_domain(
    host: &EmulatedHost,
    pt: ObjectId,
    flags: u32,
    argument: &mut Argument,
) -> Outcome<()> {
    let name = add_mock_device(host.machine(), flags)?;
    let ids = host.objects().add_mock_device(&name, pt)?;
    argument.set_u32(BODY + offset_of!(abi::MockDomain, out_stdev_id), ids.selftest.0);
    argument.set_u32(BODY + offset_of!(abi::MockDomain, out_hwpt_id), ids.hwpt.0);
    argument.set_u32(BODY + offset_of!(abi::MockDomain, out_idev_id), ids.dev.0);
    Ok(())
}

/// Limits the kernel's memory for page lists of page table updates: with little, it makes more
/// passes. There are no such lists here, so this has no effect.
fn set_memory_limit(limit: u32) -> Outcome<()> {
    if limit < LEAST_MEMORY_LIMIT {
        return refuse(Errno::EINVAL, format!("{limit} bytes are not enough for one entry"));
    }
    Ok(())
}

/// Some operations use a descriptor.
fn fd(id: ObjectId) -> i32 {
    id.0.cast_signed()
}

/// PASID 0 means the device itself (`IOMMU_NO_PASID`).
fn slot(pasid: u32) -> Slot {
    (pasid != 0).then_some(pasid)
}

fn pasid_change(
    host: &EmulatedHost,
    id: ObjectId,
    argument: &mut Argument,
    change: Change,
) -> Outcome<()> {
    let abi::PasidChange { pasid, pt_id } = body(argument)?;
    let hwpt = host.objects().change_mock(id, slot(pasid), ObjectId(pt_id), change)?;
    argument.set_u32(BODY + offset_of!(abi::PasidChange, pt_id), hwpt.0);
    Ok(())
}

fn pasid_detach(host: &EmulatedHost, id: ObjectId, body: &abi::PasidChange) -> Outcome<()> {
    let mut objects = host.objects();
    let dev = objects.table().selftest(id)?.dev;
    objects.device_detach(dev, slot(body.pasid))
}

/// Whether the PASID is attached to the HWPT, or to none if it is 0.
fn pasid_check_hwpt(host: &EmulatedHost, id: ObjectId, body: &abi::PasidChange) -> Outcome<()> {
    let objects = host.objects();
    let dev = objects.table().selftest(id)?.dev;
    let attached = objects.attached_to(dev, slot(body.pasid));
    let wanted = ObjectId(body.pt_id);
    match objects.table().get(wanted) {
        _ if body.pt_id == 0 && attached.is_none() => Ok(()),
        _ if body.pt_id == 0 => refuse(Errno::EINVAL, format!("{attached:?} is attached")),
        None => refuse(Errno::ENOENT, format!("there is no object {wanted}")),
        Some(Object::HwptPaging(_) | Object::HwptNested(_)) if attached == Some(wanted) => Ok(()),
        Some(_) => refuse(Errno::EINVAL, format!("{attached:?} is attached, not {wanted}")),
    }
}

/// `DIRTY`: marks the leaves of the IOVAs in `uptr`, a bitmap: one bit for every `page_size` bytes
/// of the range, whether anything is mapped there or not.
fn dirty(
    host: &EmulatedHost,
    hwpt: ObjectId,
    body: &Dirty,
    argument: &mut Argument,
    user: &dyn UserSpace,
) -> Outcome<()> {
    let &Dirty { iova, length, page_size, uptr, .. } = body;
    let aligned = page_size != 0 && (iova % page_size, length % page_size) == (0, 0);
    if !aligned || length == 0 || uptr == 0 {
        return refuse(
            Errno::EINVAL,
            format!("{length:#x} bytes at {iova:#x} in pages of {page_size:#x}"),
        );
    }
    let bits = length / page_size;
    if bits > MAX_BITS {
        return refuse(Errno::EOVERFLOW, format!("a bitmap of {bits} bits"));
    }
    let objects = host.objects();
    let paging = objects.table().hwpt_paging(hwpt)?;
    let (Some(domain), Some(log)) = (mock_paging(&*paging.domain), paging.domain.dirty_log())
    else {
        return refuse(Errno::EINVAL, format!("HWPT_PAGING {hwpt} tracks no dirty pages"));
    };
    if !log.is_enabled() {
        return refuse(Errno::EINVAL, format!("dirty tracking of HWPT_PAGING {hwpt} is off"));
    }
    // At most 16 MiB.
    let mut bitmap = vec![0u8; bits.div_ceil(8) as usize];
    user.read(uptr, &mut bitmap)?;
    let ioas = objects.table().ioas(paging.ioas)?;
    let mut marked = 0u64;
    for bit in set_bits(&bitmap).take_while(|bit| *bit < bits) {
        marked += 1;
        let at = iova.wrapping_add(bit * page_size);
        let Some((start, area)) = ioas.space.first_area_in(&(at..=at)) else { continue };
        let output = area.pages.start_of(area.offset);
        if let Some(leaf) = domain.leaf(&(start..=area.last), output, at, ioas.huge_pages) {
            log.mark(leaf);
        }
    }
    let marked = marked.to_ne_bytes();
    argument.set(BODY + offset_of!(Dirty, out_nr_dirty), marked);
    Ok(())
}

/// The indices of the set bits, starting with the lowest bit of the first byte.
fn set_bits(bitmap: &[u8]) -> impl Iterator<Item = u64> + '_ {
    let of_byte = |(index, byte): (usize, &u8)| {
        let byte = *byte;
        let first = 8 * index as u64;
        (0..8).filter(move |bit| byte & 1 << bit != 0).map(move |bit| first + bit)
    };
    bitmap.iter().enumerate().flat_map(of_byte)
}

/// `TRIGGER_IOPF`: the device sends a page request, in a group of one. It gets no error if nobody
/// serves it.
fn page_request(host: &EmulatedHost, body: &TriggerIopf) -> Outcome<()> {
    let &TriggerIopf { dev_id, pasid, grpid, perm, addr } = body;
    let dev = ObjectId(dev_id);
    with_driver(host, dev, |_, _| Ok(()))?;
    let request = PageRequest {
        flags: PageRequestFlags::new().with_last_page(true).with_pasid_valid(pasid != 0),
        pasid,
        group: grpid,
        permissions: PageRequestPermissions::from_bits(perm),
        address: addr,
    };
    match host.objects().page_request(dev, request) {
        Err(refusal) if refusal.errno == Errno::EINVAL => Ok(()),
        outcome => outcome,
    }
}

/// `TRIGGER_VEVENT`: an event of the device, with the guest's ID.
fn vevent(host: &EmulatedHost, dev: ObjectId) -> Outcome<()> {
    with_driver(host, dev, |driver, part| {
        let rid = part.requester.rid;
        match driver.devices().change(rid, |device| Ok(device.virtual_id.clone()))? {
            // In Linux 0 means "none".
            Some((vdevices, virt_id)) if virt_id != 0 => vdevices.report(virt_id),
            _ => refuse(Errno::ENOENT, format!("no vIOMMU knows device {dev}")),
        }
    })
}

/// `DMABUF_GET`: the descriptor of a new dma-buf, the ioctl's return value.
fn export(body: &DmabufGet, process: &dyn Process) -> Outcome<i32> {
    let length = u64::from(body.length).next_multiple_of(PAGE_SIZE);
    if length == 0 || length > MAX_PAGES * PAGE_SIZE {
        return refuse(Errno::EINVAL, format!("a dma-buf of {length:#x} bytes"));
    }
    // At most 2 MiB.
    let region = GuestRegionMmap::<()>::from_range(GuestAddress(0), length as usize, None);
    let region = region.or_else(|error| refuse(Errno::ENOMEM, error.to_string()))?;
    let file = TestDmaBuf(DmaBuf::new(UserMemory::whole(Arc::new(region))));
    let fd = process.install_test_file(Arc::new(file));
    fd.or_else(|errno| refuse(errno, "the process can have no descriptor"))
}

/// `DMABUF_REVOKE`: revokes the memory, or restores it for new mappings. In both cases existing
/// mappings lose it.
fn revoke(fd: i32, revoked: bool, process: &dyn Process) -> Outcome<()> {
    let Some(buf) = process.dma_buf(fd) else {
        let errno = if process.file(fd).is_some() { Errno::EINVAL } else { Errno::EBADF };
        return refuse(errno, format!("{fd} is not a dma-buf"));
    };
    buf.revoke();
    if !revoked {
        buf.restore();
    }
    Ok(())
}
