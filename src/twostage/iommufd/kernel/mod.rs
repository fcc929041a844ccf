// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel's host: `/dev/iommu` and VFIO's character devices.
//!
//! Linux's uAPI: ioctls through `iommufd-ioctls` if it has them, the others in its style
//! ([`ioctls`]). Errors explain the errno in its context.

mod device;
mod host;
mod ioctls;
mod meaning;
mod queues;

use crate::sync::Mutex;
use crate::threads::{StdThreads, ThreadStart};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard};

use iommufd_ioctls::IommuFd;

use super::{Errno, HostError, HostIommu, HwInfo, ObjectId, Result, UserMemory, Verb};
use device::Device;
use ioctls::{errno_of, VfioCdev};

/// An open `/dev/iommu`.
///
/// A device is bound by the path of its VFIO character device (`/dev/vfio/devices/vfio0`) or of its
/// folder in sysfs (`/sys/bus/pci/devices/0000:01:00.0`). A VMM that may open neither, nor
/// `/dev/iommu`, is passed the descriptors: [`KernelHost::from_fd`], [`KernelHost::bind_fd`], and
/// [`KernelHost::adopt`] of a device that is bound already.
///
/// Memory that an IOAS maps is kept until it is unmapped or the IOAS is destroyed. Dropping the
/// host detaches every device, and unmaps what it mapped; each device is unbound when its file is
/// closed, after the last user of [`KernelHost::device_file`] and the last duplicate, and the other
/// objects are destroyed with the last file.
///
/// When a *replacing* attach fails, Linux's VT-d driver may have blocked the device, although
/// [`HostIommu`](crate::iommufd::HostIommu) promises that nothing has changed: callers detach then.
///
/// ```no_run
/// use std::path::Path;
/// use twostage::iommufd::{HostIommu, KernelHost};
///
/// let host = KernelHost::open(Path::new("/dev/iommu"))?;
/// let nic = host.device_bind("/sys/bus/pci/devices/0000:01:00.0")?;
/// println!("{:?}", host.get_hw_info(nic)?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct KernelHost {
    // Fields are closed in this order: unbinding ends the use of the iommufd, and memory is
    // released when the kernel can no longer look up its pages.
    devices: Mutex<BTreeMap<ObjectId, Device>>,
    iommufd: Arc<IommuFd>,
    memory: Mutex<MappedMemory>,
    /// Starts the threads that wait for queues.
    threads: Arc<dyn ThreadStart>,
}

/// There is no iommufd at the path, or behind the descriptor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The path does not exist.
    #[error(
        "there is no {}: the kernel needs CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV, and as \
         modules they are iommufd and vfio-pci (modprobe)", .0.display()
    )]
    Absent(PathBuf),
    /// No permission.
    #[error("{} may not be opened: its owner or its mode does not allow it", .0.display())]
    Permission(PathBuf),
    /// Not an iommufd.
    #[error("{} is not an iommufd", .0.display())]
    NotIommufd(PathBuf),
    /// A descriptor that was given is not an iommufd.
    #[error("descriptor {0} is not an iommufd: pass one of an open /dev/iommu")]
    Descriptor(RawFd),
    /// Another error of the open.
    #[error("{} cannot be opened: {}", .0.display(), .1)]
    Other(PathBuf, #[source] io::Error),
}

impl KernelHost {
    /// Opens `path`: `/dev/iommu`.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let opened = File::options().read(true).write(true).open(path);
        let file = opened.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => OpenError::Absent(path.to_owned()),
            io::ErrorKind::PermissionDenied => OpenError::Permission(path.to_owned()),
            _ => OpenError::Other(path.to_owned(), error),
        })?;
        Self::of(IommuFd::new_from_fd(file)).ok_or_else(|| OpenError::NotIommufd(path.to_owned()))
    }

    /// A host of the iommufd `fd`, which somebody else opened: as passed over a socket.
    ///
    /// Whoever has a duplicate has the same objects; see [`KernelHost::adopt`] for its devices, and
    /// [`GuestIoas::adopt`](crate::nesting::GuestIoas::adopt) for its memory.
    ///
    /// ```
    /// use std::fs::File;
    /// use twostage::iommufd::{KernelHost, OpenError};
    ///
    /// # let received = File::open("/dev/null")?;
    /// match KernelHost::from_fd(received.into()) {
    ///     Ok(host) => println!("{host:?}"),
    ///     Err(error @ OpenError::Descriptor(_)) => println!("{error}"),
    ///     Err(error) => return Err(error.into()),
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`OpenError::Descriptor`]: it is not an iommufd, and is closed.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, OpenError> {
        Self::from_iommufd(Arc::new(IommuFd::new_from_fd(fd.into())))
    }

    /// A host of an iommufd that the VMM uses elsewhere, too.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use iommufd_ioctls::IommuFd;
    /// use twostage::iommufd::{KernelHost, OpenError};
    ///
    /// fn host(of_the_vmm: &Arc<IommuFd>) -> Result<KernelHost, OpenError> {
    ///     KernelHost::from_iommufd(of_the_vmm.clone())
    /// }
    /// ```
    ///
    /// # Errors
    /// [`OpenError::Descriptor`]: it is not an iommufd.
    pub fn from_iommufd(iommufd: Arc<IommuFd>) -> Result<Self, OpenError> {
        let number = iommufd.as_raw_fd();
        Self::of(iommufd).ok_or(OpenError::Descriptor(number))
    }

    /// A host of `iommufd`, if it is one.
    fn of(iommufd: impl Into<Arc<IommuFd>>) -> Option<Self> {
        let iommufd = iommufd.into();
        // Only an iommufd answers this way about object 0.
        let asked = iommufd.destroy_iommu_object(0).map_err(errno_of);
        (asked == Err(Errno::ENOENT)).then(|| Self::unchecked(iommufd))
    }

    fn unchecked(iommufd: Arc<IommuFd>) -> Self {
        let (devices, memory) = (Mutex::default(), Mutex::default());
        Self { devices, iommufd, memory, threads: Arc::new(StdThreads) }
    }

    /// The same host, with `threads` to start the threads that wait for its queues; without this
    /// call, that is [`StdThreads`].
    pub fn with_threads(mut self, threads: Arc<dyn ThreadStart>) -> Self {
        self.threads = threads;
        self
    }

    /// The iommufd, for what else the VMM does with it.
    pub fn iommufd(&self) -> &Arc<IommuFd> {
        &self.iommufd
    }

    /// The VFIO file of a bound device, for its regions and interrupts. While anybody holds it, the
    /// device cannot be unbound.
    ///
    /// # Errors
    /// `ENOENT` no such device.
    pub fn device_file(&self, dev: ObjectId) -> Result<Arc<File>> {
        self.device(Verb::DeviceBind, dev, |device| device.file.clone())
    }

    fn devices(&self) -> MutexGuard<'_, BTreeMap<ObjectId, Device>> {
        self.devices.lock()
    }

    fn memory(&self) -> MutexGuard<'_, MappedMemory> {
        self.memory.lock()
    }

    /// Applies `get` to the device `dev`.
    fn device<T>(&self, verb: Verb, dev: ObjectId, get: impl Fn(&mut Device) -> T) -> Result<T> {
        let mut devices = self.devices();
        let device = devices.get_mut(&dev);
        device.map(get).ok_or_else(|| HostError::new(verb, dev, Errno::ENOENT, "no such device"))
    }

    /// The name of `dev` for messages, and its IOMMU's information.
    fn named(&self, dev: ObjectId) -> Option<(String, HwInfo)> {
        let devices = self.devices();
        let device = devices.get(&dev)?;
        Some((device.name.clone(), device.info))
    }
}

/// Detaches everything from a device. Its driver can only refuse that for what it does not know,
/// which is not attached.
fn detach_all(file: &File, attached: &BTreeSet<Option<u32>>) {
    // PASIDs first: None is the smallest.
    for pasid in attached.iter().rev() {
        if let Err(errno) = file.detach_iommufd_pt(*pasid) {
            log::error!("a device could not be detached: {errno}");
        }
    }
}

impl Drop for KernelHost {
    fn drop(&mut self) {
        let devices = std::mem::take(&mut *self.devices());
        for device in devices.values() {
            detach_all(&device.file, &device.attached);
        }
        // The IOASes live on if somebody else has the iommufd, but nobody keeps the memory.
        let mapped = self.memory().all();
        for (ioas, iova, memory) in mapped {
            match self.ioas_unmap(ioas, iova, memory.length()) {
                Err(error) if error.errno != Errno::ENOENT => {
                    log::error!("memory stays mapped, and is kept: {error}");
                    std::mem::forget(memory);
                }
                _ => {}
            }
        }
    }
}

impl fmt::Debug for KernelHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelHost").field("devices", &*self.devices()).finish_non_exhaustive()
    }
}

/// The memory that IOASes map, by the first IOVA of its mappings: kept for as long as the kernel
/// may look up its pages.
///
/// The kernel pins a mapping's pages only when the IOAS gets its first HWPT; if this process had
/// unmapped the memory by then, the addresses could belong to something else.
#[derive(Debug, Default)]
struct MappedMemory {
    ioases: HashMap<ObjectId, BTreeMap<u64, UserMemory>>,
}

impl MappedMemory {
    /// `ioas` maps `memory` at `iova`.
    pub fn mapped(&mut self, ioas: ObjectId, iova: u64, memory: UserMemory) {
        self.ioases.entry(ioas).or_default().insert(iova, memory);
    }

    /// `dst` maps at `iova` what `src` maps in the `length` bytes from `src_iova` on.
    pub fn copied(&mut self, dst: ObjectId, iova: u64, src: ObjectId, src_iova: u64, length: u64) {
        for (at, memory) in self.in_range(src, src_iova, length) {
            let from = at.max(src_iova);
            let last = (at + (memory.length() - 1)).min(src_iova.saturating_add(length - 1));
            // The part is within the memory, as the range overlaps the mapping.
            if let Ok(part) = memory.part(from - at, last - from + 1) {
                self.mapped(dst, iova + (from - src_iova), part);
            }
        }
    }

    /// `ioas` no longer maps anything in the `length` bytes from `iova` on.
    pub fn unmapped(&mut self, ioas: ObjectId, iova: u64, length: u64) {
        let gone = self.in_range(ioas, iova, length);
        if let Some(mappings) = self.ioases.get_mut(&ioas) {
            gone.iter().for_each(|(iova, _)| drop(mappings.remove(iova)));
        }
    }

    /// The object was destroyed; it may have been an IOAS.
    pub fn destroyed(&mut self, id: ObjectId) {
        self.ioases.remove(&id);
    }

    /// Every mapping: its IOAS, its first IOVA, and the memory.
    pub fn all(&self) -> Vec<(ObjectId, u64, UserMemory)> {
        let of_one = |(ioas, mappings): (&ObjectId, &BTreeMap<u64, UserMemory>)| {
            let ioas = *ioas;
            let of = move |(iova, memory): (&u64, &UserMemory)| (ioas, *iova, memory.clone());
            mappings.iter().map(of).collect::<Vec<_>>()
        };
        self.ioases.iter().flat_map(of_one).collect()
    }

    /// The mappings of `ioas` that overlap the `length` bytes from `iova` on.
    fn in_range(&self, ioas: ObjectId, iova: u64, length: u64) -> Vec<(u64, UserMemory)> {
        let Some(mappings) = self.ioases.get(&ioas) else { return Vec::new() };
        let Some(last) = length.checked_sub(1).map(|more| iova.saturating_add(more)) else {
            return Vec::new();
        };
        mappings
            .range(..=last)
            // No mapping is empty, and none wraps: the kernel accepted them.
            .filter(|(at, memory)| *at + (memory.length() - 1) >= iova)
            .map(|(at, memory)| (*at, memory.clone()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{GuestAddress, GuestRegionMmap};

    use super::*;

    const A: ObjectId = ObjectId(1);
    const B: ObjectId = ObjectId(2);

    fn memory() -> (Arc<GuestRegionMmap>, UserMemory) {
        let region = Arc::new(GuestRegionMmap::from_range(GuestAddress(0), 0x4000, None).unwrap());
        (region.clone(), UserMemory::whole(region))
    }

    fn places(mapped: &MappedMemory, ioas: ObjectId) -> Vec<(u64, u64, u64)> {
        let all = mapped.in_range(ioas, 0, u64::MAX);
        all.iter().map(|(iova, memory)| (*iova, memory.offset(), memory.length())).collect()
    }

    #[test]
    fn memory_is_kept_until_nothing_maps_it() {
        let (region, memory) = memory();
        let mut mapped = MappedMemory::default();
        mapped.mapped(A, 0x1_0000, memory);
        mapped.copied(B, 0x8000, A, 0x1_1000, 0x2000);
        assert_eq!(places(&mapped, B), [(0x8000, 0x1000, 0x2000)]);
        mapped.unmapped(A, 0, 0x1_0000);
        assert_eq!(places(&mapped, A), [(0x1_0000, 0, 0x4000)]);
        mapped.unmapped(A, 0, u64::MAX);
        assert_eq!(places(&mapped, A), []);
        assert_eq!(Arc::strong_count(&region), 2, "the copy");
        mapped.destroyed(B);
        assert_eq!(Arc::strong_count(&region), 1);
    }

    #[test]
    fn a_copy_of_two_mappings_keeps_both() {
        let ((first, one), (second, two)) = (memory(), memory());
        let mut mapped = MappedMemory::default();
        mapped.mapped(A, 0, one);
        mapped.mapped(A, 0x4000, two);
        mapped.copied(A, 0x10_0000, A, 0x3000, 0x2000);
        mapped.unmapped(A, 0, 0x8000);
        assert_eq!(places(&mapped, A), [(0x10_0000, 0x3000, 0x1000), (0x10_1000, 0, 0x1000)]);
        assert_eq!((Arc::strong_count(&first), Arc::strong_count(&second)), (2, 2));
    }

    #[test]
    fn a_host_that_is_none_says_what_to_do() {
        let words = |path: &str| KernelHost::open(Path::new(path)).unwrap_err().to_string();
        let absent = words("/dev/no-such-iommu");
        assert!(absent.contains("there is no /dev/no-such-iommu") && absent.contains("modprobe"));
        assert_eq!(words("/dev/null"), "/dev/null is not an iommufd");
    }

    fn null() -> OwnedFd {
        File::options().read(true).write(true).open("/dev/null").unwrap().into()
    }

    #[test]
    fn a_descriptor_that_is_no_iommufd_is_named() {
        let fd = null();
        let expected =
            format!("descriptor {} is not an iommufd: pass one of an open", fd.as_raw_fd());
        let error = KernelHost::from_fd(fd).unwrap_err();
        assert!(error.to_string().starts_with(&expected), "{error}");
        let shared = Arc::new(IommuFd::new_from_fd(null().into()));
        let error = KernelHost::from_iommufd(shared.clone()).unwrap_err();
        assert!(matches!(error, OpenError::Descriptor(fd) if fd == shared.as_raw_fd()));
        assert_eq!(Arc::strong_count(&shared), 1);
    }
}
