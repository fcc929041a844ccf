// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The implementation of an IOAS: mapped, reserved and allowed IOVAs, and the pages behind them.

mod area;
mod coverage;
mod pages;
mod payer;
mod placement;
mod ranges;
mod source;
mod space;
mod transfer;

pub(crate) use area::{Area, Part, Piece, Taken};
pub(crate) use pages::{Pages, PinAccount};
pub(crate) use payer::{Payer, RlimitMode};
pub(crate) use ranges::range_of;
pub(crate) use source::Source;
pub(crate) use space::IovaSpace;
pub(crate) use transfer::Transfer;

/// Size of a page of the host, in bytes.
pub(crate) const PAGE_SIZE: u64 = 4096;
