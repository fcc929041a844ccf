// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Memory: what the compiler expects to find, and a pool of pages.
//
// The guest runs on an identity map, so a pointer's value is also the guest-physical address.
#pragma once
#include "lib/types.h"

void *memset(void *to, int value, size_t count);
void *memcpy(void *to, const void *from, size_t count);
int memcmp(const void *left, const void *right, size_t count);

static inline u64 gpa_of(const volatile void *pointer)
{
    return (u64)(uintptr_t)pointer;
}

// A zeroed page, valid until `pages_release_all`.
void *page_new(void);
void *pages_new(unsigned count);
void pages_release_all(void);

// Two regions of 2 MiB, aligned to their size, for what a large page maps. Never zeroed as a whole.
#define LARGE_SIZE 0x200000ull
#define LARGE_REGION_A 0x1000000ull
#define LARGE_REGION_B (LARGE_REGION_A + LARGE_SIZE)
