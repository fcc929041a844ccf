// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The frequency of the time-stamp counter, from KVM's clock or CPUID.
#include "lib/memory.h"
#include "lib/wait.h"

#define NANOSECONDS 1000000000ull
// Upper bound if it is unknown: waits become longer, not shorter.
#define FASTEST 4000000000ull

enum {
    LEAF_TSC = 0x15,
    LEAF_HYPERVISOR = 0x40000000,
    LEAF_KVM_FEATURES = LEAF_HYPERVISOR + 1,
    KVM_CLOCKSOURCE2 = 1 << 3,
    KVM_SYSTEM_TIME = 0x4b564d01, // MSR
    KVM_SYSTEM_TIME_ON = 1,
};

// The layout of the page for KVM_SYSTEM_TIME (KVM's documentation, x86/msr).
struct kvm_time {
    u32 version, padding;
    u64 tsc, nanoseconds;
    u32 tsc_to_nanoseconds;
    int8_t tsc_shift;
    u8 flags, more_padding[2];
};

struct registers {
    u32 a, b, c, d;
};

static struct registers cpuid(u32 leaf)
{
    struct registers found;

    asm volatile("cpuid" : "=a"(found.a), "=b"(found.b), "=c"(found.c), "=d"(found.d) : "a"(leaf), "c"(0));
    return found;
}

static void write_msr(u32 number, u64 value)
{
    asm volatile("wrmsr" : : "c"(number), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
}

static bool is_kvm(void)
{
    struct registers hypervisor = cpuid(LEAF_HYPERVISOR);

    // "KVMKVMKVM".
    return hypervisor.b == 0x4b4d564b && hypervisor.c == 0x564b4d56 && hypervisor.d == 0x4d;
}

static u64 from_kvm(void)
{
    static volatile struct kvm_time time __attribute__((aligned(64)));
    u64 frequency;

    if (!is_kvm() || !(cpuid(LEAF_KVM_FEATURES).a & KVM_CLOCKSOURCE2))
        return 0;
    write_msr(KVM_SYSTEM_TIME, gpa_of(&time) | KVM_SYSTEM_TIME_ON);
    // KVM writes it before the guest continues.
    frequency = time.tsc_to_nanoseconds ? (NANOSECONDS << 32) / time.tsc_to_nanoseconds : 0;
    frequency = time.tsc_shift < 0 ? frequency << -time.tsc_shift : frequency >> time.tsc_shift;
    write_msr(KVM_SYSTEM_TIME, 0);
    return frequency;
}

static u64 from_cpuid(void)
{
    struct registers tsc = {0};

    if (cpuid(0).a >= LEAF_TSC)
        tsc = cpuid(LEAF_TSC);
    return tsc.a ? (u64)tsc.c * tsc.b / tsc.a : 0;
}

u64 clock_frequency(void)
{
    static u64 frequency;

    if (!frequency)
        frequency = from_kvm();
    if (!frequency)
        frequency = from_cpuid();
    if (!frequency)
        frequency = FASTEST;
    return frequency;
}
