// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What drivers do: a word changes that translates what a device has just reached, the guest says
//! so, in one of the ways that are enough or nearly, and the device goes there again.

use arbitrary::{Result, Unstructured};
use twostage::spec::pci::Pasid;
use twostage::spec::smmuv3::command::{AddressRange, Command};
use twostage::spec::smmuv3::StreamId;

use super::dma::Dma;
use super::naive::Kind;
use super::word;
use super::world::{World, DEVICES};
use crate::models::memory::PAGE;

/// One round; nothing if no device has reached for anything yet.
pub fn again(world: &mut World, input: &mut Unstructured) -> Result<()> {
    let Some(Round { dma, at, next, commands }) = round(world, input)? else { return Ok(()) };
    world.memory.store(at, next);
    world.command(&commands);
    world.dma(dma);
    Ok(())
}

/// What happens in one round.
pub struct Round {
    pub dma: Dma,
    /// The word that changes, and what to.
    pub at: u64,
    pub next: u64,
    pub commands: Vec<Command>,
}

/// A device goes where it was last; what is to happen then.
pub fn round(world: &mut World, input: &mut Unstructured) -> Result<Option<Round>> {
    let [which, how, said]: [u8; 3] = input.arbitrary()?;
    let Some(mut dma) = world.last else { return Ok(None) };
    let of_context = which & 7 == 5;
    if of_context {
        let [privileged, execute] = [how & 0x38 != 0x08, how & 0x30 == 0x10];
        dma.substream = dma.substream.or(Some(1));
        dma.kind = Kind { write: how & 0x30 == 0x20, privileged, execute };
    }
    world.dma(dma);
    let (words, found) = world.way_of(&dma);
    let place = match of_context {
        // Word 0 of the context descriptor, of which words 0, 1, 2 and 7 are read.
        true => {
            let is_context = |it: &&[u64]| it[2] == it[0] + 16 && it[3] == it[0] + 56;
            words.windows(4).find(is_context).map(|it| it[0])
        }
        false => world.memory.one_of(&words, which >> 3).map(|(at, _)| at),
    };
    let Some((at, now)) = place.and_then(|at| Some((at, world.memory.load(at)?))) else {
        return Ok(None);
    };
    let next = match which & 7 {
        0..=3 => {
            now ^ [1, 2, 1 << 6, 1 << 7, 1 << 12, 1 << 10, 1 << 54, 1 << 40][usize::from(how & 7)]
        }
        // None becomes global.
        4 => now ^ 1 << (how & 63) & !(1 << 11),
        // PAN, WXN, AFFD, HA, HD, TBI0, R, S.
        5 => now ^ 1 << [40, 36, 35, 43, 42, 38, 45, 44][usize::from(how & 7)],
        _ => word(input)?,
    };
    let stream = StreamId(u32::from(DEVICES[dma.device]));
    let substream = Pasid::new(dma.substream.unwrap_or(0)).unwrap_or(Pasid::new(0).expect("small"));
    let (asid, vmid) = (found.space.map_or(0, |space| space.asid), 0);
    let leaf = how & 0x80 != 0;
    let mut range = AddressRange { leaf, ..AddressRange::at(dma.address & !(PAGE - 1)) };
    if world.header.ranges && said & 0x10 != 0 {
        range.tg = [1, 2, 3, 1][usize::from(said >> 5 & 3)];
        (range.ttl, range.num) = if said & 0x80 != 0 { (3, 0) } else { (0, 1) };
        range.address &= !((1 << (10 + 2 * range.tg)) - 1);
    }
    let of_asid = Command::TlbiNhAsid { vmid, asid };
    let context = Command::CfgiCd { stream, substream, leaf };
    let entries =
        Command::CfgiSteRange { stream, range: [0, 3, 5, 31][usize::from(said >> 5 & 3)] };
    let forget = Command::AtcInv {
        stream,
        // Without, it is of all.
        substream: dma.substream.filter(|_| which & 0x80 == 0).and_then(Pasid::new),
        global: leaf && dma.substream.is_some() && which & 0x80 == 0,
        address: range.address & !(PAGE - 1),
        size: [0, 0, 1, 52][usize::from(said >> 5 & 3)],
    };
    let commands = match said & 15 {
        0..=3 => vec![Command::TlbiNhVa { vmid, asid, range }],
        4 => vec![Command::TlbiNhVaa { vmid, range }],
        5 => vec![of_asid],
        6 => vec![Command::TlbiNhAll { vmid }],
        7 => vec![context, of_asid],
        8 => vec![context],
        9 => vec![Command::CfgiCdAll { stream }, Command::TlbiNsnhAll],
        10 => vec![Command::CfgiSte { stream, leaf }, of_asid],
        11 => vec![entries, of_asid],
        12 => vec![Command::CfgiCdAll { stream }],
        13 => vec![Command::CfgiSte { stream, leaf }, context],
        // As drivers do, and only a part of it.
        14 if said & 0x80 != 0 => vec![forget],
        14 => vec![Command::TlbiNhVa { vmid, asid, range }, forget],
        _ if world.header.ats => vec![of_asid, forget],
        _ => vec![],
    };
    Ok(Some(Round { dma, at, next, commands }))
}
