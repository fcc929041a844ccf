// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Device interrupts, as counted in /proc/interrupts.
#pragma once

#include <stdbool.h>

// Calls `each` for every interrupt whose line contains `needle`, with the text after the counters
// and their sum over all processors. Returns the number of interrupts.
unsigned for_each_interrupt(const char *needle, void (*each)(const char *text, unsigned long count, void *context),
                            void *context);

// Total count of the interrupts with `needle` in their line.
unsigned long interrupt_count(const char *needle);
