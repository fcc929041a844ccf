// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Text on the first serial port, and exit: `print` is here, the rest is provided by each guest.
#pragma once
#include "lib/types.h"

void console_init(void);
void put_char(char c);

// Supports %s %c %u (u32) %x (u32) %lx (u64), and a zero-padded width such as %02x.
__attribute__((format(printf, 1, 2))) void print(const char *format, ...);
void print_list(const char *format, va_list arguments);

// Ends the machine: 0 if everything passed, 1 otherwise.
__attribute__((noreturn)) void machine_exit(u8 code);
