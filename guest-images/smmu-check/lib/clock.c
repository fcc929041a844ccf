// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "lib/wait.h"

u64 clock_frequency(void)
{
    u64 frequency;

    asm volatile("mrs %0, cntfrq_el0" : "=r"(frequency));
    return frequency;
}
