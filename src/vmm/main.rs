// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The `twostage` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    twostage_vmm::cli::main()
}
