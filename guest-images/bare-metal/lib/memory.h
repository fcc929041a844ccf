// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Memory: functions that the compiler expects, and a pool of pages, from `image_end` to `pool_end`.
//
// Guests run on an identity map, so a pointer's value is also the guest-physical address.
#pragma once
#include "lib/types.h"

// Provided by each guest, for its processor.
void *memset(void *to, int value, size_t count);
void *memcpy(void *to, const void *from, size_t count);

int memcmp(const void *left, const void *right, size_t count);

static inline u64 gpa_of(const volatile void *pointer)
{
    return (u64)(uintptr_t)pointer;
}

// Zeroed pages, valid until `pages_release_to`. Several are aligned to their size, a power of two.
void *page_new(void);
void *pages_new(unsigned count);

// Marks the current state of the pool; `pages_release_to` releases everything allocated later.
void *pages_mark(void);
void pages_release_to(void *mark);
