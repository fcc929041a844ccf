// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Information from the loader.
#pragma once
#include "lib/types.h"

// Finds the command line in a PVH or multiboot start-info structure; `magic` is EAX at entry.
void loader_init(u32 magic, u64 start_info);

// "PVH" or "multiboot".
const char *boot_protocol(void);
