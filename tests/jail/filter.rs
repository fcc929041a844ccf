// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Filters made of the tables.

use std::collections::BTreeMap;
use std::env;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule,
};
use twostage::jail::{ThreadKind, IOCTL};

/// The filter for a kind: see the example of `twostage::jail`. `own` are the VMM's own calls there;
/// `otherwise` is what happens to all others.
pub fn filter(
    kind: &ThreadKind,
    own: &[libc::c_long],
    otherwise: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let listed = kind.numbers().map(i64::from).chain(own.iter().copied());
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        listed.map(|number| (number, Vec::new())).collect();
    let second_is = |request: u32| {
        SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, request.into())
            .and_then(|condition| SeccompRule::new(vec![condition]))
    };
    if let (Some(number), [_, ..]) = (IOCTL.number(), kind.ioctls) {
        let ioctls = kind.ioctls.iter().map(|ioctl| second_is(ioctl.request));
        rules.insert(number.into(), ioctls.collect::<Result<_, _>>()?);
    }
    let arch = env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, otherwise, SeccompAction::Allow, arch)?.try_into()
}
