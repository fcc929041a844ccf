// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vIOMMU of an SMMU: the user's stream table entries, and invalidation commands.

use std::sync::Arc;
use twostage::sync::Mutex;

use super::streams::{Streams, Vmaster};

use crate::drivers::user_data::{ARM_SMMUV3, ARM_SMMUV3_INVALIDATE};
use crate::drivers::{NestedDomain, PagingDomain, Partial, UserArray, UserData, ViommuDriver};
use crate::host::device::Requester;
use crate::host::events::ViommuEvents;
use crate::host::refusal::{refuse, Outcome};
use crate::units::engine::IovaRange;
use crate::units::hardware::CacheTag;
use crate::units::smmuv3::{Invalidation, SmmuV3Unit, SmmuV3UnitConfig};
use twostage::iommufd::{Errno, HwptFlags};
use twostage::spec::pci::Pasid;
use twostage::spec::smmuv3::command::{Command, ATC_SIZE_ALL};
use twostage::spec::smmuv3::stream_table::{EnableAts, Ste, Ste0, Ste1, StreamConfig};

/// Commands that Linux issues together (`CMDQ_BATCH_ENTRIES`, without the CMD_SYNC).
const BLOCK: usize = 63;

/// How many commands, and bytes of one, a vIOMMU keeps memory for, for the next call.
const KEPT: usize = 4096;

/// Bytes of a command.
const COMMAND_SIZE: usize = 16;

/// A vIOMMU.
#[derive(Debug)]
pub(super) struct Vsmmu {
    unit: Arc<SmmuV3Unit>,
    /// The nesting parent's VMID.
    tag: CacheTag,
    /// Keeps the VMID in use.
    _parent: Arc<dyn PagingDomain>,
    streams: Arc<Streams>,
    scratch: Mutex<Scratch>,
}

/// Memory for invalidations, so that a call takes no allocation.
#[derive(Debug, Default)]
struct Scratch {
    commands: Vec<[u64; 2]>,
    converted: Vec<Invalidation>,
    /// One entry of the user's.
    entry: Vec<u8>,
}

impl Vsmmu {
    /// A vIOMMU on the nesting parent `parent`, whose VMID is `tag`.
    pub fn new(
        unit: &Arc<SmmuV3Unit>,
        tag: CacheTag,
        parent: &Arc<dyn PagingDomain>,
        events: &Arc<ViommuEvents>,
    ) -> Self {
        let streams = Streams::new(events.clone());
        let (unit, streams) = (unit.clone(), Arc::new(streams));
        let scratch = Mutex::default();
        Self { unit, tag, _parent: parent.clone(), streams, scratch }
    }

    /// Converts a user's command for the SMMU. Only here is it decoded: the uAPI has words, and a
    /// driver checks every bit of them.
    ///
    /// # Errors
    /// `EIO` the command is not allowed for users, its stream is unknown, or it has undefined bits
    /// set (as in kernels after 7.2: such a command may stop the queue for all users).
    fn convert(&self, words: [u64; 2]) -> Outcome<Invalidation> {
        let tag = self.tag;
        let command = match Command::decode(words) {
            Ok(command) if is_whole(self.unit.config(), &command, words) => command,
            _ => {
                return refuse(
                    Errno::EIO,
                    format!(
                        "the command {words:x?} is not allowed for user \
                                                    space"
                    ),
                )
            }
        };
        Ok(match command {
            // Everything cached for the user has its VMID.
            Command::TlbiNsnhAll | Command::TlbiNhAll { .. } => Invalidation::All { tag },
            Command::TlbiNhAsid { asid, .. } => Invalidation::Asid { tag, asid },
            Command::TlbiNhVa { asid, range, .. } => Invalidation::Va { tag, asid, range },
            Command::TlbiNhVaa { range, .. } => Invalidation::Vaa { tag, range },
            Command::CfgiCd { stream, substream, .. } => {
                Invalidation::Context { sid: self.streams.sid(stream)?, substream: substream.raw() }
            }
            Command::CfgiCdAll { stream } => {
                Invalidation::Contexts { sid: self.streams.sid(stream)? }
            }
            Command::AtcInv { stream, substream, global, address, size } => {
                Invalidation::DeviceTlb {
                    sid: self.streams.sid(stream)?,
                    // A request without PASID concerns entries with one, too.
                    substream: substream.filter(|_| !global).map(Pasid::raw),
                    range: atc_range(address, size),
                }
            }
            _ => {
                return refuse(
                    Errno::EIO,
                    format!("{} is not allowed for user space", command.name()),
                )
            }
        })
    }
}

impl ViommuDriver for Vsmmu {
    fn alloc_nested(
        &self,
        flags: HwptFlags,
        data: &dyn UserData,
    ) -> Outcome<Arc<dyn NestedDomain>> {
        if flags != HwptFlags::new() {
            return refuse(Errno::EOPNOTSUPP, format!("flags {:#x}", flags.into_bits()));
        }
        let ste = words(data.read_struct(ARM_SMMUV3, COMMAND_SIZE)?);
        Ok(Arc::new(SmmuNested::new(ste, &self.streams)?))
    }

    /// Linux converts commands one by one and issues them in blocks. When it refuses one, those
    /// before it in its block count as done, but are never issued.
    fn invalidate(&self, entries: &dyn UserArray) -> Result<(), Partial> {
        let Scratch { commands, converted, entry } = &mut *self.scratch.lock();
        read_all(entries, entry, commands)?;
        for (number, block) in commands.chunks(BLOCK).enumerate() {
            converted.clear();
            for command in block {
                match self.convert(*command) {
                    Ok(invalidation) => converted.push(invalidation),
                    Err(refusal) => {
                        return Err(Partial { done: number * BLOCK + converted.len(), refusal });
                    }
                }
            }
            if !self.unit.invalidate(converted) {
                let done = number * BLOCK + converted.len().saturating_sub(1);
                let refused = refuse(Errno::ETIMEDOUT, "a device did not answer CMD_ATC_INV");
                return refused.map_err(|refusal| Partial { done, refusal });
            }
        }
        Ok(())
    }

    fn vdevice_init(&self, device: &Requester, virt_id: u64) -> Outcome<()> {
        self.streams.insert(virt_id, device.rid.raw());
        Ok(())
    }

    fn vdevice_destroy(&self, virt_id: u64) {
        self.streams.remove(virt_id);
    }
}

/// Whether `words`, which `command` was decoded from, are valid for an SMMU like `config`: without
/// undefined bits, unsupported fields or reserved values.
fn is_whole(config: &SmmuV3UnitConfig, command: &Command, words: [u64; 2]) -> bool {
    let substreams = config.ssid_bits() > 0;
    let has = match *command {
        Command::TlbiNhVa { range, .. } | Command::TlbiNhVaa { range, .. } => {
            (config.range_invalidation || !range.needs_ril()) && !range.is_reserved()
        }
        Command::CfgiCd { substream, .. } => substreams || substream.raw() == 0,
        Command::AtcInv { size, substream, global, .. } => {
            let named = substream.is_some() || global;
            config.ats
                && size <= ATC_SIZE_ALL
                && (substreams || !named && command.encode() == words)
        }
        _ => true,
    };
    has && command.is_all_of(words)
}

/// The addresses of a CMD_ATC_INV (§4.5.1).
fn atc_range(address: u64, size: u8) -> IovaRange {
    match 1u64.checked_shl(u32::from(size) + 12) {
        Some(bytes) => {
            let first = address & !(bytes - 1);
            IovaRange { first, last: first | (bytes - 1) }
        }
        None => IovaRange::ALL,
    }
}

/// All commands of an array, which is read before anything is done.
///
/// # Errors
/// `EINVAL` another type, or none; `E2BIG` the excess bytes of a command are not zero; `EFAULT`.
fn read_all(
    entries: &dyn UserArray,
    entry: &mut Vec<u8>,
    commands: &mut Vec<[u64; 2]>,
) -> Outcome<()> {
    let (count, length) = (entries.count(), entries.entry_length());
    if entries.data_type() != ARM_SMMUV3_INVALIDATE || count == 0 {
        let detail = format!("{count} invalidations of type {:#x}", entries.data_type());
        return refuse(Errno::EINVAL, detail);
    }
    commands.clear();
    entry.clear();
    // Whatever the last call took.
    commands.shrink_to(KEPT);
    entry.shrink_to(KEPT);
    entry.resize(length.max(COMMAND_SIZE), 0);
    for index in 0..count {
        // Neither factor has more than 32 bits. At least the entry's length.
        entries.read(index as u64 * length as u64, entry.get_mut(..length).unwrap_or_default())?;
        let Some((command, rest)) = entry.split_first_chunk() else { continue };
        if rest.iter().any(|byte| *byte != 0) {
            return refuse(Errno::E2BIG, format!("entry {index} is longer than a command"));
        }
        commands.push(words(*command));
    }
    Ok(())
}

/// Two little-endian words.
fn words(bytes: [u8; COMMAND_SIZE]) -> [u64; 2] {
    let value = u128::from_le_bytes(bytes);
    [value as u64, (value >> 64) as u64]
}

/// The user's stream table entry, for streams of a vIOMMU.
#[derive(Debug)]
pub(super) struct SmmuNested {
    /// Words 0 and 1, without EATS.
    ste: [u64; 2],
    /// See [`has_ats`].
    ats: bool,
    /// The streams of the vIOMMU.
    streams: Arc<Streams>,
}

impl SmmuNested {
    /// The entry `ste` for streams of a vIOMMU.
    ///
    /// # Errors
    /// `EIO` it has fields that the user must not set, or a configuration that cannot be nested
    /// (`arm_smmu_validate_vste`).
    fn new(ste: [u64; 2], streams: &Arc<Streams>) -> Outcome<Self> {
        Ok(Self { ste: validate(ste)?, ats: has_ats(ste), streams: streams.clone() })
    }

    fn config(&self) -> StreamConfig {
        StreamConfig::from_bits(Ste0::from_bits(self.ste[0]).config())
    }

    /// The destination of events of `device` while it is attached here.
    ///
    /// # Errors
    /// `ENOENT` it has no vDEVICE, but would be translated.
    pub fn vmaster(&self, device: &Requester) -> Outcome<Option<Vmaster>> {
        match (self.streams.vmaster(device), self.config()) {
            (Some(vmaster), _) => Ok(Some(vmaster)),
            (None, StreamConfig::Abort | StreamConfig::Bypass) => Ok(None),
            (None, _) => refuse(Errno::ENOENT, "the device has no vDEVICE on the vIOMMU"),
        }
    }

    /// The user's part of the stream table entry: none to abort; otherwise nothing, or the words of
    /// stage 1.
    pub fn stream_stage1(&self) -> Option<Option<[u64; 2]>> {
        match self.config() {
            StreamConfig::Stage1 => Some(Some(self.ste)),
            StreamConfig::Bypass => Some(None),
            _ => None,
        }
    }

    /// Whether its devices may have translations of their own.
    pub fn ats(&self) -> bool {
        self.ats
    }
}

impl NestedDomain for SmmuNested {
    fn invalidate(&self, _: &dyn UserArray) -> Result<(), Partial> {
        refuse(Errno::EOPNOTSUPP, "invalidations are for the vIOMMU").map_err(Partial::from)
    }

    fn describe(&self) -> String {
        match self.config() {
            StreamConfig::Stage1 => {
                let table = Ste0::from_bits(self.ste[0]).s1contextptr() << 6;
                format!("ARM_SMMUV3 stage 1, context descriptors at {table:#x}")
            }
            StreamConfig::Bypass => "ARM_SMMUV3 bypass".into(),
            _ => "ARM_SMMUV3 abort".into(),
        }
    }
}

/// Linux's version of the user's words: 0 for an entry that is not valid.
fn validate([low, high]: [u64; 2]) -> Outcome<[u64; 2]> {
    let (word0, word1) = (Ste0::from_bits(low), Ste1::from_bits(high));
    if !word0.v() {
        return Ok([0, 0]);
    }
    let ste = Ste { qw0: word0, qw1: word1, ..Ste::default() };
    let nests = matches!(word0.config(), 0 | 4 | 5);
    let ats = matches!(ste.ats(), EnableAts::Off | EnableAts::Full);
    if low & !allowed0() != 0 || high & !allowed1() != 0 || !nests || !ats {
        return refuse(Errno::EIO, format!("the stream table entry is {low:#x}, {high:#x}"));
    }
    Ok([low, word1.with_eats(0).into_bits()])
}

/// Whether devices may keep translations by the user's valid words: by stage 1 with EATS. Linux
/// disables ATS of all other devices, as the user would not invalidate what they have.
fn has_ats([low, high]: [u64; 2]) -> bool {
    let word0 = Ste0::from_bits(low);
    let stage1 = word0.v() && StreamConfig::from_bits(word0.config()).stage1();
    stage1 && Ste1::from_bits(high).eats() != 0
}

/// The fields of word 0 that the user may set (`STRTAB_STE_0_NESTING_ALLOWED`).
fn allowed0() -> u64 {
    Ste0::new()
        .with_v(true)
        .with_config(7)
        .with_s1fmt(3)
        .with_s1contextptr((1 << 46) - 1)
        .with_s1cdmax(31)
        .into_bits()
}

/// The fields of word 1 that the user may set (`STRTAB_STE_1_NESTING_ALLOWED`).
fn allowed1() -> u64 {
    Ste1::new()
        .with_s1dss(3)
        .with_s1cir(3)
        .with_s1cor(3)
        .with_s1csh(3)
        .with_s1stalld(true)
        .with_eats(3)
        .into_bits()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_bits_are_those_that_linux_allows() {
        assert_eq!(allowed0(), 0xf80f_ffff_ffff_ffff);
        assert_eq!(allowed1(), 0x3800_00ff);
    }

    #[test]
    fn an_entry_that_does_not_nest_is_refused() {
        for ste in [
            [1 | 6 << 1, 0],
            [1 | 7 << 1, 0],
            [1 | 1 << 1, 0],
            [1 | 5 << 1 | 1 << 52, 0],
            [1 | 5 << 1, 1 << 8],
            [1 | 5 << 1, 2 << 28],
            [1 | 5 << 1, 3 << 28],
            [1 | 5 << 1, 1 << 44],
        ] {
            assert_eq!(validate(ste).unwrap_err().errno, Errno::EIO, "{ste:x?}");
        }
        let good = [1 | 5 << 1 | 0x1000 | 3 << 59, 0xff | 1 << 28];
        assert_eq!(validate(good).unwrap(), [good[0], 0xff]);
        assert_eq!(validate([1, 0]).unwrap(), [1, 0]);
        assert_eq!(validate([0xfff0, u64::MAX]).unwrap(), [0, 0], "not valid: nobody looks");
    }

    #[test]
    fn ats_is_of_a_stage_1_that_has_it() {
        let (stage1, eats) = (1 | 5 << 1, 1 << 28);
        assert!(has_ats([stage1, eats]));
        for ste in [[stage1, 0], [1 | 4 << 1, eats], [1, eats], [stage1 & !1, eats]] {
            assert!(!has_ats(ste), "{ste:x?}");
        }
    }
}
