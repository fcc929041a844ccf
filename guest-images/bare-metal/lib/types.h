// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Fixed-width types and a few common macros.
#pragma once
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define BIT(n) (1ull << (n))
#define ARRAY_LEN(array) (sizeof(array) / sizeof((array)[0]))
#define PAGE_SIZE 4096ull

// Bits `low` to `high` of `value`, inclusive.
static inline u64 bits(u64 value, unsigned high, unsigned low)
{
    return (value >> low) & (~0ull >> (63 - (high - low)));
}
