// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Ports, memory-mapped registers and the clock. Every access is one plain MOV, IN or OUT, and a
// compiler barrier: earlier stores are in memory when the device reads it.
#pragma once
#include "lib/types.h"

static inline void out8(u16 port, u8 value)
{
    asm volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline u8 in8(u16 port)
{
    u8 value;
    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

static inline void out32(u16 port, u32 value)
{
    asm volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline u32 in32(u16 port)
{
    u32 value;
    asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

static inline u8 read8(u64 address)
{
    u8 value;
    asm volatile("movb (%1), %0" : "=q"(value) : "r"(address) : "memory");
    return value;
}

static inline void write8(u64 address, u8 value)
{
    asm volatile("movb %0, (%1)" : : "q"(value), "r"(address) : "memory");
}

static inline void write16(u64 address, u16 value)
{
    asm volatile("movw %0, (%1)" : : "r"(value), "r"(address) : "memory");
}

static inline u32 read32(u64 address)
{
    u32 value;
    asm volatile("movl (%1), %0" : "=r"(value) : "r"(address) : "memory");
    return value;
}

static inline void write32(u64 address, u32 value)
{
    asm volatile("movl %0, (%1)" : : "r"(value), "r"(address) : "memory");
}

static inline u64 read64(u64 address)
{
    u64 value;
    asm volatile("movq (%1), %0" : "=r"(value) : "r"(address) : "memory");
    return value;
}

static inline void write64(u64 address, u64 value)
{
    asm volatile("movq %0, (%1)" : : "r"(value), "r"(address) : "memory");
}

static inline u64 timestamp(void)
{
    u32 low, high;
    asm volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
    return (u64)high << 32 | low;
}

static inline void relax(void)
{
    asm volatile("pause" : : : "memory");
}
