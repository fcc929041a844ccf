// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Memory-mapped registers and the clock. Earlier stores are visible to devices before a register
// write.
#pragma once
#include "lib/types.h"

static inline u32 read32(u64 address)
{
    u32 value;
    asm volatile("ldr %w0, [%1]\n\tdsb sy" : "=r"(value) : "r"(address) : "memory");
    return value;
}

static inline void write32(u64 address, u32 value)
{
    asm volatile("dsb sy\n\tstr %w0, [%1]" : : "r"(value), "r"(address) : "memory");
}

static inline u64 read64(u64 address)
{
    u64 value;
    asm volatile("ldr %0, [%1]\n\tdsb sy" : "=r"(value) : "r"(address) : "memory");
    return value;
}

static inline void write64(u64 address, u64 value)
{
    asm volatile("dsb sy\n\tstr %0, [%1]" : : "r"(value), "r"(address) : "memory");
}

static inline void write8(u64 address, u8 value)
{
    asm volatile("dsb sy\n\tstrb %w0, [%1]" : : "r"(value), "r"(address) : "memory");
}

static inline u8 read8(u64 address)
{
    u8 value;
    asm volatile("ldrb %w0, [%1]" : "=r"(value) : "r"(address) : "memory");
    return value;
}

static inline u64 timestamp(void)
{
    u64 ticks;
    asm volatile("isb\n\tmrs %0, cntvct_el0" : "=r"(ticks) : : "memory");
    return ticks;
}

static inline void relax(void)
{
    asm volatile("yield" : : : "memory");
}
