// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who makes calls, in this process or another, and how they get to the process that has the file.

pub mod caller;
pub mod calls;
pub mod process;
pub mod remote;
pub mod service;
pub mod user_space;
