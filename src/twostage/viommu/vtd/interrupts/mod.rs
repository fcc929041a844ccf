// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupt remapping (§5.1).

pub(super) mod entries;
pub(super) mod remapping;
