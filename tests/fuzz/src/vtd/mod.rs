// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a guest and its devices can do to a virtual VT-d, decoded from bytes.
//!
//! One execution is one guest from start to end, with two devices, on a host that nests its tables
//! or has them mirrored, or on two; in some executions calls to hosts fail ([`hosts`]). Its tables
//! translate at the start ([`image`]); then it changes words of them, writes registers, has the
//! unit invalidate, and devices do DMA, go and come back.
//!
//! Every DMA is compared with a naive walk of the tables ([`naive`], then [`walk`]): where the
//! guest has said that they changed ([`account`]), the DMA finds what they have now; where it has
//! not, what they have or had; also if the device never stops while that happens ([`meanwhile`]). A
//! DMA that is refused is in the fault records as the walk says. Interrupts are compared with what
//! the guest's table of them says ([`interrupts`]), requests for pages with the registers of their
//! queue ([`page_requests`]), and registers that are lent as memory with those that are read
//! ([`register_page`]). At the end nothing is left.

mod account;
mod again;
mod device_tlb;
mod dma;
mod header;
mod hosts;
mod image;
mod interrupts;
mod meanwhile;
mod mirrors;
mod naive;
mod page_requests;
mod register_page;
mod walk;
mod world;

use arbitrary::{Result, Unstructured};
use twostage::spec::pci::{Bdf, Pasid};
use twostage::spec::vtd::qi::{
    AddressMask, ContextScope, Descriptor, DeviceTlbRange, InterruptEntryScope, IotlbScope,
    PasidCacheScope,
};
use twostage::spec::vtd::regs;

use crate::models::beside;
use crate::models::memory::PAGE;
use crate::models::weighted;
use dma::Dma;
use header::Header;
use image::{page, pasid_entry};
use walk::Kind;
use world::{World, DEVICES, PASIDS};

/// Maximum number of steps of one execution.
const MAX_STEPS: usize = 48;

/// From this number on, steps are those that came last.
const LAST_STEPS: u8 = 224;

/// From this number on, hosts fail in executions where they do.
const FAILURES: u8 = 232;

/// What happens next.
#[derive(Debug, Clone, Copy)]
enum Step {
    Dma,
    Table,
    Entry,
    Context,
    Invalidate,
    Flush,
    RawDescriptors,
    Register,
    AnyRegister,
    Read,
    Command,
    Root,
    Plug,
    DeviceTlb,
    Reset,
    Again,
    Interrupt,
    Page,
    Ask,
    Fail,
    Meanwhile,
}

impl Step {
    fn of(number: u8) -> Self {
        use Step::*;
        const STEPS: [(Step, u8); 16] = [
            (Dma, 8),
            (Table, 6),
            (Invalidate, 4),
            (Flush, 2),
            (Entry, 2),
            (Context, 1),
            (RawDescriptors, 1),
            (Register, 1),
            (AnyRegister, 1),
            (Read, 1),
            (Command, 1),
            (Root, 1),
            (Plug, 1),
            (DeviceTlb, 1),
            (Reset, 1),
            (Again, 8),
        ];
        // The last numbers were those of others, which have enough.
        const LAST: [(Step, u8); 3] = [(Interrupt, 2), (Page, 1), (Ask, 5)];
        match number.checked_sub(LAST_STEPS) {
            Some(number) => weighted(&LAST, number),
            None => weighted(&STEPS, number),
        }
    }
}

/// One execution: see the [module's documentation](self).
pub fn run(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let header = input.arbitrary().unwrap_or_default();
    let header = Header::of(header);
    let fails = if header.fails { input.arbitrary().unwrap_or_default() } else { 0 };
    let mut world = World::new(header, fails);
    for _ in 0..MAX_STEPS {
        if input.is_empty() || step(&mut world, &mut input).is_err() {
            break;
        }
    }
    world.end();
}

fn step(world: &mut World, input: &mut Unstructured) -> Result<()> {
    let next = match input.arbitrary()? {
        FAILURES.. if world.header.fails => Step::Fail,
        // Few, as it waits for another thread.
        0xfc.. if !world.header.requests => Step::Meanwhile,
        number => Step::of(number),
    };
    crate::models::trace(|| format!("{next:?} {:?}", input.peek_bytes(input.len().min(6))));
    match next {
        Step::Dma => {
            let how: u8 = input.arbitrary()?;
            let pasid = match u32::from(how >> 1) % 8 {
                pasid @ 1..PASIDS => Some(pasid),
                _ => None,
            };
            let kind = Kind {
                write: how & 0x10 != 0,
                // A mirror does not know of privilege.
                privileged: how & 0xe0 == 0xe0 && pasid.is_some() && !world.header.mirrored,
                execute: how & 0xe0 == 0xc0 && pasid.is_some(),
            };
            let iova = iova(input)? | u64::from(how & 0x60 == 0x20) << 3;
            world.dma(Dma { device: usize::from(how & 1), pasid, iova, kind });
        }
        Step::Table => {
            let (at, word) = (place(input)?, word(input)?);
            world.memory.store(at, word);
        }
        Step::Entry => {
            let [which, how, tables]: [u8; 3] = input.arbitrary()?;
            let first = [page::FIRST[0], page::FIRST[1], page::FIFTH[0], page::DATA];
            let second = [page::SECOND, page::FIFTH[1], page::SECOND, page::DATA];
            let choose = |of: [u64; 4], by: u8| of[usize::from(by) % 4];
            let levels = if tables & 0x20 != 0 { 5 } else { 4 };
            let second = choose(second, tables >> 2);
            let domain = u64::from(how >> 3) % 3 + image::DOMAIN;
            // One bit of some entries is another one.
            let bit = |number: usize| {
                let flipped = number == usize::from(tables >> 6) && how & 0xc0 == 0xc0;
                u64::from(flipped) << (which >> 2)
            };
            if world.is_legacy() {
                let [at, low, high] = context_entry(which, how, domain, second, levels);
                world.memory.store(at + 8, high ^ bit(1));
                world.memory.store(at, low ^ bit(0));
                return Ok(());
            }
            let pgtt = [1, 3, 2, 4, 1, 3, 0, 6][usize::from(how) % 8];
            let entry = pasid_entry(pgtt, domain, choose(first, tables), second, levels);
            let at = page::PASIDS * PAGE + u64::from(which) % 4 * 64;
            for (number, word) in entry.into_iter().enumerate().rev() {
                world.memory.store(at + number as u64 * 8, word ^ bit(number));
            }
        }
        Step::Context => {
            let [which, word, bit]: [u8; 3] = input.arbitrary()?;
            // Root, contexts, directory: of the two functions.
            let at = match which % 8 {
                0 => page::ROOT * PAGE + u64::from(which >> 6) * 8,
                1 => page::DIRECTORY * PAGE,
                which => {
                    let slot = u64::from(DEVICES[usize::from(which & 1)]);
                    let size = if world.is_legacy() { 16 } else { 32 };
                    page::CONTEXT * PAGE + slot * size + u64::from(word) % (size / 8) * 8
                }
            };
            if let Some(now) = world.memory.load(at) {
                world.memory.store(at, now ^ 1 << (bit % 64));
            }
        }
        Step::Invalidate => {
            let count = input.arbitrary::<u8>()? % 4 + 1;
            let descriptors = (0..count).map(|_| descriptor(input));
            let descriptors = descriptors.collect::<Result<Vec<_>>>()?;
            world.invalidate(&descriptors);
        }
        Step::Flush => world.flush(),
        Step::RawDescriptors => {
            let count = input.arbitrary::<u8>()? % 3 + 1;
            let mut all = Vec::new();
            for _ in 0..count {
                let mut words = descriptor(input)?.encode();
                let (word, bit) = (input.arbitrary::<u8>()?, input.arbitrary::<u8>()?);
                words[usize::from(word) % 4] ^= 1 << (bit % 64);
                // A wait writes where it is said to: not to tables.
                if words[0] & 0xf == 5 {
                    words[1] = page::STATUS * PAGE + 8;
                }
                all.push(words);
            }
            world.asked.changes += 1;
            world.submit(&all, count % 2 == 0);
        }
        Step::Register => {
            const OFFSETS: [u64; 24] = [
                regs::CCMD,
                regs::FSTS,
                regs::FECTL,
                regs::FEDATA,
                regs::FEADDR,
                regs::FEUADDR,
                regs::IQT,
                regs::IQA,
                regs::ICS,
                regs::IECTL,
                regs::IEDATA,
                regs::IEADDR,
                regs::IRTA,
                regs::PQH,
                regs::PQT,
                regs::PQA,
                regs::PRS,
                regs::PECTL,
                regs::PEADDR,
                regs::RTADDR,
                0x100,
                0x108,
                0x22c,
                0x23c,
            ];
            let which = usize::from(input.arbitrary::<u8>()?) % OFFSETS.len();
            let (size, value) = (input.arbitrary::<u8>()?, word(input)?);
            let bytes = value.to_le_bytes();
            world.write(OFFSETS[which], &bytes[..if size % 2 == 0 { 4 } else { 8 }]);
        }
        Step::AnyRegister => {
            let offset = u64::from(input.arbitrary::<u16>()? % 0x420);
            let (size, value) = (input.arbitrary::<u8>()?, word(input)?);
            let bytes = value.to_le_bytes();
            let size = [4, 8, 4, 8, 1, 2, 3, 0][usize::from(size) % 8];
            world.write(offset, &bytes[..size]);
        }
        Step::Read => {
            let offset = u64::from(input.arbitrary::<u16>()? % 0x1010);
            let mut bytes = [0; 8];
            let size = [4, 8, 4, 8, 1, 2, 3, 0][usize::from(input.arbitrary::<u8>()?) % 8];
            world.iommu.mmio_read(offset, &mut bytes[..size]);
            world.check_page();
        }
        Step::Command => {
            let bits: u8 = input.arbitrary()?;
            world.command(|command| {
                command
                    .with_te(command.te() ^ (bits & 1 != 0))
                    .with_qie(command.qie() ^ (bits & 6 == 6))
                    .with_ire(command.ire() ^ (bits & 8 != 0))
                    .with_cfi(command.cfi() ^ (bits & 0x10 != 0))
                    .with_sirtp(bits & 0x20 != 0)
                    .with_srtp(bits & 0xc0 == 0xc0)
            });
        }
        Step::Root => {
            let how: u8 = input.arbitrary()?;
            world.set_root(how & 1 != 0);
        }
        Step::Again => again::again(world, input)?,
        Step::Meanwhile => meanwhile::step(world, input)?,
        Step::Fail => hosts::step(world, input)?,
        Step::Ask => page_requests::step(world, input)?,
        Step::Page => register_page::step(world, input)?,
        Step::Interrupt => interrupts::step(world, input)?,
        Step::Plug => beside::plug(world, input.arbitrary()?),
        Step::DeviceTlb => {
            let how: u8 = input.arbitrary()?;
            match world.last.filter(|dma| how & 0x80 != 0 && world.caching[dma.device]) {
                Some(dma) => device_tlb::round(world, dma, how),
                None => world.set_device_tlb(usize::from(how & 1), how & 2 != 0),
            }
        }
        Step::Reset => {
            if input.arbitrary::<u8>()? & 7 == 0 {
                world.reset();
            }
        }
    }
    Ok(())
}

/// A context entry of legacy mode: where it is, and its two words.
fn context_entry(which: u8, how: u8, domain: u64, second: u64, levels: u64) -> [u64; 3] {
    let slot = u64::from(DEVICES[usize::from(which & 1)]);
    // Most that are not translated have the width that they must have.
    let kind = [0, 2, 1, 2, 0, 2, 0, 3][usize::from(how) % 8];
    let (low, high) = ((second * PAGE) | kind << 2 | 1, domain << 8 | (levels - 2));
    [page::CONTEXT * PAGE + slot * 16, low, high]
}

/// An IOVA: one of eight pages of a table, through first or second entries of the tables above it;
/// sometimes elsewhere.
fn iova(input: &mut Unstructured) -> Result<u64> {
    let byte: u8 = input.arbitrary()?;
    let low = u64::from(byte);
    Ok(match byte >> 6 {
        0..=2 => {
            let above = (low >> 3 & 1) << 21 | (low >> 4 & 1) << 30 | (low >> 6 & 1) << 39;
            ((page::DATA + (low & 7)) * PAGE) | above
        }
        _ if byte < 0xe0 => (low & 31) * PAGE,
        _ => {
            const EDGES: [u64; 8] = [
                0xfee0_0000,
                0xfef0_0000,
                0x7fff_ffff_f000,
                0x8000_0000_0000,
                0xffff_8000_0001_8000,
                1 << 48 | 0x1_8000,
                u64::MAX - 0xfff,
                0x100_0000_0000_0000,
            ];
            EDGES[usize::from(byte & 7)]
        }
    })
}

/// A word of a table: mostly one that is used.
fn place(input: &mut Unstructured) -> Result<u64> {
    let [table, index]: [u8; 2] = input.arbitrary()?;
    let tables = [
        page::FIRST[0],
        page::FIRST[1],
        page::SECOND,
        page::PASIDS,
        page::FIFTH[0],
        page::CONTEXT,
        page::FIRST[0],
        page::SECOND,
    ];
    let table = tables[usize::from(table & 7)] + u64::from(table >> 3 & 3);
    let index = match index {
        0..=15 => u64::from(index & 1),
        16..=0xdf => page::DATA + u64::from(index & 7),
        _ => u64::from(index & 31) * 17 % 512,
    };
    Ok(table % 32 * PAGE + index * 8)
}

/// The value of a word: mostly an entry that leads somewhere.
fn word(input: &mut Unstructured) -> Result<u64> {
    let [to, how]: [u8; 2] = input.arbitrary()?;
    let page = u64::from(to & 31) * PAGE;
    Ok(match how {
        0..=0x7f => page | 7,
        0x80..=0x8f => 0,
        // Large pages.
        0x90..=0x9f => (u64::from(to & 1) * PAGE) | 0x87,
        0xa0..=0xaf => page | 5,
        0xb0..=0xbf => page | u64::from(how & 15),
        // Not memory.
        0xc0..=0xc7 => page | 0x10_0000 | 7,
        0xc8..=0xcf => page | 0x67 | 1 << 63,
        0xd0..=0xd7 => page | 7 | 1 << (to >> 2),
        0xd8..=0xdf => 1 << (to & 63),
        0xe0..=0xef => u64::from(to) << ((how & 15) * 4),
        _ => input.arbitrary()?,
    })
}

fn iotlb(scope: IotlbScope) -> Descriptor {
    Descriptor::Iotlb { scope, drain_writes: true, drain_reads: true }
}

/// Any descriptor.
fn descriptor(input: &mut Unstructured) -> Result<Descriptor> {
    let [kind, of]: [u8; 2] = input.arbitrary()?;
    let domain = u16::from(of & 3) + image::DOMAIN as u16 - u16::from(of & 0xc == 0xc);
    let pasid = Pasid::new(u32::from(of >> 4 & 3)).unwrap_or(Pasid::new(0).expect("small"));
    let source = Bdf::from_raw(DEVICES[usize::from(of >> 6 & 1)] | u16::from(of == 0xff));
    let pages = |input: &mut Unstructured| -> Result<AddressMask> {
        let mask = input.arbitrary::<u8>()?;
        let leaf = mask & 0x80 != 0;
        let mask =
            [0, 0, 0, 1, 3, 9, 18, 18][usize::from(mask & 7)] + u8::from(mask & 0x78 == 0x78);
        Ok(AddressMask { address: iova(input)?, mask, leaf })
    };
    let of_device = |input: &mut Unstructured| -> Result<DeviceTlbRange> {
        let at = iova(input)?;
        Ok(match of >> 2 & 3 {
            0 => DeviceTlbRange { address: 0x7fff_ffff_ffff_f000, size: true },
            1 => DeviceTlbRange { address: at | 0xf_f000, size: true },
            _ => DeviceTlbRange { address: at, size: false },
        })
    };
    Ok(match kind % 16 {
        0 => Descriptor::ContextCache(ContextScope::Global),
        1 => Descriptor::ContextCache(ContextScope::Domain(domain)),
        2 => Descriptor::ContextCache(ContextScope::Device {
            domain,
            source,
            function_mask: kind >> 4 & 3,
        }),
        3 => iotlb(IotlbScope::Global),
        4 => iotlb(IotlbScope::Domain(domain)),
        5 | 6 => iotlb(IotlbScope::Pages { domain, range: pages(input)? }),
        7 => Descriptor::DeviceTlb {
            source,
            physical_function: 0,
            max_pending: 0,
            range: of_device(input)?,
        },
        8 => Descriptor::InterruptEntryCache(match kind >> 4 & 1 {
            0 => InterruptEntryScope::Global,
            _ => InterruptEntryScope::Index { index: u16::from(of & 15), mask: kind >> 5 },
        }),
        9 | 10 => Descriptor::PasidIotlb { domain, pasid, range: Some(pages(input)?) },
        11 => Descriptor::PasidIotlb { domain, pasid, range: None },
        12 => Descriptor::PasidCache(PasidCacheScope::Domain(domain)),
        13 => Descriptor::PasidCache(PasidCacheScope::Pasid { domain, pasid }),
        14 => Descriptor::PasidDeviceTlb {
            source,
            pasid,
            global: kind & 0x10 != 0,
            physical_function: 0,
            max_pending: 0,
            range: of_device(input)?,
        },
        _ => Descriptor::Wait {
            status: None,
            interrupt: kind & 0x10 != 0,
            fence: kind & 0x20 != 0,
            drain_page_requests: kind & 0x40 != 0,
        },
    })
}
