// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The process around the machine: signals, named files, stop reasons and exit codes.

pub(crate) mod disposition;
pub(crate) mod event_loop;
pub mod exit_code;
pub(crate) mod named_file;
pub(crate) mod signals;
pub(crate) mod stop;
