// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// What the loader passed on.
#pragma once
#include "types.h"

// Finds the command line in a PVH or multiboot start-info structure; `magic` is EAX at entry.
void cmdline_init(u32 magic, u64 start_info);

// "PVH" or "multiboot".
const char *boot_protocol(void);

// The number after `name=` (decimal, or hexadecimal with 0x), or `fallback`.
u64 cmdline_number(const char *name, u64 fallback);
