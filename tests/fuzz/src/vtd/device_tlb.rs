// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device TLBs of functions: what invalidations of theirs name is gone, and nothing else is.

use twostage::spec::pci::{Bdf, Pasid};
use twostage::spec::vtd::qi::{Descriptor, DeviceTlbRange};
use twostage_emulated::VtdCounters;

use super::dma::Dma;
use super::naive::Way;
use super::world::{World, DEVICES};
use crate::models::memory::PAGE;

impl World {
    /// The device has a TLB from now on, or has none.
    pub fn set_device_tlb(&mut self, device: usize, enabled: bool) {
        self.ports[device].control().set_device_tlb(enabled);
        self.caching[device] = enabled;
        let now = self.memory.tick();
        self.account.device_tlb(Bdf::from_raw(DEVICES[device]).raw(), now);
    }
}

/// `dma` fills the TLB of its device; then that is told to forget something, as `how` says; and
/// what it has not forgotten serves the same DMA again.
pub fn round(world: &mut World, dma: Dma, how: u8) {
    let uses = |world: &mut World| {
        let before = world.hosts.unit(dma.device).counters();
        world.dma(dma);
        let VtdCounters { device_tlb_hits, device_tlb_misses, .. } =
            world.hosts.unit(dma.device).counters();
        (device_tlb_hits - before.device_tlb_hits, device_tlb_misses - before.device_tlb_misses)
    };
    world.dma(dma);
    // One that is refused, or blocked as hosts fail, is not cached, and what is not translated may
    // be cached at any size.
    if world.hosts.fail || uses(world) != (1, 0) || world.way_of(&dma).1.way == Way::Bypass {
        return;
    }
    let own = dma.pasid.and_then(Pasid::new);
    let other = Pasid::new(7);
    // Whose, and whether elsewhere.
    let (device, pasid, away) = match how >> 4 & 7 {
        0 | 1 => (dma.device, own, 0),
        2 | 3 => (dma.device, own, 1),
        4 => (dma.device, other, 0),
        5 => (dma.device ^ 1, own, 0),
        6 => (dma.device, None, 0),
        _ => (dma.device, None, 1),
    };
    // One page, two, or eight; the lowest bit that is clear says how many (§6.5.2.5).
    let (pages, ones) = [(1, 0), (2, 0), (8, 3), (1, 0)][usize::from(how >> 2 & 3)];
    // Far away, as its page may be large.
    let base = (dma.iova & !(pages * PAGE - 1)) ^ away << 46;
    let range = DeviceTlbRange { address: base | (ones * PAGE), size: pages > 1 };
    let source = Bdf::from_raw(DEVICES[device]);
    let (physical_function, max_pending) = (0, 0);
    let descriptor = match pasid {
        Some(pasid) => Descriptor::PasidDeviceTlb {
            source,
            pasid,
            global: false,
            physical_function,
            max_pending,
            range,
        },
        None => Descriptor::DeviceTlb { source, physical_function, max_pending, range },
    };
    if !world.accepts(&descriptor) || !world.say(&[descriptor]) {
        return;
    }
    // Without PASID, it is of all.
    let named = device == dma.device && (pasid.is_none() || pasid == own) && away == 0;
    let expected = if named { (0, 1) } else { (1, 0) };
    let used = uses(world);
    assert_eq!(used, expected, "{dma:x?}, {descriptor:x?}, named: {named}");
}
