// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The `twostage` command.

use std::process::ExitCode;

use twostage_vmm::Heap;

#[global_allocator]
static HEAP: Heap = Heap;

fn main() -> ExitCode {
    twostage_vmm::cli::main()
}
