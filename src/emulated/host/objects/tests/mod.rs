// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The rules of the objects, one test each.

mod access;
mod attach;
mod dirty;
mod dma;
mod events;
mod failures;
pub(crate) mod fake;
mod hwpt;
mod ioas;
mod lifetime;
mod page_requests;
mod random;
pub(crate) mod viommus;
