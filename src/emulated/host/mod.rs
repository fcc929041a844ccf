// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The object half: iommufd's objects, with Linux's rules and errors.

pub(crate) mod access;
pub(crate) mod bitmap;
pub(crate) mod context;
pub(crate) mod device;
pub(crate) mod dma_buf;
pub(crate) mod emulated_host;
pub(crate) mod event_file;
pub(crate) mod events;
pub(crate) mod graph;
pub(crate) mod machine;
pub(crate) mod mmaps;
pub(crate) mod objects;
pub(crate) mod refusal;
pub(crate) mod user_space;
