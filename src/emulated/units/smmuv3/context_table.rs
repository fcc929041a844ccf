// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Fetches a context descriptor from the user's tables, through stage 2 (§3.3.2, §5.2, §5.3).

use std::sync::atomic::Ordering;

use super::fault::Fault;
use crate::units::engine::{Caches, HostStage2, LocalCounters, Stage2Refusal};
use twostage::spec::smmuv3::context::{
    Cd, L1ContextDescriptor, CD_SIZE, CD_WORDS, L1_DESCRIPTOR_SIZE,
};
use twostage::spec::smmuv3::event::{EventClass, EventId};
use twostage::spec::smmuv3::stream_table::{DefaultSubstream, Ste};

/// The context descriptor that a transaction uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Choice {
    /// The one with this number.
    Context(u32),
    /// None: stage 1 is bypassed.
    Bypass,
}

/// The context descriptor for a transaction with `pasid` of a stream with the entry `ste`.
pub(super) fn choose(ste: &Ste, pasid: Option<u32>) -> Result<Choice, Fault> {
    let contexts = ste.qw0.s1cdmax();
    let Some(pasid) = pasid else {
        return match ste.default_substream() {
            _ if contexts == 0 => Ok(Choice::Context(0)),
            DefaultSubstream::Terminate => Err(Fault::config(EventId::StreamDisabled)),
            DefaultSubstream::Bypass => Ok(Choice::Bypass),
            DefaultSubstream::Substream0 => Ok(Choice::Context(0)),
        };
    };
    // No shift overflows: S1CDMax has 5 bits.
    if contexts == 0 || pasid >> contexts != 0 {
        return Err(Fault::config(EventId::BadSubstreamId));
    }
    if pasid == 0 && ste.default_substream() == DefaultSubstream::Substream0 {
        return Err(Fault::config(EventId::StreamDisabled));
    }
    Ok(Choice::Context(pasid))
}

/// Reads context descriptors of one stream.
#[derive(Debug)]
pub(super) struct ContextTable<'a> {
    pub caches: &'a Caches,
    pub host: &'a HostStage2,
    pub counters: &'a LocalCounters,
    /// Size of addresses in bits.
    pub address_bits: u8,
}

impl ContextTable<'_> {
    /// The context descriptor number `number` (below 2^S1CDMax) of the stream with the entry `ste`.
    pub fn fetch(&self, ste: &Ste, number: u32) -> Result<Cd, Fault> {
        let (table, number) = (ste.context_table(), u64::from(number));
        let two_level = match ste.qw0.s1cdmax() {
            0 => None,
            _ => ste.s1_format().l2_index_bits(),
        };
        let Some(index_bits) = two_level else {
            return self.read(table + number * CD_SIZE);
        };
        let at = table + (number >> index_bits) * L1_DESCRIPTOR_SIZE;
        let descriptor = L1ContextDescriptor::from_bits(self.word(at)?);
        let leaf = descriptor.l2_table();
        if !descriptor.v() || leaf >> self.address_bits != 0 {
            return Err(Fault::config(EventId::BadSubstreamId));
        }
        self.read(leaf + (number & ((1 << index_bits) - 1)) * CD_SIZE)
    }

    /// The context descriptor at `ipa`.
    fn read(&self, ipa: u64) -> Result<Cd, Fault> {
        let mut words = [0; CD_WORDS];
        for (at, word) in (ipa..).step_by(8).zip(&mut words) {
            *word = self.word(at)?;
        }
        Ok(Cd::from_words(words))
    }

    /// The 8-byte word at `ipa`.
    fn word(&self, ipa: u64) -> Result<u64, Fault> {
        let refused = |why| Fault::stage2(why, EventClass::Cd, ipa);
        let page = self.caches.stage2(self.host, ipa, self.counters).map_err(refused)?;
        if !page.read {
            return Err(refused(Stage2Refusal::Denied));
        }
        let word = self.caches.word(page.place);
        let word = word.ok_or_else(|| Fault::fetch(EventId::CdFetch, EventClass::Cd, ipa))?;
        Ok(u64::from_le(word.load(Ordering::Acquire)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use twostage::spec::smmuv3::stream_table::{Ste0, Ste1};

    fn ste(s1cdmax: u8, s1dss: DefaultSubstream) -> Ste {
        let qw0 = Ste0::new().with_v(true).with_s1cdmax(s1cdmax);
        Ste { qw0, qw1: Ste1::new().with_s1dss(s1dss.into_bits()), ..Ste::default() }
    }

    #[test]
    fn s1dss_and_s1cdmax_say_which_context() {
        use DefaultSubstream::{Bypass, Substream0, Terminate};
        let bad = |id| Err(Fault::config(id));
        let disabled = bad(EventId::StreamDisabled);
        for (contexts, default, pasid, choice) in [
            (0, Terminate, None, Ok(Choice::Context(0))),
            (0, Terminate, Some(0), bad(EventId::BadSubstreamId)),
            (4, Terminate, None, disabled),
            (4, Bypass, None, Ok(Choice::Bypass)),
            (4, Substream0, None, Ok(Choice::Context(0))),
            (4, Substream0, Some(0), disabled),
            (4, Bypass, Some(0), Ok(Choice::Context(0))),
            (4, Substream0, Some(15), Ok(Choice::Context(15))),
            (4, Substream0, Some(16), bad(EventId::BadSubstreamId)),
        ] {
            assert_eq!(choose(&ste(contexts, default), pasid), choice, "{contexts} {pasid:?}");
        }
    }
}
