// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests and benchmarks that need several packages; each is a separate target. Those of the command
//! and of the preload library are targets of their packages, which cargo builds for them.
