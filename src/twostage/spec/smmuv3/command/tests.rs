// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Commands compared with words as drivers write them, and round trips.

use proptest::prelude::*;

use super::*;

const STREAM: StreamId = StreamId(0x1_0008);
const SID: u64 = 0x1_0008 << 32;

fn substream(value: u32) -> Option<Pasid> {
    Pasid::new(value)
}

#[test]
fn fields_stand_where_the_specification_puts_them() {
    let range =
        AddressRange { address: 0x1234_5000, leaf: true, tg: 1, ttl: 3, num: 31, scale: 18 };
    let five = substream(5);
    let message = SyncSignal::Interrupt { address: 0x808_0040, data: 7 };
    let cases: &[(Command, Words)] = &[
        (Command::PrefetchConfig { stream: STREAM, substream: None }, [SID | 0x01, 0]),
        (
            Command::PrefetchAddr {
                stream: STREAM,
                substream: five,
                address: 0x7000,
                size: 1,
                stride: 2,
            },
            [SID | 5 << 12 | 1 << 11 | 0x02, 0x7041],
        ),
        (Command::CfgiSte { stream: STREAM, leaf: true }, [SID | 0x03, 1]),
        (Command::CfgiSteRange { stream: StreamId(0), range: 31 }, [0x04, 31]),
        (
            Command::CfgiCd { stream: STREAM, substream: five.unwrap(), leaf: true },
            [SID | 5 << 12 | 0x05, 1],
        ),
        (Command::CfgiCdAll { stream: STREAM }, [SID | 0x06, 0]),
        (Command::TlbiNhAll { vmid: 2 }, [2 << 32 | 0x10, 0]),
        (Command::TlbiNhAsid { vmid: 2, asid: 3 }, [3 << 48 | 2 << 32 | 0x11, 0]),
        (
            Command::TlbiNhVa { vmid: 2, asid: 3, range },
            [3 << 48 | 2 << 32 | 18 << 20 | 31 << 12 | 0x12, 0x1234_5701],
        ),
        (Command::TlbiNhVaa { vmid: 2, range: AddressRange::at(0x5000) }, [2 << 32 | 0x13, 0x5000]),
        (Command::TlbiEl2All, [0x20, 0]),
        (Command::TlbiEl2Asid { asid: 3 }, [3 << 48 | 0x21, 0]),
        (Command::TlbiEl2Va { asid: 3, range: AddressRange::at(0) }, [3 << 48 | 0x22, 0]),
        (Command::TlbiEl2Vaa { range: AddressRange::at(0x5000) }, [0x23, 0x5000]),
        (Command::TlbiS12Vmall { vmid: 2 }, [2 << 32 | 0x28, 0]),
        (Command::TlbiS2Ipa { vmid: 2, range: AddressRange::at(0x5000) }, [2 << 32 | 0x2a, 0x5000]),
        (Command::TlbiNsnhAll, [0x30, 0]),
        (
            Command::AtcInv {
                stream: STREAM,
                substream: five,
                global: true,
                address: 0x7000,
                size: 52,
            },
            [SID | 5 << 12 | 1 << 11 | 1 << 9 | 0x40, 0x7034],
        ),
        (
            Command::PriResp { stream: STREAM, substream: five, group: 0x1ff, response: 2 },
            [SID | 5 << 12 | 1 << 11 | 0x41, 2 << 12 | 0x1ff],
        ),
        (
            Command::Resume { stream: STREAM, stag: 0x1234, response: 1 },
            [SID | 1 << 12 | 0x44, 0x1234],
        ),
        (Command::StallTerm { stream: STREAM }, [SID | 0x45, 0]),
        (Command::Sync { signal: SyncSignal::None }, [0x46, 0]),
        (Command::Sync { signal: message }, [7 << 32 | 1 << 12 | 0x46, 0x808_0040]),
        (Command::Sync { signal: SyncSignal::Event }, [2 << 12 | 0x46, 0]),
    ];
    for (command, words) in cases {
        assert_eq!(command.encode(), *words, "{}", command.name());
        assert_eq!(Command::decode(*words), Ok(*command), "{}", command.name());
        assert_eq!(u64::from(command.opcode()), words[0] & 0xff);
    }
}

#[test]
fn memory_attributes_and_reserved_fields_do_not_count() {
    // As Linux writes it: MSH, MSIAttr, SIG_SEV.
    let linux = [0x46 | 2 << 12 | 3 << 22 | 0xf << 24, 0];
    assert_eq!(Command::decode(linux), Ok(Command::Sync { signal: SyncSignal::Event }));
    assert_eq!(Command::decode([0x30 | 1 << 63, !0]), Ok(Command::TlbiNsnhAll));
}

#[test]
fn the_command_for_all_streams_has_a_name_of_its_own() {
    let of = |range| Command::CfgiSteRange { stream: STREAM, range }.name();
    assert_eq!((of(31), of(30)), ("CMD_CFGI_ALL", "CMD_CFGI_STE_RANGE"));
}

#[test]
fn what_no_smmu_takes() {
    for opcode in [0, 0x07, 0x0f, 0x14, 0x18, 0x31, 0x42, 0x47, 0xff] {
        assert_eq!(Command::decode([opcode.into(), 0]), Err(DecodeError::Opcode(opcode)));
    }
    for opcode in [0x01, 0x03, 0x06, 0x40, 0x44] {
        let secure = [u64::from(opcode) | 1 << 10, 0];
        assert_eq!(Command::decode(secure), Err(DecodeError::Secure(opcode)));
    }
    assert_eq!(Command::decode([0x46 | 3 << 12, 0]), Err(DecodeError::Signal));
}

proptest! {
    #[test]
    fn what_is_decoded_is_encoded_as_the_same(opcode in 0..0x50u64, low: u64, high: u64) {
        if let Ok(command) = Command::decode([low & !0xff | opcode, high]) {
            prop_assert_eq!(Command::decode(command.encode()), Ok(command));
            prop_assert_eq!(u64::from(command.opcode()), opcode);
            // No bit is set that the guest did not set.
            let [canonical_low, canonical_high] = command.encode();
            prop_assert_eq!(canonical_low & !(low & !0xff | opcode), 0);
            prop_assert_eq!(canonical_high & !high, 0);
        }
    }
}
