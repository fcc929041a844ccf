// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What every host guarantees: results, errno, and what a device's DMA reaches.
//!
//! The checks only use a host's verbs and a device's DMA. What depends on the IOMMU is taken from
//! `GET_HW_INFO`; a check that this IOMMU does not support is reported.

mod hwpt;
mod ioas;
pub mod memory;
mod smmuv3;
#[allow(dead_code)] // shared with programs that use more of it
#[path = "../../preload/program/uapi.rs"]
pub mod uapi;
mod vtd;

use std::env;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use twostage::iommufd::{
    Errno, HostIommu, HwInfoData, HwptAlloc, HwptData, HwptFlags, KernelHost, MapTarget, ObjectId,
    Protection, Result,
};

use memory::Memory;

/// Where memory is mapped: within the reach of any IOMMU and a 28-bit edu, and unreserved.
const BASE: u64 = 0x100_0000;
const PAGE: u64 = 0x1000;

/// A device that moves eight bytes at a time. Blocked accesses have no effect, and the device
/// reports nothing.
pub trait Engine {
    /// Makes it read its eight bytes at `iova`.
    fn load(&mut self, iova: u64);
    /// Makes it write them to `iova`.
    fn store(&mut self, iova: u64);
}

/// Makes the engine of a bound device.
pub type MakeEngine = Box<dyn Fn(ObjectId) -> Box<dyn Engine>>;

/// A host to check, and the name of an unbound device of it.
pub struct Subject {
    pub host: Arc<dyn HostIommu>,
    pub device: String,
    pub engine: MakeEngine,
}

/// One check: it ends the process if the host breaks the contract.
type Check = fn(&Subject);

/// Runs all checks, each on its own; nothing is left for the next.
pub fn check(subject: &Subject) {
    let checks: &[(&str, Check)] = &[
        ("a device is bound once", bind),
        ("mappings", ioas::mappings),
        ("placement", ioas::placement),
        ("copies", ioas::copies),
        ("what a HWPT can stand on", hwpt::allocation),
        ("a HWPT limits its IOAS", hwpt::limits),
        ("attach, replace, detach", hwpt::attach),
        ("reserved regions", hwpt::reserved),
        ("PASIDs", hwpt::pasids),
        ("memory of a file, and without", memory::kinds),
        ("memory of a VMM's own", memory::raw),
        ("dirty tracking", hwpt::dirty_tracking),
        ("fault queues", hwpt::fault_queues),
        ("nesting on VT-d", vtd::check),
        ("nesting on SMMUv3", smmuv3::check),
    ];
    for (name, check) in checks {
        println!("contract: {name}");
        check(subject);
    }
}

/// Ends the process unless `result` is the failure `errno`.
#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>, errno: Errno) {
    match result {
        Ok(value) => panic!("{errno} was expected, not success: {value:?}"),
        Err(error) => assert_eq!(error.errno, errno, "{error}"),
    }
}

/// A bound device, unbound on drop.
struct Bound<'a> {
    subject: &'a Subject,
    dev: ObjectId,
    engine: Option<Box<dyn Engine>>,
}

impl<'a> Bound<'a> {
    fn new(subject: &'a Subject) -> Self {
        let dev = subject.host.device_bind(&subject.device).expect("the device is free");
        Self { subject, dev, engine: Some((subject.engine)(dev)) }
    }

    fn host(&self) -> &'a dyn HostIommu {
        &*self.subject.host
    }

    /// The IOMMU it is behind.
    fn iommu(&self) -> HwInfoData {
        self.host().get_hw_info(self.dev).expect("GET_HW_INFO").data
    }

    fn engine(&mut self) -> &mut dyn Engine {
        &mut **self.engine.as_mut().expect("an engine until the end")
    }

    fn hwpt(&self, pt: ObjectId, flags: HwptFlags, data: HwptData) -> Result<ObjectId> {
        self.host().hwpt_alloc(&HwptAlloc { flags, dev: self.dev, pt, data, fault: None })
    }

    fn attach(&self, pt: ObjectId) -> ObjectId {
        self.host().device_attach(self.dev, None, pt).expect("DEVICE_ATTACH")
    }

    fn detach(&self) {
        self.host().device_detach(self.dev, None).expect("DEVICE_DETACH");
    }

    /// Whether the device moves a word from `from` to `to` (offset in the memory, IOVA).
    fn moves(&mut self, memory: &Memory, from: (u64, u64), to: (u64, u64)) -> bool {
        let word = memory.fresh_word();
        memory.set(from.0, word);
        memory.set(to.0, !word);
        self.engine().load(from.1);
        self.engine().store(to.1);
        memory.get(to.0) == word
    }

    /// Whether the device reaches all of `memory`, mapped at `iova`.
    fn reaches(&mut self, memory: &Memory, iova: u64) -> bool {
        self.moves(memory, (0, iova), (memory.length() - 8, iova + memory.length() - 8))
    }
}

impl Drop for Bound<'_> {
    fn drop(&mut self) {
        self.engine = None;
        let outcome = self.subject.host.device_unbind(self.dev);
        assert!(outcome.is_ok() || std::thread::panicking(), "DEVICE_UNBIND: {outcome:?}");
    }
}

/// An IOAS with `memory` at `iova`.
fn ioas_of(host: &dyn HostIommu, memory: &Memory, iova: u64) -> ObjectId {
    let ioas = host.ioas_alloc().expect("IOAS_ALLOC");
    let rights = Protection::READ_WRITE;
    let at = host.ioas_map(ioas, &memory.whole(), MapTarget::Fixed(iova), rights);
    assert_eq!(at.expect("IOAS_MAP"), iova);
    ioas
}

#[track_caller]
fn destroy(host: &dyn HostIommu, ids: &[ObjectId]) {
    for id in ids {
        host.destroy(*id).expect("DESTROY");
    }
}

fn bind(subject: &Subject) {
    let host = &*subject.host;
    let nobody = ObjectId(12345);
    refused(host.device_bind("/dev/vfio/devices/nobody"), Errno::ENODEV);
    let dev = host.device_bind(&subject.device).expect("the device is free");
    refused(host.device_bind(&subject.device), Errno::EBUSY);
    refused(host.destroy(dev), Errno::EBUSY);
    refused(host.get_hw_info(nobody), Errno::ENOENT);
    refused(host.device_attach(nobody, None, dev), Errno::ENOENT);
    refused(host.device_detach(nobody, None), Errno::ENOENT);
    refused(host.device_unbind(nobody), Errno::ENOENT);
    host.device_detach(dev, None).expect("nothing is attached");
    host.device_unbind(dev).expect("DEVICE_UNBIND");
    refused(host.get_hw_info(dev), Errno::ENOENT);
    refused(host.destroy(dev), Errno::ENOENT);
    for _ in 0..3 {
        let dev = host.device_bind(&subject.device).expect("it is free again");
        host.device_unbind(dev).expect("DEVICE_UNBIND");
    }
}

/// An educational device of QEMU's, and what keeps it bound.
struct Edu {
    device: uapi::Device,
    _bound: Arc<File>,
}

impl Engine for Edu {
    fn load(&mut self, iova: u64) {
        self.device.fetch(iova, 8);
    }

    fn store(&mut self, iova: u64) {
        self.device.store(iova, 8);
    }
}

/// Checks `/dev/iommu` with the device `TWOSTAGE_CONTRACT_DEVICE`.
pub fn check_kernel() {
    let Ok(device) = env::var("TWOSTAGE_CONTRACT_DEVICE") else {
        let text = "skipped: TWOSTAGE_CONTRACT_DEVICE names no edu behind vfio-pci";
        // Bypasses the harness, which only shows the output of failed tests.
        writeln!(std::io::stderr(), "{text}").expect("standard error");
        return;
    };
    let host = KernelHost::open(Path::new("/dev/iommu")).expect("/dev/iommu");
    let host = Arc::new(host);
    let of_device = host.clone();
    let engine = move |dev| -> Box<dyn Engine> {
        let file = of_device.device_file(dev).expect("it is bound");
        let mut device = uapi::Device::from(file.try_clone().expect("a descriptor"));
        device.start().expect("its registers");
        Box::new(Edu { device, _bound: file })
    };
    check(&Subject { host, device, engine: Box::new(engine) });
}
