// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The implementation of an IOAS: mapped, reserved and allowed IOVAs, and the pages behind them.

mod area;
mod pages;
mod placement;
mod ranges;
mod source;
mod space;

pub(crate) use area::{Area, Part, Piece, Taken, Transfer};
pub(crate) use pages::{Pages, PinAccount};
pub(crate) use ranges::range_of;
pub(crate) use source::{Payer, RlimitMode, Source};
pub(crate) use space::IovaSpace;

/// Size of a page of the host, in bytes.
pub(crate) const PAGE_SIZE: u64 = 4096;
