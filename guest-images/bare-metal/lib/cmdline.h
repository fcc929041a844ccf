// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The command line.
#pragma once
#include "lib/types.h"

// Says what it is; the text stays where it is.
void cmdline_set(const char *text);

// The number after `name=` (decimal, or hexadecimal with 0x), or `fallback`.
u64 cmdline_number(const char *name, u64 fallback);
