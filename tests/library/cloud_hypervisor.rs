// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What cloud-hypervisor has already: the traits of its package `vm-device`, which is not on
//! crates.io, declared again as they are (without `set_notifier`, which has a body and needs its
//! package `hypervisor`), and KVM.

#![expect(dead_code, reason = "the whole shapes, of which a unit needs a part")]

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Barrier, Mutex};

use vmm_sys_util::eventfd::EventFd;

/// A device on its buses.
pub trait BusDeviceSync: Send + Sync {
    fn read(&self, _base: u64, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, _base: u64, _offset: u64, _data: &[u8]) -> Option<Arc<Barrier>> {
        None
    }
}

/// The number of a vector in its group.
pub type InterruptIndex = u32;

#[derive(Debug, Clone, Copy)]
pub struct LegacyIrqSourceConfig {}

/// A vector as a device's MSI-X table has it.
#[derive(Debug, Clone, Copy, Default)]
pub struct MsiIrqSourceConfig {
    pub high_addr: u32,
    pub low_addr: u32,
    pub data: u32,
    pub devid: u32,
}

#[derive(Debug, Clone, Copy)]
pub enum InterruptSourceConfig {
    LegacyIrq(LegacyIrqSourceConfig),
    MsiIrq(MsiIrqSourceConfig),
}

/// The vectors of a device.
pub trait InterruptSourceGroup: Send + Sync {
    fn enable(&self) -> io::Result<()> {
        Ok(())
    }

    fn disable(&self) -> io::Result<()> {
        Ok(())
    }

    fn trigger(&self, index: InterruptIndex) -> io::Result<()>;

    fn notifier(&self, index: InterruptIndex) -> Option<EventFd>;

    fn update(
        &self,
        index: InterruptIndex,
        config: InterruptSourceConfig,
        masked: bool,
        set_gsi: bool,
    ) -> io::Result<()>;

    fn set_gsi(&self) -> io::Result<()>;
}

/// How KVM was made to send a message of an address and data.
#[derive(Debug, PartialEq, Eq)]
pub enum Sent {
    /// By the route of an irqfd.
    Routed(u64, u32),
    /// By the message itself.
    Alone(u64, u32),
}

/// KVM, in a test: its routes, by GSI, and what it sent.
#[derive(Default)]
pub struct Kvm {
    routes: Mutex<BTreeMap<u32, (u64, u32)>>,
    pub sent: Mutex<Vec<Sent>>,
}

impl Kvm {
    /// KVM_SET_GSI_ROUTING.
    pub fn set_gsi_routing(&self, routes: BTreeMap<u32, (u64, u32)>) {
        *self.routes.lock().unwrap() = routes;
    }

    /// A write to the eventfd that is the irqfd of `gsi`. Without a route it has no effect.
    pub fn write_irqfd(&self, gsi: u32) {
        let route = self.routes.lock().unwrap().get(&gsi).copied();
        let sent = route.map(|(address, data)| Sent::Routed(address, data));
        self.sent.lock().unwrap().extend(sent);
    }

    /// KVM_SIGNAL_MSI.
    pub fn signal_msi(&self, address: u64, data: u32) {
        self.sent.lock().unwrap().push(Sent::Alone(address, data));
    }
}
