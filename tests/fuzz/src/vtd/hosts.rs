// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The hosts of one execution: one, or one for each device. In some executions their verbs fail:
//! one of the next, a few, or all.
//!
//! While they may, what a guest asks for may be refused, so it is told, or a device is blocked; but
//! nothing reaches what the guest's tables do not say. Once the guest has invalidated everything on
//! hosts that do not fail, all is as if they never had.

use std::fmt::Debug;
use std::sync::{Arc, OnceLock};

use arbitrary::{Result, Unstructured};
use twostage::iommufd::{Errno, FailNth, HostIommu, ObjectId, Protection, UserMemory};
use twostage::nesting::GuestIoas;
use twostage::spec::pci::Bdf;
use twostage_emulated::{DeviceConfig, EmulatedHost, ObjectGraph, VtdUnit};
use vm_memory::{GuestAddress, GuestRegionMmap};

use super::header::Header;
use super::world::{World, DEVICES, NAMES};
use crate::models::memory::{Memory, PAGE};

/// Where memory comes and goes that no table leads to.
const MORE_MEMORY: u64 = 0x200_0040_0000;
/// What verbs fail with: nothing that would be untrue, as that an object is gone.
const ERRORS: [Errno; 4] = [Errno::ENOMEM, Errno::EINVAL, Errno::EIO, Errno::ENODEV];

/// A host with its unit, a device, and the guest's memory.
struct Host {
    emulated: Arc<EmulatedHost>,
    failing: Arc<FailNth<dyn HostIommu>>,
    unit: Arc<VtdUnit>,
    /// Until the end.
    ioas: Option<Arc<GuestIoas>>,
    /// There is more memory.
    has_more: bool,
}

/// See the [module's documentation](self).
pub struct Hosts {
    all: Vec<Host>,
    pub devices: [ObjectId; 2],
    /// Verbs fail, or have since the guest has invalidated everything.
    pub fail: bool,
    /// The next time that translation cannot be disabled, the guest leaves it enabled.
    pub thinks_better: bool,
}

impl Hosts {
    /// Hosts of the guest's `memory`. The verb with the number `fails` does; 0: none.
    pub fn new(header: &Header, memory: &Memory, fails: u8) -> Self {
        let count = if header.two_hosts { 2 } else { 1 };
        let all: Vec<_> = (0..count).map(|_| Host::new(header, memory, fails)).collect();
        let mut devices = [ObjectId(0); 2];
        for (number, dev) in devices.iter_mut().enumerate() {
            let host = &all[number % count].emulated;
            *dev = host.device_bind(NAMES[number]).expect("it is there");
        }
        Self { all, devices, fail: fails != 0, thinks_better: false }
    }

    /// The one of a device.
    fn of(&self, device: usize) -> &Host {
        &self.all[device % self.all.len()]
    }

    /// The unit in front of a device.
    pub fn unit(&self, device: usize) -> &Arc<VtdUnit> {
        &self.of(device).unit
    }

    /// The guest's memory on the host of a device.
    pub fn ioas(&self, device: usize) -> &Arc<GuestIoas> {
        self.of(device).ioas.as_ref().expect("it is not the end")
    }

    /// No verb fails any more.
    pub fn stop_failing(&self) {
        self.all.iter().for_each(|host| host.failing.fail_nth(0, Errno::ENOMEM));
    }

    /// What `verb` returns, if necessary when no verb fails any more.
    pub fn retried<T, E: Debug>(&self, mut verb: impl FnMut() -> std::result::Result<T, E>) -> T {
        let done = verb().or_else(|error| {
            assert!(self.fail, "no host fails: {error:?}");
            self.stop_failing();
            verb()
        });
        done.expect("nothing fails")
    }

    /// Units have the guest's memory last.
    pub fn give_up_memory(&mut self) {
        self.all.iter_mut().for_each(|host| host.ioas = None);
    }

    /// The end: nothing may be left.
    pub fn end(self) {
        for (number, dev) in self.devices.into_iter().enumerate() {
            self.of(number).emulated.device_unbind(dev).expect("it is bound");
        }
        for Host { emulated, .. } in self.all {
            assert_eq!(emulated.graph(), ObjectGraph { objects: Vec::new(), pinned_bytes: 0 });
        }
    }
}

impl Host {
    fn new(header: &Header, memory: &Memory, fails: u8) -> Self {
        let (emulated, unit) = (EmulatedHost::new(), VtdUnit::new(header.unit()));
        let id = emulated.add_unit(unit.clone());
        for (name, rid) in NAMES.into_iter().zip(DEVICES) {
            let config = DeviceConfig::default().with_pasid_bits(4).with_pasid_priv(true);
            let config = config.with_ats(true).with_pri(header.requests);
            emulated.add_device(name, id, Bdf::from_raw(rid), config).expect("a new device");
        }
        let failing = Arc::new(FailNth::new(emulated.clone() as Arc<dyn HostIommu>));
        failing.fail_nth(fails.into(), Errno::ENOMEM);
        let new = || GuestIoas::new(failing.clone());
        let ioas = new().or_else(|_| new()).expect("an IOAS");
        let map = || ioas.map(0, &memory.user_memory(), Protection::READ_WRITE);
        map().or_else(|_| map()).expect("it is mapped");
        Self { emulated, failing, unit, ioas: Some(ioas), has_more: false }
    }

    /// More memory comes, or goes. Returns whether it did.
    fn change_memory(&mut self, write: bool) -> bool {
        static MORE: OnceLock<Arc<GuestRegionMmap>> = OnceLock::new();
        let more = MORE.get_or_init(|| {
            let region = GuestRegionMmap::from_range(GuestAddress(0), PAGE as usize, None);
            Arc::new(region.expect("a page of memory"))
        });
        let access = if write { Protection::READ_WRITE } else { Protection::READ_ONLY };
        let Some(ioas) = &self.ioas else { return true };
        let result = match self.has_more {
            true => ioas.unmap(MORE_MEMORY, PAGE),
            false => ioas.map(MORE_MEMORY, &UserMemory::whole(more.clone()), access),
        };
        self.has_more ^= result.is_ok();
        result.is_ok()
    }
}

impl World {
    /// The guest invalidates everything on hosts that do not fail any more.
    fn repair(&mut self) {
        self.hosts.stop_failing();
        // Without translation, nothing is given to hosts again.
        if self.status().tes() && !self.is_reserved_mode() {
            self.hosts.fail = false;
            self.asked.changes += 1;
            self.flush();
        }
    }
}

/// Verbs fail from now on, or not any more, or memory changes meanwhile.
pub fn step(world: &mut World, input: &mut Unstructured) -> Result<()> {
    let [how, which]: [u8; 2] = input.arbitrary()?;
    let hosts = &mut world.hosts;
    let number = usize::from(how >> 7) % hosts.all.len();
    let host = &mut hosts.all[number];
    let (count, errno) = (u64::from(which & 15) + 1, ERRORS[usize::from(which >> 6)]);
    match how & 7 {
        0..=2 => host.failing.fail_nth(count, errno),
        3 => host.failing.fail_next(count, errno),
        4 => host.failing.fail_next(u64::MAX / 2, errno),
        5 => {
            // Hosts that nest refuse memory that is only read: their units have erratum 772415.
            let done = host.change_memory(which & 1 != 0 || !world.header.mirrored);
            assert!(done || hosts.fail, "memory does not change, and no host fails");
            return Ok(());
        }
        _ => {
            world.repair();
            return Ok(());
        }
    }
    (hosts.fail, hosts.thinks_better) = (true, which & 0x20 != 0);
    world.asked.changes += 1;
    Ok(())
}
