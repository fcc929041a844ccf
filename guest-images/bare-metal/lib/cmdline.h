// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The command line.
#pragma once
#include "lib/types.h"

// Sets the command line; the text is not copied.
void cmdline_set(const char *text);

// The number after `name=` (decimal, or hexadecimal with 0x), or `fallback`.
u64 cmdline_number(const char *name, u64 fallback);
