// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What happens while a device goes on: when it is over, nothing gets to where the device went
//! before, unless it may go there now.

use arbitrary::{Result, Unstructured};
use twostage_emulated::DmaPort;

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
    beside::goes_on(world, dma, Some((at, next)), |world| world.invalidate(&descriptors));
    Ok(())
}

impl Machine for World {
    type Dma = Dma;

    fn memory(&mut self) -> &mut Memory {
        &mut self.memory
    }

    fn access(&self, dma: Dma) -> (DmaPort, Access) {
        let access = Access { attributes: dma.attributes(), iova: dma.iova, value: None };
        (self.ports[dma.device].clone(), access)
    }

    fn writes(dma: Dma) -> bool {
        dma.kind.write
    }

    fn reading(dma: Dma) -> Dma {
        Dma { kind: Kind { write: false, ..dma.kind }, ..dma }
    }

    fn serial(&mut self) -> &mut u64 {
        &mut self.serial
    }

    fn last_of(&self, device: usize) -> Option<Dma> {
        self.last.filter(|dma| dma.device == device && self.plugged[device])
    }

    fn plug(&mut self, device: usize) {
        World::plug(self, device);
    }

    fn may_go_on(&self, dma: Dma) -> bool {
        // Not where requests are messages, where the host may refuse, where devices ask for pages,
        // or where registers are lent.
        let Header { fails, requests, .. } = self.header;
        !(fails || requests || self.is_interrupt(&dma) || self.paged.is_some())
    }

    fn data(&mut self, dma: Dma) -> Option<Vec<u64>> {
        World::data(self, &dma)
    }

    fn dma(&mut self, dma: Dma) {
        World::dma(self, dma);
    }
}
