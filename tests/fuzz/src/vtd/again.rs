// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What drivers do: a word changes that translates what a device has just reached, the guest says
//! so, in one of the ways that are enough or nearly, and the device goes there again.

use arbitrary::{Result, Unstructured};
use twostage::spec::pci::{Bdf, Pasid};
use twostage::spec::vtd::qi::{
    AddressMask, ContextScope, Descriptor, DeviceTlbRange, IotlbScope, PasidCacheScope,
};

use super::dma::Dma;
use super::naive::Decision;
use super::world::{World, DEVICES};
use super::{iotlb, word};
use crate::models::memory::PAGE;

/// One round; nothing if no device has reached for anything yet.
pub fn again(world: &mut World, input: &mut Unstructured) -> Result<()> {
    let Some(Round { dma, at, next, descriptors, back }) = round(world, input)? else {
        return Ok(());
    };
    world.memory.store(at, next);
    if back {
        // There and back: what is cached of the first is not what it is now.
        world.dma(dma);
    }
    world.invalidate(&descriptors);
    world.dma(dma);
    Ok(())
}

/// What happens in one round.
pub struct Round {
    pub dma: Dma,
    /// The word that changes, and what to.
    pub at: u64,
    pub next: u64,
    pub descriptors: Vec<Descriptor>,
    /// The device goes there before the guest says so.
    pub back: bool,
}

/// A device goes where it was last; what is to happen then.
pub fn round(world: &mut World, input: &mut Unstructured) -> Result<Option<Round>> {
    let [which, how, said]: [u8; 3] = input.arbitrary()?;
    let Some(dma) = world.last else { return Ok(None) };
    world.dma(dma);
    let (words, decision) = world.way_of(&dma);
    let Some((at, now)) = world.memory.one_of(&words, which >> 3) else { return Ok(None) };
    let next = match which & 7 {
        0..=3 => now ^ [1, 2, 4, 1 << 12, 1 << 13, 1 << 7, 1 << 62, 1 << 8][usize::from(how & 7)],
        4 => now ^ 1 << (how & 63),
        _ => word(input)?,
    };
    let Decision { domain, pasid, .. } = decision;
    let source = Bdf::from_raw(DEVICES[dma.device]);
    let tagged = Pasid::new(pasid).unwrap_or(Pasid::new(0).expect("small"));
    let leaf = how & 0x80 != 0;
    // What a mask covers may be named by another of its pages.
    let elsewhere = how >> 6 & 1 != 0;
    let range = |mask: u8| {
        let other = (u64::from(elsewhere) << mask >> 1) * PAGE;
        AddressMask { address: dma.iova & !(PAGE - 1) ^ other, mask, leaf }
    };
    let pages = Some(range([0, 0, 1, 9][usize::from(said >> 4 & 3)]));
    let all = Descriptor::PasidIotlb { domain, pasid: tagged, range: None };
    let of_domain = iotlb(IotlbScope::Domain(domain));
    // A function that a mask of function numbers joins with the device's.
    let mask = said >> 4 & 3;
    let near = Bdf::from_raw(source.raw() | [0, 4, 6, 7][usize::from(mask)]);
    let of_function = Descriptor::ContextCache(ContextScope::Device {
        domain,
        source: near,
        function_mask: mask,
    });
    let mut descriptors = match said & 15 {
        0..=2 => vec![Descriptor::PasidIotlb { domain, pasid: tagged, range: pages }],
        3 => vec![all],
        4 => vec![of_domain],
        5 | 6 => vec![iotlb(IotlbScope::Pages { domain, range: range(mask) })],
        7 | 8 => {
            vec![Descriptor::PasidCache(PasidCacheScope::Pasid { domain, pasid: tagged }), all]
        }
        9 => vec![Descriptor::PasidCache(PasidCacheScope::Pasid { domain, pasid: tagged })],
        10 => vec![Descriptor::PasidCache(PasidCacheScope::Domain(domain)), of_domain],
        11 => vec![of_function, of_domain],
        12 => vec![of_function],
        13 => vec![iotlb(IotlbScope::Global)],
        _ => vec![],
    };
    if world.caching[dma.device] && said & 0x40 != 0 {
        let range = DeviceTlbRange { address: dma.iova & !(PAGE - 1), size: false };
        let (physical_function, max_pending) = (0, 0);
        descriptors.push(match dma.pasid.and_then(Pasid::new) {
            Some(pasid) => Descriptor::PasidDeviceTlb {
                source,
                pasid: if leaf { Pasid::new(0).expect("small") } else { pasid },
                global: leaf,
                physical_function,
                max_pending,
                range,
            },
            None => Descriptor::DeviceTlb { source, physical_function, max_pending, range },
        });
    }
    Ok(Some(Round { dma, at, next, descriptors, back: said & 0x80 != 0 }))
}
