// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the guest's tables say of a requester, read without any cache: from the root table to the
//! entry of a PASID. Its tables are walked in [`walk`](super::walk).

use twostage::spec::vtd::fault::FaultReason as R;

use crate::models::memory::Moment;
use crate::models::oracle::Oracle;

/// Bits of an address.
pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Bits of a pointer above any address.
const BEYOND: u64 = 0xfff0_0000_0000_0000;

/// What the unit offers, as its capability registers say.
#[derive(Debug, Clone, Copy)]
pub struct Offers {
    pub cap: u64,
    pub ecap: u64,
}

impl Offers {
    fn ecap(self, bit: u32) -> bool {
        self.ecap >> bit & 1 != 0
    }

    /// CM.
    pub fn caching_mode(self) -> bool {
        self.cap >> 7 & 1 != 0
    }

    /// SAGAW: whether second-stage tables may have this AW.
    fn width(self, aw: u64) -> bool {
        (1..=3).contains(&aw) && self.cap >> (8 + aw) & 1 != 0
    }

    fn widest(self) -> Option<u64> {
        (1..=3).rfind(|aw| self.width(*aw))
    }
}

/// A stage of tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stage {
    pub top: u64,
    pub levels: u32,
    pub second: bool,
    /// SRE and WPE.
    pub supervisor: bool,
    pub write_protect: bool,
}

/// The way of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Blocked(R),
    Bypass,
    One(Stage),
    Nested { first: Stage, second: Stage },
}

/// What tables say of a requester.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    pub way: Way,
    pub domain: u16,
    pub pasid: u32,
    /// FPD of an entry on the way.
    pub quiet: bool,
}

impl Decision {
    fn blocked(reason: R, quiet: bool) -> Self {
        Self { way: Way::Blocked(reason), domain: 0, pasid: 0, quiet }
    }

    pub fn is_blocked(&self) -> bool {
        matches!(self.way, Way::Blocked(_))
    }
}

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Who {
    pub rid: u16,
    pub pasid: Option<u32>,
}

/// Since when words of entries count.
#[derive(Debug, Clone, Copy)]
pub struct EntriesSince {
    /// Of root and context tables.
    pub contexts: Moment,
    /// Of PASID directories and tables.
    pub pasids: Moment,
}

/// What the tables at `root` (as in RTADDR) say of `who`; words may be what they were after
/// `since`.
pub fn decide(
    words: &mut Oracle<'_>,
    offers: Offers,
    root: Option<u64>,
    who: Who,
    since: EntriesSince,
) -> Decision {
    decided(words, offers, root, who, since)
        .unwrap_or_else(|(reason, quiet)| Decision::blocked(reason, quiet))
}

fn decided(
    words: &mut Oracle<'_>,
    offers: Offers,
    root: Option<u64>,
    who: Who,
    since: EntriesSince,
) -> Result<Decision, (R, bool)> {
    let mut load = |gpa: u64| words.load(gpa, |_, until| until > since.contexts);
    let invalid = (R::RootTableAddressInvalid, false);
    let root = root.filter(|root| root & BEYOND == 0).ok_or(invalid)?;
    let (bus, devfn) = (u64::from(who.rid >> 8), u64::from(who.rid & 0xff));
    let table = root & ADDRESS;
    let scalable = match root >> 10 & 3 {
        0 => false,
        1 if offers.ecap(43) => true,
        _ => return Err(invalid),
    };
    if !scalable {
        if who.pasid.is_some() {
            return Err((R::PasidInLegacyMode, false));
        }
        let at = table + bus * 16;
        let access = (R::LegacyRootAccess, false);
        let (half, other) = (load(at).ok_or(access)?, load(at + 8).ok_or(access)?);
        if half & 1 == 0 {
            return Err((R::LegacyRootNotPresent, false));
        }
        if half & (0xffe | BEYOND) != 0 || other != 0 {
            return Err((R::LegacyRootReserved, false));
        }
        let at = (half & ADDRESS) + devfn * 16;
        let access = (R::LegacyContextAccess, false);
        let (low, high) = (load(at).ok_or(access)?, load(at + 8).ok_or(access)?);
        let quiet = low & 2 != 0;
        if low & 1 == 0 {
            return Err((R::LegacyContextNotPresent, quiet));
        }
        if low & (0xff0 | BEYOND) != 0 || high & 0xffff_ffff_ff00_0080 != 0 {
            return Err((R::LegacyContextReserved, quiet));
        }
        let invalid = (R::LegacyContextInvalid, quiet);
        let aw = high & 7;
        if !offers.width(aw) {
            return Err(invalid);
        }
        let stage = second_stage(low & ADDRESS, aw);
        let way = match low >> 2 & 3 {
            // DT
            1 if !offers.ecap(2) => return Err(invalid),
            0 | 1 if load(stage.top).is_none() => return Err(invalid),
            0 | 1 => Way::One(stage),
            2 if Some(aw) == offers.widest() => Way::Bypass,
            _ => return Err(invalid),
        };
        return Ok(Decision { way, domain: (high >> 8) as u16, pasid: 0, quiet });
    }
    let at = table + bus * 16;
    let access = (R::RootAccess, false);
    let halves = [load(at).ok_or(access)?, load(at + 8).ok_or(access)?];
    let half = halves[usize::from(devfn >= 128)];
    if half & 1 == 0 {
        return Err((R::RootNotPresent, false));
    }
    if half & (0xffe | BEYOND) != 0 {
        return Err((R::RootReserved, false));
    }
    let at = (half & ADDRESS) + devfn % 128 * 32;
    let mut context = [0; 4];
    for (word, of) in context.iter_mut().zip(0..) {
        *word = load(at + of * 8).ok_or((R::ContextAccess, false))?;
    }
    let [low, high, third, fourth] = context;
    let quiet = low & 2 != 0;
    if low & 1 == 0 {
        return Err((R::ContextNotPresent, quiet));
    }
    // DTE needs DT, PASIDE needs PASID, PRE needs PRS, RID_PRIV needs RPRIVS.
    let not_offered = low & 4 != 0 && !offers.ecap(2)
        || low & 8 != 0 && !offers.ecap(40)
        || low & 16 != 0 && !offers.ecap(29)
        || high & 1 << 20 != 0;
    if low & (0x1e0 | BEYOND) != 0
        || high & 0xffff_ffff_ffe0_0000 != 0
        || third | fourth != 0
        || not_offered
    {
        return Err((R::ContextReserved, quiet));
    }
    let reach = 1 << ((low >> 9 & 7) + 13);
    // PSS
    let offered = if offers.ecap(40) { 1 << ((offers.ecap >> 35 & 31) + 1) } else { 1 };
    let pasid = match who.pasid {
        Some(_) if low & 8 == 0 => return Err((R::PasidDisabled, quiet)),
        Some(pasid) if pasid >= reach || pasid >= offered => {
            return Err((R::PasidBeyondDirectory, quiet));
        }
        Some(pasid) => pasid,
        None => (high & 0xf_ffff) as u32,
    };
    if pasid >= reach {
        return Err((R::RidPasidBeyondDirectory, quiet));
    }
    let mut load = |gpa: u64| words.load(gpa, |_, until| until > since.pasids);
    let at = (low & ADDRESS) + u64::from(pasid / 64) * 8;
    let directory = load(at).ok_or((R::PasidDirectoryAccess, false))?;
    let quiet = quiet || directory & 2 != 0;
    if directory & 1 == 0 {
        return Err((R::PasidDirectoryNotPresent, quiet));
    }
    if directory & (0xffc | BEYOND) != 0 {
        return Err((R::PasidDirectoryReserved, quiet));
    }
    let at = (directory & ADDRESS) + u64::from(pasid % 64) * 64;
    let mut entry = [0; 8];
    entry[0] = load(at).ok_or((R::PasidTableAccess, false))?;
    if entry[0] & 1 != 0 {
        for (word, of) in entry.iter_mut().zip(0..).skip(1) {
            *word = load(at + of * 8).ok_or((R::PasidTableAccess, false))?;
        }
    }
    crate::models::trace(|| format!("    entry at {at:x}: {entry:x?}"));
    let quiet = quiet || entry[0] & 2 != 0;
    if entry[0] & 1 == 0 {
        return Err((R::PasidEntryNotPresent, quiet));
    }
    pasid_entry(&entry, offers)
        .map(|way| Decision { way, domain: entry[1] as u16, pasid, quiet })
        .map_err(|reason| (reason, quiet))
}

fn second_stage(top: u64, aw: u64) -> Stage {
    let levels = aw as u32 + 2;
    Stage { top, levels, second: true, supervisor: false, write_protect: false }
}

/// The way of a present entry of a PASID table (§9.6).
fn pasid_entry(entry: &[u64; 8], offers: Offers) -> Result<Way, R> {
    let [w0, w1, w2, ..] = *entry;
    let pgtt = w0 >> 6 & 7;
    let (first, second) = (matches!(pgtt, 1 | 3), matches!(pgtt, 2 | 3));
    let reserved = w0 & 0xc00 != 0
        || w1 & 0x7f_0000 != 0
        || w2 & 0xf00 != 0
        || entry[3..].iter().any(|word| *word != 0)
        // SSEE and ERE; SSADE needs SSADS, PGSNP SC, SRE SRS, EAFE EAFS.
        || w0 & 1 << 5 != 0
        || w2 & 2 != 0
        || w0 & 1 << 9 != 0 && !offers.ecap(45)
        || w1 & 1 << 24 != 0 && !offers.ecap(7)
        || w2 & 1 != 0 && !offers.ecap(31)
        || w2 & 1 << 7 != 0 && !offers.ecap(34)
        || first && w2 & BEYOND != 0
        || second && w0 & BEYOND != 0;
    if reserved {
        return Err(R::PasidEntryReserved);
    }
    let (aw, fspm) = (w0 >> 2 & 7, w2 >> 2 & 3);
    // FS5LP
    let level_ok = fspm == 0 || fspm == 1 && offers.cap >> 60 & 1 != 0;
    let first = Stage {
        top: w2 & ADDRESS,
        levels: 4 + fspm as u32,
        second: false,
        supervisor: w2 & 1 != 0,
        write_protect: w2 & 1 << 4 != 0,
    };
    let second = second_stage(w0 & ADDRESS, aw);
    match pgtt {
        // FSTS, SSTS, NEST, PT
        1 if offers.ecap(47) && level_ok => Ok(Way::One(first)),
        2 if offers.ecap(46) && offers.width(aw) => Ok(Way::One(second)),
        3 if offers.ecap(26) && level_ok && offers.width(aw) => Ok(Way::Nested { first, second }),
        4 if offers.ecap(6) => Ok(Way::Bypass),
        _ => Err(R::PasidEntryInvalid),
    }
}

/// Whether a fault is recorded if FPD is set (`quiet`) or not: FPD is for qualified faults, and
/// those of root tables and of entries that cannot be read are none (§7.1.3).
pub fn is_recorded(reason: R, quiet: bool) -> bool {
    let qualified = !matches!(
        reason.code(),
        0x01 | 0x08..=0x0a | 0x30..=0x33 | 0x38..=0x3a | 0x40 | 0x50 | 0x58
    );
    !(quiet && qualified)
}

/// Whether a fault is of what is above the entry of a PASID: of a root, a context or a directory,
/// or of a table that is not in memory.
pub fn is_above_pasid_entry(reason: R) -> bool {
    matches!(reason.code(), 0x30..=0x58)
}
