// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Changed snapshots without libFuzzer, as it may not be there.

use twostage_fuzz::states;

proptest::proptest! {
    /// As `make fuzz` does with more states.
    #[test]
    fn a_changed_snapshot_is_refused_or_what_the_restored_one_has(
        bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)
    ) {
        states::run(&bytes);
    }
}
