// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Event records (§7.3): why a transaction was terminated or stalled.
//!
//! All records have the same words; [`EventId`] says which fields an event defines. The others are
//! zero.

use twostage_bits::bitfield;

use super::{StreamId, SubstreamId};

/// Size of an event record, in bytes.
pub const EVENT_SIZE: u64 = 32;
/// 64-bit words of an event record.
pub const EVENT_WORDS: usize = 4;

/// The contents of bits 255:192 of an event record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SecondAddress {
    /// Nothing.
    None,
    /// FetchAddr: the physical address that could not be read.
    Fetch,
    /// IPA: the address after stage 1, if S2 is set.
    Ipa,
}

macro_rules! event_ids {
    ($(
        $(#[$doc:meta])* $variant:ident = $code:literal, $name:literal,
        substream $substream:literal, input $input:literal, $second:ident, stall $stall:literal;
    )*) => {
        /// The number of an event (§7.3.2 to §7.3.20).
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
        pub enum EventId {
            $($(#[$doc])* #[doc(alias = $name)] $variant,)*
        }

        impl EventId {
            /// Every event, by ascending number.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The eight bits of the number.
            pub const fn code(self) -> u8 {
                match self {
                    $(Self::$variant => $code,)*
                }
            }

            /// The event with the number `code`; `None` when it is reserved or IMPLEMENTATION
            /// DEFINED.
            pub const fn from_code(code: u8) -> Option<Self> {
                match code {
                    $($code => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// The specification's name, such as `"F_TRANSLATION"`.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            /// Whether the record has the substream, if any.
            pub const fn has_substream(self) -> bool {
                match self {
                    $(Self::$variant => $substream,)*
                }
            }

            /// Whether the record has the transaction's address and access (InputAddr, RnW, InD,
            /// PnU).
            pub const fn has_input(self) -> bool {
                match self {
                    $(Self::$variant => $input,)*
                }
            }

            /// What the record's second address is.
            pub const fn second_address(self) -> SecondAddress {
                match self {
                    $(Self::$variant => SecondAddress::$second,)*
                }
            }

            /// Whether the transaction may be stalled (Stall and STAG).
            pub const fn may_stall(self) -> bool {
                match self {
                    $(Self::$variant => $stall,)*
                }
            }
        }
    };
}

event_ids! {
    /// The kind of transaction is not supported.
    UnsupportedTransaction = 0x01, "F_UUT", substream true, input true, None, stall false;
    /// The StreamID is beyond the stream table, or it has no level 2 table.
    BadStreamId = 0x02, "C_BAD_STREAMID", substream true, input false, None, stall false;
    /// The stream table entry, or a descriptor on the way to it, could not be read.
    SteFetch = 0x03, "F_STE_FETCH", substream true, input false, Fetch, stall false;
    /// The stream table entry is not valid or contradicts itself.
    BadSte = 0x04, "C_BAD_STE", substream true, input false, None, stall false;
    /// An ATS translation request of a stream without ATS.
    BadAtsRequest = 0x05, "F_BAD_ATS_TREQ", substream true, input true, None, stall false;
    /// A transaction without SubstreamID, or with SubstreamID 0, that STE.S1DSS refuses.
    StreamDisabled = 0x06, "F_STREAM_DISABLED", substream false, input false, None, stall false;
    /// A translated transaction of a stream without ATS.
    TranslatedForbidden = 0x07, "F_TRANSL_FORBIDDEN",
        substream false, input true, None, stall false;
    /// The SubstreamID is beyond the context descriptor table, or it has no level 2 table.
    BadSubstreamId = 0x08, "C_BAD_SUBSTREAMID", substream true, input false, None, stall false;
    /// The context descriptor could not be read.
    CdFetch = 0x09, "F_CD_FETCH", substream true, input false, Fetch, stall false;
    /// The context descriptor is not valid or contradicts itself.
    BadCd = 0x0a, "C_BAD_CD", substream true, input false, None, stall false;
    /// A translation table descriptor could not be read or updated.
    WalkExternalAbort = 0x0b, "F_WALK_EABT", substream true, input true, Fetch, stall false;
    /// Nothing is mapped at the address.
    Translation = 0x10, "F_TRANSLATION", substream true, input true, Ipa, stall true;
    /// A descriptor exceeds the output address size.
    AddressSize = 0x11, "F_ADDR_SIZE", substream true, input true, Ipa, stall true;
    /// The access flag is clear, and hardware does not set it.
    Access = 0x12, "F_ACCESS", substream true, input true, Ipa, stall true;
    /// The tables do not allow the access.
    Permission = 0x13, "F_PERMISSION", substream true, input true, Ipa, stall true;
    /// TLB entries overlap.
    TlbConflict = 0x20, "F_TLB_CONFLICT", substream true, input true, Ipa, stall false;
    /// Cached stream table entries overlap.
    ConfigConflict = 0x21, "F_CFG_CONFLICT", substream true, input false, None, stall false;
    /// A hint of a device that it will need pages; its access is a [`PageRequest1`].
    PageRequest = 0x24, "E_PAGE_REQUEST", substream true, input false, None, stall false;
    /// The virtual machine structure could not be read.
    VmsFetch = 0x25, "F_VMS_FETCH", substream true, input false, Fetch, stall false;
}

/// What the SMMU did for the transaction when it faulted (CLASS).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventClass {
    /// 0b00: it read a context descriptor.
    Cd,
    /// 0b01: it read or updated a stage 1 descriptor.
    TranslationTable,
    /// 0b10: it translated the transaction's address.
    Input,
}

impl EventClass {
    /// Decodes `bits`; `None` for the reserved 0b11.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            0 => Some(Self::Cd),
            1 => Some(Self::TranslationTable),
            2 => Some(Self::Input),
            _ => None,
        }
    }

    /// The two bits of the class.
    pub const fn into_bits(self) -> u8 {
        match self {
            Self::Cd => 0,
            Self::TranslationTable => 1,
            Self::Input => 2,
        }
    }
}

/// Bits 63:0 of an event record: the event and the transaction's source.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Event0 {
    /// The event's number; see [`EventId::from_code`].
    pub id: u8,
    #[bits(3)]
    __: u8,
    /// SSV: SubstreamID is valid. C_BAD_SUBSTREAMID has no such bit: its SubstreamID is always
    /// valid.
    pub ssv: bool,
    /// SubstreamID.
    #[bits(20)]
    pub substream_id: u32,
    /// StreamID.
    pub stream_id: u32,
}

/// Bits 127:64 of an event record: the access.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Event1 {
    /// STAG, the token of a stalled transaction; in events that cannot stall Reason, IMPLEMENTATION
    /// DEFINED.
    pub stag: u16,
    #[bits(15)]
    __: u16,
    /// Stall: the transaction waits for CMD_RESUME.
    pub stall: bool,
    __: bool,
    /// PnU: privileged.
    pub pnu: bool,
    /// InD: instruction fetch.
    pub ind: bool,
    /// RnW: read.
    pub rnw: bool,
    #[bits(2)]
    __: u8,
    /// NSIPA: the IPA is Non-secure, of Secure streams.
    pub nsipa: bool,
    /// S2: stage 2 faulted.
    pub s2: bool,
    /// CLASS, as bits; see [`EventClass`].
    #[bits(2)]
    pub class: u8,
    #[bits(2)]
    __: u8,
    /// TTRnW: F_PERMISSION of class TT: the descriptor was read, not updated.
    pub ttrnw: bool,
    #[bits(19)]
    __: u32,
}

/// Bits 127:64 of an E_PAGE_REQUEST (§7.3.19): the expected access.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct PageRequest1 {
    #[bits(33)]
    __: u64,
    /// uX: unprivileged execution.
    pub ux: bool,
    /// uW: unprivileged writes.
    pub uw: bool,
    /// uR: unprivileged reads.
    pub ur: bool,
    __: bool,
    /// pX: privileged execution.
    pub px: bool,
    /// pW: privileged writes.
    pub pw: bool,
    /// pR: privileged reads.
    pub pr: bool,
    #[bits(4)]
    __: u8,
    /// Span: bytes, in units of 4 KiB.
    pub span: u8,
    #[bits(12)]
    __: u16,
}

/// An event record (§7.3): 256 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EventRecord {
    /// Bits 63:0: event, stream, substream.
    pub qw0: Event0,
    /// Bits 127:64: access; [`PageRequest1`] in an E_PAGE_REQUEST.
    pub qw1: Event1,
    /// Bits 191:128: InputAddr, the address of the transaction, in bytes.
    pub input_address: u64,
    /// Bits 255:192: FetchAddr or IPA, in bytes; see [`EventId::second_address`].
    pub second_address: u64,
}

impl EventRecord {
    /// The bits of FetchAddr in [`EventRecord::second_address`].
    pub const FETCH_ADDRESS: u64 = 0x000f_ffff_ffff_fff8;
    /// The bits of IPA in [`EventRecord::second_address`].
    pub const IPA: u64 = 0x000f_ffff_ffff_f000;

    /// A record of an event of `stream`, and `substream` if the event has that.
    pub fn new(id: EventId, stream: StreamId, substream: Option<SubstreamId>) -> Self {
        let qw0 = Event0::new().with_id(id.code()).with_stream_id(stream.raw());
        let qw0 = match substream {
            Some(substream) if id.has_substream() => qw0
                .with_ssv(!matches!(id, EventId::BadSubstreamId))
                .with_substream_id(substream.raw()),
            _ => qw0,
        };
        Self { qw0, ..Self::default() }
    }

    /// Decodes `words`.
    pub const fn from_words(words: [u64; EVENT_WORDS]) -> Self {
        let [qw0, qw1, input_address, second_address] = words;
        Self {
            qw0: Event0::from_bits(qw0),
            qw1: Event1::from_bits(qw1),
            input_address,
            second_address,
        }
    }

    /// The words of the record.
    pub const fn to_words(self) -> [u64; EVENT_WORDS] {
        [self.qw0.into_bits(), self.qw1.into_bits(), self.input_address, self.second_address]
    }

    /// The event; `None` when its number is reserved or IMPLEMENTATION DEFINED.
    pub const fn id(&self) -> Option<EventId> {
        EventId::from_code(self.qw0.id())
    }

    /// The stream.
    pub const fn stream(&self) -> StreamId {
        StreamId(self.qw0.stream_id())
    }

    /// The substream, if the record has one.
    pub const fn substream(&self) -> Option<SubstreamId> {
        if self.qw0.ssv() || matches!(self.id(), Some(EventId::BadSubstreamId)) {
            return SubstreamId::new(self.qw0.substream_id());
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        for (bits, first, last) in [
            (Event0::new().with_id(0xff).into_bits(), 0, 7),
            (Event0::new().with_ssv(true).into_bits(), 11, 11),
            (Event0::new().with_substream_id(0xf_ffff).into_bits(), 12, 31),
            (Event0::new().with_stream_id(u32::MAX).into_bits(), 32, 63),
        ] {
            assert_eq!(bits, mask(first, last));
        }
        for (bits, first, last) in [
            (Event1::new().with_stag(u16::MAX).into_bits(), 64, 79),
            (Event1::new().with_stall(true).into_bits(), 95, 95),
            (Event1::new().with_pnu(true).into_bits(), 97, 97),
            (Event1::new().with_ind(true).into_bits(), 98, 98),
            (Event1::new().with_rnw(true).into_bits(), 99, 99),
            (Event1::new().with_nsipa(true).into_bits(), 102, 102),
            (Event1::new().with_s2(true).into_bits(), 103, 103),
            (Event1::new().with_class(3).into_bits(), 104, 105),
            (Event1::new().with_ttrnw(true).into_bits(), 108, 108),
            (PageRequest1::new().with_ux(true).into_bits(), 97, 97),
            (PageRequest1::new().with_uw(true).into_bits(), 98, 98),
            (PageRequest1::new().with_ur(true).into_bits(), 99, 99),
            (PageRequest1::new().with_px(true).into_bits(), 101, 101),
            (PageRequest1::new().with_pw(true).into_bits(), 102, 102),
            (PageRequest1::new().with_pr(true).into_bits(), 103, 103),
            (PageRequest1::new().with_span(0xff).into_bits(), 108, 115),
        ] {
            assert_eq!(bits, mask(first - 64, last - 64));
        }
    }

    fn mask(first: u32, last: u32) -> u64 {
        u64::MAX >> (63 - last) & u64::MAX << first
    }

    #[test]
    fn a_record_as_a_linux_driver_reads_it() {
        let record = EventRecord::from_words([
            0x0000_0008_0000_5810,
            0x0000_0208_0000_0000,
            0x1234_5678_9000,
            0x4000_1000,
        ]);
        assert_eq!(record.id(), Some(EventId::Translation));
        assert_eq!(record.stream(), StreamId(8));
        assert_eq!(record.substream(), SubstreamId::new(5));
        assert!(record.qw1.rnw() && !record.qw1.s2() && !record.qw1.stall());
        assert_eq!(EventClass::from_bits(record.qw1.class()), Some(EventClass::Input));
    }

    #[test]
    fn words_round_trip() {
        assert_eq!(EventRecord::from_words([1, 2, 3, 4]).to_words(), [1, 2, 3, 4]);
    }

    #[test]
    fn a_new_record_says_only_what_its_event_defines() {
        let substream = SubstreamId::new(3);
        let stream = StreamId(0x10);
        for &id in EventId::ALL {
            assert_eq!(EventId::from_code(id.code()), Some(id));
            let record = EventRecord::new(id, stream, substream);
            assert_eq!((record.id(), record.stream()), (Some(id), stream));
            assert_eq!(record.substream(), substream.filter(|_| id.has_substream()), "{id:?}");
            assert!(!EventRecord::new(id, stream, None).qw0.ssv());
        }
        let bad = EventRecord::new(EventId::BadSubstreamId, stream, substream);
        assert!(!bad.qw0.ssv());
        assert_eq!(EventId::from_code(0xe0), None);
    }

    #[test]
    fn numbers_ascend() {
        assert!(EventId::ALL.windows(2).all(|pair| pair[0].code() < pair[1].code()));
    }

    #[test]
    fn classes_round_trip() {
        for bits in 0..3 {
            assert_eq!(EventClass::from_bits(bits).map(EventClass::into_bits), Some(bits));
        }
        assert_eq!(EventClass::from_bits(3), None);
    }
}
