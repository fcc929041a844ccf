// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The hardware half: IOMMUs that walk stage 1 through stage 2, with the caches that hardware may
//! have.

pub(crate) mod engine;
pub(crate) mod gate;
pub(crate) mod hardware;
pub(crate) mod page_requests;
pub(crate) mod smmuv3;
pub(crate) mod stage2;
pub(crate) mod vtd;
