// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The program's memory: pins, accounting and status.

pub mod accounts;
pub mod pins;
pub mod proc_status;
pub mod taken;
