// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The rules of the objects, one test each.

mod access;
mod attach;
mod contexts;
mod dirty;
mod dma;
mod events;
mod fail_allocations;
mod fail_nth;
pub(crate) mod fake;
mod groups;
mod hwpt;
mod invalidate;
mod ioas;
mod lifetime;
mod page_requests;
mod random;
pub(crate) mod viommus;
