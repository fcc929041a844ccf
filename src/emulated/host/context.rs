// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One open iommufd: the state shared by all files that refer to it, and the pages that a user has
//! mapped of it (`mmap(2)`).

use std::fs::File;
use std::sync::{Arc, MutexGuard, Weak};
use twostage::sync::Mutex;

use crate::host::dma_buf::{DmaBuf, Importer};
use crate::host::machine::{Machine, Opened, Part};
use crate::host::mmaps::Mmap;
use crate::host::objects::Objects;
use crate::host::refusal::{refuse, Outcome};
use crate::units::page_requests::PageRequestSink;
use twostage::iommufd::{Errno, ObjectId, PageRequest};

/// One open iommufd. It is closed with the last file that refers to it: itself, a device bound to
/// it, a queue, or mapped pages.
#[derive(Debug)]
pub(crate) struct Context {
    machine: Arc<Machine>,
    objects: Mutex<Objects>,
}

impl Context {
    /// An iommufd without objects on `machine`.
    pub fn new(machine: Arc<Machine>) -> Arc<Self> {
        let objects = Mutex::new(Objects::new(machine.clone()));
        let context = Arc::new(Self { machine, objects });
        let opened: Weak<Self> = Arc::downgrade(&context);
        context.machine.opened(opened);
        context
    }

    /// Maps the pages that a driver has offered at `offset`, if they are exactly these.
    pub fn map(self: &Arc<Self>, offset: u64, length: u64) -> Option<MappedPages> {
        let mut objects = self.objects();
        let mmap = objects.mmaps().get(offset, length)?;
        let epoch = objects.epoch();
        objects.map_pages(epoch, mmap.owner);
        Some(MappedPages { mmap, epoch, context: self.clone() })
    }

    /// What it was opened on.
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    /// Binds the device `name` in `objects`, which are this iommufd's: its page requests are
    /// handled here until it is unbound.
    pub fn device_bind(self: &Arc<Self>, objects: &mut Objects, name: &str) -> Outcome<ObjectId> {
        let dev = objects.device_bind(name)?;
        let part = &objects.table().device(dev)?.part;
        let sink = BoundDevice { context: Arc::downgrade(self), dev, part: Arc::downgrade(part) };
        part.driver.set_page_request_sink(&part.requester, Some(Arc::new(sink)));
        Ok(dev)
    }

    /// The objects, locked.
    pub fn objects(&self) -> MutexGuard<'_, Objects> {
        self.objects.lock()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        self.objects.get_mut().close();
    }
}

impl Opened for Context {
    #[cfg(feature = "selftest")]
    fn pages(&self) -> Vec<Arc<crate::ioas::Pages>> {
        self.objects().pages()
    }
}

impl Importer for Context {
    fn revoked(&self, buf: &DmaBuf) {
        // Cannot fail for an existing IOAS.
        let _ = self.objects().lose_dma_buf(buf);
    }
}

/// A bound device, as a sink for its page requests.
#[derive(Debug)]
struct BoundDevice {
    context: Weak<Context>,
    dev: ObjectId,
    part: Weak<Part>,
}

impl PageRequestSink for BoundDevice {
    fn page_request(&self, request: PageRequest) -> Outcome<()> {
        let Some(context) = self.context.upgrade() else {
            return refuse(Errno::ENODEV, "the iommufd is closed");
        };
        let mut objects = context.objects();
        // It may have been unbound meanwhile, and its ID reused.
        if Arc::as_ptr(&objects.table().device(self.dev)?.part) != self.part.as_ptr() {
            return refuse(Errno::ENODEV, "the device is not bound any more");
        }
        objects.page_request(self.dev, request)
    }
}

/// The arguments of an `mmap(2)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmapRequest {
    /// Offset in the descriptor, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// `MAP_SHARED`.
    pub shared: bool,
    /// `PROT_EXEC`.
    pub executable: bool,
}

/// Pages of an IOMMU that a user has mapped, until it is dropped: their owner cannot be destroyed,
/// and the iommufd stays open.
#[derive(Debug)]
pub struct MappedPages {
    mmap: Mmap,
    epoch: u64,
    context: Arc<Context>,
}

impl MappedPages {
    /// The file to map instead of the iommufd, from its start.
    pub fn file(&self) -> &File {
        &self.mmap.file
    }
}

impl Clone for MappedPages {
    /// The same pages, mapped once more (`fork(2)`).
    fn clone(&self) -> Self {
        self.context.objects().map_pages(self.epoch, self.mmap.owner);
        Self { mmap: self.mmap.clone(), epoch: self.epoch, context: self.context.clone() }
    }
}

impl Drop for MappedPages {
    fn drop(&mut self) {
        self.context.objects().unmap_pages(self.epoch, self.mmap.owner);
    }
}
