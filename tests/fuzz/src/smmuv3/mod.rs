// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a guest and its devices can do to a virtual SMMUv3, decoded from bytes.
//!
//! One execution is one guest from start to end, with two devices, on a host that nests its tables.
//! Its tables translate at the start ([`image`]), by one of the granules, through one or two levels
//! of stream table and of context descriptors; then it changes words of them, writes registers,
//! gives commands, and devices do DMA.
//!
//! Every DMA is compared with a naive walk of the tables ([`naive`]): where the guest has said that
//! they changed ([`account`]), the DMA finds what they have now; where it has not, what they have
//! or had; also if the device never stops while that happens ([`meanwhile`]). In some executions,
//! so are the events of those that are refused, and requests for pages are with the registers of
//! their queue ([`page_requests`]); in others the host's verbs fail ([`failures`]). At the end
//! nothing is left.

mod account;
mod again;
mod commands;
mod dma;
mod events;
mod failures;
mod image;
mod meanwhile;
mod naive;
mod page_requests;
mod stalls;
mod world;

use arbitrary::{Result, Unstructured};
use twostage::spec::pci::Pasid;
use twostage::spec::smmuv3::command::{AddressRange, Command, SyncSignal};
use twostage::spec::smmuv3::regs;
use twostage::spec::smmuv3::translation::Granule;
use twostage::spec::smmuv3::StreamId;

use crate::models::beside;
use crate::models::memory::PAGE;
use crate::models::weighted;
use dma::Dma;
use image::{context, page, stage1, FLAGS};
use naive::Kind;
use world::{Header, World, DEVICES};

/// Maximum number of steps of one execution.
const MAX_STEPS: usize = 48;

/// What happens next.
#[derive(Debug, Clone, Copy)]
enum Step {
    Dma,
    Table,
    Entry,
    Context,
    Bit,
    Invalidate,
    Flush,
    RawCommands,
    Register,
    AnyRegister,
    Read,
    Enable,
    Tables,
    Plug,
    Reset,
    Again,
    DeviceTlb,
    Resume,
    Ask,
    Fail,
    Meanwhile,
}

impl Step {
    fn of(number: u8, header: &Header) -> Self {
        use Step::*;
        const STEPS: [(Step, u8); 16] = [
            (Dma, 8),
            (Table, 6),
            (Invalidate, 4),
            (Flush, 2),
            (Entry, 1),
            (Context, 2),
            (Bit, 1),
            (RawCommands, 1),
            (Register, 1),
            (AnyRegister, 1),
            (Read, 1),
            (Enable, 1),
            (Tables, 1),
            (Plug, 1),
            (Reset, 1),
            (Again, 8),
        ];
        match number {
            0xf0..=0xf2 => DeviceTlb,
            0xf3..=0xf6 => Resume,
            0xf7.. if header.requests => Ask,
            0xf7.. if header.fails => Fail,
            // Few, as it waits for another thread.
            0xfe.. if !header.events && !header.stalls => Meanwhile,
            _ => weighted(&STEPS, number),
        }
    }
}

/// One execution: see the [module's documentation](self).
pub fn run(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let header = input.arbitrary().unwrap_or_default();
    let mut world = World::new(Header::of(header));
    for _ in 0..MAX_STEPS {
        if input.is_empty() || step(&mut world, &mut input).is_err() {
            break;
        }
    }
    world.end();
}

fn step(world: &mut World, input: &mut Unstructured) -> Result<()> {
    let next = Step::of(input.arbitrary()?, &world.header);
    crate::models::trace(|| format!("{next:?} {:?}", input.peek_bytes(input.len().min(6))));
    match next {
        Step::Dma => {
            let how: u8 = input.arbitrary()?;
            let substream = match u32::from(how >> 1) % 8 {
                substream @ 1..4 => Some(substream),
                _ => None,
            };
            let with = |bits: u8| how & 0xe0 == bits && substream.is_some();
            let kind = Kind {
                write: how & 0x10 != 0,
                privileged: with(0xe0) || with(0xa0),
                execute: (with(0xc0) || with(0xa0)) && how & 0x10 == 0,
            };
            let address = address(world, input)? | u64::from(how & 0x60 == 0x20) << 3;
            world.dma(Dma { device: usize::from(how & 1), substream, address, kind });
        }
        Step::Table => {
            let (at, word) = (place(world, input)?, word(input)?);
            world.memory.store(at, word);
        }
        Step::Entry => {
            let [which, how, bit]: [u8; 3] = input.arbitrary()?;
            let table = if world.header.two_levels { page::LEAVES } else { page::STREAMS };
            let at = table * PAGE + u64::from(DEVICES[usize::from(which & 1)]) * 64;
            let contexts = page::CONTEXTS * PAGE;
            let mut entry = match how % 8 {
                0 => [1, 0],
                1 => [1 | 4 << 1, 0],
                2 => [0, 0],
                3 | 4 => stage1(contexts, u64::from(how >> 3) % 4, 0),
                5 => stage1(contexts + 0x800, u64::from(how >> 3) % 4, 1),
                6 => stage1(contexts + 0x800, u64::from(how >> 3) % 4, 2),
                _ => stage1(contexts + 0x400, 0, 0),
            };
            if which & 2 != 0 {
                entry[1] |= 1 << 28;
            }
            if which & 0xe0 == 0xe0 {
                entry[usize::from(which >> 4 & 1)] ^= 1 << (bit & 63);
            }
            world.memory.store(at + 8, entry[1]);
            world.memory.store(at, entry[0]);
        }
        Step::Context => {
            let [which, how]: [u8; 2] = input.arbitrary()?;
            let number = [0u64, 1, 2, 3, 16, 0, 1, 2][usize::from(which & 7)];
            let of = if which & 8 != 0 { page::MORE } else { page::CONTEXTS };
            let granules = [world.header.granule, Granule::K4, Granule::K16, Granule::K64];
            let granule = granules[usize::from(if how & 0xc0 == 0xc0 { how & 3 } else { 0 })];
            let table = page::TABLES[usize::from(how >> 2 & 1)];
            let [mut low, next] = context(granule, table);
            // S, mostly.
            low |= u64::from(world.header.stalls && which & 0x80 == 0) << 44;
            // HA, HD, WXN, PAN, TBI0, AFFD, R.
            for (bit, by) in [(43, 3), (42, 4), (36, 5)] {
                low ^= u64::from(how >> by & 1) << bit;
            }
            for (bit, by) in [(40, 4), (38, 5), (35, 6), (45, 7)] {
                low ^= u64::from(which >> by & 1) << bit;
            }
            world.memory.store(of * PAGE + number * 64 + 8, next);
            world.memory.store(of * PAGE + number * 64, low);
        }
        Step::Bit => {
            let [which, word, bit]: [u8; 3] = input.arbitrary()?;
            let tables = [page::STREAMS, page::LEAVES, page::CONTEXTS, page::MORE];
            let slot = [0, 0x20 * 64, 0x28 * 64, 64, 0x400, 0x800, 128, 192];
            let at = tables[usize::from(which & 3)] * PAGE
                + slot[usize::from(which >> 2 & 7)]
                + u64::from(word & 3) * 8;
            if let Some(now) = world.memory.load(at) {
                world.memory.store(at, now ^ 1 << (bit & 63));
            }
        }
        Step::Invalidate => {
            let count = input.arbitrary::<u8>()? % 4 + 1;
            let commands = (0..count).map(|_| command(world, input));
            let commands = commands.collect::<Result<Vec<_>>>()?;
            world.command(&commands);
        }
        Step::Flush => {
            let all = Command::CfgiSteRange { stream: StreamId(0), range: 31 };
            world.command(&[all, Command::TlbiNsnhAll]);
        }
        Step::RawCommands => {
            let count = input.arbitrary::<u8>()? % 3 + 1;
            let mut all = Vec::new();
            for _ in 0..count {
                let mut words = command(world, input)?.encode();
                let (word, bit) = (input.arbitrary::<u8>()?, input.arbitrary::<u8>()?);
                words[usize::from(word & 1)] ^= 1 << (bit & 63);
                if words[0] & 0xff == 0x46 {
                    words[1] = page::REQUESTS * PAGE;
                }
                all.push(words);
            }
            world.asked.may_have_ended_all();
            world.submit(&all, count % 2 == 0);
            world.may_end();
            world.is_unanswered |= world.silent.contains(&true);
        }
        Step::Register => {
            const OFFSETS: [u64; 24] = [
                regs::CR0,
                regs::CR1,
                regs::CR2,
                regs::GBPA,
                regs::IRQ_CTRL,
                regs::GERRORN,
                regs::GERROR_IRQ_CFG0,
                regs::GERROR_IRQ_CFG1,
                regs::STRTAB_BASE,
                regs::STRTAB_BASE_CFG,
                regs::CMDQ_BASE,
                regs::CMDQ_PROD,
                regs::CMDQ_CONS,
                regs::EVENTQ_BASE,
                regs::EVENTQ_PROD,
                regs::EVENTQ_CONS,
                regs::EVENTQ_IRQ_CFG0,
                regs::EVENTQ_IRQ_CFG1,
                regs::PRIQ_BASE,
                regs::PRIQ_PROD,
                regs::PRIQ_CONS,
                regs::PRIQ_IRQ_CFG0,
                regs::GBPA,
                regs::CR0,
            ];
            let which = usize::from(input.arbitrary::<u8>()?) % OFFSETS.len();
            let [size, low]: [u8; 2] = input.arbitrary()?;
            let value = match size & 0x30 {
                0x30 => input.arbitrary()?,
                0x20 => u64::from(low) << 24,
                // GBPA.Update
                0x10 => 1 << 31 | u64::from(low) << 14,
                _ => u64::from(low),
            };
            world.write(OFFSETS[which], &value.to_le_bytes()[..if size & 1 == 0 { 4 } else { 8 }]);
        }
        Step::AnyRegister => {
            let offset = u64::from(input.arbitrary::<u16>()? & 0x1ff);
            let [size, upper]: [u8; 2] = input.arbitrary()?;
            let value: u64 = input.arbitrary()?;
            let offset = offset + if upper & 7 == 0 { 0x1_0000 } else { 0 };
            let size = [4, 8, 4, 8, 1, 2, 3, 0][usize::from(size) % 8];
            world.write(offset, &value.to_le_bytes()[..size]);
        }
        Step::Read => {
            let offset = u64::from(input.arbitrary::<u16>()?) * 2;
            let mut bytes = [0; 8];
            let size = [4, 8, 4, 8, 1, 2, 3, 0][usize::from(input.arbitrary::<u8>()?) % 8];
            world.smmu.mmio_read(offset, &mut bytes[..size]);
        }
        Step::Enable => {
            let enabled = world.is_enabled();
            world.enable(!enabled);
        }
        Step::Tables => {
            world.enable(false);
            world.set_tables();
            world.start_queue();
            world.enable(true);
        }
        Step::Again => again::again(world, input)?,
        Step::Meanwhile => meanwhile::step(world, input)?,
        Step::Ask => page_requests::step(world, input)?,
        Step::Fail => failures::step(world, input)?,
        Step::Resume => world.resume(input.arbitrary()?),
        Step::DeviceTlb => {
            let how: u8 = input.arbitrary()?;
            let number = usize::from(how & 1);
            match how & 6 {
                6 => world.set_silent(number, how & 8 != 0),
                4 => world.keeps(how & 8 != 0),
                _ => world.set_device_tlb(number, how & 0x18 != 0),
            }
        }
        Step::Plug => beside::plug(world, input.arbitrary()?),
        Step::Reset => {
            if input.arbitrary::<u8>()? & 7 == 0 {
                world.reset();
            }
        }
    }
    Ok(())
}

/// An address: a page of the last table, through first or second entries of those above it;
/// sometimes elsewhere.
fn address(world: &World, input: &mut Unstructured) -> Result<u64> {
    let byte: u8 = input.arbitrary()?;
    let low = u64::from(byte);
    let bit = |bit: u32, shift: u32| (low >> bit & 1) << shift;
    if byte >= 0xe0 {
        const EDGES: [u64; 8] = [
            0,
            0x8000,
            0xffff_ffff_f000,
            1 << 48 | 0x1_8000,
            u64::MAX - 0xfff,
            0x5a << 56 | 0x1_8000,
            0xff80_0000_0001_8000,
            0xfee0_0000,
        ];
        return Ok(EDGES[usize::from(byte & 7)]);
    }
    Ok(match world.header.granule {
        Granule::K4 => (page::DATA + (low & 7)) << 12 | bit(3, 21) | bit(4, 30) | bit(6, 39),
        Granule::K16 => (low & 7) << 14 | (low >> 3 & 3) << 12 | bit(6, 25),
        Granule::K64 => (low & 7) << 16 | (8 + (low >> 3 & 7)) << 12,
    })
}

/// A word of a table: mostly one that is used.
fn place(world: &World, input: &mut Unstructured) -> Result<u64> {
    let [table, index]: [u8; 2] = input.arbitrary()?;
    let set = page::TABLES[usize::from(table & 1)];
    let (table, index) = match world.header.granule {
        Granule::K4 => match index {
            0x20..=0xff => (set + 3, page::DATA + u64::from(index & 7)),
            _ => (set + u64::from(table >> 1 & 3), u64::from(index & 3)),
        },
        Granule::K16 if table & 6 != 0 => (page::LARGE, u64::from(index & 15)),
        Granule::K16 | Granule::K64 => (page::TABLES[0], u64::from(index & 15)),
    };
    Ok(table * PAGE + index * 8)
}

/// The value of a word: mostly a descriptor that leads somewhere. None is global.
fn word(input: &mut Unstructured) -> Result<u64> {
    const NG: u64 = 1 << 11;
    let [to, how]: [u8; 2] = input.arbitrary()?;
    let page = u64::from(to & 31) * PAGE;
    Ok(match how {
        0..=0x5f => ((page::DATA + u64::from(to & 7)) * PAGE) | FLAGS,
        0x60..=0x7f => page | FLAGS,
        0x80..=0x8f => 0,
        // Read-only, privileged only, not accessed, to be dirtied.
        0x90..=0x9f => page | FLAGS | 1 << 7,
        0xa0..=0xa7 => page | FLAGS & !(1 << 6),
        0xa8..=0xaf => page | FLAGS & !(1 << 10),
        0xb0..=0xb7 => page | FLAGS | 1 << 51 | 1 << 7,
        // A block, tables, and what is not memory.
        0xb8..=0xbf => FLAGS & !2,
        0xc0..=0xcf => page | 3 | u64::from(how & 15) << 59 | NG,
        0xd0..=0xd7 => page | 0x10_0000 | FLAGS,
        0xd8..=0xdf => page | FLAGS | 1 << (to >> 2),
        0xe0..=0xef => page | FLAGS ^ 1 << (u32::from(how & 15) * 4) | NG,
        _ => input.arbitrary::<u64>()? | NG,
    })
}

/// Any command, but for those that write to memory or wait.
fn command(world: &World, input: &mut Unstructured) -> Result<Command> {
    let [kind, of]: [u8; 2] = input.arbitrary()?;
    let stream = match of & 3 {
        2 => StreamId(0x21),
        which => StreamId(u32::from(DEVICES[usize::from(which & 1)])),
    };
    let substream = Pasid::new(u32::from(of >> 2 & 3)).unwrap_or(Pasid::new(0).expect("small"));
    let some = (of & 0x80 != 0).then_some(substream);
    let leaf = of & 0x10 != 0;
    // The ASID is the number of the table's page.
    let asid = [page::TABLES[0], page::TABLES[1], 0, 1][usize::from(of >> 5 & 3)] as u16;
    let vmid = u16::from(of & 1);
    let range = |input: &mut Unstructured| -> Result<AddressRange> {
        let at = address(world, input)?;
        let how: u8 = input.arbitrary()?;
        let mut range = AddressRange { leaf, ..AddressRange::at(at & !0xfff) };
        if world.header.ranges && how & 0x80 != 0 {
            range.tg = how & 3;
            range.ttl = how >> 2 & 3;
            range.num = [0, 1, 7, 31][usize::from(how >> 4 & 3)];
            range.scale = if how & 0x40 != 0 { 5 } else { 0 };
        }
        Ok(range)
    };
    Ok(match kind % 24 {
        0 => Command::CfgiSte { stream, leaf },
        1 => Command::CfgiSteRange { stream, range: of >> 4 },
        2 | 3 => Command::CfgiCd { stream, substream, leaf },
        4 => Command::CfgiCdAll { stream },
        5 => Command::TlbiNhAll { vmid },
        6 | 7 => Command::TlbiNhAsid { vmid, asid },
        8..=11 => Command::TlbiNhVa { vmid, asid, range: range(input)? },
        12 | 13 => Command::TlbiNhVaa { vmid, range: range(input)? },
        14 => Command::TlbiNsnhAll,
        15 => Command::PrefetchConfig { stream, substream: some },
        16 => Command::PrefetchAddr {
            stream,
            substream: some,
            address: address(world, input)? & !0xfff,
            size: of >> 4,
            stride: of & 15,
        },
        17 | 18 => Command::AtcInv {
            stream,
            substream: some,
            global: leaf && some.is_some(),
            address: address(world, input)? & !0xfff,
            size: [0, 1, 9, 52][usize::from(of >> 5 & 3)],
        },
        19 => Command::PriResp { stream, substream: some, group: 3, response: of >> 5 & 3 },
        20 => Command::Resume { stream, stag: u16::from(of), response: of >> 5 & 3 },
        21 => Command::StallTerm { stream },
        22 => Command::Sync { signal: SyncSignal::Event },
        // A message is written to memory: not to tables.
        _ => Command::Sync {
            signal: SyncSignal::Interrupt {
                address: page::REQUESTS * PAGE + u64::from(of & 3) * 0x10_0000,
                data: 1,
            },
        },
    })
}
