// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What happens while a device goes on: when it is over, nothing gets to where the device went
//! before, unless it may go there now.

use arbitrary::{Result, Unstructured};
use twostage_emulated::{DmaAttributes, DmaPort};

use super::again::{round, Round};
use super::dma::Dma;
use super::header::Header;
use super::walk::Kind;
use super::world::World;
use crate::models::beside::{self, Access, Machine};
use crate::models::memory::Memory;

/// A word of the device's tables changes, and the guest says so, in one of the ways that are enough
/// or nearly.
pub fn step(world: &mut World, input: &mut Unstructured) -> Result<()> {
    let Some(Round { dma, at, next, descriptors, .. }) = round(world, input)? else {
        return Ok(());
    };
    goes_on(world, dma, Some((at, next)), |world| world.invalidate(&descriptors));
    Ok(())
}

/// A device goes, in the middle of what it did last, if it did anything; or comes back.
pub fn plug(world: &mut World, number: usize) {
    match world.last.filter(|dma| dma.device == number && world.plugged[number]) {
        Some(dma) => goes_on(world, dma, None, |world| world.plug(number)),
        None => world.plug(number),
    }
}

fn goes_on(world: &mut World, dma: Dma, changes: Option<(u64, u64)>, end: impl FnOnce(&mut World)) {
    // Not where requests are messages, where the host may refuse, where devices ask for pages, or
    // where registers are lent: it is not said what happens meanwhile.
    let Header { fails, requests, .. } = world.header;
    if fails || requests || world.is_interrupt(&dma) || world.paged.is_some() {
        changes.into_iter().for_each(|(at, next)| world.memory.store(at, next));
        return end(world);
    }
    beside::goes_on(world, dma, changes, end);
}

impl Machine for World {
    type Dma = Dma;

    fn memory(&mut self) -> &mut Memory {
        &mut self.memory
    }

    fn access(&self, dma: Dma) -> (DmaPort, Access) {
        let Dma { device, pasid, iova, kind } = dma;
        let attributes =
            DmaAttributes { pasid, privileged: kind.privileged, execute: kind.execute };
        (self.ports[device].clone(), Access { attributes, iova, value: None })
    }

    fn writes(dma: Dma) -> bool {
        dma.kind.write
    }

    fn reading(dma: Dma) -> Dma {
        Dma { kind: Kind { write: false, ..dma.kind }, ..dma }
    }

    fn next_value(&mut self) -> u64 {
        World::next_value(self)
    }

    fn data(&mut self, dma: Dma) -> Option<Vec<u64>> {
        World::data(self, &dma)
    }

    fn dma(&mut self, dma: Dma) {
        World::dma(self, dma);
    }
}
