// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vIOMMU of an SMMU: the user's streams by the user's StreamIDs, and invalidation commands.

use std::sync::Arc;

use super::domains::SmmuNested;
use super::streams::Streams;
use crate::drivers::user_data::{ARM_SMMUV3, ARM_SMMUV3_INVALIDATE};
use crate::drivers::{NestedDomain, PagingDomain, Partial, UserArray, UserData, ViommuDriver};
use crate::host::device::Requester;
use crate::host::events::ViommuEvents;
use crate::host::refusal::{refuse, Outcome};
use crate::units::hardware::CacheTag;
use crate::units::smmuv3::{Invalidation, SmmuV3Unit, SmmuV3UnitConfig};
use twostage::iommufd::{Errno, HwptFlags};
use twostage::spec::smmuv3::command::{Command, ATC_SIZE_ALL};

/// Commands that Linux issues together (`CMDQ_BATCH_ENTRIES`, without the CMD_SYNC).
const BLOCK: usize = 63;

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
        Self { unit, tag, _parent: parent.clone(), streams }
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
            Command::AtcInv { stream, .. } => {
                self.streams.sid(stream)?;
                Invalidation::DeviceTlb
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
        let commands = read_all(entries)?;
        for (number, block) in commands.chunks(BLOCK).enumerate() {
            let mut converted = Vec::with_capacity(block.len());
            for command in block {
                match self.convert(*command) {
                    Ok(invalidation) => converted.push(invalidation),
                    Err(refusal) => {
                        return Err(Partial { done: number * BLOCK + converted.len(), refusal });
                    }
                }
            }
            self.unit.invalidate(&converted);
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

/// All commands of an array, which is read before anything is done.
///
/// # Errors
/// `EINVAL` another type, or none; `E2BIG` the excess bytes of a command are not zero; `EFAULT`.
fn read_all(entries: &dyn UserArray) -> Outcome<Vec<[u64; 2]>> {
    let (count, length) = (entries.count(), entries.entry_length());
    if entries.data_type() != ARM_SMMUV3_INVALIDATE || count == 0 {
        let detail = format!("{count} invalidations of type {:#x}", entries.data_type());
        return refuse(Errno::EINVAL, detail);
    }
    let mut entry = vec![0; length.max(COMMAND_SIZE)];
    let mut commands = Vec::with_capacity(count);
    for index in 0..count {
        // Neither factor has more than 32 bits. At least the entry's length.
        entries.read(index as u64 * length as u64, entry.get_mut(..length).unwrap_or_default())?;
        let Some((command, rest)) = entry.split_first_chunk() else { continue };
        if rest.iter().any(|byte| *byte != 0) {
            return refuse(Errno::E2BIG, format!("entry {index} is longer than a command"));
        }
        commands.push(words(*command));
    }
    Ok(commands)
}

/// Two little-endian words.
fn words(bytes: [u8; COMMAND_SIZE]) -> [u64; 2] {
    let value = u128::from_le_bytes(bytes);
    [value as u64, (value >> 64) as u64]
}
