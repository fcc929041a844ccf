// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Device interrupts, as /proc/interrupts counts them.
#pragma once

#include <stdbool.h>

// Calls `each` for every interrupt whose line contains `needle`, with what its line says after the counters, and
// with their sum over all processors. How many there are.
unsigned for_each_interrupt(const char *needle, void (*each)(const char *text, unsigned long count, void *context),
                            void *context);

// How often the interrupts with `needle` in their line came, together.
unsigned long interrupt_count(const char *needle);
