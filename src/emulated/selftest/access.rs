// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A program that acts as a device without an IOMMU: access objects, each with a descriptor. Their
//! IOVAs may be given by the index of a mapping, which a fuzzer guesses more easily.

use std::any::Any;
use std::mem::offset_of;
use std::ops::RangeInclusive;
use std::sync::{Arc, MutexGuard, OnceLock, Weak};
use twostage::sync::Mutex;

use iommufd_bindings::{iommu_ioas_copy, IOMMUFD_CMD_IOAS_COPY};

use super::abi::{self, AccessPages, AccessRw, CreateAccess, BODY};
use super::checks::{Held, Places};
use crate::host::access::{Access, AccessError};
use crate::host::objects::AccessUnmap;
use crate::host::refusal::{refuse, Outcome, Refusal};
use crate::ioas::{range_of, IovaSpace, PAGE_SIZE};
use crate::uapi::{Argument, Process, TestFile};
use crate::EmulatedHost;
use twostage::iommufd::{Errno, ObjectId, UserMemory};

/// `EBADE`, which the uAPI does not use: pages are not the expected ones.
const EBADE: Errno = Errno::from_raw(52);
/// Maximum number of bytes to pin or copy in one operation.
const MAX_LENGTH: u64 = 16 << 20;

/// An access object of a test.
#[derive(Debug)]
struct TestAccess {
    access: Arc<Access>,
    /// Only with permission to pin.
    items: Option<Arc<Items>>,
}

/// The pins. Its lock is taken before those of the host.
#[derive(Debug, Default)]
struct Items {
    access: OnceLock<Weak<Access>>,
    pinned: Mutex<Pinned>,
}

#[derive(Debug, Default)]
struct Pinned {
    items: Vec<Item>,
    next_id: u32,
}

/// The pins of one `ACCESS_PAGES`.
#[derive(Debug)]
struct Item {
    id: u32,
    iovas: RangeInclusive<u64>,
}

impl Item {
    fn unpin(&self, access: &Access) {
        let length = self.iovas.end() - self.iovas.start() + 1;
        // Fails if the iommufd was closed: then nothing is pinned any more.
        let _ = access.unpin_pages(*self.iovas.start(), length);
    }
}

impl Items {
    fn lock(&self) -> MutexGuard<'_, Pinned> {
        self.pinned.lock()
    }

    /// Unpins what is `concerned`; returns whether there was anything.
    fn drop_those(&self, concerned: impl Fn(&Item) -> bool) -> bool {
        // An access object that is being dropped unpins by itself.
        let access = self.access.get().and_then(Weak::upgrade);
        let mut pinned = self.lock();
        let (gone, items): (Vec<_>, Vec<_>) = pinned.items.drain(..).partition(concerned);
        pinned.items = items;
        if let Some(access) = access {
            gone.iter().for_each(|item| item.unpin(&access));
        }
        !gone.is_empty()
    }
}

impl AccessUnmap for Items {
    fn unmap(&self, iova: u64, length: u64) {
        let last = iova.saturating_add(length - length.min(1));
        self.drop_those(|item| *item.iovas.start() <= last && iova <= *item.iovas.end());
    }
}

impl From<AccessError> for Refusal {
    fn from(error: AccessError) -> Self {
        Self { errno: error.errno, detail: error.to_string().into() }
    }
}

impl TestAccess {
    /// The effective IOVA: [`in_area`], with the flag for it.
    fn iova(&self, host: &EmulatedHost, iova: u64, flags: u32) -> u64 {
        if flags & abi::MOCK_FLAGS_ACCESS_SYZ == 0 {
            return iova;
        }
        let objects = host.objects();
        let ioas = objects.access_ioas(self.access.id()).ok().flatten();
        let ioas = ioas.and_then(|ioas| objects.table().ioas(ioas).ok());
        ioas.map_or(0, |ioas| in_area(&ioas.space, iova))
    }
}

impl TestFile for TestAccess {
    fn name(&self) -> &'static str {
        "iommufd_test_staccess"
    }
}

/// `CREATE_ACCESS`: an access object on the IOAS, as a descriptor.
pub fn create(
    host: &EmulatedHost,
    ioas: ObjectId,
    argument: &mut Argument,
    body: &CreateAccess,
    process: &dyn Process,
) -> Outcome<()> {
    const PINS: u32 = abi::MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES;
    if body.flags & !PINS != 0 {
        return refuse(
            Errno::EOPNOTSUPP,
            format!("access objects have no flags {:#x}", body.flags),
        );
    }
    let items = (body.flags & PINS != 0).then(Arc::<Items>::default);
    let listener = items.clone().map(|items| items as Arc<dyn AccessUnmap>);
    let access = Arc::new(host.access_create(listener)?);
    if let Some(items) = &items {
        // Empty until now.
        let _ = items.access.set(Arc::downgrade(&access));
    }
    access.attach(ioas)?;
    let fd = match process.install_test_file(Arc::new(TestAccess { access, items })) {
        Ok(fd) => fd,
        // Linux returns this for any error.
        Err(errno) => return refuse(Errno::ENOMEM, format!("there is no descriptor: {errno}")),
    };
    argument.set(BODY + offset_of!(CreateAccess, out_access_fd), fd.to_ne_bytes());
    Ok(())
}

/// `ACCESS_REPLACE_IOAS`.
pub fn replace_ioas(fd: i32, ioas: ObjectId, process: &dyn Process) -> Outcome<()> {
    with_access(fd, process, |access| Ok(access.access.replace(ioas)?))
}

/// `ACCESS_PAGES`: pins, and checks that the pages are the memory at `uptr` unless that is 0.
pub fn pages(
    host: &EmulatedHost,
    fd: i32,
    argument: &mut Argument,
    body: &AccessPages,
    process: &dyn Process,
) -> Outcome<()> {
    let &AccessPages { flags, length, uptr, .. } = body;
    check_arguments(length, flags, abi::MOCK_FLAGS_ACCESS_WRITE)?;
    with_access(fd, process, |access| {
        let Some(items) = &access.items else {
            return refuse(Errno::EOPNOTSUPP, "the access object cannot pin");
        };
        let iova = access.iova(host, body.iova, flags);
        // An unmap waits here for the item that it must drop.
        let mut pinned = items.lock();
        let write = flags & abi::MOCK_FLAGS_ACCESS_WRITE != 0;
        let memory = access.access.pin_pages(iova, length, write)?;
        // Pinned ranges are neither empty nor wrap.
        let iovas = range_of(iova, length).unwrap_or(iova..=iova);
        let item = Item { id: pinned.next_id, iovas };
        if uptr != 0 {
            let same = is_memory_at(process, uptr.wrapping_sub(iova % PAGE_SIZE), iova, &memory);
            same.inspect_err(|_| item.unpin(&access.access))?;
        }
        argument.set_u32(BODY + offset_of!(AccessPages, out_access_pages_id), item.id);
        pinned.next_id = pinned.next_id.wrapping_add(1);
        pinned.items.push(item);
        Ok(())
    })
}

/// `DESTROY_ACCESS_PAGES`.
pub fn destroy_pages(fd: i32, item: u32, process: &dyn Process) -> Outcome<()> {
    with_access(fd, process, |access| match &access.items {
        Some(items) if items.drop_those(|it| it.id == item) => Ok(()),
        _ => refuse(Errno::ENOENT, format!("{item} is not pinned")),
    })
}

/// `ACCESS_RW`: copies between the IOAS and the memory at `uptr`. The kernel has two paths for it,
/// one of which can be requested; here there is one.
pub fn read_write(
    host: &EmulatedHost,
    fd: i32,
    body: &AccessRw,
    process: &dyn Process,
) -> Outcome<()> {
    let &AccessRw { length, uptr, flags, .. } = body;
    check_arguments(length, flags, abi::MOCK_ACCESS_RW_WRITE | abi::MOCK_ACCESS_RW_SLOW_PATH)?;
    with_access(fd, process, |access| {
        // At most 16 MiB.
        let mut bytes = vec![0; length as usize];
        if flags & abi::MOCK_ACCESS_RW_WRITE != 0 {
            process.read(uptr, &mut bytes)?;
            access.access.write(access.iova(host, body.iova, flags), &bytes)?;
        } else {
            access.access.read(access.iova(host, body.iova, flags), &mut bytes)?;
            process.write(uptr, &bytes)?;
        }
        Ok(())
    })
}

/// Calls `with` with the access object open as `fd`.
///
/// # Errors
/// `EBADFD` something else, or nothing, is open there: Linux has one error for both.
fn with_access(
    fd: i32,
    process: &dyn Process,
    with: impl FnOnce(&TestAccess) -> Outcome<()>,
) -> Outcome<()> {
    let file = process.test_file(fd);
    match file.as_deref().and_then(|file| (file as &dyn Any).downcast_ref()) {
        Some(access) => with(access),
        None => refuse(Errno::EBADFD, format!("{fd} is not an access object")),
    }
}

fn check_arguments(length: u64, flags: u32, known: u32) -> Outcome<()> {
    if length > MAX_LENGTH {
        return refuse(Errno::ENOMEM, format!("{length:#x} bytes at once"));
    }
    let unknown = flags & !(known | abi::MOCK_FLAGS_ACCESS_SYZ);
    if unknown != 0 {
        return refuse(Errno::EOPNOTSUPP, format!("flags {unknown:#x}"));
    }
    Ok(())
}

/// Whether `memory`, which `iova` maps to, is in the process's pages from `address` on.
fn is_memory_at(
    process: &dyn Process,
    address: u64,
    iova: u64,
    memory: &[UserMemory],
) -> Outcome<()> {
    let length: u64 = memory.iter().map(UserMemory::length).sum();
    let held = Held::new(process, address, address.wrapping_add(iova % PAGE_SIZE + length));
    let places = Places::now()?;
    // The first byte of each page of `memory`.
    let mut at = iova;
    let mut wanted = held.pages(&places).map(|(_, place)| place);
    for piece in memory {
        let place = places.of(piece);
        let end = at + piece.length();
        while at < end {
            let found = place.as_ref().map(|place| place.plus(piece.length() - (end - at)));
            let Some(wanted) = wanted.next() else { return held.fault.clone() };
            if !found.is_some_and(|found| found.is_in_pages(&wanted, 1)) {
                return refuse(
                    EBADE,
                    format!("the memory at {at:#x} differs from that at {address:#x}"),
                );
            }
            at = (at / PAGE_SIZE + 1) * PAGE_SIZE;
        }
        at = end;
    }
    Ok(())
}

/// The IOVA encoded in `iova`: its lower half is the index of a mapping, by ascending IOVA, the
/// upper half an offset in it. 0 if there is no such mapping.
fn in_area(space: &IovaSpace, iova: u64) -> u64 {
    // Truncated to the lower half.
    let (number, offset) = (iova as u32, iova >> 32);
    space.areas().nth(number as usize).map_or(0, |(start, _)| start.wrapping_add(offset))
}

/// Converts an `IOAS_COPY` with the flag for a source by index to an ordinary one.
pub fn convert_copy(host: &EmulatedHost, number: u32, argument: &mut Argument) {
    const FLAGS: usize = offset_of!(iommu_ioas_copy, flags);
    const SRC_IOVA: usize = offset_of!(iommu_ioas_copy, src_iova);
    let flags = argument.u32(FLAGS);
    if number != IOMMUFD_CMD_IOAS_COPY || flags & abi::MOCK_FLAGS_ACCESS_SYZ == 0 {
        return;
    }
    argument.set_u32(FLAGS, flags & !abi::MOCK_FLAGS_ACCESS_SYZ);
    let objects = host.objects();
    if let Ok(ioas) = objects.table().ioas(argument.id(offset_of!(iommu_ioas_copy, src_ioas_id))) {
        argument.set_u64(SRC_IOVA, in_area(&ioas.space, argument.u64(SRC_IOVA)));
    }
}
