// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that stays available while an emulated device may access it.
//!
//! A kernel takes a reference on each page. Here, a shared mapping is mapped a second time, hidden
//! from the program, so that it does not matter what happens to the first. Private memory cannot be
//! mapped twice. It is used in place; when the program unmaps it, the hook leaves it in place until
//! nobody uses it ([`Pins::release`]), and refuses to move it. Protections set by the program do
//! not affect devices ([`sys::read_anyway`]). Pages that the program discards, or punches out of
//! their file, are lost to devices, too: a kernel would keep them; here that is reported
//! ([`crate::memory::taken`]).
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use libc::{PROT_READ, PROT_WRITE};
use twostage::iommufd::{Errno, UserMemory};
use twostage_emulated::maps::{self, FileKey, Mapping};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryRegion, GuestRegionMmap};

use crate::sys;
use crate::table::Internal;

const PAGE_SIZE: u64 = 4096;

/// What a process has pinned.
#[derive(Debug, Default)]
pub struct Pins {
    /// Number of private pieces held: hooks check nothing else while it is 0.
    held: AtomicUsize,
    list: Mutex<List>,
    /// Files that are mapped directly.
    files: Mutex<Vec<MappedFile>>,
}

/// A file, with device and inode if it is memory.
type MappedFile = (Option<FileKey>, Internal<Arc<File>>);

#[derive(Debug, Default)]
struct List {
    /// By file, and whether the mapping is writable.
    second: BTreeMap<(FileKey, bool), Vec<SecondMapping>>,
    held: Vec<Held>,
    /// Whether the program has unmapped some of what is held.
    unmapped: bool,
    /// The number of entries at which dead ones are removed.
    sweep_at: usize,
}

/// Shared memory, mapped a second time. Dropping it unmaps it.
#[derive(Debug)]
struct SecondMapping {
    /// Its offset in the file, in bytes.
    offset: u64,
    region: Arc<GuestRegionMmap>,
}

impl Drop for SecondMapping {
    fn drop(&mut self) {
        // SAFETY: it was mapped for the region, which nobody else has any more.
        unsafe { sys::unmap(self.region.as_ptr() as u64, self.region.len()) };
    }
}

impl SecondMapping {
    /// Whether `address` is in it, where the program has nothing.
    fn has(&self, address: u64) -> bool {
        let start = self.region.as_ptr() as u64;
        (start..start + self.region.len()).contains(&address)
    }
}

/// Private memory, used in place.
#[derive(Debug)]
struct Held {
    start: u64,
    end: u64,
    region: Arc<GuestRegionMmap>,
    /// The parts unmapped by the program.
    unmapped: Vec<(u64, u64)>,
}

/// Whether anybody except the list of pins has `region`. Only the list hands it out.
fn in_use(region: &Arc<GuestRegionMmap>) -> bool {
    Arc::strong_count(region) > 1
}

impl Pins {
    /// Pins memory of process `pid`, which is `own` or another: of `length` bytes at `address` as
    /// many as are in one mapping.
    ///
    /// # Errors
    /// `EFAULT` nothing is mapped there, or it cannot be read, or not written when `writable`; it
    /// is private memory of another process; the process is gone. `ENOMEM` it cannot be mapped
    /// again.
    pub fn pin(
        &self,
        pid: i32,
        own: bool,
        address: u64,
        length: u64,
        writable: bool,
    ) -> Result<UserMemory, Errno> {
        let mapping = maps::find(pid, address).ok_or(Errno::EFAULT)?;
        let mut list = self.list();
        if list.second.values().flatten().any(|second| second.has(address)) {
            return Err(Errno::EFAULT);
        }
        let accessible = if writable { mapping.writable } else { mapping.readable };
        if !accessible {
            return Err(Errno::EFAULT);
        }
        let length = length.min(mapping.end - address);
        let (region, start) = if mapping.shared {
            match list.second_mapping(pid, own, &mapping, address, length) {
                // Huge pages cannot be mapped twice without the file: they are used in place.
                Err(_) if own => list.hold(address, length)?,
                result => result?,
            }
        } else if own {
            list.hold(address, length)?
        } else {
            log::warn!(
                "private memory of process {pid} at {address:#x} cannot be pinned from here"
            );
            return Err(Errno::EFAULT);
        };
        self.count(&list);
        UserMemory::new(region, address - start, length).map_err(|_| Errno::EFAULT)
    }

    /// The program unmaps, or maps over, `length` bytes at `address`. Returns whether all of it may
    /// be unmapped; otherwise some is pinned and stays, and the rest was unmapped.
    pub fn release(&self, address: u64, length: u64) -> bool {
        if !self.holds() {
            return true;
        }
        let mut list = self.list();
        let all = list.release(address, address.saturating_add(length));
        self.count(&list);
        all
    }

    /// Whether any of `length` bytes at `address` is pinned in place.
    pub fn is_held(&self, address: u64, length: u64) -> bool {
        let end = address.saturating_add(length);
        self.holds() && self.list().has(address, end)
    }

    /// The same for callers that must not block, such as an allocator called by the holder of the
    /// list's lock: false in that case.
    pub fn seems_held(&self, address: u64, length: u64) -> bool {
        let end = address.saturating_add(length);
        self.holds() && self.list.try_lock().is_some_and(|list| list.has(address, end))
    }

    /// `file`, which is mapped directly, with a key if it is memory: it is open, out of the
    /// program's reach, while anybody has the result.
    pub fn mapped_file(&self, key: Option<FileKey>, file: File) -> Arc<File> {
        let file = Internal::shared(file);
        let share = file.share();
        self.files.lock().push((key, file));
        share
    }

    /// Whether pages of the file `key` are pinned.
    pub fn has_file(&self, key: &FileKey) -> bool {
        let files = self.files.lock();
        if files.iter().any(|(of, file)| of.as_ref() == Some(key) && file.is_shared()) {
            return true;
        }
        drop(files);
        let list = self.list();
        let mut second = list.second.iter().filter(|((of, _), _)| of == key);
        second.any(|(_, mappings)| mappings.iter().any(|mapping| in_use(&mapping.region)))
    }

    /// Releases what is no longer used.
    pub fn sweep(&self) {
        self.files.lock().retain(|(_, file)| file.is_shared());
        let mut list = self.list();
        list.second.retain(|_, mappings| {
            mappings.retain(|mapping| in_use(&mapping.region));
            !mappings.is_empty()
        });
        if list.unmapped {
            list.sweep_held();
            self.count(&list);
        }
    }

    fn holds(&self) -> bool {
        self.held.load(Ordering::Acquire) != 0
    }

    fn count(&self, list: &List) {
        self.held.store(list.held.len(), Ordering::Release);
    }

    fn list(&self) -> MutexGuard<'_, List> {
        self.list.lock()
    }
}

impl List {
    /// Whether any address from `start` to `end` is pinned in place.
    fn has(&self, start: u64, end: u64) -> bool {
        let mut held = self.held.iter().filter(|held| in_use(&held.region));
        held.any(|held| held.start < end && start < held.end)
    }

    /// A second mapping of the shared memory `mapping`, and the corresponding address in process
    /// `pid`. One mapping serves all pins of the same part of a file.
    fn second_mapping(
        &mut self,
        pid: i32,
        own: bool,
        mapping: &Mapping,
        address: u64,
        length: u64,
    ) -> Result<(Arc<GuestRegionMmap>, u64), Errno> {
        let key = (mapping.file.clone(), mapping.writable);
        let mappings = self.second.entry(key).or_default();
        let wanted = mapping.offset + (address - mapping.start);
        let known = mappings.iter().find(|known| {
            known.offset <= wanted && wanted + length <= known.offset + known.region.len()
        });
        let (offset, region) = match known {
            Some(known) => (known.offset, known.region.clone()),
            None => {
                let new = map_again(pid, own, mapping)?;
                let found = (new.offset, new.region.clone());
                mappings.push(new);
                found
            }
        };
        // The address of that offset in the process. May wrap: only differences matter.
        Ok((region, mapping.start.wrapping_add(offset).wrapping_sub(mapping.offset)))
    }

    /// The pages of this process around `length` bytes at `address`, in place.
    fn hold(&mut self, address: u64, length: u64) -> Result<(Arc<GuestRegionMmap>, u64), Errno> {
        if self.held.len() >= self.sweep_at {
            self.sweep_held();
            self.sweep_at = 2 * self.held.len().max(32);
        }
        let start = address & !(PAGE_SIZE - 1);
        let end = (address + length).next_multiple_of(PAGE_SIZE);
        // SAFETY: the memory is a mapping of this process, and stays one while the region exists:
        // the hooks of munmap, mmap and mremap ensure that.
        let region = Arc::new(unsafe { region_at(start, end - start) }?);
        self.held.push(Held { start, end, region: region.clone(), unmapped: Vec::new() });
        Ok((region, start))
    }

    fn release(&mut self, address: u64, end: u64) -> bool {
        self.sweep_held();
        let pinned = self.held.iter().any(|held| held.start < end && address < held.end);
        if !pinned {
            return true;
        }
        let mut at = address;
        while at < end {
            let held = |held: &&mut Held| held.start <= at && at < held.end;
            let piece = if let Some(held) = self.held.iter_mut().find(held) {
                let piece = held.end.min(end);
                held.unmapped.push((at, piece));
                self.unmapped = true;
                piece
            } else {
                let next = self.held.iter().map(|held| held.start).filter(|start| *start > at);
                let piece = next.min().map_or(end, |next| next.min(end));
                // SAFETY: the program requested it, and nothing here is pinned.
                unsafe { sys::unmap(at, piece - at) };
                piece
            };
            at = piece;
        }
        false
    }

    fn sweep_held(&mut self) {
        let (live, dead): (Vec<_>, Vec<_>) =
            self.held.drain(..).partition(|held| in_use(&held.region));
        self.held = live;
        self.unmapped = self.held.iter().any(|held| !held.unmapped.is_empty());
        for (start, end) in dead.into_iter().flat_map(|held| held.unmapped) {
            // Another pin may have the same pages: it unmaps them in the end.
            if self.release(start, end) {
                // SAFETY: the program unmapped it, and it is not pinned any more.
                unsafe { sys::unmap(start, end - start) };
            }
        }
    }
}

/// Maps all of `mapping`, shared memory of process `pid`, in this process.
fn map_again(pid: i32, own: bool, mapping: &Mapping) -> Result<SecondMapping, Errno> {
    let length = mapping.length();
    let to = sys::reserve(length)?;
    // SAFETY: it was just reserved for this.
    let region = Arc::new(unsafe { region_at(to, length) }?);
    let second = SecondMapping { offset: mapping.offset, region };
    // SAFETY: as above.
    if own && unsafe { sys::map_again(mapping.start, length, to) }.is_ok() {
        return Ok(second);
    }
    // Needs permission to inspect processes (CAP_CHECKPOINT_RESTORE), even for this one.
    let file = File::options().read(true).write(mapping.writable).open(mapping.link(pid));
    let file = file.map_err(|error| {
        log::warn!("shared memory of process {pid} cannot be mapped from here: {error}");
        Errno::EFAULT
    })?;
    // SAFETY: as above.
    unsafe { sys::map_file(&file, mapping.offset, length, mapping.writable, to) }?;
    Ok(second)
}

/// `length` bytes of `file` from `offset` on, which stay mapped when it is closed.
///
/// # Errors
/// `ENOMEM` there is no room.
pub fn map_file(file: &impl AsFd, offset: u64, length: u64) -> Result<Arc<GuestRegionMmap>, Errno> {
    let size = usize::try_from(length).map_err(|_| Errno::ENOMEM)?;
    let region = GuestRegionMmap::<()>::from_range(GuestAddress(0), size, None);
    let region = region.map_err(|_| Errno::ENOMEM)?;
    // SAFETY: it was just mapped for this, and nobody else has it yet.
    unsafe { sys::map_file(file, offset, length, true, region.as_ptr() as u64) }?;
    Ok(Arc::new(region))
}

/// The memory from `address` on, not owned by the region.
///
/// # Safety
/// It must stay mapped while the region exists, and may be read and written by anybody meanwhile.
unsafe fn region_at(address: u64, length: u64) -> Result<GuestRegionMmap, Errno> {
    let length = usize::try_from(length).map_err(|_| Errno::ENOMEM)?;
    let builder = MmapRegionBuilder::<()>::new(length).with_mmap_prot(PROT_READ | PROT_WRITE);
    // SAFETY: guaranteed by the caller.
    let builder = unsafe { builder.with_raw_mmap_pointer(address as *mut u8) };
    let region = builder.build().map_err(|_| Errno::EFAULT)?;
    GuestRegionMmap::new(region, GuestAddress(0)).ok_or(Errno::ENOMEM)
}
