// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The callers, in this process or another, and the transport to the process that owns the file.

pub mod calls;
pub mod process;
pub mod remote;
